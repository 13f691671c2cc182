"""The region term: overlap losses, as a function and as the configurable module.

Cross-entropy asks of each pixel how sure it is; an overlap loss asks of each class how well the
region that is predicted covers the region that is labelled, so a rare class counts as much as a
frequent one. See ``docs/region.md``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import check_classes, check_tensors, checked_labels, drop_channel, wide_enough
from .ops import Overlap, Shared, class_sums
from .overlap import class_overlap, pool_sums, region_value
from .presets import region_preset_rule
from .rule import RegionRule
from .settings import (
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
    "eps": "smooth",
    "smooth_nr": "smooth",
    "smooth_dr": "smooth",
    "naive_dice": "squared",
    "squared_pred": "squared",
    "jaccard": "kind='jaccard'",
    "batch": "pool='batch'",
    "batch_dice": "pool='batch'",
    "per_image": "pool='image'",
    "ddp": "pool='world'",
    "do_bg": "class_weight with 0 for the background, and weighted_mean=True",
    "include_background": "class_weight with 0 for the background, and weighted_mean=True",
    "weight": "class_weight",
    "class_weights": "class_weight",
    "active_classes_mode_hard": "classes",
    "ignore_label": "ignore_index",
}


def region_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    rule: RegionRule | None = None,
    ignore_index: int = 255,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    stats: dict[str, Any] | None = None,
    shared: Shared | None = None,
    **settings: Any,
) -> Tensor:
    """Overlap loss: one minus the overlap of prediction and label, averaged over classes.

    Which overlap, over which pool and of which classes, is the rule of :class:`RegionRule`. The
    loss is computed in float32 (float64 for float64 logits), its sums are kept in float64.

    Args:
        logits: Raw scores of any floating dtype, shape (N, C), (N, C, L), (N, C, H, W) or
            (N, C, D, H, W). Spatially smaller than ``target``, they are upsampled first.
        target: Class index of each pixel, any integer dtype, shape (N, ...) or (N, 1, ...).
        weight: Weight of each pixel in all sums, not negative, broadcastable to ``target``. Nothing
            is differentiated by it.
        rule: The rule as an object, instead of ``settings``.
        ignore_index: Label of pixels that do not count.
        use_sigmoid: Probabilities by sigmoid: of one channel with labels {0, 1}, where the class
            that counts is 1, or of C channels, each against the rest.
        class_weight: Weight of each class, shape (C,) (shape (2,) for one sigmoid channel, whose
            first has no effect).
        label_smoothing: Share of the target mass spread over the classes, in [0, 1). I is then the
            sum of min(p, t) (of p t with ``squared``), so that the loss is 0 where p = t; Wang et
            al., "Jaccard Metric Losses", NeurIPS 2023, arXiv 2302.05666, where it is written
            (|p| + |t| - |p - t|) / 2.
        align_corners: As in ``torch.nn.functional.interpolate``, when upsampling.
        stats: A dict to be filled: 'num_valid' and 'hits', the number of valid pixels whose class
            has the highest logit; 'overlap', shape (C,), the score of each class over all pools
            together, NaN where no pixel is labelled so. Nothing is read back to the host.
        shared: What :func:`ohem_mm.joint.joint_losses` computed of the same logits and labels for
            several losses; used where it fits.
        **settings: The rule in keywords: ``kind``, ``pool`` and whatever else :class:`RegionRule`
            has, with its defaults.

    Returns:
        A scalar, always connected to ``logits``: where no class counts it is 0 and so are all
        gradients. A valid pixel whose cross-entropy is not finite makes it NaN.

    Raises:
        ValueError: On settings out of range, shapes that do not fit, or, on the CPU, a label that
            is neither a class nor ``ignore_index``.
        TypeError: On logits that are not floating point or labels that are not integers.
    """
    if rule is None:
        rule = RegionRule(**settings)
    elif settings:
        raise TypeError(f"Give either rule or settings, but got both: {', '.join(settings)}.")
    check_options("mean", label_smoothing, ignore_index)
    check_tensors(logits=logits, target=target, weight=weight, class_weight=class_weight)
    target = checked_labels(logits, target, use_sigmoid)
    num_classes = 2 if use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    target = wide_enough(target, num_classes, ignore_index)
    valid = target != ignore_index
    check_classes(target, valid, num_classes, (), class_weight, ignore_index, use_sigmoid)
    if weight is not None:
        weight = drop_channel(weight, target.dim()).expand_as(target)

    overlap = Overlap(use_sigmoid, rule.squared, float(label_smoothing))
    if shared is not None and weight is None and shared.overlap == overlap:
        sums, hits = shared.sums, shared.hits
    else:
        sums, hits = class_sums(
            logits,
            target,
            valid,
            weight,
            overlap,
            ignore_index=ignore_index,
            align_corners=align_corners,
            count_hits=stats is not None,
        )
    sums = pool_sums(sums, rule.pool)
    channels = logits.shape[1]
    loss = region_value(
        sums, None if class_weight is None else class_weight[-channels:], rule, overlap
    )
    if stats is not None:
        stats.update(hits=hits, num_valid=valid.sum(), overlap=class_overlap(sums, rule, overlap))
    return loss.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)


class RegionLoss(nn.Module):
    """Overlap loss (Dice, Jaccard, Tversky), for decode heads and plain PyTorch.

    It is meant beside a cross-entropy, in one list: ``loss_decode=[dict(type=
    'OhemCrossEntropyLoss'), dict(type='RegionLoss')]``. Importing ``ohem_mm`` registers it in the
    root registry of OpenMMLab.

    The settings of :class:`RegionRule` (``kind``, ``pool`` and so on) can be given as keywords, or
    in its order. They are attributes too; all of them together are ``rule``.

    Args:
        *in_order: Settings of the rule, in its order.
        preset: Rule of another implementation, a key of ``ohem_mm.presets.REGION_PRESETS``. It
            replaces the defaults; whatever else is given wins.
        ignore_index: Label of pixels that do not count. None: the one that the head passes, else
            255.
        use_sigmoid: See :func:`region_loss`.
        class_weight: Weight of each class, as a sequence, or a file that holds one (.npy, .json,
            .yaml, .pkl).
        label_smoothing: See :func:`region_loss`.
        align_corners: See :func:`region_loss`.
        loss_weight: Factor on the result.
        loss_name: Name in the log. mmseg optimises only entries whose name contains 'loss', so it
            must start with ``loss_``.
        **settings: Settings of the rule. What is none of them is refused, with the name that was
            probably meant.

    Raises:
        ValueError: On a setting out of range.
        TypeError: On an unknown keyword or a setting of the wrong type.

    Example:
        >>> loss = RegionLoss(kind="jaccard")
        >>> logits, labels = torch.randn(2, 19, 64, 64), torch.randint(0, 19, (2, 64, 64))
        >>> loss(logits, labels).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    @shows_settings(RegionRule)
    def __init__(
        self,
        *in_order: Any,
        preset: str | None = None,
        ignore_index: int | None = None,
        use_sigmoid: bool = False,
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        loss_weight: float = 1.0,
        loss_name: str = "loss_region",
        **settings: Any,
    ) -> None:
        super().__init__()
        base = RegionRule() if preset is None else region_preset_rule(preset)
        self.rule = settle(base, in_order, settings, type(self), _FOREIGN)
        check_options("mean", label_smoothing, ignore_index)
        check_naming(loss_name, loss_weight)
        self.preset = preset
        self.ignore_index = ignore_index
        self.use_sigmoid = use_sigmoid
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners
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
        reduction_override: str | None = None,
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
            avg_factor: Not used: an overlap is a ratio, which has its divisor.
            ignore_index: Used when the loss was built without one.
            reduction_override: None or 'mean'; an overlap has no value for each pixel.
            align_corners: Used instead of the setting that the loss was built with.
            stats: See :func:`region_loss`.
            shared: See :func:`region_loss`.
            **kwargs: Whatever else a head passes; not used.

        Returns:
            A scalar.

        Raises:
            ValueError: ``reduction_override`` asks for a map or a sum.
        """
        if reduction_override not in (None, "mean"):
            raise ValueError(
                "RegionLoss has one value for all pixels: reduction_override must be None or "
                f"'mean', but got {reduction_override!r}."
            )
        if self.ignore_index is not None:
            ignore_index = self.ignore_index
        loss = region_loss(
            pred,
            target,
            weight,
            rule=self.rule,
            ignore_index=255 if ignore_index is None else ignore_index,
            use_sigmoid=self.use_sigmoid,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            align_corners=self.align_corners if align_corners is None else align_corners,
            stats=stats,
            shared=shared,
        )
        return self.loss_weight * loss

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> RegionLoss:
        """Build the loss with the rule of another implementation.

        Args:
            name: A key of ``ohem_mm.presets.REGION_PRESETS``.
            **overrides: Settings that win over those of the preset.

        Returns:
            The loss, as ``RegionLoss(preset=name, **overrides)`` builds it.
        """
        return cls(preset=name, **overrides)

    @property
    def loss_name(self) -> str:
        """Name of this loss in the log."""
        return self._loss_name

    def extra_repr(self) -> str:
        """Settings that differ from the defaults, and always kind."""
        return changed_settings(self, ("kind",))


for _field in fields(RegionRule):
    setattr(RegionLoss, _field.name, setting(_field.name))
