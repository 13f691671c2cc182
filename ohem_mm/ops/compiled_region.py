"""The passes of ``ops.portable_region`` as operators that a compiled or exported model keeps.

They are used only while a model is traced, as those of :mod:`ohem_mm.ops.compiled` are, and for the
same reason.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .portable_region import Passes, PassOptions, pair_of
from .region import Overlap, Sums, sum_dtype

_OPTIONS = (
    "bool use_sigmoid, bool squared, float overlap_smoothing, "
    "float? smoothing, bool count_hits, bool align_corners"
)


def kept_class_sums(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    options: PassOptions,
) -> tuple[Sums, Tensor | None]:
    """As :func:`ohem_mm.ops.portable_region.banded_class_sums`, in one operator."""
    out = _forward(logits, target, valid, weight, *options.overlap, *options[1:])
    return Sums(*out[:3]), out[3] if options.count_hits else None


def kept_pair(
    logits: Tensor, target: Tensor, valid: Tensor, options: PassOptions
) -> tuple[Sums, Tensor, Tensor, Tensor | None]:
    """As :func:`ohem_mm.ops.portable_region.banded_pair`, in one operator."""
    out = _forward(logits, target, valid, None, *options.overlap, *options[1:])
    return pair_of(out, options)


def _packed(options: tuple[Any, ...]) -> PassOptions:
    return PassOptions(Overlap(*options[:3]), *options[3:])


@torch.library.custom_op(
    "ohem_mm::class_sums",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor valid, Tensor? weight, {_OPTIONS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    return Passes.forward(logits, target, valid, weight, _packed(options))


@_forward.register_fake
def _(
    logits: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    overlap, smoothing, *_ = _packed(options)
    images, channels = logits.shape[:2]
    sums = logits.new_empty((images, channels), dtype=sum_dtype(logits.device))
    one = overlap.use_sigmoid and channels == 1
    counts = sums.new_empty((images, 2)) if one else torch.empty_like(sums)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    pair = smoothing is not None
    loss = logits.new_empty(target.shape if pair else 0, dtype=dtype)
    mined = torch.empty_like(loss) if smoothing else loss.new_empty(0)
    return sums, torch.empty_like(sums), counts, sums.new_empty((), dtype=torch.long), loss, mined


@torch.library.custom_op(
    "ohem_mm::class_sums_backward",
    mutates_args=(),
    schema="(Tensor? by_intersection, Tensor? by_predicted, Tensor? by_loss, Tensor logits, "
    f"Tensor target, Tensor valid, Tensor? weight, Tensor loss, {_OPTIONS}) -> Tensor",
)
def _backward(
    by_intersection: Tensor | None,
    by_predicted: Tensor | None,
    by_loss: Tensor | None,
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    loss: Tensor,
    *options: Any,
) -> Tensor:
    return Passes.gradient(
        (by_intersection, by_predicted, by_loss),
        (logits, target, valid, weight, loss),
        _packed(options),
    )


@_backward.register_fake
def _(
    by_intersection: Tensor | None,
    by_predicted: Tensor | None,
    by_loss: Tensor | None,
    logits: Tensor,
    *_: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    Passes.setup_context(ctx, (*inputs[:4], _packed(inputs[4:])), output)


def _differentiate(ctx: Any, *by_output: Tensor | None) -> tuple[Tensor | None, ...]:
    by_intersection, by_predicted, _, _, by_loss, _ = by_output
    overlap, *options = ctx.options
    grads = by_intersection, by_predicted, by_loss
    grad = _backward(*grads, *ctx.saved_tensors, *overlap, *options)
    return (grad, *[None] * (3 + len(overlap) + len(options)))


_forward.register_autograd(_differentiate, setup_context=_keep)
