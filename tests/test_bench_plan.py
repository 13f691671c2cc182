"""Plans: what is due, and what is told before anything runs."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmarks import CE, LR, TOOL, arguments, tuned
from PIL import Image

pytest.importorskip("mmseg")

from ohem_mm import cli
from ohem_mm.bench import files, jobs
from ohem_mm.bench.plan import Plan
from ohem_mm.bench.records import read_records
from ohem_mm.config import config_path

pytestmark = pytest.mark.usefixtures("elsewhere")

SAME = "{split: val, num_scenes: 2, size: [48, 48]}"


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            [("avg: all", f"avg: all, {LR}: 0.1")],
            {},
            f"variant 'weak' .*cfg_options has {LR}, which tune sets",
        ),
        ([], {"cfg_options": {LR: 0.5}}, f"--cfg-options {LR}: tune sets this key"),
        ([(LR, "optim_wrapper.optimiser.lr")], {}, "optim"),
        (
            [(f"key: {LR}, values", "key: model.nothing, scales")],
            {},
            "tune: the config has no model.nothing to scale",
        ),
        (
            [(f"key: {LR}, values", "key: model.type, scales")],
            {},
            "model.type is 'EncoderDecoder' in the config; scales need a number",
        ),
        (
            [
                ("val_dataloader: &two", "test_dataloader: &two"),
                ("test_dataloader: *two", "val_dataloader: null"),
            ],
            {},
            "has no val_dataloader",
        ),
        (
            [("test_dataloader: *two", f"test_dataloader: {{dataset: {SAME}}}")],
            {},
            "have the same images; .* or say split: test in tune",
        ),
        ([], {"at": 0.5}, "--at 0.5: the values of tune are 0.001, 0.01, 0.1"),
    ],
)
def test_a_tune_that_does_not_fit_is_told_before_anything_runs(changes, given, message):
    with pytest.raises(cli.UserError, match=message):
        Plan(tuned(*changes), arguments(**given), Path("work"))


PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"


@pytest.fixture
def cracks():
    """The files of the page, and a small data set like the one that it speaks of."""
    for name, text in re.findall(
        r"<!-- test: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL
    ):
        Path(name).write_text(text.replace("configs/quickstart", str(config_path(CE).parent)))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        images, labels = (Path("data/cracks", kind, split) for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for i in range(count):
            image = rng.integers(100, 200, (48, 64, 3), dtype=np.uint8)
            label = np.zeros((48, 64), np.uint8)
            column = rng.integers(0, 62)
            image[:, column : column + 2] //= 3
            label[:, column : column + 2] = 1
            label[:2] = 255
            Image.fromarray(image).save(images / f"{i}.jpg")
            Image.fromarray(label).save(labels / f"{i}.png")
    assert len(Path("cracks.yaml").read_text().splitlines()) <= 13
    return files.load_benchmark("cracks.yaml")


def test_the_benchmark_of_the_docs_fits_a_data_set_of_two_classes(cracks):
    plan = Plan(cracks, arguments(), Path("work"))
    assert len(plan.due([])) == 8
    assert plan.total([]) == 12
    cfg = plan.job("ours", 0.01, 0).cfg
    assert cfg.model.decode_head.loss_decode.to_dict() == {"type": "OhemCrossEntropyLoss"}
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.train_dataloader.dataset.type == "BaseSegDataset"
    shares = jobs.class_shares(cfg, Path("shares.json"))
    # Two columns of 64.
    assert shares == pytest.approx([31 / 32, 1 / 32], abs=1e-6)


@pytest.mark.slow
def test_the_benchmark_of_the_docs_runs(cracks):
    command = [sys.executable, str(TOOL), "run", "cracks.yaml", "--seeds", "0", "--cfg-options"]
    command += ["train_cfg.max_iters=52", "train_cfg.val_interval=52", "param_scheduler.1.end=52"]
    command += ["model.data_preprocessor.size=(48,64)", "train_dataloader.batch_size=2"]
    command += ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(read_records(Path("cracks.jsonl"))) == 8
    assert "| plain CE | 0.0" in result.stdout
    assert "lr of each variant, chosen by the val mIoU after training (seed 0" in result.stdout
