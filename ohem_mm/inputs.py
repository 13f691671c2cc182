"""What the losses accept: types, shapes and labels, with an error that says what was meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tracing import can_look


def drop_channel(value: Tensor, dim: int) -> Tensor:
    """(N, 1, ...) to (N, ...), where ``dim`` is the number of dimensions wanted."""
    return value.squeeze(1) if value.dim() == dim + 1 and value.shape[1] == 1 else value


def check_tensors(**values: Any) -> None:
    """Raise TypeError, saying what to pass, unless these are tensors, or None where that may be."""
    for name, value in values.items():
        if isinstance(value, Tensor) or (value is None and name not in ("logits", "target")):
            continue
        hint = f"torch.as_tensor({name}) makes one of numbers"
        if name == "logits":
            hint = (
                "where a network returns more than its logits, take them out: output.logits, "
                "output['out'] or output[0]"
            )
        raise TypeError(f"{name} must be a torch.Tensor, but got {type(value).__name__}; {hint}.")


def checked_labels(logits: Tensor, target: Tensor, use_sigmoid: bool) -> Tensor:
    """Check types and shapes; return the labels in shape (N, ...)."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, but got {logits.dtype}.")
    if target.is_floating_point() or target.is_complex():
        raise TypeError(
            f"target must hold integer class indices, but got {target.dtype}; where its values are "
            "class indices, pass target.long()."
        )
    shapes = f"logits {tuple(logits.shape)} and target {tuple(target.shape)}"
    target = drop_channel(target, max(1, logits.dim() - 1))
    if logits.dim() < 2 or target.dim() != logits.dim() - 1 or logits.shape[0] != target.shape[0]:
        raise ValueError(f"Expected logits (N, C, ...) and target (N, ...), but got {shapes}.")
    size = target.shape[1:]
    if logits.shape[2:] != size:
        # Compilers would have to remember the answer for shapes that vary.
        if not torch.compiler.is_compiling() and _channels_last(logits.shape, size):
            raise ValueError(
                f"Expected logits (N, C, ...), but got {shapes}: the channels seem to be last. "
                "Pass logits.movedim(-1, 1); where they are not, upsample the logits before."
            )
        if any(a > b for a, b in zip(logits.shape[2:], size, strict=True)):
            raise ValueError(f"logits may not be spatially larger than target, but got {shapes}.")
        if len(size) > 3:
            raise ValueError(f"Only 1-D to 3-D maps can be upsampled, but got {shapes}.")
    if logits.shape[1] == 1 and not use_sigmoid:
        raise ValueError(
            f"The softmax over one channel is always 1, but got {shapes}. For a binary problem "
            "with labels 0 and 1 set use_sigmoid=True; else give each class a channel."
        )
    return target


def _channels_last(shape: torch.Size, size: torch.Size) -> bool:
    """Whether logits that would be upsampled fit the labels as (N, ..., C), not as (N, C, ...).

    Heads shrink all dimensions alike, up to rounding, or some of them less (volumes with thick
    slices). So logits are refused only where one stride explains the reading with the channels last
    and none the reading with the channels first. In 1-D any stride will do, and only logits of the
    labels' length are refused.
    """
    first, last = shape[2:], shape[1:-1]
    if len(size) == 1:
        return last == size
    return not _one_stride(first, size, 1) and _one_stride(last, size, 0.5)


def _one_stride(small: torch.Size, big: torch.Size, slack: float) -> bool:
    """Whether ``big / stride`` is ``small``, give or take ``slack``, in all dimensions."""
    least = max(b / (s + slack) for s, b in zip(small, big, strict=True))
    return all(s <= slack or least <= b / (s - slack) for s, b in zip(small, big, strict=True))


def wide_enough(target: Tensor, *values: int) -> Tensor:
    """The labels as they came, for a copy costs memory; int64 if their dtype lacks a value."""
    if target.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        held = torch.iinfo(target.dtype)
        if all(held.min <= value <= held.max for value in values):
            return target
    return target.long()


def check_classes(
    target: Tensor,
    valid: Tensor,
    num_classes: int,
    always_keep: Sequence[int],
    class_weight: Tensor | None,
    ignore_index: int,
    use_sigmoid: bool,
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
    if can_look(target) and target.numel():
        low, high = (int(bound) for bound in torch.where(valid, target, 0).aminmax())
        if low < 0 or high >= num_classes:
            bad = low if low < 0 else high
            hint = " With use_sigmoid, one channel knows the classes 0 and 1."
            raise ValueError(
                f"target holds label {bad}, which is neither a class (0 to {num_classes - 1}) nor "
                f"ignore_index ({ignore_index}).{hint if use_sigmoid and num_classes == 2 else ''}"
            )
