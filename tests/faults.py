"""A fault campaign: training and benchmarks are ended at random moments, and must lose nothing.

    python tests/faults.py run training FOLDER        # 80 faults
    python tests/faults.py run benchmark FOLDER       # 28 faults
    python tests/faults.py table FOLDER --write

A fault is a signal (SIGKILL, SIGTERM, SIGINT) or a full disk, sent at a moment: while the program
starts, at a random iteration, while a checkpoint is being written (by ``slow_disk.py``, so that the
moment can be hit), or when a run of a benchmark has just finished. After each fault the same
command is started again, into the next fault, and at the end of a chain of faults without one.
Every start must go on from the newest checkpoint that can be read, which may be one interval old;
records must parse, none may be twice or lost, and no finished run may be repeated.

The draws depend on ``--seed`` alone; where a process is when its fault comes depends on the
machine too. Stop it when you like: it goes on with the first chain that has no line in
``FOLDER/PART.jsonl``. Needs POSIX signals and /proc; a full disk is a small tmpfs, which root may
mount, and without it these faults are left out, and said to be.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from fork_server import ForkServer

from ohem_mm.bench import report
from ohem_mm.config import config_path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OURS = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
INTERVAL = 10  # iterations from checkpoint to checkpoint
LENGTH = {"training": 90, "benchmark": 40}  # iterations of a run
CHAIN = 4  # faults from the start of a work dir to its end
OPTIONS = {
    "custom_imports.imports": ["ohem_mm", "ohem_mm.datasets", "slow_disk"],
    "default_hooks.checkpoint.interval": INTERVAL,
    "default_hooks.checkpoint.backend_args": {"backend": "slow"},
    "default_hooks.logger.interval": 1,
    "model.backbone.base_channels": 4,
    "model.decode_head.in_channels": 4,
    "model.decode_head.channels": 4,
    "model.data_preprocessor.size": [48, 48],
    "train_cfg.val_interval": 1000,
    "train_dataloader.batch_size": 2,
    "train_dataloader.dataset.num_scenes": 20,
    "train_dataloader.dataset.size": [48, 48],
    "val_dataloader.dataset.num_scenes": 2,
    "val_dataloader.dataset.size": [48, 48],
    "test_dataloader.dataset.num_scenes": 2,
    "test_dataloader.dataset.size": [48, 48],
}
SIGNALS = ("SIGKILL", "SIGTERM", "SIGINT")
KINDS = (*SIGNALS, "full disk")
# What is hit, where, and how often by each of its kinds.
PLANS = {
    "training": [
        ("train.py", "start", KINDS, 4),
        ("train.py", "training", KINDS, 8),
        ("train.py", "checkpoint", KINDS, 8),
    ],
    "benchmark": [
        ("benchmark_miou.py", "training", KINDS, 2),
        ("benchmark_miou.py", "checkpoint", KINDS, 2),
        ("benchmark_miou.py", "record", KINDS, 2),
        ("job", "training", SIGNALS[:2], 1),
        ("job", "checkpoint", SIGNALS[:2], 1),
    ],
}
PRELOADED = (
    "ohem_mm.cli.inspection", "ohem_mm.cli.labels", "mmseg.apis", "ohem_mm.datasets",
    "ohem_mm.bench.jobs", "ohem_mm.bench.plots",
)  # fmt: skip
NEW = 0, 0, False, {}  # of a job that has not been started
PATIENCE = 300  # seconds


class LostError(Exception):
    """What must not happen."""


def plan(part: str, seed: int, disk: bool, limit: int | None) -> list[list[tuple[str, str, str]]]:
    """All faults (what, when, kind) in chains."""
    faults = [
        (target, moment, kind)
        for target, moment, kinds, times in PLANS[part]
        for kind in kinds
        for _ in range(times)
        if disk or kind != "full disk"
    ]
    random.Random(f"{seed} {part}").shuffle(faults)
    return [faults[i : i + CHAIN] for i in range(0, len(faults), CHAIN)][:limit]


# --- what is on the disk ---------------------------------------------------------------------


def whole(folder: Path) -> int:
    """The iteration of the newest checkpoint that torch can load; 0 when there is none."""
    steps = {int(p.stem.split("_")[1]): p for p in folder.glob("iter_*.pth")}
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(Exception):  # a torn file raises anything
            torch.load(steps[step], weights_only=False, map_location="cpu")
            return step
    return 0


def written(folder: Path) -> dict[str, int]:
    """The checkpoints and when they were written, in ns; a torn one may be written again."""
    found = {}
    for path in folder.glob("iter_*.pth"):
        with contextlib.suppress(FileNotFoundError):  # old ones are deleted
            found[path.name] = path.stat().st_mtime_ns
    return found


def torn(folder: Path, before: dict[str, int]) -> bool:
    """Whether a checkpoint was written since then that cannot be loaded."""
    steps = [
        int(re.findall(r"\d+", name)[0])
        for name, moment in written(folder).items()
        if before.get(name) != moment
    ]
    return max(steps, default=0) > whole(folder)


def changes(path: Path) -> Callable[[], bool]:
    """A test whether a file has been written since now."""
    before = path.stat().st_mtime_ns if path.is_file() else None
    return lambda: path.is_file() and path.stat().st_mtime_ns != before


def iterations(log: str) -> list[int]:
    """The iterations that a log tells of; Python repeats a line that the log file cannot take."""
    return [int(i) for i in re.findall(r" - Iter\(train\) \[\s*(\d+)/", log)]


def read(path: Path, start: int = 0) -> str:
    """A log, from a byte on."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace")


