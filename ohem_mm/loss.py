"""Cross-entropy with online hard example mining (OHEM): the function and the configurable module.

Mining looks at the plain loss of each pixel; what is optimised is that loss times its weights, over
the pixels that are kept. The method is due to Shrivastava et al., "Training Region-based Object
Detectors with Online Hard Example Mining", CVPR 2016, in the thresholded form that segmentation
uses.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .mining import OURS, Habits, Pool, keep_mask, share_of, world_size, world_sum
from .ops import choose_backend, pixel_cross_entropy, triton
from .presets import preset_settings

Reduction = Literal["none", "mean", "sum"]
Average = Literal["kept", "valid", "all"]
Unit = Literal["batch", "image"]

# What other implementations call our settings; used in error messages only.
_FOREIGN = {
    "thres": "thresh",
    "threshold": "thresh",
    "ignore_label": "ignore_index",
    "ignore_lb": "ignore_index",
    "n_min": "min_kept",
    "weight": "class_weight",
    "avg_non_ignore": "avg='valid'",
}


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    thresh: float | None = 0.7,
    min_kept: int | float = 1 / 16,
    pool: Pool = "batch",
    min_kept_per: Unit = "batch",
    always_keep: Sequence[int] = (),
    avg: Average = "kept",
    weighted_mean: bool = False,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = 255,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    reduction: Reduction = "mean",
    habits: Habits = OURS,
    stats: dict[str, Any] | None = None,
) -> Tensor:
    """Cross-entropy over the hard pixels.

    A valid pixel (its label is not ``ignore_index``) is kept when its true class has probability
    below ``thresh``. If fewer than ``min_kept`` pixels are hard, the ``min_kept`` hardest are kept,
    with all ties. The loss is computed in float32 (float64 for float64 logits).

    Args:
        logits: Raw scores of any floating dtype, shape (N, C), (N, C, L), (N, C, H, W) or
            (N, C, D, H, W). Spatially smaller than ``target``, they are upsampled first.
        target: Class index of each pixel, any integer dtype, shape (N, ...) or (N, 1, ...).
        weight: Weight of each pixel, broadcastable to ``target``. It scales the loss; it does not
            take part in mining.
        thresh: Probability in (0, 1]. None: no threshold, the ``min_kept`` hardest alone.
        min_kept: Floor: an int in pixels, or a float in [0, 1] as a share of the pool's valid
            pixels, rounded down.
        pool: Over what the floor is counted: 'batch', each 'image', each ground-truth 'class', or
            'world', all ranks of a distributed run together. With 'world' the result, averaged over
            ranks as DistributedDataParallel averages gradients, is that of one big batch.
        min_kept_per: 'image' reads an int ``min_kept`` as pixels per image, pooled over the batch.
        always_keep: Classes whose valid pixels are always kept.
        avg: Divisor for reduction 'mean': number of 'kept' pixels, of 'valid' pixels, or of 'all'.
        weighted_mean: Where there are weights, divide by the sum of the weights of the pixels that
            ``avg`` counts, instead of by their number; ignored pixels weigh nothing.
        avg_factor: Divisor given by hand; overrides ``avg``.
        ignore_index: Label of pixels that do not count.
        use_sigmoid: Binary cross-entropy: one channel with labels {0, 1}, or C channels against
            the one-hot target, where a pixel's loss is the sum over its channels.
        class_weight: Weight of each class, shape (C,) (shape (2,) for one sigmoid channel).
        label_smoothing: Share of the target mass spread over the classes, in [0, 1), in the loss
            that is optimised. Mining ignores it.
        align_corners: As in ``torch.nn.functional.interpolate``, when upsampling.
        reduction: 'mean', 'sum', or 'none' for the map with 0 at pixels that are not kept.
        habits: Ways of other implementations, set by the presets.
        stats: A dict to be filled: 'num_valid' and 'hits', the number of valid pixels whose class
            has the highest logit; and the masks 'valid' and 'kept' and the unweighted loss 'mined',
            each of shape (N, ...). The Triton path has no such maps: where it would be used, they
            are filled only if the key 'kept' is there already, and another path is used then.
            Nothing is read back to the host.

    Returns:
        A scalar, or for ``reduction='none'`` a map of shape (N, ...). It is always connected to
        ``logits``: where nothing is kept it is 0 and so are all gradients.

    Raises:
        ValueError: On settings out of range, shapes that do not fit, or, on the CPU, a label that
            is neither a class nor ``ignore_index``.
        TypeError: On logits that are not floating point or labels that are not integers.
    """
    check_settings(
        thresh=thresh,
        min_kept=min_kept,
        pool=pool,
        min_kept_per=min_kept_per,
        always_keep=always_keep,
        avg=avg,
        reduction=reduction,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
    )
    if reduction == "sum" and avg_factor is not None:
        raise ValueError("avg_factor divides a mean; it cannot be used with reduction='sum'.")
    target = _labels(logits, target)
    num_classes = 2 if use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    target = _wide_enough(target, num_classes, ignore_index)
    valid = target != ignore_index
    _check_classes(target, valid, num_classes, always_keep, class_weight, ignore_index)
    if weight is not None:
        weight = _drop_channel(weight, target.dim()).expand_as(target)
    if (
        choose_backend(logits, use_sigmoid) == "triton"
        and reduction != "none"
        and pool != "world"
        and habits == OURS
        and not (stats and "kept" in stats)
    ):
        # One pass from logits to loss; the maps of `stats` do not exist there.
        loss, hits, num_valid = triton.ohem(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            size=(target.shape[1], target.shape[2]),
            align_corners=align_corners,
            use_sigmoid=use_sigmoid,
            label_smoothing=label_smoothing,
            thresh=thresh,
            min_kept=min_kept,
            pool=pool,
            min_kept_per=min_kept_per,
            always_keep=always_keep,
            avg=avg,
            weighted_mean=weighted_mean,
            avg_factor=avg_factor,
            class_weight=class_weight,
            reduction=reduction,
            with_hits=stats is not None,
        )
        if stats is not None and hits is not None:
            stats.update(hits=hits, num_valid=num_valid)
        return loss

    mined, loss, hits = pixel_cross_entropy(
        logits,
        target,
        valid,
        use_sigmoid=use_sigmoid,
        label_smoothing=label_smoothing,
        align_corners=align_corners,
        count_hits=stats is not None,
    )
    scale = None
    if class_weight is not None:
        scale = class_weight.to(loss)[torch.where(valid, target, 0).long()]
    if weight is not None:
        weight = weight.to(loss)
        scale = weight if scale is None else scale * weight
    if scale is not None:
        loss = loss * scale
    keep = keep_mask(
        mined * scale if habits.mine_weighted and scale is not None else mined,
        target,
        valid,
        num_classes,
        thresh=thresh,
        min_kept=min_kept,
        pool=pool,
        min_kept_per=min_kept_per,
        always_keep=always_keep,
        habits=habits,
    )
    loss = torch.where(keep, loss, 0)
    if stats is not None and hits is not None:
        stats.update(hits=hits, num_valid=valid.sum(), valid=valid, kept=keep, mined=mined)

    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if avg_factor is None:
        pixels = torch.ones_like(keep) if avg == "all" else keep if avg == "kept" else valid
        if weighted_mean and scale is not None:
            divisor = torch.where(pixels & valid, scale, 0).sum()
        else:
            divisor = pixels.sum().to(total.dtype)
        if habits.ignored_take_slots and isinstance(min_kept, float):
            everything = torch.full_like(divisor, keep.numel(), dtype=torch.long)
            divisor = torch.maximum(divisor, share_of(everything, min_kept).to(divisor.dtype))
        divisor = divisor + habits.eps * keep.numel()
        # Ranks average their gradients afterwards, so each takes its share of the divisor.
        divisor = world_sum(divisor, pool) / world_size(pool)
    else:
        divisor = torch.as_tensor(avg_factor, dtype=total.dtype, device=total.device)
    return total / torch.where(divisor > 0, divisor, 1)


def _with_preset(init: Callable[..., None]) -> Callable[..., None]:
    """Let the settings of ``preset`` stand in for the arguments that were not given."""

    @functools.wraps(init)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("preset") is not None:
            given = inspect.signature(init).bind_partial(self, *args, **kwargs).arguments
            settings = preset_settings(kwargs["preset"])
            kwargs |= {name: settings[name] for name in settings.keys() - given.keys()}
        init(self, *args, **kwargs)

    return wrapped


class OhemCrossEntropyLoss(nn.Module):
    """Cross-entropy with online hard example mining, for decode heads and plain PyTorch.

    Importing ``ohem_mm`` registers it in the root registry of OpenMMLab, so that a config of
    mmseg, mmdet or mmpretrain can say ``loss_decode=dict(type='OhemCrossEntropyLoss')``.

    Args:
        preset: Rule of another implementation, a key of ``ohem_mm.presets.PRESETS``. It replaces
            the defaults; whatever else is given wins.
        thresh: See :func:`ohem_cross_entropy`, as for all settings that only refer there.
        min_kept: See :func:`ohem_cross_entropy`.
        pool: See :func:`ohem_cross_entropy`.
        min_kept_per: See :func:`ohem_cross_entropy`.
        always_keep: See :func:`ohem_cross_entropy`.
        avg: See :func:`ohem_cross_entropy`.
        weighted_mean: See :func:`ohem_cross_entropy`.
        ignore_index: Label of pixels that do not count. None: the one that the head passes, else
            255.
        use_sigmoid: See :func:`ohem_cross_entropy`.
        class_weight: Weight of each class, as a sequence, or a file that holds one (.npy, .json,
            .yaml, .pkl).
        label_smoothing: See :func:`ohem_cross_entropy`.
        align_corners: See :func:`ohem_cross_entropy`.
        reduction: See :func:`ohem_cross_entropy`.
        loss_weight: Factor on the result.
        loss_name: Name in the log. mmseg optimises only entries whose name contains 'loss', so it
            must start with ``loss_``.
        habits: See :func:`ohem_cross_entropy`.
        **unknown: Refused, with the name that was probably meant.

    Raises:
        ValueError: On a setting out of range.
        TypeError: On an unknown keyword or a setting of the wrong type.

    Example:
        >>> loss = OhemCrossEntropyLoss(thresh=0.7, min_kept=1 / 16)
        >>> logits, labels = torch.randn(2, 19, 64, 64), torch.randint(0, 19, (2, 64, 64))
        >>> loss(logits, labels).shape
        torch.Size([])
    """

    class_weight: Tensor | None

    @_with_preset
    def __init__(
        self,
        thresh: float | None = 0.7,
        min_kept: int | float = 1 / 16,
        pool: Pool = "batch",
        min_kept_per: Unit = "batch",
        always_keep: Sequence[int] = (),
        avg: Average = "kept",
        weighted_mean: bool = False,
        ignore_index: int | None = None,
        use_sigmoid: bool = False,
        class_weight: Sequence[float] | str | os.PathLike[str] | None = None,
        label_smoothing: float = 0.0,
        align_corners: bool = False,
        reduction: Reduction = "mean",
        loss_weight: float = 1.0,
        loss_name: str = "loss_ohem",
        habits: Habits = OURS,
        preset: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise TypeError(_unknown_keyword(next(iter(unknown))))
        check_settings(
            thresh=thresh,
            min_kept=min_kept,
            pool=pool,
            min_kept_per=min_kept_per,
            always_keep=always_keep,
            avg=avg,
            reduction=reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
        )
        if not isinstance(loss_name, str) or not loss_name.startswith("loss_"):
            raise ValueError(f"loss_name must start with 'loss_', but got {loss_name!r}.")
        if not _is_number(loss_weight) or not 0 <= loss_weight < math.inf:
            raise ValueError(f"loss_weight must be a finite number >= 0, but got {loss_weight!r}.")
        self.thresh = thresh
        self.min_kept = min_kept
        self.pool = pool
        self.min_kept_per = min_kept_per
        self.always_keep = tuple(always_keep)
        self.avg = avg
        self.weighted_mean = weighted_mean
        self.ignore_index = ignore_index
        self.use_sigmoid = use_sigmoid
        self.label_smoothing = label_smoothing
        self.align_corners = align_corners
        self.reduction = reduction
        self.loss_weight = loss_weight
        self.habits = habits
        self.preset = preset
        self._loss_name = loss_name
        # Not persistent: a checkpoint holds the same keys with this loss as with any other.
        weights = None if class_weight is None else torch.tensor(_load_class_weight(class_weight))
        self.register_buffer("class_weight", weights, persistent=False)

    def forward(
        self,
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        ignore_index: int | None = None,
        reduction_override: Reduction | None = None,
        align_corners: bool | None = None,
        stats: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Compute the loss, called as heads of mmseg and mmdet call theirs.

        Args:
            pred: Logits, shape (N, C, ...).
            target: Labels, shape (N, ...) or (N, 1, ...), any integer dtype.
            weight: Weight of each pixel, broadcastable to ``target``.
            avg_factor: Divisor given by hand.
            ignore_index: Used when the loss was built without one.
            reduction_override: Used instead of the reduction that the loss was built with.
            align_corners: Used instead of the setting that the loss was built with.
            stats: See :func:`ohem_cross_entropy`.
            **kwargs: Whatever else a head passes; not used.

        Returns:
            A scalar, or for reduction 'none' a map of shape (N, ...).
        """
        if self.ignore_index is not None:
            ignore_index = self.ignore_index
        loss = ohem_cross_entropy(
            pred,
            target,
            weight,
            thresh=self.thresh,
            min_kept=self.min_kept,
            pool=self.pool,
            min_kept_per=self.min_kept_per,
            always_keep=self.always_keep,
            avg=self.avg,
            weighted_mean=self.weighted_mean,
            avg_factor=avg_factor,
            ignore_index=255 if ignore_index is None else ignore_index,
            use_sigmoid=self.use_sigmoid,
            class_weight=self.class_weight,
            label_smoothing=self.label_smoothing,
            align_corners=self.align_corners if align_corners is None else align_corners,
            reduction=self.reduction if reduction_override is None else reduction_override,
            habits=self.habits,
            stats=stats,
        )
        return self.loss_weight * loss

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> OhemCrossEntropyLoss:
        """Build the loss with the rule of another implementation.

        Args:
            name: A key of ``ohem_mm.presets.PRESETS``.
            **overrides: Settings that win over those of the preset.

        Returns:
            The loss, as ``OhemCrossEntropyLoss(preset=name, **overrides)`` builds it.
        """
        return cls(preset=name, **overrides)

    @property
    def loss_name(self) -> str:
        """Name of this loss in the log."""
        return self._loss_name

    def extra_repr(self) -> str:
        """Settings that differ from the defaults, and always thresh and min_kept."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = getattr(self, name, parameter.default)
            if isinstance(value, Tensor):
                value = value.tolist()
            if name in ("thresh", "min_kept") or value != parameter.default:
                shown.append(f"{name}={value!r}")
        return ", ".join(name for name in shown if not name.startswith(("self=", "unknown=")))


def check_settings(
    *,
    thresh: float | None,
    min_kept: int | float,
    pool: str,
    min_kept_per: str,
    always_keep: Sequence[int],
    avg: str,
    reduction: str,
    label_smoothing: float,
    ignore_index: int | None,
) -> None:
    """Raise ValueError or TypeError, naming the value and what is allowed, on a bad setting."""
    if thresh is not None and not (_is_number(thresh) and 0 < thresh <= 1):
        raise ValueError(f"thresh must be None or a probability in (0, 1], but got {thresh!r}.")
    if not _is_number(min_kept):
        raise TypeError(
            f"min_kept must be an int (pixels) or a float (share of the valid pixels), but got "
            f"{min_kept!r}."
        )
    if not min_kept >= 0 or (isinstance(min_kept, float) and min_kept > 1):
        raise ValueError(
            f"min_kept must be an int >= 0 (pixels) or a float in [0, 1] (share of the valid "
            f"pixels), but got {min_kept!r}."
        )
    for name, value, allowed in (
        ("pool", pool, get_args(Pool)),
        ("min_kept_per", min_kept_per, get_args(Unit)),
        ("avg", avg, get_args(Average)),
        ("reduction", reduction, get_args(Reduction)),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    if isinstance(always_keep, str) or not isinstance(always_keep, Sequence):
        raise TypeError(f"always_keep must be a list of class indices, but got {always_keep!r}.")
    for cls in always_keep:
        if not _is_int(cls) or cls < 0:
            raise ValueError(f"always_keep must hold class indices >= 0, but got {cls!r}.")
    if not _is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), but got {label_smoothing!r}.")
    if ignore_index is not None and not _is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int or None, but got {ignore_index!r}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unknown_keyword(name: str) -> str:
    allowed = list(inspect.signature(OhemCrossEntropyLoss.__init__).parameters)[1:-1]
    near = difflib.get_close_matches(name, allowed, n=1)
    meant = _FOREIGN.get(name) or (near[0] if near else None)
    hint = f" Did you mean {meant}?" if meant else ""
    return (
        f"OhemCrossEntropyLoss got an unknown keyword {name!r}.{hint} "
        f"Allowed: {', '.join(allowed)}."
    )


def _load_class_weight(source: Sequence[float] | str | os.PathLike[str]) -> list[float]:
    """Class weights from a sequence or a file, checked."""
    values: Any = source
    if isinstance(source, str | os.PathLike):
        path = os.fspath(source)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"class_weight names a file that does not exist: {path!r}.")
        if path.endswith(".npy"):
            import numpy as np

            values = np.load(path)
        else:
            try:
                from mmengine import load
            except ImportError as error:
                raise ImportError(
                    f"Reading class_weight from {path!r} needs mmengine; without it, pass a list "
                    "or a .npy file."
                ) from error
            values = load(path)
    weights = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if weights.dim() != 1 or not len(weights):
        raise ValueError(
            f"class_weight must hold one weight for each class, but got shape "
            f"{tuple(weights.shape)}."
        )
    if not (weights.isfinite() & (weights >= 0)).all():
        raise ValueError(f"class_weight must be finite and >= 0, but got {weights.tolist()}.")
    return list(map(float, weights))


def _drop_channel(value: Tensor, dim: int) -> Tensor:
    """(N, 1, ...) to (N, ...), where ``dim`` is the number of dimensions wanted."""
    return value.squeeze(1) if value.dim() == dim + 1 and value.shape[1] == 1 else value


def _labels(logits: Tensor, target: Tensor) -> Tensor:
    """Check types and shapes; return the labels in shape (N, ...)."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, but got {logits.dtype}.")
    if target.is_floating_point() or target.is_complex():
        raise TypeError(f"target must hold integer class indices, but got {target.dtype}.")
    shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
    target = _drop_channel(target, max(1, logits.dim() - 1))
    if logits.dim() < 2 or target.dim() != logits.dim() - 1 or len(logits) != len(target):
        raise ValueError(f"Expected logits (N, C, ...) and target (N, ...), but got {shapes}.")
    size = target.shape[1:]
    if any(a > b for a, b in zip(logits.shape[2:], size, strict=True)):
        raise ValueError(f"logits may not be spatially larger than target, but got {shapes}.")
    if logits.shape[2:] != size and len(size) > 3:
        raise ValueError(f"Only 1-D to 3-D maps can be upsampled, but got {shapes}.")
    return target


def _wide_enough(target: Tensor, *values: int) -> Tensor:
    """The labels as they came, for a copy costs memory; int64 if their dtype lacks a value."""
    if target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        held = torch.iinfo(target.dtype)
        if all(held.min <= value <= held.max for value in values):
            return target
    return target.long()


def _check_classes(
    target: Tensor,
    valid: Tensor,
    num_classes: int,
    always_keep: Sequence[int],
    class_weight: Tensor | None,
    ignore_index: int,
) -> None:
    """Check what depends on the number of classes."""
    for cls in always_keep:
        if cls >= num_classes:
            raise ValueError(f"always_keep names class {cls}, but there are {num_classes} classes.")
    if class_weight is not None and class_weight.shape != (num_classes,):
        raise ValueError(
            f"class_weight has shape {tuple(class_weight.shape)}, but there are {num_classes} "
            "classes."
        )
    # Free on the CPU. On an accelerator a look would stall the queue; indexing asserts there.
    if target.device.type == "cpu" and target.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in torch.where(valid, target, 0).aminmax())
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            raise ValueError(
                f"target holds label {bad}, which is neither a class (0 to {num_classes - 1}) nor "
                f"ignore_index ({ignore_index})."
            )
