# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Which pixels are kept, what they sum to, and the factor of each one's gradient.

The floor needs the k-th largest loss of each group of pixels: a radix select over the 31 bits of
a non-negative float32, 11, 10 and 10 at a time. Each step histograms one digit of the values that
share the digits found so far; the next kernel walks down from the top bin to the k-th value. Where
enough pixels are hard, the steps return at once. Atomics are used on integer histograms alone, so
no result depends on the order in which programs run.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ...rule import OhemRule
from . import geometry
from .forward import Maps
from .inner import Kind, is_hard, jit, kernel, options, tl, triton

BINS = 2048


class Result(NamedTuple):
    """Scalars: loss and its divisor, float32; hits and valid pixels, int64."""

    loss: Tensor
    divisor: Tensor
    hits: Tensor
    valid: Tensor


class State(NamedTuple):
    """Views of one int32 buffer, which the forward pass fills with zeros.

    Attributes:
        all: The buffer; empty where there is no floor.
        digits: Histograms of (3, groups, bins), flat, as is the rest.
        found: Digits found before each step and after the last, (4, groups); -1 where the floor is
            not needed.
        rank: Which of the values that share them is sought, counted from 1, (4, groups).
        hard: Number of hard pixels of each class, for pool 'class'.
        ties: Number of pixels at the k-th value of each class.
    """

    all: Tensor
    digits: Tensor
    found: Tensor
    rank: Tensor
    hard: Tensor
    ties: Tensor


def make_state(logits: Tensor, labels: int, rule: OhemRule) -> State:
    """Room for the radix select of each group; not initialised."""
    groups = 0
    if rule.min_kept:
        groups = {"batch": 1, "image": len(logits), "class": labels}[rule.pool]
    state = logits.new_empty(groups * (3 * BINS + 10), dtype=torch.int32)
    parts = state.split([groups * size for size in (3 * BINS, 4, 4, 1, 1)])
    return State(state, *parts)


def limit_of(rule: OhemRule) -> float:
    """Loss above which a pixel is hard."""
    # 0.0 < limit for thresh = 1 is meant: there every loss above 0 is hard.
    return math.inf if rule.thresh is None else -math.log(rule.thresh)


def run(
    maps: Maps,
    state: State,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | float | None,
    sizes: geometry.Sizes,
    kind: Kind,
    rule: OhemRule,
    reduction: str,
    plan: geometry.MiningPlan,
) -> Result:
    """Mine and sum; ``maps.loss`` becomes gradient factors, ``maps.label`` -1 where not kept."""
    pixels = sizes.high_h * sizes.high_w
    empty = not maps.loss.numel()
    grid = (plan.parts, sizes.images)
    tiles = {"block": plan.block, "aligned": pixels % 16 == 0, **options(4)}
    if rule.min_kept and not empty:
        _find_floor(maps, state, grid, tiles, pixels, rule)
    sums = maps.loss.new_empty(2, grid[0] * grid[1])
    numbers = maps.counts.new_empty(2, grid[0] * grid[1])
    if not empty:
        _select[grid](
            maps.loss,
            maps.smooth_loss,
            maps.label,
            maps.loss if weight is None else weight.contiguous(),
            maps.loss if class_weight is None else class_weight.contiguous(),
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
                rule.pool if rule.min_kept else None,
                tuple(rule.always_keep),
                kind.smooth,
                kind.hits,
                weight is not None,
                class_weight is not None,
                rule.weighted_mean,
                rule.avg == "kept",
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
        *result,
        sums.shape[1],
        given,
        divide_by=divide_by,
        hits=kind.hits,
        block=plan.block,
        **options(4),
    )
    return result


