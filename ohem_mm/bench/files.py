"""Benchmark files of ``tools/benchmark_miou.py``.

A benchmark file (YAML) names configs, what each variant changes in them, seeds, and, with
``tune:``, the values of a setting among which each variant takes its own best.
"""

from __future__ import annotations

import copy
import difflib
import itertools
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from ohem_mm import cli
from ohem_mm.config import UnknownConfigError, config_path


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config and what is changed in it."""

    name: str
    label: str
    config: str
    cfg_options: tuple[dict[str, Any], ...]
    cell: tuple[int, ...] = ()  # where it stands in the grid
    row: str = ""  # of a grid in which variants are compared: which one this is


@dataclass(frozen=True)
class Axis:
    """An axis of the grid: a setting and its values."""

    name: str
    keys: tuple[str, ...]
    values: tuple[Any, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Tune:
    """A setting of which each variant takes its own best value, and what chooses it."""

    keys: tuple[str, ...]
    name: str
    values: tuple[float, ...]
    scale: bool  # the values multiply what a config has, instead of taking its place
    seeds: tuple[int, ...]
    split: str
    drop_below: float | None  # points behind the baseline; None: no variant is dropped

    def label(self, value: float) -> str:
        """For people."""
        return f"{self.name} {'x ' * self.scale}{value:g}"


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
    rows: dict[str, str]  # labels of the variants that are compared in each cell of the grid
    amp: bool  # bf16
    channels_last: bool
    tune: Tune | None

    def baseline_of(self, variant: str) -> str:
        """The name of the variant that this one is compared with: in a grid, of the same cell."""
        row = self.variants[variant].row
        return self.baseline + variant[len(row) :] if row else self.baseline

    @property
    def baseline_label(self) -> str:
        """For people."""
        return self.rows.get(self.baseline) or self.variants[self.baseline].label

    @property
    def shown_path(self) -> str:
        """The file as the tool's argument: a shipped one by its short name."""
        configs = config_path("tools/train.py").parents[1] / "configs"
        inside = self.path.is_relative_to(configs)
        return self.path.relative_to(configs).as_posix() if inside else self.path.name


