"""The report of ``tools/benchmark_miou.py`` in markdown, from its records and from nothing else.

The same benchmark file and records give the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from ohem_mm.bench.results import GridMap, Results, grid_maps
from ohem_mm.bench.text import clock, difference, least_shown, mean_std, table
from ohem_mm.bench.tuning import Run
from ohem_mm.errors import UserError

MARKS = "<!-- report: {} -->", "<!-- end of report -->"


def markdown(results: Results) -> str:
    """The report in markdown; the same records and benchmark file give the same bytes."""
    benchmark = results.benchmark
    parts = [f"### {benchmark.title}", *filter(None, [benchmark.note])]
    if benchmark.tune is not None and results.at is not None:
        shared = benchmark.tune.label(results.at)
        parts[0] += f", all at {shared}"
        parts.append(
            f"**All variants share {shared}: this compares them at one value, not each at its "
            "best.**"
        )
    rows = [name for name in results.runs if not benchmark.variants[name].cell]
    if rows:
        parts.append(_main_table(results, rows))
    parts += _grid_tables(results)
    if benchmark.tune is not None and results.at is None:
        parts += _tuning(results)
    parts += [_reading(results), _setup(results), *_missing(results)]
    if rows:
        summary = f"{benchmark.metric[1:]} of each class, mean over seeds"
        parts.append(_folded(summary, _class_table(results, rows)))
    return "\n\n".join(parts) + "\n"


def _folded(summary: str, body: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{body}\n\n</details>"


def _main_table(results: Results, rows: list[str]) -> str:
    benchmark, tune = results.benchmark, results.benchmark.tune
    validated = all(run["curve"] for name in rows for run in results.runs[name].values())
    lines = []
    for name in rows:
        runs = list(results.runs[name].values())
        line = [("variant", results.label(name))]
        if tune:
            value = results.choices[name].best if results.at is None else results.at
            line.append((tune.name, "-" if value is None else f"{value:g}"))
            line.append(("seeds", str(len(runs))))
        for title, score in results.scores.items():
            line.append((title, mean_std([*map(score, runs)])))
            pairs = results.differences(name, score)
            against = [(f"vs {benchmark.baseline_label}", difference(pairs))]
            against += [("least", least_shown(pairs))] * bool(tune)
            line += [(head, "" if name == benchmark.baseline else cell) for head, cell in against]
        if validated:
            line.append((f"val {benchmark.metric}", mean_std([r["curve"][-1][1] for r in runs])))
        kept = [fmean(run["kept_share"].values()) for run in runs if run["kept_share"]]
        line += [
            ("aAcc", mean_std([run["metrics"]["aAcc"] for run in runs])),
            ("kept", f"{100 * fmean(kept):.1f} %" if kept else ""),
            ("training", clock(fmean(run["train_seconds"] for run in runs))),
            ("memory", f"{max(run['peak_memory_mib'] for run in runs):.0f} MiB"),
        ]
        lines.append(line)
    return table([head for head, _ in lines[0]], [[cell for _, cell in line] for line in lines])


def _class_table(results: Results, rows: list[str]) -> str:
    lines = []
    for i, name in enumerate(results.first["classes"]):
        scores = [list(results.class_scores(row, i).values()) for row in rows]
        cells = [f"{fmean(values):.2f}" if values else "-" for values in scores]
        lines.append([name, f"{100 * results.first['class_shares'][i]:.2f} %", *cells])
    return table(["class", "pixels", *map(results.label, rows)], lines)


def _tuning(results: Results) -> list[str]:
    """What tuning saw and chose, variant by variant."""
    benchmark, tune, label = results.benchmark, results.benchmark.tune, results.label
    assert tune is not None
    choices = {name: c for name, c in results.choices.items() if any(c.scores.values())}
    lines = []
    for name, choice in choices.items():
        line = [label(name)]
        for value in tune.values:
            mark = "**" * (value == choice.best)
            line.append(f"{mark}{mean_std([*choice.scores[value].values()])}{mark}")
        lines.append(line)
    seeds = f"seed{'s' * (len(tune.seeds) > 1)} {', '.join(map(str, tune.seeds))}"
    words = (
        f"{tune.name} of each variant, chosen by the {tune.split} {benchmark.metric} after "
        f"training ({seeds}; the best in bold)"
    )
    seen = table(["variant", *map(tune.label, tune.values)], lines)
    # In a grid there is a line for each variant in each cell.
    parts = [_folded(words, seen)] if benchmark.rows else [f"{words}:", seen]
    if tune.split == benchmark.split:
        parts.append(
            f"The choice was made on the images that are reported ({tune.split}), so the scores "
            "are too high."
        )
    ends = [label(name) for name, choice in choices.items() if choice.at_end]
    if ends:
        parts.append(
            "The best lies at an end of the range, and a better one may lie beyond it: "
            f"{', '.join(ends)}."
        )
    for name, behind in results.dropped.items():
        parts.append(
            f"No further seeds for {label(name)}: at its best it lies {behind:.2f} points behind "
            f"{label(benchmark.baseline_of(name))} on {tune.split}, more than {tune.drop_below:g}."
        )
    unfinished = []
    for name, choice in results.choices.items():
        if not choice.finished:
            lacks = (f"{tune.label(value)}, seed {seed}" for value, seed in choice.missing)
            unfinished.append(label(name) + f" ({'; '.join(lacks)})" * (name in choices))
    if unfinished:
        parts.append(f"Not tuned yet: {'; '.join(unfinished)}.")
    return parts


def _grid_tables(results: Results) -> list[str]:
    axes = results.benchmark.axes
    parts = []
    for shown in grid_maps(results):

        def cell(values: list[float], shown: GridMap = shown) -> str:
            if not shown.is_difference or not values:
                return mean_std(values)
            mark = "**" * (abs(fmean(values)) > shown.least(len(values)))
            return f"{mark}{fmean(values):+.2f}{mark}"

        columns = [f"{axis.name} {v}" for axis in axes[1:2] for v in axis.labels] or [shown.name]
        for title, grid in shown.panels:
            lines = [
                [label, *map(cell, row)] for label, row in zip(axes[0].labels, grid, strict=True)
            ]
            parts.append(f"{', '.join(filter(None, [shown.name, title]))}:")
            parts.append(table([axes[0].name, *columns], lines))
        if shown.spread:
            count = max(map(len, shown.cells))
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
    one_seed = {len(seeds) for seeds in results.runs.values()} == {1}
    text = f"All metrics are in per cent, on the {benchmark.split} split. "
    if one_seed:
        text += "One seed: differences have no interval, and small ones mean nothing. "
    else:
        text += (
            f"± is the sample standard deviation over seeds. Differences to "
            f"{benchmark.baseline_label} are paired by seed; in brackets is the 95 % interval "
            "(Student t), bold where it excludes zero, each variant taken on its own. "
        )
        if benchmark.tune is not None:
            text += (
                "least: the smallest difference that the seeds of the row could have shown, half "
                "the width of the interval. "
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
    pairs = [(name, *pair) for name in results.runs for pair in results.pairs(name)]
    if not pairs:
        return ""
    checks: dict[str, Callable[[Run, Run], bool]] = {
        "initial weights": lambda a, b: bool(a["weights"] == b["weights"]),
        "order of the images": lambda a, b: bool(a["order"] == b["order"]),
        # A resumed run noted as many as it had seen before.
        "first batches": lambda a, b: all(
            x == y for x, y in zip(a["batches"], b["batches"], strict=False)
        ),
    }
    sentences = []
    for what, same in checks.items():
        others = dict.fromkeys(results.label(name) for name, *pair in pairs if not same(*pair))
        if others:
            sentences.append(
                f"Unlike {results.benchmark.baseline_label}: {what} in {', '.join(others)}."
            )
    if not sentences:
        sentences = ["Runs of one seed have the same initial weights and order of the images."]
    resumed = sum(bool(run["resumed"]) for run in results.records)
    if resumed:
        were = "was" if resumed == 1 else "were"
        sentences.append(f"{resumed} of the runs {were} interrupted and resumed.")
    return " ".join(sentences)


def _setup(results: Results) -> str:
    """Where the figures come from."""
    records = [*results.records, *results.tuning]
    tuning = f", {len(results.tuning)} of them to tune" if results.tuning else ""

    def listed(values: Iterable[Any], by: str = ", ") -> str:
        return by.join(dict.fromkeys(map(str, values)))

    command = f"python tools/benchmark_miou.py run {results.benchmark.shown_path}"
    if results.at is not None:
        command += f" --at {results.at:g}"
    options = dict(kv for run in records for kv in run["cfg_options"].items())
    if options:
        settings = " ".join(shlex.quote(f"{k}={v}") for k, v in sorted(options.items()))
        command += f" --cfg-options {settings}"
    seconds = sum(run["train_seconds"] + run["test_seconds"] for run in records)
    machines = listed(map(_machine, records), by="; ")
    versions = listed(" ".join(pair) for run in records for pair in run["versions"].items())
    text = (
        f"{listed(run['iterations'] for run in records)} iterations; seeds "
        f"{listed(sorted({run['seed'] for run in records}))}; {len(records)} runs{tuning}, "
        f"{clock(seconds)} in all if run one by one. "
        f"{machines}; {versions}; commit {listed(map(_commit, records))}. "
        f"Made by `{command}`."
    )
    if results.outdated:
        text += f" {results.outdated} records of earlier versions of the configs are left out."
    return text


def _machine(run: Run) -> str:
    hardware = run["hardware"]
    text = f"{hardware['cpu']}, {hardware['cores']} core{'s' * (hardware['cores'] != 1)}"
    if hardware["gpu"]:
        text = f"{hardware['gpu']} ({text})"
    else:
        text += f", no GPU, {run['threads']} thread{'s' * (run['threads'] != 1)} a job"
    processes = f", {run['processes']} processes each" if run["processes"] > 1 else ""
    return f"{text}, {run['jobs']} at a time{processes}"


def _commit(run: Run) -> str:
    if run["commit"] is None:
        return "not in a checkout"
    return f"{run['commit'][:7]}{' with uncommitted changes' * bool(run['dirty'])}"


def _missing(results: Results) -> list[str]:
    missing = []
    for name in results.benchmark.variants:
        seeds = [str(s) for s in results.benchmark.seeds if s not in results.runs.get(name, {})]
        choice = results.choices.get(name) if results.at is None else None
        # Which value these seeds are to have is not known yet, or they are not to be run.
        waits = choice is not None and (name in results.dropped or not choice.finished)
        if seeds and not waits:
            missing.append(f"{results.label(name)} (seed {', '.join(seeds)})")
    return [f"Not run yet: {'; '.join(missing)}."] if missing else []


def write(file: Path, name: str, text: str) -> None:
    """Put a report between its marks in a markdown file."""
    start, end = MARKS[0].format(name), MARKS[1]
    if not file.is_file():
        raise UserError(f"there is no page {str(file)!r} to put the report into")
    content = file.read_text(encoding="utf-8")
    head, found, rest = content.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{file} has no block from {start!r} to {end!r}")
    file.write_text(f"{head}{start}\n{text}{end}{tail}", encoding="utf-8")
