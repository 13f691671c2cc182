# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The sums of overlap losses, and what their gradient needs of each pixel.

After the forward pass, which leaves the normaliser of each pixel, a second look at the logits sums
probabilities by class; the gradient needs a third, for the mean of its slopes over the classes of a
pixel, before the backward pass collects it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import geometry
from .forward import Maps
from .inner import (
    LOG2_E,
    Kind,
    axis,
    begin,
    between,
    cell_of,
    jit,
    kernel,
    options,
    tl,
    weight_in,
)


def sums(
    logits: Tensor,
    maps: Maps,
    weight: Tensor | None,
    sizes: geometry.Sizes,
    kind: Kind,
    plan: geometry.ForwardPlan,
) -> Tensor:
    """Intersection, predicted sum and weight of the labels of each image and class.

    Args:
        logits: As in the forward pass.
        maps: What it left.
        weight: float32, shape (N, H, W), or None.
        sizes: Of the problem.
        kind: What is computed; softmax alone, without smoothing.
        plan: Tiles and programs.

    Returns:
        float64, shape (3, N, C).
    """
    tiles = 1 if sizes.full else geometry.cdiv(tallest(sizes), plan.rows)
    parts = logits.new_zeros(3, sizes.classes, plan.programs * tiles, dtype=torch.float32)
    if maps.loss.numel():
        _sums[(plan.programs,)](
            logits,
            maps.loss,
            maps.normaliser,
            maps.label,
            maps.loss if weight is None else weight,
            parts,
            *logits.stride(),
            *sizes[1:],
            plan.down,
            plan.across,
            tiles,
            kind=kind,
            rows=plan.rows,
            cols=plan.cols,
            **options(1),
        )
    # Programs of one image follow each other.
    each = parts.view(3, sizes.classes, sizes.images, plan.programs // max(1, sizes.images) * tiles)
    return each.sum(3, dtype=torch.float64).transpose(1, 2)


def tallest(sizes: geometry.Sizes) -> int:
    """A bound of the rows of pixels that a row of cells has."""
    low, high = sizes.low_h, sizes.high_h
    if low == 1:
        return high
    return max(geometry.cdiv(3 * high, 2 * low), geometry.cdiv(high - 1, low - 1)) + 1


def slopes(
    logits: Tensor,
    maps: Maps,
    weight: Tensor | None,
    by_intersection: Tensor,
    by_predicted: Tensor,
    sizes: geometry.Sizes,
    kind: Kind,
    plan: geometry.ForwardPlan,
) -> tuple[Tensor, Tensor]:
    """What the backward pass adds to the slope of every class of a pixel, and at the true one.

    Args:
        logits: As in the forward pass.
        maps: What it left.
        weight: float32, shape (N, H, W), or None.
        by_intersection: Derivative by the intersections, float32, shape (N, C), contiguous.
        by_predicted: Derivative by the predicted sums, likewise.
        sizes: Of the problem.
        kind: What is computed.
        plan: Tiles and programs.

    Returns:
        Two float32 maps, shape (N, H, W).
    """
    shift, at_true = torch.empty_like(maps.loss), torch.empty_like(maps.loss)
    if shift.numel():
        _slopes[(plan.programs,)](
            logits,
            maps.normaliser,
            maps.label,
            maps.loss if weight is None else weight,
            by_intersection,
            by_predicted,
            shift,
            at_true,
            *logits.stride(),
            *sizes[1:],
            plan.down,
            plan.across,
            kind=kind,
            rows=plan.rows,
            cols=plan.cols,
            **options(1),
        )
    return shift, at_true


@jit
def _logit(above, below, left, right, plane, weight_x, weight_y):
    # Interpolated logit of a tile, in units of log 2, as the forward pass has it.
    z00 = tl.load(above + plane + left).to(tl.float32)
    z01 = tl.load(above + plane + right).to(tl.float32)
    z10 = tl.load(below + plane + left).to(tl.float32)
    z11 = tl.load(below + plane + right).to(tl.float32)
    top = between(z00, z01, weight_x)
    drop = between(z10, z11, weight_x) - top
    return tl.fma(weight_y, drop[None, :], (top * LOG2_E)[None, :])


@jit
def _store_sum(at, values):
    tl.store(at, tl.sum(tl.sum(values, 1), 0))


@kernel("loss", "normaliser", "label_map", "parts")
def _sums(
    logits,
    loss,
    normaliser,
    label_map,
    weight,
    parts,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    classes,
    low_h,
    low_w,
    high_h,
    high_w,
    down,
    across,
    tiles,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # Tiles as in the forward pass. Each tile has a place of its own for each class, so that nothing
    # is added up through memory.
    program = tl.program_id(0)
    block_x = program % across
    block_y = program // across % down
    image = (program // (across * down)).to(tl.int64)
    x = tl.max_contiguous(block_x * cols + tl.arange(0, cols), 1)
    inside_x = x < high_w
    logits += image * stride_n
    axis_y = axis(low_h, high_h, kind.align_corners)
    left = x * stride_x
    right, above, below, weight_x = left, logits, logits, inside_x.to(tl.float32)
    if kind.full:
        y_begin = block_y * rows
        y_end = tl.minimum(y_begin + rows, high_h)
    else:
        y_begin = begin(block_y, axis_y, high_h)
        y_end = begin(block_y + 1, axis_y, high_h)
        axis_x = axis(low_w, high_w, kind.align_corners)
        cell = cell_of(x, axis_x)
        weight_x = weight_in(cell, x, axis_x, low_w - 1)
        left = tl.minimum(cell, low_w - 1) * stride_x
        right = tl.minimum(cell + 1, low_w - 1) * stride_x
        above = logits + block_y.to(tl.int64) * stride_y
        below = logits + tl.minimum(block_y + 1, low_h - 1).to(tl.int64) * stride_y

    step = tl.num_programs(0) * tiles
    out = parts + program * tiles
    for y_first in range(y_begin, y_end, rows):
        y = y_first + tl.arange(0, rows)
        inside = (y < y_end)[:, None] & inside_x[None, :]
        tile = (image * high_h + y_first) * high_w
        place = tl.arange(0, rows)[:, None] * high_w + x[None, :]
        label = tl.load(label_map + tile + place, mask=inside, other=-1).to(tl.int32)
        live = label >= 0
        norm = tl.load(normaliser + tile + place, mask=live, other=0.0)
        # A loss that is not finite comes out, though the probability may be 0.
        pixel = tl.load(loss + tile + place, mask=live, other=0.0)
        pixel -= pixel
        scale = live.to(tl.float32)
        if kind.weighted:
            scale = tl.load(weight + tile + place, mask=live, other=0.0)
        weight_y = (weight_in(block_y, y, axis_y, low_h - 1) * LOG2_E)[:, None]
        plane = tl.zeros([], tl.int64)
        at_class = out
        for c in range(classes):
            if kind.full:
                at = y.to(tl.int64)[:, None] * stride_y + x.to(tl.int64)[None, :] * stride_x
                z = tl.load(logits + plane + at, mask=live, other=0.0).to(tl.float32) * LOG2_E
            else:
                z = _logit(above, below, left, right, plane, weight_x, weight_y)
            plane += stride_c
            p = tl.where(live, tl.exp2(z - norm), 0.0)
            hot = label == c
            _store_sum(at_class, tl.where(hot, scale * (p + pixel), 0.0))
            _store_sum(at_class + classes * step, scale * (p * p if kind.squared else p))
            _store_sum(at_class + 2 * classes * step, tl.where(hot, scale, 0.0))
            at_class += step
        out += 1


@kernel("normaliser", "label_map", "by_intersection", "by_predicted", "shift", "at_true")
def _slopes(
    logits,
    normaliser,
    label_map,
    weight,
    by_intersection,
    by_predicted,
    shift,
    at_true,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    classes,
    low_h,
    low_w,
    high_h,
    high_w,
    down,
    across,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    program = tl.program_id(0)
    block_x = program % across
    block_y = program // across % down
    image = (program // (across * down)).to(tl.int64)
    x = tl.max_contiguous(block_x * cols + tl.arange(0, cols), 1)
    inside_x = x < high_w
    logits += image * stride_n
    by_intersection += image * classes
    by_predicted += image * classes
    axis_y = axis(low_h, high_h, kind.align_corners)
    left = x * stride_x
    right, above, below, weight_x = left, logits, logits, inside_x.to(tl.float32)
    if kind.full:
        y_begin = block_y * rows
        y_end = tl.minimum(y_begin + rows, high_h)
    else:
        y_begin = begin(block_y, axis_y, high_h)
        y_end = begin(block_y + 1, axis_y, high_h)
        axis_x = axis(low_w, high_w, kind.align_corners)
        cell = cell_of(x, axis_x)
        weight_x = weight_in(cell, x, axis_x, low_w - 1)
        left = tl.minimum(cell, low_w - 1) * stride_x
        right = tl.minimum(cell + 1, low_w - 1) * stride_x
        above = logits + block_y.to(tl.int64) * stride_y
        below = logits + tl.minimum(block_y + 1, low_h - 1).to(tl.int64) * stride_y
    for y_first in range(y_begin, y_end, rows):
        y = y_first + tl.arange(0, rows)
        inside = (y < y_end)[:, None] & inside_x[None, :]
        tile = (image * high_h + y_first) * high_w
        place = tl.arange(0, rows)[:, None] * high_w + x[None, :]
        label = tl.load(label_map + tile + place, mask=inside, other=-1).to(tl.int32)
        live = label >= 0
        norm = tl.load(normaliser + tile + place, mask=live, other=0.0)
        weight_y = (weight_in(block_y, y, axis_y, low_h - 1) * LOG2_E)[:, None]
        mean = tl.full([rows, cols], 0.0, tl.float32)
        true = tl.full([rows, cols], 0.0, tl.float32)
        plane = tl.zeros([], tl.int64)
        for c in range(classes):
            if kind.full:
                at = y.to(tl.int64)[:, None] * stride_y + x.to(tl.int64)[None, :] * stride_x
                z = tl.load(logits + plane + at, mask=live, other=0.0).to(tl.float32) * LOG2_E
            else:
                z = _logit(above, below, left, right, plane, weight_x, weight_y)
            plane += stride_c
            p = tl.where(live, tl.exp2(z - norm), 0.0)
            slope = tl.load(by_predicted + c)
            mean += p * (2.0 * slope * p if kind.squared else slope)
            true += tl.where(label == c, p * tl.load(by_intersection + c), 0.0)
        scale = live.to(tl.float32)
        if kind.weighted:
            scale = tl.load(weight + tile + place, mask=live, other=0.0)
        tl.store(shift + tile + place, -scale * (mean + true), mask=inside)
        tl.store(at_true + tile + place, scale * true, mask=inside)
