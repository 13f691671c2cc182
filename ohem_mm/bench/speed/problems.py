"""Inputs of the speed benchmark, and what is known about them in float64."""

from __future__ import annotations

import argparse
import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ohem_mm.errors import UserError

SHAPES = {
    "cityscapes-s8": "4x19x1024x1024/8",
    "ade20k-s4": "16x150x512x512/4",
    "cpu": "2x19x512x1024/8",
}
THRESH, SHARE, IGNORE = 0.7, 1 / 16, 255
HARD = 0.2  # share of the pixels below the threshold, unless it is what a sweep varies
TOLERANCE = 1e-4  # relative; float32 may put a few pixels on the other side of the threshold


class WrongValueError(UserError):
    """A provider does not compute what it should."""


class Shape(NamedTuple):
    """Batch, classes and size of the labels, and the stride of the logits."""

    n: int
    c: int
    height: int
    width: int
    stride: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.height}x{self.width}/{self.stride}"

    @property
    def small(self) -> tuple[int, int]:
        """Size of the logits."""
        return self.height // self.stride, self.width // self.stride

    @property
    def pixels(self) -> int:
        """Of the labels."""
        return self.n * self.height * self.width

    @property
    def image(self) -> str:
        """Size of the images of an iteration."""
        return f"{self.n}x{self.height}x{self.width}"


def image_floor(pixels: int) -> int:
    """Pixels of an image of so many that are kept at least: the sampler's reading of ``SHARE``."""
    return max(2, int(pixels * SHARE))


def parse_shape(text: str) -> Shape:
    """A name of ``SHAPES`` or NxCxHxW/stride."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)/(\d+)", SHAPES.get(text, text))
    if found is None:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW/stride or one of {', '.join(SHAPES)}, but got {text!r}"
        )
    shape = Shape(*map(int, found.groups()))
    if min(shape) < 1 or not 2 <= shape.c < IGNORE or min(shape.small) < 1:
        raise argparse.ArgumentTypeError(
            f"a shape needs 2 to {IGNORE - 1} classes and a stride no larger than the image, but "
            f"got {text!r}"
        )
    return shape


def parse_image(text: str) -> Shape:
    """NxHxW, the images of an iteration; the shipped networks have 19 classes."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected NxHxW, but got {text!r}")
    n, height, width = map(int, found.groups())
    return Shape(n, 19, height, width, 8)


@dataclass(frozen=True)
class Problem:
    """Logits and labels, and what is known of them in float64.

    Attributes:
        logits: float32, (N, C, h, w).
        labels: int64, (N, H, W).
        pairs: Logits of two channels with the same loss and true-class probability as those of the
            upsampled logits, float64, (N, 2, H, W). Rules of mining look at nothing else.
        target: The labels of ``pairs``: 0, or ``IGNORE``.
        accuracy: In per cent.
        hard: Share of the valid pixels below the threshold.
        unsure: Pixels that float32 may put on the other side of it, as a share of those.
    """

    logits: Tensor
    labels: Tensor
    pairs: Tensor
    target: Tensor
    accuracy: float
    hard: float
    unsure: float

    @property
    def floor(self) -> int:
        """Pixels of one image that are kept at least."""
        return image_floor(self.labels[0].numel())


def make_labels(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Labels in patches of 8 x 8 cells, of which one in twenty is ignored; int64.

    First at the size of the logits, without ignored ones, (N, 1, h, w), then full, (N, H, W).
    """
    h, w = shape.small
    grid = (shape.n, 1, math.ceil(h / 8), math.ceil(w / 8))
    patches = torch.randint(0, shape.c, grid, generator=generator).float()
    ignored = torch.rand(grid, generator=generator) < 0.05
    ignored.view(-1)[0] = False
    small = F.interpolate(patches, size=(h, w), mode="nearest")
    full = F.interpolate(
        patches.masked_fill(ignored, IGNORE), size=(shape.height, shape.width), mode="nearest"
    )
    return small.long(), full[:, 0].long()


def make_problem(shape: Shape, device: str, hard: float = HARD) -> Problem:
    """Noise plus a margin for the true class, such that about ``hard`` of the pixels are hard."""
    generator = torch.Generator().manual_seed(0)
    small, labels = make_labels(shape, generator)
    noise = torch.randn(shape.n, shape.c, *shape.small, generator=generator)
    hot = torch.zeros_like(noise).scatter_(1, small, 1)

    # The margin is found on a corner of the first images.
    part = (slice(4), slice(None), *(slice(min(24, size)) for size in shape.small))
    corner = labels[:4, : 24 * shape.stride, : 24 * shape.stride]
    low, high = -10.0, 40.0
    for _ in range(16):
        margin = (low + high) / 2
        too_hard = measure(noise[part] + margin * hot[part], corner).hard > hard
        low, high = (margin, high) if too_hard else (low, margin)
    leaf = (noise + margin * hot).to(device).requires_grad_()
    return measure(leaf, labels.to(device))


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """What mmseg's resize does, without its checks."""
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)


@torch.no_grad()
def measure(logits: Tensor, labels: Tensor) -> Problem:
    """Upsample and compute cross-entropy in float64, one image at a time."""
    losses, hits = [], 0
    valid = labels != IGNORE
    for image, label, ok in zip(logits, labels, valid, strict=True):
        wide = upsampled(image[None].double(), label[None])
        index = torch.where(ok, label, 0)[None]
        losses.append(F.cross_entropy(wide, index, reduction="none"))
        hits += int(((wide.argmax(1) == index) & ok).sum())
    loss = torch.cat(losses)
    # Rules look only at the loss and the probability p of the true class, and two channels with
    # the logits log(p) and log(1 - p) have just those.
    pairs = torch.stack([-loss, (-torch.expm1(-loss)).log().clamp(min=-700)], 1)
    count = max(1, int(valid.sum()))
    beyond = (loss + math.log(THRESH))[valid]
    hard, unsure = int((beyond > 0).sum()), int((beyond.abs() < 2e-6).sum())
    target = torch.where(valid, 0, IGNORE)
    shares = {"accuracy": 100 * hits / count, "hard": hard / count, "unsure": unsure / max(1, hard)}
    return Problem(logits, labels, pairs, target, **shares)


def check(
    what: str, value: float, expected: float, unsure: float = 0, tolerance: float = TOLERANCE
) -> None:
    """Raise :class:`WrongValueError` where a value is not the expected one, or not a number."""
    if not abs(value - expected) <= (tolerance + unsure) * abs(expected):
        raise WrongValueError(f"{what} is {value!r}, but it should be {expected!r}")
