# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Backward pass: from the factor of each kept pixel to the gradient of the logits.

The probabilities are interpolated again. Each low-resolution pixel collects from the cells around
it, so that nothing is shared between programs, and two runs give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import geometry
from .inner import LOG2_E, Kind, axis, begin, between, jit, kernel, options, scaled, tl, weight_in


class Saved(NamedTuple):
    """What the forward pass and mining left for this one.

    Attributes:
        factor: float32, shape (N, H, W): weight of each pixel in the sum, 0 where not kept.
        normaliser: float32, shape (N, H, W): log2 of the sum of exponentials, for softmax.
        label: Narrow integers, shape (N, H, W), -1 where not kept.
        divisor: float32, shape ().
        at_true: float32, shape (N, H, W): with ``Kind.overlap``, what the true class has beside;
            ``factor`` is then what all classes have.
        weight: float32, shape (N, H, W): weight of each pixel, with ``Kind.weighted``.
        by_predicted: float32, shape (N, C): derivative by those sums, with ``Kind.overlap``.
    """

    factor: Tensor
    normaliser: Tensor
    label: Tensor
    divisor: Tensor
    at_true: Tensor | None = None
    weight: Tensor | None = None
    by_predicted: Tensor | None = None


def run(
    logits: Tensor,
    saved: Saved,
    grad_loss: Tensor,
    sizes: geometry.Sizes,
    kind: Kind,
    smoothing: float,
    plan: geometry.BackwardPlan,
) -> Tensor:
    """Gradient of the logits, in their dtype and layout.

    Args:
        logits: As in the forward pass.
        saved: What was left for this pass.
        grad_loss: Gradient of the loss, shape ().
        sizes: Of the problem.
        kind: What was computed.
        smoothing: Share of the target mass spread over the classes.
        plan: Tiles and programs.
    """
    grad = torch.empty_like(logits)
    if not grad.numel():
        return grad
    arguments = (
        logits,
        # Any tensor stands in for what this kind does not read.
        *(saved.factor if part is None else part for part in saved),
        grad_loss,
        grad,
        *logits.stride(),
        *grad.stride(),
        *sizes[1:],
        plan.across,
        1 - smoothing,
        smoothing / 2 if kind.sigmoid else smoothing / sizes.classes,
    )
    if kind.full:
        _backward_full[(plan.programs,)](
            *arguments, kind=kind, rows=plan.walk, cols=plan.cells, **options(1)
        )
    else:
        _backward[(plan.programs,)](
            *arguments,
            plan.deep,
            plan.walk,
            kind=kind,
            class_tile=plan.class_tile,
            cells=plan.cells,
            **options(1, plan.registers),
        )
    return grad


@jit
def _probability(z, norm, kind: tl.constexpr):
    return 1.0 / (1.0 + tl.exp2(-z)) if kind.sigmoid else tl.exp2(z - norm)


@jit
def _finite(z):
    # A pixel that a broken logit reaches has a factor of NaN, or is not kept and has 0. Neither
    # must be spoilt by what is computed for it; sums of a few values below the limit are finite.
    return tl.where(tl.abs(z) < 1e37, z, 0.0)


@jit
def _of_overlap(p, hot, shift, at_true, weight, slope, kind: tl.constexpr):
    # Derivative by a logit of a function of the sums: p (slope - mean slope), and more if true.
    steep = 2.0 * slope * p if kind.squared else slope
    return tl.fma(p, tl.fma(weight, steep, shift), tl.where(hot, at_true, 0.0))


