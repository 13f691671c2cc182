"""The row bands of the cross-entropy: interpolation, layouts, threads and autocast."""

import math

import pytest
import torch
from problems import GRAD_TOLERANCE, batch, value_and_grad

from ohem_mm import ohem_cross_entropy, ops, reference


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("use_sigmoid", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((2, 3, 5), (14,)),
        ((2, 3, 4, 5), (32, 40)),
        ((2, 3, 4, 5), (11, 14)),
        ((1, 3, 1, 5), (7, 5)),
        ((1, 5, 90, 70), (90, 700)),  # several bands
        ((1, 3, 2, 2, 3), (5, 5, 8)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_small_logits_are_upsampled(backend, align_corners, use_sigmoid, shape, size, dtype):
    logits, _ = batch(4, shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 3, (shape[0], *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = 255
    rule = {"align_corners": align_corners, "thresh": 0.4, "use_sigmoid": use_sigmoid}
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    expected, expected_grad = value_and_grad(
        reference.ohem_cross_entropy, logits.double(), target, **rule
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    tolerance = GRAD_TOLERANCE[dtype]
    torch.testing.assert_close(
        grad.double(), expected_grad, rtol=tolerance, atol=min(tolerance, 1e-6)
    )


def test_volumes_with_thick_slices_are_upsampled():
    logits = torch.randn(2, 3, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(2, 6, 32, 32, dtype=torch.long)
    expected = reference.ohem_cross_entropy(logits, target)
    torch.testing.assert_close(ohem_cross_entropy(logits, target).double(), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_logits_reach_the_pixels_around_them_alone(backend, bad):
    logits, _ = batch(0, (1, 3, 6, 6))
    target = torch.zeros(1, 24, 24, dtype=torch.long)
    target[:, :8, :8] = 255
    rule = {"thresh": 1.0, "min_kept": 1}
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    logits[0, 1, 0, 0] = bad  # reaches rows and columns 0 to 5
    same, same_grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    assert torch.equal(loss, same)
    assert torch.equal(grad, same_grad)
    target[:, 5, 5] = 0
    kept = ohem_cross_entropy(logits, target, **rule, reduction="none")
    assert kept.isnan().sum() == 1
    assert kept[0, 5, 5].isnan()
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target, **rule)
    assert loss.isnan()
    assert grad.isnan().any()


def test_memory_format_and_strides_change_nothing():
    logits, target = batch(6, (3, 4, 8, 6))
    expected = value_and_grad(ohem_cross_entropy, logits, target)
    variants = [
        logits.contiguous(memory_format=torch.channels_last),
        torch.stack([logits, logits], -1)[..., 0],
    ]
    for variant in variants:
        loss, grad = value_and_grad(ohem_cross_entropy, variant, target)
        torch.testing.assert_close((loss, grad), expected)
    loss, grad = value_and_grad(ohem_cross_entropy, logits, target.mT.contiguous().mT)
    torch.testing.assert_close((loss, grad), expected)


def test_autocast_reaches_neither_pass():
    logits, _ = batch(1, (2, 3, 6, 5))
    target = torch.randint(0, 3, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    expected = value_and_grad(ohem_cross_entropy, logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value_and_grad(ohem_cross_entropy, logits, target)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_number_of_threads_changes_nothing(threads, monkeypatch):
    monkeypatch.setitem(ops.portable._BAND, "cpu", 200)
    monkeypatch.setattr(ops.portable, "_ROWS", 2)
    logits, _ = batch(1, (2, 3, 6, 5))
    target = torch.randint(0, 3, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    expected = value_and_grad(ohem_cross_entropy, logits, target)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = value_and_grad(ohem_cross_entropy, logits, target)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, expected)
