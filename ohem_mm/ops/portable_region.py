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
    options = PassOptions(overlap, None, count_hits, align_corners)
    out = Passes.apply(logits, target, valid, weight, options)  # type: ignore[no-untyped-call]
    return Sums(*out[:3]), out[3] if count_hits else None


def banded_pair(
    logits: Tensor, target: Tensor, valid: Tensor, options: PassOptions
) -> tuple[Sums, Tensor, Tensor, Tensor | None]:
    """The sums of each image and the cross-entropy of each pixel.

    Args:
        logits: As :func:`banded_class_sums` takes it.
        target: As there.
        valid: As there.
        options: What is wanted, with ``smoothing``.

    Returns:
        The sums; and ``mined``, ``loss`` and ``hits`` as :func:`ohem_mm.ops.pixel_cross_entropy`
        returns them.
    """
    out = Passes.apply(logits, target, valid, None, options)  # type: ignore[no-untyped-call]
    return pair_of(out, options)


class PassOptions(NamedTuple):
    """Settings of both passes.

    Attributes:
        overlap: Which sums.
        smoothing: Label smoothing of the cross-entropy; None where it is not wanted.
        count_hits: As :func:`banded_class_sums` takes it.
        align_corners: As there.
    """

    overlap: Overlap
    smoothing: float | None
    count_hits: bool
    align_corners: bool


def pair_of(
    out: tuple[Tensor, ...], options: PassOptions
) -> tuple[Sums, Tensor, Tensor, Tensor | None]:
    """What :func:`banded_pair` returns, of what the forward pass gives."""
    loss, mined = out[4:]
    hits = out[3] if options.count_hits else None
    return Sums(*out[:3]), mined if options.smoothing else loss.detach(), loss, hits


class Passes(torch.autograd.Function):
    """Both passes; ``ops.compiled`` makes operators of them."""

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        weight: Tensor | None,
        options: PassOptions,
    ) -> tuple[Tensor, ...]:
        """The three sums, the hits, and the loss with smoothing and without, or nothing."""
        overlap, smoothing, count_hits, align_corners = options
        source = Source(logits, target.shape[1:], align_corners)
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
        return *total, hits, loss, mined

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass needs."""
        *tensors, ctx.options = inputs
        _, _, counts, hits, loss, mined = output
        ctx.save_for_backward(*tensors, loss)
        ctx.mark_non_differentiable(counts, hits, mined)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *by_output: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradient by the logits, of the sums and the loss together."""
        refuse_graph()
        by_intersection, by_predicted, _, _, by_loss, _ = by_output
        grads = by_intersection, by_predicted, by_loss
        grad = Passes.gradient(grads, ctx.saved_tensors, ctx.options)
        return grad, None, None, None, None

    @staticmethod
    def gradient(
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        saved: tuple[Any, ...],
        options: PassOptions,
    ) -> Tensor:
        """The gradient by the logits, contiguous and in their dtype.

        Args:
            grads: Derivatives by ``intersection``, ``predicted`` and the loss.
            saved: The inputs of the forward pass, and its loss.
            options: As there.

        Returns:
            Shape (N, C, h, w).
        """
        by_intersection, by_predicted, by_loss = grads
        logits, target, valid, weight, loss = saved
        overlap, smoothing, _, align_corners = options
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
        return grad.to(logits.dtype)


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
