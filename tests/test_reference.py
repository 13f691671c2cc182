"""The originals themselves against what restates them: the presets and ``reference.py``.

mmseg's classes run where mmseg is installed. What PaddleSeg's gave on the same draws is on record:
``record_paddleseg.py``. The others need ``pip install --no-deps nnunetv2
segmentation-models-pytorch monai`` beside torch and numpy, and are skipped without. The rest are
not on PyPI; ``test_presets.py`` holds every preset against its restatement.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from draws import draw, fingerprint
from originals import (
    DRAWS,
    DTYPES,
    REGION_DRAWS,
    TOLERANCE,
    assert_same,
    compare,
    deviation,
    draw_region,
    preset,
    restated,
    run,
    tied_at_the_floor,
)
from problems import value_and_grad

from ohem_mm import RegionLoss
from ohem_mm.bench.peers import submodule


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_what_paddleseg_gave(dtype):
    record = json.loads(Path(__file__).with_name("paddleseg.json").read_text())
    assert record["versions"]["paddlepaddle"] == "3.3.1"
    recorded = record["draws"][str(dtype)]
    assert len(recorded) == DRAWS
    compared = 0
    for seed, expected in enumerate(recorded):
        problem = draw(seed, "paddleseg", dtype)
        why = deviation("paddleseg", problem, expected[0])
        if why == "ties" or tied_at_the_floor("paddleseg", problem).any():
            continue  # which of them lie strictly below the limit is a matter of rounding
        rules = {"restated": restated("paddleseg"), "preset": preset("paddleseg")}
        if why == "cut off at 64":
            del rules["preset"]
        for rule, call in rules.items():
            loss, grad = run(call, problem)
            assert [loss, *fingerprint(grad)] == pytest.approx(
                expected, rel=1e-5, abs=1e-8 if dtype == torch.float64 else 2e-5
            ), (seed, rule)
        compared += why is None
    assert compared > DRAWS // 2


def test_mmseg_refuses_a_floor_below_2():
    pytest.importorskip("mmseg")
    from mmseg.structures import build_pixel_sampler

    with pytest.raises(AssertionError):
        build_pixel_sampler(
            {"type": "OHEMPixelSampler", "thresh": 0.7, "min_kept": 1}, context=None
        )


def mmseg_sampler_itself(logits, target, settings):
    """A decode head of mmseg with its sampler."""
    from mmengine.structures import PixelData
    from mmseg.models.decode_heads import FCNHead
    from mmseg.structures import SegDataSample

    weights = settings.get("class_weight")
    head = FCNHead(
        in_channels=4,
        channels=4,
        num_convs=0,
        concat_input=False,
        num_classes=logits.shape[1],
        sampler={
            "type": "OHEMPixelSampler",
            "thresh": settings.get("thresh"),
            "min_kept": settings["min_kept"],
        },
        loss_decode={
            "type": "CrossEntropyLoss",
            "class_weight": None if weights is None else weights.tolist(),
        },
    )
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in target]
    return head.loss_by_feat(logits, samples)["loss_ce"]


def mmseg_loss_itself(logits, target, settings):
    """mmseg's OhemCrossEntropy."""
    from mmseg.models.losses.ohem_cross_entropy_loss import OhemCrossEntropy

    weights = settings.get("class_weight")
    return OhemCrossEntropy(
        thres=settings["thresh"],
        min_kept=settings["min_kept"],
        class_weight=None if weights is None else weights.tolist(),
    )(logits, target)


def nnunet_itself(logits, target, settings):
    """nnU-Net's TopKLoss."""
    from nnunetv2.training.loss.robust_ce_loss import TopKLoss

    return TopKLoss(
        weight=settings.get("class_weight"),
        ignore_index=255,
        k=settings["min_kept"],
        label_smoothing=settings["label_smoothing"],
    )(logits, target[:, None])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("name", "original", "module"),
    [
        ("mmseg-sampler", mmseg_sampler_itself, "mmseg.models"),
        ("mmseg-sampler-topk", mmseg_sampler_itself, "mmseg.models"),
        ("hrnet", mmseg_loss_itself, "mmseg.models"),
        ("nnunet", nnunet_itself, "nnunetv2.training.loss.robust_ce_loss"),
    ],
)
def test_equals_the_original_itself(name, original, module, dtype):
    pytest.importorskip(module)
    compared = ties = 0
    for seed in range(DRAWS // 2):
        problem = draw(seed, name, dtype)
        weights = problem.settings.get("class_weight")
        # mmseg's cross-entropy takes no weights beside ignored pixels, nor in float64.
        fails = dtype == torch.float64 or bool((problem.target == 255).any())
        if name.startswith("mmseg") and weights is not None and fails:
            del problem.settings["class_weight"]
        theirs = run(original, problem)
        if deviation(name, problem, theirs[0]) is not None:
            continue
        ties += assert_same(name, problem, run(preset(name), problem), theirs, **TOLERANCE[dtype])
        assert_same(name, problem, run(restated(name), problem), theirs, **TOLERANCE[dtype])
        compared += 1
    assert compared > DRAWS // 6
    assert ties > 0


# --- overlap losses --------------------------------------------------------------------------


def part_of(package: str, path: str) -> ModuleType:
    """A part of an installed package, or the test is skipped."""
    try:
        return submodule(package, path)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


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
    compared = sum(compare(name, seed, original, change=change) for seed in range(REGION_DRAWS))
    assert compared > REGION_DRAWS / 2


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
    compared = sum(compare(name, seed, original, change=change) for seed in range(REGION_DRAWS))
    assert compared > REGION_DRAWS / 2


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
        logits = draw_region(seed, "nnunet")[0]
        classes = logits.shape[1]
        return {} if do_bg or classes == 1 else {"class_weight": [0.0] + [1.0] * (classes - 1)}

    compared = 0
    for seed in range(REGION_DRAWS):
        logits, target, use_sigmoid, _, _ = draw_region(seed, "nnunet")
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
    assert compared > REGION_DRAWS / 2


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
        compare("mmseg-dice", seed, original, ignored=False, change=change)
        for seed in range(REGION_DRAWS)
    )
    assert compared == REGION_DRAWS


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

    assert (
        sum(compare("mmseg-tversky", seed, original) for seed in range(REGION_DRAWS))
        > REGION_DRAWS / 2
    )