def size(path: Path) -> int:
    """In bytes; 0 when there is no such file."""
    return path.stat().st_size if path.is_file() else 0


def parsed(path: Path) -> dict[tuple[str, int], str]:
    """The lines of a records file by variant and seed.

    Raises:
        LostError: A line does not parse, or two are of one run; but the last may lack its end.
    """
    found: dict[tuple[str, int], str] = {}
    for line in read(path).splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            if line.endswith("\n"):
                raise LostError(f"a line of {path} does not parse") from None
            break
        key = record["variant"], record["seed"]
        if key in found:
            raise LostError(f"{path} has {key} twice")
        found[key] = line.rstrip("\n")
    return found


class Disk:
    """A tmpfs that can be filled; a plain folder where none can be mounted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
        self.can_fill = (
            shutil.which("mount") is not None
            and subprocess.run(mount, capture_output=True, check=False).returncode == 0
        )

    def fill(self) -> None:
        """Leave not a byte."""
        with (self.folder / "filler").open("ab", buffering=0) as file:
            for block in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * block)

    def free(self) -> None:
        """Undo :meth:`fill`."""
        (self.folder / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if self.can_fill:
            subprocess.run(["umount", "-l", str(self.folder)], check=False)


# --- one program under faults ----------------------------------------------------------------


class Chain:
    """A work dir, the command that works in it, and what is checked between its starts."""

    tool = ""

    def __init__(self, server: ForkServer, disk: Disk, log: Path, rng: random.Random) -> None:
        self.server, self.disk, self.log, self.rng = server, disk, log, rng
        self.folder = disk.folder / "chain"
        disk.free()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        log.unlink(missing_ok=True)
        self.pid, self.code, self.begin = 0, None, 0
        self.prepare()

    def prepare(self) -> None:
        """Write what the command reads."""

    def arguments(self) -> list[str]:
        """Of the tool."""
        raise NotImplementedError

    def snapshot(self) -> Any:
        """What a start finds, for :meth:`check`."""
        raise NotImplementedError

    def check(self, before: Any) -> dict[str, Any]:
        """Compare what a run has left with what it found; return what the record says of it."""
        raise NotImplementedError

    def finished(self) -> None:
        """Check what a whole run leaves."""
        raise NotImplementedError

    def at(self, target: str, moment: str) -> Callable[[], bool]:
        """A test whether the moment has come."""
        raise NotImplementedError

    def victim(self, target: str) -> int | None:
        """The process that gets the signal."""
        return self.pid

    def start(self) -> None:
        """Start the command."""
        self.begin, self.code = size(self.log), None
        tool = ROOT / "tools" / self.tool
        self.pid = self.server.start([tool, *self.arguments()], self.folder, self.log)

    def runs(self) -> bool:
        """Whether the command still runs."""
        if self.code is None:
            self.code = self.server.poll(self.pid)
        return self.code is None

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait.

        Raises:
            LostError: Too long.
        """
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
                raise LostError(f"nothing happened for {PATIENCE} s")
            time.sleep(0.01)

    def output(self) -> str:
        """What the command has said since its last start."""
        return read(self.log, self.begin)

    def fault(self, target: str, moment: str, kind: str) -> dict[str, Any] | None:
        """Start the command and end it by a fault; None when it has ended before."""
        before = self.snapshot()
        self.start()
        come = self.at(target, moment)
        self.wait(lambda: come() or not self.runs())
        # Where in the writing of a checkpoint, or how long after the iteration.
        time.sleep(self.rng.uniform(0, 0.3))
        victim = self.victim(target) if self.runs() else None
        if victim is None:
            self.wait(lambda: not self.runs())
            self.end()
            if self.code != 0:
                raise LostError(f"exit code {self.code} without a fault: {self.output()[-2000:]}")
            return None
        if kind == "full disk":
            self.disk.fill()
        elif kind == "SIGINT":  # Ctrl-C reaches the whole session
            os.killpg(victim, signal.SIGINT)
        else:
            os.kill(victim, getattr(signal, kind))
        self.wait(lambda: not self.runs())
        self.end()
        self.disk.free()
        found = self.check(before)
        if kind == "full disk":
            if self.code == 0:
                return None  # nothing was left to write
            if "the disk is full (" not in self.output():
                raise LostError(f"exit code {self.code} and no sentence at a full disk")
        return found

    def end(self) -> None:
        """Wait until nothing of the command runs any more."""

    def complete(self) -> None:
        """Start the command without a fault, to its end.

        Raises:
            LostError: It does not get there, or lost something on the way.
        """
        before = self.snapshot()
        self.start()
        self.wait(lambda: not self.runs())
        self.end()
        if self.code != 0:
            raise LostError(f"exit code {self.code} without a fault: {self.output()[-2000:]}")
        self.check(before)
        self.finished()


