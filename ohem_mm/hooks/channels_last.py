"""Keep the weights of convolutions in channels_last order."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

__all__ = ["ChannelsLastHook"]


@HOOKS.register_module()
class ChannelsLastHook(Hook):  # type: ignore[misc]
    """Move the model to ``torch.channels_last``, for training, validation and testing.

    Convolutions hand the order on, so all feature maps follow the weights. The numbers are the
    same up to rounding; only the time changes: less on CPUs, and on GPUs in half precision. In
    other networks than convolutional ones it does nothing.

    Checkpoints and their weights are not affected: the order is no part of a shape.

    Example:
        >>> custom_hooks = [dict(type='ChannelsLastHook')]
    """

    def before_run(self, runner: Any) -> None:
        """Change the order of all 4-D weights, in place, before weights are loaded into them."""
        runner.model.to(memory_format=torch.channels_last)
