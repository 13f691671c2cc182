"""Upsampling and per-pixel cross-entropy in row bands: plain torch, any device.

The logits at the size of the labels never exist. Each band of output rows is interpolated, reduced
to one loss per pixel and dropped; the backward pass interpolates it again. Bilinear interpolation
is a product with one matrix for the columns and one for the rows, so both passes are small matrix
products, and the result does not depend on the size of the bands.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .eager import gradient_with_graph, logit_gradient, losses, wide

# Elements of a band. On the CPU it stays in the cache; elsewhere launches cost more than memory.
_BAND = {"cpu": 2**18}
_BAND_ELSEWHERE = 2**24
# Rows of a band at least: each band repeats the column interpolation of a small row or two.
_ROWS = 12

_T = TypeVar("_T")


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
    options = Options(use_sigmoid, label_smoothing, align_corners, count_hits)
    loss, mined, hits = Banded.apply(  # type: ignore[no-untyped-call]
        logits, target, valid, options
    )
    return mined if label_smoothing else loss.detach(), loss, hits if count_hits else None


class Options(NamedTuple):
    """Settings of both passes, as :func:`banded_cross_entropy` takes them."""

    use_sigmoid: bool
    smoothing: float
    align_corners: bool
    count_hits: bool


class Banded(torch.autograd.Function):
    """Both passes; ``ops.compiled`` makes operators of them."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, valid: Tensor, options: Options
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss with smoothing; without it, where that differs, else nothing; and the hits."""
        smoothing = options.smoothing
        source = Source(logits, target.shape[1:], options.align_corners)
        loss = torch.empty(target.shape, dtype=source.dtype, device=logits.device)
        mined = torch.empty_like(loss) if smoothing else loss.new_empty(0)

        def run(n: int, rows: slice) -> Tensor | int:
            z = source.band(n, rows, poison=True)
            ok = valid[n, rows]
            labels = torch.where(ok, target[n, rows], 0).long()
            plain, smooth = losses(z, labels, options.use_sigmoid, smoothing)
            loss[n, rows] = torch.where(ok, smooth, 0)
            if smoothing:
                mined[n, rows] = torch.where(ok, plain, 0)
            if not options.count_hits:
                return 0
            # A label is at most C - 1, but 1 for one sigmoid channel, whose answer is always 0.
            true = z.gather(1, labels.clamp(max=z.shape[1] - 1)[:, None]).squeeze(1)
            return ((true >= z.amax(1)) & (labels < z.shape[1]) & ok).sum()

        hits = torch.zeros((), dtype=torch.long, device=logits.device)
        hits += sum(source.for_each_band(run))
        return loss, mined, hits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the backward pass needs."""
        *tensors, ctx.options = inputs
        loss, mined, hits = output
        ctx.save_for_backward(*tensors, loss)
        ctx.mark_non_differentiable(mined, hits)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """The gradient; with a graph of its own, at full resolution, under ``create_graph``."""
        if grad_loss is None:
            return (None,) * 4
        if torch.is_grad_enabled():
            grad = gradient_with_graph(grad_loss, *ctx.saved_tensors, *ctx.options[:3])
        else:
            grad = Banded.gradient(grad_loss, ctx.saved_tensors, ctx.options)
        return grad, None, None, None

    @staticmethod
    def gradient(grad_loss: Tensor, saved: tuple[Tensor, ...], options: Options) -> Tensor:
        """The gradient by the logits, contiguous and in their dtype."""
        logits, target, valid, loss = saved
        use_sigmoid, smoothing, align_corners, _ = options
        source = Source(logits, target.shape[1:], align_corners)
        grad = torch.zeros_like(logits, dtype=loss.dtype, memory_format=torch.contiguous_format)
        on_cpu = logits.device.type == "cpu"

        def run(n: int, rows: slice) -> tuple[int, slice, Tensor] | None:
            ok, band = valid[n, rows], loss[n, rows]
            # band - band is 0, or NaN where the loss is not finite.
            weight = torch.where(ok, grad_loss[n, rows] + (band - band), 0)
            if on_cpu and not weight.any():
                return None  # nothing in this band is kept
            z = source.band(n, rows, poison=False)
            labels = torch.where(ok, target[n, rows], 0).long()
            g = logit_gradient(z, labels, use_sigmoid, smoothing)
            g *= weight[:, None]
            if not source.upsamples:
                g.masked_fill_(~ok[:, None], 0)
                grad[n, :, rows] = g.transpose(0, 1)
                return None
            return n, source.near(rows), source.reduce(g, rows)

        # Neighbouring bands share small rows, so their sums are added here, in order.
        for part in source.for_each_band(run):
            if part is not None:
                n, near, low = part
                grad[n, :, near] += low
        return grad.to(logits.dtype)


