"""Derivatives of any order and torch.func: what all backends leave to the eager path."""

import math

import pytest
import torch
from problems import batch, value_and_grad

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, reference

SECOND = [
    {"thresh": 0.7, "min_kept": 3},
    {"thresh": None, "min_kept": 0.4, "label_smoothing": 0.2, "pool": "class"},
    {"thresh": 0.5, "use_sigmoid": True, "reduction": "none", "align_corners": True},
]


@pytest.mark.parametrize("rule", SECOND)
@pytest.mark.parametrize("size", [(3, 2), (7, 5)])
def test_second_derivatives(backend, rule, size):
    logits, _ = batch(5, (2, 3, 3, 2), dtype=torch.float64)
    target = torch.randint(0, 3, (2, *size), generator=torch.Generator().manual_seed(0))
    target[0, 0] = 255
    weight = torch.rand(2, *size, generator=torch.Generator().manual_seed(1)).double()
    assert torch.autograd.gradgradcheck(
        lambda x: ohem_cross_entropy(x, target, weight, **rule), logits.requires_grad_()
    )


@pytest.mark.parametrize("stride", [1, 4])
def test_gradient_penalty_is_that_of_plain_cross_entropy(backend, stride):
    """Of a network's parameters, and of logits that are a leaf."""
    images, _ = batch(5, (2, 3, 4, 5), dtype=torch.float64)
    target = torch.randint(0, 4, (2, 4 * stride, 5 * stride))
    target[0, :2] = 255

    def plain(logits, target):
        size = target.shape[1:]
        if logits.shape[2:] != size:
            logits = torch.nn.functional.interpolate(logits, size=size, mode="bilinear")
        return torch.nn.functional.cross_entropy(logits, target, ignore_index=255)

    found = []
    for criterion in (OhemCrossEntropyLoss(thresh=1.0), plain):
        torch.manual_seed(0)
        network = torch.nn.Conv2d(3, 4, 1).double()
        logits = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
        for output, inputs in ((network(images), list(network.parameters())), (logits, [logits])):
            loss = criterion(output, target)
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            (loss + sum(grad.square().sum() for grad in first)).backward()
            found += [*first, *(value.grad for value in inputs)]
    half = len(found) // 2
    torch.testing.assert_close(found[:half], found[half:])
    assert all(grad.abs().sum() > 0 for grad in found)


def test_second_derivative_at_an_ignored_pixel_is_not_a_number_where_nothing_is(backend):
    logits, target = batch(5, dtype=torch.float64)
    logits[0, :, 0, 0], target[0, 0, 0] = math.nan, 255
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(ohem_cross_entropy(logits, target), logits, create_graph=True)
    grad.square().sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0, :, 0, 0].any()


@pytest.mark.parametrize(
    "rule", [{}, {"weighted_mean": True}, {"weighted_mean": True, "avg": "valid"}]
)
def test_gradients_of_weights_and_divisor(backend, rule):
    logits, target = batch(6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(target.shape, generator=generator, dtype=torch.float64)
    class_weight = torch.rand(4, generator=generator, dtype=torch.float64) + 0.1
    divisor = torch.tensor(3.0, dtype=torch.float64)
    for avg_factor in (None, divisor):
        found = []
        for function in (ohem_cross_entropy, reference.ohem_cross_entropy):
            inputs = [weight, class_weight] + [avg_factor] * (avg_factor is not None)
            inputs = [value.clone().requires_grad_() for value in inputs]
            divide_by = inputs[2] if avg_factor is not None else None
            rule = {**rule, "class_weight": inputs[1], "avg_factor": divide_by}
            function(logits, target, inputs[0], **rule).backward()
            found.append([value.grad for value in inputs])
        torch.testing.assert_close(*found)


def test_transforms_of_torch_func(backend):
    logits, _ = batch(5, (2, 3, 3, 2), dtype=torch.float64)
    target = torch.randint(0, 3, (2, 6, 4), generator=torch.Generator().manual_seed(0))
    target[0, 0] = 255

    def ours(z):
        return ohem_cross_entropy(z, target, thresh=1.0)

    def plain(z):
        z = torch.nn.functional.interpolate(z, size=(6, 4), mode="bilinear")
        return torch.nn.functional.cross_entropy(z, target, ignore_index=255)

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(ours)(logits), transform(plain)(logits))
    results = [torch.func.jvp(function, (logits,), (logits,)) for function in (ours, plain)]
    torch.testing.assert_close(*results)


@pytest.mark.skipif(
    torch.__version__.startswith("2.4."), reason="vmap of torch 2.4 cannot view floats as bits"
)
@pytest.mark.parametrize("pool", ["batch", "image", "class"])
@pytest.mark.parametrize("min_kept", [0, 7, 0.5])
def test_gradients_of_each_sample(backend, pool, min_kept):
    logits, target = batch(5, (3, 4, 3, 5), dtype=torch.float64)

    def one(z, labels):
        rule = {
            "thresh": 0.3,
            "min_kept": min_kept,
            "pool": pool,
            "class_weight": torch.arange(4.0),
        }
        return ohem_cross_entropy(z[None], labels[None], **rule)

    found = torch.func.vmap(torch.func.grad(one))(logits, target)
    expected = torch.stack(
        [value_and_grad(one, *pair)[1] for pair in zip(logits, target, strict=True)]
    )
    torch.testing.assert_close(found, expected)
