"""What all plots share. Needs matplotlib, when something is drawn."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ohem_mm.errors import need

# Okabe and Ito: told apart by colour-blind readers.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#999999")
STYLES = ("-", "--", ":")


@contextlib.contextmanager
def drawing(name: str) -> Iterator[None]:
    """Draw without a screen, and name the elements of SVGs alike in every run.

    Raises:
        UserError: matplotlib is missing.
    """
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context({"svg.hashsalt": name, "font.size": 10}):
        yield


def save(figure: Any, path: Path) -> Path:
    """Write a figure; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, bbox_inches="tight", dpi=120)
    return path


def draw_band(
    axis: Any,
    place: int,
    label: str,
    x: Sequence[float],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    marker: str | None = "o",
) -> None:
    """Draw a line with the range around it; ``place`` chooses its colour and style."""
    colour, style = COLOURS[place % len(COLOURS)], STYLES[place // len(COLOURS) % len(STYLES)]
    axis.plot(x, middle, style, color=colour, label=label, marker=marker, ms=3)
    axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.grid(visible=True, which="both", alpha=0.3)
