"""Selection alone: ``mining.keep_mask`` against the oracle on the same losses, bit for bit."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ohem_mm import reference
from ohem_mm.mining import keep_mask

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


def oracle(loss, target, valid, rule):
    """The oracle's decisions, as a mask; on losses rounded as the threshold is."""
    places = valid.flatten().nonzero().flatten().tolist()
    thresh = rule["thresh"]
    losses = loss.flatten()[places].double()
    if thresh is not None and loss.dtype == torch.float32:
        # A loss equal to the float32 threshold is on it, not above it.
        limit = torch.tensor(-math.log(thresh), dtype=torch.float32)
        losses[losses == limit.double()] = -math.log(thresh)
    image = [place // max(1, loss[0].numel()) for place in places]
    kept = reference.kept_pixels(
        losses.tolist(), target.flatten()[places].tolist(), image, images=len(loss), **rule
    )
    mask = torch.zeros(loss.numel(), dtype=torch.bool)
    mask[places] = torch.tensor(kept, dtype=torch.bool)
    return mask.view(loss.shape)


@settings(max_examples=1500)
@given(problems())
def test_equals_oracle(problem):
    (loss, target, valid), classes, rule = problem
    kept = keep_mask(loss, target, valid, classes, **rule)
    assert torch.equal(kept, oracle(loss, target, valid, rule)), rule


@settings(max_examples=300)
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_pixels_is_irrelevant(problem, random):
    (loss, target, valid), classes, rule = problem
    if rule["pool"] == "image":
        rule["pool"] = "batch"
    order = list(range(loss.numel()))
    random.shuffle(order)
    kept = keep_mask(loss, target, valid, classes, **rule)
    shuffled = [t.flatten()[order].view(loss.shape) for t in (loss, target, valid)]
    assert torch.equal(keep_mask(*shuffled, classes, **rule).flatten(), kept.flatten()[order])


@settings(max_examples=300)
@given(problems())
def test_floor_is_met_and_ignored_pixels_stay_out(problem):
    (loss, target, valid), classes, rule = problem
    rule["pool"], k = "batch", 5
    rule["min_kept"], rule["min_kept_per"] = k, "batch"
    kept = keep_mask(loss, target, valid, classes, **rule)
    assert not (kept & ~valid).any()
    assert kept.sum() >= min(k, int(valid.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_value_is_exact_on_many_pixels(dtype):
    generator = torch.Generator().manual_seed(0)
    loss = torch.rand(4, 30_000, generator=generator, dtype=dtype).pow(4)
    valid = torch.rand(4, 30_000, generator=generator) < 0.7
    target = torch.zeros(4, 30_000, dtype=torch.long)
    for k in (1, 2, 4999, 60_000):
        kept = keep_mask(loss, target, valid, 1, thresh=None, min_kept=k)
        kth = loss[valid].topk(k).values[-1]
        assert torch.equal(kept, valid & (loss >= kth))


def test_share_is_exact_where_floats_are_not():
    loss = torch.arange(100.0).view(1, 100)
    target, valid = torch.zeros(1, 100, dtype=torch.long), torch.ones(1, 100, dtype=torch.bool)
    assert 100 * 0.29 < 29  # the trap
    assert keep_mask(loss, target, valid, 1, thresh=None, min_kept=0.29).sum() == 29
