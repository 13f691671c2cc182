"""What is measured of a call of a loss that mines, and the values that follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..loss import OhemCrossEntropyLoss

# What goes to the text log where several losses mine: all six of each would fill the screen.
BRIEF = ("kept_share", "thresh_effective")
# What is measured of a loss, beside the shares of its classes.
SCALARS = (*BRIEF, "hard_share", "floor_active", "loss_kept", "loss_dropped")


class Measured(NamedTuple):
    """What was measured of a loss in one step; the last two are of each class, the rest sums.

    ``lowest`` is the least loss of the pixels that the floor lifted, ``pools`` the number of pools
    with a valid pixel, and ``floors`` that of pools in which the floor lifted any.
    """

    valid: float
    kept: float
    hard: float
    loss_kept: float
    loss_dropped: float
    pools: float
    floors: float
    lowest: float
    valid_of_class: Sequence[float]
    kept_of_class: Sequence[float]

    @classmethod
    def of(cls, calls: Sequence[Sequence[float]]) -> Measured:
        """Add up several calls of the loss, each as :func:`read` returns it."""
        total = [math.fsum(column) for column in zip(*calls, strict=True)]
        total[7] = min(call[7] for call in calls)
        classes = (len(total) - 8) // 2
        return cls._make([*total[:8], total[8 : 8 + classes], total[8 + classes :]])

    def values(self, thresh: float | None) -> dict[str, float]:
        """The values to log, for a loss of this ``thresh``; empty where no pixel is valid."""
        if not self.valid:
            return {}
        dropped = self.valid - self.kept
        values = {"kept_share": self.kept / self.valid}
        reached = math.exp(-self.lowest) if self.floors else 0.0
        if thresh is not None:
            values["hard_share"] = self.hard / self.valid
            values["thresh_effective"] = max(reached, thresh)
            values["floor_active"] = self.floors / self.pools
        elif self.floors:
            values["thresh_effective"] = reached
        values["loss_kept"] = self.loss_kept / self.kept if self.kept else 0.0
        values["loss_dropped"] = self.loss_dropped / dropped if dropped > 0 else 0.0
        return values

    @property
    def class_shares(self) -> dict[int, float]:
        """Share of the kept pixels of each class that is present."""
        pairs = enumerate(zip(self.valid_of_class, self.kept_of_class, strict=True))
        return {place: kept / valid for place, (valid, kept) in pairs if valid}


@torch.no_grad()
def read(
    loss: OhemCrossEntropyLoss, logits: Tensor, target: Tensor, stats: dict[str, Tensor]
) -> Tensor:
    """Reduce the maps that one call of a loss left in ``stats``, on their device.

    The labels must not be empty. Returned are the numbers of :class:`Measured`, shape (8 + 2 C,).
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
