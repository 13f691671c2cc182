"""How the work is divided: tiles, programs and register limits from sizes alone.

Pure functions of integers, so that a schedule can be tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

# Schedulers of a multiprocessor, and warps of the backward pass that each of them holds.
_SCHEDULERS, _WARPS = 4, 3
# A scheduler with a single warp issues about every third cycle: it waits for loads.
_ALONE = 2.2
# Of a thread of the region term: four warps for each scheduler.
_REGISTERS = 128

_INT32 = 2**31


class Tiling(NamedTuple):
    """Limits of a schedule.

    Attributes:
        tile: Output pixels of a forward tile. A tile is one warp's, so that the sums over classes
            stay inside a thread.
        cells: Cells of a backward tile, one of which is the overlap with the neighbour.
        classes: Classes of a backward tile.
        walk: Rows of cells that a backward program walks down; None: what fills the device. Longer
            walks repeat less work, one row in each, but leave less to balance.
        longest: The longest walk where it is chosen.
        pixels: Pixels that a thread of the region term holds at most.
        registers: Of a backward thread at most: three warps for each scheduler.
        block: Pixels of a block in kernels that only read maps.
        programs: About how many programs of these share the batch.
    """

    tile: int = 256
    cells: int = 32
    classes: int = 8
    walk: int | None = None
    longest: int = 16
    pixels: int = 16
    registers: int | None = 168
    block: int = 1024
    programs: int = 1024


TILING = Tiling()


class Sizes(NamedTuple):
    """Images and classes, and the sizes of logits and labels."""

    images: int
    classes: int
    low_h: int
    low_w: int
    high_h: int
    high_w: int

    @property
    def full(self) -> bool:
        """Whether logits are as large as labels."""
        return (self.low_h, self.low_w) == (self.high_h, self.high_w)


class ForwardPlan(NamedTuple):
    """A program takes ``rows`` x ``cols`` pixels at a time; there are ``down`` x ``across``."""

    rows: int
    cols: int
    down: int
    across: int
    programs: int


class Cells(NamedTuple):
    """A tile of the region term: ``lanes`` cells, ``wide`` of them side by side.

    A thread holds ``rows`` x ``cols`` pixels of its cell.
    """

    rows: int
    cols: int
    wide: int
    lanes: int


class RegionPlan(NamedTuple):
    """``down`` x ``across`` programs an image; each takes at most ``tiles`` tiles of its cells."""

    tile: Cells
    down: int
    across: int
    tiles: int
    programs: int
    registers: int | None


class MiningPlan(NamedTuple):
    """``parts`` programs share an image, ``block`` pixels at a time."""

    block: int
    parts: int


class BackwardPlan(NamedTuple):
    """A program takes ``walk`` rows of ``cells`` - 1 cells in ``class_tile`` classes.

    ``across`` and ``deep`` are the numbers of programs side by side and over the classes. At full
    size a program takes ``rows`` x ``cells`` pixels in all classes.
    """

    cells: int
    class_tile: int
    walk: int
    across: int
    deep: int
    programs: int
    registers: int | None


def refusal(sizes: Sizes, strides: tuple[int, ...]) -> str | None:
    """Why the kernels cannot take tensors of these sizes, or None.

    Positions are computed in 32 bits. Grids have limits as well.

    Args:
        sizes: Of the problem.
        strides: Of the logits: image, channel, row, column.
    """
    if min(sizes.low_h, sizes.low_w, sizes.classes) < 1:
        return "cannot take logits without channels, rows or columns"
    if sizes.images >= 2**16:
        return f"cannot take {sizes.images} images at once, only {2**16 - 1}"
    pixels = sizes.images * sizes.high_h * sizes.high_w
    # (a * i + b) / d of `inner.axis`; the last tile may lie outside.
    positions = 2 * max(
        (sizes.low_h + 1) * (sizes.high_h + TILING.tile),
        (sizes.low_w + TILING.cells) * (sizes.high_w + TILING.tile),
    )
    rows = abs(strides[3]) * (sizes.low_w + TILING.cells)
    # Of the backward pass with walk 1; all other kernels have fewer programs than pixels. Written
    # out, for a compiler that traces this may know the sizes as symbols alone.
    strips = cdiv(sizes.low_w, TILING.cells - 1) * cdiv(sizes.classes, TILING.classes)
    programs = strips * sizes.low_h * sizes.images
    for what, number in (
        ("pixels", pixels),
        ("positions", positions),
        ("strides", rows),
        ("programs", programs),
    ):
        if number >= _INT32:
            return f"cannot take logits {sizes[:4]} and labels {sizes[4:]}: {what} pass 32 bits"
    return None


def spans_too_much(low: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether places within one plane of logits pass 32 bits, which the region term has them in.

    Args:
        low: Rows and columns of the logits.
        strides: Of the logits: image, channel, row, column.
    """
    return sum(size * abs(stride) for size, stride in zip(low, strides[2:], strict=True)) >= _INT32


