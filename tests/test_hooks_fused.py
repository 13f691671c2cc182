"""FusedOhemHook: the same numbers as without it, and a log that says what it did."""

import pytest
import torch
import trainings

pytest.importorskip("mmseg")

import mmseg.models  # noqa: F401
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from ohem_mm.hooks.fused import fuse_heads

OHEM = {"type": "OhemCrossEntropyLoss", "thresh": 0.6, "min_kept": 0.2}
REGION = {"type": "RegionLoss"}
CE = {"type": "CrossEntropyLoss"}
BASE = {"num_classes": 4, "channels": 8, "dropout_ratio": 0, "norm_cfg": {"type": "BN"}}
FCN = {"type": "FCNHead", "in_channels": 8, "num_convs": 1, **BASE}


def build(**settings):
    torch.manual_seed(0)
    init_default_scope("mmseg")
    return MODELS.build(settings).train()


def samples():
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(2):
        label = torch.randint(0, 4, (1, 30, 33), generator=generator)
        label[:, :5] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=label))
        sample.gt_edge_map = PixelData(data=(label == 1).long())
        out.append(sample)
    return out


def small(channels=8, size=(8, 9)):
    return torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(1))


def step(head, inputs, *extra):
    head.zero_grad()
    losses = head.loss(inputs, *extra, samples(), None)
    sum(value for key, value in losses.items() if "loss" in key).backward()
    grads = {key: p.grad.clone() for key, p in head.named_parameters() if p.grad is not None}
    return {key: value.detach() for key, value in losses.items()}, grads


