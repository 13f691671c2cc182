"""Sums over pixels that overlap losses are made of, and their gradient by the logits.

For every class c: ``intersection`` sums p t, ``predicted`` sums p (or its square) and ``counts``
sums the pixels labelled c. A loss made of these sums has a derivative by p that is one number a
class, plus another at the true class. So a pass over the pixels gives the sums, a second one the
gradient, and each can go over the pixels part by part: here are the two for one part, of shape
(B, C, X) with X pixels in each of B groups, and the eager form, whose part is the whole batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import wide

_LOG2_E = math.log2(math.e)


class Overlap(NamedTuple):
    """Which sums are wanted.

    Attributes:
        use_sigmoid: Probabilities by sigmoid; of one channel with labels {0, 1}, or of all.
        squared: ``predicted`` sums squares.
        smoothing: Share of the target mass spread evenly, in [0, 1).
    """

    use_sigmoid: bool = False
    squared: bool = False
    smoothing: float = 0.0

    def targets(self, channels: int) -> tuple[float, float]:
        """The target value of a class that is not the true one, and of the one that is."""
        low = self.smoothing / (2 if self.use_sigmoid else channels)
        return low, 1 - self.smoothing + low


class Sums(NamedTuple):
    """Sums over the valid pixels of each group, times the pixels' weights.

    Attributes:
        intersection: Overlap with the target, shape (B, C): the sum of the smaller of probability
            and target, which for hard labels is their product; of the product where ``predicted``
            sums squares. Either is exact for soft labels: it is the whole target where the
            prediction equals it.
        predicted: Probability, or its square, shape (B, C).
        counts: Weight of the pixels labelled with each class, shape (B, C), or (B, 2) for one
            sigmoid channel. Not differentiable.
    """

    intersection: Tensor
    predicted: Tensor
    counts: Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """Where sums are kept: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def class_sums(
    z: Tensor, labels: Tensor, scale: Tensor, overlap: Overlap
) -> tuple[Sums, Tensor | None]:
    """The sums of one part.

    Args:
        z: Logits, float32 or float64, shape (B, C, X); finite where ``scale`` is 0.
        labels: int64, shape (B, X), a class index everywhere.
        scale: Weight of each pixel, 0 where not valid, shape (B, X), in the dtype of ``z``.
        overlap: Which sums.

    Returns:
        The sums; and the cross-entropy of each pixel, shape (B, X), by softmax alone. A pixel whose
        cross-entropy is not finite makes the intersection of its class NaN.
    """
    channels = z.shape[1]
    low, high = overlap.targets(channels)
    index, member = _membership(z, labels, scale, overlap)
    loss = None
    if overlap.use_sigmoid:
        p = z.sigmoid()
        total = torch.ones_like(scale)
        # z * 0 is NaN where a logit is not finite, which sigmoid would hide.
        true = p.gather(1, index[:, None]).squeeze(1) + (z * 0).sum(1)
    else:
        p, total, top = _exponentials(z)
        loss = total.log() - (z.gather(1, index[:, None]) - top).squeeze(1)
        true = (-loss).exp() + (loss - loss)
    if overlap.squared or overlap.smoothing:
        p /= total[:, None]
        if overlap.squared:
            spread = (p * (low * scale)[:, None]).sum(2)
            p, more = p.square_(), (high - low) * true
        else:
            spread = (p.clamp(max=low) * scale[:, None]).sum(2)
            more = true.clamp(max=high) - true.clamp(max=low)
        share = scale
    else:
        # p is not divided by its total: the weights are, in the same pass.
        share, more, spread = scale / total, true, z.new_zeros(z.shape[:2])
    # A product with a vector would be slower, and in float32 far less exact than this sum.
    predicted = p.mul_(share[:, None]).sum(2)
    wide_sum = sum_dtype(z.device)
    intersection = spread.to(wide_sum).scatter_add_(1, index, (member * more).to(wide_sum))
    one = overlap.use_sigmoid and channels == 1
    counts = torch.zeros(len(z), 2 if one else channels, dtype=wide_sum, device=z.device)
    counts.scatter_add_(1, labels, scale.to(wide_sum))
    return Sums(intersection, predicted.to(wide_sum), counts), loss


