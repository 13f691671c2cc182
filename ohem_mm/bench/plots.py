"""Plots from the records of a benchmark, and from nothing else: same records, same bytes."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from typing import Any

from ohem_mm.bench.results import GridMap, Results, grid_maps
from ohem_mm.drawing import COLOURS, draw_band, drawing, save


def plot(results: Results, folder: Path) -> list[Path]:
    """Draw what the records allow into SVG files, and return those."""
    name = results.block
    drawings = {"classes": _draw_classes, "curves": _draw_curves, "grid": _draw_grid}
    drawings["tune"] = _draw_tuning
    with drawing(name):
        figures = {what: draw(results) for what, draw in drawings.items()}
        return [save(f, folder / f"{name}-{what}.svg") for what, f in figures.items() if f]


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _label(results: Results, variant: str) -> str:
    """Without markdown's marks for code."""
    return results.label(variant).replace("`", "")


def _draw_classes(results: Results) -> Any:
    """Bars: mean difference of each class to the baseline; points: seeds."""
    benchmark = results.benchmark
    base = benchmark.baseline
    names = [n for n in results.runs if n != base and not benchmark.variants[n].cell]
    if base not in results.runs or not names:
        return None
    shares = results.first["class_shares"]
    order = sorted(range(len(shares)), key=lambda i: shares[i], reverse=True)
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = _figure(2.2 + 2.9 * columns, lines * (0.9 + 0.26 * len(order)))
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
        axis.set_title(_label(results, name), fontsize=10)
    for axis in list(axes)[len(names) :]:
        axis.remove()
    labels = [f"{results.first['classes'][i]} ({100 * shares[i]:.2g} %)" for i in order]
    figure.axes[0].set_yticks(range(len(order)), labels)
    figure.axes[0].invert_yaxis()
    what = f"{benchmark.metric[1:]} minus that of {_label(results, base)}, percentage points"
    figure.supxlabel(what, fontsize=10)
    return figure


def _draw_curves(results: Results) -> Any:
    """Validation over training: mean and range over seeds."""
    curves = {}
    for name, runs in results.runs.items():
        points: dict[int, list[float]] = {}
        for run in runs.values():
            for step, value in run["curve"]:
                points.setdefault(step, []).append(value)
        if len(points) > 1 and not results.benchmark.variants[name].cell:
            curves[name] = dict(sorted(points.items()))
    if not curves:
        return None
    figure = _figure(8, 4)
    axis = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        ranges = zip(*((fmean(v), min(v), max(v)) for v in points.values()), strict=True)
        draw_band(axis, i, _label(results, name), list(points), *ranges)
    axis.set_xlabel("iteration")
    axis.set_ylabel(f"{results.benchmark.metric} on the validation split, %")
    figure.legend(fontsize=9, loc="outside right upper")
    return figure


def _draw_grid(results: Results) -> Any:
    """Heat maps: a panel for each value of the third axis, a row for each thing to show."""
    axes, maps = results.benchmark.axes, grid_maps(results)
    if not maps:
        return None
    panels = len(maps[0].panels)
    columns = axes[1].labels if len(axes) > 1 else ("",)
    compared = bool(results.benchmark.rows)
    figure = _figure(
        1.6 + panels * (0.7 + 0.75 * len(columns)),
        len(maps) * (1.0 + 0.3 * compared + 0.42 * len(axes[0].labels)),
    )
    if compared:  # their names are too long for the side
        parts = list(figure.subfigures(len(maps), 1, squeeze=False)[:, 0])
        frames = [part.subplots(1, panels, squeeze=False)[0] for part in parts]
        for part, shown in zip(parts, maps, strict=True):
            title = shown.name.replace("`", "")
            part.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    else:
        parts = [figure] * len(maps)
        frames = list(figure.subplots(len(maps), panels, squeeze=False))
    seen = [abs(fmean(v)) for shown in maps if shown.is_difference for v in shown.cells if v]
    largest = max([0.1, *seen])
    for part, line, shown in zip(parts, frames, maps, strict=True):
        flat = [m for m in map(fmean, filter(None, shown.cells)) if not math.isnan(m)]
        low = min(flat)
        high = max(*flat, low + 0.1)  # where all are equal, there is still a scale
        if shown.is_difference:  # white is zero, and all differences have one scale
            low, high = -largest, largest
        for frame, (title, grid) in zip(line, shown.panels, strict=True):
            image = _draw_heat_map(frame, shown, grid, low, high)
            frame.set_xticks(range(len(columns)), columns)
            frame.set_yticks(range(len(axes[0].labels)), axes[0].labels)
            frame.set_title(title, fontsize=10)
            if len(axes) > 1:
                frame.set_xlabel(axes[1].name)
        line[0].set_ylabel(axes[0].name)
        unit = "points" if shown.is_difference else "%"
        part.colorbar(image, ax=list(line), label=unit if compared else f"{shown.name}, {unit}")
    return figure


def _draw_heat_map(
    frame: Any, shown: GridMap, grid: list[list[list[float]]], low: float, high: float
) -> Any:
    """The mean of each cell as a colour and in figures, bold where it is beyond the noise."""
    means = [[fmean(values) if values else math.nan for values in row] for row in grid]
    colours = "PuOr" if shown.is_difference else "cividis"
    image = frame.imshow(means, cmap=colours, vmin=low, vmax=high, aspect="auto")
    for i, row in enumerate(grid):
        for j, values in enumerate(row):
            mean, dark, bold = means[i][j], means[i][j] < (low + high) / 2, False
            if shown.is_difference:
                dark, bold = abs(mean) > 0.6 * high, abs(mean) > shown.least(len(values))
            words = f"{mean:{'+' * shown.is_difference}.1f}"
            text = frame.text(j, i, words, ha="center", va="center")
            text.set(color="white" if dark else "black", fontsize=9)
            text.set(fontweight="bold" if bold else "normal")
    return image


def _draw_tuning(results: Results) -> Any:
    """Over the values of what is tuned: a line for each variant, a ring where it is best."""
    benchmark, tune = results.benchmark, results.benchmark.tune
    drawn = [
        c for c in results.choices.values() if c.means and not benchmark.variants[c.variant].cell
    ]
    if tune is None or results.at is not None or not drawn:
        return None
    figure = _figure(8, 4)
    axis = figure.subplots()
    for place, choice in enumerate(drawn):
        seeds = [choice.scores[value].values() for value in choice.means]
        x, y = list(choice.means), list(choice.means.values())
        label = _label(results, choice.variant)
        draw_band(axis, place, label, x, y, list(map(min, seeds)), list(map(max, seeds)))
        ring = [value for value in x if value == choice.best]
        colour = axis.lines[-1].get_color()
        axis.plot(ring, [choice.best_score], "o", ms=11, mfc="none", mec=colour, mew=1.5)
    if tune.values[0] > 0 and tune.values[-1] >= 4 * tune.values[0]:
        axis.set_xscale("log")
    axis.set_xticks(tune.values, [f"{value:g}" for value in tune.values])
    axis.minorticks_off()
    axis.set_xlabel(f"{tune.name}{', times that of the config' * tune.scale}")
    axis.set_ylabel(f"{benchmark.metric} on {tune.split}, %")
    figure.legend(fontsize=9, loc="outside right upper")
    return figure