def check_resume(text: str, newest: int, left: int) -> int:
    """Check where a run went on from, and what it left; return the iterations to be repeated."""
    done = iterations(text)
    if done:
        if done != list(range(newest + 1, done[-1] + 1)):
            raise LostError(f"iteration {newest} was on the disk, and training began at {done[0]}")
        if newest and f"resumed epoch: 0, iter: {newest}" not in text:
            raise LostError(f"training began at {done[0]} without resuming")
    if left < newest:
        raise LostError(f"iteration {newest} was on the disk, now it is {left}")
    lost = max(done[-1] - left, 0) if done else 0
    if lost > INTERVAL:
        raise LostError(f"iteration {done[-1]} was reached, and {left} is on the disk")
    return lost


class Training(Chain):
    """train.py --resume."""

    tool = "train.py"

    def arguments(self) -> list[str]:
        options = {"train_cfg.max_iters": LENGTH["training"], **OPTIONS}
        if not self.workers:
            options |= {
                f"{split}_dataloader.{key}": value
                for split in ("train", "val")
                for key, value in {"num_workers": 0, "persistent_workers": False}.items()
            }
        given = [f"{k}={v if isinstance(v, int) else json.dumps(v)}" for k, v in options.items()]
        return ["mine.py", "--work-dir", "work", "--resume", "--cfg-options", *given]

    def prepare(self) -> None:
        # mmengine imports what a file names, and not what the command line does.
        imports = {"imports": OPTIONS["custom_imports.imports"], "allow_failed_imports": False}
        (self.folder / "mine.py").write_text(
            f"_base_ = {str(config_path(CE))!r}\ncustom_imports = {imports}\n"
        )
        self.work = self.folder / "work"
        self.workers = self.rng.random() < 0.5

    def snapshot(self) -> tuple[int, dict[str, int]]:
        return whole(self.work), written(self.work)

    def at(self, target: str, moment: str) -> Callable[[], bool]:
        newest = whole(self.work)
        if moment == "start":
            seconds = time.monotonic() + self.rng.uniform(0, 2)
            return lambda: time.monotonic() > seconds
        if moment == "training":
            goal = newest + self.rng.randint(1, 2 * INTERVAL)
            return lambda: goal in iterations(self.output())
        goal = newest + INTERVAL * self.rng.randint(1, 2)
        return changes(self.work / f"iter_{goal}.pth")

    def check(self, before: tuple[int, dict[str, int]]) -> dict[str, Any]:
        newest, files = before
        text, broken, left = self.output(), torn(self.work, files), whole(self.work)
        repeated = check_resume(text, newest, left)
        return {"iteration": max(iterations(text), default=newest), "torn": broken,
                "repeated": repeated, "record": False}  # fmt: skip

    def finished(self) -> None:
        if whole(self.work) != LENGTH["training"] or not re.search("mIoU", self.output()):
            raise LostError(f"the last run ended at iteration {whole(self.work)}")


