"""Random problems for the losses, and how a loss and its gradient are computed and compared."""

import torch
from hypothesis import strategies as st

SHAPES = [(), (7,), (1, 1), (3, 5), (6, 4), (2, 3, 4)]
GRAD_TOLERANCE = {
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
    torch.float32: 1e-5,
    torch.float64: 1e-9,
}


def value_and_grad(function, logits, *args, **kwargs):
    """The loss, and the gradient of its sum by the logits."""
    logits = logits.detach().requires_grad_()
    loss = function(logits, *args, **kwargs)
    loss.sum().backward()
    return loss.detach(), logits.grad


def assert_compiled_equals(loss, backend, logits, target, weight, stats):
    """Compiled by ``backend``, the loss gives what it gives in eager mode, statistics included."""
    compiled_stats = dict(stats)
    expected = value_and_grad(loss, logits, target, weight, stats=stats)
    function = torch.compile(loss, fullgraph=True, backend=backend)
    result = value_and_grad(function, logits, target, weight, stats=compiled_stats)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(compiled_stats, stats)


def batch(seed, shape=(2, 4, 6, 5), ignored=0.2, scale=3.0, dtype=torch.float32):
    """Logits, and labels of which a share is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    target = torch.randint(0, max(2, shape[1]), (shape[0], *shape[2:]), generator=generator)
    target[torch.rand(target.shape, generator=generator) < ignored] = 255
    return logits, target


KINDS = [
    {"kind": "dice"},
    {"kind": "dice", "squared": True},
    {"kind": "jaccard"},
    {"kind": "jaccard", "squared": True},
    {"kind": "tversky"},
    {"kind": "tversky", "alpha": 0.8, "beta": 0.1},
]


@st.composite
def rules(draw, classes):
    """Settings of an overlap loss of so many classes."""
    weights = torch.rand(classes, generator=torch.Generator().manual_seed(1)) + 0.1
    return {
        **draw(st.sampled_from(KINDS)),
        "gamma": draw(st.sampled_from([1.0, 1.0, 0.75, 2.0])),
        "pool": draw(st.sampled_from(["batch", "image", "world"])),
        "classes": draw(st.sampled_from(["present", "all"])),
        "smooth": draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "weighted_mean": draw(st.booleans()),
        "class_weight": draw(st.sampled_from([None, weights, (weights > 0.5).float()])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.0, 0.2])),
    }
