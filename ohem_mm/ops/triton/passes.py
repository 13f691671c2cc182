"""Both passes of the whole loss, without autograd: kernels launched in order."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...rule import OhemRule
from . import backward, floor, forward, geometry, mining
from .inner import Kind

# Plain cross-entropy: every pixel is kept, and nothing is searched.
PLAIN = OhemRule(None, 1.0)


class Settings(NamedTuple):
    """What the passes need to know besides tensors; see :func:`ohem_mm.ops.triton.ohem`."""

    rule: OhemRule
    align_corners: bool
    use_sigmoid: bool
    smoothing: float
    ignore_index: int = 255
    reduction: str = "mean"
    with_hits: bool = False
    tiling: geometry.Tiling = geometry.TILING

    def kind(self, sizes: geometry.Sizes) -> Kind:
        """What the kernels are compiled for."""
        return Kind(
            full=sizes.full,
            align_corners=self.align_corners,
            sigmoid=self.use_sigmoid,
            single=self.use_sigmoid and sizes.classes == 1,
            smooth=self.smoothing > 0,
            hits=self.with_hits,
            hard=floor.has_floor(self.rule) and self.rule.pool != "class",
        )


class Passed(NamedTuple):
    """What the forward pass gives: three numbers, and what the backward pass needs.

    ``backward.Saved`` has the shapes of the last four.
    """

    loss: Tensor
    hits: Tensor
    valid: Tensor
    factor: Tensor
    normaliser: Tensor
    label: Tensor
    divisor: Tensor


def pixel_losses(
    logits: Tensor, target: Tensor, sizes: geometry.Sizes, settings: Settings
) -> tuple[forward.Maps, floor.State]:
    """What the forward kernel leaves of each pixel, and the state of the search for the floor."""
    kind, rule = settings.kind(sizes), settings.rule
    state = floor.make_state(logits, 2 if kind.single else sizes.classes, rule)
    maps = forward.run(
        logits,
        target.contiguous(),
        sizes,
        kind,
        ignore_index=settings.ignore_index,
        smoothing=settings.smoothing,
        limit=floor.limit_of(rule),
        state=state.all,
        plan=geometry.forward(sizes, settings.tiling),
    )
    return maps, state


def forward_pass(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    class_weight: Tensor | None,
    avg_factor: Tensor | float | None,
    settings: Settings,
) -> Passed:
    """Losses, mining and their mean; see :func:`ohem_mm.ops.triton.ohem`."""
    sizes = sizes_of(logits, target.shape[1:])
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        maps, state = pixel_losses(logits, target, sizes, settings)
        result = mining.run(
            maps,
            state,
            weight,
            class_weight,
            avg_factor,
            sizes,
            settings.kind(sizes),
            settings.rule,
            settings.reduction,
            plan=geometry.mining(sizes, settings.tiling),
        )
    return Passed(
        result.loss,
        result.hits,
        result.valid,
        maps.loss,
        maps.normaliser,
        maps.label,
        result.divisor,
    )


def backward_pass(
    grad_loss: Tensor, logits: Tensor, saved: Sequence[Tensor], settings: Settings
) -> Tensor:
    """Gradient of the logits from what the forward pass gave behind its three numbers."""
    kept = backward.Saved(*saved)
    sizes = sizes_of(logits, kept.label.shape[1:])
    with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
        return backward.run(
            logits,
            kept,
            grad_loss,
            sizes,
            settings.kind(sizes),
            settings.smoothing,
            geometry.backward(sizes, processors(logits.device), settings.tiling),
        )


def sizes_of(logits: Tensor, size: Sequence[int]) -> geometry.Sizes:
    """Sizes of logits and labels in one."""
    n, c, h, w = logits.shape
    return geometry.Sizes(n, c, h, w, int(size[0]), int(size[1]))


@lru_cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of an H100 where it has none."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count
