"""Per-pixel losses with hand-written gradients, and the choice between their implementations.

Nothing here knows OpenMMLab.
"""

from __future__ import annotations

import logging
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..rule import OhemRule
from ..tracing import is_traced, is_transformed
from . import triton
from .compiled import kept_cross_entropy
from .compiled_region import kept_class_sums, kept_pair
from .eager import full_cross_entropy, upsampled
from .portable import Options, banded_cross_entropy
from .portable_region import PassOptions, banded_class_sums, banded_pair
from .region import Overlap, Sums, full_class_sums
from .shared import Shared, Wanted, Whole

__all__ = [
    "BACKENDS",
    "Facts",
    "Overlap",
    "Shared",
    "Sums",
    "Wanted",
    "choose_backend",
    "class_sums",
    "decide",
    "pixel_cross_entropy",
    "shared_pass",
    "triton",
]

_F = TypeVar("_F", bound=Callable[..., Any])

BACKENDS = ("portable", "triton", "eager")


class Facts(NamedTuple):
    """What the choice of an implementation hangs on.

    Attributes:
        wanted: What ``OHEM_MM_BACKEND`` names, or None.
        maps: Logits have shape (N, C, H, W).
        transformed: They are within a transform of ``torch.func``.
        on_gpu: They are on a GPU that Triton compiles for.
        refusal: Why Triton's kernels cannot take this call, or None.
        verdict: What their trial on this device found: nothing wrong, '', or what is wrong. None:
            no trial has been decided.
        can_try: A trial can be held now.
        capturing: A CUDA graph is being captured.
    """

    wanted: str | None = None
    maps: bool = True
    transformed: bool = False
    on_gpu: bool = False
    refusal: str | None = None
    verdict: str | None = None
    can_try: bool = False
    capturing: bool = False


def decide(facts: Facts) -> tuple[str, str | None]:
    """The choice, from facts alone.

    Args:
        facts: What is known.

    Returns:
        A name out of ``BACKENDS``, or 'trial' where one has to be held first; and what is to be
        said in the log about Triton's kernels, or None.
    """
    if not facts.maps or facts.transformed:
        return "eager", None
    wanted = facts.wanted or ("triton" if facts.on_gpu else "portable")
    if wanted != "triton":
        return wanted, None
    if facts.refusal:
        return "portable", facts.refusal
    if facts.verdict is None:
        if facts.can_try:
            return "trial", None
        untried = "has not been tried before this graph is captured: run a step before"
        return "portable", untried if facts.capturing else None
    return ("portable", facts.verdict) if facts.verdict else ("triton", None)


def choose_backend(
    logits: Tensor,
    use_sigmoid: bool = False,
    *,
    size: torch.Size | None = None,
    constants: Iterable[Tensor | float | None] = (),
    rule: OhemRule | None = None,
    sums: Overlap | None = None,
) -> str:
    """The implementation to use for these logits.

    ``triton`` is the path of the GPU. Before its first use for a dtype and a number of channels, it
    has to pass a trial on the device, whose verdict is kept for the process; the sums of overlap
    losses have kernels, a trial and a verdict of their own. ``portable`` works in bands of rows and
    never holds the upsampled logits; it is the default for 2-D maps elsewhere. Both are single
    operators in a compiled or exported model; the sums of overlap losses take ``portable`` there.
    ``eager`` holds the upsampled logits; it is the default for all other shapes and within
    transforms of ``torch.func``. The environment variable ``OHEM_MM_BACKEND`` names the one that is
    wanted; where it cannot work, one line is logged and another is used.

    Args:
        logits: Shape (N, C, ...).
        use_sigmoid: Whether the loss is binary cross-entropy.
        size: Spatial size of the labels; None: that of the logits.
        constants: Tensors and numbers that Triton's kernels have no gradient for.
        rule: The rule, if one is to be applied.
        sums: What :func:`class_sums` is to sum, if that is what it is for; with ``rule``, beside
            the loss of that rule, in one pass.

    Returns:
        A name out of ``BACKENDS``.

    Raises:
        ValueError: ``OHEM_MM_BACKEND`` names no implementation.
    """
    wanted = _wanted()
    facts = Facts(wanted, logits.dim() == 4, is_transformed())
    # Most calls end here: what follows is asked on GPUs, or where somebody asks for Triton.
    if decide(facts)[0] == "eager" or not (
        wanted == "triton" or (wanted is None and logits.is_cuda)
    ):
        return decide(facts)[0]
    size = logits.shape[2:] if size is None else size
    facts = facts._replace(
        on_gpu=logits.is_cuda and triton.available(logits),
        refusal=triton.refusal(logits, size, constants, rule)
        if sums is None
        else triton.sums_refusal(logits, size, sums),
    )
    if decide(facts._replace(verdict=""))[0] == "triton":
        channels = operator.index(logits.shape[1])  # a number, even where compilers have a symbol
        form: _Form = use_sigmoid if sums is None else "sums" if rule is None else "pair"
        kind = (logits.device, logits.dtype, channels, form)
        if torch.compiler.is_dynamo_compiling():
            facts = facts._replace(verdict=_verdict_for_compiler(*kind))
        else:
            capturing = logits.is_cuda and not is_traced(logits) and _is_capturing(logits.device)
            facts = facts._replace(
                verdict=_VERDICTS.get(kind),
                can_try=not is_traced(logits) and not capturing,
                capturing=capturing,
            )
            if decide(facts)[0] == "trial":
                facts = facts._replace(verdict=_verdict(*kind), can_try=False)
    backend, trouble = decide(facts)
    if trouble:
        apart = sums is not None and rule is not None
        _say_once(f"triton {trouble}; {'losses run apart' if apart else 'using portable'}.")
    return backend


