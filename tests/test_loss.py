"""The loss against the float64 oracle, in value and gradient, and its behaviour at the edges."""

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import GRAD_TOLERANCE, SHAPES, batch, value_and_grad

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, reference


@st.composite
def problems(draw):
    use_sigmoid = draw(st.booleans())
    channels = draw(st.integers(1 if use_sigmoid else 2, 5))
    classes = max(2, channels)
    shape = (draw(st.integers(1, 3)), channels, *draw(st.sampled_from(SHAPES)))
    dtype = draw(st.sampled_from(list(GRAD_TOLERANCE)))
    logits, target = batch(
        draw(st.integers(0, 10**6)),
        shape,
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        # Large logits in float64 alone: the losses of easy pixels round to ties in float32, and the
        # oracle's do not.
        scale=draw(st.sampled_from([0.0, 0.1, 3.0] + [30.0, 300.0] * (dtype == torch.float64))),
        dtype=dtype,
    )
    if draw(st.booleans()):  # ties: the same pixel many times
        flat = logits.flatten(2) if logits.dim() > 2 else logits[:, :, None]
        logits = flat[:1, :, :1].expand(flat.shape).reshape(shape).clone()
        target = torch.where(target == 255, 255, draw(st.integers(0, classes - 1)))
    kind = draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
    if draw(st.booleans()) and logits.dim() > 2:
        target = target[:, None]
    weights = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.1
    rule = {
        # Not 1.0: there the rounding of a loss to 0 decides, which differs between dtypes.
        "thresh": draw(st.sampled_from([None, 0.3, 0.7, 0.99])),
        "min_kept": draw(st.sampled_from([0, 1, 3, 50, 1 / 16, 0.5, 1.0])),
        "pool": draw(st.sampled_from(["batch", "image", "class", "world"])),
        "min_kept_per": draw(st.sampled_from(["batch", "image"])),
        "always_keep": draw(st.sampled_from([(), (1,)])),
        "avg": draw(st.sampled_from(["kept", "valid", "all"])),
        "weighted_mean": draw(st.booleans()),
        "avg_factor": draw(st.sampled_from([None, 7.0])),
        "use_sigmoid": use_sigmoid,
        "class_weight": draw(st.sampled_from([None, weights])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
    }
    if rule["avg_factor"] is None:
        rule["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    weight = None
    if draw(st.booleans()):
        shape = target.shape
        weight = torch.rand(shape, generator=torch.Generator().manual_seed(2)).round(decimals=1)
    return logits, target.to(kind), weight, rule


@settings(max_examples=800, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(problem=problems())
def test_equals_oracle_in_value_and_gradient(backend, problem):
    logits, target, weight, rule = problem
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, weight, **rule)
    expected, expected_grad = value_and_grad(
        reference.ohem_cross_entropy, logits.double(), target, weight, **rule
    )
    exact = logits.dtype == torch.float64
    assert loss.dtype == (torch.float64 if exact else torch.float32)
    assert grad.dtype == logits.dtype
    tolerance = 1e-9 if exact else 1e-5
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    tolerance = GRAD_TOLERANCE[logits.dtype]
    torch.testing.assert_close(grad.double(), expected_grad, rtol=tolerance, atol=tolerance)


RULES = st.fixed_dictionaries(
    {
        "thresh": st.sampled_from([None, 0.3, 0.7]),
        "min_kept": st.sampled_from([0, 3, 20, 1 / 16, 0.5]),
        "pool": st.sampled_from(["batch", "class"]),
        "avg": st.sampled_from(["kept", "valid"]),
        "use_sigmoid": st.booleans(),
    }
)


@settings(max_examples=100)
@given(st.integers(0, 10**6), RULES)
def test_order_of_pixels_and_images_is_irrelevant(seed, rule):
    logits, target = batch(seed, (3, 4, 5, 6), dtype=torch.float64)
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(target.numel(), generator=generator)
    flat = logits.movedim(1, -1).reshape(-1, 4)[order]
    pixels, pixels_grad = value_and_grad(
        ohem_cross_entropy, flat.view(3, 30, 4).mT, target.flatten()[order].view(3, 30), **rule
    )
    torch.testing.assert_close(pixels, loss)
    torch.testing.assert_close(
        pixels_grad.mT.reshape(-1, 4), grad.movedim(1, -1).reshape(-1, 4)[order]
    )
    rule["pool"] = "image"
    images = torch.tensor([2, 0, 1])
    loss = ohem_cross_entropy(logits, target, **rule)
    torch.testing.assert_close(ohem_cross_entropy(logits[images], target[images], **rule), loss)


@settings(max_examples=100)
@given(st.integers(0, 10**6), RULES)
def test_more_ignored_pixels_change_nothing(seed, rule):
    logits, target = batch(seed, (2, 4, 5, 6), dtype=torch.float64)
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    wide = torch.nn.functional.pad(logits, (2, 3, 1, 0), value=7.0)
    labels = torch.nn.functional.pad(target, (2, 3, 1, 0), value=255)
    padded, padded_grad = value_and_grad(ohem_cross_entropy, wide, labels, **rule)
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(padded_grad[:, :, 1:, 2:-3], grad)
    padded_grad[:, :, 1:, 2:-3] = 0
    assert not padded_grad.any()


@settings(max_examples=100)
@given(st.integers(0, 10**6), st.sampled_from([0, 7, 0.3]), st.sampled_from(["batch", "image"]))
def test_higher_thresh_keeps_more(seed, min_kept, pool):
    logits, target = batch(seed)
    kept = None
    for thresh in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0):
        rule = {"thresh": thresh, "min_kept": min_kept, "pool": pool, "reduction": "none"}
        now = ohem_cross_entropy(logits, target, **rule) > 0
        assert kept is None or bool((now | ~kept).all())
        kept = now
    assert torch.equal(kept, target != 255)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("use_sigmoid", [False, True])
def test_extreme_logits_in_float32(dtype, use_sigmoid):
    logits, target = batch(2, (2, 4, 20, 20), scale=10_000.0, dtype=dtype)
    rule = {"thresh": 0.7, "min_kept": 0.5, "use_sigmoid": use_sigmoid}
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    expected, expected_grad = value_and_grad(
        reference.ohem_cross_entropy, logits.double(), target, **rule
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-6)


def test_textbook_value():
    torch.manual_seed(20)
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    loss = OhemCrossEntropyLoss(thresh=0.7, min_kept=1 / 16, ignore_index=255)(logits, labels)
    assert f"{loss.item():.8f}" == "1.33107340"


def test_textbook_formula_for_binary_problems():
    logits, target = batch(3, (2, 1, 5, 7), ignored=0)
    p = logits.double().sigmoid().squeeze(1)
    background = torch.where(1 - p < 0.7, (1 - p).log(), torch.zeros(()).double())
    expected = -torch.where(target == 1, p.log(), background).sum() / target.numel()
    loss = ohem_cross_entropy(
        logits, target, thresh=0.7, use_sigmoid=True, always_keep=[1], avg="all", min_kept=0
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


def all_but_one_easy(gap, pixels=32):
    """Two classes; one pixel at even odds, the others right by ``gap``, all of class 0."""
    logits = torch.zeros(1, 2, 4, pixels // 4)
    logits[:, 0] = gap
    logits[0, 0, 0, 0] = 0
    return logits, torch.zeros(1, 4, pixels // 4, dtype=torch.long)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_scale_holds_when_easy_pixels_tie(backend, dtype):
    # In float32 a gap of 30 is a loss of exactly 0. The floor asks for two pixels of 32.
    logits, target = all_but_one_easy(30)
    for settings_ in ({"preset": "bisenet"}, {"preset": "hrnet", "min_kept": 2}):
        stats = {"kept": None}
        loss = OhemCrossEntropyLoss(**settings_)(logits.to(dtype), target, stats=stats)
        assert loss.item() == pytest.approx(math.log(2) / 2, rel=1e-6)
        assert stats["kept"].sum().item() == pytest.approx(2, rel=1e-6)
        assert stats["kept"][0, 0, 0] == 1


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from(["kept", "valid", "all"]))
def test_ties_equal_the_mean_over_all_ways_to_break_them(backend, seed, k, avg):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-1, 2, (1, 2, 6), generator=generator).double()
    target = torch.randint(0, 2, (1, 6), generator=generator)
    weight = torch.rand(1, 6, generator=generator, dtype=torch.float64)
    loss, grad = value_and_grad(
        ohem_cross_entropy, logits, target, weight, thresh=None, min_kept=k, avg=avg
    )
    losses = reference.pixel_losses(logits[0].T, target[0])
    kth = losses.topk(k).values[-1]
    above = (losses > kth + 1e-12).nonzero().flatten().tolist()
    tied = (losses - kth).abs().le(1e-12).nonzero().flatten().tolist()
    ways = list(itertools.combinations(tied, k - len(above)))
    divisor = k if avg == "kept" else 6
    values = []
    gradients = torch.zeros_like(logits)
    for way in ways:
        leaf = logits.clone().requires_grad_()
        chosen = (reference.pixel_losses(leaf[0].T, target[0]) * weight[0])[[*above, *way]]
        value = chosen.sum() / divisor
        value.backward()
        values.append(value.item())
        gradients += leaf.grad / len(ways)
    assert loss.item() == pytest.approx(sum(values) / len(values))
    torch.testing.assert_close(grad, gradients)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 11))
