"""The region term against the float64 oracle, in value and gradient, and at the edges."""

import dataclasses
import doctest
import itertools
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ops, reference, region_loss
from ohem_mm.joint import joint_losses
from ohem_mm.ops import portable
from ohem_mm.rule import RegionHabits

SHAPES = [(), (7,), (1, 1), (3, 5), (6, 4), (2, 3, 4)]
GRAD_TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-9,
}


def value_and_grad(function, logits, *args, **kwargs):
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **kwargs)
    loss.backward()
    return loss.detach(), logits.grad


def batch(seed, shape=(2, 4, 6, 5), ignored=0.2, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


KINDS = [
    {"kind": "dice"},
    {"kind": "dice", "squared": True},
    {"kind": "jaccard"},
    {"kind": "jaccard", "squared": True},
    {"kind": "tversky"},
    {"kind": "tversky", "alpha": 0.8, "beta": 0.1},
]


@st.composite
def rules(draw, classes):
    weights = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.1
    return {
        **draw(st.sampled_from(KINDS)),
        "gamma": draw(st.sampled_from([1.0, 1.0, 0.75, 2.0])),
        "pool": draw(st.sampled_from(["batch", "image", "world"])),
        "classes": draw(st.sampled_from(["present", "all"])),
        "smooth": draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "weighted_mean": draw(st.booleans()),
        "class_weight": draw(st.sampled_from([None, weights, (weights > 0.5).float()])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.2])),
    }


@st.composite
def problems(draw):
    use_sigmoid = draw(st.booleans())
    channels = draw(st.integers(1 if use_sigmoid else 2, 5))
    shape = (draw(st.integers(1, 3)), channels, *draw(st.sampled_from(SHAPES)))
    dtype = draw(st.sampled_from(list(GRAD_TOLERANCE)))
    logits, target = batch(
        draw(st.integers(0, 10**6)),
        shape,
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.1, 3.0, 10.0])),
        dtype=dtype,
    )
    if draw(st.booleans()):  # one class in no pixel
        target[target == 0] = 1
    if draw(st.booleans()):  # one image ignored
        target[0] = 255
    if draw(st.booleans()) and logits.dim() > 2:
        target = target[:, None]
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(target.shape, generator=torch.Generator().manual_seed(2)).round(
            decimals=1
        )
    kind = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    rule = {"use_sigmoid": use_sigmoid, **draw(rules(max(2, channels)))}
    return logits, target.to(kind), weight, rule