# What is tried: the loss by softmax or by sigmoid, the sums of overlap losses, or both in one pass.
_Form = bool | Literal["sums", "pair"]
_Kind = tuple[torch.device, torch.dtype, int, _Form]
_VERDICTS: dict[_Kind, str] = {}


def _verdict(device: torch.device, dtype: torch.dtype, channels: int, form: _Form) -> str | None:
    """What the trial of these kernels finds; held once, but again where nothing was decided."""
    kind = (device, dtype, channels, form)
    if kind not in _VERDICTS:
        try:
            if form == "sums":
                trouble = triton.sums_trial(device, dtype, channels)
            elif form == "pair":
                trouble = triton.pair_trial(device, dtype, channels)
            else:
                trouble = triton.trial(device, dtype, channels, form)
            _VERDICTS[kind] = trouble or ""
        except triton.UndecidedError as error:
            _say_once(f"triton {error}; using portable for now.")
            return None
    return _VERDICTS[kind]


def _constant_for_compiler(function: _F) -> _F:
    """A compiler calls the function while it traces, and keeps the answer.

    As ``torch.compiler.assume_constant_result`` does, which imports the compiler to say so.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant_for_compiler
def _verdict_for_compiler(*kind: Any) -> str | None:
    return _verdict(*kind)


@_constant_for_compiler
def _say_once(line: str) -> None:
    if line not in _SAID:
        _SAID.add(line)
        logging.getLogger("ohem_mm").warning(line)


_SAID: set[str] = set()


def _wanted() -> str | None:
    wanted = os.environ.get("OHEM_MM_BACKEND")
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(
            f"OHEM_MM_BACKEND must be one of {', '.join(BACKENDS)}, but got {wanted!r}."
        )
    return wanted


def _is_capturing(device: torch.device) -> bool:
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _in_bands(logits: Tensor) -> bool:
    """Whether the upsampled logits are to be left out, by whatever path."""
    return decide(Facts(_wanted(), logits.dim() == 4, is_transformed()))[0] != "eager"


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
    if _in_bands(logits):
        if is_traced(logits):
            options = Options(use_sigmoid, label_smoothing, align_corners, count_hits)
            return kept_cross_entropy(logits, target, valid, options)
        return banded_cross_entropy(
            logits,
            target,
            valid,
            use_sigmoid=use_sigmoid,
            label_smoothing=label_smoothing,
            align_corners=align_corners,
            count_hits=count_hits,
        )
    logits = upsampled(logits, target.shape[1:], align_corners)
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
    if is_transformed():
        raise RuntimeError("torch.func cannot transform the region term: it has no rules for it.")
    if is_traced(logits) and _in_bands(logits):  # Triton's kernels are no operator
        options = PassOptions(overlap, None, count_hits, align_corners)
        return kept_class_sums(logits, target, valid, weight, options)
    backend = choose_backend(logits, overlap.use_sigmoid, size=target.shape[1:], sums=overlap)
    if backend == "triton":
        return triton.class_sums(
            logits,
            target,
            weight,
            overlap,
            ignore_index=ignore_index,
            align_corners=align_corners,
            with_hits=count_hits,
        )
    if backend == "portable":
        return banded_class_sums(
            logits,
            target,
            valid,
            weight,
            overlap,
            align_corners=align_corners,
            count_hits=count_hits,
        )
    logits = upsampled(logits, target.shape[1:], align_corners)
    target = torch.where(valid, target, 0).long()
    hits = (valid & (logits.detach().argmax(1) == target)).sum() if count_hits else None
    return full_class_sums(logits, target, valid, weight, overlap), hits


def shared_pass(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    overlap: Overlap,
    wanted: Wanted,
    *,
    ignore_index: int,
    align_corners: bool = False,
    count_hits: bool = False,
) -> Shared | None:
    """The cross-entropy of every pixel and the sums of every class, at the price of little more.

    Args:
        logits: As :func:`pixel_cross_entropy` takes it.
        target: As there.
        valid: As there.
        overlap: Which sums.
        wanted: The loss beside them.
        ignore_index: Label of the pixels that are not valid.
        align_corners: As in ``torch.nn.functional.interpolate``.
        count_hits: Count the pixels that are classified correctly.

    Returns:
        Both; or None where this backend has no common pass.
    """
    backend = choose_backend(logits, overlap.use_sigmoid)
    if backend == "triton" and not is_traced(logits):
        return _whole_pass(logits, target, overlap, wanted, ignore_index, align_corners)
    if backend != "portable":
        return None
    pair = kept_pair if is_traced(logits) else banded_pair
    options = PassOptions(overlap, wanted.label_smoothing, count_hits, align_corners)
    sums, mined, loss, hits = pair(logits, target, valid, options)
    return Shared(overlap, wanted.label_smoothing, sums, hits, (mined, loss))


def _whole_pass(
    logits: Tensor,
    target: Tensor,
    overlap: Overlap,
    wanted: Wanted,
    ignore_index: int,
    align_corners: bool,
) -> Shared | None:
    """The sums and the whole loss on the GPU, or None where its kernels lack this pair."""
    rule, smoothing, class_weight, reduction, maps = wanted
    size = target.shape[1:]
    if (
        maps
        or reduction == "none"
        or (class_weight is not None and class_weight.requires_grad)
        or triton.pair_refusal(logits, size, overlap, rule, smoothing)
        or choose_backend(logits, size=size, rule=rule, sums=overlap) != "triton"
    ):
        return None
    sums, loss, hits, num_valid = triton.pair(
        logits,
        target,
        overlap,
        rule=rule,
        ignore_index=ignore_index,
        align_corners=align_corners,
        class_weight=class_weight,
        reduction=reduction,
    )
    return Shared(overlap, smoothing, sums, hits, whole=Whole(wanted, loss, hits, num_valid))
