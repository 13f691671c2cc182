"""Upsampling, cross-entropy, mining and their gradient on the GPU, without full-size logits.

What is stored for each output pixel is two float32 maps, the loss and the log of the normaliser,
and a narrow label. Nothing is read back to the host, and no result depends on the order in which
programs run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ...rule import OhemRule
from ...tracing import is_traced, is_transformed
from ..eager import plain_cross_entropy
from ..region import Overlap, Sums
from . import forward, geometry
from . import trial as _trial
from . import trial_region as _trial_region
from .inner import triton
from .operator import kept_ohem
from .overlap import Call, Overlapping
from .passes import PLAIN, Settings, backward_pass, forward_pass, sizes_of
from .trial import UndecidedError

__all__ = [
    "UndecidedError",
    "available",
    "class_sums",
    "ohem",
    "pair",
    "pair_refusal",
    "pair_trial",
    "refusal",
    "sums_refusal",
    "sums_trial",
    "trial",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def available(logits: Tensor) -> bool:
    """Whether :func:`ohem` can take these logits.

    Args:
        logits: Any tensor.

    Returns:
        True for (N, C, h, w) logits in half, bfloat16 or float32 on a GPU that Triton compiles
        for, or on any device when Triton interprets its kernels (``TRITON_INTERPRET=1``).
    """
    if triton is None or logits.dim() != 4 or logits.dtype not in _DTYPES:
        return False
    if not isinstance(forward._forward, triton.JITFunction):
        return True
    return logits.is_cuda and torch.cuda.get_device_capability(logits.device) >= (8, 0)


def refusal(
    logits: Tensor,
    size: Sequence[int],
    constants: Iterable[Tensor | float | None] = (),
    rule: OhemRule | None = None,
) -> str | None:
    """Why :func:`ohem` must leave this call to another path, or None.

    Args:
        logits: Shape (N, C, h, w); :func:`available` is asked as well.
        size: Of the labels, (H, W).
        constants: What :func:`ohem` has no gradient for: weights and ``avg_factor``.
        rule: The rule, if it is known.

    Returns:
        What is wrong, to be put behind the name of the path, or None.
    """
    if not available(logits):
        return f"cannot take {logits.dtype} on {logits.device.type}"
    if any(isinstance(value, Tensor) and value.requires_grad for value in constants):
        return "has no gradient of weights, class weights and avg_factor"
    if is_transformed():
        return "cannot be transformed by torch.func"
    if rule is not None and (rule.pool == "world" or not rule.plain):
        return "does not know this rule"
    return geometry.refusal(sizes_of(logits, size), logits.stride())


def trial(device: torch.device, dtype: torch.dtype, channels: int, use_sigmoid: bool) -> str | None:
    """What is wrong with the kernels here, or None; see :func:`ohem_mm.ops.triton.trial.trial`."""
    return _trial.trial(ohem, device, dtype, channels, use_sigmoid)


def sums_trial(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """What is wrong with the kernels of :func:`class_sums` here, or None."""
    return _trial_region.sums_trial(class_sums, device, dtype, channels)


def pair_trial(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """What is wrong with the kernels of :func:`pair` here, or None."""
    return _trial_region.pair_trial(pair, device, dtype, channels)


def ohem(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    *,
    rule: OhemRule,
    ignore_index: int,
    size: Sequence[int],
    align_corners: bool,
    use_sigmoid: bool,
    label_smoothing: float,
    avg_factor: Tensor | float | None,
    class_weight: Tensor | None,
    reduction: Literal["mean", "sum"],
    with_hits: bool = False,
    tiling: geometry.Tiling = geometry.TILING,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Cross-entropy over the hard pixels of logits that are upsampled on the way.

    The rule is that of :func:`ohem_mm.ohem_cross_entropy`, whose settings these are. Arithmetic is
    float32. The host is never waited for, and two runs give the same bits. A label that is neither
    a class nor ``ignore_index`` makes the loss NaN.

    Args:
        logits: float16, bfloat16 or float32, shape (N, C, h, w), any strides.
        target: Any integer dtype, shape (N, H, W).
        scale: Weight of each pixel, floating point, shape (N, H, W), or None.
        rule: What is kept and what divides it; pool 'world' and habits are not known here.
        ignore_index: Label of pixels that do not count.
        size: (H, W), at least (h, w).
        align_corners: As in ``torch.nn.functional.interpolate``.
        use_sigmoid: Binary cross-entropies, summed over the channels.
        label_smoothing: Share of the target mass spread over the classes.
        avg_factor: Divisor given by hand.
        class_weight: Shape (C,), or (2,) for one sigmoid channel.
        reduction: 'mean' or 'sum'.
        with_hits: Also count the valid pixels whose highest channel is their label.
        tiling: Limits of the schedule.

    Returns:
        The loss, float32, shape (), differentiable by ``logits``; the number of hits, int64,
        shape (), or None; and the number of valid pixels, int64, shape ().

    Raises:
        ValueError: :func:`refusal` has a reason.
    """
    reason = refusal(logits, size, (scale, class_weight, avg_factor), rule)
    if reason:
        raise ValueError(f"triton {reason}.")
    if isinstance(avg_factor, Tensor) and avg_factor.device != logits.device:
        # A number on the host, which costs nothing to read, except while a compiler traces.
        traced = torch.compiler.is_compiling()
        avg_factor = avg_factor.to(logits.device) if traced else float(avg_factor)
    if class_weight is not None:
        class_weight = class_weight.to(logits.device, non_blocking=True)
    settings = Settings(
        rule,
        align_corners,
        use_sigmoid,
        float(label_smoothing),
        ignore_index,
        reduction,
        with_hits,
        tiling,
    )
    # Kernels launched on tensors without data are of use to tests alone, which ask with 'meta'.
    if is_traced(logits) and not logits.is_meta:
        loss, hits, valid = kept_ohem(logits, target, scale, class_weight, avg_factor, settings)
    else:
        loss, hits, valid = _Ohem.apply(  # type: ignore[no-untyped-call]
            logits, target, scale, class_weight, avg_factor, settings
        )
    return loss, hits if with_hits else None, valid