def forward(sizes: Sizes, tiling: Tiling = TILING) -> ForwardPlan:
    """Tiles of the forward pass: a strip of columns of one row of cells for each program."""
    # As many rows as most cells have, but not one: Triton has miscompiled dimensions of size 1.
    rows = min(8, max(2, 1 << (sizes.high_h // max(1, sizes.low_h)).bit_length() - 1))
    cols = tiling.tile // rows
    down = cdiv(sizes.high_h, rows) if sizes.full else sizes.low_h
    across = cdiv(sizes.high_w, cols)
    return ForwardPlan(rows, cols, down, across, sizes.images * down * across)


def region(sizes: Sizes, tiling: Tiling = TILING) -> RegionPlan:
    """Tiles of the kernels of the region term."""
    wide = min(8, tiling.cells // 2)
    if sizes.full:
        tile = Cells(2, 4, wide, tiling.cells)
        down, across = cdiv(sizes.high_h, 2), cdiv(sizes.high_w, 4 * tiling.cells)
        return RegionPlan(tile, down, across, 1, sizes.images * down * across, _REGISTERS)
    cols = _power(sizes.high_w // sizes.low_w)
    rows = min(_power(sizes.high_h // sizes.low_h), tiling.pixels // cols)
    tile = Cells(rows, cols, wide, tiling.cells)
    down, across = cdiv(sizes.low_h, tiling.cells // wide), cdiv(sizes.low_w, wide)
    tiles = cdiv(_longest(sizes.low_h, sizes.high_h), rows) * cdiv(
        _longest(sizes.low_w, sizes.high_w), cols
    )
    return RegionPlan(tile, down, across, tiles, sizes.images * down * across, _REGISTERS)


def _power(scale: int) -> int:
    """A power of two up to the scale, of 2 to 8."""
    # Not one: Triton has miscompiled dimensions of size 1.
    return min(8, max(2, 1 << max(1, scale).bit_length() - 1))


def _longest(low: int, high: int) -> int:
    """A bound of the pixels of a cell along one axis."""
    if low == 1:
        return high
    return max(cdiv(3 * high, 2 * low), cdiv(high - 1, low - 1)) + 1


def mining(sizes: Sizes, tiling: Tiling = TILING) -> MiningPlan:
    """Programs of the kernels that only read maps."""
    parts = cdiv(sizes.high_h * sizes.high_w, tiling.block)
    return MiningPlan(tiling.block, max(1, min(parts, tiling.programs // max(1, sizes.images))))


@lru_cache(maxsize=256)
def backward(sizes: Sizes, processors: int, tiling: Tiling = TILING) -> BackwardPlan:
    """Tiles of the backward pass.

    Args:
        sizes: Of the problem.
        processors: Multiprocessors of the device.
        tiling: Its limits.

    Returns:
        The schedule whose walk costs least by :func:`_rounds`.
    """
    if sizes.full:
        cols = tiling.tile // 2
        across, down = cdiv(sizes.high_w, cols), cdiv(sizes.high_h, 2)
        return BackwardPlan(cols, 1, 2, across, 1, sizes.images * across * down, None)
    class_tile = min(tiling.classes, max(2, 1 << (sizes.classes - 1).bit_length()))
    across, deep = cdiv(sizes.low_w, tiling.cells - 1), cdiv(sizes.classes, class_tile)
    strips = across * deep * sizes.images
    schedulers = processors * _SCHEDULERS
    walk = tiling.walk or min(
        range(1, max(1, min(tiling.longest, sizes.low_h)) + 1),
        key=lambda rows: (rows + 1) * _rounds(strips * cdiv(sizes.low_h, rows) / schedulers),
    )
    programs = strips * cdiv(sizes.low_h, walk)
    return BackwardPlan(tiling.cells, class_tile, walk, across, deep, programs, tiling.registers)


def _rounds(share: float) -> float:
    """Time that a scheduler needs for its share of programs, in that of one that never waits."""
    whole, rest = divmod(-int(-share // 1), _WARPS)
    return whole * max(_WARPS, _ALONE) + (max(rest, _ALONE) if rest else 0)


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up."""
    return -(-a // b)
