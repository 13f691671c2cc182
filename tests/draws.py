"""Random problems for a preset and its original; with torch alone, for they are recorded too."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHTED = {
    "mmseg-sampler",
    "mmseg-sampler-topk",
    "hrnet",
    "torchseg",
    "paddleseg",
    "detectron2",
    "nnunet",
}
PURE_TOPK = {"mmseg-sampler-topk", "detectron2", "nnunet"}


class Draw(NamedTuple):
    """A problem, with the settings of the original as it reads them, and what is special in it."""

    logits: Tensor
    target: Tensor
    settings: dict[str, Any]
    kind: str


def draw(seed: int, name: str, dtype: torch.dtype) -> Draw:
    """A random problem, with settings that make the rule of this original matter."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    classes = pick([2, 3, 7])
    shape = (pick([1, 2, 3]), classes, pick([3, 4]), pick([5, 8]))
    target = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = pick(["smooth", "grid", "late"])
    if kind == "smooth":
        logits = noise * pick([0.1, 1.0, 5.0]) + hot * pick([0.0, 2.0, 6.0])
    elif kind == "grid":  # few values, so that many pixels tie
        logits = (noise * pick([0.6, 1.5])).round() + hot * pick([0.0, 1.0, 3.0])
    else:  # late in training: in float32 the loss of most pixels is 0; a few are wrong altogether
        hard = torch.rand((shape[0], 1, *shape[2:]), generator=generator) < pick([0.02, 0.1, 0.3])
        logits = torch.where(hard, noise * pick([1.0, 40.0]), hot * pick([18.0, 20.0, 30.0]))
    target[
        torch.rand(target.shape, generator=generator) < pick([0.0, 0.1, 0.5, 0.9] * 3 + [1.0])
    ] = 255

    valid = int((target != 255).sum())
    settings: dict[str, Any] = {}
    if name not in PURE_TOPK:
        settings["thresh"] = pick([0.3, 0.5, 0.7, 0.9])
    counts = [0, 1, 2, valid // 5, valid // 3 + 1, valid - 1, valid, valid + 5]
    if name in ("bisenet", "textbook"):
        settings["min_kept"] = 1 / 16
    elif name == "stdc":
        settings["min_kept"] = pick([1 / 16, *counts[:-3], target.numel() - 1])
    elif name == "detectron2":
        settings["min_kept"] = pick([0.02, 0.1, 0.2, 0.29, 0.57, 1.0])
    elif name == "nnunet":
        settings["min_kept"] = pick([5, 10, 29, 33.333333, 57, 100])
        settings["label_smoothing"] = pick([0.0, 0.1])
    elif name.startswith("mmseg"):
        images = len(target)
        settings["min_kept"] = pick([0, 1, 2, 3, valid // (5 * images) + 2, valid // (3 * images)])
    else:
        settings["min_kept"] = max(0, pick(counts))
    if name in WEIGHTED and pick([True, False]):
        settings["class_weight"] = (torch.rand(classes, generator=generator) + 0.2).to(dtype)
    return Draw(logits.to(dtype), target, settings, kind)


def fingerprint(gradient: Tensor) -> list[float]:
    """Three sums of a gradient with fixed random weights, for a record."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn((3, *gradient.shape), generator=generator, dtype=torch.float64)
    return (weights * gradient.double()).flatten(1).sum(1).tolist()