class _Ohem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        avg_factor: Tensor | float | None,
        settings: Settings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss, hits, valid, *saved = forward_pass(
            logits, target, weight, class_weight, avg_factor, settings
        )
        ctx.settings = settings
        ctx.save_for_backward(logits, *saved)
        ctx.mark_non_differentiable(hits, valid)
        ctx.set_materialize_grads(False)  # zeros for the two would be two more launches
        return loss, hits, valid

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 6
        logits, *saved = ctx.saved_tensors
        make = _gradient_with_graph if torch.is_grad_enabled() else backward_pass
        return make(grad_loss, logits, saved, ctx.settings), None, None, None, None, None


def _gradient_with_graph(
    grad_loss: Tensor, logits: Tensor, saved: Sequence[Tensor], settings: Settings
) -> Tensor:
    """The gradient once more, differentiable itself, for ``create_graph``; at full resolution."""
    factor, _, label, divisor = saved
    kept = label >= 0
    _, loss = plain_cross_entropy(
        logits, label, kept, settings.use_sigmoid, settings.smoothing, settings.align_corners
    )
    total = (loss * torch.where(kept, factor, 0)).sum() / divisor
    (grad,) = torch.autograd.grad(total, logits, grad_loss, create_graph=True)
    return grad


def sums_refusal(logits: Tensor, size: Sequence[int], overlap: Overlap) -> str | None:
    """Why :func:`class_sums` must leave this call to another path, or None.

    Args:
        logits: Shape (N, C, h, w).
        size: Of the labels, (H, W).
        overlap: Which sums.

    Returns:
        What is wrong, to be put behind the name of the path, or None.
    """
    if overlap.use_sigmoid or overlap.smoothing:
        return "has sums of softmax and hard labels alone"
    reason = refusal(logits, size)
    if reason is None and geometry.spans_too_much(logits.shape[2:], logits.stride()):
        reason = "cannot sum logits whose planes pass 32 bits"
    return reason


