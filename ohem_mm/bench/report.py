"""Tables and plots from the records of ``tools/benchmark_miou.py``, and from nothing else.

The same benchmark file and records give the same bytes.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ohem_mm.bench.files import Benchmark, check_shared_value
from ohem_mm.bench.text import (
    clock,
    difference,
    half_width_of,
    least_shown,
    mean_std,
    pooled,
    table,
)
from ohem_mm.bench.tuning import Choice, choose, drops
from ohem_mm.errors import UserError

MARKS = "<!-- report: {} -->", "<!-- end of report -->"


@dataclass(frozen=True)
class Results:
    """The records that a report is made from."""

    benchmark: Benchmark
    runs: dict[str, dict[int, dict[str, Any]]]  # variant, seed
    outdated: int  # records of earlier versions of a config
    choices: dict[str, Choice] = field(default_factory=dict)  # of tuning, one for each variant
    at: float | None = None  # the value that all variants share, instead of each one's best
    tuning: tuple[dict[str, Any], ...] = ()  # the records of tuning that are not among the runs

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of them, in the order of the benchmark file."""
        return [run for seeds in self.runs.values() for run in seeds.values()]

    @property
    def first(self) -> dict[str, Any]:
        """One that speaks for all."""
        return self.records[0]

    @property
    def dropped(self) -> dict[str, float]:
        """Variants that got no further seeds, and how many points each lies behind."""
        return drops(self.benchmark, self.choices) if self.choices and self.at is None else {}

    def value(self, variant: str) -> float | None:
        """The value of what is tuned that a variant's runs have."""
        return self.choices[variant].best if self.at is None else self.at

    @property
    def rare(self) -> list[int]:
        """The classes that are rare."""
        shares = self.first["class_shares"]
        return [i for i, share in enumerate(shares) if share < self.benchmark.rare_below]

    def score(self, run: dict[str, Any]) -> float:
        """The headline metric."""
        return float(run["metrics"][self.benchmark.metric])

    def rare_score(self, run: dict[str, Any]) -> float:
        """The headline metric over the rare classes; NaN where the split has none of them."""
        values = run[self.benchmark.metric[1:]]
        found = [values[i] for i in self.rare if values[i] is not None]
        return statistics.fmean(found) if found else math.nan

    def class_scores(self, variant: str, index: int) -> dict[int, float]:
        """A class's metric, seed by seed."""
        values = {s: r[self.benchmark.metric[1:]][index] for s, r in self.runs[variant].items()}
        return {seed: value for seed, value in values.items() if value is not None}

    def pairs(self, variant: str, score: Any) -> list[float]:
        """Differences to the baseline, for the seeds that both have."""
        base = self.runs.get(self.benchmark.baseline_of(variant), {})
        return [score(run) - score(base[s]) for s, run in self.runs[variant].items() if s in base]


def select(benchmark: Benchmark, records: list[dict[str, Any]], at: float | None = None) -> Results:
    """Take the records of a benchmark's variants and seeds, of the last version of each config.

    Args:
        benchmark: The benchmark file.
        records: All that there are.
        at: One value of what is tuned for all variants. None: each variant's own best.

    Raises:
        UserError: There are none, or ``at`` is none of the tuned values.
    """
    if at is not None:
        at = check_shared_value(benchmark, at)
    records = [record for record in records if record["benchmark"] == benchmark.name]
    tune = benchmark.tune
    if tune is None:
        records = [record for record in records if record.get("tuned") is None]
    else:
        records = [record for record in records if record.get("tuned") in tune.values]

    def place(record: dict[str, Any]) -> tuple[Any, ...]:
        return record["variant"], record.get("tuned")

    # Records of another version of a variant, or of another tune, are no rivals.
    families = {record["variant"]: record.get("untuned_hash") for record in records}
    versions = {
        place(record): record["config_hash"]
        for record in records
        if record.get("untuned_hash") == families[record["variant"]]
    }
    current, outdated = [], 0
    for record in records:
        if record["variant"] in benchmark.variants:
            if record["config_hash"] == versions.get(place(record)):
                current.append(record)
            else:
                outdated += 1
    choices = choose(benchmark, current, benchmark.variants) if tune else {}
    if at is None:
        shown = {name: choice.best for name, choice in choices.items()}
    else:
        shown = dict.fromkeys(choices, at)
    # Seeds that are there to choose only are not reported.
    choosers = set(tune.seeds) - set(benchmark.seeds) if tune else set()
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in benchmark.variants:
        seeds = {
            record["seed"]: record
            for record in current
            if place(record) == (variant, shown.get(variant)) and record["seed"] not in choosers
        }
        if seeds:
            runs[variant] = dict(sorted(seeds.items()))
    if not runs and current and at is None:
        raise UserError(
            f"no value of {benchmark.name!r} has been tried with all tuning seeds yet; go on with: "
            f"python tools/benchmark_miou.py run {benchmark.shown_path}"
        )
    if not runs:
        raise UserError(
            f"there are no records of {benchmark.name!r}; make them with: "
            f"python tools/benchmark_miou.py run {benchmark.shown_path}"
        )
    reported = {id(run) for seeds in runs.values() for run in seeds.values()}
    tuning = [] if at is not None else [run for run in current if id(run) not in reported]
    return Results(benchmark, runs, outdated, choices, at, tuple(tuning))


