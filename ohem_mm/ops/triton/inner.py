# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What the kernels share: positions, interpolation, and one class's step of each loss.

Output pixel i of an axis has its source at ``(a * i + b) / d`` between low-resolution pixels; all
pixels whose source has the same integer part form a *cell*. In integers, so that cells are exact
for any scale. Logits are in units of log 2 (multiplied by log2 e), where ``exp`` is one instruction
of the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None
# Releases before this one lack arguments of ``triton.jit``, and do not compile these kernels.
OLDEST = (3, 4)
if triton is not None and tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
    triton = tl = None

__all__ = ["tl", "triton"]


class Kind(NamedTuple):
    """What a kernel is compiled for; each combination is a kernel of its own.

    Attributes:
        full: Logits are as large as labels; nothing is interpolated.
        align_corners: As in ``torch.nn.functional.interpolate``.
        sigmoid: Binary cross-entropies.
        single: One channel, for class 1 against class 0.
        smooth: The labels are smoothed.
        hits: Pixels are counted whose highest channel is their label.
        hard: Valid and hard pixels are counted for the floor.
        overlap: The gradient is that of sums over classes; see ``region``.
        squared: One of these sums is of squares.
        weighted: Pixels have weights in them.
        pair: It has that of a cross-entropy beside.
    """

    full: bool
    align_corners: bool
    sigmoid: bool
    single: bool
    smooth: bool
    hits: bool = False
    hard: bool = False
    overlap: bool = False
    squared: bool = False
    weighted: bool = False
    pair: bool = False


def options(warps: int, registers: int | None = None) -> dict[str, Any]:
    """How the compiler is asked for a kernel.

    Args:
        warps: Warps of a program.
        registers: Registers of a thread at most, or None.
    """
    # Newer releases of Triton do not fuse unless asked.
    chosen: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and torch.version.hip is None:
        chosen["maxnreg"] = registers
    return chosen


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for what kernels call, and no error without Triton."""
    return function if triton is None else triton.jit(function)


def kernel(*aligned: str) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` for kernels that are the same for every size.

    Triton makes other kernels for arguments that are 1 or multiples of 16, so that each size of a
    crop would compile its own. Here most are never told apart.

    Args:
        aligned: Names of maps that are allocated here, and so begin at a multiple of 16 bytes, and
            of sizes that are worth a kernel of their own: with them, loads of four pixels at once.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        if triton is None:
            return function
        kinds = function.__annotations__
        names = function.__code__.co_varnames[: function.__code__.co_argcount]
        plain = [
            name for name in names if name not in aligned and "constexpr" not in kinds.get(name, "")
        ]
        return triton.jit(do_not_specialize=plain, do_not_specialize_on_alignment=plain)(function)

    return decorate


LOG2_E, LN_2 = 1.4426950408889634, 0.6931471805599453
if tl is not None:
    LOG2_E, LN_2 = tl.constexpr(LOG2_E), tl.constexpr(LN_2)


@jit
def axis(low, high, align_corners: tl.constexpr):
    """Source position (a * i + b) / d of output pixel i along one axis, clamped at 0."""
    a, b, d = 2 * low, low - high, 2 * high
    if align_corners:
        one = (low == 1) | (high == 1)  # everything lies in cell 0, which has no second row
        a, b, d = tl.where(one, 1, low - 1), 0, tl.where(one, high, high - 1)
    return a, b, d


@jit
def cell_of(i, line):
    """Cell of output pixel i."""
    a, b, d = line
    return tl.maximum(a * i + b, 0) // d


@jit
def weight_in(cell, i, line, last):
    """Weight of the second row of a cell at its output pixel i. The last cell has none."""
    a, b, d = line
    inside = (tl.maximum(a * i + b, 0) - cell * d).to(tl.float32) * (1.0 / d)
    return tl.where(cell < last, inside, 0.0)


@jit
def begin(cell, line, size):
    """First output pixel of a cell. Cell 0 also has the pixels that lie before its first row."""
    a, b, d = line
    first = (d * cell - b + a - 1) // a
    return tl.where(cell <= 0, 0, tl.minimum(first, size))


@jit
def between(first, second, weight):
    """Linear interpolation, rounded in the same way wherever it stands."""
    return tl.fma(weight, second - first, first)


@jit
def scaled(value, step):
    """Nothing stays nothing, whatever the gradient of the loss."""
    return tl.where(value != 0, value * step, 0.0)


@jit
def log1p(x):
    """For x >= 0. Accurate for small x, where log(1 + x) would lose the losses of easy pixels."""
    t = x / (2.0 + x)
    s = t * t
    series = 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9)))))
    return tl.where(x < 0.25, series, tl.log(1.0 + x))


@jit
def softmax_step(z, best, rest):
    """`rest` is the sum of 2^(z - best) over all classes but the best one so far."""
    gain = z - best
    more = gain > 0
    decay = tl.exp2(-tl.abs(gain))
    return tl.where(more, z, best), tl.fma(rest, tl.where(more, decay, 1.0), decay)


@jit
def sigmoid_step(z, hot, total):
    """Binary cross-entropy of one channel, in natural units, added to `total`."""
    wrong = tl.maximum(tl.where(hot, -z, z), 0.0)
    return total + tl.fma(wrong, LN_2, log1p(tl.exp2(-tl.abs(z))))


@jit
def is_hard(loss, limit):
    """Above a finite limit, or NaN: what is not finite is never mined away."""
    return ~(loss <= limit)


@jit
def count(mask):
    """True values of a tile."""
    return tl.sum(tl.sum(mask.to(tl.int32), 1), 0)
