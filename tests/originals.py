"""Presets and what they restate, on the same problems, and where an original goes its own way."""

import math

import pytest
import torch
from draws import PURE_TOPK
from problems import value_and_grad
from torch.nn import functional as F

from ohem_mm import OhemCrossEntropyLoss, RegionLoss
from ohem_mm.reference import ORIGINALS

DRAWS = 400
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {
    torch.float64: {"rtol": 1e-5, "atol": 1e-8},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
}
SLOTS = {"stdc", "detectron2", "nnunet"}  # ignored pixels take part


def flat(problem):
    """Of all pixels in one list: plain loss in float64, probability as given, validity."""
    logits, target = problem.logits, problem.target
    losses = F.cross_entropy(logits.double(), target, ignore_index=255, reduction="none")
    labels = torch.where(target == 255, 0, target)
    probs = logits.softmax(1).gather(1, labels[:, None]).squeeze(1)
    return losses.flatten(), probs.flatten(), (target != 255).flatten()


def floor_of(name, problem):
    """How many pixels the original's floor keeps, or None where it keeps all."""
    k, pixels = problem.settings["min_kept"], problem.target.numel()
    valid = int((problem.target != 255).sum())
    if name in ("bisenet", "textbook"):
        return valid // 16
    if name == "stdc":
        return pixels // 16 if isinstance(k, float) else k
    if name == "detectron2":
        return int(k * pixels)
    if name == "nnunet":
        return int(pixels * k / 100)
    if name.startswith("mmseg"):
        return k * len(problem.target)
    if name == "hrnet":
        return max(1, k)
    if name == "torchseg":
        return k if 0 < k <= valid else None
    return k - 1 if 0 < k < valid else None  # paddleseg


def tied_at_the_floor(name, problem):
    """Pixels, up to rounding equally hard, of which the original's floor takes some at will."""
    losses, _, valid = flat(problem)
    k, settings = floor_of(name, problem), problem.settings
    hard = 0
    if "thresh" in settings:
        hard = int((losses > -math.log(settings["thresh"])).sum())
    mined = losses
    if name in PURE_TOPK:
        weight = settings.get("class_weight")
        mined = F.cross_entropy(
            problem.logits.double(),
            problem.target,
            weight=None if weight is None else weight.double(),
            ignore_index=255,
            reduction="none",
            label_smoothing=settings.get("label_smoothing", 0.0),
        ).flatten()
    if name not in SLOTS:
        mined = torch.where(valid, mined, -1)
    tied = torch.zeros_like(valid)
    if k and hard < k < len(mined):
        kth = mined.sort(descending=True).values[k - 1]
        margin = 1e-9 if problem.logits.dtype == torch.float64 else 2e-5
        near = (mined - kth).abs() <= margin
        if int((mined > kth + margin).sum()) + int(near.sum()) > k:
            tied = near & valid
    return tied.view_as(problem.target)


def deviation(name, problem, loss):
    """Which of the documented deviations applies, if any; ``loss`` is None where it raised."""
    _, probs, valid = flat(problem)
    settings = problem.settings
    k, thresh, num_valid = floor_of(name, problem), settings.get("thresh"), int(valid.sum())
    if name.startswith("mmseg") and settings["min_kept"] < 2:
        return "min_kept below 2"
    if loss is None or not math.isfinite(loss):
        return "nothing kept"
    order = probs[valid].sort().values
    if name in ("hrnet", "mmseg-sampler"):
        if num_valid <= k:
            return "n <= k"
        # It keeps what lies strictly below the limit.
        if int((order < order[k].clamp_min(thresh)).sum()) < k:
            return "ties"
    if name == "paddleseg":
        if k is not None and int((order < order[k].clamp_min(thresh)).sum()) < k:
            return "ties"
        if float(flat(problem)[0].max()) > 64:
            return "cut off at 64"
    if name == "torchseg" and k is not None:
        kept, hard = (
            int((order <= order[k - 1].clamp_min(thresh)).sum()),
            int((order < thresh).sum()),
        )
        if kept > max(k, hard):
            return "ties" if order[k - 1] > thresh else "p == thresh"
    if name == "nnunet" and settings["label_smoothing"] and "class_weight" in settings:
        return "smoothing with class weights"
    return None