def markdown(results: Results) -> str:
    """The report in markdown; the same records and benchmark file give the same bytes."""
    benchmark = results.benchmark
    parts = [f"### {benchmark.title}"]
    if benchmark.note:
        parts.append(benchmark.note)
    if benchmark.tune is not None and results.at is not None:
        parts[0] += f", all at {benchmark.tune.label(results.at)}"
        parts.append(
            f"**All variants share {benchmark.tune.label(results.at)}: this compares them at one "
            "value, not each at its best.**"
        )
    rows = [name for name in results.runs if not benchmark.variants[name].cell]
    if rows:
        parts.append(_main_table(results, rows))
    parts += _grid_tables(results)
    if benchmark.tune is not None and results.at is None:
        parts += _tuning(results)
    parts += [_reading(results), _setup(results)]
    missing = _missing(results)
    if missing:
        parts.append(f"Not run yet: {missing}.")
    if rows:
        metric = benchmark.metric[1:]
        summary = f"{metric} of each class, mean over seeds"
        body = _class_table(results, rows)
        parts.append(f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def _main_table(results: Results, rows: list[str]) -> str:
    benchmark = results.benchmark
    metric, tune = benchmark.metric, benchmark.tune
    against = [f"vs {benchmark.baseline_label}"] + ["least"] * bool(tune)
    header = ["variant", *([tune.name, "seeds"] if tune else []), metric, *against]
    if results.rare:
        header += [f"rare-class {metric}", *against]
    validated = all(run["curve"] for name in rows for run in results.runs[name].values())
    header += [f"val {metric}"] * validated + ["aAcc", "kept", "training", "memory"]
    lines = []
    for name in rows:
        runs = list(results.runs[name].values())
        base = name == benchmark.baseline
        line = [benchmark.variants[name].label]
        if tune:
            value = results.value(name)
            line += ["-" if value is None else f"{value:g}", str(len(runs))]
        for score in [results.score, results.rare_score][: 2 if results.rare else 1]:
            line.append(mean_std([score(run) for run in runs]))
            line.append("" if base else difference(results.pairs(name, score)))
            if tune:
                line.append("" if base else least_shown(results.pairs(name, score)))
        if validated:
            line.append(mean_std([run["curve"][-1][1] for run in runs]))
        line.append(mean_std([run["metrics"]["aAcc"] for run in runs]))
        kept = [statistics.fmean(r["kept_share"].values()) for r in runs if r["kept_share"]]
        line.append(f"{100 * statistics.fmean(kept):.1f} %" if kept else "")
        line.append(clock(statistics.fmean(run["train_seconds"] for run in runs)))
        line.append(f"{max(run['peak_memory_mib'] for run in runs):.0f} MiB")
        lines.append(line)
    return table(header, lines)


def _class_table(results: Results, rows: list[str]) -> str:
    labels = [results.benchmark.variants[name].label for name in rows]
    lines = []
    for i, name in enumerate(results.first["classes"]):
        scores = [list(results.class_scores(row, i).values()) for row in rows]
        cells = [f"{statistics.fmean(values):.2f}" if values else "-" for values in scores]
        lines.append([name, f"{100 * results.first['class_shares'][i]:.2f} %", *cells])
    return table(["class", "pixels", *labels], lines)


def _tuning(results: Results) -> list[str]:
    """What tuning saw and chose, variant by variant."""
    benchmark, tune = results.benchmark, results.benchmark.tune
    assert tune is not None
    choices = {
        name: choice for name, choice in results.choices.items() if any(choice.scores.values())
    }

    def labels(names: Iterable[str]) -> str:
        return ", ".join(benchmark.variants[name].label for name in names)

    lines = []
    for name, choice in choices.items():
        cells = [mean_std(list(choice.scores[value].values())) for value in tune.values]
        cells = [
            f"**{cell}**" if value == choice.best else cell
            for value, cell in zip(tune.values, cells, strict=True)
        ]
        lines.append([benchmark.variants[name].label, *cells])
    seeds = f"seed{'s' * (len(tune.seeds) > 1)} {', '.join(map(str, tune.seeds))}"
    words = (
        f"{tune.name} of each variant, chosen by the {tune.split} {benchmark.metric} after "
        f"training ({seeds}; the best in bold)"
    )
    seen = table(["variant", *map(tune.label, tune.values)], lines)
    if benchmark.rows:  # a line for each variant in each cell
        parts = [f"<details><summary>{words}</summary>\n\n{seen}\n\n</details>"]
    else:
        parts = [f"{words}:", seen]
    if tune.split == benchmark.split:
        parts.append(
            f"The choice was made on the images that are reported ({tune.split}), so the scores "
            "are too high."
        )
    ends = [name for name, choice in choices.items() if choice.at_end]
    if ends:
        parts.append(
            "The best lies at an end of the range, and a better one may lie beyond it: "
            f"{labels(ends)}."
        )
    for name, behind in results.dropped.items():
        base = benchmark.variants[benchmark.baseline_of(name)].label
        parts.append(
            f"No further seeds for {benchmark.variants[name].label}: at its best it lies "
            f"{behind:.2f} points behind {base} on {tune.split}, more than {tune.drop_below:g}."
        )
    open_ = [
        f"{benchmark.variants[name].label} ("
        + "; ".join(f"{tune.label(value)}, seed {seed}" for value, seed in choice.missing)
        + ")"
        for name, choice in results.choices.items()
        if not choice.finished
    ]
    if open_:
        parts.append(f"Not tuned yet: {'; '.join(open_)}.")
    return parts


@dataclass(frozen=True)
class GridMap:
    """One number in every cell of the grid, for each seed."""

    name: str
    is_difference: bool
    panels: list[tuple[str, list[list[list[float]]]]]  # title; rows of columns of values
    spread: tuple[float, int] | None  # of differences between seeds, with its degrees of freedom

    def least(self, count: int) -> float:
        """The smallest mean of so many differences that is told from zero; inf if unknown."""
        return half_width_of(*self.spread, count) if self.spread and count else math.inf


def grid_maps(results: Results) -> list[GridMap]:
    """What there is to show cell by cell, in the order in which it is shown."""
    benchmark = results.benchmark
    maps = []
    for name, score in _grid_scores(results):
        for row, label in (benchmark.rows or {"": ""}).items():
            cells = {v.cell: v.name for v in benchmark.variants.values() if v.cell and v.row == row}
            is_difference = bool(row) and row != benchmark.baseline
            values = {}
            for cell, variant in cells.items():
                runs = results.runs.get(variant, {})
                if is_difference:
                    values[cell] = results.pairs(variant, score) if runs else []
                else:
                    values[cell] = [score(run) for run in runs.values()]
            if not any(values.values()):
                continue
            title = f"{name}, {label}" if row else name
            if is_difference:
                title += f" minus {benchmark.baseline_label}"
            spread = pooled(values.values()) if is_difference else None
            maps.append(GridMap(title, is_difference, _panels(benchmark, values), spread))
    return maps


def _panels(
    benchmark: Benchmark, values: dict[tuple[int, ...], list[float]]
) -> list[tuple[str, list[list[list[float]]]]]:
    """The cells as tables, a panel for each value of the third axis."""
    axes = benchmark.axes
    shape = [len(axis.values) for axis in axes] + [1] * (3 - len(axes))
    found = []
    for k in range(shape[2]):
        title = f"{axes[2].name} {axes[2].labels[k]}" if len(axes) == 3 else ""
        grid = [[values[(i, j, k)[: len(axes)]] for j in range(shape[1])] for i in range(shape[0])]
        found.append((title, grid))
    return found


def _grid_scores(results: Results) -> list[tuple[str, Any]]:
    metric = results.benchmark.metric
    scores: list[tuple[str, Any]] = [(metric, results.score)]
    return scores + ([(f"rare-class {metric}", results.rare_score)] if results.rare else [])


def _grid_tables(results: Results) -> list[str]:
    axes = results.benchmark.axes
    parts = []
    for shown in grid_maps(results):

        def cell(values: list[float], shown: GridMap = shown) -> str:
            if not shown.is_difference or not values:
                return mean_std(values)
            mean = statistics.fmean(values)
            return f"**{mean:+.2f}**" if abs(mean) > shown.least(len(values)) else f"{mean:+.2f}"

        columns = [shown.name]
        if len(axes) > 1:
            columns = [f"{axes[1].name} {v}" for v in axes[1].labels]
        for title, grid in shown.panels:
            lines = [
                [label, *map(cell, row)] for label, row in zip(axes[0].labels, grid, strict=True)
            ]
            parts.append(f"{shown.name}{', ' if title else ''}{title}:")
            parts.append(table([axes[0].name, *columns], lines))
        if shown.spread:
            count = max(len(v) for _, grid in shown.panels for row in grid for v in row)
            spread, freedom = shown.spread
            parts.append(
                f"Noise of {shown.name}: between seeds a difference varies by {spread:.2f} "
                f"(standard deviation, pooled over the cells, {freedom} degrees of freedom), so "
                f"the mean of {count} seeds shows nothing below {shown.least(count):.2f} (95 %). "
                "Bold where it shows something."
            )
    return parts


def _reading(results: Results) -> str:
    """How to read the tables."""
    benchmark = results.benchmark
    label = benchmark.baseline_label
    counts = {len(seeds) for seeds in results.runs.values()}
    text = f"All metrics are in per cent, on the {benchmark.split} split. "
    if counts == {1}:
        text += "One seed: differences have no interval, and small ones mean nothing. "
    else:
        text += (
            f"± is the sample standard deviation over seeds. Differences to {label} are paired by "
            "seed; in brackets is the 95 % interval (Student t), bold where it excludes zero, each "
            "variant taken on its own. "
        )
    if benchmark.tune is not None and counts != {1}:
        text += (
            "least: the smallest difference that the seeds of the row could have shown, half the "
            "width of the interval. "
        )
    if results.rare:
        names = ", ".join(results.first["classes"][i] for i in results.rare)
        text += f"Rare classes (below {100 * benchmark.rare_below:g} % of the pixels): {names}. "
    if any(run["kept_share"] for run in results.records):
        text += "kept: share of the valid pixels that mining kept, mean of the logged iterations. "
    on_gpu = results.first["hardware"]["gpu"]
    text += f"memory: highest peak {'allocated on the GPU' if on_gpu else 'of the process'}. "
    return text + _pairing(results)


def _pairing(results: Results) -> str:
    """Whether the fingerprints bear out that the runs of a seed are paired."""
    benchmark = results.benchmark
    bases = {name: results.runs.get(benchmark.baseline_of(name), {}) for name in results.runs}
    if not any(bases.values()):
        return ""
    sentences = []

    def same_batches(a: dict[str, Any], b: dict[str, Any]) -> bool:
        # A resumed run noted as many as it had seen before.
        return all(x == y for x, y in zip(a["batches"], b["batches"], strict=False))

    checks: dict[str, Callable[[dict[str, Any], dict[str, Any]], bool]] = {
        "initial weights": lambda a, b: bool(a["weights"] == b["weights"]),
        "order of the images": lambda a, b: bool(a["order"] == b["order"]),
        "first batches": same_batches,
    }
    for what, same in checks.items():
        others = [
            benchmark.variants[variant].label
            for variant, runs in results.runs.items()
            if not all(
                same(run, bases[variant][seed])
                for seed, run in runs.items()
                if seed in bases[variant]
            )
        ]
        if others:
            label = benchmark.baseline_label
            sentences.append(f"Unlike {label}: {what} in {', '.join(others)}.")
    if not sentences:
        sentences = ["Runs of one seed have the same initial weights and order of the images."]
    resumed = sum(bool(run["resumed"]) for run in results.records)
    if resumed:
        sentences.append(
            f"{resumed} of the runs {'was' if resumed == 1 else 'were'} interrupted and resumed."
        )
    return " ".join(sentences)


def _setup(results: Results) -> str:
    """Where the figures come from."""
    benchmark, records = results.benchmark, [*results.records, *results.tuning]
    tuning = f", {len(results.tuning)} of them to tune" if results.tuning else ""

    def listed(values: Iterable[Any]) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    def machine(run: dict[str, Any]) -> str:
        hardware = run["hardware"]
        text = f"{hardware['cpu']}, {hardware['cores']} cores"
        if hardware["gpu"]:
            return f"{hardware['gpu']} ({text}), {run['jobs']} at a time{processes(run)}"
        threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)} a job"
        return f"{text}, no GPU, {threads}, {run['jobs']} at a time{processes(run)}"

    def processes(run: dict[str, Any]) -> str:
        return f", {run['processes']} processes each" if run["processes"] > 1 else ""

    def commit(run: dict[str, Any]) -> str:
        if run["commit"] is None:
            return "not in a checkout"
        return f"{run['commit'][:7]}{' with uncommitted changes' * bool(run['dirty'])}"

    options = dict(kv for run in records for kv in run["cfg_options"].items())
    command = f"python tools/benchmark_miou.py run {benchmark.shown_path}"
    if results.at is not None:
        command += f" --at {results.at:g}"
    if options:
        settings = " ".join(shlex.quote(f"{k}={v}") for k, v in sorted(options.items()))
        command += f" --cfg-options {settings}"
    seconds = sum(run["train_seconds"] + run["test_seconds"] for run in records)
    versions = listed(
        " ".join([name, version]) for run in records for name, version in run["versions"].items()
    )
    text = (
        f"{listed(run['iterations'] for run in records)} iterations; seeds "
        f"{listed(sorted({run['seed'] for run in records}))}; {len(records)} runs{tuning}, "
        f"{clock(seconds)} in all if run one by one. "
        f"{listed(map(machine, records))}; {versions}; commit {listed(map(commit, records))}. "
        f"Made by `{command}`."
    )
    if results.outdated:
        text += f" {results.outdated} records of earlier versions of the configs are left out."
    return text


def _missing(results: Results) -> str:
    benchmark = results.benchmark
    missing = []
    for name, variant in benchmark.variants.items():
        seeds = [str(s) for s in benchmark.seeds if s not in results.runs.get(name, {})]
        choice = results.choices.get(name) if results.at is None else None
        # Which value these seeds are to have is not known yet, or they are not to be run.
        if choice is not None and (name in results.dropped or not choice.finished):
            continue
        if seeds:
            missing.append(f"{variant.label} (seed {', '.join(seeds)})")
    return "; ".join(missing)


def write(file: Path, name: str, text: str) -> None:
    """Put a report between its marks in a markdown file.

    Raises:
        UserError: The file does not exist or lacks the marks.
    """
    start, end = MARKS[0].format(name), MARKS[1]
    if not file.is_file():
        raise UserError(f"there is no page {str(file)!r} to put the report into")
    content = file.read_text(encoding="utf-8")
    head, found, rest = content.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{file} has no block from {start!r} to {end!r}")
    file.write_text(f"{head}{start}\n{text}{end}{tail}", encoding="utf-8")
