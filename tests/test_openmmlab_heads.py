"""Every decode head of the installed mmseg that trains on semantic labels, with this loss.

``UNABLE`` is the table of the heads that cannot be trained with it here, and why.
"""

import pytest
import torch

pytest.importorskip("mmseg")

import mmseg.models  # noqa: F401
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

import ohem_mm  # noqa: F401

BN = {"norm_cfg": {"type": "BN"}, "channels": 8, "dropout_ratio": 0}
ONE = {"in_channels": 8, **BN}
PYRAMID = {"in_channels": [8, 8, 8, 8], "in_index": [0, 1, 2, 3], **BN}

# Head: its own settings. Inputs are made from `in_channels` and `in_index` unless INPUTS says.
HEADS = {
    "ANNHead": {
        **BN,
        "in_channels": [8, 8],
        "in_index": [2, 3],
        "project_channels": 8,
        "dropout_ratio": 0.1,  # it calls its dropout without asking whether it has one
    },
    "APCHead": {**ONE, "pool_scales": (1, 2)},
    "ASPPHead": {**ONE, "dilations": (1, 2)},
    "CCHead": ONE,
    "DAHead": {**ONE, "pam_channels": 4},
    "DDRHead": {**ONE, "in_channels": 16},
    "DMHead": {**ONE, "filter_sizes": (1, 3)},
    "DNLHead": ONE,
    "DPTHead": {
        **PYRAMID,
        "input_transform": "multiple_select",
        "embed_dims": 8,
        "post_process_channels": [8, 8, 8, 8],
        "patch_size": 4,
    },
    "DepthwiseSeparableASPPHead": {
        **ONE,
        "dilations": (1, 2),
        "c1_in_channels": 8,
        "c1_channels": 4,
        "in_index": 3,
    },
    "DepthwiseSeparableFCNHead": ONE,
    "EMAHead": {**ONE, "ema_channels": 8, "num_bases": 4, "num_stages": 1},
    "EncHead": {**BN, "in_channels": [8, 8], "in_index": [2, 3], "num_codes": 4},
    "FCNHead": {**ONE, "num_convs": 1},
    "FPNHead": {**PYRAMID, "feature_strides": [4, 8, 16, 32]},
    "GCHead": ONE,
    "ISAHead": {**ONE, "isa_channels": 4, "down_factor": (2, 2)},
    "IterativeDecodeHead": {
        "num_stages": 1,
        "kernel_update_head": [
            {
                "type": "KernelUpdateHead",
                "num_heads": 2,
                "num_mask_fcs": 1,
                "feedforward_channels": 8,
                "in_channels": 8,
                "out_channels": 8,
                "kernel_updator_cfg": {
                    "type": "KernelUpdator",
                    "in_channels": 8,
                    "feat_channels": 8,
                    "out_channels": 8,
                },
            }
        ],
    },
    "LRASPPHead": {
        **BN,
        "in_channels": [8, 8, 8],
        "in_index": [0, 1, 2],
        "input_transform": "multiple_select",
        "branch_channels": (4, 4),
    },
    "LightHamHead": {
        **PYRAMID,
        "ham_channels": 8,
        "ham_kwargs": {"MD_R": 2},
        "norm_cfg": {"type": "GN", "num_groups": 2},
    },
    "NLHead": ONE,
    "OCRHead": {**ONE, "ocr_channels": 4},
    "PIDHead": {**ONE, "in_channels": 16},
    "PSPHead": {**ONE, "pool_scales": (1, 2)},
    "PointHead": {**BN, "in_channels": [8], "in_index": [0], "num_fcs": 1, "dropout_ratio": -1},
    "SETRMLAHead": {
        **PYRAMID,
        "channels": 16,
        "mla_channels": 4,
        "up_scale": 2,
    },
    "SETRUPHead": {**ONE, "num_convs": 1, "up_scale": 2},
    "STDCHead": {**ONE, "num_convs": 1},
    "SegformerHead": PYRAMID,
    "SegmenterMaskTransformerHead": {
        "in_channels": 8,
        "channels": 8,
        "num_layers": 1,
        "num_heads": 2,
        "embed_dims": 8,
        "dropout_ratio": 0.0,
    },
    "UPerHead": {**PYRAMID, "pool_scales": (1, 2)},
}
UNABLE = {
    "KernelUpdator": "a layer of K-Net, not a head",
    "KernelUpdateHead": "a stage inside IterativeDecodeHead, which computes the loss",
    "MaskFormerHead": "classifies masks, has no per-pixel loss; needs mmdet",
    "Mask2FormerHead": "classifies masks, has no per-pixel loss; needs mmdet",
    "SideAdapterCLIPHead": "classifies masks; accepts mmseg's CrossEntropyLoss and DiceLoss only",
    "VPDDepthHead": "estimates depth, has no classes",
    "PSAHead": "its PSAMask is a compiled operator",
}
NEEDS_COMPILED_OPERATORS = {"PointHead", "CCHead"}
# STDCHead makes its own two-class labels from boundaries; one channel is how it is used.
BINARY_ONLY = {"STDCHead"}
# Its mask tokens are the classes: with one channel there is no class to tell from another.
SOFTMAX_ONLY = {"SegmenterMaskTransformerHead": "embeds num_classes mask tokens, never one channel"}


