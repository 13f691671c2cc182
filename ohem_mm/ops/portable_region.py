"""The sums of overlap losses in row bands, alone or together with the per-pixel cross-entropy.

One pass over the bands gives both, and one pass their common gradient; upsampled logits never
exist, as in :mod:`ohem_mm.ops.portable`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .eager import losses
from .portable import Source
from .region import Overlap, Sums, class_sums, logit_gradient, masked, refuse_graph, sum_dtype


class CrossEntropy(NamedTuple):
    """What is wanted of the cross-entropy beside the sums.

    Attributes:
        smoothing: Label smoothing.
        count_hits: Count the pixels that are classified correctly.
    """

    smoothing: float = 0.0
    count_hits: bool = False


def banded_class_sums(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    overlap: Overlap,
    *,
    align_corners: bool = False,
    count_hits: bool = False,
) -> tuple[Sums, Tensor | None]:
    """The sums of each image, from logits of the size of the labels or smaller.

    Args:
        logits: Any floating dtype, shape (N, C, h, w).
        target: Any integer dtype, shape (N, H, W), H >= h and W >= w, a class index where valid.
        valid: Bool, shape (N, H, W).
        weight: Weight of each pixel, shape (N, H, W), or None.
        overlap: Which sums.
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        The sums, whose groups are the images, and the hits or None.
    """
    out = _Bands.apply(  # type: ignore[no-untyped-call]
        logits, target, valid, weight, _Options(overlap, None, count_hits, align_corners)
    )
    return Sums(*out[:3]), out[3] if count_hits else None


def banded_pair(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    overlap: Overlap,
    *,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    count_hits: bool = False,
) -> tuple[Sums, Tensor, Tensor, Tensor | None]:
    """The sums of each image and the cross-entropy of each pixel.

    Args:
        logits: As :func:`banded_class_sums` takes it, as for the other arguments.
        target: As there.
        valid: As there.
        overlap: Which sums.
        label_smoothing: Label smoothing of the cross-entropy.
        align_corners: As there.
        count_hits: As there.

    Returns:
        The sums; and ``mined``, ``loss`` and ``hits`` as :func:`ohem_mm.ops.pixel_cross_entropy`
        returns them.
    """
    options = _Options(overlap, label_smoothing, count_hits, align_corners)
    out = _Bands.apply(logits, target, valid, None, options)  # type: ignore[no-untyped-call]
    loss, mined = out[4:]
    return (
        Sums(*out[:3]),
        mined if label_smoothing else loss.detach(),
        loss,
        (out[3] if count_hits else None),
    )


class _Options(NamedTuple):
    overlap: Overlap
    smoothing: float | None  # of the cross-entropy; None: not wanted
    count_hits: bool
    align_corners: bool


class _Bands(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        weight: Tensor | None,
        options: _Options,
    ) -> tuple[Tensor, ...]:
        overlap, smoothing, count_hits, _ = options
        source = Source(logits, target.shape[1:], options.align_corners)
        pair = smoothing is not None
        loss = torch.empty(target.shape if pair else 0, dtype=source.dtype, device=logits.device)
        mined = torch.empty_like(loss) if smoothing else loss.new_empty(0)

        def run(n: int, rows: slice) -> tuple[int, Sums, Tensor | int]:
            z, labels, scale, ok = _band(source, target, valid, weight, n, rows, poison=True)
            sums, plain = class_sums(z, labels, scale, overlap)
            if smoothing is not None:
                if plain is None or smoothing:
                    plain, soft = losses(z, labels, overlap.use_sigmoid, smoothing)
                else:
                    soft = plain
                loss[n, rows] = torch.where(ok, soft, 0)
                if smoothing:
                    mined[n, rows] = torch.where(ok, plain, 0)
            hits: Tensor | int = 0
            if count_hits:
                # A label is at most C - 1, but 1 for one sigmoid channel, answered by 0 always.
                true = z.gather(1, labels.clamp(max=z.shape[1] - 1)[:, None]).squeeze(1)
                hits = ((true >= z.amax(1)) & (labels < z.shape[1]) & ok).sum()
            return n, Sums(*(part.sum(0) for part in sums)), hits

        classes = logits.shape[1]
        labels = 2 if overlap.use_sigmoid and classes == 1 else classes
        total = [
            torch.zeros(len(logits), width, dtype=sum_dtype(logits.device), device=logits.device)
            for width in (classes, classes, labels)
        ]
        hits = torch.zeros((), dtype=torch.long, device=logits.device)
        for n, sums, found in source.for_each_band(run):
            for whole, part in zip(total, sums, strict=True):
                whole[n] += part
            hits += found
        ctx.save_for_backward(logits, target, valid, weight, loss)
        ctx.options = options
        ctx.mark_non_differentiable(total[2], hits, mined)
        ctx.set_materialize_grads(False)
        return *total, hits, loss, mined

    @staticmethod
    def backward(
        ctx: Any,
        by_intersection: Tensor | None,
        by_predicted: Tensor | None,
        _counts: None,
        _hits: None,
        by_loss: Tensor | None,
        _mined: None,
    ) -> tuple[Tensor | None, ...]:
        refuse_graph()
        logits, target, valid, weight, loss = ctx.saved_tensors
        overlap, smoothing, _, align_corners = ctx.options
        source = Source(logits, target.shape[1:], align_corners)
        grad = torch.zeros_like(logits, dtype=source.dtype, memory_format=torch.contiguous_format)
        zero = grad.new_zeros(len(logits), logits.shape[1])
        a, b = (
            zero if by is None else by.to(source.dtype) for by in (by_intersection, by_predicted)
        )

        def run(n: int, rows: slice) -> tuple[int, slice, Tensor] | None:
            z, labels, scale, ok = _band(source, target, valid, weight, n, rows, poison=False)
            pixel = None
            if by_loss is not None and smoothing is not None:
                band = loss[n, rows]
                # band - band is 0, or NaN where the loss is not finite.
                pixel = torch.where(ok, by_loss[n, rows] + (band - band), 0)
            g = logit_gradient(
                z, labels, scale, a[n, None], b[n, None], overlap, pixel, smoothing or 0.0
            )
            if not source.upsamples:
                grad[n, :, rows] = g.transpose(0, 1)
                return None
            return n, source.near(rows), source.reduce(g, rows)

        # Neighbouring bands share small rows, so their sums are added here, in order.
        for part in source.for_each_band(run):
            if part is not None:
                n, near, low = part
                grad[n, :, near] += low
        return grad.to(logits.dtype), None, None, None, None


def _band(
    source: Source,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    n: int,
    rows: slice,
    poison: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, weights and valid pixels of a band; rows come first."""
    z = source.band(n, rows, poison)
    ok = valid[n, rows]
    if not source.upsamples or source.reached is not None:
        z = z.masked_fill(~ok[:, None], 0)  # what stands at ignored pixels may be anything
    labels = torch.where(ok, target[n, rows], 0).long()
    scale = ok.to(z.dtype) if weight is None else masked(weight[n, rows], ok, z)
    return z, labels, scale, ok
