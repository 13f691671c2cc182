"""Every preset against an independent statement of its original, and against mmseg itself."""

import math

import pytest
import torch

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.presets import PRESETS
from ohem_mm.reference import ORIGINALS

DRAWS = 300
WEIGHTED = {"mmseg-sampler", "mmseg-sampler-topk", "hrnet", "torchseg", "detectron2", "nnunet"}
SHARES = {"bisenet", "textbook", "detectron2", "nnunet"}


def draw(seed, name):
    """A random problem, with settings that make the rule of this original matter."""
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    classes = pick([2, 3, 7])
    shape = (pick([1, 2, 3]), classes, pick([4, 9]), pick([5, 16]))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * pick([0.1, 1.0, 5.0])
    target = torch.randint(0, classes, (shape[0], *shape[2:]), generator=generator)
    easy = torch.nn.functional.one_hot(target, classes).movedim(-1, 1) * pick([0.0, 2.0, 6.0])
    logits = logits + easy
    target[torch.rand(target.shape, generator=generator) < pick([0.0, 0.1, 0.5])] = 255
    valid = int((target != 255).sum())
    settings = {}
    if "topk" not in name and name not in ("detectron2", "nnunet"):
        settings["thresh"] = pick([0.3, 0.7, 0.9])
    if name in SHARES:
        if name in ("detectron2", "nnunet"):
            settings["min_kept"] = pick([0.1, 0.2, 0.5])
        else:
            settings["min_kept"] = 1 / 16
    else:
        settings["min_kept"] = pick([1, 2, valid // 3 + 1, valid - 1, valid, valid + 5])
        if name in ("torchseg", "paddleseg"):
            settings["min_kept"] = pick([0, settings["min_kept"]])
    if name in WEIGHTED and pick([True, False]):
        weights = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.2
        settings["class_weight"] = weights
    return logits, target, settings


def well_defined(name, target, settings, loss):
    """Whether the original works here; its defects are listed in DESIGN section 4."""
    valid, k = int((target != 255).sum()), settings["min_kept"]
    if name.startswith("mmseg-sampler"):
        k = k * len(target)
    if name in ("mmseg-sampler", "hrnet") and valid <= max(k, 1):
        return False  # keeps n - 1
    if name == "paddleseg" and k == 1 and loss == 0:
        return False  # the one pixel that it was asked for is dropped
    return math.isfinite(loss)


@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_original(name):
    compared = 0
    for seed in range(DRAWS):
        logits, target, settings = draw(seed, name)
        original = logits.clone().requires_grad_()
        expected = ORIGINALS[name](original, target, **settings)
        if not well_defined(name, target, settings, expected.item()):
            continue
        expected.backward()
        compared += 1
        if "class_weight" in settings:
            settings["class_weight"] = settings["class_weight"].tolist()
        ours = logits.clone().requires_grad_()
        loss = OhemCrossEntropyLoss(preset=name, **settings)(ours, target)
        loss.backward()
        torch.testing.assert_close(
            (loss, ours.grad), (expected, original.grad), rtol=1e-5, atol=1e-8, msg=f"seed {seed}"
        )
    assert compared > DRAWS // 2


@pytest.mark.parametrize("name", PRESETS)
def test_finite_where_the_originals_are_not(name):
    loss = OhemCrossEntropyLoss.from_preset(name)
    cases = {
        "all ignored": (torch.randn(2, 3, 4, 4), torch.full((2, 4, 4), 255)),
        "one easy pixel": (
            torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1),
            torch.zeros(1, 1, 1, dtype=torch.long),
        ),
        "all tied": (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)),
        "all easy": (
            torch.tensor([9.0, 0, 0]).view(1, 3, 1, 1).expand(1, 3, 4, 4),
            torch.zeros(1, 4, 4, dtype=torch.long),
        ),
    }
    for case, (logits, target) in cases.items():
        logits = logits.clone().requires_grad_()
        value = loss(logits, target)
        value.backward()
        assert value.isfinite(), case
        assert logits.grad.isfinite().all(), case
        # A sixteenth, a tenth or a fifth of one pixel is no pixel.
        nothing = case == "all ignored" or (case == "one easy pixel" and name in SHARES)
        assert (value == 0) == nothing, case


