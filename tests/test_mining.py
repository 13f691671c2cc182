"""Selection alone: ``mining.keep_pixels`` against the oracle, and ranks against one process."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import slow
from ranks import averaged, on_ranks

from ohem_mm import ohem_cross_entropy, reference
from ohem_mm.mining import keep_pixels
from ohem_mm.rule import Habits, OhemRule

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


# pool='world': several processes equal one process on the batches put together


RULES = [
    {"thresh": 0.7, "min_kept": 1 / 16},
    {"thresh": 0.05, "min_kept": 0.3},
    {"thresh": None, "min_kept": 37},
    {"thresh": 0.05, "min_kept": 7, "min_kept_per": "image", "avg": "valid"},
    {"thresh": 0.05, "min_kept": 10_000, "avg": "all", "always_keep": (1,)},
    {
        "thresh": 0.3,
        "min_kept": 25,
        "weighted_mean": True,
        "class_weight": torch.tensor([0.2, 1.0, 3.0]),
    },
    # Ignored pixels take places, of which one rank may have more than another.
    {"thresh": None, "min_kept": 0.29, "habits": Habits(ignored_take_slots=True, float_share=1)},
    {"thresh": 0.3, "min_kept": 55, "habits": Habits(ignored_take_slots=True)},
    {"thresh": 0.3, "min_kept": 1 / 16, "habits": Habits(ignored_take_slots=True)},
]
# Sizes of the batches of up to three ranks, and whether the second rank has valid pixels. An empty
# batch must not leave the other ranks waiting.
SIZES = [(2, 2, 2), (1, 3, 2), (2, 0, 1)]


def world_problem(sizes, second_is_ignored):
    generator = torch.Generator().manual_seed(0)
    batches = []
    for rank, images in enumerate(sizes):
        logits = torch.randn(images, 3, 5, 6, generator=generator, dtype=torch.float64) * 3
        logits = logits.round()  # ties across ranks
        target = torch.randint(0, 3, (images, 5, 6), generator=generator)
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
        loss = ohem_cross_entropy(logits, target, pool="world", **rule)
        loss.backward()
        results.append(averaged(loss, logits, ranks))
    return results


@pytest.mark.parametrize("ranks", [2, slow(3)])
def test_equals_one_process(ranks):
    per_rank = on_ranks(ranks, run_rank)
    cases = list(itertools.product(RULES, SIZES, [False, True]))
    assert len(cases) == len(per_rank[0])
    for index, (rule, sizes, ignored) in enumerate(cases):
        batches = world_problem(sizes[:ranks], ignored)
        logits = torch.cat([logits for logits, _ in batches]).requires_grad_()
        target = torch.cat([target for _, target in batches])
        expected = ohem_cross_entropy(logits, target, pool="batch", **rule)
        expected.backward()
        grads = torch.cat([results[index][1] for results in per_rank])
        for results in per_rank:
            torch.testing.assert_close(
                results[index][0], expected.detach(), rtol=1e-6, atol=1e-9, msg=f"{rule} {sizes}"
            )
        torch.testing.assert_close(grads, logits.grad, rtol=1e-6, atol=1e-9)


def test_without_a_process_group_it_is_batch():
    logits, target = world_problem((3,), False)[0]
    for rule in RULES:
        batch = ohem_cross_entropy(logits, target, pool="batch", **rule)
        assert torch.equal(ohem_cross_entropy(logits, target, pool="world", **rule), batch)
