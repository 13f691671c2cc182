"""Per-pixel cross-entropy in plain torch: any device, any shape, full-resolution logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tracing import is_transformed

_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def full_cross_entropy(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every pixel from logits of the size of the labels.

    The backward pass keeps the logits as they came and one map per pixel, not a second tensor of C
    channels. Under ``create_graph`` and in transforms of ``torch.func`` autograd's own rules are
    used, and more is kept.

    Args:
        logits: Any floating dtype, shape (N, C, ...).
        target: int64, shape (N, ...), a class index everywhere.
        valid: Bool, shape (N, ...).
        use_sigmoid: See :func:`ohem_mm.ops.pixel_cross_entropy`.
        label_smoothing: See :func:`ohem_mm.ops.pixel_cross_entropy`.

    Returns:
        ``mined`` and ``loss`` as :func:`ohem_mm.ops.pixel_cross_entropy` returns them.
    """
    if is_transformed():
        return plain_cross_entropy(logits, target, valid, use_sigmoid, label_smoothing)
    loss, mined = _PixelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, target, valid, use_sigmoid, label_smoothing
    )
    return mined, loss


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, valid: Tensor, use_sigmoid: bool, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        mined, loss = losses(wide(logits), target, use_sigmoid, smoothing)
        loss = torch.where(valid, loss, 0)
        mined = torch.where(valid, mined, 0)
        ctx.save_for_backward(logits, target, valid, loss)
        ctx.use_sigmoid, ctx.smoothing = use_sigmoid, smoothing
        ctx.mark_non_differentiable(mined)
        return loss, mined

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, valid, loss = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            options = ctx.use_sigmoid, ctx.smoothing
            grad = gradient_with_graph(grad_loss, logits, target, valid, loss, *options)
            return grad, None, None, None, None
        grad = logit_gradient(wide(logits), target, ctx.use_sigmoid, ctx.smoothing)
        # loss - loss is 0, or NaN where the loss is not finite.
        grad *= (grad_loss + (loss - loss))[:, None]
        grad.masked_fill_(~valid[:, None], 0)
        return grad.to(logits.dtype), None, None, None, None


def plain_cross_entropy(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    use_sigmoid: bool,
    smoothing: float,
    align_corners: bool = False,
) -> tuple[Tensor, Tensor]:
    """``mined`` and ``loss`` by autograd's own rules: any derivative, any transform.

    The arguments are those of :func:`ohem_mm.ops.pixel_cross_entropy`. The logits at the size of
    the labels exist, and so do several tensors like them.
    """
    # What stands at an ignored pixel must not meet a gradient: 0 * NaN is NaN.
    z = torch.where(valid[:, None], upsampled(logits, target.shape[1:], align_corners), 0)
    mined, loss = losses(wide(z), torch.where(valid, target, 0).long(), use_sigmoid, smoothing)
    known = loss.detach()
    loss = loss * (known - known + 1)  # NaN where the loss is not finite, in the gradient as well
    return torch.where(valid, mined.detach(), 0), torch.where(valid, loss, 0)


def gradient_with_graph(
    grad_loss: Tensor, logits: Tensor, target: Tensor, valid: Tensor, _: Tensor, *options: Any
) -> Tensor:
    """The gradient by the logits once more, differentiable itself, for ``create_graph=True``.

    Autograd would take the result of a hand-written gradient for a constant, and second derivatives
    would be wrong without a word.
    """
    _, again = plain_cross_entropy(logits, target, valid, *options)
    (grad,) = torch.autograd.grad(again, logits, grad_loss, create_graph=True)
    return grad


def upsampled(logits: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """The logits at the size of the labels; in float32 even for half precision, if upsampled."""
    if logits.shape[2:] == size:
        return logits
    mode = _INTERPOLATION[len(size)]
    return F.interpolate(wide(logits), size=size, mode=mode, align_corners=align_corners)


def losses(z: Tensor, target: Tensor, use_sigmoid: bool, smoothing: float) -> tuple[Tensor, Tensor]:
    """Each pixel's loss without smoothing, and with it; the same tensor where there is none.

    Dimension 1 of ``z`` holds the channels, and ``target`` has the other dimensions.
    """
    if use_sigmoid:
        hot = _one_hot(z, target)
        mined = F.binary_cross_entropy_with_logits(z, hot, reduction="none").sum(1)
        if not smoothing:
            return mined, mined
        soft = hot * (1 - smoothing) + smoothing / 2
        return mined, F.binary_cross_entropy_with_logits(z, soft, reduction="none").sum(1)
    log_p = z.log_softmax(1)
    mined = -log_p.gather(1, target[:, None]).squeeze(1)
    if not smoothing:
        return mined, mined
    return mined, (1 - smoothing) * mined - smoothing * log_p.mean(1)


def logit_gradient(z: Tensor, target: Tensor, use_sigmoid: bool, smoothing: float) -> Tensor:
    """Derivative of each pixel's smoothed loss by its logits, a new tensor shaped as ``z``."""
    if use_sigmoid:
        return z.sigmoid() - (_one_hot(z, target) * (1 - smoothing) + smoothing / 2)
    grad = z.softmax(1)
    true = grad.gather(1, target[:, None]) - (1 - smoothing)
    grad.scatter_(1, target[:, None], true)
    if smoothing:
        grad -= smoothing / z.shape[1]
    return grad


def wide(logits: Tensor) -> Tensor:
    """The logits in the dtype of the arithmetic: float64 as it is, all else in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _one_hot(z: Tensor, target: Tensor) -> Tensor:
    """Binary targets in the shape of ``z``, whose dimension 1 holds the channels."""
    if z.shape[1] == 1:
        return target[:, None].to(z.dtype)
    return torch.zeros_like(z).scatter_(1, target[:, None], 1)
