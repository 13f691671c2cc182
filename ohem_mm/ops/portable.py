"""Upsampling and per-pixel cross-entropy in row bands: plain torch, any device.

The logits at the size of the labels never exist. Each band of output rows is interpolated, reduced
to one loss per pixel and dropped; the backward pass interpolates it again. Bilinear interpolation
is a product with one matrix for the columns and one for the rows, so both passes are small matrix
products, and the result does not depend on the size of the bands.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .eager import one_hot, wide

# Elements of a band. On the CPU it stays in the cache; elsewhere launches cost more than memory.
_BAND = {"cpu": 2**19}
_BAND_ELSEWHERE = 2**24


def banded_cross_entropy(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    count_hits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of every pixel of the labels, from logits of their size or smaller.

    Args:
        logits: Any floating dtype, shape (N, C, h, w).
        target: Any integer dtype, shape (N, H, W), H >= h and W >= w, a class index where valid.
        valid: Bool, shape (N, H, W).
        use_sigmoid: See :func:`ohem_mm.ops.pixel_cross_entropy`.
        label_smoothing: See :func:`ohem_mm.ops.pixel_cross_entropy`.
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        ``mined``, ``loss`` and ``hits`` as :func:`ohem_mm.ops.pixel_cross_entropy` returns them.
    """
    loss, mined, hits = _Banded.apply(  # type: ignore[no-untyped-call]
        logits, target, valid, use_sigmoid, label_smoothing, align_corners, count_hits
    )
    return mined if label_smoothing else loss.detach(), loss, hits if count_hits else None


class _Banded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        valid: Tensor,
        use_sigmoid: bool,
        smoothing: float,
        align_corners: bool,
        count_hits: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        loss = torch.empty(target.shape, dtype=dtype, device=logits.device)
        mined = torch.empty_like(loss) if smoothing else loss.new_empty(0)
        hits = torch.zeros((), dtype=torch.long, device=logits.device)
        for n, rows, z, _ in _bands(logits, target, align_corners, poison=True):
            ok = valid[n, rows]
            labels = torch.where(ok, target[n, rows], 0).long()
            if count_hits:
                # A label is at most C - 1, but 1 for one sigmoid channel, whose answer is always 0.
                true = z.gather(1, labels.clamp(max=z.shape[1] - 1)[:, None]).squeeze(1)
                hit = (true >= z.amax(1)) & (labels < z.shape[1])
                hits += (hit & ok).sum()
            if use_sigmoid:
                hot = one_hot(z, labels)
                plain = F.binary_cross_entropy_with_logits(z, hot, reduction="none").sum(1)
                if smoothing:
                    hot = hot * (1 - smoothing) + smoothing / 2
                    smooth = F.binary_cross_entropy_with_logits(z, hot, reduction="none").sum(1)
            else:
                log_p = z.log_softmax(1)
                plain = -log_p.gather(1, labels[:, None]).squeeze(1)
                if smoothing:
                    smooth = (1 - smoothing) * plain - smoothing * log_p.mean(1)
            loss[n, rows] = torch.where(ok, smooth if smoothing else plain, 0)
            if smoothing:
                mined[n, rows] = torch.where(ok, plain, 0)
        ctx.save_for_backward(logits, target, valid, loss)
        ctx.options = use_sigmoid, smoothing, align_corners
        ctx.mark_non_differentiable(mined, hits)
        return loss, mined, hits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        logits, target, valid, loss = ctx.saved_tensors
        use_sigmoid, smoothing, align_corners = ctx.options
        size, small = target.shape[1:], logits.shape[2:]
        on_cpu = logits.device.type == "cpu"
        grad = torch.zeros_like(logits, dtype=loss.dtype, memory_format=torch.contiguous_format)
        columns = None
        if small != size:
            columns = _weights(small[1], size[1], align_corners, loss).T
        for n, rows, z, lerp in _bands(logits, target, align_corners, poison=False):
            ok, band = valid[n, rows], loss[n, rows]
            # band - band is 0, or NaN where the loss is not finite.
            weight = torch.where(ok, grad_loss[n, rows] + (band - band), 0)
            if on_cpu and not weight.any():
                continue  # nothing in this band is kept
            labels = torch.where(ok, target[n, rows], 0).long()
            g = _logit_gradient(z, labels, use_sigmoid, smoothing)
            g *= weight[:, None]
            if lerp is None or columns is None:
                g.masked_fill_(~ok[:, None], 0)
                grad[n, :, rows] = g.transpose(0, 1)
            else:
                near, mix = lerp
                part = (mix.T @ g.flatten(1)).view(-1, *g.shape[1:])  # (small rows, C, W)
                grad[n, :, near] += (part @ columns).transpose(0, 1)
        return grad.to(logits.dtype), *[None] * 6


