"""Every preset against an independent statement of its original, and what the docs say of it.

``test_reference.py`` has the originals themselves.
"""

import math
import re
import statistics
from collections import Counter
from pathlib import Path

import pytest
import torch
from draws import draw
from originals import (
    DRAWS,
    DTYPES,
    REGION_DRAWS,
    SOFTMAX_ONLY,
    TOLERANCE,
    assert_same,
    compare,
    deviation,
    draw_region,
    flat,
    floor_of,
    preset,
    restated,
    run,
)
from problems import value_and_grad
from torch.nn import functional as F

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ohem_cross_entropy
from ohem_mm.presets import PRESETS, REGION_PRESETS, preset_rule
from ohem_mm.reference import ORIGINALS, REGION_ORIGINALS

ROOT = Path(__file__).parents[1]
DOCS = (ROOT / "docs" / "presets.md").read_text()
SHARES = {"bisenet", "stdc", "textbook", "detectron2", "nnunet"}
# Where a preset does not do what its original does, in the words of docs/presets.md.
DEVIATIONS = {
    "mmseg-sampler": {"nothing kept", "n <= k", "ties", "min_kept below 2"},
    "mmseg-sampler-topk": {"nothing kept", "min_kept below 2"},
    "hrnet": {"n <= k", "ties", "nothing kept"},
    "bisenet": {"nothing kept"},
    "stdc": {"nothing kept"},
    "torchseg": {"ties", "p == thresh", "nothing kept"},
    "paddleseg": {"ties", "cut off at 64"},
    "detectron2": {"nothing kept"},
    "nnunet": {"nothing kept", "smoothing with class weights"},
    "textbook": {"nothing kept"},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_equals_the_original(name, dtype):
    seen, deviations = Counter(), Counter()
    for seed in range(DRAWS):
        problem = draw(seed, name, dtype)
        theirs = run(restated(name), problem)
        why = deviation(name, problem, theirs[0])
        if why is not None:
            deviations[why] += 1
            continue
        try:
            tied = assert_same(
                name, problem, run(preset(name), problem), theirs, **TOLERANCE[dtype]
            )
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {problem.kind}, {problem.settings}") from error
        valid = problem.target != 255
        seen.update(
            {
                "all": 1,
                "tied": tied,
                "ignored": not valid.all(),
                "none": problem.settings["min_kept"] == 0,
                "one": problem.settings["min_kept"] == 1,
                "n <= k": (floor_of(name, problem) or 0) >= int(valid.sum()),
                "above 17": bool((flat(problem)[0][valid.flatten()] < math.exp(-17)).any()),
            }
        )
    assert set(deviations) == DEVIATIONS[name]
    assert seen["all"] + deviations.total() == DRAWS
    assert seen["all"] > DRAWS // 3
    assert seen["ignored"] > DRAWS // 5
    assert seen["above 17"] > 10
    assert seen["tied"] > 0
    if isinstance(preset_rule(name).min_kept, int) and not name.startswith("mmseg"):
        assert seen["none"] > 10
        assert seen["one"] > 10


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


# --- what PEERS found, in numbers ------------------------------------------------------------


def late(easy, hard=1, gap=30.0):
    """Two classes: ``easy`` pixels with a gap between the logits, then ``hard`` ones without."""
    logits = torch.zeros(1, 2, 1, easy + hard)
    logits[:, 0, :, :easy] = gap
    return logits, torch.zeros(1, 1, easy + hard, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "settings", "restatement"),
    [
        ("bisenet", {}, {}),
        ("hrnet", {"min_kept": 2}, None),
        ("mmseg-sampler", {"min_kept": 2, "avg": "kept"}, None),
        ("stdc", {"min_kept": 2}, {"min_kept": 2}),
        ("torchseg", {"min_kept": 2}, None),
        ("detectron2", {"min_kept": 2 / 33}, {"min_kept": 2 / 33}),
        ("nnunet", {"min_kept": 6.1 / 100}, {"min_kept": 6.1}),
    ],
)
def test_the_floor_keeps_the_scale_late_in_training(name, settings, restatement):
    """Two places, one hard pixel, 32 tied at loss 0: half of log 2, not a 33rd of it."""
    logits, target = late(32)
    half = pytest.approx(math.log(2) / 2, rel=1e-4)
    assert OhemCrossEntropyLoss(preset=name, **settings)(logits, target).item() == half
    if restatement is not None:
        assert ORIGINALS[name](logits, target, **restatement).item() == half


def test_strict_limits_drop_what_ties():
    """The deviation 'ties', in the numbers of the docs."""
    logits, target = late(32)
    ours = OhemCrossEntropyLoss(preset="hrnet", min_kept=2)(logits, target).item()
    originals = {
        "hrnet": (ORIGINALS["hrnet"], {"min_kept": 2}, math.log(2)),
        "torchseg": (ORIGINALS["torchseg"], {"min_kept": 2}, math.log(2) / 33),
        "paddleseg": (ORIGINALS["paddleseg"], {"min_kept": 3}, math.log(2)),
    }
    assert round(ours, 4) == 0.3466
    for call, settings, expected in originals.values():
        assert call(logits, target, **settings).item() == pytest.approx(expected, rel=1e-3)


