"""The losses that the hooks look after: their names in the log, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from mmengine.model import is_model_wrapper
from torch import nn

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


def heads_of(model: nn.Module) -> Iterator[tuple[str, Any, list[nn.Module]]]:
    """Name, module and losses of all that has losses as the decode heads of mmseg have them."""
    for name, head in model.named_modules():
        if isinstance(getattr(head, "loss_decode", None), nn.Module):
            yield name, head, losses_of(head)


def named_losses(model: nn.Module, kind: type[_Loss]) -> dict[str, _Loss]:
    """Every loss of one kind in a model, wrapped or not, by name and in its order.

    The name is that of the head (``decode_head``, ``auxiliary_head.0``); where a head has several
    of these losses, their places in its list are appended (``decode_head.1``). Outside decode heads
    it is the name of the loss module.
    """
    found: dict[str, dict[str, _Loss]] = {}
    for name, module in unwrap(model).named_modules():
        if isinstance(module, kind):
            head, inside, place = name.partition("loss_decode")
            if not inside or place.count(".") > 1:
                head, place = name, ""
            found.setdefault(head.rstrip("."), {})[place] = module
    return {
        head + (place if len(losses) > 1 else "") or "loss": loss
        for head, losses in found.items()
        for place, loss in losses.items()
    }


class Listener:
    """Hears how losses are called. True while it listens to any."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __bool__(self) -> bool:
        return bool(self._handles)

    def listen(
        self, loss: nn.Module, heard: Callable[[dict[str, Any]], None], maps: bool = False
    ) -> None:
        """Hear every call of a loss of this package from now on.

        ``heard`` is called afterwards with the arguments by name, among them always ``stats``; with
        ``maps`` these hold the maps as well.
        """
        forward = inspect.signature(type(loss).forward)

        def ask(loss: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            stats = {} if kwargs.get("stats") is None else kwargs["stats"]
            if maps:
                stats.setdefault("kept", None)
            return args, {**kwargs, "stats": stats}

        def hear(loss: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            heard(forward.bind(loss, *args, **kwargs).arguments)

        self._handles += [
            loss.register_forward_pre_hook(ask, with_kwargs=True),
            loss.register_forward_hook(hear, with_kwargs=True),
        ]

    def stop(self) -> None:
        """Leave the losses as they were."""
        while self._handles:
            self._handles.pop().remove()
