"""The same trial of the region term: of its sums, and of the loss and the sums in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...mining import keep_pixels
from ..portable import banded_cross_entropy
from ..portable_region import banded_class_sums
from ..region import Overlap, Sums
from . import trial
from .trial import (
    LOSS_TOLERANCE,
    Case,
    hold,
    make_problem,
    make_rule,
    wrong_gradient,
    wrong_hits,
    wrong_loss,
    wrong_number,
)

# What the loss adds to a function of the sums.
_SHARE = 30.0


def sums_trial(
    class_sums: Callable[..., Any], device: torch.device, dtype: torch.dtype, channels: int
) -> str | None:
    """Compare the sums and their gradient with the portable path in float64 on the CPU.

    Args:
        class_sums: :func:`ohem_mm.ops.triton.class_sums`, which takes a ``tiling`` as well.
        device: Where to run.
        dtype: Of the logits: float16, bfloat16 or float32.
        channels: Number of channels of the logits.

    Returns:
        What is wrong, to be put behind the name of the path, or None.

    Raises:
        UndecidedError: As :func:`ohem_mm.ops.triton.trial.trial`.
    """

    def compare() -> str | None:
        for low, squared in ((trial.LOW, False), (trial.LOW, True), (trial.SIZE, False)):
            trouble = _compare_sums(class_sums, device, dtype, channels, low, squared)
            if trouble:
                what = "squares with weights, " if squared else ""
                return f"{trouble} ({what}{low} to {trial.SIZE})"
        return None

    return hold(compare, device)


def pair_trial(
    pair: Callable[..., Any], device: torch.device, dtype: torch.dtype, channels: int
) -> str | None:
    """The same of the sums together with the loss.

    Args:
        pair: :func:`ohem_mm.ops.triton.pair`, which takes a ``tiling`` as well.
        device: Where to run.
        dtype: Of the logits: float16, bfloat16 or float32.
        channels: Number of channels of the logits.

    Returns:
        What is wrong, to be put behind the name of the path, or None.

    Raises:
        UndecidedError: As :func:`ohem_mm.ops.triton.trial.trial`.
    """

    def compare() -> str | None:
        for case, squared in (
            (Case(False, "batch", True), False),
            (Case(False, "class", True), True),
            (Case(True, "image", False), False),
        ):
            trouble = _compare_pair(pair, device, dtype, channels, case, squared)
            if trouble:
                low = trial.SIZE if case.full else trial.LOW
                return f"{trouble} (a pair, floor of a {case.pool}, {low} to {trial.SIZE})"
        return None

    return hold(compare, device)


def _compare_sums(
    class_sums: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    low: tuple[int, int],
    squared: bool,
) -> str | None:
    start, target = make_problem(channels, False, low)
    start = start.to(dtype)
    exact = start.double().requires_grad_()
    overlap = Overlap(squared=squared)
    # Weights are a variant of the kernels, as squares are; one case has both.
    weight = None
    if squared:
        weight = torch.linspace(0, 2, target.numel(), device="cpu").view(target.shape)
    expected, expected_hits = banded_class_sums(
        exact, target, target != 255, weight, overlap, count_hits=True
    )
    (expected_grad,) = torch.autograd.grad(_function(expected), exact)
    logits = start.to(device).requires_grad_()
    sums, hits = class_sums(
        logits,
        target.to(device),
        None if weight is None else weight.to(device),
        overlap,
        ignore_index=255,
        align_corners=False,
        with_hits=True,
        tiling=trial.TILING,
    )
    (grad,) = torch.autograd.grad(_function(sums), logits)
    return (
        _wrong_sums(sums, expected)
        or wrong_hits(hits, expected_hits)
        or wrong_gradient(grad, expected_grad, " of sums")
    )


def _compare_pair(
    pair: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    case: Case,
    squared: bool,
) -> str | None:
    start, target = make_problem(channels, False, trial.SIZE if case.full else trial.LOW)
    start = start.to(dtype)
    exact = start.double().requires_grad_()
    overlap, valid = Overlap(squared=squared), target != 255
    class_weight = torch.linspace(1, 2, channels, device="cpu") if squared else None
    expected, expected_hits = banded_class_sums(
        exact, target, valid, None, overlap, count_hits=True
    )
    mined, pixels, _ = banded_cross_entropy(exact, target, valid)
    rule = make_rule(mined, target, valid, channels, case)
    kept = keep_pixels(mined.float(), target, valid, rule, channels)
    if class_weight is not None:
        pixels = pixels * class_weight.double()[torch.where(valid, target, 0)]
    expected_loss = kept.of(pixels).sum() / kept.total(pixels.dtype)
    total = _function(expected) + _SHARE * expected_loss
    (expected_grad,) = torch.autograd.grad(total, exact)

    logits = start.to(device).requires_grad_()
    sums, loss, hits, num_valid = pair(
        logits,
        target.to(device),
        overlap,
        rule=rule,
        ignore_index=255,
        align_corners=False,
        class_weight=class_weight,
        reduction="mean",
        tiling=trial.TILING,
    )
    (grad,) = torch.autograd.grad(_function(sums) + _SHARE * loss, logits)
    return (
        wrong_loss(loss, expected_loss)
        or wrong_number(num_valid, valid)
        or _wrong_sums(sums, expected)
        or wrong_hits(hits, expected_hits)
        or wrong_gradient(grad, expected_grad, " of sums")
    )


def _function(sums: Sums) -> Tensor:
    """Any function of the sums in which each of them has a share of its own."""
    shares = torch.linspace(
        -1, 2, 2 * sums.intersection.shape[1], dtype=torch.float64, device="cpu"
    )
    first, second = shares.to(sums.intersection.device).view(2, -1)
    total: Tensor = (sums.intersection * first + sums.predicted * second).sum()
    return total


def _wrong_sums(sums: Sums, expected: Sums) -> str | None:
    for name, found, wanted in zip(sums._fields, sums, expected, strict=True):
        error = float((found.cpu() - wanted).detach().abs().max())
        if not error <= LOSS_TOLERANCE * float(wanted.detach().abs().max()):
            return f"finds another {name} than portable, by {error:.2g}"
    return None
