"""From the sums of each class to the loss: in numbers, by hand, over pools and over ranks."""

import doctest
import itertools
import math
from pathlib import Path

import pytest
import torch
from marks import slow
from problems import batch, value_and_grad
from ranks import averaged, on_ranks

from ohem_mm import region_loss


def test_dice_jaccard_and_tversky_in_numbers():
    """Four pixels, two classes; p of class 1 is .9 .6 .2 .1 and its labels are 1 0 1 0."""
    p = torch.tensor([0.9, 0.6, 0.2, 0.1], dtype=torch.float64)
    logits = torch.stack([torch.zeros(4).double(), p.logit()])[None]
    target = torch.tensor([[1, 0, 1, 0]])
    # Class 1: I = 1.1, P = 1.8, T = 2; class 0: I = 1.3, P = 2.2, T = 2.
    expected = {
        "dice": (2 * 1.1 / 3.8, 2 * 1.3 / 4.2),
        "jaccard": (1.1 / 2.7, 1.3 / 2.9),
        "tversky": (
            1.1 / (1.1 + 0.3 * 0.7 + 0.7 * 0.9),
            1.3 / (1.3 + 0.3 * 0.9 + 0.7 * 0.7),
        ),
    }
    for kind, scores in expected.items():
        loss = region_loss(logits, target, kind=kind)
        assert loss.item() == pytest.approx(1 - sum(scores) / 2)
        stats = {}
        squared = region_loss(logits, target, kind=kind, gamma=2, stats=stats)
        assert squared.item() == pytest.approx(sum((1 - s) ** 2 for s in scores) / 2)
        assert stats["overlap"].tolist() == pytest.approx(scores[::-1])
    assert region_loss(logits, target, smooth=1).item() == pytest.approx(
        1 - (3.2 / 4.8 + 3.6 / 5.2) / 2
    )
    weights = torch.tensor([1.0, 3.0])
    parts = [1 - score for score in expected["dice"]]
    weighted = 3 * parts[0] + parts[1]
    assert region_loss(logits, target, class_weight=weights).item() == pytest.approx(weighted / 2)
    mean = region_loss(logits, target, class_weight=weights, weighted_mean=True)
    assert mean.item() == pytest.approx(weighted / 4)
    sums = [(p * p).sum().item() + 2, ((1 - p) ** 2).sum().item() + 2]
    assert region_loss(logits, target, squared=True).item() == pytest.approx(
        1 - (2.2 / sums[0] + 2.6 / sums[1]) / 2
    )


def test_pools_and_absent_classes_by_hand():
    """Image 0 holds class 0 alone, image 1 class 1 alone; class 2 is nowhere."""
    p = torch.tensor([[[0.7], [0.2], [0.1]], [[0.3], [0.6], [0.1]]], dtype=torch.float64)
    logits, target = p.log(), torch.tensor([[0], [1]])
    dice = {
        "batch": [2 * 0.7 / (1.0 + 1), 2 * 0.6 / (0.8 + 1), 0.0],
        "image": [[2 * 0.7 / 1.7, 0.0, 0.0], [0.0, 2 * 0.6 / 1.6, 0.0]],
    }
    assert region_loss(logits, target).item() == pytest.approx(1 - sum(dice["batch"]) / 2)
    everything = region_loss(logits, target, classes="all")
    assert everything.item() == pytest.approx(1 - sum(dice["batch"]) / 3)
    images = region_loss(logits, target, pool="image")
    assert images.item() == pytest.approx(1 - (dice["image"][0][0] + dice["image"][1][1]) / 2)
    # An image without a valid pixel takes no part in the mean over images.
    longer = torch.cat([logits, logits[:1]]), torch.tensor([[0], [1], [255]])
    for classes in ("present", "all"):
        fewer = region_loss(logits, target, pool="image", classes=classes)
        assert torch.equal(region_loss(*longer, pool="image", classes=classes), fewer)
    both = region_loss(logits, target, pool="image", classes="all", smooth=0.5)
    scores = [1.9 / 2.2, 0.5 / 0.7, 0.5 / 0.6, 0.5 / 0.8, 1.7 / 2.1, 0.5 / 0.6]
    assert both.item() == pytest.approx(1 - sum(scores) / 6)


def test_numbers_of_the_docs_page():
    page = Path(__file__).resolve().parents[1] / "docs" / "region.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


def test_only_a_class_of_weight_zero_is_a_connected_zero():
    logits, target = batch(0)
    target = torch.zeros_like(target)
    weights = torch.tensor([0.0, 1, 1, 1])
    for weighted_mean in (False, True):
        loss, grad = value_and_grad(
            region_loss, logits, target, class_weight=weights, weighted_mean=weighted_mean
        )
        assert loss == 0
        assert not grad.any()


