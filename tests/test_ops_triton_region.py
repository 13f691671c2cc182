"""The kernels of the region term against the float64 oracle.

Without a GPU ``test_interpreter.py`` runs this file in Triton's interpreter.
"""

import math

import pytest
import torch
from interpreter import runs
from marks import slow
from region_kernels import oracle, ours, problem

from ohem_mm.rule import RegionRule

pytest.importorskip("triton", reason="needs Triton")

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


@runs
@pytest.mark.parametrize(
    ("squared", "weighted", "align_corners"), [(False, False, False), (True, True, True)]
)
@pytest.mark.parametrize(
    ("low", "size"),
    [((2, 3), (7, 10)), slow((3, 7), (4, 15)), ((4, 5), (4, 5)), ((1, 1), (5, 3))],
)
def test_equals_the_oracle(low, size, squared, weighted, align_corners):
    logits, target = problem(low=low, size=size)
    weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(1))
    rule = RegionRule(pool="image", gamma=2.0, squared=squared)
    options = (weight if weighted else None, align_corners)
    loss, grad, hits = ours(logits, target, rule, *options)
    expected, expected_grad = oracle(logits, target, rule, *options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-4, atol=1e-6)
    big = logits
    if low != size:
        big = torch.nn.functional.interpolate(
            logits, size=size, mode="bilinear", align_corners=align_corners
        )
    assert hits == ((big.argmax(1) == target) & (target != 255)).sum()


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, *map(slow, (torch.float16, torch.float32))])
def test_dtypes_and_many_classes(dtype):
    logits, target = problem(classes=9, dtype=dtype)
    rule = RegionRule("jaccard")
    loss, grad, _ = ours(logits, target.to(torch.uint8), rule)
    expected, expected_grad = oracle(logits, target, rule)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


@runs
@pytest.mark.parametrize("low", [slow((2, 3)), (7, 10)])
def test_what_is_not_finite(low):
    logits, target = problem(low=low)
    rule = RegionRule()
    target[:, :, :] = torch.where(target == 255, 0, target)
    target[0, 0, 0] = 255
    if low == (7, 10):  # an ignored pixel of its own
        expected = ours(logits, target, rule)
        broken = logits.clone()
        broken[0, :, 0, 0] = math.nan
        result = ours(broken, target, rule)
        assert torch.equal(result[0], expected[0])
        assert torch.equal(result[1], expected[1])
    for bad in (math.nan, math.inf, -math.inf):
        broken = logits.clone()
        broken[1, int(target[1, 0, 0]), 0, 0] = bad
        loss, grad, _ = ours(broken, target, rule)
        assert loss.isnan()
        assert grad.isnan().any()


@runs
def test_all_ignored_is_a_connected_zero():
    logits, target = problem()
    target[:] = 255
    loss, grad, hits = ours(logits * math.nan, target, RegionRule(classes="all", smooth=1.0))
    assert loss == 0
    assert hits == 0
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.slow
@runs
def test_two_runs_give_the_same_bits():
    logits, target = problem()
    first, second = (ours(logits, target, RegionRule()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@runs
def test_no_image(monkeypatch):
    empty = torch.Tensor.new_empty  # memory that somebody used before
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(7))
    logits, target = torch.zeros(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.int64)
    loss, grad, hits = ours(logits, target, RegionRule())
    assert (loss, hits, grad.shape) == (0, 0, logits.shape)
