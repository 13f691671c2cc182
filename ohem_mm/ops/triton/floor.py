# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The k-th largest loss of each group of pixels, for the floor of the mining.

A radix select over the 31 bits of a non-negative float32, 11, 10 and 10 at a time. Each step
histograms one digit of the values that share the digits found so far; the next kernel walks down
from the top bin to the k-th value. Where enough pixels are hard, the steps return at once. Atomics
are used on integer histograms alone, so no result depends on the order in which programs run.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rule import OhemRule
from .forward import Maps
from .inner import is_hard, jit, kernel, options, tl, triton

BINS = 2048
_LARGEST = torch.finfo(torch.float32).max


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
    if has_floor(rule):
        groups = {"batch": 1, "image": len(logits), "class": labels}[rule.pool]
    state = logits.new_empty(groups * (3 * BINS + 10), dtype=torch.int32)
    parts = state.split([groups * size for size in (3 * BINS, 4, 4, 1, 1)])
    return State(state, *parts)


def has_floor(rule: OhemRule) -> bool:
    """Whether a k-th largest loss may have to be found."""
    return bool(rule.min_kept) and not rule.keeps_all


def limit_of(rule: OhemRule) -> float:
    """Loss above which a pixel is hard; without a threshold, the largest that is finite."""
    if rule.keeps_all:
        return -1.0
    # 0.0 < limit for thresh = 1 is meant: there every loss above 0 is hard.
    return _LARGEST if rule.thresh is None else max(0.0, -math.log(rule.thresh))


def find(
    maps: Maps,
    state: State,
    grid: tuple[int, int],
    tiles: dict[str, Any],
    pixels: int,
    rule: OhemRule,
) -> None:
    """Search each group; :func:`descend` takes the last step for pools other than 'class'.

    Args:
        maps: Of the forward pass.
        state: Where the search stands.
        grid: Programs that share an image, and images.
        tiles: Block and options of kernels that only read maps.
        pixels: Of an image.
        rule: What is wanted.
    """
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


@jit
def rank_bits(value):
    """Bits that are ordered as the losses are; NaN ranks with inf. The sign bit is 0."""
    return tl.minimum(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800000)


@jit
def _wanted(valid, floor, share_of, share_by):
    # How many of a group's valid pixels the floor keeps. Either number of the floor is 0.
    share = (valid.to(tl.int64) * share_of // share_by).to(tl.int32)
    return tl.minimum(tl.maximum(floor, share), valid)


@jit
def descend(digits, found, rank, step: tl.constexpr, bins: tl.constexpr):
    """Walk down the histogram of digit `step` from the top bin to the `rank`-th value.

    Returns the digits found with this one, the rank among the values that share them, and how many
    these are.
    """
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


@kernel("loss", "label_map", "digits", "found", "rank", "hard", "pixels")
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
):
    # Histogram of digit `step` over the pixels that share the digits found before. For pool 'class'
    # step 0 also counts the hard pixels, and `_choose_digit` follows; else each program begins with
    # the choice of the digit before, and the first of a group leaves it to later kernels.
    part, image = tl.program_id(0), tl.program_id(1)
    loss += image.to(tl.int64) * pixels
    label_map += image.to(tl.int64) * pixels
    shift: tl.constexpr = 20 - 10 * step
    mine = image if pool == "image" else 0
    end = pixels
    if pool != "class":
        prefix = tl.load(found + (step - 1 if step > 0 else 0) * groups + mine)
        if step > 0:
            before = (step - 1) * groups + mine
            prefix, sought, _ties = descend(
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
        bits = rank_bits(value)
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
    prefix, sought, tied = descend(digits, prefix, sought, step, bins)
    tl.store(found + at + groups, prefix)
    tl.store(rank + at + groups, sought)
    if step == 2:
        tl.store(ties + group, tied)
