"""Selection alone: ``mining.keep_pixels`` against the oracle on the same losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ohem_mm import reference
from ohem_mm.mining import keep_pixels
from ohem_mm.rule import OhemRule

# Few distinct values, so that ties are the rule; -log(0.7) sits exactly on a threshold.
GRID = [0.0, -0.0, 1e-30, 0.1, -math.log(0.7), 0.36, 0.7, 2.0, 50.0, math.inf, math.nan]


@st.composite
def problems(draw):
    shape = (draw(st.integers(1, 3)), *draw(st.lists(st.integers(1, 4), max_size=3)))
    count = math.prod(shape)
    value = st.sampled_from(GRID) | st.floats(0, 20, width=32)
    loss = draw(st.lists(value, min_size=count, max_size=count))
    classes = draw(st.integers(1, 4))
    target = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    valid = draw(
        st.lists(st.booleans(), min_size=count, max_size=count)
        | st.just([True] * count)
        | st.just([False] * count)
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    tensors = (
        torch.tensor(loss, dtype=dtype).view(shape),
        torch.tensor(target).view(shape),
        torch.tensor(valid).view(shape),
    )
    rule = {
        "thresh": draw(st.sampled_from([None, 0.05, 0.5, 0.7, 1.0])),
        "min_kept": draw(
            st.integers(0, 12) | st.sampled_from([0.0, 1 / 16, 0.29, 1 / 3, 0.9, 1.0])
        ),
        "pool": draw(st.sampled_from(["batch", "image", "class", "world"])),
        "min_kept_per": draw(st.sampled_from(["batch", "image"])),
        "always_keep": draw(st.lists(st.integers(0, classes - 1), max_size=2)),
    }
    return tensors, classes, rule


def weights(loss, target, valid, classes, **rule):
    kept = keep_pixels(loss, target, valid, OhemRule(**rule), classes)
    found = kept.weights(loss.dtype)
    assert torch.equal(found > 0, kept.mask)
    torch.testing.assert_close(kept.total(loss.dtype), found.sum())
    return found


def oracle(loss, target, valid, rule):
    """The oracle's weights; on losses rounded as the threshold is."""
    places = valid.flatten().nonzero().flatten().tolist()
    thresh = rule["thresh"]
    losses = loss.flatten()[places].double()
    if thresh is not None and loss.dtype == torch.float32:
        # A loss equal to the float32 threshold is on it, not above it.
        limit = torch.tensor(-math.log(thresh), dtype=torch.float32)
        losses[losses == limit.double()] = -math.log(thresh)
    image = [place // max(1, loss[0].numel()) for place in places]
    kept = reference.kept_weights(
        losses.tolist(), target.flatten()[places].tolist(), image, images=len(loss), **rule
    )
    out = torch.zeros(loss.numel(), dtype=loss.dtype)
    out[places] = torch.tensor(kept, dtype=loss.dtype)
    return out.view(loss.shape)


@settings(max_examples=1500)
@given(problems())
def test_equals_oracle(problem):
    (loss, target, valid), classes, rule = problem
    kept = weights(loss, target, valid, classes, **rule)
    assert torch.equal(kept, oracle(loss, target, valid, rule)), rule


@settings(max_examples=300)
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_pixels_is_irrelevant(problem, random):
    (loss, target, valid), classes, rule = problem
    if rule["pool"] == "image":
        rule["pool"] = "batch"
    order = list(range(loss.numel()))
    random.shuffle(order)
    kept = weights(loss, target, valid, classes, **rule)
    shuffled = [t.flatten()[order].view(loss.shape) for t in (loss, target, valid)]
    assert torch.equal(weights(*shuffled, classes, **rule).flatten(), kept.flatten()[order])


@settings(max_examples=300)
@given(problems())
def test_floor_is_met_and_ignored_pixels_stay_out(problem):
    (loss, target, valid), classes, rule = problem
    rule["pool"], k = "batch", 5
    rule["min_kept"], rule["min_kept_per"] = k, "batch"
    kept = weights(loss, target, valid, classes, **rule)
    assert not kept[~valid].any()
    k = min(k, int(valid.sum()))
    assert kept.sum() >= k * (1 - 1e-6)
    sure = weights(loss, target, valid, classes, **{**rule, "min_kept": 0})
    if not rule["always_keep"] and sure.sum() < k:
        # Where the floor decides, the weights are k in sum, however many pixels are tied.
        torch.testing.assert_close(kept.sum(), torch.tensor(k, dtype=kept.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_value_is_exact_on_many_pixels(dtype):
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(4, 30_000, generator=generator, dtype=dtype).pow(4)
    valid = torch.rand(4, 30_000, generator=generator) < 0.7
    target = torch.zeros(4, 30_000, dtype=torch.long)
    for k in (1, 2, 4999, 60_000):
        kept = weights(loss, target, valid, 1, thresh=None, min_kept=k)
        kth = loss[valid].topk(k).values[-1]
        assert torch.equal(kept > 0, valid & (loss >= kth))
        torch.testing.assert_close(kept.sum(), torch.tensor(k, dtype=dtype))


def test_share_is_exact_where_floats_are_not():
    loss = torch.arange(100.0).view(1, 100)
    target, valid = torch.zeros(1, 100, dtype=torch.long), torch.ones(1, 100, dtype=torch.bool)
    assert 100 * 0.29 < 29  # the trap
    assert weights(loss, target, valid, 1, thresh=None, min_kept=0.29).sum() == 29