def test_a_class_in_no_pixel():
    logits, target = batch(3, dtype=torch.float64)
    target[target == 2] = 1
    present, grad = value_and_grad(region_loss, logits, target)
    # Left out of the mean, though not of the softmax.
    stats = {}
    region_loss(logits, target, stats=stats)
    overlap = stats["overlap"]
    assert overlap[2].isnan()
    assert present.item() == pytest.approx(1 - overlap[[0, 1, 3]].mean().item())
    assert grad[:, 2].abs().sum() > 0
    # Without smooth an absent class costs 1 and teaches nothing; with it, being predicted costs.
    everything, all_grad = value_and_grad(region_loss, logits, target, classes="all")
    assert everything.item() == pytest.approx(1 - overlap[[0, 1, 3]].sum().item() / 4)
    torch.testing.assert_close(all_grad, grad * 3 / 4)
    _, smooth_grad = value_and_grad(region_loss, logits, target, classes="all", smooth=1.0)
    assert smooth_grad[:, 2].sum() > all_grad[:, 2].sum()
    # Nowhere labelled and nowhere predicted is right.
    gone = logits.clone()
    gone[:, 2] = -math.inf
    loss, grad = value_and_grad(region_loss, gone, target, classes="all")
    assert loss.item() == pytest.approx(region_loss(gone, target).item() * 3 / 4)
    assert grad.isfinite().all()


def test_a_non_finite_logit_of_a_class_that_does_not_count_comes_out_too():
    logits, target = batch(0, ignored=0.0)
    target[0, 0, 0] = 3
    logits[0, 3, 0, 0] = -math.inf
    rule = {"class_weight": torch.tensor([1.0, 1, 1, 0]), "weighted_mean": True}
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    assert loss.isnan()
    assert grad.isnan().any()


# pool='world'


RULES = [
    {},
    {"kind": "jaccard", "classes": "all", "smooth": 1.0, "label_smoothing": 0.1},
    {"kind": "tversky", "gamma": 2.0, "class_weight": torch.tensor([0.2, 1.0, 3.0])},
    {"squared": True, "use_sigmoid": True, "weighted_mean": True},
]
# Sizes of the batches of up to three ranks, and whether the second rank has valid pixels. An empty
# batch must not leave the other ranks waiting.
SIZES = [(2, 2, 2), (1, 3, 2), (2, 0, 1)]


def world_problem(sizes, second_is_ignored):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rank, images in enumerate(sizes):
        logits = torch.randn(images, 3, 3, 4, generator=generator, dtype=torch.float64) * 3
        # Rank 0 sees one class less: whether a class is present must be asked of all ranks.
        target = torch.randint(0, 2 if rank == 0 else 3, (images, 6, 7), generator=generator)
        target[:, 0] = 255
        if rank == 1 and second_is_ignored:
            target[:] = 255
        batches.append((logits, target))
    return batches


def run_rank(rank, ranks):
    results = []
    for rule, sizes, ignored in itertools.product(RULES, SIZES, [False, True]):
        logits, target = world_problem(sizes[:ranks], ignored)[rank]
        logits.requires_grad_()
        stats = {}
        loss = region_loss(logits, target, pool="world", stats=stats, **rule)
        loss.backward()
        results.append((*averaged(loss, logits, ranks), stats["overlap"]))
    return results


@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_ranks_together_equal_one_process(ranks):
    per_rank = on_ranks(ranks, run_rank)
    cases = list(itertools.product(RULES, SIZES, [False, True]))
    assert len(cases) == len(per_rank[0])
    for index, (rule, sizes, ignored) in enumerate(cases):
        batches = world_problem(sizes[:ranks], ignored)
        logits = torch.cat([logits for logits, _ in batches])
        target = torch.cat([target for _, target in batches])
        stats = {}
        expected, grad = value_and_grad(region_loss, logits, target, stats=stats, **rule)
        grads = torch.cat([results[index][1] for results in per_rank])
        for results in per_rank:
            torch.testing.assert_close(results[index][0], expected, rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(results[index][2], stats["overlap"], equal_nan=True)
        torch.testing.assert_close(grads, grad, rtol=1e-6, atol=1e-9)


def test_without_a_process_group_world_is_batch():
    logits, target = world_problem((3,), False)[0]
    for rule in RULES:
        expected = region_loss(logits, target, pool="batch", **rule)
        assert torch.equal(region_loss(logits, target, pool="world", **rule), expected)
