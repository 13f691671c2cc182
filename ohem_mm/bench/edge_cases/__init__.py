"""Tables of edge cases: what each implementation does where most of them break.

``ohem`` has the cases and implementations of the OHEM loss, ``region`` those of overlap losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """Logits (1, C, H, W) and labels (1, H, W), with 255 for ignored, and what else is given."""

    logits: Tensor
    target: Tensor
    more: Mapping[str, Any] = {}


def tried(
    loss: Callable[[Tensor], Any], logits: Tensor, describe: Callable[[Tensor, Tensor], str]
) -> str:
    """What ``describe`` says of the loss of some logits and of its gradient, or what went wrong.

    An exception is named; of a NotImplementedError, the message is shown.
    """
    logits = logits.clone().requires_grad_()
    try:
        value = loss(logits)
        if not value.requires_grad:
            return f"{value.item():.3g}, no gradient"
        value.backward()
        return describe(
            value.detach(), torch.zeros_like(logits) if logits.grad is None else logits.grad
        )
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        return f"raises {type(error).__name__}"


def markdown(
    head: Iterable[str], cases: Mapping[str, Case], row: Callable[[str, Case], Iterable[str]]
) -> str:
    """A table in Markdown: a column for each implementation, and the ``row`` of each case."""
    rows = [["", *head]]
    rows.append(["---"] * len(rows[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows += [[name, *row(name, case)] for name, case in cases.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