def test_every_head_of_mmseg_is_in_one_of_the_tables():
    installed = {
        name for name, cls in MODELS.module_dict.items() if "decode_heads" in cls.__module__
    }
    assert installed == set(HEADS) | set(UNABLE)


def run(name, num_classes, sigmoid):
    torch.manual_seed(0)
    init_default_scope("mmseg")
    loss = {"type": "OhemCrossEntropyLoss", "min_kept": 0.25, "use_sigmoid": sigmoid}
    losses = loss
    if name == "PIDHead":
        losses = [loss, loss, {"type": "BoundaryLoss"}, loss]
    elif name == "DDRHead":
        losses = [loss, loss]
    outputs = {"num_classes": num_classes, "loss_decode": losses}
    if sigmoid:
        outputs |= {"out_channels": 1, "threshold": 0.5}
    settings = {"type": name, **HEADS[name]}
    if name == "IterativeDecodeHead":
        generate = {"type": "FCNHead", **ONE, "num_convs": 1, **outputs}
        settings["kernel_generate_head"] = generate
        settings["kernel_update_head"] = [
            {**stage, "num_classes": outputs.get("out_channels", num_classes)}
            for stage in settings["kernel_update_head"]
        ]
    else:
        settings |= outputs
    try:
        head = MODELS.build(settings).train()
    except (RuntimeError, ImportError, AssertionError) as error:
        if name in NEEDS_COMPILED_OPERATORS and "mmcv" in str(error):
            pytest.skip(f"{name} needs mmcv's compiled operators")
        raise

    data = []
    for _ in range(2):
        label = torch.randint(0, num_classes, (1, 32, 32))
        label[:, :5] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=label))
        sample.gt_edge_map = PixelData(data=(label == 1).long())
        data.append(sample)
    channels = outputs.get("out_channels", num_classes)
    maps = [torch.randn(2, 8, size, size, requires_grad=True) for size in (16, 8, 8, 8)]
    if name == "DPTHead":
        maps = [(torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 8)) for _ in range(4)]
    elif name == "LRASPPHead":  # pools over 49 x 49
        maps = [torch.randn(2, 8, 50, 50, requires_grad=True) for _ in range(3)]
    elif name == "SETRMLAHead":
        maps = [torch.randn(2, 8, 8, 8, requires_grad=True) for _ in range(4)]
    elif name == "FPNHead":
        maps = [torch.randn(2, 8, 16 // 2**i, 16 // 2**i, requires_grad=True) for i in range(4)]
    inputs = maps
    extra = ()
    if name == "DDRHead":
        inputs = (maps[1], torch.randn(2, 16, 8, 8, requires_grad=True))
    elif name == "PIDHead":
        inputs = (maps[1], torch.randn(2, 16, 8, 8, requires_grad=True), maps[2])
    elif name in ("OCRHead", "PointHead"):
        extra = (torch.randn(2, channels, 8, 8),)  # the output of the head before it
    if name == "PointHead":
        # Its points are sampled by a compiled operator; what the loss sees is (N, C, points).
        logits = torch.randn(2, channels, 40, requires_grad=True)
        points = torch.randint(0, num_classes, (2, 40))
        values = {"point" + head.loss_decode.loss_name: head.loss_decode(logits, points)}
        trained = [logits]
    else:
        values = head.loss(inputs, *extra, data, None)
        trained = [
            p for key, p in head.named_parameters() if p.requires_grad and "conv_seg" not in key
        ]
    total = sum(value for key, value in values.items() if "loss" in key)
    total.backward()
    assert any("ohem" in key or key.startswith(("loss_sem", "loss_context")) for key in values)
    assert total.isfinite()
    assert total > 0
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


@pytest.mark.parametrize("name", sorted(set(HEADS) - BINARY_ONLY))
def test_softmax(name):
    run(name, num_classes=3, sigmoid=False)


@pytest.mark.parametrize("name", sorted(set(HEADS) - set(SOFTMAX_ONLY)))
def test_one_channel_sigmoid(name):
    run(name, num_classes=2, sigmoid=True)
