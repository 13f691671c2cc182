"""Let decode heads hand their small logits to the loss, which upsamples them itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..joint import joint_losses
from ..loss import OhemCrossEntropyLoss
from ..region import RegionLoss
from ._losses import losses_of, unwrap

__all__ = ["FusedOhemHook"]

Losses = dict[str, Tensor]
_OURS = (OhemCrossEntropyLoss, RegionLoss)


@HOOKS.register_module()
class FusedOhemHook(Hook):  # type: ignore[misc]
    """Train decode heads without their upsampled logits.

    A decode head of mmseg upsamples its logits to the size of the labels, computes the loss from
    them and then the accuracy ``acc_seg``. Where :class:`ohem_mm.OhemCrossEntropyLoss` and
    :class:`ohem_mm.RegionLoss` are the only losses that look at those logits, this hook gives them
    the small ones instead, and the two share what they can. Losses and ``acc_seg`` are the same up
    to rounding; memory and time for the large tensor are saved. A plain cross-entropy that does not
    need the large tensor is ``OhemCrossEntropyLoss`` with ``thresh=None, min_kept=1.0``.

    It replaces ``loss_by_feat`` of single heads for the time of the training, so checkpoints and
    classes are as they were. The log says at the start, head by head, what was done and why.
    """

    priority = "VERY_LOW"

    def __init__(self) -> None:
        self._fused: list[nn.Module] = []

    def before_train(self, runner: Any) -> None:
        """Switch all heads that can be switched."""
        for name, done in fuse_heads(unwrap(runner.model), self._fused):
            runner.logger.info(f"FusedOhemHook: {name}: {done}")

    def after_train(self, runner: Any) -> None:
        """Give the heads back as they were."""
        while self._fused:
            del self._fused.pop().loss_by_feat


def fuse_heads(model: nn.Module, fused: list[nn.Module]) -> list[tuple[str, str]]:
    """Replace ``loss_by_feat`` of every head that allows it; ``del head.loss_by_feat`` restores it.

    The heads are appended to ``fused``. Returned is the name of every decode head, and what was
    done with it and why.
    """
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    report = []
    for name, head in model.named_modules():
        if not isinstance(head, BaseDecodeHead) or "loss_by_feat" in vars(head):
            continue
        function, reason = _fused_function(head)
        if function is not None:
            head.loss_by_feat = MethodType(function, head)
            fused.append(head)
        done = f"left alone: {reason}" if function is None else f"fused{reason}"
        report.append((f"{name} ({type(head).__name__})", done))
    return report


def _fused_function(head: Any) -> tuple[Callable[..., Losses] | None, str]:
    """The replacement for a head's ``loss_by_feat``, or None and the reason."""
    from mmseg.models.decode_heads import DDRHead, PIDHead
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if not hasattr(head, "loss_decode"):
        return None, "it has no loss of its own"
    losses = losses_of(head)
    method = type(head).loss_by_feat
    if method is PIDHead.loss_by_feat:
        if not all(_fits(losses[place], head) for place in (1, 3)):
            return None, f"its losses 1 and 3 are not both {OhemCrossEntropyLoss.__name__}"
        return _pid_loss, "" if _fits(losses[0], head) else ", but for its loss 0"
    if method not in (DDRHead.loss_by_feat, BaseDecodeHead.loss_by_feat):
        return None, f"{type(head).__name__} computes its loss in a way of its own"
    strangers = [type(loss).__name__ for loss in losses if not isinstance(loss, _OURS)]
    if strangers:
        reason = f"{', '.join(strangers)} needs the upsampled logits"
        if "CrossEntropyLoss" in strangers and any(_fits(loss, head) for loss in losses):
            reason += "; OhemCrossEntropyLoss with thresh=None, min_kept=1.0 does not"
        return None, reason
    if others := ", ".join(str(loss.ignore_index) for loss in losses if not _fits(loss, head)):
        reason = f"acc_seg leaves out the head's ignore_index, {head.ignore_index}, and the loss "
        return None, f"{reason}its own, {others}"
    if method is DDRHead.loss_by_feat:
        return _ddr_loss, ""
    if head.sampler is not None:
        return None, f"{type(head.sampler).__name__} needs the upsampled logits"
    return _plain_loss, ""


