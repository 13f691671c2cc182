"""Records of what the compiler makes of the GPU kernels, and the tables that are made from them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ohem_mm.bench.provenance import provenance, versions
from ohem_mm.bench.text import table
from ohem_mm.disk import extend
from ohem_mm.errors import UserError
from ohem_mm.ops.triton.report import Row

COLUMNS = [*(field.name for field in fields(Row)), "triton", "commit", "command"]


def records(rows: Iterable[Row], command: str, commit: str | None = None) -> list[dict[str, Any]]:
    """Rows of the report with where they come from.

    Args:
        rows: Of the report.
        command: What made them.
        commit: Of the kernels; None: the one that is checked out.
    """
    found = provenance()
    commit = commit or (found["commit"] or "")[:7] + ("+" if found["dirty"] else "")
    source = {"triton": versions("triton").get("triton", ""), "commit": commit, "command": command}
    return [asdict(row) | source for row in rows]


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows to the records.

    Raises:
        UserError: The file is none of this tool's.
    """

    def more(content: bytes) -> tuple[bytes, int]:
        _parse(content, path)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not content:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode(), 0

    extend(path, more)


def read(path: Path) -> list[dict[str, str]]:
    """All rows of the records.

    Raises:
        UserError: There are none, or the file is none of this tool's.
    """
    if not path.is_file():
        raise UserError(f"there are no records in {path} yet; run without --report")
    return _parse(path.read_bytes(), path)


def _parse(content: bytes, path: Path) -> list[dict[str, str]]:
    reader = csv.DictReader(io.StringIO(content.decode(), newline=""))
    if content and reader.fieldnames != COLUMNS:
        raise UserError(f"{path} holds no records of this tool: its columns are others")
    return list(reader)


def tables(rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown: the latest rows of each machine, shape and floor, and beside them the first."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        key = (row["machine"], row["shape"], row["floor"])
        groups.setdefault(key, {}).setdefault(row["commit"], {})[row["kernel"]] = row
    return "\n\n".join(_table(key, commits) for key, commits in groups.items())


_SHOWN = ("registers", "loop", "issued", "microseconds")


def _table(key: tuple[str, str, str], commits: dict[str, dict[str, Mapping[str, Any]]]) -> str:
    machine, shape, floor = key
    names = list(dict.fromkeys((next(iter(commits)), list(commits)[-1])))
    kernels = list(dict.fromkeys(kernel for name in names for kernel in commits[name]))
    body = []
    for kernel in kernels:
        values = [[_shown(commits[name].get(kernel), what) for what in _SHOWN] for name in names]
        body.append([kernel, *(" / ".join(pair) for pair in zip(*values, strict=True))])
    sums = [
        [float(row["microseconds"] or "nan") for row in commits[name].values()] for name in names
    ]
    launches = " / ".join(f"{len(times)} launches" for times in sums)
    body.append([launches, "", "", "", " / ".join(f"{sum(times):.0f}" for times in sums)])
    head = ["kernel", "registers", "hottest loop", "10^6 warp instructions", "us by the model"]
    return f"{machine}, {shape}, floor {floor}, {' / '.join(names)}:\n\n{table(head, body)}"


def _shown(row: Mapping[str, Any] | None, what: str) -> str:
    return "-" if row is None or row[what] in (None, "") else str(row[what])
