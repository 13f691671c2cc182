"""CamVid and the generated scenes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg", reason="the data sets are mmseg's")

import mmcv
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from mmseg.registry import DATASETS

from ohem_mm.datasets import CamVidDataset, StreetScenesDataset, camvid, scenes
from ohem_mm.datasets.scenes import draw_scene

PIPELINE = [{"type": "LoadImageFromFile"}, {"type": "LoadAnnotations"}, {"type": "PackSegInputs"}]
RARE = [scenes.CLASSES.index(c) for c in ("person", "pole", "sign", "light")]


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope("mmseg")


def shares(size: tuple[int, int], scenes_count: int = 60) -> np.ndarray:
    """Share of each label among all pixels."""
    counts = np.zeros(256, int)
    for i in range(scenes_count):
        counts += np.bincount(draw_scene(i, size=size)[1].ravel(), minlength=256)
    return counts / counts.sum()


def test_registered_and_imported_by_name() -> None:
    import_modules_from_strings(["ohem_mm.datasets"])  # what custom_imports does
    assert DATASETS.get("CamVidDataset") is CamVidDataset
    assert DATASETS.get("StreetScenesDataset") is StreetScenesDataset


@pytest.mark.parametrize("module", [camvid, scenes])
def test_palettes_tell_the_classes_apart(module: Any) -> None:
    assert len(set(module.CLASSES)) == len(module.CLASSES) == len(module.PALETTE)
    assert len({tuple(c) for c in module.PALETTE}) == len(module.PALETTE)


# --- scenes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(48, 48), (96, 192), (97, 131), (256, 128)])
def test_scene_shape_and_labels(height: int, width: int) -> None:
    image, label = draw_scene(0, size=(height, width))
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (label.shape, label.dtype) == ((height, width), np.uint8)
    assert set(np.unique(label)) <= {*range(10), 255}


def test_scenes_are_the_same_bytes_everywhere() -> None:
    # Drawn with integers only, so a fixed digest holds on every platform.
    digest = hashlib.sha256()
    for i in range(20):
        for array in draw_scene(i, split="val", size=(96, 192), seed=3):
            digest.update(array.tobytes())
    assert digest.hexdigest() == "471bfb018469b988ec7adb8d88b0deea3d92f845c30f73348cac6bea77157044"


def test_split_seed_and_index_make_different_scenes() -> None:
    base = draw_scene(0, size=(96, 192))[1]
    for other in (
        draw_scene(1, size=(96, 192)),
        draw_scene(0, size=(96, 192), split="val"),
        draw_scene(0, size=(96, 192), seed=1),
    ):
        assert (other[1] != base).mean() > 0.05


def test_rare_classes_are_rare_and_every_class_is_there() -> None:
    share = shares((96, 192))
    assert (share[:10] > 0).all()
    assert (share[RARE] < 0.02).all()
    assert share[RARE].sum() < 0.05
    assert 0 < share[255] < 0.05
    assert share[10:255].sum() == 0


def test_how_rare_the_rare_classes_are_can_be_set() -> None:
    counts = {}
    for rare in (100, 25, 0):
        counts[rare] = np.zeros(256, int)
        for i in range(120):
            label = draw_scene(i, size=(96, 192), rare=rare)[1]
            counts[rare] += np.bincount(label.ravel(), minlength=256)
    share = {rare: count[RARE].sum() / counts[100][RARE].sum() for rare, count in counts.items()}
    # Fewer things hide each other, so a little more than a quarter is seen.
    assert 0.2 < share[25] < 0.35
    assert share[0] == 0
    # What hid behind them is seen; the rest of the street is the same.
    common = [scenes.CLASSES.index(c) for c in ("road", "building", "sky", "tree", "car")]
    np.testing.assert_allclose(counts[0][common], counts[100][common], rtol=0.06)
    plain = draw_scene(0, size=(96, 192), rare=100)
    np.testing.assert_array_equal(plain[0], draw_scene(0, size=(96, 192))[0])


def test_scenes_with_few_rare_things_have_addresses_of_their_own() -> None:
    dataset = StreetScenesDataset(num_scenes=3, size=(96, 192), rare=25, pipeline=PIPELINE)
    assert dataset[2]["data_samples"].img_path == "scenes://train-0-96x192-rare25/00002.png"
    want = draw_scene(2, size=(96, 192), rare=25)[1]
    np.testing.assert_array_equal(dataset[2]["data_samples"].gt_sem_seg.data[0].numpy(), want)


def test_poles_are_thin() -> None:
    pole = scenes.CLASSES.index("pole")
    runs = []
    for i in range(40):
        mask = np.pad(draw_scene(i, size=(96, 192))[1] == pole, ((0, 0), (1, 1)))
        edges = np.diff(mask.astype(np.int8), axis=1)
        runs.append(np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1])
    assert np.median(np.concatenate(runs)) <= 3


def test_look_alikes_are_not_told_by_colour() -> None:
    # The colour nearest to a pole's is often another class's: a net has to look at shapes.
    pole, building = (scenes.CLASSES.index(c) for c in ("pole", "building"))
    colours: dict[int, list[np.ndarray]] = {pole: [], building: []}
    for i in range(40):
        image, label = draw_scene(i, size=(96, 192))
        for cls, found in colours.items():
            found.append(image[label == cls].mean(-1))
    a, b = (np.concatenate(colours[c]) for c in (pole, building))
    low, high = np.quantile(a, [0.25, 0.75])
    assert ((b > low) & (b < high)).mean() > 0.2


def test_scene_is_read_through_mmengine(tmp_path: Path) -> None:
    image, label = draw_scene(7, split="test", size=(96, 192), seed=2)
    folder = "scenes://test-2-96x192/00007"
    decoded = mmcv.imfrombytes(fileio.get(f"{folder}.png"), channel_order="bgr")
    np.testing.assert_array_equal(decoded, image)
    decoded = mmcv.imfrombytes(
        fileio.get(f"{folder}_label.png"), flag="unchanged", backend="pillow"
    )
    np.testing.assert_array_equal(decoded, label)


@pytest.mark.parametrize(
    "address", ["scenes://train-0-96x192", "scenes://extra-0-96x192/1.png", "scenes://1.png"]
)
def test_bad_address_is_named(address: str) -> None:
    with pytest.raises(ValueError, match="no scene at"):
        fileio.get(address)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "dev"}, "split is 'dev'; allowed are train, val, test"),
        ({"num_scenes": 0}, "num_scenes is 0"),
        ({"size": (32, 192)}, r"size is \(32, 192\)"),
        ({"seed": -1}, "seed is -1"),
        ({"rare": 101}, "rare is 101; it must be a per cent from 0 to 100"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreetScenesDataset(**{"num_scenes": 2, **kwargs})


@pytest.mark.parametrize(("start_method", "workers"), [("fork", 2), ("spawn", 1)])
def test_loader_workers_draw_the_same_scenes(start_method: str, workers: int) -> None:
    dataset = {
        "type": "StreetScenesDataset",
        "num_scenes": 4,
        "size": [64, 96],
        "pipeline": PIPELINE,
    }
    loader = Runner.build_dataloader(
        {
            "batch_size": 2,
            "num_workers": workers,
            "multiprocessing_context": start_method,
            "dataset": dataset,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
        }
    )
    index = 0
    for batch in loader:
        for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
            want_image, want_label = draw_scene(index, size=(64, 96))
            assert torch.equal(image, torch.from_numpy(want_image.copy()).permute(2, 0, 1))
            got = sample.gt_sem_seg.data[0]
            assert torch.equal(got, torch.from_numpy(want_label.astype(np.int64)))
            assert sample.img_path == f"scenes://train-0-64x96/{index:05d}.png"
            index += 1
    assert index == 4


def test_options_of_the_base_data_set_work() -> None:
    dataset = StreetScenesDataset(
        num_scenes=9, size=(64, 96), indices=3, pipeline=PIPELINE, metainfo={"classes": ("car",)}
    )
    assert len(dataset) == 3
    label = draw_scene(1, size=(64, 96))[1]
    got = dataset[1]["data_samples"].gt_sem_seg.data[0].numpy()
    np.testing.assert_array_equal(got == 0, label == scenes.CLASSES.index("car"))
    assert set(np.unique(got)) <= {0, 255}


def test_quickstart_reads_different_scenes_for_each_split() -> None:
    root = Path(__file__).resolve().parents[1] / "configs" / "_base_" / "datasets"
    cfg = Config.fromfile(root / "scenes_96x192.py")
    built = [DATASETS.build(cfg[f"{s}_dataloader"].dataset) for s in ("train", "val", "test")]
    folders = {d.folder for d in built}
    assert len(folders) == 3
    assert all(d[0]["inputs"].shape == (3, 96, 192) for d in built)


# --- CamVid ---------------------------------------------------------------------------------------


def write_camvid(root: Path, suffixes: tuple[str, ...] = (".jpg",), count: int = 3) -> None:
    rng = np.random.default_rng(0)
    for folder in ("img_dir/train", "ann_dir/train"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        for suffix in suffixes:
            image = Image.fromarray(rng.integers(0, 255, (36, 48, 3), np.uint8))
            image.save(root / f"img_dir/train/{i}{suffix}")
        label = rng.integers(0, 12, (36, 48), np.uint8)
        label[label == 11] = 255
        paletted = Image.fromarray(label)
        # 256 colours: with fewer, Pillow writes fewer bits a pixel and 255 is lost.
        paletted.putpalette([v for c in camvid.PALETTE for v in c] + [0] * 3 * 245)
        paletted.save(root / f"ann_dir/train/{i}.png")


def camvid_dataset(root: Path, **kwargs: Any) -> CamVidDataset:
    prefix = {"img_path": "img_dir/train", "seg_map_path": "ann_dir/train"}
    return CamVidDataset(data_root=str(root), data_prefix=prefix, pipeline=PIPELINE, **kwargs)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_camvid_finds_its_images(tmp_path: Path, suffix: str) -> None:
    write_camvid(tmp_path, (suffix,))
    dataset = camvid_dataset(tmp_path)
    assert len(dataset) == 3
    assert dataset.get_data_info(2)["img_path"].endswith(f"img_dir/train/2{suffix}")
    sample = dataset[1]
    want = np.array(Image.open(tmp_path / "ann_dir/train/1.png"))
    np.testing.assert_array_equal(sample["data_samples"].gt_sem_seg.data[0].numpy(), want)
    assert 255 in want
    assert sample["inputs"].shape == (3, 36, 48)


def test_camvid_with_both_kinds_asks_which(tmp_path: Path) -> None:
    write_camvid(tmp_path, (".jpg", ".png"))
    with pytest.raises(ValueError, match=r"holds \.jpg and \.png images"):
        camvid_dataset(tmp_path)
    assert len(camvid_dataset(tmp_path, img_suffix=".png")) == 3


@pytest.mark.parametrize("make", [False, True])
def test_camvid_without_images_says_how_to_get_them(tmp_path: Path, make: bool) -> None:
    if make:
        write_camvid(tmp_path, ())
    with pytest.raises(FileNotFoundError, match=r"dataset_converters/camvid\.py prepares CamVid"):
        camvid_dataset(tmp_path)
