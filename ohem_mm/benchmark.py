"""Benchmark files and records of ``tools/benchmark_miou.py``.

A benchmark file (YAML) names configs, what each variant changes in them, and seeds. A record is one
JSON object on a line: one finished run of one variant with one seed.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from ohem_mm import cli
from ohem_mm.config import config_path

# --- benchmark files -------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config and what is changed in it."""

    name: str
    label: str
    config: str
    cfg_options: tuple[dict[str, Any], ...]
    cell: tuple[int, ...] = ()  # where it stands in the grid


@dataclass(frozen=True)
class Axis:
    """An axis of the grid: a setting and its values."""

    name: str
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark file."""

    path: Path
    name: str
    title: str
    note: str
    metric: str
    split: str
    seeds: tuple[int, ...]
    threads: int
    baseline: str
    rare_below: float
    data_root: str | None
    cfg_options: dict[str, Any]
    variants: dict[str, Variant]
    axes: tuple[Axis, ...]  # rows, columns and panels of the grid

    @property
    def shown_path(self) -> str:
        """The file as the tool's argument: a shipped one by its short name."""
        configs = config_path("tools/train.py").parents[1] / "configs"
        inside = self.path.is_relative_to(configs)
        return self.path.relative_to(configs).as_posix() if inside else self.path.name


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML in which 1e-3 is a number: YAML 1.1 takes a number without a point for a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

_REQUIRED = object()
_FIELDS: dict[str, tuple[Any, Any]] = {
    # key: (type, default)
    "name": (str, _REQUIRED),
    "title": (str, ""),
    "note": (str, ""),
    "metric": (str, "mIoU"),
    "split": (str, "test"),
    "seeds": (list, _REQUIRED),
    "threads": (int, 0),
    "baseline": (str, _REQUIRED),
    "rare_below": ((int, float), 0.02),
    "data_root": ((str, type(None)), None),
    "cfg_options": (dict, {}),
    "variants": (dict, {}),
    "grid": (dict, {}),
}
_ALLOWED = {"metric": ("mIoU", "mDice"), "split": ("test", "val")}


def load_benchmark(name: str) -> Benchmark:
    """Read a benchmark file.

    Args:
        name: Its path, or its name below ``configs/`` (``quickstart/benchmark.yaml``).

    Raises:
        UserError: Something in it is missing, misspelt or out of range.
        UnknownConfigError: There is no such file.
    """
    path = config_path(name)
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except yaml.YAMLError as error:
        raise cli.UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = _fields(raw, _FIELDS, str(path))
    for key, allowed in _ALLOWED.items():
        if values[key] not in allowed:
            raise cli.UserError(
                f"{path}: {key} is {values[key]!r}; allowed are {', '.join(allowed)}"
            )
    for key, high in (("threads", math.inf), ("rare_below", 1)):
        if not 0 <= values[key] <= high:
            raise cli.UserError(f"{path}: {key} is {values[key]}; it must be from 0 to {high}")
    seeds = values["seeds"]
    if not seeds or {type(s) for s in seeds} != {int} or len(set(seeds)) < len(seeds):
        raise cli.UserError(f"{path}: seeds is {seeds!r}; it must be a list of different integers")
    variants = {
        str(key): _variant(str(key), value, f"{path}: variant {key!r}")
        for key, value in values.pop("variants").items()
    }
    axes, cells = _grid(values.pop("grid"), f"{path}: grid")
    variants |= cells
    if values["baseline"] not in variants:
        raise cli.UserError(
            f"{path}: the baseline {values['baseline']!r} is none of the variants: "
            + ", ".join(variants)
        )
    values["title"] = values["title"] or values["name"]
    values["note"] = " ".join(values["note"].split())
    return Benchmark(path=path, variants=variants, axes=axes, **{**values, "seeds": tuple(seeds)})


