"""Every preset of the region term: against a restatement of its original, and the original itself.

mmseg's run where mmseg is installed. The others need ``pip install --no-deps
segmentation-models-pytorch monai nnunetv2`` beside torch and numpy, and are skipped without.
"""

from __future__ import annotations

import math
import warnings
from types import ModuleType

import pytest
import torch

from ohem_mm import RegionLoss
from ohem_mm.bench.peers import submodule
from ohem_mm.presets import REGION_PRESETS
from ohem_mm.reference import REGION_ORIGINALS

DRAWS = 100
# Whose class weights the preset can take: nnU-Net and mmseg's DiceLoss have none.
WEIGHTED = {"smp-dice", "smp-jaccard", "smp-tversky", "monai-dice", "monai-jaccard", "jdt"}
WEIGHTED |= {"mmseg-tversky"}
SOFTMAX_ONLY = {"jdt", "mmseg-tversky"}


def part_of(package: str, path: str) -> ModuleType:
    """A part of an installed package, or the test is skipped."""
    try:
        return submodule(package, path)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def draw(seed, name, ignored=True):
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


def value_and_grad(function, logits):
    logits = logits.clone().requires_grad_()
    loss = function(logits)
    loss.backward()
    return loss.detach(), logits.grad


def compare(name, seed, original, *, ignored=True, change=None, shift=0.0):
    """Ours and the original on one draw; returns whether the original is well defined there."""
    logits, target, use_sigmoid, rule, weights = draw(seed, name, ignored)
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


@pytest.mark.parametrize("name", REGION_PRESETS)
def test_equals_the_restatement(name):
    def original(logits, target, use_sigmoid, rule, weights):
        options = dict(rule)
        if name not in SOFTMAX_ONLY:
            options["use_sigmoid"] = use_sigmoid
        if weights is not None:
            options["class_weight"] = weights
        return REGION_ORIGINALS[name](logits, target, **options)

    ignored = name != "mmseg-dice"  # it counts them
    assert sum(compare(name, seed, original, ignored=ignored) for seed in range(DRAWS)) > DRAWS / 2


def test_every_preset_is_restated():
    assert set(REGION_PRESETS) == set(REGION_ORIGINALS)


@pytest.mark.parametrize("name", ["smp-dice", "smp-jaccard", "smp-tversky"])
@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_segmentation_models_pytorch_itself(name, smooth):
    smp = part_of("segmentation_models_pytorch", "losses")

    def original(logits, target, use_sigmoid, rule, weights):
        if use_sigmoid and logits.shape[1] > 1:  # multilabel takes one label map a class
            one_hot = torch.nn.functional.one_hot(torch.where(target == 255, 0, target))
            one_hot = one_hot.movedim(-1, 1)
            if one_hot.shape[1] < logits.shape[1]:
                one_hot = torch.nn.functional.pad(
                    one_hot, (0, 0, 0, 0, 0, logits.shape[1] - one_hot.shape[1])
                )
            target = torch.where(target[:, None] == 255, 255, one_hot)
        mode = "multiclass"
        if use_sigmoid:
            mode = "binary" if logits.shape[1] == 1 else "multilabel"
        kind = {"smp-dice": "DiceLoss", "smp-jaccard": "JaccardLoss", "smp-tversky": "TverskyLoss"}
        loss = getattr(smp, kind[name])(
            mode,
            smooth=smooth,
            ignore_index=255,
            class_weights=None if weights is None else weights.tolist(),
            **rule,
        )
        return loss(logits, target)

    change = {"smooth": 2 * smooth if name == "smp-dice" else smooth}
    compared = sum(compare(name, seed, original, change=change) for seed in range(DRAWS))
    assert compared > DRAWS / 2