PID_LOSSES = [OHEM, OHEM, {"type": "BoundaryLoss"}, OHEM]
FUSED = {
    "plain": ({**FCN, "loss_decode": OHEM}, [small()], ()),
    "align_corners": ({**FCN, "loss_decode": OHEM, "align_corners": True}, [small()], ()),
    "two losses": (
        {**FCN, "loss_decode": [OHEM, {**OHEM, "pool": "class", "loss_name": "loss_class"}]},
        [small()],
        (),
    ),
    "OHEM and region": ({**FCN, "loss_decode": [OHEM, REGION]}, [small()], ()),
    "plain cross-entropy and region": (
        {
            **FCN,
            "loss_decode": [
                {**OHEM, "thresh": None, "min_kept": 1.0, "loss_weight": 0.25},
                {**REGION, "kind": "jaccard", "pool": "image", "loss_weight": 0.75},
            ],
        },
        [small()],
        (),
    ),
    "region alone": ({**FCN, "loss_decode": REGION, "align_corners": True}, [small()], ()),
    "one name twice": ({**FCN, "loss_decode": [OHEM, {**OHEM, "loss_weight": 0.3}]}, [small()], ()),
    "logits of the size of the labels": ({**FCN, "loss_decode": OHEM}, [small(8, (30, 33))], ()),
    "logits larger than the labels": ({**FCN, "loss_decode": OHEM}, [small(8, (40, 44))], ()),
    "one sigmoid channel": (
        {
            **FCN,
            "num_classes": 2,
            "out_channels": 1,
            "threshold": 0.5,
            "ignore_index": 2,
            "loss_decode": {**OHEM, "use_sigmoid": True, "class_weight": [1.0, 3.0]},
        },
        [small()],
        (),
    ),
    "cascade": (
        {"type": "OCRHead", "in_channels": 8, "ocr_channels": 4, **BASE, "loss_decode": OHEM},
        [small()],
        (small(4),),
    ),
    "DDRHead": (
        {"type": "DDRHead", **BASE, "in_channels": 16, "loss_decode": [OHEM, OHEM]},
        (small(8), small(16)),
        (),
    ),
    "PIDHead": (
        {"type": "PIDHead", **BASE, "in_channels": 16, "loss_decode": PID_LOSSES},
        (small(8), small(16), small(8)),
        (),
    ),
    "PIDHead with CE": (
        {"type": "PIDHead", **BASE, "in_channels": 16, "loss_decode": [CE, *PID_LOSSES[1:]]},
        (small(8), small(16), small(8)),
        (),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_same_losses_accuracy_and_gradients(name, monkeypatch):
    settings, inputs, extra = FUSED[name]
    if name == "one sigmoid channel":
        # Labels 0 and 1, and 2 for ignored.
        binary = [s.gt_sem_seg.data.clamp(max=2) % 3 for s in samples()]
        data = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in binary]
        for sample in data:
            sample.gt_sem_seg.data[sample.gt_sem_seg.data > 2] = 2
        monkeypatch.setitem(globals(), "samples", lambda: data)
    head = build(**settings)
    keys = list(head.state_dict())
    expected, expected_grads = step(head, inputs, *extra)
    fused = []
    report = fuse_heads(nn.ModuleDict({"head": head}), fused)
    assert fused == [head]
    assert [line.startswith("fused") for _, line in report] == [True]
    assert list(head.state_dict()) == keys
    losses, grads = step(head, inputs, *extra)
    assert set(losses) == set(expected)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    assert losses["acc_seg"].shape == expected["acc_seg"].shape
    torch.testing.assert_close(losses["acc_seg"], expected["acc_seg"], rtol=1e-6, atol=0)


LEFT_ALONE = {
    "CrossEntropyLoss needs": {**FCN, "loss_decode": CE},
    "DiceLoss needs": {**FCN, "loss_decode": [OHEM, {"type": "DiceLoss"}]},
    "logits; OhemCrossEntropyLoss with thresh=None, min_kept=1.0 does not": {
        **FCN,
        "loss_decode": [CE, REGION],
    },
    "head's ignore_index, 255, and the loss": {
        **FCN,
        "loss_decode": [OHEM, {**REGION, "ignore_index": 3}],
    },
    "OHEMPixelSampler needs": {
        **FCN,
        "loss_decode": OHEM,
        "sampler": {"type": "OHEMPixelSampler", "thresh": 0.7},
    },
    "head's ignore_index, 255, and the loss its own, 3": {
        **FCN,
        "loss_decode": {**OHEM, "ignore_index": 3},
    },
    "VPDDepthHead computes": {
        "type": "VPDDepthHead",
        "in_channels": [16, 16, 16, 16],
        "embed_dim": 4,
        "feature_dim": 32,
        "num_deconv_filters": (32, 32, 32),
        "loss_decode": OHEM,
    },
    "STDCHead computes": {**FCN, "type": "STDCHead", "loss_decode": OHEM},
    "losses 1 and 3": {
        "type": "PIDHead",
        **BASE,
        "in_channels": 16,
        "loss_decode": [OHEM, OHEM, {"type": "BoundaryLoss"}, {"type": "OhemCrossEntropy"}],
    },
}


@pytest.mark.parametrize("reason", LEFT_ALONE)
def test_heads_that_are_left_alone(reason):
    head = build(**LEFT_ALONE[reason])
    fused = []
    ((title, line),) = fuse_heads(nn.ModuleDict({"head": head}), fused)
    assert title == f"head ({type(head).__name__})"
    assert line.startswith("left alone: ")
    assert reason in line
    assert not fused
    assert "loss_by_feat" not in vars(head)


def test_knet_is_fused_where_its_loss_is():
    update = {
        "type": "KernelUpdateHead",
        "num_classes": 4,
        "num_ffn_fcs": 2,
        "num_heads": 2,
        "num_mask_fcs": 1,
        "feedforward_channels": 16,
        "in_channels": 8,
        "out_channels": 8,
        "dropout": 0.0,
        "ffn_act_cfg": {"type": "ReLU"},
        "kernel_updator_cfg": {
            "type": "KernelUpdator",
            "in_channels": 8,
            "feat_channels": 8,
            "out_channels": 8,
            "act_cfg": {"type": "ReLU"},
            "norm_cfg": {"type": "LN"},
        },
    }
    head = build(
        type="IterativeDecodeHead",
        num_stages=1,
        kernel_generate_head={**FCN, "loss_decode": OHEM},
        kernel_update_head=[update],
    )
    expected, expected_grads = step(head, [small()])
    fused = []
    report = dict(fuse_heads(nn.ModuleDict({"head": head}), fused))
    assert report == {
        "head (IterativeDecodeHead)": "left alone: it has no loss of its own",
        "head.kernel_generate_head (FCNHead)": "fused",
    }
    losses, grads = step(head, [small()])
    assert {"loss_ohem.s0", "loss_ohem.s1"} <= set(losses)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-4, atol=1e-6)


def train(work_dir, hooks):
    # Small steps: with larger ones, or AdamW, rounding decides about a pixel and runs part.
    sgd = {"_delete_": True, "type": "SGD", "lr": 0.01, "momentum": 0.9}
    sizes = {
        "train_cfg.max_iters": 20,
        "train_dataloader.dataset.num_scenes": 40,
        "train_dataloader.dataset.size": (48, 96),
        "model.data_preprocessor.size": (48, 96),
    }
    runner = trainings.train(work_dir, hooks, **sizes, **{"optim_wrapper.optimizer": sgd})
    values = (trainings.history(runner, key) for key in ("loss", "decode.acc_seg"))
    return runner, *map(torch.tensor, values)


def test_training_agrees_step_by_step(tmp_path):
    runner, losses, accuracy = train(tmp_path / "plain", [])
    assert not vars(runner.model.decode_head).get("loss_by_feat")
    fused_runner, fused_losses, fused_accuracy = train(
        tmp_path / "fused", [{"type": "FusedOhemHook"}]
    )
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    torch.testing.assert_close(fused_losses, losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fused_accuracy, accuracy, rtol=0, atol=0.05)  # per cent
    # Restored, and the checkpoint has the same keys.
    assert "loss_by_feat" not in vars(fused_runner.model.decode_head)
    assert set(fused_runner.model.state_dict()) == set(runner.model.state_dict())
    (log,) = (tmp_path / "fused").rglob("*.log")
    assert "FusedOhemHook: decode_head (FCNHead): fused" in log.read_text()