class Source:
    """The logits of a batch, upsampled a band of rows at a time.

    A matrix product would spread a logit that is not finite over its whole row and column, as
    0 * NaN is NaN. So such logits are replaced by 0, and the pixels that they reach are remembered.
    """

    def __init__(self, logits: Tensor, size: torch.Size, align_corners: bool) -> None:
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        self.height, self.width = size
        self.logits = logits
        self.upsamples = logits.shape[2:] != size
        self.reached: Tensor | None = None
        if not self.upsamples or not logits.numel():
            return
        h, w = logits.shape[2:]
        like = logits.new_empty(0, dtype=self.dtype)
        self.columns = _line(w, self.width, align_corners).to(like)  # (w, W)
        self.rows = _line(h, self.height, align_corners).T.to(like)  # (H, h)
        self.support = _support(h, self.height, align_corners)
        broken = ~logits.isfinite().all(1)
        # On the CPU a look is cheap; elsewhere it would stall the queue.
        if logits.device.type != "cpu" or broken.any():
            self.logits = logits.nan_to_num(0, 0, 0)
            self.reached = broken.to(self.dtype) @ self.columns  # (N, h, W)

    def near(self, rows: slice) -> slice:
        """The small rows that a band mixes."""
        return slice(self.support[rows.start][0], self.support[rows.stop - 1][1])

    def band(self, n: int, rows: slice, poison: bool) -> Tensor:
        """Logits of a band, (rows, C, W); with ``poison`` NaN where a broken logit reaches."""
        if not self.upsamples:
            return wide(self.logits[n, :, rows]).transpose(0, 1)
        near = self.near(rows)
        mix = self.rows[rows, near]
        # Bands overlap by a small row or two; keeping all of them would cost more memory.
        small = wide(self.logits[n, :, near]).transpose(0, 1)  # (small rows, C, w)
        wider = small.reshape(-1, small.shape[2]) @ self.columns
        z = (mix @ wider.view(len(small), -1)).view(-1, small.shape[1], self.width)
        if poison and self.reached is not None:
            z.masked_fill_((mix @ self.reached[n, near] > 0)[:, None], torch.nan)
        return z

    def reduce(self, g: Tensor, rows: slice) -> Tensor:
        """The transpose of :meth:`band`: (rows, C, W) to (C, small rows, w)."""
        mix = self.rows[rows, self.near(rows)]
        part = (mix.T @ g.flatten(1)).view(-1, self.width) @ self.columns.T
        return part.view(mix.shape[1], g.shape[1], -1).transpose(0, 1)

    def for_each_band(self, run: Callable[[int, slice], _T]) -> list[_T]:
        """Call ``run`` for every band of every image; results in order."""
        kind = self.logits.device.type
        images, channels = self.logits.shape[:2]
        if not images * self.height * self.width:
            return []
        budget = _BAND.get(kind, _BAND_ELSEWHERE)
        step = max(_ROWS, budget // max(1, channels * self.width))
        bands = [
            (n, slice(top, min(top + step, self.height)))
            for n in range(images)
            for top in range(0, self.height, step)
        ]

        def guarded(band: tuple[int, slice]) -> _T:
            # Both are states of a thread, and the threads of the pool have their own.
            with torch.no_grad(), torch.autocast(kind, enabled=False):
                return run(*band)

        threads = torch.get_num_threads()
        if kind != "cpu" or threads == 1 or len(bands) == 1:
            return [guarded(band) for band in bands]
        return list(_pool(threads, os.getpid()).map(guarded, bands))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that each run torch's operators on one core.

    A band is so small that torch's own threads would wait for each other after every operator, and
    for long where another process, such as a data loader, takes one of their cores.
    """
    ready = threading.Barrier(threads)

    def settle() -> None:
        torch.get_num_threads()  # a thread takes over the global number at its first question
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(threads, "ohem_mm", initializer=settle)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # for everybody else
    return pool


@lru_cache(maxsize=64)
def _line(small: int, big: int, align_corners: bool) -> Tensor:
    """Matrix (small, big), float64 on the CPU, that interpolates a line."""
    # Interpolating the identity gives torch's own weights, whatever the scale.
    unit = torch.eye(small, dtype=torch.float64, device="cpu")[None]
    return F.interpolate(unit, size=big, mode="linear", align_corners=align_corners)[0]


@lru_cache(maxsize=64)
def _support(small: int, big: int, align_corners: bool) -> list[tuple[int, int]]:
    """For each output position, the first input position that it mixes and the end of them."""
    used = _line(small, big, align_corners).T != 0
    first = used.int().argmax(1)
    return [(int(a), int(a + n)) for a, n in zip(first, used.sum(1), strict=True)]
