"""The kernels of the region term against the float64 oracle.

Without a GPU ``test_triton_interpreter.py`` runs this file in Triton's interpreter.
"""

import math

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, runs
from planted import plant

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ops, reference
from ohem_mm.joint import joint_losses
from ohem_mm.ops import Overlap
from ohem_mm.overlap import pool_sums, region_value
from ohem_mm.rule import OhemRule, RegionRule

triton = pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")
geometry = pytest.importorskip("ohem_mm.ops.triton.geometry")
trial = pytest.importorskip("ohem_mm.ops.triton.trial")
trial_region = pytest.importorskip("ohem_mm.ops.triton.trial_region")

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
@pytest.mark.parametrize("low", [pytest.param((2, 3), marks=pytest.mark.slow), (7, 10)])
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
def test_no_cell_is_longer_than_the_bound(align_corners):
    for low in range(1, 9):
        for high in range(low, 40):
            line = (2 * low, low - high, 2 * high)
            if align_corners:
                line = (1, 0, 1) if 1 in (low, high) else (low - 1, 0, high - 1)
            a, b, d = line
            cells = [min(max(a * i + b, 0) // d, low - 1) for i in range(high)]
            rows = max(cells.count(cell) for cell in set(cells))
            assert rows <= geometry._longest(low, high)


@pytest.mark.slow
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
    monkeypatch.setattr(trial, "LOW", (2, 5))
    monkeypatch.setattr(trial, "SIZE", (5, 11))
    monkeypatch.setattr(trial, "TILING", SMALL)


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

    found = trial_region.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
    assert name in found


@runs
def test_the_trial_finds_weights_that_are_lost(small_trial):
    def faulty(logits, target, weight, *args, **options):
        return kernels.class_sums(logits, target, None, *args, **options)

    found = trial_region.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
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


# --- together with the OHEM loss -----------------------------------------------------------------

PLAIN = OhemRule(None, 1.0)


@runs
@pytest.mark.parametrize(
    ("low", "size", "rule", "squared", "weighted", "reduction"),
    [
        pytest.param((2, 3), (7, 10), OhemRule(), False, False, "mean", marks=pytest.mark.slow),
        ((3, 7), (4, 15), OhemRule(0.1, 30, "image"), True, True, "mean"),
        ((4, 5), (4, 5), OhemRule(0.2, 0.5, "class", avg="valid"), False, True, "sum"),
        pytest.param((2, 3), (7, 10), PLAIN, False, False, "mean", marks=pytest.mark.slow),
    ],
)
def test_a_pair_equals_the_oracle(low, size, rule, squared, weighted, reduction):
    logits, target = problem(low=low, size=size)
    class_weight = torch.linspace(1, 2, 5) if weighted else None
    region = RegionRule(pool="image", squared=squared)
    together = logits.to(DEVICE, copy=True).requires_grad_()
    sums, loss, hits, num_valid = kernels.pair(
        together,
        target.to(DEVICE),
        Overlap(squared=squared),
        rule=rule,
        ignore_index=255,
        align_corners=False,
        class_weight=class_weight,
        reduction=reduction,
        tiling=SMALL,
    )
    value = region_value(pool_sums(sums, region.pool), None, region, Overlap(squared=squared))
    exact = logits.double().requires_grad_()
    options = {"thresh": rule.thresh, "min_kept": rule.min_kept, "pool": rule.pool, "avg": rule.avg}
    expected = reference.ohem_cross_entropy(
        exact, target, class_weight=class_weight, reduction=reduction, **options
    )
    expected_value = reference.region_loss(exact, target, pool="image", squared=squared)
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value.cpu(), expected_value.detach(), rtol=1e-5, atol=1e-6)
    assert num_valid == (target != 255).sum()
    alone, alone_grad, alone_hits = ours(logits, target, region)
    assert torch.equal(value.detach().cpu(), alone)
    assert hits == alone_hits
    # Each of the two may be differentiated without the other.
    for share in ((0.5, 2.0), (1.0, 0.0), (0.0, 1.0)):
        parts = [a * b for a, b in zip(share, (loss, value.float()), strict=True) if a]
        (grad,) = torch.autograd.grad(sum(parts), together, retain_graph=True)
        parts = [a * b for a, b in zip(share, (expected, expected_value), strict=True) if a]
        (wanted,) = torch.autograd.grad(sum(parts), exact, retain_graph=True)
        torch.testing.assert_close(grad.cpu().double(), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(grad.cpu(), alone_grad, rtol=1e-5, atol=1e-7)


@runs
def test_a_pair_with_what_is_not_finite():
    logits, target = problem(low=(7, 10))
    logits[0, 2, 0, 0] = math.nan
    target[0, 0, 0] = 255

    def run():
        z = logits.to(DEVICE, copy=True).requires_grad_()
        sums, loss, *_ = kernels.pair(
            z,
            target.to(DEVICE),
            Overlap(),
            rule=OhemRule(),
            ignore_index=255,
            align_corners=False,
            class_weight=None,
            reduction="mean",
        )
        (sums.intersection.sum() + sums.predicted.sum() + loss).backward()
        return loss.detach(), sums.predicted.detach(), z.grad

    first, second = run(), run()
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(first, second, strict=True))
    target[0, 0, 0] = 0
    assert all(value.isnan().any() for value in run())


@pytest.mark.slow
@runs
def test_a_pair_has_one_pass_each_way(monkeypatch):
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    monkeypatch.setattr(ops, "_VERDICTS", {})
    for name in ("trial", "sums_trial", "pair_trial"):
        monkeypatch.setattr(kernels, name, lambda *what: None)
    passes = []

    def counted(module, name):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: passes.append(module) or run(*a, **k))

    counted(kernels.forward, "run")
    counted(kernels.backward, "run")
    logits, target = problem()
    weights = [1.0, 2.0, 1.0, 1.0, 3.0]
    cases = [
        ([OhemCrossEntropyLoss(), RegionLoss()], 1),
        ([RegionLoss(), OhemCrossEntropyLoss(class_weight=weights), RegionLoss(kind="jaccard")], 1),
        # What is not the loss of the pass runs by itself.
        ([OhemCrossEntropyLoss(), RegionLoss(), OhemCrossEntropyLoss(thresh=0.2)], 2),
        ([OhemCrossEntropyLoss(label_smoothing=0.1), RegionLoss()], 2),
        ([OhemCrossEntropyLoss(), RegionLoss(squared=True), RegionLoss()], 2),
    ]
    for losses, number in cases:
        losses = [loss.to(DEVICE) for loss in losses]
        stats, apart = {}, {}
        together = logits.to(DEVICE, copy=True).requires_grad_()
        values = joint_losses(losses, together, target.to(DEVICE), stats=stats)
        sum((i + 1) * value for i, value in enumerate(values)).backward()
        assert [passes.count(module) for module in (kernels.forward, kernels.backward)] == [
            number,
            number,
        ]
        alone = logits.to(DEVICE, copy=True).requires_grad_()
        expected = [loss(alone, target.to(DEVICE), stats=apart) for loss in losses]
        sum((i + 1) * value for i, value in enumerate(expected)).backward()
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.grad, alone.grad, rtol=1e-4, atol=1e-6)
        assert stats.keys() == apart.keys()
        assert (stats["hits"], stats["num_valid"]) == (apart["hits"], apart["num_valid"])
        passes.clear()


