"""The kernels of the region term against the float64 oracle.

Without a GPU ``test_triton_interpreter.py`` runs this file in Triton's interpreter.
"""

import math

import pytest
import torch
from interpreter import DEVICE, runs

from ohem_mm import RegionLoss, ops, reference
from ohem_mm.ops import Overlap
from ohem_mm.overlap import pool_sums, region_value
from ohem_mm.rule import RegionRule

triton = pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")
geometry = pytest.importorskip("ohem_mm.ops.triton.geometry")
trial = pytest.importorskip("ohem_mm.ops.triton.trial")

# Several programs, tiles and overlaps even on tiny maps.
SMALL = geometry.Tiling(tile=32, cells=4, classes=4, block=64, programs=4, walk=2)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-5}


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


@runs
@pytest.mark.parametrize(
    ("squared", "weighted", "align_corners"), [(False, False, False), (True, True, True)]
)
@pytest.mark.parametrize(
    ("low", "size"), [((2, 3), (7, 10)), ((3, 7), (4, 15)), ((4, 5), (4, 5)), ((1, 1), (5, 3))]
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
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_many_classes(dtype):
    logits, target = problem(classes=9, dtype=dtype)
    rule = RegionRule("jaccard")
    loss, grad, _ = ours(logits, target.to(torch.uint8), rule)
    expected, expected_grad = oracle(logits, target, rule)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


@runs
@pytest.mark.parametrize("low", [(2, 3), (7, 10)])
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


@pytest.mark.parametrize("align_corners", [False, True])
def test_no_row_of_cells_is_taller_than_the_bound(align_corners):
    for low in range(1, 9):
        for high in range(low, 40):
            line = (2 * low, low - high, 2 * high)
            if align_corners:
                line = (1, 0, 1) if 1 in (low, high) else (low - 1, 0, high - 1)
            a, b, d = line
            cells = [min(max(a * i + b, 0) // d, low - 1) for i in range(high)]
            rows = max(cells.count(cell) for cell in set(cells))
            assert rows <= kernels.region.tallest(geometry.Sizes(1, 2, low, 1, high, 1))


@runs
def test_two_runs_give_the_same_bits():
    logits, target = problem()
    first, second = (ours(logits, target, RegionRule()) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@runs
def test_the_loss_takes_them(monkeypatch):
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    monkeypatch.setattr(ops, "_VERDICTS", {})
    monkeypatch.setattr(kernels, "sums_trial", lambda *what: None)
    calls = []
    run = kernels.class_sums
    monkeypatch.setattr(
        kernels, "class_sums", lambda *args, **options: calls.append(1) or run(*args, **options)
    )
    logits, target = problem(low=(7, 10))
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    expected = reference.region_loss(logits, target)
    stats = {}
    loss = RegionLoss()(logits, target, stats=stats)
    torch.testing.assert_close(loss.cpu().double(), expected.cpu(), rtol=1e-5, atol=1e-6)
    assert stats["num_valid"] == (target != 255).sum()
    assert calls == [1]
    # What they have no sums for goes elsewhere.
    for options in ({"use_sigmoid": True}, {"label_smoothing": 0.1}):
        value = RegionLoss(**options)(logits, target)
        wanted = reference.region_loss(logits, target, **options)
        torch.testing.assert_close(value.cpu().double(), wanted.cpu(), rtol=1e-5, atol=1e-6)
    assert calls == [1]


@runs
def test_there_is_no_second_derivative():
    logits, target = problem()
    logits = logits.to(DEVICE).requires_grad_()
    sums, _ = kernels.class_sums(
        logits, target.to(DEVICE), None, Overlap(), ignore_index=255, align_corners=False
    )
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(sums.predicted.sum(), logits, create_graph=True)


@runs
def test_no_image(monkeypatch):
    empty = torch.Tensor.new_empty  # memory that somebody used before
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: empty(*a, **k).fill_(7))
    logits, target = torch.zeros(0, 3, 2, 2), torch.zeros(0, 4, 4, dtype=torch.int64)
    loss, grad, hits = ours(logits, target, RegionRule())
    assert (loss, hits, grad.shape) == (0, 0, logits.shape)


@pytest.fixture
def small_trial(monkeypatch):
    monkeypatch.setattr(trial, "_LOW", (2, 5))
    monkeypatch.setattr(trial, "_SIZE", (5, 11))
    monkeypatch.setattr(trial, "_TILING", SMALL)


@runs
def test_the_trial_passes(small_trial):
    assert kernels.sums_trial(torch.device(DEVICE), torch.float32, 3) is None


FAULTS = {
    "intersection": lambda sums, hits: (
        sums._replace(intersection=sums.intersection * 1.001),
        hits,
    ),
    "predicted": lambda sums, hits: (sums._replace(predicted=sums.predicted * 1.001), hits),
    "counts": lambda sums, hits: (sums._replace(counts=sums.counts + 1), hits),
    "correct pixels": lambda sums, hits: (sums, hits + 2),
}


@runs
@pytest.mark.parametrize("name", FAULTS)
def test_the_trial_finds_a_planted_fault(small_trial, name):
    def faulty(*args, **options):
        return FAULTS[name](*kernels.class_sums(*args, **options))

    found = trial.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
    assert name in found


@runs
def test_the_trial_finds_weights_that_are_lost(small_trial):
    def faulty(logits, target, weight, *args, **options):
        return kernels.class_sums(logits, target, None, *args, **options)

    found = trial.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
    assert "squares with weights" in found


@runs
def test_the_trial_finds_a_wrong_gradient(small_trial, monkeypatch):
    slopes = kernels.region.slopes

    def faulty(*args, **options):
        shift, at_true = slopes(*args, **options)
        return shift, at_true * 1.01

    monkeypatch.setattr(kernels.region, "slopes", faulty)
    found = kernels.sums_trial(torch.device(DEVICE), torch.float32, 3)
    assert "another gradient of sums" in found
