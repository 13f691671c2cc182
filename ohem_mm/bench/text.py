"""Cells, tables and numbers as text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def clock(seconds: float | None) -> str:
    """1:05 or 2:03:04."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return _quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def half_width_of(spread: float, freedom: int, count: int) -> float:
    """The same of a mean of ``count`` values, from a standard deviation that is known."""
    return _quantile(freedom) * spread / math.sqrt(count)


def _quantile(freedom: int) -> float:
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    return float(t.ppf(0.975, freedom))


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


def least_shown(values: Sequence[float]) -> str:
    """The smallest difference whose 95 % interval would exclude zero, by the spread of these."""
    half = None if any(map(math.isnan, values)) else half_width(values)
    return "-" if half is None else f"{half:.2f}"


def pooled(samples: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation within samples, pooled over them, and its degrees of freedom.

    None where no sample has two values.
    """
    known = [sample for sample in samples if len(sample) > 1 and not any(map(math.isnan, sample))]
    freedom = sum(len(sample) - 1 for sample in known)
    if not freedom:
        return None
    squares = sum(statistics.variance(sample) * (len(sample) - 1) for sample in known)
    return math.sqrt(squares / freedom), freedom


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
