"""Runs of two processes of which one leaves late: how many die at their exit.

    python tests/exits.py FOLDER --write

A plain torch script is the control; the same work under ``ohem_mm.cli.run``, in which train.py and
test.py end, is ours. Which process is late, and by how much, is drawn. Stop it when you like: it
goes on with the first run that has no line in ``FOLDER/exits.jsonl``.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from faults import ROOT, publish, read
from fork_server import ForkServer

SCRIPT = Path(__file__).with_name("late_rank.py")
LATEST = 2.5  # seconds
SIDES = ("plain", "ours")


def run_once(server: ForkServer, side: str, late: int, seconds: float, log: Path) -> dict[str, Any]:
    """Start two ranks and wait for them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    log.unlink(missing_ok=True)
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    pids = [
        server.start(
            [SCRIPT, side, seconds if rank == late else 0], log.parent, log, RANK=str(rank), **meet
        )
        for rank in (0, 1)
    ]
    codes: list[int | None] = [None, None]
    while None in codes:
        time.sleep(0.05)
        codes = [server.poll(p) if c is None else c for p, c in zip(pids, codes, strict=True)]
    text = read(log)
    return {
        "side": side,
        "late": late,
        "seconds": seconds,
        "codes": codes,
        "worked": text.count("is done") == 2,
        "died": any(codes),
        "terminate": "terminate called" in text,
    }


def run(folder: Path, runs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Run each side so often, in turn; return a line of each run."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "exits.jsonl"
    lines = [json.loads(line) for line in read(results).splitlines()]
    # The first DistributedDataParallel imports torch._dynamo.
    with ForkServer(["torch._dynamo", "ohem_mm.cli"], [ROOT, ROOT / "tests"]) as server:
        for number in range(len(lines), runs * len(SIDES)):
            # Both sides get the same draws.
            rng = random.Random(f"{seed} {number // len(SIDES)}")
            late, seconds = rng.randrange(2), round(rng.uniform(0, LATEST), 3)
            side = SIDES[number % len(SIDES)]
            lines.append(run_once(server, side, late, seconds, folder / "exits.log"))
            if lines[-1]["died"]:
                print(json.dumps(lines[-1]), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    return lines


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts of each side."""
    rows = []
    for side in SIDES:
        some = [line for line in lines if line["side"] == side]
        codes = Counter(str(code) for line in some for code in line["codes"] if code)
        rows.append(
            {
                "side": side,
                "runs": len(some),
                "worked": sum(line["worked"] for line in some),
                "died": sum(line["died"] for line in some),
                "terminate": sum(line["terminate"] for line in some),
                "codes": dict(codes),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The counts as a table."""
    words = {"plain": "plain torch", "ours": "`ohem_mm.cli.run`"}
    text = "| | runs | both did their work | one died at its exit | exit codes |\n"
    text += "| --- | --- | --- | --- | --- |\n"
    for row in rows:
        codes = ", ".join(f"{code} ({count})" for code, count in row["codes"].items()) or "0"
        text += f"| {words[row['side']]} | {row['runs']} | {row['worked']} | {row['died']} |"
        text += f" {codes} |\n"
    return text


def main() -> int:
    """Run, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=100, help="of each side (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="put the counts into docs/")
    args = parser.parse_args()
    rows = summary(run(args.folder.resolve(), args.runs, args.seed))
    if args.write:
        publish("exits", rows, markdown(rows))
    print(markdown(rows), end="")
    ours = rows[1]
    return 1 if ours["died"] or ours["worked"] < ours["runs"] else 0


if __name__ == "__main__":
    sys.exit(main())
