"""Which pixels are kept: pure functions of the detached per-pixel loss.

A pixel is *hard* when its loss exceeds ``-log(thresh)``. Where fewer than ``k`` pixels of a pool
are hard, the *floor* keeps the k hardest of that pool; pixels tied at the k-th value share the
places that are left. All tensors keep their shapes, so nothing here reads a value back to the host
on an accelerator.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .rule import OhemRule, Pool
from .tracing import can_look, is_traced

# Bits of one radix digit: 2048 bins find a float32 in three passes.
_DIGIT = 11
# Pixels that one step of a pass looks at: bounds the memory of its int64 indices.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24


class Kept(NamedTuple):
    """What is trained on.

    Attributes:
        mask: Bool, shape (N, ...): the pixels with a weight above 0.
        share: Weight of each of them, in (0, 1], in the dtype of the loss; below 1 at pixels that
            are tied at the k-th value. None: all weigh 1. Undefined outside the mask.
        places: How many pixels the floor asks for, ignored ones counted, on all ranks for pool
            'world', int64, shape (). None: ignored pixels take no places.
    """

    mask: Tensor
    share: Tensor | None
    places: Tensor | None = None

    def of(self, values: Tensor) -> Tensor:
        """``values`` times the weights of the pixels; 0 where a pixel is not kept."""
        return torch.where(self.mask, values if self.share is None else values * self.share, 0)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """Weight of each pixel, in [0, 1]."""
        return self.mask.to(dtype) if self.share is None else self.of(self.share.new_ones(()))

    def total(self, dtype: torch.dtype) -> Tensor:
        """Sum of the weights: the number of pixels kept, shape ()."""
        return (self.mask if self.share is None else self.weights(dtype)).sum().to(dtype)


def keep_pixels(
    loss: Tensor, target: Tensor, valid: Tensor, rule: OhemRule, num_classes: int
) -> Kept:
    """Decide which pixels are trained on.

    Args:
        loss: Unweighted per-pixel loss, float32 or float64, non-negative or NaN, shape (N, ...).
            NaN and inf count as the hardest and are always kept where valid.
        target: Class index of each pixel, any integer dtype, shape (N, ...), in [0, num_classes)
            where valid.
        valid: Bool, shape (N, ...); False at ignored pixels, which are never kept.
        rule: What decides.
        num_classes: Number of classes, C.

    Returns:
        The pixels that are kept, with their weights.
    """
    if rule.habits.zero_keeps_all and not rule.min_kept:
        return Kept(valid, None)
    # NaN sorts as the largest; abs() clears the sign of -0.0, whose bits would not be ordered.
    rank = loss.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    hard = valid & rank.isinf()
    if rule.thresh is not None:
        hard = hard | (valid & (rank > -math.log(rule.thresh)))
    sure = hard
    for cls in rule.always_keep:
        sure = sure | (valid & (target == cls))
    if not rule.min_kept:
        return Kept(sure, None)
    reached, share, places = _floor(rank, target, valid, hard, rule, num_classes)
    kept = sure if reached is None else sure | reached
    return Kept(kept, None if share is None else torch.where(sure, 1, share), places)


def world_sum(value: Tensor, pool: Pool) -> Tensor:
    """Sum ``value`` over all ranks, in place, when the pool spans them; else return it as it is."""
    if pool == "world" and world_size(pool) > 1:
        dist.all_reduce(value)
    return value


def world_size(pool: Pool) -> int:
    """Number of ranks that share a pool: 1 unless the pool is 'world' and a group exists."""
    if pool == "world" and dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def share_of(count: Tensor, share: float) -> Tensor:
    """A share of a count of pixels, rounded down, int64.

    Exact on any device, in integers: 0.29 of 100 pixels is 29, where floats would say 28.
    """
    exact = Fraction(share).limit_denominator(10**6)
    return count * exact.numerator // exact.denominator


def _floor(
    rank: Tensor, target: Tensor, valid: Tensor, hard: Tensor, rule: OhemRule, num_classes: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What the floor keeps: pixels at or above the k-th largest of a pool that is short of k.

    Returns:
        The mask of those pixels, or None where no pool is short of k and a look is free; then
        ``share`` and ``places`` as in :class:`Kept`.
    """
    pool, min_kept, habits = rule.pool, rule.min_kept, rule.habits
    # `group` broadcasts against the pixels: which pool a pixel belongs to.
    if pool == "image":
        num_groups = rank.shape[0]
        group = torch.arange(num_groups, device=rank.device).view(-1, *[1] * (rank.dim() - 1))
    elif pool == "class":
        num_groups, group = num_classes, torch.where(valid, target, 0).long()
    else:
        num_groups, group = 1, torch.zeros([1] * rank.dim(), dtype=torch.long, device=rank.device)

    num_valid = num_pixels = world_sum(_count(valid, group, num_groups), pool)
    slots = habits.ignored_take_slots and pool != "class"  # an ignored pixel has no class
    if slots:
        num_pixels = _all_pixels(valid, num_groups, pool)
    if isinstance(min_kept, float):
        if slots and habits.float_share:
            unit = habits.float_share
            k = (num_pixels.double() * (min_kept if unit == 1 else rule.per_cent) / unit).long()
        else:
            k = share_of(num_pixels, min_kept)
        k = k.to(rank.device)
    else:
        images = torch.full([1], rank.shape[0], device=rank.device)
        per_image = rule.min_kept_per == "image" and pool in ("batch", "world")
        k = (world_sum(images, pool) if per_image else torch.ones_like(images)) * min_kept
    places = torch.minimum(k, num_pixels.to(rank.device)).sum() if slots else None
    if habits.one_less:
        k = torch.where(num_valid > k, k - 1, k)
    k = torch.minimum(k, num_valid)
    short = world_sum(_count(hard, group, num_groups), pool) < k
    # On the CPU a look costs nothing: it saves the search, and the map of weights without ties.
    look = can_look(rank)
    if look and not short.any():
        return None, None, places
    kth, left, ties = _kth_largest(rank, valid, group, num_groups, k, pool)
    reached = valid & short[group] & (rank >= kth[group])
    if look and not (short & (left < ties)).any():
        return reached, None, places
    weight = left.to(rank.dtype) / ties.clamp_min(1)
    return reached, torch.where(rank == kth[group], weight[group], 1), places


