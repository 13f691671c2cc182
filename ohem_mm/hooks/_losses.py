"""The losses that the hooks look after, by the names under which they are logged."""

from __future__ import annotations

from typing import Any, TypeVar

from mmengine.model import is_model_wrapper
from torch import nn

from ..loss import OhemCrossEntropyLoss
from ..region import RegionLoss

_Loss = TypeVar("_Loss", bound=nn.Module)


def unwrap(model: Any) -> nn.Module:
    """The model inside DistributedDataParallel and the like."""
    while is_model_wrapper(model):
        model = model.module
    inner: nn.Module = model
    return inner


def losses_of(head: Any) -> list[nn.Module]:
    """The losses of a decode head of mmseg."""
    found = head.loss_decode
    return list(found) if isinstance(found, nn.ModuleList) else [found]


def ohem_losses(model: nn.Module) -> dict[str, OhemCrossEntropyLoss]:
    """Every :class:`OhemCrossEntropyLoss` of a model.

    Args:
        model: A segmentor, or any other model; wrapped or not.

    Returns:
        The losses by name, in the order of the model. The name is that of the head
        (``decode_head``, ``auxiliary_head.0``); where a head has several of these losses, their
        places in its list are appended (``decode_head.1``). Outside decode heads it is the name of
        the loss module.
    """
    return _by_name(model, OhemCrossEntropyLoss)


def region_losses(model: nn.Module) -> dict[str, RegionLoss]:
    """Every :class:`RegionLoss` of a model, named as :func:`ohem_losses` names its own."""
    return _by_name(model, RegionLoss)


def _by_name(model: nn.Module, kind: type[_Loss]) -> dict[str, _Loss]:
    found: dict[str, dict[str, _Loss]] = {}
    for name, module in unwrap(model).named_modules():
        if isinstance(module, kind):
            head, _, place = name.partition("loss_decode")
            if not _ or place.count(".") > 1:
                head, place = name, ""
            found.setdefault(head.rstrip("."), {})[place] = module
    return {
        head + (place if len(losses) > 1 else "") or "loss": loss
        for head, losses in found.items()
        for place, loss in losses.items()
    }
