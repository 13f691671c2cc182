"""The loss inside OpenMMLab: registration, naming, and the heads of the installed mmseg."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

mmseg = pytest.importorskip("mmseg")

from mmengine.config import Config, ConfigDict  # noqa: E402
from mmengine.model import revert_sync_batchnorm  # noqa: E402
from mmengine.registry import MODELS as ROOT  # noqa: E402
from mmengine.registry import Registry, init_default_scope  # noqa: E402
from mmengine.structures import PixelData  # noqa: E402
from mmseg.models.decode_heads import DDRHead, FCNHead, PIDHead, PointHead  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.structures import OHEMPixelSampler, SegDataSample  # noqa: E402

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy  # noqa: E402

STOCK = Path(mmseg.__file__).parent / ".mim" / "configs"
OHEM = {"type": "OhemCrossEntropyLoss", "thresh": 0.7, "min_kept": 0.25}
CLASSES = 4


def samples(ignored=False, edges=False):
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(2):
        label = torch.randint(0, CLASSES, (1, 16, 24), generator=generator)
        label[:, :4] = 255
        if ignored:
            label[:] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=label))
        if edges:
            sample.gt_edge_map = PixelData(data=(label == 1).long())
        out.append(sample)
    return out


def features(channels=8, size=(8, 12)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def fcn_head(**kwargs):
    return FCNHead(
        **{
            "in_channels": 8,
            "channels": 8,
            "num_convs": 1,
            "num_classes": CLASSES,
            "dropout_ratio": 0,
            "norm_cfg": {"type": "BN"},
            "loss_decode": OHEM,
            **kwargs,
        }
    )


def backward(losses):
    total = sum(value for name, value in losses.items() if "loss" in name)
    total.backward()
    return total.detach()


def grads(module):
    """Gradients of all parameters; every one exists."""
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert found
    assert all(grad is not None for grad in found.values())
    return found


@pytest.mark.parametrize("scope", ["mmseg", "mmdet", "mmpretrain"])
def test_every_scope_finds_it(scope):
    known = scope in ROOT.children
    registry = ROOT.children[scope] if known else Registry("models", parent=ROOT, scope=scope)
    try:
        assert isinstance(registry.build(OHEM), OhemCrossEntropyLoss)
        dotted = {**OHEM, "type": "ohem_mm.OhemCrossEntropyLoss"}
        assert isinstance(registry.build(dotted), OhemCrossEntropyLoss)
    finally:
        if not known:
            del ROOT.children[scope]


@pytest.mark.parametrize("way", ["custom_imports", "dotted", "cfg-options"])
def test_both_ways_of_naming_it_in_a_stock_config(way, tmp_path):
    """In a new process, where nothing has imported ohem_mm before."""
    stock = STOCK / "pspnet" / "pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py"
    dotted, bare = "ohem_mm.OhemCrossEntropyLoss", "OhemCrossEntropyLoss"
    text = f"_base_ = [{str(stock)!r}]\n"
    options = {}
    if way == "cfg-options":
        options = {
            f"model.{head}.loss_decode.type": dotted for head in ("decode_head", "auxiliary_head")
        }
    else:
        name = dotted if way == "dotted" else bare
        if way == "custom_imports":
            text += "custom_imports = dict(imports=['ohem_mm'], allow_failed_imports=False)\n"
        loss = f"dict(type={name!r}, thresh=0.9, _delete_=True)"
        text += (
            f"model = dict(decode_head=dict(loss_decode={loss}),\n"
            f"             auxiliary_head=dict(loss_decode={loss}))\n"
        )
    config = tmp_path / "config.py"
    config.write_text(text)
    code = f"""
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmseg.registry import MODELS
import mmseg.models
config = Config.fromfile({str(config)!r})
config.merge_from_dict({options!r})
init_default_scope('mmseg')
config.model.pretrained = None
with torch.device('meta'):
    model = MODELS.build(config.model)
for head in (model.decode_head, model.auxiliary_head):
    print(type(head.loss_decode).__module__, type(head.loss_decode).__name__,
          head.loss_decode.thresh, head.loss_decode.loss_weight)
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    thresh = 0.7 if way == "cfg-options" else 0.9
    aux_weight = 0.4 if way == "cfg-options" else 1.0
    assert result.stdout.splitlines()[-2:] == [
        f"ohem_mm.loss OhemCrossEntropyLoss {thresh} 1.0",
        f"ohem_mm.loss OhemCrossEntropyLoss {thresh} {aux_weight}",
    ]


def test_decode_head_trains_on_the_kept_pixels():
    head, data = fcn_head(), samples()
    x = features()
    losses = head.loss([x], data, None)
    target = torch.stack([sample.gt_sem_seg.data for sample in data])
    expected = ohem_cross_entropy(head.forward([x]), target, thresh=0.7, min_kept=0.25)
    torch.testing.assert_close(losses["loss_ohem"], expected)
    backward(losses)
    assert any(grad.abs().sum() > 0 for grad in grads(head).values())