def _logit_gradient(z: Tensor, labels: Tensor, use_sigmoid: bool, smoothing: float) -> Tensor:
    """Derivative of each pixel's loss by its logits, (rows, C, W)."""
    if use_sigmoid:
        return z.sigmoid() - (one_hot(z, labels) * (1 - smoothing) + smoothing / 2)
    g = z.softmax(1)
    true = g.gather(1, labels[:, None]) - (1 - smoothing)
    g.scatter_(1, labels[:, None], true)
    if smoothing:
        g -= smoothing / z.shape[1]
    return g


def _bands(
    logits: Tensor, target: Tensor, align_corners: bool, poison: bool
) -> Iterator[tuple[int, slice, Tensor, tuple[slice, Tensor] | None]]:
    """Walk over the images in bands of rows.

    A matrix product would spread a logit that is not finite over its whole row and column, as
    0 * NaN is NaN. So such logits are replaced, and with ``poison`` the pixels that they reach are
    set to NaN afterwards.

    Yields:
        The image; the rows of the band; its logits, (rows, C, W); and, when upsampling, the small
        rows that it mixes and the (rows, small rows) matrix that mixes them.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    (height, width), (h, w) = target.shape[1:], logits.shape[2:]
    budget = _BAND.get(logits.device.type, _BAND_ELSEWHERE)
    step = max(1, budget // max(1, logits.shape[1] * width))
    scaled = (h, w) != (height, width)
    if scaled:
        like = logits.new_empty(0, dtype=dtype)
        columns = _weights(w, width, align_corners, like)
        rows_matrix = _weights(h, height, align_corners, like).T
        near = _support(h, height, align_corners)
    for n in range(len(target) if target.numel() else 0):
        if scaled:
            image = wide(logits[n])
            broken = ~image.isfinite().all(0)
            # On the CPU a look is cheap; elsewhere it would stall the queue.
            reached = None
            if image.device.type != "cpu" or broken.any():
                image = image.nan_to_num(0, 0, 0)
                reached = broken.to(dtype) @ columns
            image = image.transpose(0, 1)  # (h, C, w)
        for top in range(0, height, step):
            rows = slice(top, min(top + step, height))
            if scaled:
                used = slice(near[rows.start][0], near[rows.stop - 1][1])
                mix = rows_matrix[rows, used]
                # Bands overlap by a small row or two; keeping all rows would cost more memory.
                wider = image[used] @ columns
                z = (mix @ wider.flatten(1)).view(-1, *wider.shape[1:])
                if poison and reached is not None:
                    z.masked_fill_((mix @ reached[used] > 0)[:, None], torch.nan)
                yield n, rows, z, (used, mix)
            else:
                yield n, rows, wide(logits[n, :, rows]).transpose(0, 1), None


def _weights(small: int, big: int, align_corners: bool, like: Tensor) -> Tensor:
    """Matrix (small, big) that interpolates a line, in the dtype and on the device of ``like``."""
    return _line(small, big, align_corners).to(like)


@lru_cache(maxsize=64)
def _line(small: int, big: int, align_corners: bool) -> Tensor:
    # Interpolating the identity gives torch's own weights, whatever the scale.
    unit = torch.eye(small, dtype=torch.float64)[None]
    return F.interpolate(unit, size=big, mode="linear", align_corners=align_corners)[0]


@lru_cache(maxsize=64)
def _support(small: int, big: int, align_corners: bool) -> list[tuple[int, int]]:
    """For each output position, the first input position that it mixes and the end of them."""
    used = _line(small, big, align_corners).T != 0
    first = used.int().argmax(1)
    return [(int(a), int(a + n)) for a, n in zip(first, used.sum(1), strict=True)]
