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
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from ohem_mm import cli
from ohem_mm.config import UnknownConfigError, config_path

_REQUIRED = object()


def _key(kind: Any, default: Any = _REQUIRED, **more: Any) -> dict[str, Any]:
    """What is known of a key: its type in the file, and what holds without it."""
    return {"kind": kind, "default": default, **more}


@dataclass(frozen=True)
class Variant:
    """One row of the table: a config and what is changed in it."""

    name: str
    label: str = field(metadata=_key(str, ""))
    config: str = field(metadata=_key(str))
    cfg_options: tuple[dict[str, Any], ...] = field(metadata=_key(dict, {}))
    cell: tuple[int, ...] = ()  # where it stands in the grid
    row: str = ""  # of a grid in which variants are compared: which one this is


@dataclass(frozen=True)
class Axis:
    """An axis of the grid: a setting and its values."""

    name: str
    keys: tuple[str, ...] = field(metadata=_key((str, list), name="key"))
    values: tuple[Any, ...] = field(metadata=_key(list))
    labels: tuple[str, ...] = field(metadata=_key(list, []))


@dataclass(frozen=True)
class Tune:
    """A setting of which each variant takes its own best value, and what chooses it."""

    keys: tuple[str, ...] = field(metadata=_key((str, list), name="key"))
    name: str = field(metadata=_key((str, type(None)), None))
    values: tuple[float, ...] = field(metadata=_key(list, []))
    # Whether the values multiply what a config has, instead of taking its place.
    scale: bool = field(metadata=_key(list, [], name="scales"))
    seeds: tuple[int, ...] = field(metadata=_key(list, []))
    split: str = field(metadata=_key(str, "val", allowed=("val", "test")))
    # Points behind the baseline; None: no variant is dropped.
    drop_below: float | None = field(metadata=_key((int, float, type(None)), 1.5))

    def label(self, value: float) -> str:
        """For people."""
        return f"{self.name} {'x ' * self.scale}{value:g}"


@dataclass(frozen=True)
class Benchmark:
    """A benchmark file."""

    path: Path
    rows: dict[str, str]  # labels of the variants that are compared in each cell of the grid
    name: str = field(metadata=_key(str))
    title: str = field(metadata=_key(str, ""))
    note: str = field(metadata=_key(str, ""))
    metric: str = field(metadata=_key(str, "mIoU", allowed=("mIoU", "mDice")))
    split: str = field(metadata=_key(str, "test", allowed=("test", "val")))
    seeds: tuple[int, ...] = field(metadata=_key(list))
    threads: int = field(metadata=_key(int, 0, high=math.inf))
    baseline: str = field(metadata=_key(str))
    rare_below: float = field(metadata=_key((int, float), 0.02, high=1))
    data_root: str | None = field(metadata=_key((str, type(None)), None))
    cfg_options: dict[str, Any] = field(metadata=_key(dict, {}))
    variants: dict[str, Variant] = field(metadata=_key(dict, {}))
    axes: tuple[Axis, ...] = field(metadata=_key(dict, {}, name="grid"))  # rows, columns and panels
    amp: bool = field(metadata=_key(bool, False))  # bf16
    channels_last: bool = field(metadata=_key(bool, False))
    tune: Tune | None = field(metadata=_key(dict, {}))

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
        configs = _configs()
        inside = self.path.is_relative_to(configs)
        return self.path.relative_to(configs).as_posix() if inside else self.path.name

    def shared_value(self, value: float) -> float:
        """Check the value of ``--at``; return it as the file has it."""
        if self.tune is None:
            raise cli.UserError(f"--at {value:g}: {self.path} has no tune")
        if value not in self.tune.values:
            known = ", ".join(f"{v:g}" for v in self.tune.values)
            raise cli.UserError(f"--at {value:g}: the values of tune are {known}")
        return self.tune.values[self.tune.values.index(value)]


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


def load_benchmark(name: str) -> Benchmark:
    """Read a benchmark file, given by its path or its name below ``configs/``.

    Raises:
        UserError: There is no such file, or something in it is missing, misspelt or out of range.
    """
    try:
        path = config_path(name)
    except UnknownConfigError:
        found = (file.relative_to(_configs()).as_posix() for file in _configs().rglob("*.yaml"))
        shipped = ", ".join(sorted(file for file in found if not file.endswith("metafile.yaml")))
        raise cli.UserError(
            f"no benchmark file is called {name!r}; those that ship are {shipped}"
        ) from None
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise cli.UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    values = _read(raw, _keys(Benchmark), str(path))
    values["seeds"] = _seeds(values["seeds"], str(path))
    values["tune"] = _tune(values["tune"], values["seeds"], f"{path}: tune")
    variants = {}
    for key, given in values["variants"].items():
        where = f"{path}: variant {key!r}"
        variants[str(key)] = _variant(str(key), _read(given, _keys(Variant), where))
        _check_name(str(key), f"{where}: that is no name")
    values["axes"], cells = _grid(values.pop("grid"), variants, f"{path}: grid")
    # Without a config of its own, a grid compares the variants in each of its cells.
    compared = {variant.row for variant in cells.values()} - {""}
    rows = {name: variant.label for name, variant in variants.items() if name in compared}
    values["variants"] = cells if rows else variants | cells
    names = list(rows or values["variants"])
    if values["baseline"] not in names:
        raise cli.UserError(
            f"{path}: the baseline {values['baseline']!r} is none of the variants: "
            + ", ".join(names)
        )
    values["title"] = values["title"] or values["name"]
    values["note"] = " ".join(values["note"].split())
    return Benchmark(path=path, rows=rows, **values)


