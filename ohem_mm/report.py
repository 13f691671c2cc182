"""Tables and plots from the records of ``tools/benchmark_miou.py``, and from nothing else.

The same benchmark file and records give the same bytes.
"""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ohem_mm import cli
from ohem_mm.benchmark import Benchmark

MARKS = "<!-- report: {} -->", "<!-- end of report -->"

EXTRA = "this needs {}; install it with: pip install 'ohem-mm[bench]'"


def clock(seconds: float | None) -> str:
    """1:05 or 2:03:04."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True)
class Results:
    """The records that a report is made from."""

    benchmark: Benchmark
    runs: dict[str, dict[int, dict[str, Any]]]  # variant, seed
    outdated: int  # records of earlier versions of a config

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


def select(benchmark: Benchmark, records: list[dict[str, Any]]) -> Results:
    """Take the records of a benchmark's variants and seeds, of the last version of each config.

    Raises:
        UserError: There are none.
    """
    records = [record for record in records if record["benchmark"] == benchmark.name]
    versions = {record["variant"]: record["config_hash"] for record in records}
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    outdated = 0
    for variant in benchmark.variants:
        for record in records:
            if record["variant"] != variant:
                continue
            if record["config_hash"] != versions[variant]:
                outdated += 1
            else:
                runs.setdefault(variant, {})[record["seed"]] = record
    runs = {variant: dict(sorted(seeds.items())) for variant, seeds in runs.items()}
    if not runs:
        raise cli.UserError(
            f"there are no records of {benchmark.name!r}; make them with: "
            f"python tools/benchmark_miou.py run {benchmark.shown_path}"
        )
    return Results(benchmark, runs, outdated)


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    quantile = float(t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """``mean ± sample standard deviation``."""
    if not values or any(map(math.isnan, values)):
        return "-"
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def difference(values: Sequence[float]) -> str:
    """``mean [interval]`` of paired differences; bold when the interval excludes zero."""
    if not values or any(map(math.isnan, values)):
        return "-"
    mean, half = statistics.fmean(values), half_width(values)
    if half is None:
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded; the first column is text, the others are figures."""
    clean = [[_cell(cell) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*clean, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(clean[0]), line(rule), *map(line, clean[1:])])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


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


def _panels(results: Results) -> list[tuple[str, list[list[list[dict[str, Any]]]]]]:
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


def _grid_scores(results: Results) -> list[tuple[str, Any]]:
    metric = results.benchmark.metric
    scores: list[tuple[str, Any]] = [(metric, results.score)]
    return scores + ([(f"rare-class {metric}", results.rare_score)] if results.rare else [])


def _grid_tables(results: Results) -> list[str]:
    axes = results.benchmark.axes
    parts = []
    for name, score in _grid_scores(results):
        for title, grid in _panels(results):
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


# --- plots -----------------------------------------------------------------------------------

# Okabe and Ito: told apart by colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
STYLES = ("-", "--", ":")


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw what the records allow, as SVG; the same records give the same bytes.

    Returns:
        The files: differences of the classes to the baseline, validation curves, heat maps.
    """
    try:
        import matplotlib
    except ImportError:
        raise cli.UserError(EXTRA.format("matplotlib")) from None
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    # The salt makes the names of SVG elements the same in every run.
    with matplotlib.rc_context({"svg.hashsalt": results.benchmark.name, "font.size": 10}):
        drawings = {"classes": _draw_classes, "curves": _draw_curves, "grid": _draw_grid}
        for name, draw in drawings.items():
            figure = draw(results)
            if figure is not None:
                path = folder / f"{results.benchmark.name}-{name}.svg"
                metadata = {"Date": None, "Creator": None}
                figure.savefig(path, metadata=metadata, bbox_inches="tight")
                files.append(path)
    return files


def _plain(label: str) -> str:
    """A label without markdown's marks for code."""
    return label.replace("`", "")