@runs
def test_a_pair_whose_trial_fails_runs_apart(monkeypatch, caplog):
    monkeypatch.setenv("OHEM_MM_BACKEND", "triton")
    monkeypatch.setattr(ops, "_VERDICTS", {})
    monkeypatch.setattr(ops, "_SAID", set())
    for name in ("trial", "sums_trial"):
        monkeypatch.setattr(kernels, name, lambda *what: None)
    monkeypatch.setattr(kernels, "pair_trial", lambda *what: "is wrong")
    monkeypatch.setattr(kernels, "pair", None)
    logits, target = problem()
    logits, target = logits.to(DEVICE), target.to(DEVICE)
    losses = [OhemCrossEntropyLoss(), RegionLoss()]
    values = joint_losses(losses, logits, target)
    assert [value.item() for value in values] == [loss(logits, target).item() for loss in losses]
    assert caplog.messages == ["triton is wrong; losses run apart."]


@pytest.fixture
def small_pair_trial(monkeypatch):
    # Large enough for a floor that decides among ties.
    monkeypatch.setattr(trial, "LOW", (3, 6))
    monkeypatch.setattr(trial, "SIZE", (9, 18))
    monkeypatch.setattr(trial, "TILING", SMALL._replace(tile=64, cells=8))


@runs
def test_the_trial_of_a_pair_passes(small_pair_trial):
    assert kernels.pair_trial(torch.device(DEVICE), torch.float32, 2) is None


