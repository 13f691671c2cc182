"""What is mined of an image, and the pictures of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

import mmseg.models  # noqa: F401

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.visualization import (
    MINED,
    ClassCounts,
    MainLoss,
    board,
    class_colours,
    for_one_image,
    main_loss,
    mine_sample,
    panels,
    predicted,
    to_rgb,
)


def an_image(height=24, width=40, classes=5, channels=None):
    """What a segmentor returns for one image, with a corner ignored, and its packed image."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(channels or classes, height, width, generator=generator) * 2
    label = torch.randint(0, classes, (1, height, width), generator=generator)
    label[:, : height // 4, : width // 4] = 255
    if channels == 1:
        logits = logits.sigmoid()
    prediction = logits.argmax(0, keepdim=True) if len(logits) > 1 else (logits > 0.5).float()
    sample = SimpleNamespace(
        seg_logits=SimpleNamespace(data=logits),
        pred_sem_seg=SimpleNamespace(data=prediction),
        gt_sem_seg=SimpleNamespace(data=label),
    )
    return sample, torch.randint(0, 256, (3, height, width), generator=generator)


def shot(loss=None, batch_size=1, **options):
    sample, inputs = an_image(**options)
    main = MainLoss("decode_head", loss or OhemCrossEntropyLoss(), 255)
    return mine_sample(sample, inputs, "a.png", main, batch_size)


# --- what is mined ---------------------------------------------------------------------------


def test_mined_pixels_are_those_of_the_loss():
    seen = shot(OhemCrossEntropyLoss(thresh=0.4, min_kept=3))
    sample, _ = an_image()
    logits, label = sample.seg_logits.data[None], sample.gt_sem_seg.data
    expected = nn.functional.cross_entropy(logits, label, ignore_index=255, reduction="none")[0]
    valid = label[0] != 255
    np.testing.assert_array_equal(seen.valid, valid)
    np.testing.assert_allclose(seen.loss[seen.valid], expected[valid], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(seen.kept, (expected > -np.log(0.4)) & valid)
    assert 0 < seen.kept_share < 1
    assert seen.mean_loss == pytest.approx(expected[valid].mean().item(), rel=1e-5)


def test_one_sigmoid_channel_is_turned_back_into_logits():
    seen = shot(
        OhemCrossEntropyLoss(thresh=0.4, min_kept=0, use_sigmoid=True), channels=1, classes=2
    )
    sample, _ = an_image(channels=1, classes=2)
    p = sample.seg_logits.data[0]
    p = torch.where(sample.gt_sem_seg.data[0] == 1, p, 1 - p).numpy()
    np.testing.assert_array_equal(seen.kept, (p < 0.4) & seen.valid)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"min_kept": 101}, (26, "image")),
        ({"min_kept": 101, "min_kept_per": "image"}, (101, "image")),
        ({"min_kept": 101, "pool": "image"}, (101, "image")),
        ({"min_kept": 101, "pool": "class"}, (26, "class")),
        ({"min_kept": 101, "pool": "world"}, (26, "image")),
        ({"min_kept": 0.3}, (0.3, "image")),
    ],
)
def test_floor_of_one_image(settings, expected):
    loss = OhemCrossEntropyLoss(**settings, class_weight=[1.0, 2.0])
    own = for_one_image(loss, 4)
    assert (own.min_kept, own.pool) == expected
    assert loss.min_kept == settings["min_kept"]
    assert own.class_weight is loss.class_weight


def test_all_ignored_image():
    sample, inputs = an_image()
    sample.gt_sem_seg.data.fill_(255)
    seen = mine_sample(sample, inputs, "a", MainLoss("", OhemCrossEntropyLoss(), 255))
    assert seen.mean_loss == 0
    assert seen.kept_share == 0
    names, colours = class_colours({}, 5)
    assert board(seen, names, colours, OhemCrossEntropyLoss()).any()


def test_main_loss_is_that_of_the_last_decode_head():
    def head(*losses, **attributes):
        module = nn.Module()
        module.loss_decode = nn.ModuleList(losses) if len(losses) > 1 else losses[0]
        module.__dict__.update(attributes)
        return module

    model = nn.Module()
    assert main_loss(model) is None
    model.auxiliary_head = head(OhemCrossEntropyLoss())
    assert main_loss(model).name == "auxiliary_head"
    last = OhemCrossEntropyLoss(), OhemCrossEntropyLoss()
    model.decode_head = nn.ModuleList([head(OhemCrossEntropyLoss()), head(*last, ignore_index=7)])
    found = main_loss(model)
    assert found == ("decode_head.1", last[0], 7)
    last[0].ignore_index = 9
    assert main_loss(model).ignore_index == 9


