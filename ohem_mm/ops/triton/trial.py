"""A trial of the kernels before their first use: do they agree with float64 on the CPU?

Compilers and drivers differ; a wrong gradient would go unnoticed for long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...mining import keep_pixels
from ...rule import OhemRule, Pool
from ..portable import banded_cross_entropy
from .geometry import Tiling

# Relative error of the gradient; the loss is float32 whatever the logits are.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 2e-4}
LOSS_TOLERANCE = 1e-4
# Sizes such that each kernel runs in several programs, some of which are not filled, and visits
# several tiles and rows in each.
LOW, SIZE = (3, 40), (16, 130)
TILING = Tiling(walk=2, programs=4)


class UndecidedError(RuntimeError):
    """A trial could not be held here and now; the next may be."""


class Case(NamedTuple):
    """One comparison: logits of full size or not, pool of the floor, and whether it is needed."""

    full: bool
    pool: Pool
    binds: bool


_CASES = (
    Case(False, "batch", True),
    Case(False, "batch", False),
    Case(False, "class", True),
    Case(True, "image", True),
)


def trial(
    ohem: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    use_sigmoid: bool,
) -> str | None:
    """Compare the kernels with the portable path in float64 on the CPU.

    Args:
        ohem: :func:`ohem_mm.ops.triton.ohem`, which takes a ``tiling`` as well.
        device: Where to run.
        dtype: Of the logits: float16, bfloat16 or float32.
        channels: Number of channels of the logits.
        use_sigmoid: Binary cross-entropies.

    Returns:
        What is wrong, to be put behind the name of the path, or None.

    Raises:
        UndecidedError: No memory is left, or tensors hold no data here (fake tensors).
    """

    def compare() -> str | None:
        for case in _CASES:
            low = SIZE if case.full else LOW
            trouble = _compare(ohem, device, dtype, channels, use_sigmoid, low, case)
            if trouble:
                return f"{trouble} (floor of a {case.pool}, {low} to {SIZE})"
        return None

    return hold(compare, device)


def hold(compare: Callable[[], str | None], device: torch.device) -> str | None:
    """Run a comparison whatever modes are on, and say what it raised."""
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
            torch.autocast("cpu", enabled=False),
        ):
            plain = torch.empty(0, device="cpu")
            if type(plain) is not Tensor:
                raise UndecidedError(f"tensors are {type(plain).__name__} here")
            return compare()
    except (torch.OutOfMemoryError, UndecidedError) as error:
        raise UndecidedError(f"could not be tried on {device}: {_first_line(error)}") from error
    except Exception as error:  # whatever the compiler or the driver raises
        return f"fails on {device} ({type(error).__name__}: {_first_line(error)})"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _compare(
    ohem: Callable[..., Any],
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    use_sigmoid: bool,
    low: tuple[int, int],
    case: Case,
) -> str | None:
    start, target = make_problem(channels, use_sigmoid, low)
    start = start.to(dtype)
    exact = start.double().requires_grad_()
    valid = target != 255
    mined, pixels, expected_hits = banded_cross_entropy(
        exact, target, valid, use_sigmoid=use_sigmoid, count_hits=True
    )
    labels = max(2, channels) if use_sigmoid else channels
    rule = make_rule(mined, target, valid, labels, case)
    # In float32 the pixels tie that do so by construction.
    kept = keep_pixels(mined.float(), target, valid, rule, labels)
    expected = kept.of(pixels).sum() / kept.total(pixels.dtype)
    (expected_grad,) = torch.autograd.grad(expected, exact)

    logits = start.to(device).requires_grad_()
    loss, hits, num_valid = ohem(
        logits,
        target.to(device),
        None,
        rule=rule,
        ignore_index=255,
        size=SIZE,
        align_corners=False,
        use_sigmoid=use_sigmoid,
        label_smoothing=0.0,
        avg_factor=None,
        class_weight=None,
        reduction="mean",
        with_hits=True,
        tiling=TILING,
    )
    (grad,) = torch.autograd.grad(loss, logits)
    return (
        wrong_loss(loss, expected)
        or wrong_gradient(grad, expected_grad)
        or wrong_number(num_valid, valid)
        or wrong_hits(hits, expected_hits)
    )


def wrong_loss(found: Tensor, expected: Tensor) -> str | None:
    """What is wrong with a loss, or None."""
    if math.isclose(found.item(), expected.item(), rel_tol=LOSS_TOLERANCE):
        return None
    return f"finds a loss of {found.item()} instead of {expected.item()}"


def wrong_gradient(found: Tensor, expected: Tensor, of: str = "") -> str | None:
    """What is wrong with a gradient ``of`` something, or None."""
    error = float((found.cpu().double() - expected).abs().max())
    if error <= TOLERANCE[found.dtype] * float(expected.abs().max()):
        return None
    return f"finds another gradient{of} than portable, by {error:.2g}"


def wrong_number(found: Tensor, valid: Tensor) -> str | None:
    """What is wrong with the number of valid pixels, or None."""
    if int(found) == int(valid.sum()):
        return None
    return f"finds {int(found)} valid pixels instead of {int(valid.sum())}"


def wrong_hits(found: Tensor, expected: Tensor | None) -> str | None:
    """What is wrong with the number of correct pixels, or None."""
    if expected is not None and abs(int(found) - int(expected)) <= 1:
        return None
    return f"finds {int(found)} correct pixels instead of {expected}"


def make_problem(channels: int, use_sigmoid: bool, low: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Logits and labels with many pixels of the same loss, which is larger than most others.

    Args:
        channels: Number of channels.
        use_sigmoid: Binary cross-entropies.
        low: Size of the logits.

    Returns:
        Logits, float32, shape (2, C, h, w), and labels, int64, shape (2, H, W), 255 where ignored;
        both on the CPU.
    """
    cpu = torch.device("cpu")
    generator = torch.Generator(cpu).manual_seed(0)
    labels = max(2, channels) if use_sigmoid else channels
    logits = 2 * torch.randn(2, channels, *low, generator=generator, device=cpu)
    target = torch.randint(labels, (2, *SIZE), generator=generator, device=cpu)
    zeros = torch.zeros(2, *low, dtype=torch.int64, device=cpu)
    losses, *_ = banded_cross_entropy(logits, zeros, zeros == 0, use_sigmoid=use_sigmoid)
    place = int(losses[0].flatten().sort().indices[low[0] * low[1] * 6 // 7])
    begin, end = low[1] // 4, low[1] // 2
    logits[:, :, :, begin:end] = logits[0].flatten(1)[:, place].clone()[None, :, None, None]
    target[:, :, SIZE[1] * begin // low[1] : SIZE[1] * end // low[1]] = 0
    target[0, :3] = 255
    return logits, target


def make_rule(mined: Tensor, target: Tensor, valid: Tensor, labels: int, case: Case) -> OhemRule:
    """A rule whose choice does not hang on rounding.

    Args:
        mined: float64, shape (2, H, W).
        target: Labels, shape (2, H, W).
        valid: Bool, shape (2, H, W).
        labels: Number of classes.
        case: Pool, and whether the floor is needed.
    """
    every = mined[valid].sort(descending=True).values
    if case.pool == "class":
        groups = [mined[valid & (target == label)] for label in range(labels)]
    elif case.pool == "image":
        groups = [loss[ok] for loss, ok in zip(mined, valid, strict=True)]
    else:
        groups = [every]
    if not case.binds:
        return OhemRule(_between(every, len(every) // 2), 0.25, case.pool)
    groups = [group.sort(descending=True).values for group in groups if group.numel()]
    values, counts = torch.unique(mined[valid].float(), return_counts=True)
    tied = values[counts.argmax()]
    spans = [((g.float() > tied).sum(), (g.float() >= tied).sum()) for g in groups]
    spans = [(int(above), int(down_to)) for above, down_to in spans if down_to - above > 1]
    first, last = max(above for above, _ in spans) + 1, min(down_to for _, down_to in spans) - 1
    step = max(1, (last - first) // 32)
    floor = _clearest(groups, range(first + step, max(first + step + 1, last), step))
    # A third of the floor is hard in the group that has most.
    least = max(float(group[min(floor // 3, len(group) - 1)]) for group in groups)
    return OhemRule(_between(every, int((every > least).sum())), floor, case.pool)


def _between(ordered: Tensor, rank: int) -> float:
    """A threshold near a rank, as a probability, that is far from any loss."""
    near = ordered[rank // 2 : rank + 2]
    widest = int((near[:-1] - near[1:]).argmax())
    return math.exp(-float(near[widest] + near[widest + 1]) / 2)


def _clearest(groups: list[Tensor], ranks: Iterable[int]) -> int:
    """The rank at which the nearest other loss is farthest, in the worst of the groups."""

    def gap(values: Tensor, rank: int) -> float:
        if rank >= len(values):
            return math.inf
        distance = (values - values[rank - 1]).abs()
        return float(distance[distance > 1e-9].min())

    return max(ranks, key=lambda rank: min(gap(values, rank) for values in groups))
