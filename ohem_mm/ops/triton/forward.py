# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Forward pass: from low-resolution logits to one loss per pixel.

The C logits of an output pixel are interpolated from the four low-resolution ones around it where
they are needed, and never stored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import geometry
from .inner import (
    LN_2,
    LOG2_E,
    Kind,
    axis,
    begin,
    between,
    cell_of,
    count,
    is_hard,
    kernel,
    options,
    sigmoid_step,
    softmax_step,
    tl,
    weight_in,
)


class Maps(NamedTuple):
    """What the forward pass leaves for each pixel; maps that are not needed are those of ``loss``.

    Attributes:
        loss: float32, the loss without smoothing, -1 where ignored.
        smooth_loss: float32, the loss that is optimised, where labels are smoothed.
        normaliser: float32, log2 of the sum of exponentials, for softmax.
        label: The narrowest integer type that holds the classes; -1 where ignored.
        counts: int32, shape (3, programs): valid, hard and correct pixels of each program.
    """

    loss: Tensor
    smooth_loss: Tensor
    normaliser: Tensor
    label: Tensor
    counts: Tensor


def run(
    logits: Tensor,
    target: Tensor,
    sizes: geometry.Sizes,
    kind: Kind,
    *,
    ignore_index: int,
    smoothing: float,
    limit: float,
    state: Tensor,
    plan: geometry.ForwardPlan,
) -> Maps:
    """Losses, normalisers and labels of every pixel.

    Args:
        logits: float16, bfloat16 or float32, shape (N, C, h, w), any strides.
        target: Any integer dtype, shape (N, H, W), contiguous.
        sizes: Those of the two.
        kind: What is computed.
        ignore_index: Label of pixels that do not count.
        smoothing: Share of the target mass spread over the classes.
        limit: Loss above which a pixel is hard.
        state: int32, to be filled with zeros on the way.
        plan: Tiles and programs.
    """
    loss = logits.new_empty(target.shape, dtype=torch.float32)
    maps = Maps(
        loss,
        torch.empty_like(loss) if kind.smooth else loss,
        loss if kind.sigmoid else torch.empty_like(loss),
        torch.empty_like(loss, dtype=label_dtype(sizes.classes)),
        state.new_empty(3, max(1, plan.programs)),
    )
    if loss.numel():
        _forward[(plan.programs,)](
            logits,
            target,
            *maps,
            state,
            *logits.stride(),
            *sizes[1:],
            plan.down,
            plan.across,
            state.numel(),
            ignore_index,
            smoothing,
            limit,
            kind=kind,
            rows=plan.rows,
            cols=plan.cols,
            **options(1),
        )
    return maps


def label_dtype(classes: int) -> torch.dtype:
    """The narrowest integer type for labels -1 to ``classes``."""
    return torch.int8 if classes < 2**7 else torch.int16 if classes < 2**15 else torch.int32


