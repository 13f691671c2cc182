"""Records of the speed benchmark, and the tables and plots that are made from them alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from ohem_mm.bench.records import Rows
from ohem_mm.bench.speed.providers import BASELINE
from ohem_mm.bench.text import table
from ohem_mm.drawing import draw_band, drawing, save

COLUMNS = [
    *("kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "config"),
    *("device_name", "threads", "timestamp", "torch", "triton", "ohem_mm", "commit", "command"),
]
MODES = ("step", "forward", "backward", "iteration")
FLOOR = "byte floor"
AXES = {
    "pixels": "pixels of the labels",
    "classes": "classes",
    "stride": "stride of the logits",
    "kept": "share of hard pixels",
}

Row = dict[str, Any]
read, append = Rows(COLUMNS).read, Rows(COLUMNS).append


class Series(NamedTuple):
    """What the rows of one table share, other than the run."""

    kernel: str
    sweep: str
    shape: str  # empty where it varies
    device: str


def _series(row: Row) -> Series:
    shape, where = row["shape"] if row["sweep"] == "shape" else "", row["device_name"]
    if "NVIDIA" not in where:  # there the threads of the CPU hardly matter
        where += f", {row['threads']} thread{'s' * (str(row['threads']) != '1')}"
    return Series(row["kernel"], row["sweep"], shape, where)


def latest(rows: list[Row]) -> dict[Series, list[Row]]:
    """Rows of the last run of each series, with what stands in their ``config`` beside the rest.

    Times of different runs are not compared.
    """
    groups: dict[Series, list[Row]] = {}
    for row in rows:
        row = {**row, **json.loads(row["config"])}
        row["label"] = row["provider"] + ("" if row["acc_seg"] else ", no acc_seg")
        series = _series(row)
        last = groups.get(series, [row])[0]["timestamp"]
        if row["timestamp"] > last:
            del groups[series]
        if row["timestamp"] >= last:
            groups.setdefault(series, []).append(row)
    return groups


# --- tables --------------------------------------------------------------------------------------


def tables(rows: list[Row]) -> str:
    """Markdown tables of the last run of each series and mode."""
    parts = []
    for (kernel, sweep, shape, where), group in latest(rows).items():
        first = group[0]
        shares = sorted({round(100 * row["hard"]) for row in group})
        hard = " to ".join(map(str, dict.fromkeys((shares[0], shares[-1]))))
        commit = f" ({first['commit']})" if first["commit"] else ""
        about = f"{where}; torch {first['torch']}, ohem_mm {first['ohem_mm']}{commit}"
        for mode in MODES:
            chosen = [row for row in group if row["mode"] == mode]
            if not chosen:
                continue
            if sweep == "shape":
                over, note = shape, f"Median (p20 to p80); faster and less than {BASELINE}"
                body = _shape_table(chosen)
            else:
                over, note = f"over {sweep}", "Median ms / peak MiB"
                body = _sweep_table(chosen, sweep)
            title = f"**{kernel}, {mode}, {over}**"
            parts.append(f"{title}; {hard} % of the pixels hard. {about}. {note}.\n\n{body}")
    return "\n\n".join(parts)


def _number(value: str) -> str:
    return f"{float(value):.3g}" if abs(float(value)) < 100 else f"{float(value):.0f}"


def _shape_table(rows: list[Row]) -> str:
    """A line for each provider, with the baseline's numbers over its own."""
    index = {(row["provider"], row["acc_seg"], row["metric"]): row for row in rows}
    kinds = [
        (acc_seg, *kind)
        for acc_seg in (True, False)
        for kind in (("time", "ms", "times faster"), ("memory", "MiB", "times less"))
        if any(key[1:] == (acc_seg, kind[0]) for key in index)
    ]
    header = ["provider"]
    for acc_seg, _, unit, ratio in kinds:
        header += [unit if acc_seg else f"{unit}, no `acc_seg`", ratio]
    lines = []
    for provider in dict.fromkeys(row["provider"] for row in rows):
        line = [provider]
        for acc_seg, metric, _, _ in kinds:
            row = index.get((provider, acc_seg, metric))
            base = index.get((BASELINE, acc_seg, metric))
            cell = ratio = ""
            if row is not None:
                cell = _number(row["p50"])
                if metric == "time" and provider != FLOOR:
                    cell += f" ({_number(row['p20'])} to {_number(row['p80'])})"
                if base is not None and float(row["p50"]) > 0:
                    ratio = f"{float(base['p50']) / float(row['p50']):.2f}"
            line += [cell, ratio]
        lines.append(line)
    return table(header, lines)


def _sweep_table(rows: list[Row], sweep: str) -> str:
    """A line for each point, a column for each provider: milliseconds and MiB."""
    columns = list(dict.fromkeys(row["label"] for row in rows))
    cells = {(float(r["x"]), r["label"], r["metric"]): _number(r["p50"]) for r in rows}
    lines = []
    for x in sorted({key[0] for key in cells}):
        pairs = [(cells.get((x, c, "time")), cells.get((x, c, "memory"))) for c in columns]
        lines.append([f"{x:g}", *(" / ".join(filter(None, pair)) for pair in pairs)])
    return table([sweep, *columns], lines)


# --- plots ---------------------------------------------------------------------------------------


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw time and memory of the last run of each sweep; return the files."""
    files = []
    with drawing("loss"):
        from matplotlib.figure import Figure

        for (_, sweep, _, where), group in latest(rows).items():
            steps = [row for row in group if row["mode"] == "step"]
            if sweep == "shape" or not steps:
                continue
            figure = Figure(figsize=(11, 4.5), layout="constrained")
            panels = figure.subplots(1, 2)
            for panel, metric in zip(panels, ("time", "memory"), strict=True):
                for place, label in enumerate(dict.fromkeys(row["label"] for row in steps)):
                    points = sorted(
                        [float(row[key]) for key in ("x", "p50", "p20", "p80")]
                        for row in steps
                        if (row["metric"], row["label"]) == (metric, label)
                    )
                    if points and label == FLOOR:
                        x, y, *_ = zip(*points, strict=True)
                        panel.plot(x, y, "--", color="black", label=label)
                    elif points:
                        draw_band(panel, place, label, *zip(*points, strict=True))
                panel.set(xscale="log", yscale="log", xlabel=AXES[sweep])
                unit = {"time": "head step, ms", "memory": "peak above input, MiB"}
                panel.set_ylabel(unit[metric])
            figure.suptitle(f"Upsampling, loss, acc_seg and backward; {where}", fontsize=10)
            handles = panels[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside lower center", ncols=4)
            device = re.sub(r"[^a-z0-9]+", "-", group[0]["device_name"].lower()).strip("-")
            files.append(save(figure, folder / f"loss-{sweep}-{device}.png"))
    return files