def test_a_broken_tie_changes_the_loss_no_more_than_the_pixel(backend, seed, k, place):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-1, 2, (1, 2, 12), generator=generator).double()
    target = torch.randint(0, 2, (1, 12), generator=generator)
    moved = logits.clone()
    moved[0, 0, place] += 1e-6
    rule = {"thresh": None, "min_kept": k}
    before, after = (ohem_cross_entropy(z, target, **rule) for z in (logits, moved))
    # The mean of the k hardest is a continuous function: one loss moves by 1e-6 at most.
    assert abs(before.item() - after.item()) <= 1e-6 / k + 1e-12


def test_threshold_is_strict():
    logits, target = torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 4, dtype=torch.long)
    assert ohem_cross_entropy(logits, target, thresh=0.5, min_kept=0) == 0  # p is not below 0.5
    assert ohem_cross_entropy(logits, target, thresh=0.51, min_kept=0) == pytest.approx(math.log(2))


def test_mining_looks_at_the_unweighted_loss():
    # Pixel 0 is hard with a tiny weight, pixel 1 easier with a huge one.
    logits = torch.tensor([[[0.0, 3.0], [2.0, 0.0]]])  # (1, 2, 2), classes 0 and 0
    target = torch.tensor([[0, 0]])
    weight = torch.tensor([[0.01, 100.0]])
    kept = ohem_cross_entropy(logits, target, weight, thresh=None, min_kept=1, reduction="none")
    assert kept[0, 0] > 0
    assert kept[0, 1] == 0


