"""Per-pixel cross-entropy in plain torch: any device, any shape, full-resolution logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of every pixel, in float32 (float64 for float64 logits).

    Unlike ``torch.nn.functional.cross_entropy``, logits at pixels that are not valid are never
    looked at: NaN there changes neither a value nor a gradient. A non-finite loss makes a NaN
    gradient, so that gradient scalers and anomaly detection see it. The backward pass keeps the
    logits as they came and one map per pixel, not a second tensor of C channels.

    Args:
        logits: Any floating dtype, shape (N, C, ...).
        target: int64, shape (N, ...), in [0, C) everywhere ({0, 1} for C = 1 with sigmoid).
        valid: Bool, shape (N, ...).
        use_sigmoid: Binary cross-entropy: of the one channel, or of all channels against the
            one-hot target, summed over the channels.
        label_smoothing: Share s of the target mass spread evenly over the classes, in [0, 1).

    Returns:
        ``mined``, the loss without smoothing, detached, for deciding what is hard, and ``loss``,
        which carries the gradient. Both have shape (N, ...) and are 0 where not valid.
    """
    loss, mined = _PixelCrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits, target, valid, use_sigmoid, label_smoothing
    )
    return mined, loss


class _PixelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, valid: Tensor, use_sigmoid: bool, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        z = _wide(logits)
        if use_sigmoid:
            onehot = _onehot(z, target)
            mined = F.binary_cross_entropy_with_logits(z, onehot, reduction="none").sum(1)
            loss = mined
            if smoothing:
                soft = onehot * (1 - smoothing) + smoothing / 2
                loss = F.binary_cross_entropy_with_logits(z, soft, reduction="none").sum(1)
        else:
            log_p = z.log_softmax(1)
            mined = -log_p.gather(1, target[:, None]).squeeze(1)
            loss = mined
            if smoothing:
                loss = (1 - smoothing) * mined - smoothing * log_p.mean(1)
        loss = torch.where(valid, loss, 0)
        mined = torch.where(valid, mined, 0)
        ctx.save_for_backward(logits, target, valid, loss)
        ctx.use_sigmoid, ctx.smoothing = use_sigmoid, smoothing
        ctx.mark_non_differentiable(mined)
        return loss, mined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, valid, loss = ctx.saved_tensors
        z, s = _wide(logits), ctx.smoothing
        if ctx.use_sigmoid:
            grad = z.sigmoid() - (_onehot(z, target) * (1 - s) + s / 2)
        else:
            grad = z.softmax(1)
            true = grad.gather(1, target[:, None]) - (1 - s)
            grad.scatter_(1, target[:, None], true)
            if s:
                grad -= s / z.shape[1]
        # loss - loss is 0, or NaN where the loss is not finite.
        grad *= (grad_loss + (loss - loss))[:, None]
        grad.masked_fill_(~valid[:, None], 0)
        return grad.to(logits.dtype), None, None, None, None


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _onehot(z: Tensor, target: Tensor) -> Tensor:
    if z.shape[1] == 1:
        return target[:, None].to(z.dtype)
    return torch.zeros_like(z).scatter_(1, target[:, None], 1)