def _find_floor(maps, state, grid, tiles, pixels, rule):
    groups = len(state.hard)
    share, floor = Fraction(0), 0
    if isinstance(rule.min_kept, float):
        share = Fraction(rule.min_kept).limit_denominator(10**6)
    else:
        per_image = rule.min_kept_per == "image" and rule.pool == "batch"
        floor = min(rule.min_kept * (grid[1] if per_image else 1), maps.loss.numel())
    wanted = (floor, share.numerator, share.denominator)
    by_class = rule.pool == "class"
    if not by_class:
        programs = maps.counts.shape[1]
        _begin_floor[(groups,)](
            maps.counts,
            state.found,
            state.rank,
            programs,
            programs // groups,
            *wanted,
            block=4 * tiles["block"],
            **options(8),
        )
    for step in range(3):
        _count_digits[grid](
            maps.loss,
            maps.label,
            *state[1:5],
            pixels,
            groups,
            limit_of(rule),
            pool=rule.pool,
            step=step,
            bins=BINS,
            groups_up=max(2, triton.next_power_of_2(groups)),
            **tiles,
        )
        if by_class:
            _choose_digit[(groups,)](
                *state[1:],
                groups,
                *wanted,
                step=step,
                bins=BINS,
                **options(4),
            )


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
    """

    pool: str | None
    always: tuple[int, ...]
    smooth: bool
    hits: bool
    weight: bool
    class_weight: bool
    weighted: bool
    over_kept: bool


@jit
def _rank_bits(value):
    # Bits that are ordered as the losses are; NaN ranks with inf. The sign bit is 0.
    value = tl.where(value != value, float("inf"), tl.abs(value))
    return value.to(tl.int32, bitcast=True)


@jit
def _wanted(valid, floor, share_of, share_by):
    # How many of a group's valid pixels the floor keeps. Either number of the floor is 0.
    share = (valid.to(tl.int64) * share_of // share_by).to(tl.int32)
    return tl.minimum(tl.maximum(floor, share), valid)


@jit
def _descend(digits, found, rank, step: tl.constexpr, bins: tl.constexpr):
    # Walk down the histogram of digit `step` from the top bin to the `rank`-th value: the digits
    # found with this one, the rank among the values that share them, and how many these are.
    ties = 0
    if found >= 0:
        every = tl.arange(0, bins)
        counts = tl.load(digits + every)
        at_least = tl.cumsum(counts, 0, reverse=True)
        digit = tl.sum((at_least >= rank).to(tl.int32), 0) - 1
        ties = tl.sum(tl.where(every == digit, counts, 0), 0)
        rank -= tl.sum(tl.where(every == digit, at_least - counts, 0), 0)
        found = (found << (11 if step == 0 else 10)) | digit
    return found, rank, ties


@kernel("counts", "found", "rank")
def _begin_floor(
    counts, found, rank, programs, share_programs, floor, share_of, share_by, block: tl.constexpr
):
    # One program for each group: whether its floor is needed, and the rank that is sought.
    group = tl.program_id(0)
    every = tl.arange(0, block)
    valid = tl.full([block], 0, tl.int32)
    hard = tl.full([block], 0, tl.int32)
    counts += group * share_programs
    for start in range(0, share_programs, block):
        mask = start + every < share_programs
        valid += tl.load(counts + start + every, mask=mask, other=0)
        hard += tl.load(counts + programs + start + every, mask=mask, other=0)
    k = _wanted(tl.sum(valid, 0), floor, share_of, share_by)
    tl.store(found + group, tl.where(tl.sum(hard, 0) < k, 0, -1))
    tl.store(rank + group, k)


@kernel("loss", "label_map", "digits", "found", "rank", "hard")
def _count_digits(
    loss,
    label_map,
    digits,
    found,
    rank,
    hard,
    pixels,
    groups,
    limit,
    pool: tl.constexpr,
    step: tl.constexpr,
    bins: tl.constexpr,
    groups_up: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,
):
    # Histogram of digit `step` over the pixels that share the digits found before. For pool 'class'
    # step 0 also counts the hard pixels, and `_choose_digit` follows; else each program begins with
    # the choice of the digit before, and the first of a group leaves it to later kernels.
    part, image = tl.program_id(0), tl.program_id(1)
    if aligned:
        pixels = tl.multiple_of(pixels, 16)
    loss += image.to(tl.int64) * pixels
    label_map += image.to(tl.int64) * pixels
    shift: tl.constexpr = 20 - 10 * step
    mine = image if pool == "image" else 0
    end = pixels
    if pool != "class":
        prefix = tl.load(found + (step - 1 if step > 0 else 0) * groups + mine)
        if step > 0:
            before = (step - 1) * groups + mine
            prefix, sought, _ties = _descend(
                digits + before * bins, prefix, tl.load(rank + before), step - 1, bins
            )
            first = (part == 0) & (image == mine)
            tl.store(found + before + groups, prefix, mask=first)
            tl.store(rank + before + groups, sought, mask=first)
        end = tl.where(prefix >= 0, pixels, 0)
    elif step > 0:
        every = tl.arange(0, groups_up)
        all_found = tl.load(found + step * groups + every, mask=every < groups, other=-1)
        end = tl.where(tl.max(all_found, 0) >= 0, pixels, 0)
    digits += step * groups * bins

    counts = tl.full([bins], 0, tl.int32)
    num_hard = tl.full([groups_up], 0, tl.int32)
    for start in range(part * block, end, tl.num_programs(0) * block):
        place = start + tl.arange(0, block)
        value = tl.load(loss + place, mask=place < pixels, other=-1.0)
        alive = ~(value < 0)
        bits = _rank_bits(value)
        digit = (bits >> shift) & (bins - 1 if step == 0 else 1023)
        if pool == "class":
            group = tl.load(label_map + place, mask=alive, other=0).to(tl.int32)
            if step == 0:
                num_hard += tl.histogram(group, groups_up, mask=alive & is_hard(value, limit))
            else:
                prefix = tl.load(found + step * groups + group, mask=alive, other=-1)
                alive &= (bits >> (shift + 10)) == prefix
            tl.atomic_add(digits + group * bins + digit, 1, mask=alive, sem="relaxed")
        else:
            if step > 0:
                alive &= (bits >> (shift + 10)) == prefix
            counts += tl.histogram(digit, bins, mask=alive)

    if pool != "class":
        every = tl.arange(0, bins)
        tl.atomic_add(digits + mine * bins + every, counts, mask=counts > 0, sem="relaxed")
    elif step == 0:
        every = tl.arange(0, groups_up)
        mask = (every < groups) & (num_hard > 0)
        tl.atomic_add(hard + every, num_hard, mask=mask, sem="relaxed")


@kernel("digits", "found", "rank", "hard", "ties")
def _choose_digit(
    digits,
    found,
    rank,
    hard,
    ties,
    groups,
    floor,
    share_of,
    share_by,
    step: tl.constexpr,
    bins: tl.constexpr,
):
    # Pool 'class': one program for each class chooses a digit, in step 0 after asking whether the
    # floor is needed.
    group = tl.program_id(0)
    at = step * groups + group
    digits += at * bins
    if step == 0:
        sought = _wanted(tl.sum(tl.load(digits + tl.arange(0, bins)), 0), floor, share_of, share_by)
        prefix = tl.where(tl.load(hard + group) < sought, 0, -1)
    else:
        sought = tl.load(rank + at)
        prefix = tl.load(found + at)
    prefix, sought, tied = _descend(digits, prefix, sought, step, bins)
    tl.store(found + at + groups, prefix)
    tl.store(rank + at + groups, sought)
    if step == 2:
        tl.store(ties + group, tied)


@kernel(
    *("loss", "smooth_loss", "label_map", "digits", "found", "rank", "ties"),
    *("counts", "sums", "numbers"),
)
def _select(
    loss,
    smooth_loss,
    label_map,
    weight,
    class_weight,
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
    aligned: tl.constexpr,
):
    # Decide what is kept, sum it, and replace each loss in place by the factor of its gradient.
    part, image = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    if aligned:
        pixels = tl.multiple_of(pixels, 16)
    first = image.to(tl.int64) * pixels
    if rule.pool == "batch" or rule.pool == "image":
        at = 2 * groups + (image if rule.pool == "image" else 0)
        kth, slots, tied = _descend(
            digits + at * bins, tl.load(found + at), tl.load(rank + at), 2, bins
        )
        share = slots.to(tl.float32) / tl.maximum(tied, 1)

    total = tl.full([block], 0.0, tl.float32)
    divisor = tl.full([block], 0.0, tl.float32)
    num_valid = tl.full([block], 0, tl.int32)
    for start in range(part * block, pixels, parts * block):
        inside = start + tl.arange(0, block) < pixels
        place = first + start + tl.arange(0, block)
        value = tl.load(loss + place, mask=inside, other=-1.0)
        valid = ~(value < 0)
        keep = tl.where(valid & is_hard(value, limit), 1.0, 0.0)
        label = tl.load(label_map + place, mask=inside, other=-1)
        if rule.pool is not None:
            if rule.pool == "class":
                at = 3 * groups + label
                kth = tl.load(found + at, mask=valid, other=-1)
                slots = tl.load(rank + at, mask=valid, other=0)
                tied = tl.load(ties + label, mask=valid, other=1)
                share = slots.to(tl.float32) / tl.maximum(tied, 1)
            bits = _rank_bits(value)
            # Pixels tied at the k-th value share the places that are left of k.
            chosen = tl.where(bits > kth, 1.0, tl.where(bits == kth, share, 0.0))
            keep = tl.where(valid & (kth >= 0), tl.maximum(keep, chosen), keep)
        for i in tl.static_range(len(rule.always)):
            keep = tl.where(valid & (label == rule.always[i]), 1.0, keep)

        scale = tl.where(valid, 1.0, 0.0)
        if rule.class_weight:
            scale *= tl.load(class_weight + label, mask=valid, other=0.0).to(tl.float32)
        if rule.weight:
            scale *= tl.load(weight + place, mask=valid, other=0.0).to(tl.float32)
        if rule.smooth:
            value = tl.load(smooth_loss + place, mask=valid, other=0.0)
        kept = keep > 0
        total += tl.where(kept, value * scale * keep, 0.0)
        if rule.over_kept:
            divisor += tl.where(kept, keep * scale if rule.weighted else keep, 0.0)
        else:
            divisor += scale if rule.weighted else tl.where(valid, 1.0, 0.0)
        num_valid += valid.to(tl.int32)
        # value - value is 0, or NaN where the loss is not finite, so that scalers see it.
        factor = tl.where(kept, keep * scale + (value - value), 0.0)
        tl.store(loss + place, factor, mask=inside)
        label = tl.where(kept, label, -1)
        tl.store(label_map + place, label, mask=inside)

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