def test_overrides_win_whatever_the_way_they_are_given():
    for loss in (
        OhemCrossEntropyLoss(0.33, preset="paddleseg"),
        OhemCrossEntropyLoss(preset="paddleseg", thresh=0.33),
        OhemCrossEntropyLoss.from_preset("paddleseg", thresh=0.33),
    ):
        assert loss.thresh == 0.33
        assert loss.min_kept == 10_000
        assert loss.habits.one_less
    plain = OhemCrossEntropyLoss(thresh=0.33)
    assert (plain.min_kept, plain.preset) == (1 / 16, None)
    assert OhemCrossEntropyLoss.from_preset("mmseg-sampler", min_kept=9, avg="kept").avg == "kept"


def test_unknown_preset():
    with pytest.raises(ValueError, match="preset must be one of mmseg-sampler,.*'hrnett'.*'hrnet'"):
        OhemCrossEntropyLoss(preset="hrnett")


def test_textbook_check_value():
    torch.manual_seed(20)
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 4, 4))
    for name in ("textbook", "bisenet"):
        assert f"{OhemCrossEntropyLoss(preset=name)(logits, labels):.8f}" == "1.33107340"


@pytest.mark.parametrize("thresh", [None, 0.3, 0.9])
def test_mmseg_sampler_itself(thresh):
    pytest.importorskip("mmseg")
    from mmengine.structures import PixelData
    from mmseg.models.decode_heads import FCNHead
    from mmseg.structures import SegDataSample

    name = "mmseg-sampler-topk" if thresh is None else "mmseg-sampler"
    for seed in range(40):
        logits, target, settings = draw(seed, name)
        k = settings["min_kept"] + 1  # the sampler asserts k > 1
        weights = settings.get("class_weight")
        if int((target != 255).sum()) <= k * len(target):
            continue
        if weights is not None:
            if (target == 255).any():
                continue  # mmseg's own cross-entropy fails there
            weights = weights.tolist()
        head = FCNHead(
            in_channels=4,
            channels=4,
            num_convs=0,
            concat_input=False,
            num_classes=logits.shape[1],
            sampler={"type": "OHEMPixelSampler", "thresh": thresh, "min_kept": k},
            loss_decode={"type": "CrossEntropyLoss", "class_weight": weights},
        )
        samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in target]
        theirs = logits.clone().requires_grad_()
        expected = head.loss_by_feat(theirs, samples)["loss_ce"]
        expected.backward()
        ours = logits.clone().requires_grad_()
        rule = {} if thresh is None else {"thresh": thresh}
        loss = OhemCrossEntropyLoss(preset=name, min_kept=k, class_weight=weights, **rule)(
            ours, target
        )
        loss.backward()
        torch.testing.assert_close((loss, ours.grad), (expected, theirs.grad), rtol=1e-5, atol=1e-7)


def test_mmseg_ohem_cross_entropy_itself():
    losses = pytest.importorskip("mmseg.models.losses")
    theirs_type = (
        getattr(losses, "OhemCrossEntropy", None)
        or __import__(
            "mmseg.models.losses.ohem_cross_entropy_loss", fromlist=["OhemCrossEntropy"]
        ).OhemCrossEntropy
    )
    for seed in range(60):
        # In float64: float32 probabilities of easy pixels tie at 1, and it drops ties.
        logits, target, settings = draw(seed, "hrnet")
        if int((target != 255).sum()) <= max(1, settings["min_kept"]):
            continue
        weights = settings.get("class_weight")
        weights = None if weights is None else weights.tolist()
        rule = {"min_kept": settings["min_kept"], "class_weight": weights}
        theirs = logits.clone().requires_grad_()
        expected = theirs_type(thres=settings["thresh"], **rule)(theirs, target)
        expected.backward()
        ours = logits.clone().requires_grad_()
        loss = OhemCrossEntropyLoss(preset="hrnet", thresh=settings["thresh"], **rule)(ours, target)
        loss.backward()
        torch.testing.assert_close((loss, ours.grad), (expected, theirs.grad), rtol=1e-5, atol=1e-7)
