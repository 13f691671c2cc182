"""Mixed precision on any device, for mmengine's Runner. Needs mmengine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):  # type: ignore[misc]
    """Train in bfloat16 where autocast allows it, on a CPU as on a GPU.

    mmengine's ``AmpOptimWrapper`` refuses to work without a GPU. bfloat16 has the range of
    float32, so gradients do not underflow and nothing is scaled: weights, gradients and the state
    of the optimizer are float32, and checkpoints are those of ``OptimWrapper``, whose arguments it
    takes: ``optimizer``, ``accumulative_counts``, ``clip_grad``.

    Raises:
        RuntimeError: When training starts, on a GPU that has no bfloat16.

    Example:
        >>> optim_wrapper = dict(
        ...     type='Bf16OptimWrapper', optimizer=dict(type='AdamW', lr=0.01)
        ... )
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """The context of a training step: autocast on the device of the model."""
        device = next(model.parameters()).device.type
        if device == "cuda" and not torch.cuda.is_bf16_supported():
            raise RuntimeError(
                f"Bf16OptimWrapper: {torch.cuda.get_device_name()} has no bfloat16; use "
                "AmpOptimWrapper, which trains in float16."
            )
        context: Any = super().optim_context(model)
        with context, torch.autocast(device, dtype=torch.bfloat16):
            yield
