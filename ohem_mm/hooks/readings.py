"""What is measured of a call of a loss that mines, and the values that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..loss import OhemCrossEntropyLoss

# What goes to the text log where several losses mine: all six of each would fill the screen.
BRIEF = ("kept_share", "thresh_effective")
# What is measured of a loss, beside the shares of its classes.
SCALARS = (*BRIEF, "hard_share", "floor_active", "loss_kept", "loss_dropped")
# A reading, shape (8 + 2 C,): these numbers, then the valid and the kept pixels of each class.
VALID, KEPT, HARD, _SUM_KEPT, _SUM_DROPPED, _POOLS, _FLOORS, _LOWEST = range(8)


@torch.no_grad()
def read(
    loss: OhemCrossEntropyLoss, logits: Tensor, target: Tensor, stats: dict[str, Tensor]
) -> Tensor:
    """Reduce the maps of one call of a loss, on their device.

    Args:
        loss: The loss that was called.
        logits: Its logits, shape (N, C, ...).
        target: Its labels, shape (N, ...) or (N, 1, ...), not empty.
        stats: What it filled in: 'valid', 'kept' (weights) and 'mined', each of shape (N, ...).

    Returns:
        The numbers that all values follow from, shape (8 + 2 C,).
    """
    valid, kept, mined = stats["valid"], stats["kept"], stats["mined"]
    classes = 2 if loss.use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    label = torch.where(valid, target.reshape(valid.shape), classes)
    # NaN is mined as the hardest.
    rank = mined.nan_to_num(nan=math.inf, posinf=math.inf)
    rule = loss.rule
    limit = math.inf if rule.thresh is None else -math.log(rule.thresh)
    hard = valid & (rank > limit)
    lifted = (kept > 0) & ~hard  # by the floor
    for place in rule.always_keep:
        lifted &= label != place

    # Counts of pixels need more than the 24 bits of float32, which is all that MPS has.
    dtype = torch.float32 if mined.device.type == "mps" else torch.float64

    def of_each_class(weights: Tensor) -> Tensor:
        # The last bin collects the rest.
        sums = torch.zeros(classes + 1, dtype=dtype, device=label.device)
        return sums.index_add_(0, label.flatten(), weights.flatten().to(dtype))[:classes]

    valid_of_class = of_each_class(valid)
    if rule.pool == "class":
        pools, floors = valid_of_class > 0, of_each_class(lifted) > 0
    elif rule.pool == "image":
        pools, floors = valid.flatten(1).any(1), lifted.flatten(1).any(1)
    else:
        pools, floors = valid.any(), lifted.any()
    numbers = (
        valid.sum(),
        kept.sum(dtype=dtype),
        hard.sum(),
        torch.where(kept > 0, kept * mined, 0).sum(),
        torch.where(valid & (kept < 1), (1 - kept) * mined, 0).sum(),
        pools.sum(),
        floors.sum(),
        torch.where(lifted, rank, math.inf).amin(),
    )
    parts = (torch.stack([n.to(dtype) for n in numbers]), valid_of_class, of_each_class(kept))
    return torch.cat([part.to(dtype) for part in parts])


def combine(numbers: Sequence[Sequence[float]]) -> list[float]:
    """Add up the numbers of several calls of one loss."""
    total = [math.fsum(column) for column in zip(*numbers, strict=True)]
    total[_LOWEST] = min(row[_LOWEST] for row in numbers)
    return total


def num_classes(total: Sequence[float]) -> int:
    """Number of classes that the numbers of a reading are about."""
    return (len(total) - _LOWEST - 1) // 2


def summarize(total: Sequence[float], thresh: float | None) -> dict[str, float]:
    """The values to log, from the numbers of a reading; empty where no pixel is valid."""
    valid, kept, hard, sum_kept, sum_dropped, pools, floors, lowest = total[: _LOWEST + 1]
    if not valid:
        return {}
    values, reached = {"kept_share": kept / valid}, math.exp(-lowest) if floors else 0.0
    if thresh is not None:
        values["hard_share"] = hard / valid
        values["thresh_effective"] = max(reached, thresh)
        values["floor_active"] = floors / pools
    elif floors:
        values["thresh_effective"] = reached
    values["loss_kept"] = sum_kept / kept if kept else 0.0
    values["loss_dropped"] = sum_dropped / (valid - kept) if valid > kept else 0.0
    return values


def class_shares(total: Sequence[float]) -> dict[int, float]:
    """Share of the kept pixels of each class that is present."""
    classes = num_classes(total)
    valid, kept = total[_LOWEST + 1 : _LOWEST + 1 + classes], total[_LOWEST + 1 + classes :]
    return {place: kept[place] / valid[place] for place in range(classes) if valid[place]}
