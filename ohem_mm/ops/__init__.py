"""Per-pixel losses with hand-written gradients, and the choice between their implementations.

Nothing here knows OpenMMLab.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from . import triton
from .eager import full_cross_entropy, wide
from .portable import banded_cross_entropy
from .portable_region import banded_class_sums, banded_pair
from .region import Overlap, Sums, full_class_sums

__all__ = [
    "BACKENDS",
    "Overlap",
    "Shared",
    "Sums",
    "choose_backend",
    "class_sums",
    "pixel_cross_entropy",
    "shared_pass",
    "triton",
]

BACKENDS = ("portable", "triton", "eager")
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def choose_backend(logits: Tensor, use_sigmoid: bool = False, sums: bool = False) -> str:
    """The implementation to use for these logits.

    ``triton`` is the path of the GPU. Before its first use for a dtype and a number of channels, it
    has to agree with ``portable`` on small batches there. ``portable`` works in bands of rows
    and never holds the upsampled logits; it is the default for 2-D maps elsewhere. ``eager`` holds
    them; it is the default for all other shapes and under ``torch.compile``. The environment
    variable ``OHEM_MM_BACKEND`` names the one that is wanted; where it cannot work, one line is
    logged and another is used.

    Args:
        logits: Shape (N, C, ...).
        use_sigmoid: Whether the loss is binary cross-entropy.
        sums: Whether it is for :func:`class_sums`, which has kernels and a trial of its own.

    Returns:
        A name out of ``BACKENDS``.

    Raises:
        ValueError: ``OHEM_MM_BACKEND`` names no implementation.
    """
    wanted = os.environ.get("OHEM_MM_BACKEND")
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(
            f"OHEM_MM_BACKEND must be one of {', '.join(BACKENDS)}, but got {wanted!r}."
        )
    if torch.compiler.is_compiling() or logits.dim() != 4:
        return "eager"
    if wanted is None:
        wanted = "triton" if logits.is_cuda and triton.available(logits) else "portable"
    if wanted != "triton":
        return wanted
    if not triton.available(logits):
        trouble: str | None = f"cannot take {logits.dtype} on {logits.device.type}"
    elif logits.is_cuda and torch.cuda.is_current_stream_capturing():
        trouble = None  # a trial would end the capture; the warm-up before it was one
    else:
        try:
            what = (logits.device, logits.dtype, logits.shape[1])
            trouble = _sums_trial(*what) if sums else _trial(*what, use_sigmoid)
        except triton.UndecidedError as error:
            trouble = str(error)  # not remembered: the next call tries again
    if trouble:
        _say_once(f"triton {trouble}")
        return "portable"
    return "triton"


@cache
def _trial(device: torch.device, dtype: torch.dtype, channels: int, sigmoid: bool) -> str | None:
    return triton.trial(device, dtype, channels, sigmoid)


@cache
def _sums_trial(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    return triton.sums_trial(device, dtype, channels)


@cache
def _say_once(reason: str) -> None:
    logging.getLogger("ohem_mm").warning("%s; using portable.", reason)


def pixel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    use_sigmoid: bool = False,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    count_hits: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-entropy of every pixel, in float32 (float64 for float64 logits).

    Logits smaller than the labels are upsampled. Unlike in
    ``torch.nn.functional.cross_entropy``, a pixel that is not valid takes no part: where the logits
    have the size of the labels, NaN there changes neither a value nor a gradient. A non-finite loss
    makes a NaN gradient, so that gradient scalers and anomaly detection see it.

    Args:
        logits: Any floating dtype, shape (N, C, ...), spatially at most as large as ``target``.
        target: Any integer dtype, shape (N, ...), in [0, C) where valid ({0, 1} for C = 1 with
            sigmoid).
        valid: Bool, shape (N, ...).
        use_sigmoid: Binary cross-entropy: of the one channel, or of all channels against the
            one-hot target, summed over the channels.
        label_smoothing: Share s of the target mass spread evenly over the classes, in [0, 1).
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        ``mined``, the loss without smoothing, detached, for deciding what is hard, and ``loss``,
        which carries the gradient; both have shape (N, ...) and are 0 where not valid. And
        ``hits``, int64, the number of valid pixels whose class has the highest logit, or None.
    """
    if choose_backend(logits, use_sigmoid) != "eager":
        return banded_cross_entropy(
            logits,
            target,
            valid,
            use_sigmoid=use_sigmoid,
            label_smoothing=label_smoothing,
            align_corners=align_corners,
            count_hits=count_hits,
        )
    logits = _upsampled(logits, target.shape[1:], align_corners)
    target = torch.where(valid, target, 0).long()
    mined, loss = full_cross_entropy(
        logits, target, valid, use_sigmoid=use_sigmoid, label_smoothing=label_smoothing
    )
    hits = (valid & (logits.detach().argmax(1) == target)).sum() if count_hits else None
    return mined, loss, hits