def _fits(loss: nn.Module, head: Any) -> bool:
    """Whether a loss upsamples by itself and counts the pixels that ``acc_seg`` counts."""
    return isinstance(loss, _OURS) and loss.ignore_index in (None, head.ignore_index)


def _accuracy(stats: dict[str, Tensor]) -> Tensor:
    """``acc_seg`` in percent, shape (1,), as mmseg computes it, epsilon and all."""
    eps = torch.finfo(torch.float32).eps
    return ((stats["hits"] + eps) * (100.0 / (stats["num_valid"] + eps))).float().reshape(1)


def _stack(head: Any, batch_data_samples: Any) -> Tensor:
    """The labels of a batch, (N, 1, H, W), in half the memory of what mmseg stacks."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    if type(head)._stack_batch_gt is not BaseDecodeHead._stack_batch_gt:
        labels: Tensor = head._stack_batch_gt(batch_data_samples)
        return labels
    return torch.stack([sample.gt_sem_seg.data.int() for sample in batch_data_samples])


def _plain_loss(head: Any, seg_logits: Tensor, batch_data_samples: Any) -> Losses:
    """BaseDecodeHead.loss_by_feat without the upsampled logits."""
    label = _stack(head, batch_data_samples)
    if any(a > b for a, b in zip(seg_logits.shape[2:], label.shape[2:], strict=True)):
        # Logits larger than the labels are downsampled, which the loss does not do.
        whole: Losses = type(head).loss_by_feat(head, seg_logits, batch_data_samples)
        return whole
    out: Losses = {}
    stats: dict[str, Tensor] = {}
    losses: Any = losses_of(head)
    values = joint_losses(losses, seg_logits, label, stats=stats, **_options(head))
    for loss, value in zip(losses, values, strict=True):
        name = str(loss.loss_name)
        out[name] = out[name] + value if name in out else value
    return {**out, "acc_seg": _accuracy(stats)}


def _options(head: Any) -> dict[str, Any]:
    """What a head tells its losses."""
    return {"ignore_index": head.ignore_index, "align_corners": head.align_corners}


def _ddr_loss(head: Any, seg_logits: tuple[Tensor, Tensor], batch_data_samples: Any) -> Losses:
    """DDRHead.loss_by_feat without the upsampled logits."""
    label = _stack(head, batch_data_samples)
    context, spatial = seg_logits
    stats: dict[str, Tensor] = {}
    return {
        "loss_context": head.loss_decode[0](context, label, stats=stats, **_options(head)),
        "loss_spatial": head.loss_decode[1](spatial, label, **_options(head)),
        "acc_seg": _accuracy(stats),
    }


def _pid_loss(head: Any, seg_logits: tuple[Tensor, ...], batch_data_samples: Any) -> Losses:
    """PIDHead.loss_by_feat with the boundary's one channel upsampled alone."""
    from mmseg.models.utils import resize

    p_logits, i_logits, d_logits = seg_logits
    label, edges = (part.squeeze(1) for part in head._stack_batch_gt(batch_data_samples))
    upsample = partial(
        resize, size=edges.shape[1:], mode="bilinear", align_corners=head.align_corners
    )
    d_logits = upsample(d_logits)
    near_edges = torch.where(d_logits[:, 0].sigmoid() > 0.8, label, head.ignore_index)
    stats: dict[str, Tensor] = {}
    options, losses = _options(head), head.loss_decode
    if _fits(losses[0], head):
        p_loss = losses[0](p_logits, label, **options)
    else:
        p_loss = losses[0](upsample(p_logits), label, ignore_index=head.ignore_index)
    return {
        "loss_sem_p": p_loss,
        "loss_sem_i": losses[1](i_logits, label, stats=stats, **options),
        "loss_bd": losses[2](d_logits, edges),
        "loss_sem_bd": losses[3](i_logits, near_edges, **options),
        "acc_seg": _accuracy(stats),
    }
