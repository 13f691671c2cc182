"""What the value of each loss of the speed benchmark must be, in float64."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ohem_mm import RegionLoss, ohem_cross_entropy, reference
from ohem_mm.bench.speed.problems import (
    IGNORE,
    SHARE,
    THRESH,
    Problem,
    Shape,
    check,
    make_problem,
    upsampled,
)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Choose an implementation of ``ohem_mm.ops``; None leaves the choice alone."""
    before = os.environ.get("OHEM_MM_BACKEND")
    if name is not None:
        os.environ["OHEM_MM_BACKEND"] = name
    try:
        yield
    finally:
        os.environ.pop("OHEM_MM_BACKEND", None)
        if before is not None:
            os.environ["OHEM_MM_BACKEND"] = before


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As mmseg averages it: over all pixels, ignored ones too."""
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / labels.numel()


def _probabilities(problem: Problem) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each image the probabilities, float64, (C, H, W), and the labels."""
    for image, labels in zip(problem.logits, problem.labels, strict=True):
        yield upsampled(image[None].double(), labels[None]).softmax(1)[0], labels


def _mmseg_dice(problem: Problem) -> Tensor:
    """DiceLoss of mmseg, in which what is predicted at ignored pixels counts."""
    losses = []
    for p, labels in _probabilities(problem):
        hit = p.gather(0, torch.where(labels == IGNORE, 0, labels)[None])[0]
        hit = torch.where(labels == IGNORE, 0, hit).sum()
        losses.append(1 - 2 * hit / (p.square().sum() + (labels != IGNORE).sum() + 2e-3))
    return torch.stack(losses).mean()


def _lovasz(problem: Problem) -> Tensor:
    """Lovasz extension of the Jaccard loss of each class present; Berman et al., CVPR 2018."""
    parts = [(p.float()[:, t != IGNORE], t[t != IGNORE]) for p, t in _probabilities(problem)]
    p, labels = torch.cat([p for p, _ in parts], 1), torch.cat([t for _, t in parts])
    losses = []
    for place, own in enumerate(p):
        hot = (labels == place).double()
        if hot.any():
            error, order = (hot - own).abs().sort(descending=True)
            missed = hot.sum() - hot[order].cumsum(0)
            jaccard = 1 - missed / (hot.sum() + (1 - hot[order]).cumsum(0))
            losses.append(error @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)))
    return torch.stack(losses).mean()


def _ohem(problem: Problem) -> Tensor:
    with backend("eager"):
        return ohem_cross_entropy(problem.pairs, problem.target, **RULE)


def _region(problem: Problem, preset: str | None = None) -> Tensor:
    with backend("portable"):
        value: Tensor = RegionLoss(preset=preset)(problem.logits.double(), problem.labels)
    return value


RULE: dict[str, Any] = {"thresh": THRESH, "min_kept": SHARE}
VALUES: dict[str, Callable[[Problem], Tensor]] = {
    "ohem": _ohem,
    "dice": _region,
    "smp dice": lambda p: _region(p, "smp-dice"),
    # Cross-entropy over the valid pixels, and as mmseg averages it.
    "ce": lambda p: F.cross_entropy(p.pairs, p.target, ignore_index=IGNORE),
    "mmseg ce": lambda p: cross_entropy(p.pairs, p.target),
    "mmseg sampler": lambda p: reference.mmseg_sampler(
        p.pairs, p.target, thresh=THRESH, min_kept=p.floor
    ),
    "mmseg top-k": lambda p: reference.mmseg_sampler_topk(p.pairs, p.target, min_kept=p.floor),
    "mmseg ohem": lambda p: reference.hrnet(
        p.pairs, p.target, thresh=THRESH, min_kept=p.floor * len(p.target)
    ),
    "mmseg dice": _mmseg_dice,
    "mmseg lovasz": _lovasz,
}


@torch.no_grad()
def expected(rule: str, problem: Problem) -> float:
    """The value of one of ``VALUES``, or of several that are joined by a plus."""
    return sum(float(VALUES[name](problem)) for name in rule.split(" + "))


def check_formula() -> None:
    """Compare the float64 paths that check our own providers with the oracle, on a small input."""
    problem = make_problem(Shape(2, 5, 24, 32, 4), "cpu")
    logits, labels = problem.logits.detach(), problem.labels
    oracle = reference.ohem_cross_entropy(logits, labels, **RULE)
    value = expected("ohem", problem)
    check("the float64 formula on a small input", value, float(oracle), tolerance=1e-9)
    oracle, value = reference.region_loss(logits, labels), expected("dice", problem)
    check("that of the overlap on a small input", value, float(oracle), tolerance=1e-9)