def test_head_ignore_index_is_used_and_the_config_wins():
    data = samples()
    for sample in data:
        sample.gt_sem_seg.data[sample.gt_sem_seg.data == 255] = 3
    x = features()
    head = fcn_head(ignore_index=3)
    loss = head.loss([x], data, None)["loss_ohem"]
    other = fcn_head(ignore_index=255, loss_decode={**OHEM, "ignore_index": 3})
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other.loss([x], data, None)["loss_ohem"], loss)
    counted = fcn_head(ignore_index=255)
    counted.load_state_dict(head.state_dict())
    assert counted.loss([x], data, None)["loss_ohem"] != loss


@pytest.mark.parametrize("thresh", [None, 0.7])
def test_beside_a_pixel_sampler(thresh):
    head = fcn_head(sampler={"type": "OHEMPixelSampler", "thresh": thresh, "min_kept": 20})
    assert isinstance(head.sampler, OHEMPixelSampler)
    loss = backward(head.loss([features()], samples(), None))
    assert loss > 0
    assert loss.isfinite()
    grads(head)


def test_in_a_list_beside_dice():
    head = fcn_head(loss_decode=[OHEM, {"type": "DiceLoss", "loss_weight": 3.0}])
    losses = head.loss([features()], samples(), None)
    assert {"loss_ohem", "loss_dice"} <= set(losses)
    assert backward(losses).isfinite()


def test_same_name_twice_is_added():
    head = fcn_head(loss_decode=[OHEM, {**OHEM, "loss_weight": 0.5}])
    x, data = features(), samples()
    single = fcn_head()
    single.load_state_dict(head.state_dict())
    expected = 1.5 * single.loss([x], data, None)["loss_ohem"]
    torch.testing.assert_close(head.loss([x], data, None)["loss_ohem"], expected)


def test_pid_head_beside_boundary():
    head = PIDHead(
        in_channels=16,
        channels=8,
        num_classes=CLASSES,
        loss_decode=[
            {"type": "CrossEntropyLoss", "loss_weight": 0.4},
            OHEM,
            {"type": "BoundaryLoss", "loss_weight": 20.0},
            {"type": "ohem_mm.OhemCrossEntropyLoss", "class_weight": [1.0, 2.0, 1.0, 3.0]},
        ],
    )
    inputs = (features(8), features(16), features(8))
    losses = head.loss(inputs, samples(edges=True), None)
    assert {"loss_sem_p", "loss_sem_i", "loss_bd", "loss_sem_bd"} <= set(losses)
    assert backward(losses).isfinite()
    assert any(grad.abs().sum() > 0 for grad in grads(head).values())


def test_ddr_head():
    head = DDRHead(in_channels=16, channels=8, num_classes=CLASSES, loss_decode=[OHEM, OHEM])
    losses = head.loss((features(8), features(16)), samples(), None)
    assert {"loss_context", "loss_spatial"} <= set(losses)
    assert backward(losses).isfinite()
    grads(head)


def test_point_head():
    def build():
        return PointHead(
            in_channels=[8],
            in_index=[0],
            channels=8,
            num_fcs=1,
            num_classes=CLASSES,
            dropout_ratio=-1,
            loss_decode=OHEM,
        )

    try:
        head = build()
    except RuntimeError as error:
        assert "point_sample" in str(error)  # noqa: PT017
        pytest.skip("the installed mmcv has no point_sample, which PointHead needs")
    # Its points are sampled by a compiled operator; the labels at them are what the loss sees.
    logits = torch.randn(2, CLASSES, 50, requires_grad=True)
    labels = torch.randint(0, CLASSES, (2, 50))
    head.loss_decode(logits, labels, ignore_index=head.ignore_index).backward()
    assert logits.grad.abs().sum() > 0


def test_all_ignored_batch_has_zero_gradients_everywhere():
    head = fcn_head()
    assert backward(head.loss([features()], samples(ignored=True), None)) == 0
    assert all((grad == 0).all() for grad in grads(head).values())


def test_stock_model_trains_from_its_config():
    """Fast-SCNN, three heads, in a stock config with only the type replaced."""
    config = Config.fromfile(STOCK / "fastscnn" / "fast_scnn_8xb4-160k_cityscapes-512x1024.py")
    heads = [config.model.decode_head, *config.model.auxiliary_head]
    for head in heads:
        head.loss_decode = ConfigDict(
            type="ohem_mm.OhemCrossEntropyLoss", loss_weight=head.loss_decode.loss_weight
        )
    init_default_scope("mmseg")
    model = revert_sync_batchnorm(MODELS.build(config.model)).train()
    data = []
    for _ in range(2):
        label = torch.randint(0, 19, (1, 64, 96))
        data.append(SegDataSample(gt_sem_seg=PixelData(data=label)))
    losses = model.loss(torch.randn(2, 3, 64, 96), data)
    assert {"decode.loss_ohem", "aux_0.loss_ohem", "aux_1.loss_ohem"} <= set(losses)
    assert backward(losses).isfinite()
    grads(model)
