"""Both passes of the sums as the losses take them, alone and together with the OHEM loss.

Without a GPU ``test_interpreter.py`` runs this file in Triton's interpreter.
"""

import math

import pytest
import torch
from interpreter import DEVICE, runs
from marks import slow
from region_kernels import SMALL, ours, problem

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ops, reference
from ohem_mm.joint import joint_losses
from ohem_mm.ops import Overlap
from ohem_mm.overlap import pool_sums, region_value
from ohem_mm.rule import OhemRule, RegionRule

pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")


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


PLAIN = OhemRule(None, 1.0)


@runs
@pytest.mark.parametrize(
    ("low", "size", "rule", "squared", "weighted", "reduction"),
    [
        slow((2, 3), (7, 10), OhemRule(), False, False, "mean"),
        slow((3, 7), (4, 15), OhemRule(0.1, 30, "image"), True, True, "mean"),
        ((4, 5), (4, 5), OhemRule(0.2, 0.5, "class", avg="valid"), False, True, "sum"),
        slow((2, 3), (7, 10), PLAIN, False, False, "mean"),
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
