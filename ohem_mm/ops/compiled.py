"""The fused passes as operators that a compiled or exported model keeps.

A compiler would follow the bands of ``ops.portable`` operator by operator, or refuse their threads.
As one operator each, the passes run as they do in eager mode. They are used only while a model is
traced: called directly, an operator costs about a tenth of a millisecond more than a function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .portable import Banded, Options

_OPTIONS = "bool use_sigmoid, float smoothing, bool align_corners, bool count_hits"


def kept_cross_entropy(
    logits: Tensor, target: Tensor, valid: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`ohem_mm.ops.portable.banded_cross_entropy`, in one operator."""
    loss, mined, hits = _forward(logits, target, valid, *options)
    return mined if options.smoothing else loss.detach(), loss, hits if options.count_hits else None


@torch.library.custom_op(
    "ohem_mm::pixel_cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor target, Tensor valid, {_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor, target: Tensor, valid: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return Banded.forward(logits, target, valid, Options(*options))


@_forward.register_fake
def _(
    logits: Tensor, target: Tensor, valid: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss = logits.new_empty(target.shape, dtype=dtype)
    mined = torch.empty_like(loss) if Options(*options).smoothing else loss.new_empty(0)
    return loss, mined, loss.new_empty((), dtype=torch.long)


@torch.library.custom_op(
    "ohem_mm::pixel_cross_entropy_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor logits, Tensor target, Tensor valid, Tensor loss, {_OPTIONS})"
    " -> Tensor",
)
def _backward(
    grad: Tensor, logits: Tensor, target: Tensor, valid: Tensor, loss: Tensor, *options: Any
) -> Tensor:
    return Banded.gradient(grad, (logits, target, valid, loss), Options(*options))


@_backward.register_fake
def _(
    grad: Tensor, logits: Tensor, target: Tensor, valid: Tensor, loss: Tensor, *options: Any
) -> Tensor:
    return logits.new_empty(logits.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.options = *inputs[:3], inputs[3:]
    ctx.save_for_backward(*tensors, output[0])


def _differentiate(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad = _backward(grad_loss, *ctx.saved_tensors, *ctx.options)
    return (grad, *[None] * (2 + len(ctx.options)))


_forward.register_autograd(_differentiate, setup_context=_keep)