def test_stdc_counts_ignored_pixels():
    logits = torch.tensor([[2.0, 1, 3, 4], [0, 0, 0, 0]]).view(1, 2, 1, 4)
    target = torch.tensor([[[0, 255, 255, 255]]])
    for min_kept in (2, 0.5):
        loss = OhemCrossEntropyLoss(preset="stdc", min_kept=min_kept)(logits, target)
        assert f"{loss:.5f}" == "0.06346"
    assert f"{ORIGINALS['stdc'](logits, target, min_kept=2):.5f}" == "0.06346"
    # More places than pixels: an error there, all pixels here.
    loss = OhemCrossEntropyLoss(preset="stdc", min_kept=99)(logits, target)
    assert f"{loss:.5f}" == f"{0.1269280 / 4:.5f}"


def test_an_int_floor_counts_each_image_once():
    logits = torch.tensor([[2.0, 1, 3, 4], [0, 0, 0, 0]]).view(1, 2, 1, 4).repeat(2, 1, 1, 1)
    target = torch.tensor([[[0, 255, 255, 255]]]).repeat(2, 1, 1)
    for settings in (
        {"min_kept": 4},
        {"min_kept": 2, "min_kept_per": "image"},
        {"min_kept": 2, "pool": "image"},
        {"min_kept": 0.5, "pool": "image"},
        {"min_kept": 0.5, "pool": "world"},
    ):
        loss = OhemCrossEntropyLoss(preset="stdc", **settings)(logits, target)
        assert f"{loss:.5f}" == "0.06346", settings


def test_hrnet_reads_0_as_1():
    logits = torch.tensor([[3.0, 4], [0, 0]]).view(1, 2, 1, 2)
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    loss = OhemCrossEntropyLoss(preset="hrnet", min_kept=0)
    assert f"{loss(logits, target):.5f}" == "0.04859"
    assert f"{ORIGINALS['hrnet'](logits, target, min_kept=0):.5f}" == "0.04859"
    assert loss.min_kept == 1
    loss.min_kept = 0.0
    assert loss.min_kept == 1
    assert OhemCrossEntropyLoss(min_kept=0)(logits, target) == 0


@pytest.mark.parametrize(
    ("name", "share", "original", "pixels", "kept"),
    [
        ("detectron2", 0.29, 0.29, 100, 28),
        ("detectron2", 0.57, 0.57, 100, 56),
        ("nnunet", 29 / 100, 29, 100, 29),
        ("nnunet", 33.333333 / 100, 33.333333, 300, 99),
        ("nnunet", 0.7 / 100, 0.7, 1000, 7),
        ("stdc", 0.29, None, 100, 29),
        (None, 0.29, None, 100, 29),
    ],
)
@pytest.mark.parametrize("pool", ["batch", "image", "world"])
def test_a_share_is_rounded_as_the_original_rounds_it(name, share, original, pixels, kept, pool):
    logits = torch.arange(2.0 * pixels).flip(0).view(1, 2, 1, pixels) / pixels
    target = torch.zeros(1, 1, pixels, dtype=torch.long)
    rule = {"preset": name} if name else {}
    loss_map = OhemCrossEntropyLoss(
        **rule, thresh=None, min_kept=share, pool=pool, reduction="none"
    )(logits + torch.linspace(0, 1, pixels) * torch.tensor([1.0, -1]).view(1, 2, 1, 1), target)
    assert int((loss_map > 0).sum()) == kept
    if original is not None:
        unit = 1 if name == "detectron2" else 100
        assert int(pixels * original / unit) == kept


def test_nnunet_mines_the_smoothed_loss():
    """A pixel whose plain loss is larger, and whose smoothed loss is smaller."""
    logits = torch.tensor([[1.0, 9.0], [0.5, 0.0], [0.5, -30.0]]).view(1, 3, 1, 2)
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    rule = {"min_kept": 0.5, "label_smoothing": 0.1}
    plain = ohem_cross_entropy(logits, target, thresh=None, reduction="none", **rule)
    assert (plain > 0).tolist() == [[[True, False]]]
    smooth = OhemCrossEntropyLoss(preset="nnunet", reduction="none", **rule)(logits, target)
    assert (smooth > 0).tolist() == [[[False, True]]]
    expected = ORIGINALS["nnunet"](logits, target, min_kept=50, label_smoothing=0.1)
    assert smooth.sum().item() == pytest.approx(expected.item())