@kernel("loss", "smooth_loss", "normaliser", "label_map", "counts", "state")
def _forward(
    logits,
    target,
    loss,
    smooth_loss,
    normaliser,
    label_map,
    counts,
    state,
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
    state_size,
    ignore_index,
    smoothing,
    limit,
    kind: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # A program takes a strip of columns of one row of cells: there the four corners of a column do
    # not change from row to row.
    program = tl.program_id(0)
    block_x = program % across
    block_y = program // across % down
    image = (program // (across * down)).to(tl.int64)
    for start in range(program * 32, state_size, tl.num_programs(0) * 32):
        at = start + tl.arange(0, 32)
        tl.store(state + at, 0, mask=at < state_size)
    # Without the hint, the compiler loads four pixels a thread, and then moves each class's logits
    # between threads through shared memory.
    x = tl.max_contiguous(block_x * cols + tl.arange(0, cols), 1)
    inside_x = x < high_w
    logits += image * stride_n
    axis_y = axis(low_h, high_h, kind.align_corners)
    if kind.full:
        y_begin = block_y * rows
        y_end = tl.minimum(y_begin + rows, high_h)
    else:
        y_begin = begin(block_y, axis_y, high_h)
        y_end = begin(block_y + 1, axis_y, high_h)
        axis_x = axis(low_w, high_w, kind.align_corners)
        cell = cell_of(x, axis_x)
        weight_x = weight_in(cell, x, axis_x, low_w - 1)
        # Columns outside repeat the last one inside.
        left = tl.minimum(cell, low_w - 1) * stride_x
        right = tl.minimum(cell + 1, low_w - 1) * stride_x
        above = logits + block_y.to(tl.int64) * stride_y
        below = logits + tl.minimum(block_y + 1, low_h - 1).to(tl.int64) * stride_y

    num_valid, num_hard, num_hits = 0, 0, 0
    for y_first in range(y_begin, y_end, rows):
        y = y_first + tl.arange(0, rows)
        inside = (y < y_end)[:, None] & inside_x[None, :]
        # 64-bit to the tile, 32-bit within it: registers are what limits this kernel.
        tile = (image * high_h + y_first) * high_w
        place = tl.arange(0, rows)[:, None] * high_w + x[None, :]
        label = tl.load(target + tile + place, mask=inside, other=0)
        valid = inside & (label != ignore_index)
        known = valid & (label >= 0) & (label < (2 if kind.single else classes))
        label = tl.where(known, label.to(tl.int32), -1)
        # Weights in units of log 2, so that each logit comes out in them.
        weight_y = (weight_in(block_y, y, axis_y, low_h - 1) * LOG2_E)[:, None]
        match = label - 1 if kind.single else label

        best = tl.full([rows, cols], -3.4e38, tl.float32)
        rest = tl.full([rows, cols], 0.0, tl.float32)
        true_z = tl.full([rows, cols], float("nan"), tl.float32)
        sum_z = tl.full([rows, cols], 0.0, tl.float32)
        plane = tl.zeros([], tl.int64)
        for c in range(classes):
            if kind.full:
                at = y.to(tl.int64)[:, None] * stride_y + x.to(tl.int64)[None, :] * stride_x
                z = tl.load(logits + plane + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
            else:
                z00 = tl.load(above + plane + left).to(tl.float32)
                z01 = tl.load(above + plane + right).to(tl.float32)
                z10 = tl.load(below + plane + left).to(tl.float32)
                z11 = tl.load(below + plane + right).to(tl.float32)
                top = between(z00, z01, weight_x)
                drop = between(z10, z11, weight_x) - top
                z = tl.fma(weight_y, drop[None, :], (top * LOG2_E)[None, :])
            plane += stride_c
            hot = match == c
            if kind.sigmoid:
                rest = sigmoid_step(z, hot, rest)
                if kind.smooth:
                    sum_z += tl.where(hot, z, 0.0) - 0.5 * z
                if kind.hits:
                    best = tl.maximum(best, z)
                    true_z = tl.where(hot, z, true_z)
            else:
                best, rest = softmax_step(z, best, rest)
                true_z = tl.where(hot, z, true_z)
                if kind.smooth:
                    sum_z += z

        # A label that is no class has true_z = NaN: its loss is NaN, loudly.
        if kind.sigmoid:
            pixel = tl.where(known, rest, float("nan"))
        else:
            # Easy pixels round to 0 here as they do in the other paths, which then mine alike.
            log_rest = tl.log2(1.0 + rest)
            log_rest = tl.where(best == float("inf"), float("nan"), log_rest)
            pixel = (best - true_z + log_rest) * LN_2
            tl.store(normaliser + tile + place, best + log_rest, mask=inside)
        # Below 0 means ignored, from here on.
        tl.store(loss + tile + place, tl.where(valid, pixel, -1.0), mask=inside)
        kept_label = tl.where(valid, tl.maximum(label, 0), -1)
        tl.store(label_map + tile + place, kept_label.to(label_map.dtype.element_ty), mask=inside)
        if kind.smooth:
            extra = sum_z if kind.sigmoid else true_z - sum_z / classes
            tl.store(
                smooth_loss + tile + place, tl.fma(extra, smoothing * LN_2, pixel), mask=inside
            )
        if kind.hits:
            # A single channel is the highest whatever its value: channel 0.
            num_hits += count(label == 0 if kind.single else true_z >= best)
        if kind.hard:
            num_valid += count(valid)
            num_hard += count(valid & is_hard(pixel, limit))
    if kind.hits:
        tl.store(counts + 2 * tl.num_programs(0) + program, num_hits)
    if kind.hard:
        tl.store(counts + program, num_valid)
        tl.store(counts + tl.num_programs(0) + program, num_hard)
