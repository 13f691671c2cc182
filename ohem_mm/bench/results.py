"""What the records of an accuracy benchmark say: the runs that count, their scores and pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from ohem_mm.bench.files import Benchmark
from ohem_mm.bench.text import half_width_of, pooled
from ohem_mm.bench.tuning import Choice, Run, choose, drops
from ohem_mm.errors import UserError


@dataclass(frozen=True)
class Results:
    """The records that a report is made from."""

    benchmark: Benchmark
    runs: dict[str, dict[int, Run]]  # variant, seed
    outdated: int  # records of earlier versions of a config
    choices: dict[str, Choice] = field(default_factory=dict)  # of tuning, one for each variant
    at: float | None = None  # the value that all variants share, instead of each one's best
    tuning: tuple[Run, ...] = ()  # the records of tuning that are not among the runs

    @property
    def records(self) -> list[Run]:
        """All of them, in the order of the benchmark file."""
        return [run for seeds in self.runs.values() for run in seeds.values()]

    @property
    def first(self) -> Run:
        """One that speaks for all."""
        return self.records[0]

    @property
    def block(self) -> str:
        """The name of the report's block in a page, and of its plots."""
        return self.benchmark.name + (f"@{self.at:g}" if self.at is not None else "")

    @property
    def dropped(self) -> dict[str, float]:
        """Variants that got no further seeds, and how many points each lies behind."""
        return drops(self.benchmark, self.choices) if self.choices and self.at is None else {}

    def label(self, variant: str) -> str:
        """For people."""
        return self.benchmark.variants[variant].label

    @property
    def rare(self) -> list[int]:
        """The classes that are rare."""
        shares = self.first["class_shares"]
        return [i for i, share in enumerate(shares) if share < self.benchmark.rare_below]

    @property
    def scores(self) -> dict[str, Callable[[Run], float]]:
        """The headline metric, and the same over the rare classes where there are some."""
        metric = self.benchmark.metric
        rare = {f"rare-class {metric}": self._rare_score} if self.rare else {}
        return {metric: lambda run: float(run["metrics"][metric]), **rare}

    def _rare_score(self, run: Run) -> float:
        """NaN where the split has none of the rare classes."""
        values = run[self.benchmark.metric[1:]]
        found = [values[i] for i in self.rare if values[i] is not None]
        return fmean(found) if found else math.nan

    def class_scores(self, variant: str, index: int) -> dict[int, float]:
        """A class's metric, seed by seed."""
        values = {s: r[self.benchmark.metric[1:]][index] for s, r in self.runs[variant].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def pairs(self, variant: str) -> list[tuple[Run, Run]]:
        """Its runs with those of the baseline, for the seeds that both have."""
        runs = self.runs.get(variant, {})
        base = self.runs.get(self.benchmark.baseline_of(variant), {})
        return [(run, base[seed]) for seed, run in runs.items() if seed in base]

    def differences(self, variant: str, score: Callable[[Run], float]) -> list[float]:
        """Of a score to that of the baseline, pair by pair."""
        return [score(run) - score(base) for run, base in self.pairs(variant)]


def select(benchmark: Benchmark, records: list[Run], at: float | None = None) -> Results:
    """Take the records of a benchmark's variants and seeds, of the last version of each config.

    With ``at``, all variants have that value of what is tuned, instead of each one's own best.
    """
    at = None if at is None else benchmark.shared_value(at)
    tune = benchmark.tune
    tried = (None,) if tune is None else tune.values
    records = [
        record
        for record in records
        if record["benchmark"] == benchmark.name
        and record["variant"] in benchmark.variants
        and record.get("tuned") in tried
    ]

    def place(record: Run) -> tuple[Any, ...]:
        return record["variant"], record.get("tuned")

    # Records of another version of a variant, or of another tune, are no rivals.
    families = {record["variant"]: record.get("untuned_hash") for record in records}
    versions = {
        place(record): record["config_hash"]
        for record in records
        if record.get("untuned_hash") == families[record["variant"]]
    }
    current = [r for r in records if r["config_hash"] == versions.get(place(r))]
    choices = choose(benchmark, current, benchmark.variants) if tune else {}
    # Seeds that are there to choose only are not reported.
    choosers = set(tune.seeds) - set(benchmark.seeds) if tune else set()
    runs: dict[str, dict[int, Run]] = {}
    for name in benchmark.variants:
        value = choices[name].best if choices and at is None else at
        seeds = {
            record["seed"]: record
            for record in current
            if place(record) == (name, value) and record["seed"] not in choosers
        }
        if seeds:
            runs[name] = dict(sorted(seeds.items()))
    if not runs:
        name = repr(benchmark.name)
        fault = f"there are no records of {name}; make them with"
        if current and at is None:
            fault = f"no value of {name} has been tried with all tuning seeds yet; go on with"
        raise UserError(f"{fault}: python tools/benchmark_miou.py run {benchmark.shown_path}")
    reported = {id(run) for seeds in runs.values() for run in seeds.values()}
    choosing = tune.seeds if tune and at is None else ()
    tuning = [run for run in current if run["seed"] in choosing and id(run) not in reported]
    return Results(benchmark, runs, len(records) - len(current), choices, at, tuple(tuning))


@dataclass(frozen=True)
class GridMap:
    """One number in every cell of the grid, for each seed."""

    name: str
    is_difference: bool
    panels: list[tuple[str, list[list[list[float]]]]]  # title; rows of columns of values
    spread: tuple[float, int] | None  # of differences between seeds, with its degrees of freedom

    @property
    def cells(self) -> list[list[float]]:
        """The values of each cell."""
        return [values for _, grid in self.panels for row in grid for values in row]

    def least(self, count: int) -> float:
        """The smallest mean of so many differences that is told from zero; inf if unknown."""
        return half_width_of(*self.spread, count) if self.spread and count else math.inf


def grid_maps(results: Results) -> list[GridMap]:
    """What there is to show cell by cell, in the order in which it is shown."""
    benchmark, axes = results.benchmark, results.benchmark.axes
    rows, columns, panels = [*(len(axis.values) for axis in axes), 1, 1, 1][:3]
    maps = []
    for name, score in results.scores.items():
        for row, label in (benchmark.rows or {"": ""}).items():
            is_difference = bool(row) and row != benchmark.baseline
            values: dict[tuple[int, ...], list[float]] = {}
            for variant in benchmark.variants.values():
                if variant.cell and variant.row == row:
                    values[variant.cell] = (
                        results.differences(variant.name, score)
                        if is_difference
                        else [*map(score, results.runs.get(variant.name, {}).values())]
                    )
            if not any(values.values()):
                continue
            title = f"{name}, {label}" if row else name
            if is_difference:
                title += f" minus {benchmark.baseline_label}"
            grids = [
                (
                    f"{axes[2].name} {axes[2].labels[k]}" if len(axes) == 3 else "",
                    [[values[(i, j, k)[: len(axes)]] for j in range(columns)] for i in range(rows)],
                )
                for k in range(panels)
            ]
            spread = pooled(values.values()) if is_difference else None
            maps.append(GridMap(title, is_difference, grids, spread))
    return maps
