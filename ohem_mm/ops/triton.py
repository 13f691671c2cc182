# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Upsampling, cross-entropy, mining and their gradient on the GPU, without full-size logits.

What is stored for each output pixel is two float32 maps, the loss and the log of the normaliser.
Its C logits are interpolated from the four surrounding low-resolution ones where they are needed,
and again in the backward pass. Nothing is read back to the host, and no result depends on the order
in which programs run: atomics are used on integer histograms alone.

Vocabulary: output pixel (y, x) has its source between low-resolution rows ``i`` and ``i + 1``; all
pixels whose source has the same integer part form a *cell*. Positions are computed in integers, as
``(a * y + b) / d``, so that cells are exact for any scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..mining import keep_pixels
from ..rule import OhemRule
from .portable import banded_cross_entropy

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


# Pixels of a tile that holds one output row or more. A tile is one warp's, so that the sums over
# classes and over rows stay inside a thread.
_TILE = 256
# Cells and classes of a backward tile, one warp each. One cell is the overlap with the neighbour.
_CELLS, _CLASSES = 32, 8
# Rows of cells that a backward program walks down. Longer walks repeat less work (1 + 1 / rows),
# but there must be enough programs to fill the device.
_WALK, _ENOUGH_PROGRAMS = 4, 4096
# Kernels that only read maps: pixels of a block, and about how many programs share the batch.
_BLOCK, _PROGRAMS = 1024, 1024
# The 31 bits of a non-negative float are found 11, 10 and 10 at a time.
_BINS = 2048
# Newer releases of Triton turn it off unless asked.
_OPTIONS = {"enable_fp_fusion": True}
# Releases of Triton before this one do not compile these kernels.
_OLDEST = (3, 4)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available(logits: Tensor) -> bool:
    """Whether :func:`ohem` can take these logits.

    Args:
        logits: Any tensor.

    Returns:
        True for (N, C, h, w) logits in half, bfloat16 or float32 on a GPU that Triton compiles
        for, or on any device when Triton interprets its kernels (``TRITON_INTERPRET=1``).
    """
    if triton is None or logits.dim() != 4 or logits.dtype not in _DTYPES:
        return False
    if not isinstance(_forward, triton.JITFunction):
        return True
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return False
    return logits.is_cuda and torch.cuda.get_device_capability(logits.device) >= (8, 0)


