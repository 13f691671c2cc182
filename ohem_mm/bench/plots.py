"""Plots from the records of a benchmark, and from nothing else: same records, same bytes."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ohem_mm.bench.report import Results, grid_maps
from ohem_mm.drawing import COLOURS, draw_band, drawing, save


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw what the records allow, as SVG; the same records give the same bytes.

    Returns:
        The files: differences of the classes to the baseline, validation curves, heat maps, and
        the scores over the values of what is tuned.

    Raises:
        UserError: matplotlib is missing.
    """
    files = []
    with drawing(results.benchmark.name):
        drawings = {"classes": _draw_classes, "curves": _draw_curves, "grid": _draw_grid}
        drawings["tune"] = _draw_tuning
        for name, draw in drawings.items():
            figure = draw(results)
            if figure is not None:
                files.append(save(figure, folder / f"{results.benchmark.name}-{name}.svg"))
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
                mean = fmean(values)
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
        ranges = zip(*((fmean(v), min(v), max(v)) for v in points.values()), strict=True)
        draw_band(axis, i, _plain(variants[name].label), list(points), *ranges)
    axis.set_xlabel("iteration")
    axis.set_ylabel(f"{results.benchmark.metric} on the validation split, %")
    figure.legend(fontsize=9, loc="outside right upper")
    return figure


def _draw_grid(results: Results) -> Any:
    """Heat maps: a panel for each value of the third axis, a row for each thing to show."""
    from matplotlib.figure import Figure

    axes, maps = results.benchmark.axes, grid_maps(results)
    if not maps:
        return None
    panels = len(maps[0].panels)
    columns = axes[1].labels if len(axes) > 1 else ("",)
    compared = bool(results.benchmark.rows)
    size = (
        1.6 + panels * (0.7 + 0.75 * len(columns)),
        len(maps) * (1.0 + 0.3 * compared + 0.42 * len(axes[0].labels)),
    )
    figure = Figure(figsize=size, layout="constrained")
    if compared:  # their names are too long for the side
        parts = list(figure.subfigures(len(maps), 1, squeeze=False)[:, 0])
        frames = [part.subplots(1, panels, squeeze=False)[0] for part in parts]
        for part, shown in zip(parts, maps, strict=True):
            part.suptitle(_plain(shown.name), x=0.01, ha="left", fontsize=10, fontweight="bold")
    else:
        parts = [figure] * len(maps)
        frames = list(figure.subplots(len(maps), panels, squeeze=False))
    differences = [
        abs(fmean(values))
        for shown in maps
        if shown.is_difference
        for _, grid in shown.panels
        for row in grid
        for values in row
        if values
    ]
    largest = max([0.1, *differences])
    for part, line, shown in zip(parts, frames, maps, strict=True):
        data = [
            [[fmean(values) if values else math.nan for values in row] for row in grid]
            for _, grid in shown.panels
        ]
        flat = [v for grid in data for row in grid for v in row if not math.isnan(v)]
        low = min(flat)
        high = max(*flat, low + 0.1)  # where all are equal, there is still a scale
        if shown.is_difference:  # white is zero, and all differences have one scale
            low, high = -largest, largest
        colours = "PuOr" if shown.is_difference else "cividis"
        for frame, (title, grid), values in zip(line, shown.panels, data, strict=True):
            image = frame.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
            for i, row in enumerate(values):
                for j, value in enumerate(row):
                    if shown.is_difference:
                        ink = "white" if abs(value) > 0.6 * high else "black"
                        words = f"{value:+.1f}"
                        # Beyond the noise.
                        weight = "bold" if abs(value) > shown.least(len(grid[i][j])) else "normal"
                    else:
                        ink = "white" if value < (low + high) / 2 else "black"
                        words, weight = f"{value:.1f}", "normal"
                    text = frame.text(j, i, words, ha="center", va="center", color=ink)
                    text.set(fontsize=9, fontweight=weight)
            frame.set_xticks(range(len(columns)), columns)
            frame.set_yticks(range(len(axes[0].labels)), axes[0].labels)
            frame.set_title(title, fontsize=10)
            if len(axes) > 1:
                frame.set_xlabel(axes[1].name)
        line[0].set_ylabel(axes[0].name)
        unit = "points" if shown.is_difference else "%"
        part.colorbar(image, ax=list(line), label=unit if compared else f"{shown.name}, {unit}")
    return figure


def _draw_tuning(results: Results) -> Any:
    """Over the values of what is tuned: a line for each variant, a ring where it is best."""
    from matplotlib.figure import Figure

    benchmark, tune = results.benchmark, results.benchmark.tune
    if tune is None or results.at is not None:
        return None
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    drawn = [
        choice
        for name, choice in results.choices.items()
        if choice.means and not benchmark.variants[name].cell
    ]
    for place, choice in enumerate(drawn):
        seeds = [choice.scores[value].values() for value in choice.means]
        label = _plain(benchmark.variants[choice.variant].label)
        x, y = list(choice.means), list(choice.means.values())
        draw_band(axis, place, label, x, y, list(map(min, seeds)), list(map(max, seeds)))
        ring = [value for value in x if value == choice.best]
        colour = axis.lines[-1].get_color()
        axis.plot(ring, [choice.best_score], "o", ms=11, mfc="none", mec=colour, mew=1.5)
    if not drawn:
        return None
    if tune.values[0] > 0 and tune.values[-1] >= 4 * tune.values[0]:
        axis.set_xscale("log")
    axis.set_xticks(tune.values, [f"{value:g}" for value in tune.values])
    axis.minorticks_off()
    axis.set_xlabel(f"{tune.name}{', times that of the config' * tune.scale}")
    axis.set_ylabel(f"{benchmark.metric} on {tune.split}, %")
    figure.legend(fontsize=9, loc="outside right upper")
    return figure