def test_counts():
    seen = shot()
    counts = ClassCounts(5).add(seen).add(seen)
    for index in range(5):
        own = (seen.label == index) & seen.valid
        assert counts.pixels[index] == 2 * own.sum()
        assert counts.mined[index] == 2 * seen.kept[own].sum()
    assert counts.pixel_share.sum() == pytest.approx(1)
    assert np.isnan(ClassCounts(5).mined_of_class).all()


def test_predicted():
    logits = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(predicted(logits, (4, 5)), logits.argmax(0))
    assert torch.equal(predicted(logits[:1], (4, 5)), (logits[0] > 0).long())
    assert predicted(logits, (8, 10)).shape == (8, 10)


def test_to_rgb():
    packed = torch.tensor([1, 2, 3]).view(3, 1, 1).expand(3, 4, 6)
    assert to_rgb(packed, (8, 12))[7, 11].tolist() == [3, 2, 1]
    padded = to_rgb(packed, (8, 12), pad=True)
    assert padded[3, 5].tolist() == [3, 2, 1]
    assert not padded[4:].any()
    assert to_rgb(packed[:1], (4, 6))[0, 0].tolist() == [1, 1, 1]


# --- pictures --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(24, 40), (96, 192), (1024, 2048), (900, 40)])
def test_panels_have_one_readable_size(size):
    seen = shot(height=size[0], width=size[1])
    out = panels(seen, class_colours({}, 5)[1])
    assert list(out) == ["image", "ground truth", "prediction", "loss", "mined pixels"]
    shapes = {picture.shape for picture in out.values()}
    assert len(shapes) == 1
    assert 240 <= max(shapes.pop()) <= 900
    assert all(picture.dtype == np.uint8 for picture in out.values())


def test_mined_panel_marks_the_kept_pixels_and_no_others():
    seen = shot(height=48, width=480)  # drawn at its own size
    out = panels(seen, class_colours({}, 5)[1])
    marked = (out["mined pixels"] == MINED).all(2)
    np.testing.assert_array_equal(marked, seen.kept)
    # Losses are coloured on one scale: a higher loss is never darker, wherever it is.
    brightness = out["loss"].astype(int).sum(2)[seen.valid]
    order = np.argsort(seen.loss[seen.valid])
    assert (np.diff(brightness[order]) >= -3).all()
    assert brightness[order][-1] > 500 > 150 > brightness[order][0]
    striped = out["mined pixels"][~seen.valid]
    assert set(map(tuple, striped.tolist())) == {(96,) * 3, (136,) * 3}
    np.testing.assert_array_equal(out["loss"][~seen.valid], striped)


def test_without_data_neither_photograph_nor_labels_can_be_seen():
    sample, inputs = an_image(height=48, width=480)
    main = MainLoss("", OhemCrossEntropyLoss(thresh=None, min_kept=0), 255)
    colours = class_colours({}, 5)[1]
    first = panels(mine_sample(sample, inputs, "a", main), colours, show_data=False)
    other = panels(mine_sample(sample, 255 - inputs, "a", main), colours, show_data=False)
    assert list(first) == ["prediction", "loss", "mined pixels"]
    for title in first:
        np.testing.assert_array_equal(first[title], other[title])


def test_class_colours_fills_what_the_data_set_leaves_out():
    names, colours = class_colours({"classes": ("a", "b"), "palette": [[1, 2, 3]]}, 150)
    assert names[:3] == ["a", "b", "class 2"]
    assert colours[0].tolist() == [1, 2, 3]
    assert len(set(map(tuple, colours.tolist()))) == 150


@pytest.mark.parametrize(
    ("height", "width", "classes", "thresh"),
    [
        (96, 192, 2, 0.7),
        (360, 480, 11, None),
        (1024, 2048, 19, 1.0),
        (300, 400, 150, 0.7),
        (900, 40, 150, 0.7),
    ],
)
def test_board_leaves_room_for_every_class(height, width, classes, thresh):
    seen = shot(height=height, width=width, classes=classes)
    names, colours = class_colours({}, classes)
    picture = board(seen, names, colours, OhemCrossEntropyLoss(thresh=thresh), "iteration 5")
    high, wide = panels(seen, colours)["loss"].shape[:2]
    assert picture.dtype == np.uint8
    assert picture.shape[0] > 2 * high
    assert picture.shape[1] > 3 * wide
    # Nothing reaches the margin, so nothing is cut off.
    for edge in (picture[:4], picture[-4:], picture[:, :4], picture[:, -4:]):
        assert (edge == 255).all()
    # Each class has a swatch outside the panels: a square of its colour.
    legend = picture[-round(picture.shape[0] - 2 * high - 60) :]
    if classes == 150:
        flat = legend.reshape(-1, 3)
        assert all((flat == colour).all(1).sum() >= 13 * 13 for colour in colours)