def _all_pixels(valid: Tensor, num_groups: int, pool: Pool) -> Tensor:
    """Number of pixels in each pool, ignored ones counted, int64, shape (num_groups,).

    It needs no look at the pixels. Unless ranks add theirs it stays on the CPU, where float64 is,
    which some accelerators lack.
    """
    device = valid.device if world_size(pool) > 1 else torch.device("cpu")
    pixels = torch.full((num_groups,), valid.numel() // max(1, num_groups), device=device)
    return world_sum(pixels, pool)


def _count(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Number of True pixels in each group, int64, shape (num_groups,)."""
    if num_groups == 1:
        return mask.sum().reshape(1)
    counts = mask.new_zeros(num_groups, dtype=torch.long)  # as vmap wants it, unlike torch.zeros
    index = group.expand_as(mask).reshape(-1)
    return counts.scatter_add_(0, index, mask.reshape(-1).long())


def _kth_largest(
    values: Tensor, valid: Tensor, group: Tensor, num_groups: int, k: Tensor, pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact k-th largest value of each group, and the ties at it, by radix select.

    Non-negative floats are ordered as their bit patterns are. Each pass histograms one digit of
    the values that share the digits found so far and walks down from the top bin to the k-th. Sums
    of histograms are histograms of unions, so the result is exact over ranks as well, in memory
    that does not depend on the number of pixels.

    Args:
        values: Non-negative float32 or float64, shape (N, ...).
        valid: Bool, shape (N, ...): the pixels that take part.
        group: Index of each pixel's group, broadcastable to (N, ...).
        num_groups: Number of groups, G.
        k: Rank sought in each group, int64, shape (G,), at most the group's valid pixels. Where it
            is 0 the result is undefined.
        pool: 'world' adds the histograms of all ranks.

    Returns:
        Each of shape (G,): the k-th largest values, in the dtype of ``values``; how many of the k
        places are left for pixels of exactly that value; and how many such pixels there are.
    """
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    # Two dimensions, (N, pixels), so that slices of the second walk over all pixels in chunks.
    bits, valid, group = (t.flatten(1) if t.dim() > 1 else t[:, None] for t in (bits, valid, group))
    chunks = [slice(None)]
    if not is_traced(bits):  # a loop would fix the shape there, and compilers fuse its inside
        step = max(1, _CHUNK.get(bits.device.type, _CHUNK_ELSEWHERE) // max(1, bits.shape[0]))
        chunks = [slice(start, start + step) for start in range(0, bits.shape[1], step)]
    prefix = bits.new_zeros(num_groups)
    inside = k[:, None]
    shift = bits.element_size() * 8 - 1  # the sign bit is 0
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        bins = 1 << width
        hist = bits.new_zeros(num_groups * bins, dtype=torch.long)
        for chunk in chunks:
            part = bits[:, chunk] >> shift
            own = group[:, chunk] if group.shape[1] > 1 else group
            alive = valid[:, chunk] & ((part >> width) == prefix[own])
            index = own * bins + (part & (bins - 1))
            hist.scatter_add_(0, index.reshape(-1), alive.reshape(-1).long())
        hist = world_sum(hist, pool).view(num_groups, bins)
        above = hist.flip(1).cumsum(1)  # above[:, i]: pixels in the i + 1 highest bins
        place = (above < k[:, None]).sum(1).clamp_max(bins - 1)
        inside = hist.flip(1).gather(1, place[:, None])
        k = k - (above.gather(1, place[:, None]) - inside).squeeze(1)
        prefix = (prefix << width) | (bins - 1 - place).to(bits.dtype)
    return prefix.view(values.dtype), k, inside.squeeze(1)