def test_gradcheck():
    logits, target = batch(5, (2, 3, 3, 2), dtype=torch.float64)
    logits.requires_grad_()
    weight = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1)).double()
    for rule in (
        {"thresh": 0.7, "min_kept": 3},
        {"thresh": None, "min_kept": 0.4, "label_smoothing": 0.2, "avg": "valid"},
        {"thresh": 0.5, "use_sigmoid": True, "label_smoothing": 0.1, "reduction": "none"},
    ):
        assert torch.autograd.gradcheck(
            lambda x, rule=rule: ohem_cross_entropy(x, target, weight, **rule), logits
        )


@pytest.mark.parametrize("pool", ["batch", "image", "class", "world"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_nothing_valid_is_a_connected_zero(pool, shape):
    logits = torch.full(shape, torch.nan)  # not looked at
    target = torch.full((shape[0], *shape[2:]), 255)
    for avg in ("kept", "valid", "all"):
        loss, grad = value_and_grad(ohem_cross_entropy, logits, target, pool=pool, avg=avg)
        assert loss == 0
        assert torch.equal(grad, torch.zeros(shape))


def test_nothing_kept_is_a_connected_zero():
    logits = torch.tensor([20.0, 0.0]).view(1, 2, 1, 1)
    loss, grad = value_and_grad(
        ohem_cross_entropy, logits, torch.zeros(1, 1, 1, dtype=torch.long), min_kept=0
    )
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize("rule", [{"min_kept": 0}, {"thresh": None, "min_kept": 1}])
def test_non_finite_logits(bad, use_sigmoid, rule):
    logits, target = batch(0, ignored=0.0)
    target[0, 0, 0], target[1, 2, 2] = 255, 1
    ignored = logits.clone()
    ignored[0, :, 0, 0] = bad
    rule = {"use_sigmoid": use_sigmoid, **rule}
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    same, same_grad = value_and_grad(ohem_cross_entropy, ignored, target, **rule)
    assert torch.equal(loss, same)
    assert torch.equal(grad, same_grad)

    logits[1, 1, 2, 2] = bad  # at a valid pixel, and on its true class
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    assert not loss.isfinite()
    assert grad[1, :, 2, 2].isnan().all()


def test_masked_class_costs_nothing():
    """A logit of -inf is a probability of zero, which is fine except on the true class."""
    logits, target = batch(0, ignored=0.0)
    logits[:, 3], target[target == 3] = -math.inf, 0
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, thresh=1.0)
    expected = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)
    assert grad.isfinite().all()


def test_half_precision_saturation_is_exact():
    logits = torch.tensor([60000.0, -60000.0]).half().view(1, 2, 1, 1)
    loss, grad = value_and_grad(ohem_cross_entropy, logits, torch.ones(1, 1, 1, dtype=torch.long))
    assert loss == logits[0, 0].float() - logits[0, 1].float()
    assert grad.flatten().tolist() == [1.0, -1.0]


