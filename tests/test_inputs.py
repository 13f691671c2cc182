"""What the losses accept, and what they say of anything else."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import batch

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy
from ohem_mm.inputs import _channels_last


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.bool])
@pytest.mark.parametrize("ignore_index", [255, -100, 1])
@pytest.mark.parametrize("pool", ["batch", "class"])
def test_labels_of_any_integer_dtype(dtype, ignore_index, pool):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, generator=generator)
    target = torch.randint(0, 2, (2, 8, 10), generator=generator).to(dtype)
    options = {"ignore_index": ignore_index, "pool": pool, "class_weight": torch.arange(1.0, 4)}
    stats = {}
    result = ohem_cross_entropy(logits, target, stats=stats, **options)
    assert torch.equal(result, ohem_cross_entropy(logits, target.long(), **options))
    assert stats["num_valid"] == (target.long() != ignore_index).sum()


def test_negative_ignore_index_with_unsigned_labels():
    logits, target = batch(15, ignored=0)
    loss = OhemCrossEntropyLoss(ignore_index=-100)
    torch.testing.assert_close(loss(logits, target.to(torch.uint8)), loss(logits, target))


@pytest.mark.parametrize(
    ("logits", "target", "kwargs", "error", "message"),
    [
        ((1, 3, 4), torch.full((1, 4), 3), {}, ValueError, r"label 3.*\(0 to 2\).*\(255\)"),
        ((1, 3, 4), torch.full((1, 4), -1), {}, ValueError, "label -1"),
        ((1, 1, 4), torch.full((1, 4), 2), {"use_sigmoid": True}, ValueError, "label 2"),
        ((1, 1, 4), torch.full((1, 4), 2), {"use_sigmoid": True}, ValueError, "With use_sigmoid"),
        ((1, 1, 4), torch.zeros(1, 4).long(), {}, ValueError, "set use_sigmoid=True"),
        ((1, 1, 4), torch.ones(1, 4).long(), {}, ValueError, "set use_sigmoid=True"),
        ((1, 3, 4), torch.zeros(1, 4), {}, TypeError, r"torch.float32.*target.long\(\)"),
        (
            (1, 3, 4),
            np.zeros((1, 4)),
            {},
            TypeError,
            r"target .*ndarray; torch.as_tensor\(target\)",
        ),
        ((1, 3, 4), torch.zeros(2, 4).long(), {}, ValueError, r"\(1, 3, 4\).*\(2, 4\)"),
        ((1, 3, 4), torch.zeros(1, 2).long(), {}, ValueError, "larger"),
        ((3,), torch.zeros(3).long(), {}, ValueError, "Expected logits"),
        ((1, 3, 4), torch.zeros(1, 4).long(), {"class_weight": [1, 2]}, ValueError, "3 classes"),
        ((1, 3, 4), torch.zeros(1, 4).long(), {"always_keep": [3]}, ValueError, "class 3"),
    ],
)
def test_bad_inputs_are_refused(logits, target, kwargs, error, message):
    with pytest.raises(error, match=message):
        OhemCrossEntropyLoss(**kwargs)(torch.zeros(logits), target)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 8, 8, 3), (8, 8)),
        ((2, 8, 8, 19), (8, 8)),
        ((2, 16, 12, 3), (16, 12)),
        ((2, 128, 128, 19), (512, 512)),
        ((2, 65, 129, 19), (513, 1025)),  # corners aligned
        ((2, 6, 8, 10, 4), (6, 8, 10)),
        ((2, 128, 9), (128,)),
    ],
)
def test_channels_last_are_refused(shape, size):
    target = torch.zeros(2, *size, dtype=torch.long)
    with pytest.raises(ValueError, match=r"channels seem to be last. Pass logits.movedim\(-1, 1\)"):
        ohem_cross_entropy(torch.zeros(shape), target)
    assert ohem_cross_entropy(torch.zeros(shape).movedim(-1, 1), target) > 0


@settings(max_examples=300)
@given(st.data())
def test_heads_are_never_taken_for_channels_last(data):
    """Any stride with any rounding, and volumes whose slices are not shrunk."""
    dims = data.draw(st.integers(2, 3))
    size = data.draw(st.lists(st.integers(8, 2100), min_size=dims, max_size=dims))
    stride = data.draw(st.sampled_from([1, 2, 3, 4, 8, 16, 32, 5.5]))
    rounding = data.draw(st.sampled_from([math.floor, math.ceil, lambda x: math.ceil(x - 1) + 1]))
    low = [min(high, max(1, rounding(high / stride))) for high in size]
    channels = data.draw(st.integers(1, 200) | st.sampled_from(size))
    assert not _channels_last(torch.Size([2, channels, *low]), torch.Size(size))


@pytest.mark.parametrize("output", [(torch.zeros(1, 3, 4),), {"out": torch.zeros(1, 3, 4)}])
def test_output_of_a_network_that_holds_the_logits_is_refused(output):
    with pytest.raises(
        TypeError, match=f"logits must be .*{type(output).__name__}; .*output.logits"
    ):
        OhemCrossEntropyLoss()(output, torch.zeros(1, 4).long())


def test_lists_of_class_weights_are_refused_by_the_function():
    with pytest.raises(TypeError, match=r"class_weight .*list; torch.as_tensor\(class_weight\)"):
        ohem_cross_entropy(*batch(0), class_weight=[1, 2, 3, 4])


def test_integer_logits_are_refused():
    with pytest.raises(TypeError, match="int64"):
        ohem_cross_entropy(torch.zeros(1, 3, 4).long(), torch.zeros(1, 4).long())