def test_the_cut_at_64_is_not_ours():
    logits = torch.tensor([[0.0, 0], [100, 0]]).view(1, 2, 1, 2)
    target = torch.zeros(1, 1, 2, dtype=torch.long)
    settings = {"min_kept": 2}
    ours = OhemCrossEntropyLoss(preset="paddleseg", **settings)(logits, target)
    theirs = ORIGINALS["paddleseg"](logits, target, **settings)
    assert 2 * ours.item() == pytest.approx(100 + math.log(2), rel=1e-4)
    assert 2 * theirs.item() == pytest.approx(64 + math.log(2), rel=1e-4)


def one_line(text):
    return " ".join(text.split())


def ccnet(logits, target, thresh, min_kept, factor=8):
    """Loss and limit of CCNet's OhemCrossEntropy2d: the limit comes from an eighth of the map."""
    from scipy.ndimage import zoom

    probs = logits.detach().softmax(1).numpy()
    scale = (1 / factor, 1 / factor)
    labels = torch.from_numpy(zoom(target.numpy(), (1, *scale), order=0))
    small = torch.from_numpy(zoom(probs, (1, 1, *scale), order=1))
    at = torch.where(labels == 255, 0, labels)[:, None]
    order = small.gather(1, at).squeeze(1)[labels != 255].sort().values
    k, limit = min_kept // factor**2, thresh
    if k >= len(order):
        limit = 1.0
    elif k:
        limit = max(float(order[k - 1]), thresh)
    index = torch.where(target == 255, 0, target)[:, None]
    true = torch.from_numpy(probs).gather(1, index).squeeze(1)
    return F.cross_entropy(logits, torch.where(true <= limit, target, 255), ignore_index=255), limit


def smooth_map(seed, sharpness):
    """Smooth logits of 96x128 with labels that mostly agree with them, some ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, 3, 6, 8, generator=generator, dtype=torch.float64) * 3
    logits = F.interpolate(logits, size=(96, 128), mode="bilinear", align_corners=True)
    target = logits.argmax(1)
    target[torch.rand(target.shape, generator=generator) < 0.05] = 0
    target[:, :10] = 255
    return logits * sharpness, target


def test_what_the_docs_say_of_ccnet():
    """Equal to ``hrnet`` where thresh decides, not where the floor does."""
    pytest.importorskip("scipy")
    by_thresh, by_floor = [], []
    for seed in range(30):
        for sharpness, k in ((0.5, 640), (2.0, 6400)):
            logits, target = smooth_map(seed, sharpness)
            theirs, limit = ccnet(logits, target, 0.7, k)
            ours = OhemCrossEntropyLoss(preset="hrnet", min_kept=k)(logits, target)
            off = abs(ours.item() / theirs.item() - 1)
            (by_floor if limit > 0.7 else by_thresh).append(off)
    assert max(by_thresh) < 1e-6
    assert (len(by_thresh), len(by_floor)) == (30, 30)
    low, *_, high = sorted(100 * off for off in by_floor)
    middle = 100 * statistics.median(by_floor)
    assert f"differed by {low:.1f} to {high:.0f} %, {middle:.1f} % in the median" in one_line(DOCS)


def test_hrnet_with_threshold_0_is_pure_top_k():
    for seed in range(40):
        problem = draw(seed, "hrnet", torch.float64)
        problem.settings["thresh"] = 0
        theirs = run(restated("hrnet"), problem)
        if deviation("hrnet", problem, theirs[0]) is None:
            problem.settings["thresh"] = None
            ours = run(preset("hrnet"), problem)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="thresh must be None or a probability"):
        OhemCrossEntropyLoss(preset="hrnet", thresh=0)


# --- what the docs say -----------------------------------------------------------------------


def test_docs_list_the_deviations():
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", DOCS.split("## Habits")[0], re.MULTILINE)
    assert {name: set(cell.split("; ")) for name, cell in rows} == DEVIATIONS
    for words in set().union(*DEVIATIONS.values()):
        assert f"- **{words}" in DOCS


# --- overlap losses --------------------------------------------------------------------------


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
    assert (
        sum(compare(name, seed, original, ignored=ignored) for seed in range(REGION_DRAWS))
        > REGION_DRAWS / 2
    )


def test_every_preset_is_restated():
    assert set(REGION_PRESETS) == set(REGION_ORIGINALS)


@pytest.mark.parametrize("s", [0.1, 0.4])
def test_jaccard_metric_loss_with_soft_labels(s):
    """With soft labels the originals count all classes."""
    for seed in range(30):
        logits, target, _, _, _ = draw_region(seed, "jdt")
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


def test_overrides_of_a_region_loss_win_too():
    for loss in (
        RegionLoss("jaccard", preset="monai-dice"),
        RegionLoss(preset="monai-dice", kind="jaccard"),
        RegionLoss.from_preset("monai-dice", kind="jaccard"),
    ):
        assert loss.kind == "jaccard"
        assert (loss.pool, loss.classes, loss.smooth) == ("image", "all", 1e-5)
    with pytest.raises(ValueError, match=r"preset must be one of smp-dice,.*'monai'"):
        RegionLoss(preset="monai")