def run(call, problem):
    """Loss and gradient; None for the loss where it raises, or has no gradient."""
    logits = problem.logits.clone().requires_grad_()
    try:
        loss = call(logits, problem.target.clone(), problem.settings)
        loss.backward()
    except (IndexError, AssertionError, RuntimeError):
        return None, None
    return loss.item(), logits.grad


def preset(name):
    def call(logits, target, settings):
        settings = dict(settings)
        if "class_weight" in settings:
            settings["class_weight"] = settings["class_weight"].tolist()
        if name == "nnunet":
            settings["min_kept"] = settings["min_kept"] / 100
        return OhemCrossEntropyLoss(preset=name, **settings)(logits, target)

    return call


def restated(name):
    return lambda logits, target, settings: ORIGINALS[name](logits, target, **settings)


def assert_same(name, problem, ours, theirs, **tolerance):
    """Loss and gradient are equal; of pixels tied at the floor, what they share is."""
    tied = tied_at_the_floor(name, problem)
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance["rtol"], abs=tolerance["atol"])
    free = ~tied[:, None]
    torch.testing.assert_close(ours[1] * free, theirs[1] * free, **tolerance)
    if not {"class_weight", "label_smoothing"} & set(problem.settings):
        # Equal losses are equal probabilities, and so equal gradients at the true class.
        index = torch.where(tied, problem.target, 0)[:, None]
        shared = [(grad.gather(1, index) * tied[:, None]).sum() for _, grad in (ours, theirs)]
        torch.testing.assert_close(*shared, **tolerance)
    return bool(tied.any())


REGION_DRAWS = 100
# Whose class weights the preset can take: nnU-Net and mmseg's DiceLoss have none.
WEIGHTED = {"smp-dice", "smp-jaccard", "smp-tversky", "monai-dice", "monai-jaccard", "jdt"}
WEIGHTED |= {"mmseg-tversky"}
SOFTMAX_ONLY = {"jdt", "mmseg-tversky"}


def draw_region(seed, name, ignored=True):
    """A random problem, and settings in our names, with absent classes in many."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    use_sigmoid = name not in SOFTMAX_ONLY and pick([True, False])
    channels = pick([1, 3, 7] if use_sigmoid else [2, 3, 7])
    classes = max(2, channels)
    shape = (pick([1, 2, 3]), channels, pick([4, 9]), pick([5, 16]))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * pick([0.1, 1.0, 5.0])
    target = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    target[target == pick([0, 1, 99])] = classes - 1
    if ignored:
        share = pick([0.0, 0.1, 0.5])
        target[torch.rand(target.shape, generator=generator) < share] = 255
    rule = {}
    if name == "smp-tversky":
        rule = {"alpha": pick([0.5, 0.2]), "beta": pick([0.5, 0.9]), "gamma": pick([1.0, 1.5])}
    if name == "mmseg-tversky":
        rule = pick([{}, {"alpha": 0.6, "beta": 0.4}])
    if name == "jdt":
        # It has no exponent below 1.
        rule = {"gamma": pick([1.0, 2.0])}
    weights = None
    if name in WEIGHTED and channels > 1 and pick([True, False]):
        weights = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.2
    return logits, target, use_sigmoid, rule, weights


def compare(name, seed, original, *, ignored=True, change=None, shift=0.0):
    """Ours and the original on one draw; returns whether the original is well defined there."""
    logits, target, use_sigmoid, rule, weights = draw_region(seed, name, ignored)
    if any((image == 255).all() for image in target):
        return False  # an image without a valid pixel counts there
    ours = RegionLoss(
        preset=name,
        use_sigmoid=use_sigmoid,
        class_weight=None if weights is None else weights.tolist(),
        **{**rule, **(change or {})},
    )
    expected, grad = value_and_grad(
        lambda z: original(z, target, use_sigmoid, rule, weights), logits
    )
    loss, our_grad = value_and_grad(lambda z: ours(z, target), logits)
    torch.testing.assert_close(
        (loss, our_grad), (expected + shift, grad), rtol=1e-5, atol=1e-7, msg=f"seed {seed}"
    )
    return True
