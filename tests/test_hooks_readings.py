"""What OhemMonitorHook measures of a call, against the oracle."""

import math

import pytest
import torch

pytest.importorskip("mmengine")

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.hooks.readings import Measured, read
from ohem_mm.reference import kept_weights, pixel_losses


def measure(loss, logits, target):
    stats = {"kept": None}
    loss(logits, target, stats=stats)
    total = Measured.of([read(loss, logits, target, stats).tolist()])
    return {**total.values(loss.thresh), **total.class_shares}


def expected(loss, logits, target):
    """The same from the oracle, pixel by pixel."""
    classes = logits.shape[1]
    image = torch.arange(len(target)).view(-1, 1, 1).expand_as(target)
    valid = target != 255
    label, image = target[valid], image[valid]
    flat = logits.double().movedim(1, -1)[valid]
    losses = pixel_losses(flat, label, use_sigmoid=loss.use_sigmoid).tolist()
    labels, images = label.tolist(), image.tolist()
    settings = {"thresh": loss.thresh, "pool": loss.pool, "min_kept": loss.min_kept}
    kept = kept_weights(
        losses,
        labels,
        images,
        **settings,
        always_keep=loss.always_keep,
        images=len(target),
    )
    pixels = list(zip(losses, labels, images, kept, strict=True))
    out = {"kept_share": sum(kept) / len(kept)}
    limit = math.inf if loss.thresh is None else -math.log(loss.thresh)
    lifted = [p for p in pixels if p[3] and p[0] <= limit and p[1] not in loss.always_keep]
    reached = [math.exp(-p[0]) for p in lifted]
    if loss.thresh is not None:
        out["hard_share"] = sum(p[0] > limit for p in pixels) / len(pixels)
        pool = {"batch": lambda p: 0, "image": lambda p: p[2], "class": lambda p: p[1]}[loss.pool]
        out["floor_active"] = len({pool(p) for p in lifted}) / len({pool(p) for p in pixels})
        reached.append(loss.thresh)
    out["thresh_effective"] = max(reached)
    for name, side in (("loss_kept", True), ("loss_dropped", False)):
        some = [(p[0], p[3] if side else 1 - p[3]) for p in pixels]
        weight = sum(w for _, w in some)
        out[name] = sum(loss * w for loss, w in some if w) / weight if weight else 0.0
    for place in range(max(2, classes)):
        own = [p[3] for p in pixels if p[1] == place]
        if own:
            out[place] = sum(own) / len(own)
    return out


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("pool", ["batch", "image", "class"])
@pytest.mark.parametrize(
    "settings",
    [
        {"thresh": 0.7, "min_kept": 0.0},
        {"thresh": 0.3, "min_kept": 0.5},
        {"thresh": 0.05, "min_kept": 9},
        {"thresh": 0.2, "min_kept": 0.25, "always_keep": [1]},
        {"thresh": None, "min_kept": 0.25},
        {"thresh": 0.7, "min_kept": 10**6},
    ],
)
def test_values_are_those_of_the_oracle(settings, pool, classes):
    generator = torch.Generator().manual_seed(classes)
    logits = 2 * torch.randn(3, classes, 6, 7, generator=generator)
    target = torch.randint(0, classes, (3, 6, 7), generator=generator)
    target[0, :2] = 255
    target[2] = 0
    logits[2, 0] += 6.0  # an easy image: there the floor acts first
    loss = OhemCrossEntropyLoss(**settings, pool=pool)
    assert measure(loss, logits, target) == pytest.approx(expected(loss, logits, target), rel=1e-5)


def test_values_of_one_sigmoid_channel_of_class_weights_and_of_half_precision():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 8, 8, generator=generator)
    target = torch.randint(0, 2, (2, 8, 8), generator=generator)
    # Weights scale the loss that is optimised; what is mined and shown is unweighted.
    loss = OhemCrossEntropyLoss(0.4, 0.1, use_sigmoid=True, class_weight=[1.0, 50.0])
    want = expected(loss, logits, target)
    assert measure(loss, logits, target) == pytest.approx(want, rel=1e-5)
    assert measure(loss, logits, target[:, None]) == pytest.approx(want, rel=1e-5)
    half = logits.bfloat16()
    want = expected(loss, half, target)
    assert measure(loss, half, target) == pytest.approx(want, rel=1e-5)


def test_nothing_valid_and_nothing_kept():
    logits = torch.zeros(1, 2, 4, 4)
    logits[:, 0] = 5.0
    target = torch.full((1, 4, 4), 255)
    loss = OhemCrossEntropyLoss(0.7, 0)
    assert measure(loss, logits, target) == {}
    target[0, 0] = 0
    values = measure(loss, logits, target)
    assert values.pop("loss_dropped") > 0
    assert values == {
        "kept_share": 0,
        "hard_share": 0,
        "floor_active": 0,
        "thresh_effective": 0.7,
        "loss_kept": 0,
        0: 0,
    }


def test_several_calls_in_one_step_add_up():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, 5, 5, generator=generator)
    target = torch.randint(0, 3, (4, 5, 5), generator=generator)
    loss = OhemCrossEntropyLoss(0.05, 0.2, pool="image")
    rows = []
    for part in (slice(0, 1), slice(1, 4)):
        stats = {"kept": None}
        loss(logits[part], target[part], stats=stats)
        rows.append(read(loss, logits[part], target[part], stats).tolist())
    total = Measured.of(rows)
    together = {**total.values(0.05), **total.class_shares}
    assert together == pytest.approx(measure(loss, logits, target))