@pytest.mark.parametrize("name", ["monai-dice", "monai-jaccard"])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("squared", [False, True])
def test_monai_itself(name, batch, squared):
    losses = pytest.importorskip("monai.losses")

    def original(logits, target, use_sigmoid, rule, weights):
        one = logits.shape[1] == 1
        loss = losses.DiceLoss(
            sigmoid=use_sigmoid,
            softmax=not use_sigmoid,
            to_onehot_y=not one,
            jaccard=name == "monai-jaccard",
            batch=batch,
            squared_pred=squared,
            weight=None if weights is None else weights,
            ignore_index=255,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return loss(logits, target[:, None])

    change = {"pool": "batch"} if batch else {}
    if squared:
        change["squared"] = True
    compared = sum(compare(name, seed, original, change=change) for seed in range(DRAWS))
    assert compared > DRAWS / 2


@pytest.mark.parametrize("do_bg", [True, False])
def test_nnunet_itself(do_bg):
    dice = part_of("nnunetv2", "training.loss.dice")

    def original(logits, target, use_sigmoid, rule, weights):
        if logits.shape[1] == 1:
            one_hot = (target == 1)[:, None].float()
            keep = (target != 255)[:, None]
            labels = one_hot
        else:
            keep = (target != 255)[:, None]
            labels = torch.where(keep, target[:, None], 0)
        loss = dice.MemoryEfficientSoftDiceLoss(
            apply_nonlin=torch.sigmoid if use_sigmoid else lambda z: z.softmax(1),
            batch_dice=True,
            do_bg=do_bg or logits.shape[1] == 1,
            smooth=1e-5,
            ddp=False,
        )
        return loss(logits, labels, loss_mask=keep)

    def settings(seed):
        logits = draw(seed, "nnunet")[0]
        classes = logits.shape[1]
        return {} if do_bg or classes == 1 else {"class_weight": [0.0] + [1.0] * (classes - 1)}

    compared = 0
    for seed in range(DRAWS):
        logits, target, use_sigmoid, _, _ = draw(seed, "nnunet")
        if (target == 255).all():
            continue
        ours = RegionLoss(preset="nnunet", use_sigmoid=use_sigmoid, **settings(seed))
        # Its sums are in float32 whatever the logits are.
        expected, grad = value_and_grad(
            lambda z, t=target, s=use_sigmoid: original(z, t, s, {}, None), logits
        )
        loss, our_grad = value_and_grad(lambda z, o=ours, t=target: o(z, t), logits)
        torch.testing.assert_close(
            (loss.float(), our_grad), (expected.float() + 1, grad), rtol=1e-5, atol=1e-6
        )
        compared += 1
    assert compared > DRAWS / 2


@pytest.mark.parametrize("naive", [False, True])
def test_mmseg_dice_itself(naive):
    losses = pytest.importorskip("mmseg.models.losses")

    def original(logits, target, use_sigmoid, rule, weights):
        if logits.shape[1] == 1:
            # It takes label 0 as the class of one channel, unlike mmseg's cross-entropy.
            target = 1 - target
        return losses.DiceLoss(use_sigmoid=use_sigmoid, naive_dice=naive)(logits, target)

    change = {}
    if naive:
        change = {"squared": False, "smooth": 1e-3, "habits": (True, False, False, False)}
    compared = sum(
        compare("mmseg-dice", seed, original, ignored=False, change=change) for seed in range(DRAWS)
    )
    assert compared == DRAWS


def test_mmseg_dice_counts_what_is_predicted_at_ignored_pixels():
    """The reason why the preset is compared without them."""
    losses = pytest.importorskip("mmseg.models.losses")
    logits = torch.full((1, 2, 1, 2), -9.0)
    logits[0, 0, 0, 0] = 9.0  # right at the only valid pixel
    logits[0, 1, 0, 1] = 9.0
    target = torch.tensor([[[0, 255]]])
    assert losses.DiceLoss(use_sigmoid=False)(logits, target) > 0.3
    assert RegionLoss(preset="mmseg-dice")(logits, target) < 0.01


def test_mmseg_tversky_itself():
    losses = pytest.importorskip("mmseg.models.losses")

    def original(logits, target, use_sigmoid, rule, weights):
        weights = None if weights is None else weights.tolist()
        return losses.TverskyLoss(class_weight=weights, **rule)(logits, target)

    assert sum(compare("mmseg-tversky", seed, original) for seed in range(DRAWS)) > DRAWS / 2


@pytest.mark.parametrize("s", [0.1, 0.4])
def test_jaccard_metric_loss_with_soft_labels(s):
    """With soft labels the originals count all classes."""
    for seed in range(30):
        logits, target, _, _, _ = draw(seed, "jdt")
        if (target == 255).all():
            continue
        ours = RegionLoss(preset="jdt", classes="all", label_smoothing=s)
        loss, grad = value_and_grad(lambda z, o=ours, t=target: o(z, t), logits)
        expected = value_and_grad(
            lambda z, t=target: REGION_ORIGINALS["jdt"](z, t, label_smoothing=s), logits
        )
        torch.testing.assert_close((loss, grad), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", REGION_PRESETS)
def test_finite_at_the_edges(name):
    cases = {
        "all ignored": (torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), 255)),
        "one pixel": (torch.zeros(1, 3, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long)),
        "one image ignored": (
            torch.randn(2, 3, 1, 2),
            torch.tensor([[[1, 2]], [[255, 255]]]),
        ),
    }
    loss = RegionLoss.from_preset(name)
    for case, (logits, target) in cases.items():
        value, grad = value_and_grad(lambda z, t=target: loss(z, t), logits)
        assert math.isfinite(value), case
        assert grad.isfinite().all(), case
        assert (value == 0) == (case == "all ignored"), case


def test_overrides_win_whatever_the_way_they_are_given():
    for loss in (
        RegionLoss("jaccard", preset="monai-dice"),
        RegionLoss(preset="monai-dice", kind="jaccard"),
        RegionLoss.from_preset("monai-dice", kind="jaccard"),
    ):
        assert loss.kind == "jaccard"
        assert (loss.pool, loss.classes, loss.smooth) == ("image", "all", 1e-5)
    with pytest.raises(ValueError, match=r"preset must be one of smp-dice,.*'monai'"):
        RegionLoss(preset="monai")
