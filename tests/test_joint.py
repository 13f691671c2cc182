"""One pass for a cross-entropy and an overlap loss."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from problems import GRAD_TOLERANCE, batch, rules

from ohem_mm import OhemCrossEntropyLoss, RegionLoss
from ohem_mm.joint import joint_losses
from ohem_mm.ops import portable


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