def trial(device: torch.device, dtype: torch.dtype, channels: int, use_sigmoid: bool) -> str | None:
    """Compare the kernels with the portable path on two small batches, one of them upsampled.

    Compilers and drivers differ; a wrong gradient would go unnoticed for long.

    Args:
        device: Where to run.
        dtype: Of the logits: float16, bfloat16 or float32.
        channels: Number of channels of the logits.
        use_sigmoid: Binary cross-entropies.

    Returns:
        What is wrong, to be put behind the name of the path, or None.
    """
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-3)
    rule, size = OhemRule(0.7, 0.25), (16, 20)
    labels = max(2, channels) if use_sigmoid else channels
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(labels, (2, *size), generator=generator)
    target[0, :3] = 255
    target, valid = target.to(device), (target != 255).to(device)
    for low in ((4, 5), size):
        start = 2 * torch.randn(2, channels, *low, generator=generator)
        try:
            with (
                torch.inference_mode(False),
                torch.enable_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                logits = start.to(device, dtype).requires_grad_()
                loss, hits, _ = ohem(
                    logits,
                    target,
                    None,
                    ignore_index=255,
                    size=size,
                    align_corners=False,
                    use_sigmoid=use_sigmoid,
                    label_smoothing=0.0,
                    rule=rule,
                    avg_factor=None,
                    class_weight=None,
                    reduction="mean",
                    with_hits=True,
                )
                (grad,) = torch.autograd.grad(loss, logits)
                mined, pixels, expected_hits = banded_cross_entropy(
                    logits, target, valid, use_sigmoid=use_sigmoid, count_hits=True
                )
                kept = keep_pixels(mined, target, valid, rule, labels)
                expected = kept.of(pixels).sum() / kept.total(pixels.dtype)
                (expected_grad,) = torch.autograd.grad(expected, logits)
            loss, expected = loss.detach(), expected.detach()
            scale = tolerance * float(expected_grad.abs().max())
            if not torch.isclose(loss, expected, rtol=tolerance):
                return f"finds a loss of {float(loss)} instead of {float(expected)}"
            if not torch.allclose(grad, expected_grad, rtol=tolerance, atol=scale):
                return "finds another gradient than portable"
            if hits is None or expected_hits is None or int(hits) != int(expected_hits):
                return "counts other hits than portable"
        except Exception as error:  # whatever the compiler or the driver raises
            return f"fails on {device} ({type(error).__name__}: {str(error).splitlines()[:1]})"
    return None


# --- positions -----------------------------------------------------------------------------------


class _Axis(NamedTuple):
    """Source position (a * i + b) / d of output pixel i along one axis, clamped at 0."""

    a: int
    b: int
    d: int


def _axis(low: int, high: int, align_corners: bool) -> _Axis:
    if not align_corners:
        return _Axis(2 * low, low - high, 2 * high)
    if low == 1 or high == 1:
        return _Axis(1, 0, high)  # everything lies in cell 0, which has no second row
    return _Axis(low - 1, 0, high - 1)


@_jit
def _source(i, axis, last):
    # Cell of output pixel i and the weight of its second row. The last cell has no second row.
    a, b, d = axis
    position = tl.maximum(a * i + b, 0)
    cell = position // d
    weight = (position - cell * d).to(tl.float32) / d
    return cell, tl.where(cell < last, weight, 0.0)


@_jit
def _begin(cell, axis, size):
    # First output pixel of a cell. Cell 0 also has the pixels that lie before its first row.
    a, b, d = axis
    first = (d * cell - b + a - 1) // a
    return tl.where(cell <= 0, 0, tl.minimum(first, size))


# --- forward -------------------------------------------------------------------------------------


@_jit
def _log1p(x):
    # For x >= 0. Accurate for small x, where log(1 + x) would lose the losses of easy pixels.
    t = x / (2.0 + x)
    s = t * t
    series = 2.0 * t * (1.0 + s * (1 / 3 + s * (1 / 5 + s * (1 / 7 + s * (1 / 9)))))
    return tl.where(x < 0.25, series, tl.log(1.0 + x))


@_jit
def _forward(
    logits,
    target,
    loss,
    soft_loss,
    normaliser,
    hits,
    strides,
    classes,
    labels,
    ignore_index,
    smoothing,
    low,
    size,
    axis_y,
    axis_x,
    full: tl.constexpr,
    sigmoid: tl.constexpr,
    smooth: tl.constexpr,
    with_hits: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # A program takes a strip of columns of one row of cells: there the four corners of a column do
    # not change from row to row. `full`: logits are as large as labels; nothing is interpolated.
    stride_n, stride_c, stride_y, stride_x = strides
    low_h, low_w = low
    size_h, size_w = size
    block_x, block_y = tl.program_id(0), tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    # Without the hint, the compiler loads four pixels a thread, and then moves each class's logits
    # between threads through shared memory.
    x = tl.max_contiguous(block_x * cols + tl.arange(0, cols), 1)
    inside_x = x < size_w
    logits += image * stride_n
    if full:
        y_begin = block_y * rows
        y_end = tl.minimum(y_begin + rows, size_h)
    else:
        y_begin = _begin(block_y, axis_y, size_h)
        y_end = _begin(block_y + 1, axis_y, size_h)
        corner, weight_x = _source(x, axis_x, low_w - 1)
        right = tl.minimum(corner + 1, low_w - 1).to(tl.int64) * stride_x
        corner = corner.to(tl.int64) * stride_x
    below = tl.minimum(block_y + 1, low_h - 1).to(tl.int64) * stride_y
    above = block_y.to(tl.int64) * stride_y

    correct = tl.full([rows, cols], 0, tl.int32)
    for y_first in range(y_begin, y_end, rows):
        y = y_first + tl.arange(0, rows)
        inside = (y < y_end)[:, None] & inside_x[None, :]
        # 64-bit to the tile, 32-bit within it: registers are what limits this kernel.
        tile = (image * size_h + y_first) * size_w
        place = tl.arange(0, rows)[:, None] * size_w + x[None, :]
        label = tl.load(target + tile + place, mask=inside, other=0)
        valid = inside & (label != ignore_index)
        known = (label >= 0) & (label < labels)
        label = tl.where(valid & known, label.to(tl.int32), -1)
        _cell_y, weight_y = _source(y, axis_y, low_h - 1)

        # `rest` is the sum of exp(z - best) over all classes but the best one so far.
        best = tl.full([rows, cols], -3.4e38, tl.float32)
        rest = tl.full([rows, cols], 0.0, tl.float32)
        true_z = tl.full([rows, cols], float("nan"), tl.float32)
        sum_z = tl.full([rows, cols], 0.0, tl.float32)
        arg = tl.full([rows, cols], 0, tl.int32)
        plane = logits
        for c in range(classes):
            if full:
                at = y.to(tl.int64)[:, None] * stride_y + x.to(tl.int64)[None, :] * stride_x
                z = tl.load(plane + at, mask=inside, other=0.0).to(tl.float32)
            else:
                z00 = tl.load(plane + above + corner, mask=inside_x, other=0.0).to(tl.float32)
                z01 = tl.load(plane + above + right, mask=inside_x, other=0.0).to(tl.float32)
                z10 = tl.load(plane + below + corner, mask=inside_x, other=0.0).to(tl.float32)
                z11 = tl.load(plane + below + right, mask=inside_x, other=0.0).to(tl.float32)
                top = z00 + weight_x * (z01 - z00)
                bottom = z10 + weight_x * (z11 - z10)
                z = top[None, :] + weight_y[:, None] * (bottom - top)[None, :]
            plane += stride_c
            true_z = tl.where(label == c, z, true_z)
            gain = z - best
            more = gain > 0
            if with_hits or not sigmoid:
                best = tl.where(more, z, best)
            if with_hits:
                arg = tl.where(more, c, arg)
            if sigmoid:
                # One channel: the label is its target. More: one against the rest.
                hot = (label == c) if labels == classes else (label == 1)
                rest += tl.maximum(z, 0.0) - tl.where(hot, z, 0.0) + _log1p(tl.exp(-tl.abs(z)))
                if smooth:
                    sum_z += tl.where(hot, z, 0.0) - 0.5 * z
            else:
                decay = tl.exp(-tl.abs(gain))
                rest = tl.where(more, (rest + 1.0) * decay, rest + decay)
                if smooth:
                    sum_z += z

        if sigmoid:
            pixel = tl.where(label >= 0, rest, float("nan"))
        else:
            log_rest = _log1p(rest)
            log_rest = tl.where(best == float("inf"), float("nan"), log_rest)
            # A label that is no class has true_z = NaN: its loss is NaN, loudly.
            pixel = (best - true_z) + log_rest
            tl.store(normaliser + tile + place, best + log_rest, mask=inside)
        # Below 0 means ignored, from here on.
        tl.store(loss + tile + place, tl.where(valid, pixel, -1.0), mask=inside)
        if smooth:
            extra = sum_z if sigmoid else true_z - sum_z / classes
            tl.store(soft_loss + tile + place, pixel + smoothing * extra, mask=inside)
        if with_hits:
            correct += (valid & (arg == label)).to(tl.int32)
    if with_hits:
        programs = tl.num_programs(0)
        slot = (image * tl.num_programs(1) + block_y) * programs + block_x
        tl.store(hits + slot, tl.sum(tl.sum(correct, 1), 0))


# --- mining --------------------------------------------------------------------------------------


@_jit
def _rank_bits(value):
    # Bits that are ordered as the losses are; NaN ranks with inf. The sign bit is 0.
    value = tl.where(value != value, float("inf"), tl.abs(value))
    return value.to(tl.int32, bitcast=True)


@_jit
def _count_digits(
    loss,
    target,
    digits,
    hard,
    prefix,
    pixels,
    limit,
    groups,
    pool: tl.constexpr,
    step: tl.constexpr,
    bins: tl.constexpr,
    groups_up: tl.constexpr,
    block: tl.constexpr,
):
    # Histogram of digit `step` over the pixels that share the digits found before; in step 0 also
    # the number of hard pixels. A group whose floor is not needed has prefix -1 and takes no part.
    part, image = tl.program_id(0), tl.program_id(1)
    loss += image.to(tl.int64) * pixels
    target += image.to(tl.int64) * pixels
    shift: tl.constexpr = 20 - 10 * step
    mine = image if pool == "image" else 0
    end = pixels
    if step > 0:
        if pool == "class":
            every = tl.arange(0, groups_up)
            found = tl.max(tl.load(prefix + every, mask=every < groups, other=-1), 0)
        else:
            found = tl.load(prefix + mine)
        end = tl.where(found >= 0, pixels, 0)

    counts = tl.full([bins], 0, tl.int32)
    hard_here = tl.full([groups_up], 0, tl.int32)
    hard_mine = tl.full([block], 0, tl.int32)
    for start in range(part * block, end, tl.num_programs(0) * block):
        place = start + tl.arange(0, block)
        value = tl.load(loss + place, mask=place < pixels, other=-1.0)
        alive = ~(value < 0)
        bits = _rank_bits(value)
        group = tl.full([block], 0, tl.int32)
        if pool == "class":
            label = tl.load(target + place, mask=alive, other=0)
            group = tl.where((label >= 0) & (label < groups), label, 0).to(tl.int32)
        if step == 0:
            is_hard = alive & ((value > limit) | (bits == 0x7F800000))
            if pool == "class":
                hard_here += tl.histogram(group, groups_up, mask=is_hard)
            else:
                hard_mine += is_hard.to(tl.int32)
        elif pool == "class":
            alive &= (bits >> (shift + 10)) == tl.load(prefix + group, mask=alive, other=-1)
        else:
            alive &= (bits >> (shift + 10)) == found
        digit = (bits >> shift) & (bins - 1 if step == 0 else 1023)
        if pool == "class":
            tl.atomic_add(digits + group * bins + digit, 1, mask=alive)
        else:
            counts += tl.histogram(digit, bins, mask=alive)

    if pool == "class":
        if step == 0:
            every = tl.arange(0, groups_up)
            tl.atomic_add(hard + every, hard_here, mask=(every < groups) & (hard_here > 0))
    else:
        every = tl.arange(0, bins)
        tl.atomic_add(digits + mine * bins + every, counts, mask=counts > 0)
        if step == 0:
            tl.atomic_add(hard + mine, tl.sum(hard_mine, 0))


@_jit
def _choose_digit(
    digits,
    hard,
    prefix,
    rank,
    floor,
    share_of,
    share_by,
    share: tl.constexpr,
    step: tl.constexpr,
    bins: tl.constexpr,
):
    # One program for each group: the digit of the k-th largest value, and its rank among the
    # values that share it. After the last step `prefix` holds the bits of the k-th largest.
    group = tl.program_id(0)
    every = tl.arange(0, bins)
    counts = tl.load(digits + group * bins + every)
    if step == 0:
        valid = tl.sum(counts, 0)
        k = floor
        if share:
            k = (valid.to(tl.int64) * share_of // share_by).to(tl.int32)
        k = tl.minimum(k, valid)
        found = tl.where(tl.load(hard + group) < k, 0, -1)
    else:
        k = tl.load(rank + group)
        found = tl.load(prefix + group)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= k).to(tl.int32), 0) - 1
    higher = tl.sum(tl.where(every == digit, at_least - counts, 0), 0)
    width: tl.constexpr = 11 if step == 0 else 10
    tl.store(prefix + group, tl.where(found >= 0, (found << width) | digit, -1))
    tl.store(rank + group, k - higher)


@_jit
def _select(
    loss,
    soft_loss,
    target,
    weight,
    class_weight,
    prefix,
    sums,
    pixels,
    limit,
    labels,
    floor: tl.constexpr,
    pool: tl.constexpr,
    always: tl.constexpr,
    num_always: tl.constexpr,
    smooth: tl.constexpr,
    has_weight: tl.constexpr,
    has_class_weight: tl.constexpr,
    weighted: tl.constexpr,
    over_kept: tl.constexpr,
    block: tl.constexpr,
):
    # Decide what is kept, sum it, and replace each loss in place by the factor of its gradient.
    part, image = tl.program_id(0), tl.program_id(1)
    first = image.to(tl.int64) * pixels
    total = tl.full([block], 0.0, tl.float32)
    divisor = tl.full([block], 0.0, tl.float32)
    count = tl.full([block], 0.0, tl.float32)
    for start in range(part * block, pixels, tl.num_programs(0) * block):
        place = start + tl.arange(0, block)
        inside = place < pixels
        place += first
        value = tl.load(loss + place, mask=inside, other=-1.0)
        valid = ~(value < 0)
        bits = _rank_bits(value)
        keep = valid & ((value > limit) | (bits == 0x7F800000))
        label = tl.full([block], 0, tl.int32)
        if (pool == "class" and floor) or has_class_weight or num_always > 0:
            label = tl.load(target + place, mask=valid, other=0)
            # A label that is no class has a NaN loss already; here it must only stay in bounds.
            label = tl.where((label >= 0) & (label < labels), label, 0).to(tl.int32)
        if floor:
            if pool == "class":
                found = tl.load(prefix + label, mask=valid, other=-1)
            else:
                found = tl.load(prefix + (image if pool == "image" else 0))
            keep |= valid & (found >= 0) & (bits >= found)
        for i in tl.static_range(num_always):
            keep |= valid & (label == always[i])

        scale = tl.where(valid, 1.0, 0.0)
        if has_class_weight:
            scale *= tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
        if has_weight:
            scale *= tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
        if smooth:
            value = tl.load(soft_loss + place, mask=valid, other=0.0)
        total += tl.where(keep, value * scale, 0.0)
        counted = keep if over_kept else valid
        divisor += tl.where(counted, scale if weighted else 1.0, 0.0)
        count += valid.to(tl.float32)
        # value - value is 0, or NaN where the loss is not finite, so that scalers see it.
        factor = tl.where(keep, scale, 0.0) + (value - value)
        tl.store(loss + place, tl.where(valid, factor, 0.0), mask=inside)
    programs = tl.num_programs(0) * tl.num_programs(1)
    slot = image * tl.num_programs(0) + part
    tl.store(sums + slot, tl.sum(total, 0))
    tl.store(sums + programs + slot, tl.sum(divisor, 0))
    tl.store(sums + 2 * programs + slot, tl.sum(count, 0))


@_jit
def _finish(
    sums,
    hits,
    avg_factor,
    loss,
    divisor,
    num_hits,
    num_valid,
    programs,
    hit_programs,
    given,
    divide_by: tl.constexpr,
    with_hits: tl.constexpr,
    block: tl.constexpr,
):
    # One program adds what the others left, in a fixed order.
    every = tl.arange(0, block)
    total = tl.full([block], 0.0, tl.float64)
    below = tl.full([block], 0.0, tl.float64)
    count = tl.full([block], 0.0, tl.float64)
    for start in range(0, programs, block):
        at = start + every
        mask = at < programs
        total += tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
        below += tl.load(sums + programs + at, mask=mask, other=0.0).to(tl.float64)
        count += tl.load(sums + 2 * programs + at, mask=mask, other=0.0).to(tl.float64)
    if divide_by == "sum":
        by = tl.sum(below, 0)
    elif divide_by == "tensor":
        by = tl.load(avg_factor).to(tl.float64)
    else:
        by = tl.cast(given, tl.float64)
    by = tl.where(by > 0, by, 1.0)
    tl.store(loss, (tl.sum(total, 0) / by).to(tl.float32))
    tl.store(divisor, by.to(tl.float32))
    tl.store(num_valid, tl.sum(count, 0).to(tl.int64))
    if with_hits:
        correct = tl.full([block], 0, tl.int64)
        for start in range(0, hit_programs, block):
            at = start + every
            correct += tl.load(hits + at, mask=at < hit_programs, other=0).to(tl.int64)
        tl.store(num_hits, tl.sum(correct, 0))


# --- backward ------------------------------------------------------------------------------------


@_jit
def _backward_full(
    logits,
    target,
    factor,
    normaliser,
    divisor,
    grad_loss,
    grad,
    strides,
    grad_strides,
    classes,
    labels,
    sharp,
    even,
    size,
    sigmoid: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
):
    # Logits of the size of the labels: a tile of pixels, all classes. Where the factor is 0, the
    # gradient is 0 whatever was read, even NaN.
    stride_n, stride_c, stride_y, stride_x = strides
    grad_n, grad_c, grad_y, grad_x = grad_strides
    size_h, size_w = size
    x = tl.program_id(0) * cols + tl.arange(0, cols)
    y = tl.program_id(1) * rows + tl.arange(0, rows)
    image = tl.program_id(2).to(tl.int64)
    inside = (y < size_h)[:, None] & (x < size_w)[None, :]
    place = (image * size_h + y[:, None]) * size_w + x[None, :]
    step = tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    k = tl.load(factor + place, mask=inside, other=0.0)
    k = tl.where(k != 0, k * step, 0.0)
    label = tl.load(target + place, mask=inside, other=0).to(tl.int32)
    norm = k
    if not sigmoid:
        norm = tl.load(normaliser + place, mask=inside, other=0.0)
    y, x = y.to(tl.int64)[:, None], x.to(tl.int64)[None, :]
    logits += image * stride_n + y * stride_y + x * stride_x
    grad += image * grad_n + y * grad_y + x * grad_x
    for c in range(classes):
        z = tl.load(logits, mask=inside, other=0.0).to(tl.float32)
        hot = (label == c) if labels == classes else (label == 1)
        p = 1.0 / (1.0 + tl.exp(-z)) if sigmoid else tl.exp(z - norm)
        g = tl.where(k != 0, k * (p - tl.where(hot, sharp + even, even)), 0.0)
        tl.store(grad, g.to(grad.dtype.element_ty), mask=inside)
        logits += stride_c
        grad += grad_c


@_jit
def _from_left(value, shift, first):
    # Each cell's neighbour to the left, along the last axis; nothing for the first cell.
    return tl.where(first, 0.0, tl.gather(value, shift, 1))


@_jit
def _backward(
    logits,
    target,
    factor,
    normaliser,
    divisor,
    grad_loss,
    grad,
    strides,
    grad_strides,
    classes,
    labels,
    sharp,
    even,
    low,
    size,
    axis_y,
    axis_x,
    sigmoid: tl.constexpr,
    walk: tl.constexpr,
    class_tile: tl.constexpr,
    cells: tl.constexpr,
):
    # A thread owns a cell of a few classes and visits the cell's pixels one by one. A low-res pixel
    # collects from the four cells around it: the left ones are the neighbour thread's, the upper
    # ones were done one row earlier and are carried down. Nothing is shared between programs; the
    # first column and row of cells of each is the overlap that is computed twice.
    stride_n, stride_c, stride_y, stride_x = strides
    grad_n, grad_c, grad_y, grad_x = grad_strides
    low_h, low_w = low
    size_h, size_w = size
    block_x = tl.program_id(0)
    image = tl.program_id(2).to(tl.int64)
    class_blocks = tl.cdiv(classes, class_tile)
    first_row = tl.program_id(1) // class_blocks * walk
    first_class = tl.program_id(1) % class_blocks * class_tile
    local = tl.arange(0, class_tile)
    c = first_class + local
    lane = tl.arange(0, cells)
    cell = block_x * (cells - 1) - 1 + lane
    inside = (cell >= 0) & (cell < low_w)
    x_begin = _begin(cell, axis_x, size_w)
    x_end = tl.where(inside, _begin(cell + 1, axis_x, size_w), x_begin)
    width = tl.max(x_end - x_begin, 0)
    # Weight of the right column at the i-th pixel of a cell: _source() without its division.
    x_step, x_start, x_parts = axis_x
    x_offset = x_step * x_begin + x_start - x_parts * cell
    x_scale = tl.where(cell < low_w - 1, 1.0, 0.0) / x_parts

    # 64-bit to the tile, 32-bit within it. Classes and cells outside repeat the last one inside;
    # no pixel is theirs, and nothing is stored for them.
    logits += image * stride_n + first_class.to(tl.int64) * stride_c
    grad += image * grad_n + first_class.to(tl.int64) * grad_c
    plane = tl.minimum(local, classes - 1 - first_class)[:, None] * stride_c
    left = plane + tl.minimum(tl.maximum(cell, 0), low_w - 1)[None, :] * stride_x
    right = plane + tl.minimum(cell + 1, low_w - 1)[None, :] * stride_x
    # The overlap belongs to the program on the left.
    mine = (c < classes)[:, None] & (inside & (lane > 0))[None, :]
    out = local[:, None] * grad_c + cell[None, :] * grad_x
    first = (lane == 0)[None, :] & (c >= 0)[:, None]
    shift = tl.maximum(lane - 1, 0)[None, :] + tl.full([class_tile, cells], 0, tl.int32)

    step = tl.load(grad_loss).to(tl.float32) / tl.load(divisor)
    carry = tl.full([class_tile, cells], 0.0, tl.float32)
    for r in range(walk + 1):
        row = first_row - 1 + r
        above = tl.minimum(tl.maximum(row, 0), low_h - 1).to(tl.int64) * stride_y
        below = tl.minimum(row + 1, low_h - 1).to(tl.int64) * stride_y
        upper_left = carry
        upper_right = tl.full([class_tile, cells], 0.0, tl.float32)
        lower_left = tl.full([class_tile, cells], 0.0, tl.float32)
        lower_right = tl.full([class_tile, cells], 0.0, tl.float32)
        y_end = _begin(row + 1, axis_y, size_h)
        for y in range(_begin(row, axis_y, size_h), y_end):
            _cell_y, weight_y = _source(y, axis_y, low_h - 1)
            # Loaded again for each line: they come from the cache, and registers are scarcer.
            z00 = tl.load(logits + above + left).to(tl.float32)
            z01 = tl.load(logits + above + right).to(tl.float32)
            z10 = tl.load(logits + below + left).to(tl.float32)
            z11 = tl.load(logits + below + right).to(tl.float32)
            z0 = z00 + weight_y * (z10 - z00)
            slope = z01 + weight_y * (z11 - z01) - z0
            line = (image * size_h + y) * size_w
            sum_all = tl.full([class_tile, cells], 0.0, tl.float32)
            sum_right = tl.full([class_tile, cells], 0.0, tl.float32)
            for i in range(width):
                x = x_begin + i
                here = x < x_end
                k = tl.load(factor + line + x, mask=here, other=0.0)
                k = tl.where(k != 0, k * step, 0.0)
                # Most pixels are not kept: skip the classes where none of these is.
                if tl.max((k != 0).to(tl.int32), 0) > 0:
                    weight_x = tl.maximum(x_offset + x_step * i, 0).to(tl.float32) * x_scale
                    label = tl.load(target + line + x, mask=here, other=0).to(tl.int32)
                    norm = k
                    if not sigmoid:
                        norm = tl.load(normaliser + line + x, mask=here, other=0.0)
                    z = z0 + weight_x[None, :] * slope
                    true_class = c if labels == classes else c + 1
                    hot = label[None, :] == true_class[:, None]
                    p = 1.0 / (1.0 + tl.exp(-z)) if sigmoid else tl.exp(z - norm[None, :])
                    g = k[None, :] * (p - tl.where(hot, sharp + even, even))
                    g = tl.where((k != 0)[None, :], g, 0.0)
                    sum_all += g
                    sum_right += weight_x[None, :] * g
            sum_left = sum_all - sum_right
            upper_left += (1.0 - weight_y) * sum_left
            upper_right += (1.0 - weight_y) * sum_right
            lower_left += weight_y * sum_left
            lower_right += weight_y * sum_right
        if (r > 0) & (row < low_h):
            value = upper_left + _from_left(upper_right, shift, first)
            at = grad + row.to(tl.int64) * grad_y + out
            tl.store(at, value.to(grad.dtype.element_ty), mask=mine)
        carry = lower_left + _from_left(lower_right, shift, first)


# --- host ----------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What the kernels need to know besides tensors."""

    size: tuple[int, int]
    align_corners: bool
    ignore_index: int
    use_sigmoid: bool
    label_smoothing: float
    thresh: float | None
    min_kept: int | float
    pool: str
    min_kept_per: str
    always_keep: tuple[int, ...]
    avg: str
    weighted_mean: bool
    reduction: str
    with_hits: bool


def ohem(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    *,
    ignore_index: int,
    size: tuple[int, int],
    align_corners: bool,
    use_sigmoid: bool,
    label_smoothing: float,
    rule: OhemRule,
    avg_factor: Tensor | float | None,
    class_weight: Tensor | None,
    reduction: Literal["mean", "sum"],
    with_hits: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cross-entropy over the hard pixels of logits that are upsampled on the way.

    The rule is that of :func:`ohem_mm.ohem_cross_entropy`, whose settings these are. Arithmetic is
    float32. The host is never waited for, and two runs give the same bits. A label that is neither
    a class nor ``ignore_index`` makes the loss NaN.

    Args:
        logits: float16, bfloat16 or float32, shape (N, C, h, w), any strides.
        target: Any integer dtype, shape (N, H, W).
        scale: Weight of each pixel, floating point, shape (N, H, W), or None.
        ignore_index: Label of pixels that do not count.
        size: (H, W), at least (h, w).
        align_corners: As in ``torch.nn.functional.interpolate``.
        use_sigmoid: Binary cross-entropies, summed over the channels.
        label_smoothing: Share of the target mass spread over the classes.
        rule: Which pixels are kept and what divides their loss; without habits, not for 'world'.
        avg_factor: Divisor given by hand.
        class_weight: Shape (C,), or (2,) for one sigmoid channel, on the device of ``logits``.
        reduction: 'mean' or 'sum'.
        with_hits: Also count the valid pixels whose highest channel is their label.

    Returns:
        The loss, float32, shape (), differentiable once by ``logits``; the number of hits, int64,
        shape (), or None; and the number of valid pixels, int64, shape ().
    """
    settings = _Settings(
        size=(int(size[0]), int(size[1])),
        align_corners=align_corners,
        ignore_index=ignore_index,
        use_sigmoid=use_sigmoid,
        label_smoothing=float(label_smoothing),
        thresh=rule.thresh,
        min_kept=rule.min_kept,
        pool=rule.pool,
        min_kept_per=rule.min_kept_per,
        always_keep=tuple(rule.always_keep),
        avg=rule.avg,
        weighted_mean=rule.weighted_mean,
        reduction=reduction,
        with_hits=with_hits,
    )
    if isinstance(avg_factor, Tensor) and avg_factor.device != logits.device:
        avg_factor = float(avg_factor)  # a number on the host, which costs nothing to read
    loss, hits, valid = _Ohem.apply(logits, target, scale, class_weight, avg_factor, settings)
    return loss, hits if with_hits else None, valid


class _Ohem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        avg_factor: Tensor | float | None,
        settings: _Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        target = target.contiguous()
        with torch.cuda.device_of(logits):
            maps, hits = _run_forward(logits, target, settings)
            loss, divisor, num_hits, num_valid = _mine(
                *maps[:2], target, hits, weight, class_weight, avg_factor, logits.shape[1], settings
            )
        ctx.settings = settings
        ctx.save_for_backward(logits, target, maps[0], maps[2], divisor)
        ctx.mark_non_differentiable(num_hits, num_valid)
        return loss, num_hits, num_valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, factor, normaliser, divisor = ctx.saved_tensors
        with torch.cuda.device_of(logits):
            grad = _run_backward(
                logits, target, factor, normaliser, divisor, grad_loss, ctx.settings
            )
        return grad, None, None, None, None, None


def _run_forward(
    logits: Tensor, target: Tensor, settings: _Settings
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The maps of losses, smoothed losses and normalisers, and the hits of each program."""
    images, classes, low_h, low_w = logits.shape
    height, width = settings.size
    full = (low_h, low_w) == settings.size
    smooth = settings.label_smoothing > 0
    loss = logits.new_empty(target.shape, dtype=torch.float32)
    # Maps that are not needed are never touched; any tensor stands in for them.
    soft_loss = torch.empty_like(loss) if smooth else loss
    normaliser = loss if settings.use_sigmoid else torch.empty_like(loss)
    # As many rows as most cells have, but not one: Triton has miscompiled dimensions of size 1.
    rows = min(8, max(2, 1 << (height // max(1, low_h)).bit_length() - 1))
    cols = _TILE // rows
    grid = (_cdiv(width, cols), _cdiv(height, rows) if full else low_h, images)
    hits = logits.new_empty(math.prod(grid) if settings.with_hits else 1, dtype=torch.int32)
    if loss.numel():
        _forward[grid](
            logits,
            target,
            loss,
            soft_loss,
            normaliser,
            hits,
            logits.stride(),
            classes,
            _num_labels(classes, settings),
            settings.ignore_index,
            settings.label_smoothing,
            (low_h, low_w),
            settings.size,
            _axis(low_h, height, settings.align_corners),
            _axis(low_w, width, settings.align_corners),
            full=full,
            sigmoid=settings.use_sigmoid,
            smooth=smooth,
            with_hits=settings.with_hits,
            rows=rows,
            cols=cols,
            num_warps=1,
            **_OPTIONS,
        )
    return (loss, soft_loss, normaliser), hits


def _mine(
    loss: Tensor,
    soft_loss: Tensor,
    target: Tensor,
    hits: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | float | None,
    classes: int,
    settings: _Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The scalar loss, its divisor, hits and valid pixels; ``loss`` becomes gradient factors."""
    images = len(loss)
    pixels = math.prod(settings.size)
    labels = _num_labels(classes, settings)
    # 0.0 < limit for thresh = 1 is meant: there every loss above 0 is hard.
    limit = math.inf if settings.thresh is None else -math.log(settings.thresh)
    grid = (min(_cdiv(pixels, _BLOCK), max(1, _PROGRAMS // max(1, images))), images)
    prefix = loss
    if settings.min_kept and loss.numel():
        prefix = _find_floor(loss, target, labels, limit, grid, settings)
    sums = loss.new_empty(3, grid[0] * grid[1])
    if loss.numel():
        _select[grid](
            loss,
            soft_loss,
            target,
            loss if weight is None else weight.contiguous(),
            loss if class_weight is None else class_weight.contiguous(),
            prefix,
            sums,
            pixels,
            limit,
            labels,
            floor=bool(settings.min_kept),
            pool=settings.pool,
            always=settings.always_keep,
            num_always=len(settings.always_keep),
            smooth=settings.label_smoothing > 0,
            has_weight=weight is not None,
            has_class_weight=class_weight is not None,
            weighted=settings.weighted_mean,
            over_kept=settings.avg == "kept",
            block=_BLOCK,
            **_OPTIONS,
        )

    result, divisor = loss.new_empty(()), loss.new_empty(())
    num_hits, num_valid = (loss.new_empty((), dtype=torch.int64) for _ in range(2))
    has_scale = weight is not None or class_weight is not None
    divide_by, given = "sum", 1.0
    if settings.reduction == "sum":
        divide_by = "number"
    elif isinstance(avg_factor, Tensor):
        divide_by = "tensor"
    elif avg_factor is not None:
        divide_by, given = "number", float(avg_factor)
    elif settings.avg == "all" and not (settings.weighted_mean and has_scale):
        divide_by, given = "number", float(loss.numel())
    _finish[(1,)](
        sums,
        hits,
        avg_factor if isinstance(avg_factor, Tensor) else loss,
        result,
        divisor,
        num_hits,
        num_valid,
        sums.shape[1],
        hits.numel(),
        given,
        divide_by=divide_by,
        with_hits=settings.with_hits,
        block=_BLOCK,
        **_OPTIONS,
    )
    return result, divisor, num_hits, num_valid


def _find_floor(
    loss: Tensor,
    target: Tensor,
    labels: int,
    limit: float,
    grid: tuple[int, int],
    settings: _Settings,
) -> Tensor:
    """Bits of the k-th largest loss of each group, int32; -1 where enough pixels are hard."""
    groups = {"batch": 1, "image": len(loss), "class": labels}[settings.pool]
    state = torch.zeros(groups * (3 * _BINS + 3), dtype=torch.int32, device=loss.device)
    digits = state[: 3 * groups * _BINS].view(3, -1)
    hard, prefix, rank = state[3 * groups * _BINS :].view(3, groups).unbind()
    share, floor = Fraction(0), 0
    if isinstance(settings.min_kept, float):
        share = Fraction(settings.min_kept).limit_denominator(10**6)
    else:
        per_image = settings.min_kept_per == "image" and settings.pool == "batch"
        floor = min(settings.min_kept * (len(loss) if per_image else 1), loss.numel())
    for step in range(3):
        _count_digits[grid](
            loss,
            target,
            digits[step],
            hard,
            prefix,
            math.prod(settings.size),
            limit,
            groups,
            pool=settings.pool,
            step=step,
            bins=_BINS,
            groups_up=max(2, triton.next_power_of_2(groups)) if settings.pool == "class" else 2,
            block=_BLOCK,
            **_OPTIONS,
        )
        _choose_digit[(groups,)](
            digits[step],
            hard,
            prefix,
            rank,
            floor,
            share.numerator,
            share.denominator,
            share=isinstance(settings.min_kept, float),
            step=step,
            bins=_BINS,
            **_OPTIONS,
        )
    return prefix


def _run_backward(
    logits: Tensor,
    target: Tensor,
    factor: Tensor,
    normaliser: Tensor,
    divisor: Tensor,
    grad_loss: Tensor,
    settings: _Settings,
) -> Tensor:
    images, classes, low_h, low_w = logits.shape
    height, width = settings.size
    s = settings.label_smoothing
    grad = torch.empty_like(logits)
    arguments = (
        logits,
        target,
        factor,
        normaliser,
        divisor,
        grad_loss,
        grad,
        logits.stride(),
        grad.stride(),
        classes,
        _num_labels(classes, settings),
        1 - s,
        s / 2 if settings.use_sigmoid else s / classes,
    )
    if not grad.numel():
        return grad
    if (low_h, low_w) == settings.size:
        grid = (_cdiv(width, _TILE // 2), _cdiv(height, 2), images)
        _backward_full[grid](
            *arguments,
            settings.size,
            sigmoid=settings.use_sigmoid,
            rows=2,
            cols=_TILE // 2,
            num_warps=1,
            **_OPTIONS,
        )
        return grad
    class_tile = min(_CLASSES, max(2, triton.next_power_of_2(classes)))
    blocks = _cdiv(low_w, _CELLS - 1) * _cdiv(classes, class_tile) * images
    walk = _WALK
    while walk > 1 and blocks * _cdiv(low_h, walk) < _ENOUGH_PROGRAMS:
        walk //= 2
    grid = (_cdiv(low_w, _CELLS - 1), _cdiv(low_h, walk) * _cdiv(classes, class_tile), images)
    _backward[grid](
        *arguments,
        (low_h, low_w),
        settings.size,
        _axis(low_h, height, settings.align_corners),
        _axis(low_w, width, settings.align_corners),
        sigmoid=settings.use_sigmoid,
        walk=walk,
        class_tile=class_tile,
        cells=_CELLS,
        num_warps=1,
        **_OPTIONS,
    )
    return grad


def _num_labels(classes: int, settings: _Settings) -> int:
    return 2 if settings.use_sigmoid and classes == 1 else classes


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
