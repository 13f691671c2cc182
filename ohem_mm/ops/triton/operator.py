"""The whole loss as an operator that a compiled or exported model keeps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...rule import SETTINGS, OhemRule
from . import passes
from .forward import label_dtype

_RULE = (
    "float? thresh, Scalar min_kept, str pool, str min_kept_per, int[] always_keep, str avg, "
    "bool weighted_mean"
)
_OPTIONS = "bool align_corners, bool use_sigmoid, float smoothing"


def kept_ohem(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | float | None,
    settings: passes.Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the hits and the valid pixels, in one operator."""
    divisor = avg_factor if isinstance(avg_factor, Tensor) else None
    given = None if avg_factor is None or divisor is not None else float(avg_factor)
    rule = (getattr(settings.rule, name) for name in SETTINGS if name != "habits")
    loss, hits, valid, *_ = _forward(
        logits, target, weight, class_weight, divisor, given, *rule, *settings[1:-1]
    )
    return loss, hits, valid


@torch.library.custom_op(
    "ohem_mm::ohem",
    mutates_args=(),
    schema="(Tensor logits, Tensor target, Tensor? weight, Tensor? class_weight, Tensor? divisor, "
    f"float? given, {_RULE}, {_OPTIONS}, int ignore_index, str reduction, bool with_hits) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    divisor: Tensor | None,
    given: float | None,
    *plain: Any,
) -> tuple[Tensor, ...]:
    rule = OhemRule(*plain[:7])
    avg_factor = given if divisor is None else divisor
    settings = passes.Settings(rule, *plain[7:])
    out = passes.forward_pass(logits, target, weight, class_weight, avg_factor, settings)
    # An operator may not return a tensor twice.
    return out._replace(normaliser=out.factor.new_empty(0)) if settings.use_sigmoid else out


@_forward.register_fake
def _(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    number = logits.new_empty((), dtype=torch.float32)
    count = logits.new_empty((), dtype=torch.int64)
    pixels = logits.new_empty(target.shape, dtype=torch.float32)
    use_sigmoid = rest[12]
    return (
        number,
        count,
        torch.empty_like(count),
        pixels,
        pixels.new_empty(0) if use_sigmoid else torch.empty_like(pixels),
        torch.empty_like(pixels, dtype=label_dtype(logits.shape[1])),
        torch.empty_like(number),
    )


@torch.library.custom_op(
    "ohem_mm::ohem_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor logits, Tensor factor, Tensor normaliser, Tensor label, "
    f"Tensor divisor, {_OPTIONS}) -> Tensor",
)
def _backward(
    grad: Tensor,
    logits: Tensor,
    factor: Tensor,
    normaliser: Tensor,
    label: Tensor,
    divisor: Tensor,
    align_corners: bool,
    use_sigmoid: bool,
    smoothing: float,
) -> Tensor:
    if use_sigmoid:
        normaliser = factor
    settings = passes.Settings(OhemRule(), align_corners, use_sigmoid, smoothing)
    return passes.backward_pass(grad, logits, (factor, normaliser, label, divisor), settings)


@_backward.register_fake
def _(grad: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], *output[3:])
    ctx.options, ctx.inputs = inputs[13:16], len(inputs)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return (_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * (ctx.inputs - 1))


_forward.register_autograd(_differentiate, setup_context=_keep)
