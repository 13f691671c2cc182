"""Tables of edge cases: what each implementation does where most of them break.

``ohem`` has the cases and implementations of the OHEM loss, ``region`` those of overlap losses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Describe = Callable[[Tensor, Tensor], str]


def tried(loss: Callable[[Tensor], Any], logits: Tensor, describe: Describe) -> str:
    """Run one implementation on one case and say what came out.

    Args:
        loss: The implementation, with everything but the logits given.
        logits: The logits.
        describe: What is said of a loss and of its gradient by the logits.

    Returns:
        The cell. An exception is named; of a NotImplementedError, the message is shown.
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
    head: Iterable[str], cases: Mapping[str, Any], row: Callable[[str, Any], Iterable[str]]
) -> str:
    """A table in Markdown, with a row for each case.

    Args:
        head: The implementations.
        cases: The cases by name.
        row: The cells of a case, given its name and itself.

    Returns:
        The table.
    """
    rows = [["", *head]]
    rows.append(["---"] * len(rows[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows += [[name, *row(name, case)] for name, case in cases.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
