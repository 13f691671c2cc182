# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The sums of overlap losses, and what their gradient needs of each pixel.

After the forward pass, which leaves the normaliser of each pixel, a second look at the logits sums
probabilities by class; the gradient needs a third, for the mean of its slopes over the classes of a
pixel, before the backward pass collects it. In both a thread owns a cell, whose four corners serve
all of the cell's pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import geometry
from .cells import (
    cells_of,
    corners_of,
    highest,
    labelled,
    pixels,
    positions,
    probability,
    total,
)
from .forward import Maps
from .inner import LOG2_E, Kind, kernel, options, scaled, tl


def sums(
    logits: Tensor,
    maps: Maps,
    weight: Tensor | None,
    sizes: geometry.Sizes,
    kind: Kind,
    plan: geometry.RegionPlan,
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
    slots = plan.programs * plan.tiles
    parts = logits.new_zeros(3, sizes.classes, slots, dtype=torch.float32)
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
            plan.tiles,
            kind=kind,
            tile=plan.tile,
            **options(1, plan.registers),
        )
    # Programs of one image follow each other.
    each = parts.view(3, sizes.classes, sizes.images, slots // max(1, sizes.images))
    return each.sum(3, dtype=torch.float64).transpose(1, 2)


class Mined(NamedTuple):
    """What a cross-entropy beside the sums has for the backward pass.

    Attributes:
        factor: float32, shape (N, H, W): weight of each pixel in its sum, 0 where not kept.
        divisor: float32, shape ().
        grad_loss: Gradient of the loss, shape ().
    """

    factor: Tensor
    divisor: Tensor
    grad_loss: Tensor


def slopes(
    logits: Tensor,
    maps: Maps,
    weight: Tensor | None,
    by_intersection: Tensor,
    by_predicted: Tensor,
    mined: Mined | None,
    sizes: geometry.Sizes,
    kind: Kind,
    plan: geometry.RegionPlan,
) -> tuple[Tensor, Tensor]:
    """What the backward pass adds to the slope of every class of a pixel, and at the true one.

    Args:
        logits: As in the forward pass.
        maps: What it left.
        weight: float32, shape (N, H, W), or None.
        by_intersection: Derivative by the intersections, float32, shape (N, C), contiguous.
        by_predicted: Derivative by the predicted sums, likewise.
        mined: Of the cross-entropy, with ``Kind.pair``.
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
            maps.loss,
            maps.normaliser,
            maps.label,
            maps.loss if weight is None else weight,
            by_intersection,
            by_predicted,
            *(mined or Mined(maps.loss, maps.loss, maps.loss)),
            shift,
            at_true,
            *logits.stride(),
            *sizes[1:],
            plan.down,
            plan.across,
            kind=kind,
            tile=plan.tile,
            **options(1, plan.registers),
        )
    return shift, at_true


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
    tile: tl.constexpr,
):
    # Each tile has a place of its own for each class, so that nothing is added up through memory.
    program = tl.program_id(0)
    image = (program // (across * down)).to(tl.int64)
    vertical, horizontal = cells_of(program, low_h, low_w, high_h, high_w, down, across, kind, tile)
    cell_y, y_begin, y_end, height = vertical
    cell_x, x_begin, x_end, width = horizontal
    logits += image * stride_n
    first = image * high_h * high_w
    column = tl.arange(0, tile.cols) * (tile.lanes if kind.full else 1)
    corners = corners_of(cell_y, cell_x, low_h, low_w, stride_y, stride_x)
    step = tl.num_programs(0) * tiles
    out = parts + program * tiles
    for down_by in range(0, height, tile.rows):
        y, weight_y = positions(
            cell_y, y_begin, down_by + tl.arange(0, tile.rows), low_h, high_h, kind.align_corners
        )
        weight_y *= LOG2_E
        for right_by in range(0, width, tile.cols):
            x_first = x_begin + right_by
            x, weight_x = positions(cell_x, x_first, column, low_w, high_w, kind.align_corners)
            inside = (y < y_end[None, :])[:, None, :] & (x < x_end[None, :])[None, :, :]
            at = y * high_w + x_first[None, :]
            label, norm = labelled(label_map + first, normaliser + first, at, column, inside)
            scale = tl.full([tile.rows, tile.cols, tile.lanes], 1.0, tl.float32)
            if kind.weighted:
                scale = tl.load(pixels(weight + first, at, column), mask=label >= 0, other=0.0)
            # A loss that is not finite comes out, though the probability may be 0.
            pixel = tl.load(pixels(loss + first, at, column), mask=inside, other=0.0)
            true = scale * (tl.exp2(-pixel * LOG2_E) + (pixel - pixel))
            # Most tiles have few labels.
            c = highest(label)
            while c >= 0:
                hot = label == c
                tl.store(out + c * step, total(tl.where(hot, true, 0.0)))
                tl.store(out + (2 * classes + c) * step, total(tl.where(hot, scale, 0.0)))
                label = tl.where(hot, -1, label)
                c = highest(label)

            z_at = y.to(tl.int64)[:, None, :] * stride_y + x.to(tl.int64)[None, :, :] * stride_x
            plane = logits
            at_class = out + classes * step
            for _ in range(classes):
                p = probability(plane, corners, weight_y, weight_x, z_at, inside, norm, kind.full)
                if kind.squared:
                    p *= p
                tl.store(at_class, total(scale * p if kind.weighted else p))
                plane += stride_c
                at_class += step
            out += 1


@kernel(
    *("loss", "normaliser", "label_map", "by_intersection", "by_predicted"),
    *("factor", "divisor", "shift", "at_true"),
)
def _slopes(
    logits,
    loss,
    normaliser,
    label_map,
    weight,
    by_intersection,
    by_predicted,
    factor,
    divisor,
    grad_loss,
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
    tile: tl.constexpr,
):
    program = tl.program_id(0)
    image = (program // (across * down)).to(tl.int64)
    vertical, horizontal = cells_of(program, low_h, low_w, high_h, high_w, down, across, kind, tile)
    cell_y, y_begin, y_end, height = vertical
    cell_x, x_begin, x_end, width = horizontal
    logits += image * stride_n
    by_intersection += image * classes
    by_predicted += image * classes
    first = image * high_h * high_w
    column = tl.arange(0, tile.cols) * (tile.lanes if kind.full else 1)
    corners = corners_of(cell_y, cell_x, low_h, low_w, stride_y, stride_x)
    if kind.pair:
        step = tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    for down_by in range(0, height, tile.rows):
        y, weight_y = positions(
            cell_y, y_begin, down_by + tl.arange(0, tile.rows), low_h, high_h, kind.align_corners
        )
        weight_y *= LOG2_E
        for right_by in range(0, width, tile.cols):
            x_first = x_begin + right_by
            x, weight_x = positions(cell_x, x_first, column, low_w, high_w, kind.align_corners)
            inside = (y < y_end[None, :])[:, None, :] & (x < x_end[None, :])[None, :, :]
            at = y * high_w + x_first[None, :]
            label, norm = labelled(label_map + first, normaliser + first, at, column, inside)
            z_at = y.to(tl.int64)[:, None, :] * stride_y + x.to(tl.int64)[None, :, :] * stride_x
            plane = logits
            by = by_predicted
            mean = tl.full([tile.rows, tile.cols, tile.lanes], 0.0, tl.float32)
            for _ in range(classes):
                p = probability(plane, corners, weight_y, weight_x, z_at, inside, norm, kind.full)
                mean = tl.fma(p * p if kind.squared else p, tl.load(by), mean)
                plane += stride_c
                by += 1
            if kind.squared:
                mean *= 2.0
            # What is ignored gets anything, which is never read.
            pixel = tl.load(pixels(loss + first, at, column), mask=inside, other=0.0)
            true = tl.exp2(-pixel * LOG2_E) * tl.load(by_intersection + tl.maximum(label, 0))
            if kind.weighted:
                scale = tl.load(pixels(weight + first, at, column), mask=inside, other=0.0)
                mean *= scale
                true *= scale
            everywhere = -(mean + true)
            if kind.pair:
                kept = tl.load(pixels(factor + first, at, column), mask=inside, other=0.0)
                kept = scaled(kept, step)
                everywhere += kept
                true -= kept
            tl.store(pixels(shift + first, at, column), everywhere, mask=inside)
            tl.store(pixels(at_true + first, at, column), true, mask=inside)