class _Loader(yaml.SafeLoader):  # type: ignore[misc,unused-ignore]
    """YAML with tuples (``!tuple [192, 256]``), in which 1e-3 is a number.

    YAML 1.1 takes a number without a point for a string.
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)

# mmcv's transforms tell a tuple (one size) from a list (sizes to choose from).
_Loader.add_constructor(
    "!tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
)

_NAME = re.compile(r"[\w.=,+-]+")
_NAME_RULE = "letters, digits and _.=,+- are allowed"
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
    "amp": (bool, False),
    "channels_last": (bool, False),
    "tune": (dict, {}),
}
_ALLOWED = {"metric": ("mIoU", "mDice"), "split": ("test", "val")}


def load_benchmark(name: str) -> Benchmark:
    """Read a benchmark file.

    Args:
        name: Its path, or its name below ``configs/`` (``quickstart/benchmark.yaml``).

    Raises:
        UserError: There is no such file, or something in it is missing, misspelt or out of range.
    """
    try:
        path = config_path(name)
    except UnknownConfigError:
        configs = config_path("tools/train.py").parents[1] / "configs"
        shipped = sorted(
            file.relative_to(configs).as_posix()
            for file in configs.rglob("*.yaml")
            if file.name != "metafile.yaml"
        )
        raise cli.UserError(
            f"no benchmark file is called {name!r}; those that ship are {', '.join(shipped)}"
        ) from None
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
    values["seeds"] = _seeds(values["seeds"], str(path))
    values["tune"] = _tune(values["tune"], values["seeds"], f"{path}: tune")
    variants = {
        str(key): _variant(str(key), value, f"{path}: variant {key!r}")
        for key, value in values.pop("variants").items()
    }
    axes, cells = _grid(values.pop("grid"), variants, f"{path}: grid")
    # Without a config of its own, a grid compares the variants in each of its cells.
    compared = {variant.row for variant in cells.values()} - {""}
    rows = {name: variant.label for name, variant in variants.items() if name in compared}
    variants = cells if rows else variants | cells
    if values["baseline"] not in (rows or variants):
        raise cli.UserError(
            f"{path}: the baseline {values['baseline']!r} is none of the variants: "
            + ", ".join(rows or variants)
        )
    values["title"] = values["title"] or values["name"]
    values["note"] = " ".join(values["note"].split())
    return Benchmark(path=path, variants=variants, axes=axes, rows=rows, **values)


def _seeds(seeds: list[Any], where: str) -> tuple[int, ...]:
    if not seeds or {type(s) for s in seeds} != {int} or len(set(seeds)) < len(seeds):
        raise cli.UserError(f"{where}: seeds is {seeds!r}; it must be a list of different integers")
    return tuple(seeds)


_TUNE = {
    "key": ((str, list), _REQUIRED),
    "name": ((str, type(None)), None),
    "values": (list, []),
    "scales": (list, []),
    "seeds": (list, []),
    "split": (str, "val"),
    "drop_below": ((int, float, type(None)), 1.5),
}


def _tune(raw: dict[str, Any], seeds: tuple[int, ...], where: str) -> Tune | None:
    """What is tuned, and how."""
    if not raw:
        return None
    given = _fields(raw, _TUNE, where)
    keys = given["key"] if isinstance(given["key"], list) else [given["key"]]
    if not keys or not all(isinstance(key, str) and key for key in keys):
        raise cli.UserError(f"{where}: key is {given['key']!r}; it must be a key or a list of them")
    if bool(given["values"]) == bool(given["scales"]):
        raise cli.UserError(
            f"{where} needs either values, which every key is set to, or scales, by which the "
            "value of each key in the config is multiplied"
        )
    kind = "values" if given["values"] else "scales"
    values = given[kind]
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    if len(values) < 2 or not numbers or sorted(set(values)) != values:
        raise cli.UserError(
            f"{where}: {kind} is {values!r}; it must be a list of two numbers or more that grow"
        )
    if given["split"] not in ("val", "test"):
        raise cli.UserError(f"{where}: split is {given['split']!r}; allowed are val, test")
    margin = given["drop_below"]
    if margin is not None and not margin >= 0:
        raise cli.UserError(f"{where}: drop_below is {margin}; it must be 0 or more, or null")
    return Tune(
        keys=tuple(keys),
        name=given["name"] or keys[0].rpartition(".")[2],
        values=tuple(values),
        scale=kind == "scales",
        seeds=_seeds(given["seeds"] or [seeds[0]], where),
        split=given["split"],
        drop_below=margin,
    )


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
    if name is not None and not _NAME.fullmatch(name):
        raise cli.UserError(f"{where}: name is {name!r}; {_NAME_RULE}")
    return values


_VARIANT = {"label": (str, ""), "config": (str, _REQUIRED), "cfg_options": (dict, {})}


def _variant(name: str, raw: Any, where: str) -> Variant:
    values = _fields(raw, _VARIANT, where)
    if not _NAME.fullmatch(name):
        raise cli.UserError(f"{where}: that is no name; {_NAME_RULE}")
    return Variant(name, values["label"] or name, values["config"], (values["cfg_options"],))


def _grid(
    raw: dict[str, Any], variants: dict[str, Variant], where: str
) -> tuple[tuple[Axis, ...], dict[str, Variant]]:
    """The axes of a grid and its cells: its own config, or else each of the variants, in each."""
    if not raw:
        return (), {}
    fields: dict[str, tuple[Any, Any]] = {
        **_VARIANT,
        "config": (str, ""),
        "axes": (dict, _REQUIRED),
    }
    values = _fields(raw, fields, where)
    if not values["config"] and not variants:
        raise cli.UserError(f"{where} needs a config, or variants to compare in each of its cells")
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
    if values["config"]:
        own = _variant("grid", {key: values[key] for key in _VARIANT}, where)
        compared = {"": own}
    else:
        compared = {
            name: replace(variant, cfg_options=(*variant.cfg_options, values["cfg_options"]))
            for name, variant in variants.items()
        }
    cells = {}
    for cell in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = [(axis, i) for axis, i in zip(axes, cell, strict=True)]
        name = ",".join(f"{axis.name}={_short(axis.values[i])}" for axis, i in chosen)
        label = ", ".join(f"{axis.name} {axis.labels[i]}" for axis, i in chosen)
        options = {key: axis.values[i] for axis, i in chosen for key in axis.keys}
        for row, variant in compared.items():
            full = f"{row},{name}" if row else name
            if not _NAME.fullmatch(full):
                raise cli.UserError(f"{where}: {full!r} is no name; {_NAME_RULE}")
            cells[full] = Variant(
                full,
                f"{variant.label}, {label}" if row else label,
                variant.config,
                (*variant.cfg_options, options),
                cell,
                row,
            )
    return tuple(axes), cells


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def check_shared_value(benchmark: Benchmark, value: float) -> float:
    """Check the value of ``--at``; return it as the benchmark file has it.

    Raises:
        UserError: It is none of the tuned values, or nothing is tuned.
    """
    if benchmark.tune is None:
        raise cli.UserError(f"--at {value:g}: {benchmark.path} has no tune")
    for known in benchmark.tune.values:
        if known == value:
            return known
    known_values = ", ".join(f"{v:g}" for v in benchmark.tune.values)
    raise cli.UserError(f"--at {value:g}: the values of tune are {known_values}")
