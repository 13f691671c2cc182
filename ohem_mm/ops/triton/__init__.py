# mypy: allow-untyped-calls
"""Upsampling, cross-entropy, mining and their gradient on the GPU, without full-size logits.

What is stored for each output pixel is two float32 maps, the loss and the log of the normaliser,
and a narrow label. Nothing is read back to the host, and no result depends on the order in which
programs run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...rule import OhemRule
from ..region import Overlap, Sums
from . import backward, floor, forward, geometry, mining, region
from . import trial as _trial
from .inner import Kind, triton
from .trial import UndecidedError

__all__ = [
    "UndecidedError",
    "available",
    "class_sums",
    "ohem",
    "refusal",
    "region_refusal",
    "sums_trial",
    "trial",
]

# Releases of Triton before this one do not compile these kernels.
_OLDEST = (3, 4)
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
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < _OLDEST:
        return False
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
    if torch._C._are_functorch_transforms_active():
        return "cannot be transformed by torch.func"
    if rule is not None and (rule.pool == "world" or not rule.plain):
        return "does not know this rule"
    return geometry.refusal(_sizes(logits, size), logits.stride())


def trial(device: torch.device, dtype: torch.dtype, channels: int, use_sigmoid: bool) -> str | None:
    """What is wrong with the kernels here, or None; see :func:`ohem_mm.ops.triton.trial.trial`."""
    return _trial.trial(ohem, device, dtype, channels, use_sigmoid)


def sums_trial(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """What is wrong with the kernels of :func:`class_sums` here, or None."""
    return _trial.sums_trial(class_sums, device, dtype, channels)


def ohem(
    logits: Tensor,
    target: Tensor,
    scale: Tensor | None,
    *,
    rule: OhemRule,
    ignore_index: int,
    size: tuple[int, int],
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
        The loss, float32, shape (), differentiable once by ``logits``; the number of hits, int64,
        shape (), or None; and the number of valid pixels, int64, shape ().

    Raises:
        ValueError: :func:`refusal` has a reason.
    """
    sizes = _sizes(logits, size)
    reason = refusal(logits, size, (scale, class_weight, avg_factor), rule)
    if reason:
        raise ValueError(f"triton {reason}.")
    if isinstance(avg_factor, Tensor) and avg_factor.device != logits.device:
        avg_factor = float(avg_factor)  # a number on the host, which costs nothing to read
    if class_weight is not None:
        class_weight = class_weight.to(logits.device, non_blocking=True)
    kind = Kind(
        full=sizes.full,
        align_corners=align_corners,
        sigmoid=use_sigmoid,
        single=use_sigmoid and sizes.classes == 1,
        smooth=label_smoothing > 0,
        hits=with_hits,
        hard=bool(rule.min_kept) and rule.pool != "class",
    )
    call = _Call(sizes, kind, rule, ignore_index, float(label_smoothing), reduction, tiling)
    loss, hits, valid = _Ohem.apply(logits, target, scale, class_weight, avg_factor, call)
    return loss, hits if with_hits else None, valid


class _Call(NamedTuple):
    """What the passes need to know besides tensors."""

    sizes: geometry.Sizes
    kind: Kind
    rule: OhemRule
    ignore_index: int
    smoothing: float
    reduction: str
    tiling: geometry.Tiling


class _Ohem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        avg_factor: Tensor | float | None,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sizes, kind, rule = call.sizes, call.kind, call.rule
        with torch.cuda.device_of(logits):
            state = floor.make_state(logits, 2 if kind.single else sizes.classes, rule)
            maps = forward.run(
                logits,
                target.contiguous(),
                sizes,
                kind,
                ignore_index=call.ignore_index,
                smoothing=call.smoothing,
                limit=floor.limit_of(rule),
                state=state.all,
                plan=geometry.forward(sizes, call.tiling),
            )
            result = mining.run(
                maps,
                state,
                weight,
                class_weight,
                avg_factor,
                sizes,
                kind,
                rule,
                call.reduction,
                plan=geometry.mining(sizes, call.tiling),
            )
        ctx.call = call
        ctx.save_for_backward(logits, maps.loss, maps.normaliser, maps.label, result.divisor)
        ctx.mark_non_differentiable(result.hits, result.valid)
        ctx.set_materialize_grads(False)  # zeros for the two would be two more launches
        return result.loss, result.hits, result.valid

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, factor, normaliser, label, divisor = ctx.saved_tensors
        call = ctx.call
        with torch.cuda.device_of(logits):
            grad = backward.run(
                logits,
                backward.Saved(factor, normaliser, label, divisor),
                grad_loss,
                call.sizes,
                call.kind,
                call.smoothing,
                geometry.backward(call.sizes, _processors(logits.device), call.tiling),
            )
        return grad, None, None, None, None, None


