# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Which pixels are kept, what they sum to, and the factor of each one's gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...rule import OhemRule
from . import floor, geometry
from .floor import BINS, descend, has_floor, limit_of, rank_bits
from .forward import Maps
from .inner import Kind, kernel, options, tl


class Result(NamedTuple):
    """Scalars: loss and its divisor, float32; hits and valid pixels, int64; and a map, ``factor``.

    ``backward.Saved`` says what it is.
    """

    loss: Tensor
    divisor: Tensor
    hits: Tensor
    valid: Tensor
    factor: Tensor


def run(
    maps: Maps,
    state: floor.State,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | float | None,
    sizes: geometry.Sizes,
    kind: Kind,
    rule: OhemRule,
    reduction: str,
    plan: geometry.MiningPlan,
    apart: bool = False,
) -> Result:
    """Mine and sum; ``maps.loss`` becomes gradient factors, ``maps.label`` -1 where not kept.

    With ``apart`` the maps stay as they are, and the factors have a map of their own.
    """
    pixels = sizes.high_h * sizes.high_w
    empty = not maps.loss.numel()
    grid = (plan.parts, sizes.images)
    tiles = {"block": plan.block, **options(4)}
    if has_floor(rule) and not empty:
        floor.find(maps, state, grid, tiles, pixels, rule)
    factor = torch.empty_like(maps.loss) if apart else maps.loss
    sums = maps.loss.new_empty(2, grid[0] * grid[1])
    numbers = maps.counts.new_empty(2, grid[0] * grid[1])
    if not empty:
        _select[grid](
            maps.loss,
            maps.smooth_loss,
            maps.label,
            maps.loss if weight is None else weight.contiguous(),
            maps.loss if class_weight is None else class_weight.contiguous(),
            factor,
            state.digits,
            state.found,
            state.rank,
            state.ties,
            maps.counts,
            sums,
            numbers,
            pixels,
            len(state.hard),
            maps.counts.shape[1],
            limit_of(rule),
            rule=Selection(
                rule.pool if has_floor(rule) else None,
                tuple(rule.always_keep),
                kind.smooth,
                kind.hits,
                weight is not None,
                class_weight is not None,
                rule.weighted_mean,
                rule.avg == "kept",
                apart,
            ),
            bins=BINS,
            **tiles,
        )

    loss = maps.loss
    result = Result(
        loss.new_empty(()),
        loss.new_empty(()),
        loss.new_empty((), dtype=torch.int64),
        loss.new_empty((), dtype=torch.int64),
        factor,
    )
    has_scale = weight is not None or class_weight is not None
    divide_by, given = "sum", 1.0
    if reduction == "sum":
        divide_by = "number"
    elif isinstance(avg_factor, Tensor):
        divide_by = "tensor"
    elif avg_factor is not None:
        divide_by, given = "number", float(avg_factor)
    elif rule.avg == "all" and not (rule.weighted_mean and has_scale):
        divide_by, given = "number", float(loss.numel())
    _finish[(1,)](
        sums,
        numbers,
        avg_factor if isinstance(avg_factor, Tensor) else loss,
        *result[:4],
        sums.shape[1],
        given,
        divide_by=divide_by,
        hits=kind.hits,
        block=plan.block,
        **options(4),
    )
    return result


class Selection(NamedTuple):
    """What :func:`_select` is compiled for.

    Attributes:
        pool: Over what the floor is counted; None without one.
        always: Classes that are always kept.
        smooth: Labels are smoothed.
        hits: Correct pixels were counted.
        weight: There is a weight for each pixel.
        class_weight: There is a weight for each class.
        weighted: The divisor is a sum of weights.
        over_kept: It counts kept pixels, not valid ones.
        apart: Losses and labels stay.
    """

    pool: str | None
    always: tuple[int, ...]
    smooth: bool
    hits: bool
    weight: bool
    class_weight: bool
    weighted: bool
    over_kept: bool
    apart: bool


