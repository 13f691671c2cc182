"""The kernels of the region term on small problems, and the float64 oracle on the same."""

import pytest
import torch
from interpreter import DEVICE

from ohem_mm import reference
from ohem_mm.ops import Overlap
from ohem_mm.overlap import pool_sums, region_value

kernels = pytest.importorskip("ohem_mm.ops.triton")
geometry = pytest.importorskip("ohem_mm.ops.triton.geometry")

# Several programs, tiles and overlaps even on tiny maps.
SMALL = geometry.Tiling(tile=32, cells=4, classes=4, block=64, programs=4, walk=2)


def problem(classes=5, low=(2, 3), size=(7, 10), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(2, classes, *low, generator=generator)
    target = torch.randint(classes, (2, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    target[target == 1] = 0  # a class in no pixel
    return logits.to(dtype), target


def ours(logits, target, rule, weight=None, align_corners=False):
    logits = logits.detach().to(DEVICE, copy=True).requires_grad_()
    overlap = Overlap(squared=rule.squared)
    sums, hits = kernels.class_sums(
        logits,
        target.to(DEVICE),
        None if weight is None else weight.to(DEVICE),
        overlap,
        ignore_index=255,
        align_corners=align_corners,
        with_hits=True,
        tiling=SMALL,
    )
    loss = region_value(pool_sums(sums, rule.pool), None, rule, overlap)
    loss.backward()
    return loss.detach().cpu(), logits.grad.cpu(), int(hits)


def oracle(logits, target, rule, weight=None, align_corners=False):
    logits = logits.detach().double().requires_grad_()
    loss = reference.region_loss(
        logits,
        target,
        weight,
        kind=rule.kind,
        pool=rule.pool,
        squared=rule.squared,
        gamma=rule.gamma,
        align_corners=align_corners,
    )
    loss.backward()
    return loss.detach(), logits.grad