def _fields(raw: Any, fields: dict[str, tuple[Any, Any]], where: str) -> dict[str, Any]:
    """Check a mapping's keys and the types of its values, and fill in the defaults."""
    if not isinstance(raw, dict):
        raise cli.UserError(f"{where} must be a mapping with the keys {', '.join(fields)}")
    for key in raw:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(fields)}"
            raise cli.UserError(f"{where} has an unknown key {key!r}; {hint}")
    values = {}
    for key, (kind, default) in fields.items():
        if key not in raw and default is _REQUIRED:
            raise cli.UserError(f"{where} lacks the key {key!r}")
        value = raw.get(key, copy.deepcopy(default))
        if not isinstance(value, kind):
            names = [k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,))]
            raise cli.UserError(f"{where}: {key} is {value!r}; it must be a {' or '.join(names)}")
        values[key] = value
    name = values.get("name")
    if name is not None and not re.fullmatch(r"[\w.=,+-]+", name):
        raise cli.UserError(f"{where}: name is {name!r}; letters, digits and _.=,+- are allowed")
    return values


_VARIANT = {"label": (str, ""), "config": (str, _REQUIRED), "cfg_options": (dict, {})}


def _variant(name: str, raw: Any, where: str) -> Variant:
    values = _fields(raw, _VARIANT, where)
    if not re.fullmatch(r"[\w.=,+-]+", name):
        raise cli.UserError(f"{where}: only letters, digits and _.=,+- are allowed in a name")
    return Variant(name, values["label"] or name, values["config"], (values["cfg_options"],))


def _grid(raw: dict[str, Any], where: str) -> tuple[tuple[Axis, ...], dict[str, Variant]]:
    """The axes of a grid and one variant for each of its cells."""
    if not raw:
        return (), {}
    values = _fields(raw, {**_VARIANT, "axes": (dict, _REQUIRED)}, where)
    axes = []
    for name, node in values["axes"].items():
        fields = {
            "key": ((str, list), _REQUIRED),
            "values": (list, _REQUIRED),
            "labels": (list, []),
        }
        axis = _fields(node, fields, f"{where}: axis {name!r}")
        labels = axis["labels"] or list(map(_short, axis["values"]))
        if not axis["values"] or len(set(map(str, labels))) != len(axis["values"]):
            raise cli.UserError(f"{where}: axis {name!r} needs values, and a label for each")
        keys = axis["key"] if isinstance(axis["key"], list) else [axis["key"]]
        axes.append(Axis(str(name), tuple(keys), tuple(axis["values"]), tuple(map(str, labels))))
    if not 1 <= len(axes) <= 3:
        raise cli.UserError(
            f"{where} has {len(axes)} axes; rows, columns and panels make 3 at most"
        )
    cells = {}
    for cell in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = [(axis, i) for axis, i in zip(axes, cell, strict=True)]
        name = ",".join(f"{axis.name}={_short(axis.values[i])}" for axis, i in chosen)
        label = ", ".join(f"{axis.name} {axis.labels[i]}" for axis, i in chosen)
        options = {key: axis.values[i] for axis, i in chosen for key in axis.keys}
        variant = _variant(name, {k: values[k] for k in _VARIANT}, where)
        cells[name] = Variant(name, label, variant.config, (*variant.cfg_options, options), cell)
    return tuple(axes), cells


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- records ---------------------------------------------------------------------------------


def record_key(record: dict[str, Any]) -> tuple[Any, ...]:
    """What makes two records the same job."""
    return tuple(record[key] for key in ("benchmark", "variant", "seed", "config_hash"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a file of records; a last line that a kill has torn does not count.

    Raises:
        UserError: Another line is not a record.
    """
    return _parse(path.read_bytes(), path)[0] if path.is_file() else []


def _parse(content: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records, and how many bytes at the end belong to a torn one."""
    records: list[dict[str, Any]] = []
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record_key(record)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and not line.endswith(b"\n"):
                return records, len(line)
            raise cli.UserError(f"{path}, line {number} is not a record of this tool") from error
        records.append(record)
    return records, 0


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append a record on a line of its own, unless the file has it already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock(file, wait=True)
        file.seek(0)
        # Not read_records: closing the file there would end the lock here.
        content = file.read()
        records, torn = _parse(content, path)
        if record_key(record) in map(record_key, records):
            return
        file.truncate(len(content) - torn)
        if not torn and content and not content.endswith(b"\n"):
            file.write(b"\n")
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def lock(file: Any, wait: bool) -> bool:
    """Lock an open file for this process; the lock ends with the process, however it ends.

    Record locks, not flock: processes forked from this one (data loaders) do not hold them.
    """
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that a kill leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, ensure_ascii=False)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; None when there is none."""
    return json.loads(path.read_text()) if path.is_file() else None