def test_thresh_one_is_plain_cross_entropy():
    logits, target = batch(7)
    loss = ohem_cross_entropy(logits, target, thresh=1.0)
    expected = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_class_weights_as_in_torch():
    logits, target = batch(8)
    weights = torch.tensor([0.5, 1.0, 2.0, 4.0])
    loss = ohem_cross_entropy(logits, target, thresh=1.0, class_weight=weights, weighted_mean=True)
    expected = torch.nn.functional.cross_entropy(logits, target, weight=weights, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_runs_under_deterministic_algorithms():
    logits, target = batch(10)
    torch.use_deterministic_algorithms(True)
    try:
        first = value_and_grad(ohem_cross_entropy, logits, target, pool="class", min_kept=0.9)
        second = value_and_grad(ohem_cross_entropy, logits, target, pool="class", min_kept=0.9)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_autocast_does_not_change_the_decisions():
    logits, target = batch(11)
    expected = ohem_cross_entropy(logits, target, thresh=0.4, reduction="none")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ohem_cross_entropy(logits, target, thresh=0.4, reduction="none")
    assert torch.equal(expected, result)


# The module


def test_thresh_above_half_keeps_the_decision_and_bounds_the_confidence():
    """Groups of pixels that look alike, with a share of class 1: what the loss wants as answer."""
    shares = torch.tensor([0.1, 0.4, 0.6, 0.9])
    target = (torch.arange(100)[:, None] < (100 * shares).round()).long().T.reshape(1, 400)
    expected = {
        (1.0, ()): shares,
        (0.7, ()): shares.clamp(0.3, 0.7),
        (0.7, (1,)): shares.clamp(0.3),
    }
    for (thresh, always_keep), answer in expected.items():
        logits = torch.zeros(2, 4, requires_grad=True)
        optimizer = torch.optim.Adam([logits], 0.02)
        for _ in range(300):
            optimizer.zero_grad()
            ohem_cross_entropy(
                logits.repeat_interleave(100, 1)[None],
                target,
                thresh=thresh,
                min_kept=0,
                always_keep=always_keep,
            ).backward()
            optimizer.step()
        torch.testing.assert_close(logits.detach().softmax(0)[1], answer, atol=0.03, rtol=0)


def test_module_equals_function():
    logits, target = batch(12)
    weight = torch.rand(target.shape)
    settings_ = {
        "thresh": 0.5,
        "min_kept": 7,
        "pool": "image",
        "avg": "valid",
        "label_smoothing": 0.1,
    }
    loss = OhemCrossEntropyLoss(**settings_, class_weight=[1, 2, 3, 4], loss_weight=0.4)
    expected = 0.4 * ohem_cross_entropy(
        logits, target, weight, **settings_, class_weight=torch.tensor([1.0, 2, 3, 4])
    )
    torch.testing.assert_close(loss(logits, target, weight), expected)
    torch.testing.assert_close(loss(logits, target[:, None], weight=weight, junk=1), expected)
    assert loss.state_dict() == {}
    assert loss.loss_name == "loss_ohem"


def test_who_sets_ignore_index():
    logits, _ = batch(13, ignored=0)
    target = torch.zeros(2, 6, 5, dtype=torch.long)
    target[0], target[1, 0] = 9, 255
    marked = target.clone()
    marked[marked == 9] = 255
    expected = ohem_cross_entropy(logits, marked)
    with pytest.raises(ValueError, match="label 9"):
        OhemCrossEntropyLoss()(logits, target)  # nobody says: 255
    target[1, 0] = 9
    torch.testing.assert_close(OhemCrossEntropyLoss()(logits, target, ignore_index=9), expected)
    torch.testing.assert_close(
        OhemCrossEntropyLoss(ignore_index=9)(logits, target, ignore_index=255), expected
    )


def test_reduction_override_gives_the_map_that_samplers_sort():
    logits, target = batch(14)
    loss = OhemCrossEntropyLoss(min_kept=0.3)
    loss_map = loss(logits, target, ignore_index=255, reduction_override="none")
    assert loss_map.shape == target.shape
    torch.testing.assert_close(loss_map.sum() / (loss_map > 0).sum(), loss(logits, target))
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum"):
        loss(logits, target, reduction_override="median")


def test_avg_factor_does_not_go_with_sum():
    logits, target = batch(17)
    with pytest.raises(ValueError, match="avg_factor"):
        ohem_cross_entropy(logits, target, avg_factor=3.0, reduction="sum")
