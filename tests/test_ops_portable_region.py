"""The row bands of the sums: interpolation, layouts, threads, autocast and memory."""

import math

import pytest
import torch
from problems import GRAD_TOLERANCE, batch, value_and_grad

from ohem_mm import ops, reference, region_loss
from ohem_mm.ops import portable


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


def test_autocast_reaches_neither_pass(backend):
    logits, _ = batch(1, (2, 3, 6, 5))
    target = torch.randint(0, 3, (2, 24, 20), generator=torch.Generator().manual_seed(0))
    expected = value_and_grad(region_loss, logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = value_and_grad(region_loss, logits, target)
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