def _draw_classes(results: Results) -> Any:
    """Bars: mean difference of each class to the baseline; points: seeds."""
    from matplotlib.figure import Figure

    benchmark = results.benchmark
    base = benchmark.baseline
    names = [n for n in results.runs if n != base and not benchmark.variants[n].cell]
    if base not in results.runs or not names:
        return None
    shares = results.first["class_shares"]
    order = sorted(range(len(shares)), key=lambda i: shares[i], reverse=True)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    size = (2.2 + 2.9 * columns, lines * (0.9 + 0.26 * len(order)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axis, name in zip(axes, names, strict=False):
        for row, i in enumerate(order):
            reference = results.class_scores(base, i)
            scores = results.class_scores(name, i)
            values = [scores[s] - reference[s] for s in scores if s in reference]
            if values:
                mean = statistics.fmean(values)
                axis.barh(row, mean, color=COLOURS[4] if mean >= 0 else COLOURS[1], alpha=0.75)
                axis.scatter(values, [row] * len(values), s=9, color=COLOURS[0], zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", alpha=0.3)
        axis.set_title(_plain(benchmark.variants[name].label), fontsize=10)
    for axis in list(axes)[len(names) :]:
        axis.remove()
    labels = [f"{results.first['classes'][i]} ({100 * shares[i]:.2g} %)" for i in order]
    first = figure.axes[0]
    first.set_yticks(range(len(order)), labels)
    first.invert_yaxis()
    label = _plain(benchmark.variants[base].label)
    figure.supxlabel(
        f"{benchmark.metric[1:]} minus that of {label}, percentage points", fontsize=10
    )
    return figure


def _draw_curves(results: Results) -> Any:
    """Validation over training: mean and range over seeds."""
    from matplotlib.figure import Figure

    variants = results.benchmark.variants
    curves = {}
    for name, runs in results.runs.items():
        points: dict[int, list[float]] = {}
        for run in runs.values():
            for step, value in run["curve"]:
                points.setdefault(step, []).append(value)
        if len(points) > 1 and not variants[name].cell:
            curves[name] = dict(sorted(points.items()))
    if not curves:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        steps = list(points)
        means = [statistics.fmean(values) for values in points.values()]
        axis.plot(
            steps, means, style, color=colour, label=_plain(variants[name].label), marker="o", ms=3
        )
        low, high = map(min, points.values()), map(max, points.values())
        axis.fill_between(steps, list(low), list(high), color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("iteration")
    axis.set_ylabel(f"{results.benchmark.metric} on the validation split, %")
    axis.grid(alpha=0.3)
    figure.legend(fontsize=9, loc="outside right upper")
    return figure


def _draw_grid(results: Results) -> Any:
    """Heat maps: a panel for each value of the third axis, a row for each score."""
    from matplotlib.figure import Figure

    axes, panels = results.benchmark.axes, _panels(results)
    if not panels:
        return None
    scores = _grid_scores(results)
    columns = axes[1].labels if len(axes) > 1 else ("",)
    size = (
        1.6 + len(panels) * (0.7 + 0.75 * len(columns)),
        len(scores) * (1.0 + 0.42 * len(axes[0].labels)),
    )
    figure = Figure(figsize=size, layout="constrained")
    frames = figure.subplots(len(scores), len(panels), squeeze=False)
    for line, (name, score) in zip(frames, scores, strict=True):
        data = [
            [
                [statistics.fmean(map(score, runs)) if runs else math.nan for runs in row]
                for row in grid
            ]
            for _, grid in panels
        ]
        flat = [v for grid in data for row in grid for v in row if not math.isnan(v)]
        low = min(flat)
        high = max(*flat, low + 0.1)  # where all are equal, there is still a scale
        for frame, (title, _), values in zip(line, panels, data, strict=True):
            image = frame.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    ink = "white" if value < (low + high) / 2 else "black"
                    text = frame.text(j, i, f"{value:.1f}", ha="center", va="center", color=ink)
                    text.set_fontsize(9)
            frame.set_xticks(range(len(columns)), columns)
            frame.set_yticks(range(len(axes[0].labels)), axes[0].labels)
            frame.set_title(title, fontsize=10)
            if len(axes) > 1:
                frame.set_xlabel(axes[1].name)
        line[0].set_ylabel(axes[0].name)
        figure.colorbar(image, ax=list(line), label=f"{name}, %")
    return figure