@pytest.fixture(params=["portable", "eager"])
def backend(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OHEM_MM_BACKEND", request.param)
        yield request.param


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_equals_oracle_in_value_and_gradient(backend, problem):
    logits, target, weight, rule = problem
    loss, grad = value_and_grad(region_loss, logits, target, weight, **rule)
    expected, expected_grad = value_and_grad(
        reference.region_loss, logits.double(), target, weight, **rule
    )
    exact = logits.dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert grad.dtype == logits.dtype
    tolerance = 1e-9 if exact else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    tolerance = GRAD_TOLERANCE[logits.dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


@settings(max_examples=50)
@given(st.integers(0, 10**6), rules(4), st.booleans())
def test_order_of_pixels_and_images_is_irrelevant(seed, rule, use_sigmoid):
    rule = {**rule, "use_sigmoid": use_sigmoid}
    logits, target = batch(seed, (3, 4, 5, 6), dtype=torch.float64)
    images = torch.tensor([2, 0, 1])
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    other, other_grad = value_and_grad(region_loss, logits[images], target[images], **rule)
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(other_grad, grad[images])
    rule["pool"] = "batch"
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    order = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(seed))
    flat = logits.movedim(1, -1).reshape(-1, 4)[order]
    pixels, pixels_grad = value_and_grad(
        region_loss, flat.view(3, 30, 4).mT, target.flatten()[order].view(3, 30), **rule
    )
    torch.testing.assert_close(pixels, loss)
    torch.testing.assert_close(
        pixels_grad.mT.reshape(-1, 4), grad.movedim(1, -1).reshape(-1, 4)[order]
    )


@settings(max_examples=50)
@given(st.integers(0, 10**6), rules(4), st.booleans())
def test_order_of_classes_is_irrelevant(seed, rule, use_sigmoid):
    logits, target = batch(seed, dtype=torch.float64, ignored=0.1)
    rule["use_sigmoid"] = use_sigmoid
    loss = region_loss(logits, target, **rule)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    place = torch.argsort(order)
    renamed = torch.where(target == 255, 255, place[target.clamp(max=3)])
    if rule["class_weight"] is not None:
        rule["class_weight"] = rule["class_weight"][order]
    torch.testing.assert_close(region_loss(logits[:, order], renamed, **rule), loss)


@settings(max_examples=50)
@given(st.integers(0, 10**6), rules(4), st.booleans())
def test_more_ignored_pixels_change_nothing(seed, rule, use_sigmoid):
    rule = {**rule, "use_sigmoid": use_sigmoid}
    logits, target = batch(seed, (2, 4, 5, 6), dtype=torch.float64)
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    wide = torch.nn.functional.pad(logits, (2, 3, 1, 0), value=7.0)
    labels = torch.nn.functional.pad(target, (2, 3, 1, 0), value=255)
    padded, padded_grad = value_and_grad(region_loss, wide, labels, **rule)
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_grad[:, :, 1:, 2:-3], grad)
    padded_grad[:, :, 1:, 2:-3] = 0
    assert not padded_grad.any()


@settings(max_examples=50)
@given(st.integers(0, 10**6), rules(4), st.booleans())
def test_perfect_prediction_costs_nothing(seed, rule, use_sigmoid):
    """Also with smoothed labels, where the best probability is the smoothed target itself."""
    rule = {**rule, "use_sigmoid": use_sigmoid}
    _, target = batch(seed, dtype=torch.float64, ignored=0.1)
    s = rule["label_smoothing"]
    hot = torch.nn.functional.one_hot(target % 255, 4).movedim(-1, 1).double()
    if s:
        t = hot * (1 - s) + s / (2 if use_sigmoid else 4)
        logits = t.logit() if use_sigmoid else t.log()
    else:
        logits = 2000 * hot - 1000
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    # gamma = 0.75 makes the rounding error of 1e-16 larger.
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-11)
    if not s:
        assert not grad.any()
    worse = region_loss(logits.roll(1, 1), target, **rule)
    if (target != 255).any() and rule["class_weight"] is None:
        assert worse > 0.1


@settings(max_examples=25)
@given(st.integers(0, 10**6), rules(3), st.booleans())
def test_gradcheck(seed, rule, use_sigmoid):
    logits, target = batch(seed, (2, 3, 3, 2), dtype=torch.float64, scale=1.0)
    weight = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradcheck(
        lambda x: region_loss(x, target, weight, use_sigmoid=use_sigmoid, **rule),
        logits.requires_grad_(),
    )


def test_second_derivative_is_refused_not_wrong(backend):
    logits, target = batch(5, dtype=torch.float64)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(region_loss(logits, target), logits, create_graph=True)


def test_transforms_of_torch_func_are_refused(backend):
    logits, target = batch(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="torch.func cannot transform the region term"):
        torch.func.grad(lambda z: region_loss(z, target))(logits)


# By hand


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


# Edges