@kernel(
    *("loss", "smooth_loss", "label_map", "factor_map", "digits", "found", "rank", "ties"),
    *("counts", "sums", "numbers", "pixels"),
)
def _select(
    loss,
    smooth_loss,
    label_map,
    weight,
    class_weight,
    factor_map,
    digits,
    found,
    rank,
    ties,
    counts,
    sums,
    numbers,
    pixels,
    groups,
    counted,
    limit,
    rule: tl.constexpr,
    bins: tl.constexpr,
    block: tl.constexpr,
):
    # Decide what is kept, sum it, and write the factor of each loss's gradient, in place or apart.
    part, image = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    first = image.to(tl.int64) * pixels
    # Kept are the pixels above a value, and a share of each that is tied at it. Where the floor is
    # not needed, that is the limit, at which none is kept.
    kth = tl.cast(limit, tl.float32).to(tl.int32, bitcast=True)
    share = 0.0
    if rule.pool == "batch" or rule.pool == "image":
        at = 2 * groups + (image if rule.pool == "image" else 0)
        found, slots, tied = descend(
            digits + at * bins, tl.load(found + at), tl.load(rank + at), 2, bins
        )
        share = tl.where(found >= 0, slots.to(tl.float32) / tl.maximum(tied, 1), 0.0)
        kth = tl.where(found >= 0, found, kth)

    total = tl.full([block], 0.0, tl.float32)
    divisor = tl.full([block], 0.0, tl.float32)
    num_valid = tl.full([block], 0, tl.int32)
    for start in range(part * block, pixels, parts * block):
        inside = start + tl.arange(0, block) < pixels
        place = first + start + tl.arange(0, block)
        value = tl.load(loss + place, mask=inside, other=-1.0)
        valid = ~(value < 0)
        label = tl.load(label_map + place, mask=inside, other=-1)
        bits = rank_bits(value)
        if rule.pool == "class":
            at = 3 * groups + label
            lowest = tl.load(found + at, mask=valid, other=-1)
            slots = tl.load(rank + at, mask=valid, other=0).to(tl.float32)
            tied = tl.load(ties + label, mask=valid, other=1)
            # Pixels tied at the k-th value share the places that are left of k.
            keep = tl.where(bits == lowest, slots / tl.maximum(tied, 1), 0.0)
            keep = tl.where(bits > tl.where(lowest >= 0, lowest, kth), 1.0, keep)
        else:
            keep = tl.where(bits > kth, 1.0, tl.where(bits == kth, share, 0.0))
        for i in tl.static_range(len(rule.always)):
            keep = tl.where(label == rule.always[i], 1.0, keep)
        kept = valid & (keep > 0)

        factor = keep
        if rule.class_weight or rule.weight:
            scale = tl.full([block], 1.0, tl.float32)
            if rule.class_weight:
                scale = tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
            if rule.weight:
                scale *= tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
            factor *= scale
        if rule.smooth:
            value = tl.load(smooth_loss + place, mask=valid, other=0.0)
        total += tl.where(kept, value * factor, 0.0)
        if rule.over_kept:
            divisor += tl.where(kept, factor if rule.weighted else keep, 0.0)
        elif rule.weighted and (rule.class_weight or rule.weight):
            divisor += tl.where(valid, scale, 0.0)
        else:
            divisor += tl.where(valid, 1.0, 0.0)
        num_valid += valid.to(tl.int32)
        # value - value is 0, or NaN where the loss is not finite, so that scalers see it.
        tl.store(factor_map + place, tl.where(kept, factor + (value - value), 0.0), mask=inside)
        if not rule.apart:
            tl.store(label_map + place, tl.where(kept, label, -1), mask=inside)

    slot = image * parts + part
    programs = parts * tl.num_programs(1)
    tl.store(sums + slot, tl.sum(total, 0))
    tl.store(sums + programs + slot, tl.sum(divisor, 0))
    tl.store(numbers + slot, tl.sum(num_valid, 0))
    if rule.hits:
        # A slice of what the forward pass counted.
        hits = tl.full([block], 0, tl.int32)
        for start in range(slot * block, counted, programs * block):
            mask = start + tl.arange(0, block) < counted
            hits += tl.load(counts + 2 * counted + start + tl.arange(0, block), mask=mask, other=0)
        tl.store(numbers + programs + slot, tl.sum(hits, 0))


@kernel("sums", "numbers", "loss", "divisor", "num_hits", "num_valid")
def _finish(
    sums,
    numbers,
    avg_factor,
    loss,
    divisor,
    num_hits,
    num_valid,
    programs,
    given,
    divide_by: tl.constexpr,
    hits: tl.constexpr,
    block: tl.constexpr,
):
    # One program adds what the others left, in a fixed order.
    total = tl.full([block], 0.0, tl.float64)
    below = tl.full([block], 0.0, tl.float64)
    valid = tl.full([block], 0, tl.int64)
    correct = tl.full([block], 0, tl.int64)
    for start in range(0, programs, block):
        at = start + tl.arange(0, block)
        mask = at < programs
        total += tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
        below += tl.load(sums + programs + at, mask=mask, other=0.0).to(tl.float64)
        valid += tl.load(numbers + at, mask=mask, other=0).to(tl.int64)
        if hits:
            correct += tl.load(numbers + programs + at, mask=mask, other=0).to(tl.int64)
    if divide_by == "sum":
        by = tl.sum(below, 0)
    elif divide_by == "tensor":
        by = tl.load(avg_factor).to(tl.float64)
    else:
        by = tl.cast(given, tl.float64)
    by = tl.where(by > 0, by, 1.0)
    tl.store(loss, (tl.sum(total, 0) / by).to(tl.float32))
    tl.store(divisor, by.to(tl.float32))
    tl.store(num_valid, tl.sum(valid, 0))
    if hits:
        tl.store(num_hits, tl.sum(correct, 0))
