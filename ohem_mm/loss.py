"""Cross-entropy with online hard example mining (OHEM): the function and the configurable module.

Mining looks at the plain loss of each pixel; what is optimised is that loss times its weights, over
the pixels that are kept. The method is due to Shrivastava et al., "Training Region-based Object
Detectors with Online Hard Example Mining", CVPR 2016, in the thresholded form that segmentation
uses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import check_classes, check_tensors, checked_labels, drop_channel, wide_enough
from .mining import Kept, keep_pixels, world_size, world_sum
from .ops import Shared, Wanted, choose_backend, pixel_cross_entropy, triton
from .presets import preset_rule
from .rule import SETTINGS, OhemRule
from .settings import (
    Reduction,
    changed_settings,
    check_naming,
    check_options,
    load_class_weight,
    setting,
    settle,
    shows_settings,
)

# What other implementations call our settings; used in error messages only.
_FOREIGN = {
    "thres": "thresh",
    "threshold": "thresh",
    "ignore_label": "ignore_index",
    "ignore_lb": "ignore_index",
    "n_min": "min_kept",
    "weight": "class_weight",
    "avg_non_ignore": "avg='valid'",
}


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    rule: OhemRule | None = None,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = 255,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    reduction: Reduction = "mean",
    stats: dict[str, Any] | None = None,
    shared: Shared | None = None,
    **settings: Any,
) -> Tensor:
    """Cross-entropy over the hard pixels.

    Which pixels are kept, and what divides their loss, is the rule of :class:`OhemRule`. The loss
    is computed in float32 (float64 for float64 logits).

    Args:
        logits: Raw scores of any floating dtype, shape (N, C), (N, C, L), (N, C, H, W) or
            (N, C, D, H, W). Spatially smaller than ``target``, they are upsampled first.
        target: Class index of each pixel, any integer dtype, shape (N, ...) or (N, 1, ...).
        weight: Weight of each pixel, broadcastable to ``target``. It scales the loss; it does not
            take part in mining.
        rule: The rule as an object, instead of ``settings``.
        avg_factor: Divisor given by hand; overrides ``avg``.
        ignore_index: Label of pixels that do not count.
        use_sigmoid: Binary cross-entropy: one channel with labels {0, 1}, or C channels against
            the one-hot target, where a pixel's loss is the sum over its channels.
        class_weight: Weight of each class, shape (C,) (shape (2,) for one sigmoid channel).
        label_smoothing: Share of the target mass spread over the classes, in [0, 1), in the loss
            that is optimised. Mining ignores it.
        align_corners: As in ``torch.nn.functional.interpolate``, when upsampling.
        reduction: 'mean', 'sum', or 'none' for the map with 0 at pixels that are not kept.
        stats: A dict to be filled: 'num_valid' and 'hits', the number of valid pixels and of those
            whose class has the highest logit. Where the key 'kept' is there already, also with maps
            of shape (N, ...): 'valid', bool; 'kept', the weight of each pixel in [0, 1]; and
            'mined', its unweighted loss. The Triton path has no such maps; another is used then.
            Nothing is read back to the host.
        shared: What :func:`ohem_mm.joint.joint_losses` computed of the same logits and labels for
            several losses; used where it fits.
        **settings: The rule in keywords: ``thresh``, ``min_kept`` and whatever else
            :class:`OhemRule` has, with its defaults.

    Returns:
        A scalar, or for ``reduction='none'`` a map of shape (N, ...). It is always connected to
        ``logits``: where nothing is kept it is 0 and so are all gradients.

    Raises:
        ValueError: On settings out of range, shapes that do not fit, or, on the CPU, a label that
            is neither a class nor ``ignore_index``.
        TypeError: On logits that are not floating point or labels that are not integers.
    """
    if rule is None:
        rule = OhemRule(**settings)
    elif settings:
        raise TypeError(f"Give either rule or settings, but got both: {', '.join(settings)}.")
    check_options(reduction, label_smoothing, ignore_index)
    if reduction == "sum" and avg_factor is not None:
        raise ValueError("avg_factor divides a mean; it cannot be used with reduction='sum'.")
    check_tensors(logits=logits, target=target, weight=weight, class_weight=class_weight)
    target = checked_labels(logits, target, use_sigmoid)
    num_classes = 2 if use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    target = wide_enough(target, num_classes, ignore_index)
    valid = target != ignore_index
    check_classes(
        target, valid, num_classes, rule.always_keep, class_weight, ignore_index, use_sigmoid
    )
    maps = stats is not None and "kept" in stats
    wanted = Wanted(rule, label_smoothing, class_weight, reduction, maps)
    whole = None if shared is None else shared.whole
    if whole is not None and weight is None and avg_factor is None and whole.is_for(wanted):
        if stats is not None:
            stats.update(hits=whole.hits, num_valid=whole.num_valid)
        return whole.loss
    if weight is not None:
        weight = drop_channel(weight.to(logits.device), target.dim()).expand_as(target)
    if class_weight is not None:
        class_weight = class_weight.to(logits.device)
    constants = (weight, class_weight, avg_factor)
    if (
        (shared is None or whole is not None)
        and reduction != "none"
        and not maps
        and choose_backend(
            logits, use_sigmoid, size=target.shape[1:], constants=constants, rule=rule
        )
        == "triton"
    ):
        # One pass from logits to loss; the maps of `stats` do not exist there.
        loss, hits, num_valid = triton.ohem(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            size=(target.shape[1], target.shape[2]),
            align_corners=align_corners,
            use_sigmoid=use_sigmoid,
            label_smoothing=label_smoothing,
            rule=rule,
            avg_factor=avg_factor,
            class_weight=class_weight,
            reduction=reduction,
            with_hits=stats is not None,
        )
        if stats is not None and hits is not None:
            stats.update(hits=hits, num_valid=num_valid)
        return loss

    if shared is not None and shared.pixels and shared.label_smoothing == label_smoothing:
        (mined, loss), hits = shared.pixels, shared.hits
    else:
        mined, loss, hits = pixel_cross_entropy(
            logits,
            target,
            valid,
            use_sigmoid=use_sigmoid,
            label_smoothing=label_smoothing,
            align_corners=align_corners,
            count_hits=stats is not None,
        )
    scale = None
    if class_weight is not None:
        scale = class_weight.to(loss)[torch.where(valid, target, 0).long()]
    if weight is not None:
        weight = weight.to(loss)
        scale = weight if scale is None else scale * weight
    if scale is not None:
        loss = loss * scale
    mine = loss if rule.habits.mine_optimised else mined
    kept = keep_pixels(mine, target, valid, rule, num_classes)
    loss = kept.of(loss)
    if stats is not None and hits is not None:
        stats.update(hits=hits, num_valid=valid.sum())
        if "kept" in stats:
            stats.update(valid=valid, kept=kept.weights(mined.dtype), mined=mined)

    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if avg_factor is None:
        divisor = _divisor(kept, valid, scale if rule.weighted_mean else None, rule, total)
    else:
        divisor = torch.as_tensor(avg_factor, dtype=total.dtype, device=total.device)
    return total / torch.where(divisor > 0, divisor, 1)


def _divisor(
    kept: Kept, valid: Tensor, scale: Tensor | None, rule: OhemRule, total: Tensor
) -> Tensor:
    """What ``avg`` counts, on all ranks for pool 'world', in the dtype of ``total``, shape ()."""
    if scale is not None:
        counted = kept.of(scale) if rule.avg == "kept" else torch.where(valid, scale, 0)
        divisor = counted.sum()
    elif rule.avg == "kept":
        divisor = kept.total(total.dtype)
    else:
        divisor = (torch.ones_like(valid) if rule.avg == "all" else valid).sum().to(total.dtype)
    divisor = world_sum(divisor + rule.habits.eps * valid.numel(), rule.pool)
    if kept.places is not None and scale is None and rule.avg == "kept":
        divisor = torch.maximum(divisor, kept.places.to(divisor.dtype))
    # Ranks average their gradients afterwards, so each takes its share of the divisor.
    return divisor / world_size(rule.pool)


class OhemCrossEntropyLoss(nn.Module):
    """Cross-entropy with online hard example mining, for decode heads and plain PyTorch.

    Importing ``ohem_mm`` registers it in the root registry of OpenMMLab, so that a config of
    mmseg, mmdet or mmpretrain can say ``loss_decode=dict(type='OhemCrossEntropyLoss')``.

    The settings of :class:`OhemRule` (``thresh``, ``min_kept`` and so on) can be given as keywords,
    or in its order. They are attributes too; all of them together are ``rule``.

    Args:
        *in_order: Settings of the rule, in its order.
        preset: Rule of another implementation, a key of ``ohem_mm.presets.PRESETS``. It replaces
            the defaults; whatever else is given wins.
        ignore_index: Label of pixels that do not count. None: the one that the head passes, else
            255.
        use_sigmoid: See :func:`ohem_cross_entropy`.
        class_weight: Weight of each class, as a sequence, or a file that holds one (.npy, .json,
            .yaml, .pkl).
        label_smoothing: See :func:`ohem_cross_entropy`.
        align_corners: See :func:`ohem_cross_entropy`.
        reduction: See :func:`ohem_cross_entropy`.
        loss_weight: Factor on the result.
        loss_name: Name in the log. mmseg optimises only entries whose name contains 'loss', so it
            must start with ``loss_``.
        **settings: Settings of the rule. What is none of them is refused, with the name that was
            probably meant.

    Raises:
        ValueError: On a setting out of range.
        TypeError: On an unknown keyword or a setting of the wrong type.

    Example:
        >>> loss = OhemCrossEntropyLoss(thresh=0.7, min_kept=1 / 16)
        >>> logits, labels = torch.randn(2, 19, 64, 64), torch.randint(0, 19, (2, 64, 64))
        >>> loss(logits, labels).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    @shows_settings(OhemRule)
    def __init__(
        self,
        *in_order: Any,
        preset: str | None = None,
        ignore_index: int | None = None,
        use_sigmoid: bool = False,
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        reduction: Reduction = "mean",
        loss_weight: float = 1.0,
        loss_name: str = "loss_ohem",
        **settings: Any,
    ) -> None:
        super().__init__()
        base = OhemRule() if preset is None else preset_rule(preset)
        self.rule = settle(base, in_order, settings, type(self), _FOREIGN)
        check_options(reduction, label_smoothing, ignore_index)
        check_naming(loss_name, loss_weight)
        self.preset = preset
        self.ignore_index = ignore_index
        self.use_sigmoid = use_sigmoid
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners
        self.reduction = reduction
        self.loss_weight = loss_weight
        self._loss_name = loss_name
        # Not persistent: a checkpoint holds the same keys with this loss as with any other.
        weights = None if class_weight is None else torch.tensor(load_class_weight(class_weight))
        self.register_buffer("class_weight", weights, persistent=False)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        ignore_index: int | None = None,
        reduction_override: Reduction | None = None,
        align_corners: bool | None = None,
        stats: dict[str, Any] | None = None,
        shared: Shared | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss, called as heads of mmseg and mmdet call theirs.

        Args:
            pred: Logits, shape (N, C, ...).
            target: Labels, shape (N, ...) or (N, 1, ...), any integer dtype.
            weight: Weight of each pixel, broadcastable to ``target``.
            avg_factor: Divisor given by hand.
            ignore_index: Used when the loss was built without one.
            reduction_override: Used instead of the reduction that the loss was built with.
            align_corners: Used instead of the setting that the loss was built with.
            stats: See :func:`ohem_cross_entropy`.
            shared: See :func:`ohem_cross_entropy`.
            **kwargs: Whatever else a head passes; not used.

        Returns:
            A scalar, or for reduction 'none' a map of shape (N, ...).
        """
        if self.ignore_index is not None:
            ignore_index = self.ignore_index
        loss = ohem_cross_entropy(
            pred,
            target,
            weight,
            rule=self.rule,
            avg_factor=avg_factor,
            ignore_index=255 if ignore_index is None else ignore_index,
            use_sigmoid=self.use_sigmoid,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            align_corners=self.align_corners if align_corners is None else align_corners,
            reduction=self.reduction if reduction_override is None else reduction_override,
            stats=stats,
            shared=shared,
        )
        return self.loss_weight * loss

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> OhemCrossEntropyLoss:
        """Build the loss with the rule of another implementation.

        Args:
            name: A key of ``ohem_mm.presets.PRESETS``.
            **overrides: Settings that win over those of the preset.

        Returns:
            The loss, as ``OhemCrossEntropyLoss(preset=name, **overrides)`` builds it.
        """
        return cls(preset=name, **overrides)

    @property
    def loss_name(self) -> str:
        """Name of this loss in the log."""
        return self._loss_name

    def extra_repr(self) -> str:
        """Settings that differ from the defaults, and always thresh and min_kept."""
        return changed_settings(self, ("thresh", "min_kept"))


for _name in SETTINGS:
    setattr(OhemCrossEntropyLoss, _name, setting(_name))