def logit_gradient(
    z: Tensor,
    labels: Tensor,
    scale: Tensor,
    by_intersection: Tensor,
    by_predicted: Tensor,
    overlap: Overlap,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """Derivative by the logits of a function of the sums, and of a weighted cross-entropy.

    With g the derivative by the probabilities, that by a logit is p_c (g_c - sum_k p_k g_k) for
    softmax and p_c (1 - p_c) g_c for sigmoid.

    Args:
        z: As :func:`class_sums` takes it.
        labels: As there.
        scale: As there.
        by_intersection: Derivative by ``intersection``, shape (B, C) or (1, C), as ``z``.
        by_predicted: Derivative by ``predicted``, likewise.
        overlap: As there.
        weight: Derivative by each pixel's cross-entropy, shape (B, X); None without one.
        smoothing: Label smoothing of the cross-entropy.

    Returns:
        A new tensor, shape (B, C, X); 0 where ``scale`` and ``weight`` are.
    """
    low, high = overlap.targets(z.shape[1])
    index, member = _membership(z, labels, scale, overlap)
    if overlap.use_sigmoid:
        p = z.sigmoid()
    else:
        p, total, _ = _exponentials(z)
        p /= total[:, None]
    true = p.gather(1, index[:, None]).squeeze(1)
    a, b = by_intersection[:, :, None], by_predicted[:, :, None]
    # Derivative by p at all classes, and what is added to it at the true one.
    slope = b
    more = a.expand(len(z), -1, z.shape[2]).gather(1, index[:, None]).squeeze(1)
    if overlap.squared:
        slope = 2 * b * p + low * a
        more = more * (high - low)
    elif overlap.smoothing:
        slope = b + a * (p < low)
        more = more * ((true < high).to(p.dtype) - (true < low).to(p.dtype))

    if overlap.use_sigmoid:
        grad = (scale[:, None] * slope).expand_as(p) * (p * (1 - p))
        at_true = member * more * true * (1 - true)
        if weight is not None:
            grad += weight[:, None] * (p - smoothing / 2)
            hot = labels.to(p.dtype) if z.shape[1] == 1 else 1
            at_true -= weight * hot * (1 - smoothing)
    else:
        mean = _dot_classes(p, by_predicted) if slope is b else (p * slope).sum(1)
        shift = -scale * (mean + true * more)
        if weight is not None:
            shift += weight
        # One pass over (B, C, X) for the sum, and one for the product.
        grad = torch.addcmul(shift[:, None], slope.to(p.dtype), scale[:, None]).mul_(p)
        at_true = scale * true * more
        if weight is not None:
            at_true -= weight * (1 - smoothing)
            if smoothing:
                grad -= weight[:, None] * (smoothing / z.shape[1])
    return grad.scatter_add_(1, index[:, None], at_true[:, None])


def _membership(
    z: Tensor, labels: Tensor, scale: Tensor, overlap: Overlap
) -> tuple[Tensor, Tensor]:
    """The channel of each pixel's class, and the weight with which the pixel belongs to it."""
    if overlap.use_sigmoid and z.shape[1] == 1:
        return torch.zeros_like(labels), scale * labels
    return labels, scale


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax before its division, (B, C, X); the divisor, (B, X); and the largest logit."""
    top = z.amax(1, keepdim=True)
    # On the CPU exp2 takes half the time of exp, and together they take less than softmax.
    p = (z - top).mul_(_LOG2_E).exp2_()
    return p, p.sum(1), top


def _dot_classes(p: Tensor, by_class: Tensor) -> Tensor:
    """Sum of p times by_class over the classes, (B, X)."""
    if p.device.type == "cpu":
        return (by_class[:, None] @ p).squeeze(1)
    return (p * by_class[:, :, None]).sum(1)


# --- eager -------------------------------------------------------------------------------------


def full_class_sums(
    logits: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None, overlap: Overlap
) -> Sums:
    """The sums of each image, from logits of the size of the labels.

    Args:
        logits: Any floating dtype, shape (N, C, ...).
        target: int64, shape (N, ...), a class index everywhere.
        valid: Bool, shape (N, ...).
        weight: Weight of each pixel, shape (N, ...), or None.
        overlap: Which sums.

    Returns:
        The sums, whose groups are the images.
    """
    return Sums(*_Full.apply(logits, target, valid, weight, overlap))  # type: ignore[no-untyped-call]


class _Full(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        weight: Tensor | None,
        overlap: Overlap,
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums, _ = class_sums(*_flat(logits, target, valid, weight), overlap)
        ctx.save_for_backward(logits, target, valid, weight)
        ctx.overlap = overlap
        ctx.mark_non_differentiable(sums.counts)
        return sums.intersection, sums.predicted, sums.counts

    @staticmethod
    def backward(
        ctx: Any, by_intersection: Tensor, by_predicted: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_graph()
        logits, target, valid, weight = ctx.saved_tensors
        z, labels, scale = _flat(logits, target, valid, weight)
        grad = logit_gradient(
            z, labels, scale, by_intersection.to(z), by_predicted.to(z), ctx.overlap
        )
        return grad.view(logits.shape).to(logits.dtype), None, None, None, None


def _flat(
    logits: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`class_sums` takes, with the images as groups."""
    images, channels = logits.shape[:2]
    z = wide(logits).reshape(images, channels, target[0].numel() if images else 0)
    valid = valid.reshape(images, z.shape[2])
    scale = valid.to(z.dtype) if weight is None else masked(weight.reshape(valid.shape), valid, z)
    return z.masked_fill(~valid[:, None], 0), target.reshape(valid.shape), scale


def refuse_graph() -> None:
    """Raise RuntimeError under ``create_graph=True``, where autograd would see a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "The gradient of the region term cannot be differentiated again: call backward without "
            "create_graph=True. OhemCrossEntropyLoss alone has second derivatives."
        )


def masked(weight: Tensor, valid: Tensor, like: Tensor) -> Tensor:
    """The weights in the dtype of ``like``, 0 where not valid."""
    return torch.where(valid, weight.to(like.dtype), 0)
