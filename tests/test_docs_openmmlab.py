"""docs/openmmlab.md: its blocks, on the stock configs of mmdet and mmpretrain, and mim.

Skipped where a package is missing, or cannot load mmcv's operators; ``nox -s siblings`` has them.
"""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import InstanceData, PixelData

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "openmmlab.md").read_text(encoding="utf-8")
BLOCKS = dict(
    re.findall(r"<!-- config: ([\w/.-]+) -->\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)


def package(name):
    """The package, with its models imported; skips the test where it is missing, and may be."""
    try:
        return importlib.import_module(f"{name}.models") and importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        if os.environ.get("OHEM_MM_REQUIRE"):
            raise
        pytest.skip(f"{name} does not load here: {error}")


def build(name, config, tmp_path, **options):
    """The model of a stock config of the package with the block of the page on top."""
    root = Path(package(name).__file__).parent
    path = tmp_path / "config.py"
    stock = root / ".mim" / "configs" / config
    path.write_text(f"_base_ = [{str(stock)!r}]\n{BLOCKS[config]}", encoding="utf-8")
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(options)
    init_default_scope(name)
    torch.manual_seed(0)
    registry = importlib.import_module(f"{name}.registry")
    return registry.MODELS.build(cfg.model).train()


def train(parameters, step, rate, steps=4):
    """The losses of a few steps of SGD."""
    optimizer = torch.optim.SGD(parameters, lr=rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step()
        loss.backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture
def calls(monkeypatch):
    """How the loss is called, and what it gives."""
    seen = []
    forward = OhemCrossEntropyLoss.forward

    def record(self, *args, **kwargs):
        loss = forward(self, *args, **kwargs)
        seen.append((args, kwargs, loss.detach()))
        return loss

    monkeypatch.setattr(OhemCrossEntropyLoss, "forward", record)
    return seen


SMALL = {"model.backbone.init_cfg": None, "model.backbone.frozen_stages": -1}


def test_every_block_is_tested():
    assert [Path(config).parts[0] for config in BLOCKS] == [
        *("panoptic_fpn", "faster_rcnn", "retinanet", "resnet")
    ]


def test_panoptic_fpn(tmp_path, calls):
    config = "panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py"
    model = build("mmdet", config, tmp_path, **SMALL)
    from mmdet.structures import DetDataSample

    head = model.semantic_head
    assert isinstance(head.loss_seg, OhemCrossEntropyLoss)
    labels = torch.randint(0, 133, (2, 1, 64, 64))
    labels[:, :, :8] = 255
    samples = [DetDataSample(gt_sem_seg=PixelData(sem_seg=label)) for label in labels]
    images = torch.randn(2, 3, 64, 64)
    parameters = [*model.backbone.parameters(), *model.neck.parameters(), *head.parameters()]

    def step():
        return head.loss(model.extract_feat(images), samples)["loss_seg"]

    losses = train(parameters, step, 0.01)
    assert losses[-1] < losses[0]
    (logits, target), _, value = calls[0]
    assert logits.shape == (2 * 16 * 16, 54)
    assert (target == 255).sum() == 2 * 2 * 16  # mmdet leaves the ignored pixels as they are
    torch.testing.assert_close(value, 0.5 * ohem_cross_entropy(logits.detach(), target))


def test_box_head(tmp_path, calls):
    config = "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"
    head = build("mmdet", config, tmp_path, **SMALL).roi_head.bbox_head
    assert isinstance(head.loss_cls, OhemCrossEntropyLoss)
    boxes = 32
    features = torch.randn(boxes, 256, 7, 7)
    labels = torch.where(torch.rand(boxes) < 0.25, torch.randint(0, 80, (boxes,)), 80)
    weights = torch.ones(boxes)
    weights[::8] = 0
    rois = torch.rand(boxes, 5)

    def step():
        scores, deltas = head(features)
        targets = torch.zeros(boxes, 4)
        losses = head.loss(scores, deltas, rois, labels, weights, targets, targets)
        return losses["loss_cls"] + losses["loss_bbox"]

    train(list(head.parameters()), step, 0.01)
    (logits, target, weight), kwargs, value = calls[0]
    assert logits.shape == (boxes, 81)
    assert kwargs == {"avg_factor": 28.0, "reduction_override": None}
    # The four hardest, divided by the number of boxes with a weight, as mmdet asks.
    each = torch.nn.functional.cross_entropy(logits.detach(), target, reduction="none")
    hardest = each.topk(boxes // 8).indices
    torch.testing.assert_close(value, (each * weight)[hardest].sum() / 28)
    assert calls[-1][-1] < value


def test_retinanet(tmp_path, calls):
    config = "retinanet/retinanet_r18_fpn_1x_coco.py"
    model = build("mmdet", config, tmp_path, **SMALL)
    from mmdet.structures import DetDataSample

    samples = []
    for _ in range(2):
        boxes = torch.tensor([[4.0, 4.0, 50.0, 60.0], [30.0, 10.0, 90.0, 80.0]])
        sample = DetDataSample(metainfo={"img_shape": (96, 96), "pad_shape": (96, 96)})
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([3, 70]))
        samples.append(sample)
    images = torch.randn(2, 3, 96, 96)

    def step():
        losses = model.loss(images, samples)
        return sum(map(sum, losses.values()))

    losses = train([p for p in model.parameters() if p.requires_grad], step, 0.005)
    assert losses[-1] < losses[0]
    assert len(calls) == 4 * 5  # levels
    (logits, target, weight), kwargs, _ = calls[0]
    assert logits.shape[1] == 81
    assert target.shape == weight.shape == logits.shape[:1]
    assert set(kwargs) == {"avg_factor"}


def test_linear_head(tmp_path, calls):
    config = "resnet/resnet18_8xb16_cifar10.py"
    model = build("mmpretrain", config, tmp_path)
    from mmpretrain.structures import DataSample

    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    samples = [DataSample().set_gt_label(label) for label in labels]
    losses = train(
        list(model.parameters()), lambda: model.loss(images, samples)["loss"], 0.01, steps=6
    )
    assert losses[-1] < losses[0]
    (logits, target), kwargs, value = calls[0]
    assert logits.shape == (16, 10)
    assert kwargs == {"avg_factor": 16}
    expected = ohem_cross_entropy(logits.detach(), target, min_kept=1 / 4, avg_factor=16)
    torch.testing.assert_close(value, expected)
    # Soft labels, which mixup makes, are refused by name.
    soft = [DataSample().set_gt_score(torch.full((10,), 0.1)) for _ in labels]
    with pytest.raises(TypeError, match="integer class indices"):
        model.loss(images, soft)


CONFIG = ROOT / "configs" / "quickstart" / "unet-tiny_1xb4-ohem-1k_scenes-96x192.py"
SHORT = ["--cfg-options", "train_cfg.max_iters=2", "train_cfg.val_interval=100"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "onedl-mmsegmentation", str(CONFIG), "--gpus", "0"],
        ["run", "onedl-mmsegmentation", "train", str(CONFIG)],
    ],
    ids=lambda command: command[0],
)
def test_mim(tmp_path, command):
    if not os.environ.get("OHEM_MM_REQUIRE"):
        pytest.importorskip("mim")
    command = ["-m", "mim", *command, "--work-dir", str(tmp_path), *SHORT]
    result = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "iter_2.pth").is_file()
    state = torch.load(tmp_path / "iter_2.pth", map_location="cpu", weights_only=False)
    assert not any("loss" in key for key in state["state_dict"])
    assert np.isfinite(sum(float(value.sum()) for value in state["state_dict"].values()))
