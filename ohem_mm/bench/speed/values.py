"""What the value of each loss of the speed benchmark must be, in float64."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ohem_mm import RegionLoss, ohem_cross_entropy, reference
from ohem_mm.bench.speed.problems import (
    IGNORE,
    SHARE,
    THRESH,
    Shape,
    Truth,
    check,
    make_problem,
    upsampled,
)

Rule = Callable[[Truth], Tensor]


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


def plain(truth: Truth) -> Tensor:
    """Cross-entropy of mmseg."""
    return cross_entropy(truth.pairs, truth.target)


def valid_mean(truth: Truth) -> Tensor:
    """Cross-entropy over the valid pixels."""
    return F.cross_entropy(truth.pairs, truth.target, ignore_index=IGNORE)


def ohem(truth: Truth) -> Tensor:
    """Our loss."""
    with backend("eager"):
        return ohem_cross_entropy(truth.pairs, truth.target, thresh=THRESH, min_kept=SHARE)


def sampler(truth: Truth) -> Tensor:
    """The sampler of mmseg."""
    return reference.mmseg_sampler(truth.pairs, truth.target, thresh=THRESH, min_kept=truth.floor)


def sampler_topk(truth: Truth) -> Tensor:
    """The same without a threshold."""
    return reference.mmseg_sampler_topk(truth.pairs, truth.target, min_kept=truth.floor)


def mmseg_ohem(truth: Truth) -> Tensor:
    """OhemCrossEntropy of mmseg."""
    k = truth.floor * len(truth.target)
    return reference.hrnet(truth.pairs, truth.target, thresh=THRESH, min_kept=k)


def dice(truth: Truth, preset: str | None = None) -> Tensor:
    """Our region term."""
    with backend("portable"):
        value: Tensor = RegionLoss(preset=preset)(truth.logits.double(), truth.labels)
    return value


def both(first: Rule, second: Rule) -> Rule:
    """The sum of two."""
    return lambda truth: first(truth) + second(truth)


def _probabilities(truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each image the probabilities, float64, (C, H, W), and the labels."""
    for image, labels in zip(truth.logits, truth.labels, strict=True):
        yield upsampled(image[None].double(), labels[None]).softmax(1)[0], labels


def mmseg_dice(truth: Truth) -> Tensor:
    """DiceLoss of mmseg, in which what is predicted at ignored pixels counts."""
    losses = []
    for p, labels in _probabilities(truth):
        hit = p.gather(0, torch.where(labels == IGNORE, 0, labels)[None])[0]
        hit = torch.where(labels == IGNORE, 0, hit).sum()
        losses.append(1 - 2 * hit / (p.square().sum() + (labels != IGNORE).sum() + 2e-3))
    return torch.stack(losses).mean()


def lovasz(truth: Truth) -> Tensor:
    """Lovasz extension of the Jaccard loss of each class present; Berman et al., CVPR 2018."""
    parts = [(p.float()[:, t != IGNORE], t[t != IGNORE]) for p, t in _probabilities(truth)]
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


def check_formula() -> None:
    """Compare the float64 paths that check our own providers with the oracle, on a small input."""
    problem = make_problem(Shape(2, 5, 24, 32, 4), "cpu")
    logits, labels = problem.logits.detach(), problem.labels
    oracle = reference.ohem_cross_entropy(logits, labels, thresh=THRESH, min_kept=SHARE)
    check("the float64 formula on a small input", float(ohem(problem.truth)), float(oracle), 1e-9)
    oracle = reference.region_loss(logits, labels)
    check("that of the overlap on a small input", float(dice(problem.truth)), float(oracle), 1e-9)
