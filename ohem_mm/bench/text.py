"""Cells, tables and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev, variance


def clock(seconds: float | None) -> str:
    """1:05 or 2:03:04."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean; None for fewer than two values."""
    n = len(values)
    return None if n < 2 else half_width_of(stdev(values), n - 1, n)


def half_width_of(spread: float, freedom: int, count: int) -> float:
    """The same of a mean of ``count`` values, from a standard deviation that is known."""
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    return float(t.ppf(0.975, freedom)) * spread / math.sqrt(count)


def _known(values: Sequence[float]) -> bool:
    return len(values) > 0 and not any(map(math.isnan, values))


def mean_std(values: Sequence[float]) -> str:
    """``mean ± sample standard deviation``."""
    if not _known(values):
        return "-"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def difference(values: Sequence[float]) -> str:
    """``mean [interval]`` of paired differences; bold when the interval excludes zero."""
    if not _known(values):
        return "-"
    mean, half = fmean(values), half_width(values)
    if half is None:
        return f"{mean:+.2f}"
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def least_shown(values: Sequence[float]) -> str:
    """The smallest difference whose 95 % interval would exclude zero, by the spread of these."""
    half = half_width(values) if _known(values) else None
    return "-" if half is None else f"{half:.2f}"


def pooled(samples: Iterable[Sequence[float]]) -> tuple[float, int] | None:
    """The standard deviation within samples, pooled over them, and its degrees of freedom.

    None where no sample has two values.
    """
    known = [sample for sample in samples if len(sample) > 1 and _known(sample)]
    freedom = sum(len(sample) - 1 for sample in known)
    squares = sum(variance(sample) * (len(sample) - 1) for sample in known)
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, padded; the first column is text, the others are figures."""
    escapes = str.maketrans({"\\": "\\\\", "|": "\\|"})
    lines = [[" ".join(cell.split()).translate(escapes) for cell in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in lines]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