def region_refusal(
    logits: Tensor, size: Sequence[int], weight: Tensor | None, overlap: Overlap
) -> str | None:
    """Why :func:`class_sums` must leave this call to another path, or None.

    Args:
        logits: Shape (N, C, h, w).
        size: Of the labels, (H, W).
        weight: Weight of each pixel, or None.
        overlap: Which sums.

    Returns:
        What is wrong, to be put behind the name of the path, or None.
    """
    if overlap.use_sigmoid or overlap.smoothing:
        return "has sums of softmax and hard labels alone"
    return refusal(logits, size, (weight,))


def class_sums(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    overlap: Overlap,
    *,
    ignore_index: int,
    size: tuple[int, int],
    align_corners: bool,
    with_hits: bool = False,
    tiling: geometry.Tiling = geometry.TILING,
) -> tuple[Sums, Tensor | None]:
    """Sums over the pixels of each image, for overlap losses, of logits upsampled on the way.

    Args:
        logits: float16, bfloat16 or float32, shape (N, C, h, w), any strides.
        target: Any integer dtype, shape (N, H, W).
        weight: Weight of each pixel, floating point, shape (N, H, W), or None.
        overlap: Which sums; by softmax, of hard labels.
        ignore_index: Label of pixels that do not count.
        size: (H, W), at least (h, w).
        align_corners: As in ``torch.nn.functional.interpolate``.
        with_hits: Also count the valid pixels whose highest channel is their label.
        tiling: Limits of the schedule.

    Returns:
        As :func:`ohem_mm.ops.class_sums` returns them.

    Raises:
        ValueError: :func:`region_refusal` has a reason.
    """
    reason = region_refusal(logits, size, weight, overlap)
    if reason:
        raise ValueError(f"triton {reason}.")
    sizes = _sizes(logits, size)
    kind = Kind(
        full=sizes.full,
        align_corners=align_corners,
        sigmoid=False,
        single=False,
        smooth=False,
        hits=with_hits,
        overlap=True,
        squared=overlap.squared,
        weighted=weight is not None,
    )
    if weight is not None:
        weight = weight.float().contiguous()
    *out, hits = _ClassSums.apply(logits, target, weight, (sizes, kind, ignore_index, tiling))
    return Sums(*out), hits if with_hits else None


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        call: tuple[geometry.Sizes, Kind, int, geometry.Tiling],
    ) -> tuple[Tensor, ...]:
        sizes, kind, ignore_index, tiling = call
        plan = geometry.forward(sizes, tiling)
        with torch.cuda.device_of(logits):
            maps = forward.run(
                logits,
                target.contiguous(),
                sizes,
                # The forward pass is that of plain cross-entropy.
                kind._replace(overlap=False, squared=False, weighted=False),
                ignore_index=ignore_index,
                smoothing=0.0,
                limit=0.0,
                state=torch.empty(0, dtype=torch.int32, device=logits.device),
                plan=plan,
            )
            sums = region.sums(logits, maps, weight, sizes, kind, plan)
            hits = maps.counts[2].sum()
        ctx.call = call
        ctx.save_for_backward(logits, maps.loss, maps.normaliser, maps.label, weight)
        ctx.mark_non_differentiable(sums[2], hits)
        return *sums.unbind(), hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, by_intersection: Tensor, by_predicted: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, loss, normaliser, label, weight = ctx.saved_tensors
        sizes, kind, _, tiling = ctx.call
        maps = forward.Maps(loss, loss, normaliser, label, loss)
        one = loss.new_ones(())
        with torch.cuda.device_of(logits):
            slope = by_predicted.float().contiguous()
            shift, at_true = region.slopes(
                logits,
                maps,
                weight,
                by_intersection.float().contiguous(),
                slope,
                sizes,
                kind,
                geometry.forward(sizes, tiling),
            )
            grad = backward.run(
                logits,
                backward.Saved(shift, normaliser, label, one, at_true, weight, slope),
                one,
                sizes,
                kind,
                0.0,
                geometry.backward(sizes, _processors(logits.device), tiling),
            )
        return grad, None, None, None


def _sizes(logits: Tensor, size: Sequence[int]) -> geometry.Sizes:
    n, c, h, w = logits.shape
    return geometry.Sizes(n, c, h, w, int(size[0]), int(size[1]))


@lru_cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a device; of an H100 where it has none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
