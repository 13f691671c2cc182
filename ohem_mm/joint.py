"""Several losses of the same logits, with one pass over the pixels for what they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .inputs import check_classes, check_tensors, checked_labels, wide_enough
from .loss import OhemCrossEntropyLoss
from .ops import Overlap, Shared, Wanted, shared_pass
from .region import RegionLoss


def joint_losses(
    losses: Sequence[OhemCrossEntropyLoss | RegionLoss],
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int | None = None,
    align_corners: bool | None = None,
    stats: dict[str, Any] | None = None,
) -> list[Tensor]:
    """Call several losses, and let a cross-entropy and an overlap loss share what they can.

    The values and gradients are those of separate calls, up to rounding. Interpolation, softmax and
    the gradient by the logits are computed once for the first of either kind, and for whatever
    other loss asks for the same. On the GPU the first cross-entropy is computed whole, mining
    included. Where the backend has no common pass, the losses are called one by one.

    Args:
        losses: The losses.
        logits: As they take them.
        target: As they take it.
        ignore_index: Used by losses that were built without one.
        align_corners: As the losses take it.
        stats: A dict that each of them fills.

    Returns:
        The value of each loss, in order.
    """
    options = {"ignore_index": ignore_index, "align_corners": align_corners}
    maps = stats is not None and "kept" in stats
    shared, key = _share(losses, logits, target, ignore_index, align_corners, maps)
    return [
        loss(
            logits,
            target,
            stats=stats,
            shared=shared if _key(loss, ignore_index, align_corners) == key else None,
            **options,
        )
        for loss in losses
    ]


def _key(
    loss: OhemCrossEntropyLoss | RegionLoss, ignore_index: int | None, align_corners: bool | None
) -> tuple[int, bool, bool]:
    """What two losses must have in common to share a pass."""
    if loss.ignore_index is not None:
        ignore_index = loss.ignore_index
    return (
        255 if ignore_index is None else ignore_index,
        loss.use_sigmoid,
        loss.align_corners if align_corners is None else align_corners,
    )


def _share(
    losses: Sequence[OhemCrossEntropyLoss | RegionLoss],
    logits: Tensor,
    target: Tensor,
    ignore_index: int | None,
    align_corners: bool | None,
    maps: bool,
) -> tuple[Shared | None, tuple[int, bool, bool] | None]:
    """The common pass of the first loss of either kind, and the key of those that may use it."""
    region = next((loss for loss in losses if isinstance(loss, RegionLoss)), None)
    if region is None:
        return None, None
    key = _key(region, ignore_index, align_corners)
    pixels = next(
        (
            loss
            for loss in losses
            if isinstance(loss, OhemCrossEntropyLoss)
            and _key(loss, ignore_index, align_corners) == key
        ),
        None,
    )
    if pixels is None:
        return None, None
    ignored, use_sigmoid, align = key
    check_tensors(logits=logits, target=target)
    target = checked_labels(logits, target, use_sigmoid)
    num_classes = 2 if use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    target = wide_enough(target, num_classes, ignored)
    valid = target != ignored
    check_classes(target, valid, num_classes, (), None, ignored, use_sigmoid)
    shared = shared_pass(
        logits,
        target,
        valid,
        Overlap(use_sigmoid, region.rule.squared, float(region.label_smoothing)),
        Wanted(pixels.rule, pixels.label_smoothing, pixels.class_weight, pixels.reduction, maps),
        ignore_index=ignored,
        align_corners=align,
        count_hits=True,
    )
    return shared, key
