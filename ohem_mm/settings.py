"""How the losses take their settings: keywords of a rule, options, class weights; checked once."""

from __future__ import annotations

import difflib
import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from .rule import OhemRule, RegionRule, check_choice, is_int, is_number

Reduction = Literal["none", "mean", "sum"]


def shows_settings(
    rule: type[OhemRule | RegionRule],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Show the fields of a rule, by name, in a signature that takes them as a whole."""

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(init)
        first, *own = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
        shown = [
            inspect.Parameter(f.name, first.kind, default=f.default, annotation=str(f.type))
            for f in fields(rule)
            if f.init
        ]
        init.__signature__ = signature.replace(parameters=[first, *shown, *own])  # type: ignore[attr-defined]
        return init

    return decorate


_Rule = TypeVar("_Rule", OhemRule, RegionRule)


def settle(
    base: _Rule,
    in_order: tuple[Any, ...],
    settings: dict[str, Any],
    loss: type[nn.Module],
    foreign: dict[str, str],
) -> _Rule:
    """The rule with the settings that a loss was given, by name or in order."""
    names = [field.name for field in fields(base) if field.init]
    for name in settings:
        if name not in names:
            raise TypeError(unknown_keyword(name, loss, foreign))
    if len(in_order) > len(names):
        raise TypeError(f"At most {len(names)} settings go without a name: {', '.join(names)}.")
    for name, value in zip(names, in_order, strict=False):
        if name in settings:
            raise TypeError(f"{name} is given twice: {value!r} and {settings[name]!r}.")
        settings[name] = value
    return replace(base, **settings)


def check_naming(loss_name: str, loss_weight: float) -> None:
    """Raise ValueError where mmseg would not optimise the loss, or its weight is none."""
    if not isinstance(loss_name, str) or not loss_name.startswith("loss_"):
        raise ValueError(f"loss_name must start with 'loss_', but got {loss_name!r}.")
    if not is_number(loss_weight) or not 0 <= loss_weight < math.inf:
        raise ValueError(f"loss_weight must be a finite number >= 0, but got {loss_weight!r}.")


def changed_settings(loss: nn.Module, always: Sequence[str]) -> str:
    """Settings of a loss that differ from the defaults, and some always, for its repr."""
    shown = []
    for name, parameter in inspect.signature(type(loss).__init__).parameters.items():
        value = getattr(loss, name, parameter.default)
        if isinstance(value, Tensor):
            value = value.tolist()
        if name in always or value != parameter.default:
            shown.append(f"{name}={value!r}")
    return ", ".join(shown)


def setting(name: str) -> property:
    """A setting of the rule as an attribute of the loss; setting it makes a new rule."""

    def get(loss: Any) -> Any:
        return getattr(loss.rule, name)

    def set_(loss: Any, value: Any) -> None:
        loss.rule = replace(loss.rule, **{name: value})

    return property(get, set_)


def check_options(reduction: str, label_smoothing: float, ignore_index: int | None) -> None:
    """Raise ValueError or TypeError, naming the value and what is allowed, on a bad option."""
    check_choice("reduction", reduction, get_args(Reduction))
    if not is_number(label_smoothing) or not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), but got {label_smoothing!r}.")
    if ignore_index is not None and not is_int(ignore_index):
        raise TypeError(f"ignore_index must be an int or None, but got {ignore_index!r}.")


def unknown_keyword(name: str, loss: type[nn.Module], foreign: dict[str, str]) -> str:
    """What to say of a keyword that a loss does not have, with the one that was probably meant."""
    allowed = list(inspect.signature(loss.__init__).parameters)[1:-1]
    near = difflib.get_close_matches(name, allowed, n=1)
    meant = foreign.get(name) or (near[0] if near else None)
    hint = f" Did you mean {meant}?" if meant else ""
    return f"{loss.__name__} got an unknown keyword {name!r}.{hint} Allowed: {', '.join(allowed)}."


def load_class_weight(source: Sequence[float] | str | os.PathLike[str]) -> list[float]:
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