@pytest.mark.parametrize("pool", ["batch", "image", "world"])
@pytest.mark.parametrize("classes", ["present", "all"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_valid_is_a_connected_zero(backend, pool, classes, shape):
    logits = torch.full(shape, torch.nan)  # not looked at
    target = torch.full((shape[0], *shape[2:]), 255)
    for use_sigmoid, smooth, gamma in itertools.product([False, True], [0.0, 1.0], [0.5, 1.0]):
        loss, grad = value_and_grad(
            region_loss,
            logits,
            target,
            pool=pool,
            classes=classes,
            use_sigmoid=use_sigmoid,
            smooth=smooth,
            gamma=gamma,
        )
        assert loss == 0
        assert torch.equal(grad, torch.zeros(shape))


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


def test_one_pixel(backend):
    logits = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
    target = torch.tensor([[[2]]])
    p = logits.softmax(1)[0, 2].item()
    loss, grad = value_and_grad(region_loss, logits, target)
    assert loss.item() == pytest.approx(1 - 2 * p / (p + 1))
    assert grad[0, 2] < 0
    assert (grad[0, :2] > 0).all()


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("rule", [{}, {"classes": "all", "smooth": 1.0}, {"gamma": 2.0}])
def test_non_finite_logits(backend, bad, use_sigmoid, rule):
    logits, target = batch(0, ignored=0.0)
    target[0, 0, 0], target[1, 2, 2] = 255, 1
    rule = {"use_sigmoid": use_sigmoid, **rule}
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    ignored = logits.clone()
    ignored[0, :, 0, 0] = bad
    same, same_grad = value_and_grad(region_loss, ignored, target, **rule)
    assert torch.equal(loss, same)
    assert torch.equal(grad, same_grad)
    logits[1, 1, 2, 2] = bad  # at a valid pixel, and on its true class
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    assert loss.isnan()
    assert grad[1, :, 2, 2].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_reach_the_pixels_around_them_alone(backend, bad):
    logits, _ = batch(0, (1, 3, 6, 6))
    target = torch.randint(0, 3, (1, 24, 24), generator=torch.Generator().manual_seed(0))
    target[:, :8, :8] = 255
    loss, grad = value_and_grad(region_loss, logits, target)
    logits[0, 1, 0, 0] = bad  # reaches rows and columns 0 to 5
    same, same_grad = value_and_grad(region_loss, logits, target)
    torch.testing.assert_close(same, loss)
    torch.testing.assert_close(same_grad, grad)
    target[:, 5, 5] = 0
    loss, grad = value_and_grad(region_loss, logits, target)
    assert loss.isnan()
    assert grad.isnan().any()


def test_a_non_finite_logit_of_a_class_that_does_not_count_comes_out_too():
    logits, target = batch(0, ignored=0.0)
    target[0, 0, 0] = 3
    logits[0, 3, 0, 0] = -math.inf
    rule = {"class_weight": torch.tensor([1.0, 1, 1, 0]), "weighted_mean": True}
    loss, grad = value_and_grad(region_loss, logits, target, **rule)
    assert loss.isnan()
    assert grad.isnan().any()


def test_masked_class_costs_nothing(backend):
    """A logit of -inf is a probability of zero, which is fine except on the true class."""
    logits, target = batch(0, ignored=0.0)
    logits[:, 3], target[target == 3] = -math.inf, 0
    loss, grad = value_and_grad(region_loss, logits, target)
    torch.testing.assert_close(loss, region_loss(logits[:, :3], target))
    assert grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_extreme_logits_in_float32(backend, dtype, use_sigmoid):
    logits, target = batch(2, (2, 4, 20, 20), scale=10_000.0, dtype=dtype)
    loss, grad = value_and_grad(region_loss, logits, target, use_sigmoid=use_sigmoid)
    expected, expected_grad = value_and_grad(
        reference.region_loss, logits.double(), target, use_sigmoid=use_sigmoid
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("ignore_index", [255, -100, 1])
def test_labels_of_any_integer_dtype(dtype, ignore_index):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 2, (2, 8, 10), generator=generator).to(dtype)
    stats = {}
    result = region_loss(logits, target, stats=stats, ignore_index=ignore_index)
    assert torch.equal(result, region_loss(logits, target.long(), ignore_index=ignore_index))
    assert stats["num_valid"] == (target.long() != ignore_index).sum()


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5), (14,)),
        ((2, 3, 4, 5), (32, 40)),
        ((2, 1, 4, 5), (11, 14)),
        ((1, 3, 1, 5), (7, 5)),
        ((2, 5, 90, 70), (90, 700)),  # several bands
        ((1, 3, 2, 2, 3), (5, 5, 8)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_small_logits_are_upsampled(backend, align_corners, use_sigmoid, shape, size, dtype):
    if shape[1] == 1 and not use_sigmoid:
        return
    logits, _ = batch(4, shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    for rule in ({"label_smoothing": 0.2}, {"pool": "image", "kind": "jaccard", "squared": True}):
        options = {"align_corners": align_corners, "use_sigmoid": use_sigmoid, **rule}
        loss, grad = value_and_grad(region_loss, logits, target, **options)
        expected, expected_grad = value_and_grad(
            reference.region_loss, logits.double(), target, **options
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
        tolerance = GRAD_TOLERANCE[dtype]
        torch.testing.assert_close(
            grad.double(), expected_grad, rtol=tolerance, atol=min(tolerance, 1e-6)
        )


def test_memory_format_and_strides_change_nothing(backend):
    logits, target = batch(6, (3, 4, 8, 6))
    expected = value_and_grad(region_loss, logits, target)
    variants = [
        logits.contiguous(memory_format=torch.channels_last),
        torch.stack([logits, logits], -1)[..., 0],
    ]
    for variant in variants:
        torch.testing.assert_close(value_and_grad(region_loss, variant, target), expected)
    result = value_and_grad(region_loss, logits, target.mT.contiguous().mT)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_changes_nothing(threads, monkeypatch):
    monkeypatch.setitem(portable._BAND, "cpu", 200)
    monkeypatch.setattr(portable, "_ROWS", 2)
    logits, _ = batch(1, (2, 3, 6, 5))
    target = torch.randint(0, 3, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    expected = value_and_grad(region_loss, logits, target)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = value_and_grad(region_loss, logits, target)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, expected)


def test_autocast_reaches_neither_pass(backend):
    logits, _ = batch(1, (2, 3, 6, 5))
    target = torch.randint(0, 3, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    expected = value_and_grad(region_loss, logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value_and_grad(region_loss, logits, target)
    torch.testing.assert_close(result, expected)


def test_runs_under_deterministic_algorithms(backend):
    logits, target = batch(10)
    torch.use_deterministic_algorithms(True)
    try:
        first = value_and_grad(region_loss, logits, target)
        second = value_and_grad(region_loss, logits, target)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


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


def run_rank(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    results = []
    for rule, sizes, ignored in itertools.product(RULES, SIZES, [False, True]):
        logits, target = world_problem(sizes[:ranks], ignored)[rank]
        logits.requires_grad_()
        stats = {}
        loss = region_loss(logits, target, pool="world", stats=stats, **rule)
        loss.backward()
        # As DistributedDataParallel averages: the parameters' gradients, so here the inputs'.
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        results.append((mean, logits.grad / ranks, stats["overlap"]))
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_together_equal_one_process(ranks):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (ranks, folder), nprocs=ranks)
        per_rank = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(ranks)]
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


# The module


def test_module_equals_function():
    logits, target = batch(12)
    weight = torch.rand(target.shape)
    rule = {"kind": "tversky", "alpha": 0.6, "gamma": 1.5, "pool": "image", "smooth": 0.1}
    loss = RegionLoss(**rule, class_weight=[1, 2, 3, 4], loss_weight=0.4)
    expected = 0.4 * region_loss(
        logits, target, weight, **rule, class_weight=torch.tensor([1.0, 2, 3, 4])
    )
    torch.testing.assert_close(loss(logits, target, weight), expected)
    result = loss(logits, target[:, None], weight=weight, avg_factor=7, junk=1)
    torch.testing.assert_close(result, expected)
    assert loss.state_dict() == {}
    assert loss.loss_name == "loss_region"


def test_every_setting_reaches_the_function(monkeypatch):
    seen = {}

    def spy(pred, target, weight, **kwargs):
        seen.update(kwargs)
        return torch.zeros(())

    monkeypatch.setattr("ohem_mm.region.region_loss", spy)
    rule = {
        "kind": "tversky",
        "alpha": 0.11,
        "beta": 0.22,
        "gamma": 1.5,
        "pool": "image",
        "classes": "all",
        "smooth": 0.5,
        "squared": False,
        "weighted_mean": True,
        "habits": RegionHabits(joint=True),
    }
    options = {
        "ignore_index": 7,
        "use_sigmoid": True,
        "label_smoothing": 0.1,
        "align_corners": True,
    }
    loss = RegionLoss(**rule, **options)
    loss(torch.zeros(1, 2), torch.zeros(1).long())
    assert dataclasses.asdict(seen["rule"]) == rule
    assert {name: getattr(loss, name) for name in rule} == rule
    assert {name: seen[name] for name in options} == options
    loss.gamma = 3  # a schedule may
    assert loss.rule.gamma == 3.0
    with pytest.raises(ValueError, match="gamma must be"):
        loss.gamma = -1
    assert RegionLoss("jaccard").kind == "jaccard"


def test_who_sets_ignore_index():
    logits, _ = batch(13, ignored=0)
    target = torch.zeros(2, 6, 5, dtype=torch.long)
    target[0], target[1, 0] = 9, 255
    marked = target.clone()
    marked[marked == 9] = 255
    expected = region_loss(logits, marked)
    with pytest.raises(ValueError, match="label 9"):
        RegionLoss()(logits, target)  # nobody says: 255
    target[1, 0] = 9
    torch.testing.assert_close(RegionLoss()(logits, target, ignore_index=9), expected)
    torch.testing.assert_close(
        RegionLoss(ignore_index=9)(logits, target, ignore_index=255), expected
    )


def test_class_weight_from_file(tmp_path):
    path = tmp_path / "weights.npy"
    np.save(path, np.array([1.0, 2.5, 0.0, 4.0]))
    logits, target = batch(16)
    expected = RegionLoss(class_weight=[1.0, 2.5, 0.0, 4.0])(logits, target)
    torch.testing.assert_close(RegionLoss(class_weight=str(path))(logits, target), expected)


def test_repr_names_settings():
    text = repr(RegionLoss(gamma=2.0, class_weight=[1.0, 2.0], ignore_index=0))
    assert text == ("RegionLoss(kind='dice', gamma=2.0, ignore_index=0, class_weight=[1.0, 2.0])")


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"kind": "iou"}, ValueError, "kind must be one of dice, jaccard, tversky, but got 'iou'"),
        ({"pool": "class"}, ValueError, "pool must be one of batch, image, world.*'class'"),
        ({"classes": [1]}, ValueError, r"classes must be one of present, all, but got \[1\]"),
        ({"kind": "tversky", "alpha": -1}, ValueError, "alpha must be a finite number >= 0.*-1"),
        ({"kind": "tversky", "beta": math.inf}, ValueError, "beta.*inf"),
        ({"alpha": 0.5}, ValueError, "alpha=0.5 and beta=0.7 need kind='tversky'.*'dice'"),
        ({"kind": "tversky", "alpha": 0, "beta": 0}, ValueError, "must not both be 0"),
        ({"kind": "tversky", "squared": True}, ValueError, "squared=True goes with"),
        ({"gamma": 0}, ValueError, "gamma must be a finite number > 0, but got 0"),
        ({"gamma": "2"}, ValueError, "'2'"),
        ({"smooth": -1e-3}, ValueError, "smooth must be a finite number >= 0, but got -0.001"),
        ({"smooth": math.nan}, ValueError, "nan"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        ({"ignore_index": 1.5}, TypeError, "1.5"),
        ({"loss_weight": -1}, ValueError, "loss_weight"),
        ({"loss_name": "dice"}, ValueError, "loss_name must start with 'loss_'"),
        ({"class_weight": [1, -2]}, ValueError, "-2"),
        ({"preset": "smp"}, ValueError, "preset must be one of smp-dice.*'smp'"),
        ({"eps": 0.1}, TypeError, "unknown keyword 'eps'. Did you mean smooth?"),
        ({"naive_dice": True}, TypeError, "Did you mean squared?"),
        ({"batch_dice": True}, TypeError, "Did you mean pool='batch'?"),
        ({"knd": "dice"}, TypeError, "Did you mean kind?"),
        ({"xyzzy": 1}, TypeError, "unknown keyword 'xyzzy'. Allowed: kind, alpha"),
    ],
)
def test_bad_settings_are_refused_at_build_time(kwargs, error, message):
    with pytest.raises(error, match=message):
        RegionLoss(**kwargs)


@pytest.mark.parametrize(
    ("logits", "target", "kwargs", "error", "message"),
    [
        ((1, 3, 4), torch.full((1, 4), 3), {}, ValueError, r"label 3.*\(0 to 2\).*\(255\)"),
        ((1, 1, 4), torch.full((1, 4), 2), {"use_sigmoid": True}, ValueError, "label 2"),
        ((1, 3, 4), torch.zeros(1, 4), {}, TypeError, "torch.float32"),
        ((1, 3, 4), torch.zeros(2, 4).long(), {}, ValueError, r"\(1, 3, 4\).*\(2, 4\)"),
        ((1, 3, 4), torch.zeros(1, 2).long(), {}, ValueError, "larger"),
        ((1, 3, 4), torch.zeros(1, 4).long(), {"class_weight": [1, 2]}, ValueError, "3 classes"),
    ],
)
def test_bad_inputs_are_refused(logits, target, kwargs, error, message):
    with pytest.raises(error, match=message):
        RegionLoss(**kwargs)(torch.zeros(logits), target)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_map_is_refused(reduction):
    logits, target = batch(0)
    with pytest.raises(ValueError, match=f"None or 'mean', but got '{reduction}'"):
        RegionLoss()(logits, target, reduction_override=reduction)
    expected = RegionLoss()(logits, target)
    assert torch.equal(RegionLoss()(logits, target, reduction_override="mean"), expected)


def test_accuracy_beside_the_loss(backend):
    logits, _ = batch(3, (2, 4, 6, 5))
    target = torch.randint(0, 4, (2, 12, 10), generator=torch.Generator().manual_seed(0))
    target[:, :3] = 255
    stats = {}
    region_loss(logits, target, stats=stats)
    big = torch.nn.functional.interpolate(logits, size=(12, 10), mode="bilinear")
    assert stats["hits"] == ((big.argmax(1) == target) & (target != 255)).sum()
    assert stats["num_valid"] == (target != 255).sum()


# One pass for a cross-entropy and an overlap loss


@st.composite
def pairs(draw):
    use_sigmoid = draw(st.booleans())
    channels = draw(st.integers(1 if use_sigmoid else 2, 5))
    logits, target = batch(
        draw(st.integers(0, 10**6)),
        (draw(st.integers(1, 2)), channels, *draw(st.sampled_from([(3, 5), (6, 4), (7,)]))),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64])),
    )
    if draw(st.booleans()):
        size = [2 * n + 1 for n in target.shape[1:]]
        target = torch.nn.functional.interpolate(target[:, None].float(), size=size).long()
    rule = draw(rules(max(2, channels)))
    if rule["class_weight"] is not None:
        rule["class_weight"] = rule["class_weight"].tolist()
    pixels = {
        "thresh": draw(st.sampled_from([None, 0.4, 0.9])),
        "min_kept": draw(st.sampled_from([0.25, 1.0])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    losses = [
        OhemCrossEntropyLoss(use_sigmoid=use_sigmoid, **pixels),
        RegionLoss(use_sigmoid=use_sigmoid, **rule),
    ]
    if draw(st.booleans()):
        losses.append(RegionLoss(use_sigmoid=use_sigmoid, kind="jaccard"))
    if draw(st.booleans()):
        losses.append(OhemCrossEntropyLoss(use_sigmoid=use_sigmoid, thresh=0.2))
    return logits, target, draw(st.permutations(losses))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pair=pairs())
def test_joint_losses_equal_separate_ones(backend, pair):
    logits, target, losses = pair
    stats, apart = {}, {}
    together = logits.clone().requires_grad_()
    values = joint_losses(losses, together, target, stats=stats)
    sum((i + 1) * value for i, value in enumerate(values)).backward()
    alone = logits.clone().requires_grad_()
    expected = [loss(alone, target, stats=apart) for loss in losses]
    sum((i + 1) * value for i, value in enumerate(expected)).backward()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
    tolerance = GRAD_TOLERANCE[logits.dtype]
    torch.testing.assert_close(together.grad, alone.grad, rtol=tolerance, atol=tolerance)
    assert stats.keys() == apart.keys()
    assert stats["hits"] == apart["hits"]


def count_passes(monkeypatch):
    calls = []
    run = portable.Source.for_each_band

    def counted(self, function):
        calls.append(1)
        return run(self, function)

    monkeypatch.setattr(portable.Source, "for_each_band", counted)
    return calls


@pytest.mark.parametrize(
    ("second", "passes"),
    [
        ({}, 2),
        ({"kind": "jaccard", "pool": "image", "classes": "all", "class_weight": [1, 2, 3, 4]}, 2),
        ({"label_smoothing": 0.1}, 2),
        ({"ignore_index": 3}, 4),  # other pixels
        ({"use_sigmoid": True}, 4),
        ({"align_corners": True}, 4),
    ],
)
def test_a_pair_takes_two_passes_where_it_can(monkeypatch, second, passes):
    calls = count_passes(monkeypatch)
    logits, _ = batch(1)
    target = torch.randint(0, 4, (2, 12, 10), generator=torch.Generator().manual_seed(0))
    losses = [OhemCrossEntropyLoss(thresh=0.9), RegionLoss(**second)]
    logits.requires_grad_()
    sum(joint_losses(losses, logits, target)).backward()
    assert len(calls) == passes


def test_a_loss_of_other_pixels_takes_no_part_in_the_common_pass():
    logits, target = batch(2, dtype=torch.float64)
    target[target == 255] = 3
    losses = [
        OhemCrossEntropyLoss(ignore_index=3),
        RegionLoss(ignore_index=3),
        RegionLoss(ignore_index=2),
        OhemCrossEntropyLoss(ignore_index=2),
    ]
    together = joint_losses(losses, logits, target)
    apart = [loss(logits, target) for loss in losses]
    torch.testing.assert_close(together, apart)
    assert not torch.isclose(apart[1], apart[2])


def test_joint_losses_with_nothing_valid_or_not_finite(backend):
    losses = [OhemCrossEntropyLoss(), RegionLoss()]
    logits = torch.full((2, 3, 4, 4), math.nan, requires_grad=True)
    sum(joint_losses(losses, logits, torch.full((2, 4, 4), 255))).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 3, 4, 4))
    values = joint_losses(losses, logits, torch.zeros(2, 4, 4, dtype=torch.long))
    assert all(value.isnan() for value in values)


def test_memory_is_that_of_a_band():
    """No tensor of the size of the upsampled logits is made, nor one of a map in float64."""
    logits = torch.randn(1, 16, 16, 16, requires_grad=True)
    target = torch.randint(0, 16, (1, 512, 512), dtype=torch.uint8)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor):
                    largest.append(value.numel() * value.element_size())
            return out

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a mode sees its own thread
    try:
        with Watch():
            region_loss(logits, target).backward()
    finally:
        torch.set_num_threads(before)
    assert max(largest) < 16 * 512 * 512 * 4 / 2
    assert ops.choose_backend(logits) == "portable"