def class_sums(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    overlap: Overlap,
    *,
    ignore_index: int,
    align_corners: bool = False,
    count_hits: bool = False,
) -> tuple[Sums, Tensor | None]:
    """Sums over the pixels of each image, for overlap losses, in float64 (on MPS in float32).

    Logits smaller than the labels are upsampled. What stands at a pixel that is not valid changes
    nothing, as in :func:`pixel_cross_entropy`, and a valid pixel whose cross-entropy is not finite
    makes a sum NaN.

    Args:
        logits: As :func:`pixel_cross_entropy` takes it.
        target: As there.
        valid: As there.
        weight: Weight of each pixel, shape (N, ...), or None.
        overlap: Which sums.
        ignore_index: Label of the pixels that are not valid.
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        The sums, whose groups are the images; and ``hits`` as :func:`pixel_cross_entropy` returns
        it.
    """
    backend = choose_backend(logits, overlap.use_sigmoid, sums=True)
    size = (target.shape[1], target.shape[2]) if target.dim() == 3 else None
    if backend == "triton" and size and not triton.region_refusal(logits, size, weight, overlap):
        return triton.class_sums(
            logits,
            target,
            weight,
            overlap,
            ignore_index=ignore_index,
            size=size,
            align_corners=align_corners,
            with_hits=count_hits,
        )
    if backend != "eager":
        return banded_class_sums(
            logits,
            target,
            valid,
            weight,
            overlap,
            align_corners=align_corners,
            count_hits=count_hits,
        )
    logits = _upsampled(logits, target.shape[1:], align_corners)
    target = torch.where(valid, target, 0).long()
    hits = (valid & (logits.detach().argmax(1) == target)).sum() if count_hits else None
    return full_class_sums(logits, target, valid, weight, overlap), hits


class Shared(NamedTuple):
    """What one pass over the pixels gave, for several losses of the same logits.

    Attributes:
        overlap: What ``sums`` are of.
        label_smoothing: Smoothing of ``loss``.
        sums: As :func:`class_sums` gives them.
        mined: As :func:`pixel_cross_entropy` gives it.
        loss: Likewise.
        hits: Likewise.
    """

    overlap: Overlap
    label_smoothing: float
    sums: Sums
    mined: Tensor
    loss: Tensor
    hits: Tensor | None


def shared_pass(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    overlap: Overlap,
    *,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    count_hits: bool = False,
) -> Shared | None:
    """The cross-entropy of every pixel and the sums of every class, at the price of little more.

    Args:
        logits: As :func:`pixel_cross_entropy` takes it.
        target: As there.
        valid: As there.
        overlap: Which sums.
        label_smoothing: Smoothing of the cross-entropy.
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        Both; or None where this backend has no common pass.
    """
    if choose_backend(logits, overlap.use_sigmoid) != "portable":
        return None
    sums, mined, loss, hits = banded_pair(
        logits,
        target,
        valid,
        overlap,
        label_smoothing=label_smoothing,
        align_corners=align_corners,
        count_hits=count_hits,
    )
    return Shared(overlap, label_smoothing, sums, mined, loss, hits)


def _upsampled(logits: Tensor, size: torch.Size, align_corners: bool) -> Tensor:
    """Logits of the size of the labels; in float32 even for half precision, if upsampled."""
    if logits.shape[2:] == size:
        return logits
    mode = _INTERPOLATION[len(size)]
    return F.interpolate(wide(logits), size=size, mode=mode, align_corners=align_corners)
