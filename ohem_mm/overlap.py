"""From the sums of each class to the overlap loss: pure functions of a few numbers a class.

The pixels are behind: a pool is its sums, so these functions are plain autograd on tensors of shape
(pools, C), and pools add up, over images and over the ranks of a distributed run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .mining import world_size, world_sum
from .ops.region import Overlap, Sums
from .rule import RegionPool, RegionRule


def pool_sums(sums: Sums, pool: RegionPool) -> Sums:
    """The sums of each pool, from those of each image.

    Args:
        sums: Of each image, shapes (N, ...).
        pool: 'image' leaves them, 'batch' adds them up, 'world' adds up those of all ranks. There,
            as gradients are averaged over ranks afterwards, the gradient of a rank's own sums is
            that of the common sums times the number of ranks.

    Returns:
        The sums of each pool.
    """
    if pool == "image":
        return sums
    widths = [part.shape[1] for part in sums]
    own = torch.cat(sums, 1).sum(0, keepdim=True)
    ranks = world_size(pool)
    if ranks > 1:
        everything = world_sum(own.detach().clone(), pool)
        own = everything + ranks * (own - own.detach())
    return Sums(*torch.split(own, widths, 1))


def region_value(
    sums: Sums, class_weight: Tensor | None, rule: RegionRule, overlap: Overlap
) -> Tensor:
    """The loss of pools, given their sums.

    Args:
        sums: Of each pool, shapes (G, ...).
        class_weight: Shape (C,), or None.
        rule: The settings.
        overlap: What the sums are of.

    Returns:
        A scalar. NaN where a sum is; 0 where no class counts.
    """
    habits = rule.habits
    labelled, hard = _labelled(sums, overlap)
    intersection, predicted = sums.intersection, sums.predicted
    weight = torch.ones_like(hard[:1]) if class_weight is None else class_weight.to(hard)[None]
    nonempty = (sums.counts.sum(1, keepdim=True) > 0).expand_as(hard)
    counted = hard > 0 if rule.classes == "present" else nonempty
    if habits.joint:
        share = torch.where(counted, weight, 0)
        intersection, predicted, labelled = (
            (part * share).sum(1, keepdim=True) for part in (intersection, predicted, labelled)
        )
        counted, weight = counted.any(1, keepdim=True), weight.new_ones(1, 1)
    loss = 1 - _score(intersection, predicted, labelled, rule)
    if not habits.gamma_of_mean:
        loss = _power(loss, rule.gamma)
    total = torch.where(counted, weight * loss, 0).sum(1)
    denominator = torch.ones_like(counted) if habits.absent_are_zero else counted
    divisor = (denominator * (weight if rule.weighted_mean else 1)).sum(1).to(total.dtype)
    mean = total / torch.where(divisor > 0, divisor, 1)
    if habits.gamma_of_mean:
        mean = _power(mean, rule.gamma)
    pools = (counted.any(1) & (divisor > 0)).sum().clamp(min=1)
    # Whatever is not finite comes out, though it may lie in a class that does not count.
    check = (sums.intersection.detach().sum() + sums.predicted.detach().sum()) * 0
    return mean.sum() / pools * (1 + check)


def class_overlap(sums: Sums, rule: RegionRule, overlap: Overlap) -> Tensor:
    """Dice, Jaccard or Tversky score of each class, over all pools together.

    Args:
        sums: Of each pool, shapes (G, ...).
        rule: The settings.
        overlap: What the sums are of.

    Returns:
        Shape (C,), NaN for classes that label no pixel.
    """
    whole = Sums(*(part.detach().sum(0, keepdim=True) for part in sums))
    labelled, hard = _labelled(whole, overlap)
    score = _score(whole.intersection, whole.predicted, labelled, rule)
    return torch.where(hard > 0, score, torch.nan).squeeze(0)


def _labelled(sums: Sums, overlap: Overlap) -> tuple[Tensor, Tensor]:
    """The target's sum of each class, smoothing and squares as asked; and that of hard labels."""
    classes = sums.intersection.shape[1]
    hard = sums.counts[:, -classes:]  # of two classes, one channel predicts the second
    valid = sums.counts.sum(1, keepdim=True)
    low, high = overlap.targets(classes)
    if overlap.squared:
        low, high = low**2, high**2
    return low * valid + (high - low) * hard, hard


def _score(intersection: Tensor, predicted: Tensor, labelled: Tensor, rule: RegionRule) -> Tensor:
    """The ratio; 1 where nothing is predicted, nothing labelled and nothing smoothed."""
    if rule.kind == "dice":
        above, below = 2 * intersection, predicted + labelled
    elif rule.kind == "jaccard":
        above, below = intersection, predicted + labelled - intersection
    else:
        above = intersection
        wrong, missed = predicted - intersection, labelled - intersection
        below = intersection + rule.alpha * wrong + rule.beta * missed
    below = below + rule.smooth
    if not rule.habits.smooth_below:
        above = above + rule.smooth
    nothing = below == 0
    return torch.where(nothing, 1, above / torch.where(nothing, 1, below))


def _power(loss: Tensor, gamma: float) -> Tensor:
    """``loss**gamma`` with derivative 0 where the loss is 0."""
    if gamma == 1:
        return loss
    gone = loss <= 0
    return torch.where(gone, 0, torch.where(gone, 1, loss) ** gamma)