@kernel("label_map", "factor", "normaliser", "divisor", "at_true", "grad")
def _backward_full(
    logits,
    factor,
    normaliser,
    label_map,
    divisor,
    at_true,
    weight,
    by_predicted,
    grad_loss,
    grad,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    grad_n,
    grad_c,
    grad_y,
    grad_x,
    classes,
    low_h,
    low_w,
    high_h,
    high_w,
    across,
    sharp,
    even,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # Logits of the size of the labels: a tile of pixels, all classes. Where nothing is kept, the
    # gradient is 0 whatever was read, even NaN.
    down = tl.cdiv(high_h, rows)
    program = tl.program_id(0)
    x = program % across * cols + tl.arange(0, cols)
    y = program // across % down * rows + tl.arange(0, rows)
    image = (program // (across * down)).to(tl.int64)
    inside = (y < high_h)[:, None] & (x < high_w)[None, :]
    place = (image * high_h + y[:, None]) * high_w + x[None, :]
    step = 1.0
    if not kind.overlap:
        step = tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    label = tl.load(label_map + place, mask=inside, other=-1).to(tl.int32)
    live = label >= 0
    k = scaled(tl.load(factor + place, mask=live, other=0.0), step)
    norm = k
    if not kind.sigmoid:
        norm = tl.load(normaliser + place, mask=live, other=0.0)
    if kind.single:
        label -= 1
    y, x = y.to(tl.int64)[:, None], x.to(tl.int64)[None, :]
    logits += image * stride_n + y * stride_y + x * stride_x
    grad += image * grad_n + y * grad_y + x * grad_x
    if kind.overlap:
        more = scaled(tl.load(at_true + place, mask=live, other=0.0), step)
        share = step
        if kind.weighted:
            share = scaled(tl.load(weight + place, mask=live, other=0.0), step)
        by_predicted += image * classes
    for c in range(classes):
        z = tl.load(logits, mask=live, other=0.0).to(tl.float32) * LOG2_E
        p = _probability(z, norm, kind)
        if kind.overlap:
            g = _of_overlap(p, label == c, k, more, share, tl.load(by_predicted + c), kind)
        else:
            g = p - tl.where(label == c, sharp, 0.0)
            if kind.smooth:
                g -= even
            g = k * g
        g = tl.where(live, g, 0.0)
        tl.store(grad, g.to(grad.dtype.element_ty), mask=inside)
        logits += stride_c
        grad += grad_c


@jit
def _from_left(value, shift, first):
    # Each cell's neighbour to the left, along the last axis; nothing for the first cell.
    return tl.where(first, 0.0, tl.gather(value, shift, 1))


@kernel("label_map", "factor", "normaliser", "divisor", "at_true", "grad")
def _backward(
    logits,
    factor,
    normaliser,
    label_map,
    divisor,
    at_true,
    weight,
    by_predicted,
    grad_loss,
    grad,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    grad_n,
    grad_c,
    grad_y,
    grad_x,
    classes,
    low_h,
    low_w,
    high_h,
    high_w,
    across,
    sharp,
    even,
    deep,
    walk,
    kind: tl.constexpr,
    class_tile: tl.constexpr,
    cells: tl.constexpr,
):
    # A thread owns a cell of a few classes and visits the cell's pixels one by one. A low-res pixel
    # collects from the four cells around it: the left ones are the neighbour thread's, the upper
    # ones were done one row earlier and are carried down. The first column and row of cells of each
    # program is the overlap that is computed twice.
    program = tl.program_id(0)
    first_class = program % deep * class_tile
    block_x = program // deep % across
    down = tl.cdiv(low_h, walk)
    first_row = program // (deep * across) % down * walk
    image = (program // (deep * across * down)).to(tl.int64)
    local = tl.arange(0, class_tile)
    c = first_class + local
    lane = tl.arange(0, cells)
    cell = block_x * (cells - 1) - 1 + lane
    inside = (cell >= 0) & (cell < low_w)
    line_y = axis(low_h, high_h, kind.align_corners)
    line_x = axis(low_w, high_w, kind.align_corners)
    x_begin = begin(cell, line_x, high_w)
    x_end = tl.where(inside, begin(cell + 1, line_x, high_w), x_begin)
    width = tl.max(x_end - x_begin, 0)
    # Weight of the right column at the i-th pixel of a cell: weight_in() in floating point.
    x_step, x_start, x_parts = line_x
    x_scale = tl.where(cell < low_w - 1, 1.0, 0.0) / x_parts
    x_offset = (x_step * x_begin + x_start - x_parts * cell).to(tl.float32) * x_scale
    x_scale *= x_step

    # 64-bit to the tile, 32-bit within it. Classes and cells outside repeat the last one inside;
    # no pixel is theirs, and nothing is stored for them.
    logits += image * stride_n + first_class.to(tl.int64) * stride_c
    grad += image * grad_n + first_class.to(tl.int64) * grad_c
    plane = tl.minimum(local, classes - 1 - first_class).to(tl.int64)[:, None] * stride_c
    left = tl.minimum(tl.maximum(cell, 0), low_w - 1)[None, :] * stride_x
    right = tl.minimum(cell + 1, low_w - 1)[None, :] * stride_x
    # The overlap belongs to the program on the left.
    mine = (c < classes)[:, None] & (inside & (lane > 0))[None, :]
    grad_plane = local.to(tl.int64)[:, None] * grad_c
    out = cell[None, :] * grad_x
    first = (lane == 0)[None, :] & (c >= 0)[:, None]
    shift = tl.maximum(lane - 1, 0)[None, :] + tl.full([class_tile, cells], 0, tl.int32)
    true_label = (c + 1 if kind.single else c)[:, None]

    step = 1.0
    if not kind.overlap:
        step = tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    if kind.overlap:
        steep = tl.load(by_predicted + image * classes + c, mask=c < classes, other=0.0)[:, None]
    carry = tl.full([class_tile, cells], 0.0, tl.float32)
    for r in range(walk + 1):
        row = first_row - 1 + r
        above = logits + tl.minimum(tl.maximum(row, 0), low_h - 1).to(tl.int64) * stride_y + plane
        below = logits + tl.minimum(row + 1, low_h - 1).to(tl.int64) * stride_y + plane
        # Left column and slope to the right of the row above, and what the row below adds.
        z0 = _finite(tl.load(above + left).to(tl.float32) * LOG2_E)
        z1 = _finite(tl.load(below + left).to(tl.float32) * LOG2_E)
        slope0 = _finite(tl.load(above + right).to(tl.float32) * LOG2_E - z0)
        slope1 = _finite(tl.load(below + right).to(tl.float32) * LOG2_E - z1)
        # Sums over the cell of gradients, plain and weighted by x, y and both.
        all_all = tl.full([class_tile, cells], 0.0, tl.float32)
        all_right = tl.full([class_tile, cells], 0.0, tl.float32)
        low_all = tl.full([class_tile, cells], 0.0, tl.float32)
        low_right = tl.full([class_tile, cells], 0.0, tl.float32)
        y_end = begin(row + 1, line_y, high_h)
        for y in range(begin(row, line_y, high_h), y_end):
            weight_y = weight_in(row, y, line_y, low_h - 1)
            z_left = between(z0, z1, weight_y)
            slope = between(slope0, slope1, weight_y)
            line = (image * high_h + y) * high_w
            line_all = tl.full([class_tile, cells], 0.0, tl.float32)
            line_right = tl.full([class_tile, cells], 0.0, tl.float32)
            for i in range(width):
                x = x_begin + i
                label = tl.load(label_map + line + x, mask=x < x_end, other=-1).to(tl.int32)
                live = label >= 0
                # Most pixels are not kept: skip the classes where none of these is.
                if tl.max(live.to(tl.int32), 0) > 0:
                    k = tl.load(factor + line + x, mask=live, other=0.0)
                    norm = k
                    if not kind.sigmoid:
                        norm = tl.load(normaliser + line + x, mask=live, other=float("inf"))
                    weight_x = tl.maximum(x_offset + x_scale * i, 0.0)
                    z = tl.fma(weight_x[None, :], slope, z_left)
                    p = _probability(z, norm[None, :], kind)
                    hot = label[None, :] == true_label
                    if kind.overlap:
                        more = tl.load(at_true + line + x, mask=live, other=0.0)
                        share = live.to(tl.float32)
                        if kind.weighted:
                            share = tl.load(weight + line + x, mask=live, other=0.0)
                        g = _of_overlap(
                            p, hot, k[None, :], more[None, :], share[None, :], steep, kind
                        )
                        k = live.to(tl.float32)  # what follows multiplies by it
                    else:
                        g = tl.where(hot, p - sharp, p)
                        if kind.smooth:
                            g -= even
                    line_all = tl.fma(k[None, :], g, line_all)
                    line_right = tl.fma((k * weight_x)[None, :], g, line_right)
            all_all += line_all
            all_right += line_right
            low_all = tl.fma(weight_y, line_all, low_all)
            low_right = tl.fma(weight_y, line_right, low_right)
        upper_right = all_right - low_right
        value = carry + (all_all - low_all) - upper_right + _from_left(upper_right, shift, first)
        if (r > 0) & (row < low_h):
            at = grad + row.to(tl.int64) * grad_y + grad_plane + out
            tl.store(at, scaled(value, step).to(grad.dtype.element_ty), mask=mine)
        carry = low_all - low_right + _from_left(low_right, shift, first)
