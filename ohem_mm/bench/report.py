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

from ohem_mm import cli
from ohem_mm.bench.files import Benchmark, check_shared_value
from ohem_mm.bench.text import clock, difference, mean_std, table
from ohem_mm.bench.tuning import Choice, choose

MARKS = "<!-- report: {} -->", "<!-- end of report -->"


@dataclass(frozen=True)
class Results:
    """The records that a report is made from."""

    benchmark: Benchmark
    runs: dict[str, dict[int, dict[str, Any]]]  # variant, seed
    outdated: int  # records of earlier versions of a config
    choices: dict[str, Choice] = field(default_factory=dict)  # of tuning, one for each variant
    at: float | None = None  # the value that all variants share, instead of each one's best

    @property
    def records(self) -> list[dict[str, Any]]:
        """All of them, in the order of the benchmark file."""
        return [run for seeds in self.runs.values() for run in seeds.values()]

    @property
    def first(self) -> dict[str, Any]:
        """One that speaks for all."""
        return self.records[0]

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
        base = self.runs.get(self.benchmark.baseline, {})
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
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for variant in benchmark.variants:
        value = at if at is not None or tune is None else choices[variant].best
        seeds = {
            record["seed"]: record
            for record in current
            if place(record) == (variant, value)
            and (tune is None or record["seed"] not in set(tune.seeds) - set(benchmark.seeds))
        }
        if seeds:
            runs[variant] = dict(sorted(seeds.items()))
    if not runs:
        raise cli.UserError(
            f"there are no records of {benchmark.name!r}; make them with: "
            f"python tools/benchmark_miou.py run {benchmark.shown_path}"
        )
    return Results(benchmark, runs, outdated, choices, at)


def markdown(results: Results) -> str:
    """The report in markdown; the same records and benchmark file give the same bytes."""
    benchmark = results.benchmark
    parts = [f"### {benchmark.title}"]
    if benchmark.note:
        parts.append(benchmark.note)
    rows = [name for name in results.runs if not benchmark.variants[name].cell]
    if rows:
        parts.append(_main_table(results, rows))
    parts += _grid_tables(results)
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
    metric = benchmark.metric
    against = f"vs {benchmark.variants[benchmark.baseline].label}"
    header = ["variant", metric, against]
    if results.rare:
        header += [f"rare-class {metric}", against]
    validated = all(run["curve"] for name in rows for run in results.runs[name].values())
    header += [f"val {metric}"] * validated + ["aAcc", "kept", "training", "memory"]
    lines = []
    for name in rows:
        runs = list(results.runs[name].values())
        base = name == benchmark.baseline
        line = [benchmark.variants[name].label]
        for score in [results.score, results.rare_score][: 2 if results.rare else 1]:
            line.append(mean_std([score(run) for run in runs]))
            line.append("" if base else difference(results.pairs(name, score)))
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


def panels(results: Results) -> list[tuple[str, list[list[list[dict[str, Any]]]]]]:
    """The grid as (title, rows of columns of runs), a panel for each value of the third axis."""
    axes = results.benchmark.axes
    cells = {
        variant.cell: list(results.runs.get(variant.name, {}).values())
        for variant in results.benchmark.variants.values()
        if variant.cell
    }
    if not any(cells.values()):
        return []
    shape = [len(axis.values) for axis in axes] + [1] * (3 - len(axes))
    panels = []
    for k in range(shape[2]):
        title = f"{axes[2].name} {axes[2].labels[k]}" if len(axes) == 3 else ""
        grid = [[cells[(i, j, k)[: len(axes)]] for j in range(shape[1])] for i in range(shape[0])]
        panels.append((title, grid))
    return panels


def grid_scores(results: Results) -> list[tuple[str, Any]]:
    """The scores that are shown cell by cell: names and functions of a run."""
    metric = results.benchmark.metric
    scores: list[tuple[str, Any]] = [(metric, results.score)]
    return scores + ([(f"rare-class {metric}", results.rare_score)] if results.rare else [])


def _grid_tables(results: Results) -> list[str]:
    axes = results.benchmark.axes
    parts = []
    for name, score in grid_scores(results):
        for title, grid in panels(results):
            columns = [f"{axes[1].name} {v}" for v in axes[1].labels] if len(axes) > 1 else [name]
            lines = [
                [label, *(mean_std([score(run) for run in runs]) for runs in row)]
                for label, row in zip(axes[0].labels, grid, strict=True)
            ]
            parts.append(f"{name}{', ' if title else ''}{title}:")
            parts.append(table([axes[0].name, *columns], lines))
    return parts


def _reading(results: Results) -> str:
    """How to read the tables."""
    benchmark = results.benchmark
    label = benchmark.variants[benchmark.baseline].label
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
    base = results.runs.get(benchmark.baseline, {})
    if not base:
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
            if not all(same(run, base[seed]) for seed, run in runs.items() if seed in base)
        ]
        if others:
            label = benchmark.variants[benchmark.baseline].label
            sentences.append(f"Unlike {label}: {what} in {', '.join(others)}.")
    if not sentences:
        sentences = ["Runs of one seed have the same initial weights and order of the images."]
    resumed = sum(bool(run["resumed"]) for run in results.records)
    if resumed:
        sentences.append(f"{resumed} of the runs were interrupted and resumed.")
    return " ".join(sentences)


def _setup(results: Results) -> str:
    """Where the figures come from."""
    benchmark, records = results.benchmark, results.records

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
    if options:
        settings = " ".join(shlex.quote(f"{k}={v}") for k, v in sorted(options.items()))
        command += f" --cfg-options {settings}"
    seconds = sum(run["train_seconds"] + run["test_seconds"] for run in records)
    versions = listed(
        " ".join([name, version]) for run in records for name, version in run["versions"].items()
    )
    text = (
        f"{listed(run['iterations'] for run in records)} iterations; seeds "
        f"{listed(sorted({run['seed'] for run in records}))}; {len(records)} runs, "
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
        if seeds:
            missing.append(f"{variant.label} (seed {', '.join(seeds)})")
    return "; ".join(missing)


def write(file: Path, name: str, text: str) -> None:
    """Put a report between its marks in a markdown file.

    Raises:
        UserError: The file does not exist or lacks the marks.
    """
    start, end = MARKS[0].format(name), MARKS[1]
    content = file.read_text() if file.is_file() else ""
    head, found, rest = content.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise cli.UserError(f"{file} has no block from {start!r} to {end!r}")
    file.write_text(f"{head}{start}\n{text}{end}{tail}")
