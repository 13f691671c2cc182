"""Records of what the compiler makes of the GPU kernels, and the tables that are made from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from ohem_mm.bench.provenance import provenance, versions
from ohem_mm.bench.records import Rows
from ohem_mm.bench.text import table
from ohem_mm.ops.triton.report import Row

COLUMNS = [*(field.name for field in fields(Row)), "triton", "commit", "command"]
read, append = Rows(COLUMNS).read, Rows(COLUMNS).append


def records(rows: Iterable[Row], command: str, commit: str | None = None) -> list[dict[str, Any]]:
    """Rows of the report with where they come from; the commit is that of the checkout if None."""
    found = provenance()
    commit = commit or (found["commit"] or "")[:7] + ("+" if found["dirty"] else "")
    source = {"triton": versions("triton").get("triton", ""), "commit": commit, "command": command}
    return [asdict(row) | source for row in rows]


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
