"""Faulty files of a data set are named, before training where a look at a few finds them."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg")

from mmengine.config import Config
from PIL import Image

from ohem_mm import cli
from ohem_mm.cli import labels
from ohem_mm.config import config_path

pytestmark = pytest.mark.usefixtures("elsewhere")

CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
CONFIG = f"""
_base_ = {str(config_path(CE))!r}
data = dict(_delete_=True, type='BaseSegDataset', img_suffix='.png', data_root='data',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    metainfo=dict(classes=tuple('abcdefghij')),
    pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
              dict(type='PackSegInputs')])
train_dataloader = dict(num_workers=1, dataset=data)
val_dataloader = dict(num_workers=1, dataset=data)
test_dataloader = val_dataloader
"""


@pytest.fixture
def data():
    """A config with 20 images; returns what writes into one of its label maps."""
    rng = np.random.default_rng(0)
    for folder in ("images", "labels"):
        Path("data", folder).mkdir(parents=True)

    def write(index, label=None):
        file = Path(f"data/labels/{index:02d}.png")
        label = rng.integers(0, 10, (96, 192)) if label is None else label
        if isinstance(label, bytes):
            file.write_bytes(label)
        else:
            Image.fromarray(np.asarray(label, np.uint8)).save(file)
        return file

    for index in range(20):
        pixels = rng.integers(0, 256, (96, 192, 3), np.uint8)
        Image.fromarray(pixels).save(f"data/images/{index:02d}.png")
        write(index)
    Path("mine.py").write_text(CONFIG)
    return write


def torn():
    return Path("data/labels/03.png").read_bytes()[:500]


FAULTS = {
    "labels that no class has": (
        lambda: np.where(np.eye(96, 192) > 0, 254, 12),
        "the label map {file} has the labels 12, 254; with 10 classes they are 0 to 9, and 255",
    ),
    "colours": (lambda: np.zeros((96, 192, 3)), "the label map {file} has 3 channels"),
    "another size": (
        lambda: np.zeros((90, 192)),
        "the label map {file} is 192x90, and its image {image} is 192x96",
    ),
    "empty": (lambda: b"", "{file} does not load (LoadAnnotations: UnidentifiedImageError"),
    "cut off": (torn, "{file} does not load (LoadAnnotations: OSError: image file is truncated"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faulty_files_are_named(data, name):
    label, message = FAULTS[name]
    file = data(0, label())
    with pytest.raises(cli.UserError) as caught:
        labels.check_labels(Config.fromfile("mine.py"))
    image = "data/images/00.png"
    assert str(caught.value).startswith(message.format(file=file, image=image))
    assert "\n" not in str(caught.value)


def test_a_torn_image_is_named(data):
    Path("data/images/19.png").write_bytes(b"")
    with pytest.raises(cli.UserError, match=r"^data/images/19.png does not load \(LoadImageFrom"):
        labels.check_labels(Config.fromfile("mine.py"))


def test_sound_data_pass(data, capsys):
    data(0, np.full((96, 192), 255))  # one wholly ignored map is no fault
    labels.check_labels(Config.fromfile("mine.py"))
    labels.check_labels(Config.fromfile(config_path(CE)))  # generated, not read from files
    assert capsys.readouterr().err == ""


def test_labels_that_are_all_ignored_are_said(data, capsys):
    for index in range(20):
        data(index, np.full((96, 192), 255))
    labels.check_labels(Config.fromfile("mine.py"))
    warning = capsys.readouterr().err
    assert "warning: in all 8 label maps that were looked at (data/labels/00.png ...)" in warning


def test_nested_data_sets_and_other_ignored_labels(data):
    text = "\ntrain_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=3, "
    text += "dataset={'type': 'ConcatDataset', 'datasets': [_base_.train_dataloader.dataset]}))"
    Path("nested.py").write_text("_base_ = 'mine.py'" + text)
    data(0, np.full((96, 192), 77))
    with pytest.raises(cli.UserError, match="00.png has the labels 77; "):
        labels.check_labels(Config.fromfile("nested.py"))
    cfg = Config.fromfile("nested.py")
    cfg.model.decode_head.ignore_index = 77
    labels.check_labels(cfg)


def test_steps_of_the_users_own_may_map_labels(data):
    Path("mapping.py").write_text(
        "from mmseg.registry import TRANSFORMS\n"
        "from mmcv.transforms import BaseTransform\n"
        "@TRANSFORMS.register_module(force=True)\n"
        "class MapLabels(BaseTransform):\n"
        "    def transform(self, results):\n"
        "        return results\n"
    )
    sys.path.insert(0, str(Path.cwd()))
    try:
        cfg = Config.fromfile("mine.py")
        importlib.import_module("mapping")
        cfg.train_dataloader.dataset.pipeline.insert(2, {"type": "MapLabels"})
        data(0, np.full((96, 192), 77))
        labels.check_labels(cfg)
    finally:
        sys.path.remove(str(Path.cwd()))
        sys.modules.pop("mapping", None)


OPTIONS = ["train_cfg.max_iters=20", "train_cfg.val_interval=30"]


def test_training_that_stops_names_the_file(tool, data):
    file = data(4, np.full((96, 192), 200))  # not among those that are looked at before
    labels.check_labels(Config.fromfile("mine.py"))
    code, message = tool("train", "mine.py", "--cfg-options", *OPTIONS)
    assert code == 2
    assert "looking for the file that stopped the run ...\n" in message
    assert f"error: the label map {file} has the labels 200; with 10 classes" in message


def test_other_errors_are_passed_on(data, capsys):
    cfg = Config.fromfile("mine.py")
    data(4, np.full((96, 192), 200))
    try:
        raise RuntimeError("out of memory")
    except RuntimeError as error:
        labels.explain(cfg, ("train",), error)
    assert capsys.readouterr().err == ""