class Benchmark(Chain):
    """benchmark_miou.py run, with one job at a time or two."""

    tool = "benchmark_miou.py"
    variants = ("ce", "ours")

    def prepare(self) -> None:
        self.jobs = self.rng.choice([1, 2])
        self.records = self.folder / "faults.jsonl"
        options = {"train_cfg.max_iters": LENGTH["benchmark"], **OPTIONS}
        configs = dict(zip(self.variants, (CE, OURS), strict=True))
        content = {
            "name": "faults", "seeds": [0], "threads": 1, "baseline": "ce",
            "cfg_options": options,
            "variants": {name: {"config": config} for name, config in configs.items()},
        }  # fmt: skip
        # JSON is YAML.
        (self.folder / "faults.yaml").write_text(json.dumps(content))

    def arguments(self) -> list[str]:
        return ["run", "faults.yaml", "--jobs", str(self.jobs), "--work-dir", "work"]

    def places(self) -> dict[str, Path]:
        """The folder of each job that has been started."""
        work = self.folder / "work" / "faults"
        return {name: path for name in self.variants for path in (work / name).glob("seed0-*")}

    def processes(self) -> dict[str, int]:
        """Of each job that runs."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it has just ended
                words = path.read_text().split("\0")
                for name in self.variants:
                    job = f"work/faults/{name}/"
                    if "ohem_mm.bench.job" in words and any(w.startswith(job) for w in words):
                        pid = int(path.parent.name)
                        if os.readlink(f"/proc/{pid}/cwd") == str(self.folder.resolve()):
                            found[name] = min(pid, found.get(name, pid))
        return found

    def end(self) -> None:
        self.wait(lambda: not self.processes())

    def victim(self, target: str) -> int | None:
        if target == "job":
            return self.processes().get(self.hit)
        return self.pid

    def snapshot(self) -> dict[str, Any]:
        return {
            "records": parsed(self.records),
            "jobs": {
                name: (
                    whole(path),
                    size(path / "job.log"),
                    self.has_finished(path),
                    written(path),
                )
                for name, path in self.places().items()
            },
        }

    @staticmethod
    def has_finished(folder: Path) -> bool:
        """Whether the job has left its record."""
        return (folder / "record.json").is_file()

    def at(self, target: str, moment: str) -> Callable[[], bool]:
        before = self.snapshot()
        share = self.rng.randint(1, 2 * INTERVAL)
        steps = INTERVAL * self.rng.randint(1, 2)

        def come() -> bool:
            for name, path in self.places().items():
                newest, start, finished, files = before["jobs"].get(name, NEW)
                self.hit = name
                if moment == "record":
                    if not finished and self.has_finished(path):
                        return True
                elif moment == "training":
                    if newest + share in iterations(read(path / "job.log", start)):
                        return True
                elif written(path).get(goal := f"iter_{newest + steps}.pth") != files.get(goal):
                    return True
            return False

        return come

    def check(self, before: dict[str, Any]) -> dict[str, Any]:
        after = self.snapshot()
        for key, line in before["records"].items():
            if after["records"].get(key) != line:
                raise LostError(f"the record of {key} is gone")
        broken, repeated = False, 0
        for name, path in self.places().items():
            newest, start, finished, files = before["jobs"].get(name, NEW)
            text = read(path / "job.log", start)
            if finished or (name, 0) in before["records"]:
                if text:
                    raise LostError(f"{name} had finished and was run again")
                continue
            if self.has_finished(path):  # its checkpoints may be gone
                left = LENGTH["benchmark"]
            else:
                left = whole(path)
                broken |= torn(path, files)
            repeated = max(repeated, check_resume(text, newest, left))
        return {"iteration": None, "torn": broken, "repeated": repeated,
                "record": len(after["records"]) > len(before["records"])}  # fmt: skip

    def finished(self) -> None:
        lines = read(self.records).splitlines()
        if len(lines) != len(self.variants) or len(parsed(self.records)) != len(lines):
            raise LostError(f"{len(lines)} records of {len(self.variants)} runs")
        if any(json.loads(line)["iterations"] != LENGTH["benchmark"] for line in lines):
            raise LostError("a record of a run that was not whole")


# --- the campaign ----------------------------------------------------------------------------


def run_chain(
    faults: list[tuple[str, str, str]], make: Callable[[], Chain]
) -> Iterator[dict[str, Any]]:
    """Inject faults one after the other; yield what is found of each."""
    chain = make()
    for number, (target, moment, what) in enumerate(faults):
        line = {"target": target, "moment": moment, "kind": what, "lost": None}
        for _ in range(5):
            try:
                found = chain.fault(target, moment, what)
                if found is None and chain.code == 0:  # ran to its end before
                    chain.finished()
                    chain = make()
                if number == len(faults) - 1 and found is not None:
                    chain.complete()
            except LostError as error:
                yield {**line, "lost": str(error)}
                return
            if found is not None:
                yield {**line, **found}
                break
        else:
            print(f"missed five times: {line}", flush=True)


def run(part: str, folder: Path, seed: int, limit: int | None) -> list[dict[str, Any]]:
    """Run a part of the campaign; return its lines."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / f"{part}.jsonl"
    done = [json.loads(line) for line in read(results).splitlines()]
    disk = Disk(folder / f"disk-{part}")
    kind = {"training": Training, "benchmark": Benchmark}[part]
    if not disk.can_fill:
        print("no tmpfs can be mounted here: full disks are left out", flush=True)
    try:
        with ForkServer(PRELOADED, [ROOT, ROOT / "tests"]) as server:
            for number, faults in enumerate(plan(part, seed, disk.can_fill, limit)):
                if any(line["chain"] == number for line in done):
                    continue
                rng = random.Random(f"{seed} {part} {number}")
                log = folder / f"{part}-{number}.log"
                lines = []
                for line in run_chain(
                    faults, lambda log=log, rng=rng: kind(server, disk, log, rng)
                ):
                    lines.append({"seed": seed, "part": part, "chain": number, **line})
                    print(time.strftime("%H:%M:%S"), json.dumps(lines[-1]), flush=True)
                if lines and lines[-1]["lost"]:
                    shutil.copytree(disk.folder / "chain", folder / f"{part}-{number}-lost")
                with results.open("a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                done += lines
    finally:
        disk.close()
    return done


def summary(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Counts by what was hit, and when."""
    rows = []
    order = [(target, moment) for part in PLANS.values() for target, moment, *_ in part]
    groups = itertools.groupby(
        sorted(lines, key=lambda line: order.index((line["target"], line["moment"]))),
        key=lambda line: (line["target"], line["moment"]),
    )
    for (target, moment), group in groups:
        some = list(group)
        kinds = collections.Counter(line["kind"] for line in some)
        sound = [line for line in some if line["lost"] is None]
        rows.append(
            {
                "target": target,
                "moment": moment,
                **{kind: kinds[kind] for kind in KINDS},
                "torn": sum(line["torn"] for line in sound),
                "most repeated": max((line["repeated"] for line in sound), default=0),
                "lost": len(some) - len(sound),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The counts as a table."""
    head = ["hit", "while", *KINDS, "faults", "torn checkpoints", "iterations repeated", "losses"]
    lines = [head, ["---"] * len(head)]
    words = {"start": "starting", "training": "training", "checkpoint": "writing a checkpoint",
             "record": "writing a record"}  # fmt: skip
    for row in rows:
        hit = f"`{row['target']}`" if "." in row["target"] else "a job of the benchmark"
        kinds = [row[kind] for kind in KINDS]
        repeated = f"at most {row['most repeated']}"
        lines.append(
            [hit, words[row["moment"]], *kinds, sum(kinds), row["torn"], repeated, row["lost"]]
        )
    kinds = [sum(row[kind] for row in rows) for kind in KINDS]
    repeated = f"at most {max(row['most repeated'] for row in rows)}"
    torn, lost = (sum(row[key] for row in rows) for key in ("torn", "lost"))
    lines.append(["all", "", *kinds, sum(kinds), torn, repeated, lost])
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def versions() -> dict[str, str]:
    """Of what took part; the commit is the last one that changed the package or its tools."""
    import mmengine
    import mmseg

    commit = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", "ohem_mm", "tools"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    return {
        "commit": commit,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "mmengine": mmengine.__version__,
        "mmseg": mmseg.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }


def block(record: dict[str, Any], table: str) -> str:
    """What the page says of a record."""
    words = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"\n{table}\nRun with {words}.\n\n"


def publish(name: str, rows: list[dict[str, Any]], table: str) -> None:
    """Write the record ``docs/NAME.json``, and put it into the page."""
    record = {"versions": versions(), "rows": rows}
    (DOCS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    report.write(DOCS / "faults.md", name, block(record, table))


def main() -> int:
    """Run a part, or print the table of what was run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("run", help="inject faults")
    command.add_argument("part", choices=PLANS)
    command.add_argument("folder", type=Path)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--chains", type=int, help=f"only so many, of {CHAIN} faults each")
    command = commands.add_parser("table", help="print the counts")
    command.add_argument("folder", type=Path)
    command.add_argument("--write", action="store_true", help="and put them into docs/")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.command == "run":
        lines = run(args.part, folder, args.seed, args.chains)
    else:
        files = [folder / f"{part}.jsonl" for part in PLANS]
        lines = [json.loads(line) for file in files for line in read(file).splitlines()]
    rows = summary(lines)
    if args.command == "table" and args.write:
        publish("faults", rows, markdown(rows))
    print(markdown(rows), end="")
    return 1 if any(row["lost"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