def class_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    overlap: Overlap,
    *,
    ignore_index: int,
    align_corners: bool,
    with_hits: bool = False,
    tiling: geometry.Tiling = geometry.TILING,
) -> tuple[Sums, Tensor | None]:
    """Sums over the pixels of each image, for overlap losses, of logits upsampled on the way.

    Args:
        logits: float16, bfloat16 or float32, shape (N, C, h, w), any strides.
        target: Any integer dtype, shape (N, H, W), at least as large.
        weight: Weight of each pixel, floating point, shape (N, H, W), or None.
        overlap: Which sums; by softmax, of hard labels.
        ignore_index: Label of pixels that do not count.
        align_corners: As in ``torch.nn.functional.interpolate``.
        with_hits: Also count the valid pixels whose highest channel is their label.
        tiling: Limits of the schedule.

    Returns:
        As :func:`ohem_mm.ops.class_sums` returns them.

    Raises:
        ValueError: :func:`sums_refusal` has a reason.
    """
    reason = sums_refusal(logits, target.shape[1:], overlap)
    if reason:
        raise ValueError(f"triton {reason}.")
    if weight is not None:
        weight = weight.float().contiguous()
    plain = Settings(PLAIN, align_corners, False, 0.0, ignore_index, "mean", with_hits, tiling)
    call = Call(
        sizes_of(logits, target.shape[1:]),
        overlap,
        plain,
        with_loss=False,
        weighted=weight is not None,
    )
    *sums, _, hits, _ = Overlapping.apply(  # type: ignore[no-untyped-call]
        logits, target, weight, None, call
    )
    return Sums(*sums), hits if with_hits else None


def pair_refusal(
    logits: Tensor, size: Sequence[int], overlap: Overlap, rule: OhemRule, label_smoothing: float
) -> str | None:
    """Why :func:`pair` must leave this call to another path, or None.

    Args:
        logits: Shape (N, C, h, w).
        size: Of the labels, (H, W).
        overlap: Which sums.
        rule: Of the loss.
        label_smoothing: Of the loss.

    Returns:
        What is wrong, to be put behind the name of the path, or None.
    """
    if label_smoothing:
        return "has no smoothed loss beside sums"
    return sums_refusal(logits, size, overlap) or refusal(logits, size, (), rule)


def pair(
    logits: Tensor,
    target: Tensor,
    overlap: Overlap,
    *,
    rule: OhemRule,
    ignore_index: int,
    align_corners: bool,
    class_weight: Tensor | None,
    reduction: Literal["mean", "sum"],
    tiling: geometry.Tiling = geometry.TILING,
) -> tuple[Sums, Tensor, Tensor, Tensor]:
    """What :func:`class_sums` and :func:`ohem` give of the same logits, in one pass each way.

    Args are theirs; ``class_weight`` is that of the loss alone.

    Returns:
        The sums, the loss, the hits, and the number of valid pixels.

    Raises:
        ValueError: :func:`pair_refusal` has a reason.
    """
    reason = pair_refusal(logits, target.shape[1:], overlap, rule, 0.0)
    if reason:
        raise ValueError(f"triton {reason}.")
    if class_weight is not None:
        class_weight = class_weight.to(logits.device, non_blocking=True)
    settings = Settings(rule, align_corners, False, 0.0, ignore_index, reduction, True, tiling)
    call = Call(
        sizes_of(logits, target.shape[1:]), overlap, settings, with_loss=True, weighted=False
    )
    *sums, loss, hits, valid = Overlapping.apply(  # type: ignore[no-untyped-call]
        logits, target, None, class_weight, call
    )
    return Sums(*sums), loss, hits, valid