# Module, what to replace in its source, and by what.
PLANTED = {
    "last row of a tile": ("region", "(y < y_end[None, :])", "(y < y_end[None, :] - 1)"),
    "last column of a tile": ("region", "(x < x_end[None, :])", "(x < x_end[None, :] - 1)"),
    "tiles below the first": ("region", "range(0, height, tile.rows)", "range(0, 1, tile.rows)"),
    "tiles right of the first": ("region", "range(0, width, tile.cols)", "range(0, 1, tile.cols)"),
    "one place for all tiles": ("region", "            out += 1\n", "            out += 0\n"),
    "first label of a tile alone": ("region", "c = highest(label)\n\n", "c = -1\n\n"),
    "ignored pixels summed": (
        "cells",
        "tl.where(label >= 0, norm",
        "tl.where(label >= -1, norm",
    ),
    "squares not squared": ("region", "p *= p", "p *= 1.0"),
    "mean of squares halved": ("region", "mean *= 2.0", "mean *= 1.0"),
    "no mean": ("region", "-(mean + true)", "-(0 * mean + true)"),
    "loss left out of all classes": ("region", "everywhere += kept", "everywhere += 0 * kept"),
    "loss left out of the true class": ("region", "true -= kept", "true -= 0 * kept"),
    "loss not divided": ("region", ".to(tl.float32) / tl.load(divisor)", ".to(tl.float32)"),
    "wrong corner below": (
        "cells",
        "tl.minimum(cell_y + 1, low_h - 1)",
        "tl.minimum(cell_y, low_h - 1)",
    ),
    "wrong corner to the right": (
        "cells",
        "tl.minimum(cell_x + 1, low_w - 1)",
        "tl.minimum(cell_x, low_w - 1)",
    ),
    "wrong weight of a row": (
        "cells",
        "tl.fma(weight_y, both[None, :]",
        "tl.fma(0 * weight_y, both[None, :]",
    ),
    "labels of easy pixels lost": ("mining", "if not rule.apart:", "if True:"),
    "wrong true class": ("backward", "hot, at_true, 0.0", "hot, 0.0, at_true"),
    "wrong slope": ("backward", "tl.fma(weight, steep, shift)", "tl.fma(weight, 0 * steep, shift)"),
}


@pytest.mark.slow
@runs
@pytest.mark.skipif(not INTERPRETED, reason="each fault would be compiled")
@pytest.mark.parametrize("name", PLANTED)
def test_the_trial_of_a_pair_finds_what_is_planted(small_pair_trial, monkeypatch, tmp_path, name):
    plant(monkeypatch, tmp_path, *PLANTED[name])
    trouble = kernels.pair_trial(torch.device(DEVICE), torch.float32, 2)
    assert trouble is not None
    assert "fails" not in trouble
