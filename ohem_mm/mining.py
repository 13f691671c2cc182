"""Which pixels are kept: pure functions of the detached per-pixel loss.

A pixel is *hard* when its loss exceeds ``-log(thresh)``. Where fewer than ``k`` pixels of a pool
are hard, the *floor* keeps every pixel whose loss is at least the k-th largest of that pool. All
tensors keep their shapes, so nothing here reads a value back to the host on an accelerator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Pool = Literal["batch", "image", "class", "world"]

# Bits of one radix digit: 2048 bins find a float32 in three passes.
_DIGIT = 11
# Pixels that one step of a pass looks at: bounds the memory of its int64 indices.
_CHUNK = {"cpu": 2**18}
_CHUNK_ELSEWHERE = 2**24


class Habits(NamedTuple):
    """Ways of other implementations that a preset keeps; see ``ohem_mm.presets``.

    Attributes:
        one_less: The floor keeps k - 1 pixels where the pool has more than k.
        zero_keeps_all: ``min_kept=0`` turns mining off and keeps every valid pixel.
        ignored_take_slots: Ignored pixels count in a share and in the divisor.
        mine_weighted: Mining looks at the loss after weighting.
        eps: The divisor grows by ``eps`` times the number of all pixels.
    """

    one_less: bool = False
    zero_keeps_all: bool = False
    ignored_take_slots: bool = False
    mine_weighted: bool = False
    eps: float = 0.0


OURS = Habits()


def keep_mask(
    loss: Tensor,
    target: Tensor,
    valid: Tensor,
    num_classes: int,
    *,
    thresh: float | None,
    min_kept: int | float,
    pool: Pool = "batch",
    min_kept_per: Literal["batch", "image"] = "batch",
    always_keep: Sequence[int] = (),
    habits: Habits = OURS,
) -> Tensor:
    """Decide which pixels are trained on.

    Args:
        loss: Unweighted per-pixel loss, float32 or float64, non-negative or NaN, shape (N, ...).
            NaN and inf count as the hardest and are always kept where valid.
        target: Class index of each pixel, any integer dtype, shape (N, ...), in [0, num_classes)
            where valid.
        valid: Bool, shape (N, ...); False at ignored pixels, which are never kept.
        num_classes: Number of classes, C.
        thresh: Probability below which a pixel is hard, in (0, 1]. None: no threshold, pure top-k.
        min_kept: Floor k. An int counts pixels, a float is a share of the pool's valid pixels,
            rounded down.
        pool: Over what the floor is counted: 'batch', each 'image', each ground-truth 'class', or
            'world' (the batches of all ranks of the default process group together).
        min_kept_per: 'image' multiplies an int ``min_kept`` by N; for pools 'batch' and 'world'.
        always_keep: Classes whose valid pixels are always kept.
        habits: Deviations from this rule that a preset asks for.

    Returns:
        Bool mask of kept pixels, shape (N, ...).
    """
    if habits.zero_keeps_all and not min_kept:
        return valid
    # NaN sorts as the largest; abs() clears the sign of -0.0, whose bits would not be ordered.
    rank = loss.detach().abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
    keep = valid & rank.isinf()
    if thresh is not None:
        keep = keep | (valid & (rank > -math.log(thresh)))
    if min_kept:
        keep = keep | _below_floor(
            rank, target, valid, keep, num_classes, min_kept, pool, min_kept_per, habits
        )
    for cls in always_keep:
        keep = keep | (valid & (target == cls))
    return keep


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


def _below_floor(
    rank: Tensor,
    target: Tensor,
    valid: Tensor,
    hard: Tensor,
    num_classes: int,
    min_kept: int | float,
    pool: Pool,
    min_kept_per: str,
    habits: Habits,
) -> Tensor:
    """Pixels that the floor keeps: those at or above the k-th largest of a pool short of k."""
    # `group` broadcasts against the pixels: which pool a pixel belongs to.
    if pool == "image":
        num_groups = len(rank)
        group = torch.arange(num_groups, device=rank.device).view(-1, *[1] * (rank.dim() - 1))
    elif pool == "class":
        num_groups, group = num_classes, torch.where(valid, target, 0).long()
    else:
        num_groups, group = 1, torch.zeros([1] * rank.dim(), dtype=torch.long, device=rank.device)

    num_valid = world_sum(_count(valid, group, num_groups), pool)
    if isinstance(min_kept, float):
        base = num_valid
        if habits.ignored_take_slots:
            base = world_sum(_count(torch.ones_like(valid), group, num_groups), pool)
        k = share_of(base, min_kept)
    else:
        images = torch.tensor([len(rank)], device=rank.device)
        per_image = min_kept_per == "image" and pool in ("batch", "world")
        k = (world_sum(images, pool) if per_image else torch.ones_like(images)) * min_kept
    if habits.one_less:
        k = torch.where(num_valid > k, k - 1, k)
    k = torch.minimum(k, num_valid)
    short = world_sum(_count(hard, group, num_groups), pool) < k
    if rank.device.type == "cpu" and not torch.compiler.is_compiling() and not short.any():
        return torch.zeros_like(valid)  # on the CPU a look costs nothing and saves the search
    kth = _kth_largest(rank, valid, group, num_groups, k, pool)
    return valid & short[group] & (rank >= kth[group])


def _count(mask: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Number of True pixels in each group, int64, shape (num_groups,)."""
    if num_groups == 1:
        return mask.sum().reshape(1)
    counts = torch.zeros(num_groups, dtype=torch.long, device=mask.device)
    index = group.expand_as(mask).reshape(-1)
    return counts.scatter_add_(0, index, mask.reshape(-1).long())


def _kth_largest(
    values: Tensor, valid: Tensor, group: Tensor, num_groups: int, k: Tensor, pool: Pool
) -> Tensor:
    """Exact k-th largest value of each group, by radix select.

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
        The k-th largest values, shape (G,), in the dtype of ``values``.
    """
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)
    # Two dimensions, (N, pixels), so that slices of the second walk over all pixels in chunks.
    bits, valid, group = (t.flatten(1) if t.dim() > 1 else t[:, None] for t in (bits, valid, group))
    step = max(1, _CHUNK.get(bits.device.type, _CHUNK_ELSEWHERE) // max(1, len(bits)))
    prefix = torch.zeros(num_groups, dtype=bits.dtype, device=bits.device)
    shift = bits.element_size() * 8 - 1  # the sign bit is 0
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        bins = 1 << width
        hist = torch.zeros(num_groups * bins, dtype=torch.long, device=bits.device)
        for start in range(0, bits.shape[1], step):
            part = bits[:, start : start + step] >> shift
            own = group[:, start : start + step] if group.shape[1] > 1 else group
            alive = valid[:, start : start + step] & ((part >> width) == prefix[own])
            index = own * bins + (part & (bins - 1))
            hist.scatter_add_(0, index.reshape(-1), alive.reshape(-1).long())
        hist = world_sum(hist, pool).view(num_groups, bins)
        above = hist.flip(1).cumsum(1)  # above[:, i]: pixels in the i + 1 highest bins
        place = (above < k[:, None]).sum(1).clamp_max(bins - 1)
        inside = hist.flip(1).gather(1, place[:, None])
        k = k - (above.gather(1, place[:, None]) - inside).squeeze(1)
        prefix = (prefix << width) | (bins - 1 - place).to(bits.dtype)
    return prefix.view(values.dtype)
