"""The region term against the float64 oracle, in value and gradient, and at the edges."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import GRAD_TOLERANCE, SHAPES, batch, rules, value_and_grad

from ohem_mm import RegionLoss, reference, region_loss
from ohem_mm.rule import RegionHabits


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


def test_one_pixel(backend):
    logits = torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)
    target = torch.tensor([[[2]]])
    p = logits.softmax(1)[0, 2].item()
    loss, grad = value_and_grad(region_loss, logits, target)
    assert loss.item() == pytest.approx(1 - 2 * p / (p + 1))
    assert grad[0, 2] < 0
    assert (grad[0, :2] > 0).all()


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