def _configs() -> Path:
    return config_path("tools/train.py").parents[1] / "configs"


def _keys(kind: Any) -> dict[str, Any]:
    """The keys that fill the fields of a dataclass."""
    return {f.metadata.get("name", f.name): f.metadata for f in fields(kind) if f.metadata}


def _read(raw: Any, keys: dict[str, Any], where: str) -> dict[str, Any]:
    """Check a mapping's keys and the types and limits of its values, and fill in the defaults."""
    if not isinstance(raw, dict):
        raise cli.UserError(f"{where} must be a mapping with the keys {', '.join(keys)}")
    for key in raw:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(keys)}"
            raise cli.UserError(f"{where} has an unknown key {key!r}; {hint}")
    values = {}
    for key, rule in keys.items():
        if key not in raw and rule["default"] is _REQUIRED:
            raise cli.UserError(f"{where} lacks the key {key!r}")
        value = values[key] = raw.get(key, copy.deepcopy(rule["default"]))
        kinds = rule["kind"] if isinstance(rule["kind"], tuple) else (rule["kind"],)
        fault = ""
        if not isinstance(value, kinds):
            fault = f"it must be a {' or '.join(kind.__name__ for kind in kinds)}"
        elif value not in rule.get("allowed", (value,)):
            fault = f"allowed are {', '.join(rule['allowed'])}"
        elif "high" in rule and not 0 <= value <= rule["high"]:
            fault = f"it must be from 0 to {rule['high']}"
        if fault:
            raise cli.UserError(f"{where}: {key} is {value!r}; {fault}")
    if values.get("name") is not None:
        _check_name(values["name"], f"{where}: name is {values['name']!r}")
    return values


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(r"[\w.=,+-]+", name):
        raise cli.UserError(f"{what}; letters, digits and _.=,+- are allowed")


def _seeds(seeds: list[Any], where: str) -> tuple[int, ...]:
    if not seeds or {type(s) for s in seeds} != {int} or len(set(seeds)) < len(seeds):
        raise cli.UserError(f"{where}: seeds is {seeds!r}; it must be a list of different integers")
    return tuple(seeds)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _variant(name: str, values: dict[str, Any]) -> Variant:
    return Variant(name, values["label"] or name, values["config"], (values["cfg_options"],))


def _tune(raw: dict[str, Any], seeds: tuple[int, ...], where: str) -> Tune | None:
    """What is tuned, and how."""
    if not raw:
        return None
    given = _read(raw, _keys(Tune), where)
    keys = _listed(given["key"])
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


def _grid(
    raw: dict[str, Any], variants: dict[str, Variant], where: str
) -> tuple[tuple[Axis, ...], dict[str, Variant]]:
    """The axes of a grid and its cells: its own config, or else each of the variants, in each."""
    if not raw:
        return (), {}
    own = {"config": _key(str, ""), "axes": _key(dict)}
    values = _read(raw, _keys(Variant) | own, where)
    if not values["config"] and not variants:
        raise cli.UserError(f"{where} needs a config, or variants to compare in each of its cells")
    axes = []
    for name, node in values["axes"].items():
        axis = _read(node, _keys(Axis), f"{where}: axis {name!r}")
        labels = [str(v) for v in axis["labels"]] or list(map(_short, axis["values"]))
        if not axis["values"] or len(set(labels)) != len(axis["values"]):
            raise cli.UserError(f"{where}: axis {name!r} needs values, and a label for each")
        keys = tuple(_listed(axis["key"]))
        axes.append(Axis(str(name), keys, tuple(axis["values"]), tuple(labels)))
    if not 1 <= len(axes) <= 3:
        raise cli.UserError(
            f"{where} has {len(axes)} axes; rows, columns and panels make 3 at most"
        )
    if values["config"]:
        variants = {"": _variant("grid", values)}
    else:
        more = values["cfg_options"]
        variants = {
            name: replace(variant, cfg_options=(*variant.cfg_options, more))
            for name, variant in variants.items()
        }
    cells = {}
    for cell in itertools.product(*(range(len(axis.values)) for axis in axes)):
        chosen = list(zip(axes, cell, strict=True))
        place = ",".join(f"{axis.name}={_short(axis.values[i])}" for axis, i in chosen)
        label = ", ".join(f"{axis.name} {axis.labels[i]}" for axis, i in chosen)
        options = {key: axis.values[i] for axis, i in chosen for key in axis.keys}
        for row, variant in variants.items():
            name = f"{row},{place}" if row else place
            _check_name(name, f"{where}: {name!r} is no name")
            cells[name] = Variant(
                name,
                f"{variant.label}, {label}" if row else label,
                variant.config,
                (*variant.cfg_options, options),
                cell,
                row,
            )
    return tuple(axes), cells


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
