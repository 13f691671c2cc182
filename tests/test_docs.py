"""docs/: what it says of configs holds."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mmseg")

import mmseg
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from ohem_mm import cli
from ohem_mm.cli.inspection import Inspector
from ohem_mm.cli.labels import check_labels
from ohem_mm.config import config_path

DOCS = Path(__file__).parents[1] / "docs"
MMSEG = Path(mmseg.__file__).parent / ".mim" / "configs"
STDC = MMSEG / "stdc" / "stdc1_4xb12-80k_cityscapes-512x1024.py"


def test_a_config_for_ones_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "own_data.md").read_text()
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (base,) = re.findall(r"ohem_mm\.config (\S+)", snippet)
    Path("mine_1xb4.py").write_text(snippet.replace("BASE", str(config_path(base))))
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder, suffix in (("images", "jpg"), ("labels", "png")):
            Path("data/mine", folder, split).mkdir(parents=True)
            shape = (300, 400, 3) if suffix == "jpg" else (300, 400)
            pixels = rng.integers(0, 3, shape, np.uint8)
            Image.fromarray(pixels).save(f"data/mine/{folder}/{split}/a.{suffix}")
    cfg = Config.fromfile("mine_1xb4.py")
    report = Inspector(cfg)
    assert [one for one in report.findings if one.severity != "note"] == []
    assert {(row.mines, row.rule) for row in report.rows} == {("yes", "OhemCrossEntropyLoss")}
    assert report.batch.pixels() == 4 * 256 * 256
    cli.check_datasets(cfg, ("train", "val", "test"))
    check_labels(cfg)
    init_default_scope("mmseg")
    sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert sample["inputs"].shape == (3, 256, 256)
    sample = DATASETS.build(cfg.test_dataloader.dataset)[0]
    assert sample["data_samples"].gt_sem_seg.shape == (300, 400)


@pytest.mark.skipif(not STDC.is_file(), reason="this mmseg does not ship its configs")
def test_the_sampler_is_taken_out_by_none():
    cfg = Config.fromfile(STDC)
    ours = {"model.decode_head.loss_decode.type": "ohem_mm.OhemCrossEntropyLoss"}
    cli.apply_options(cfg, ours)
    assert "sampler-beside-loss" in {one.code for one in Inspector(cfg).findings}
    cli.apply_options(cfg, {"model.decode_head.sampler": cli.parse_value("None")})
    assert "sampler-beside-loss" not in {one.code for one in Inspector(cfg).findings}


def test_pages_that_are_linked_exist():
    for page in [*DOCS.glob("*.md"), DOCS.parent / "README.md"]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
