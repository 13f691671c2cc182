"""A small model of the quickstart, and a checkpoint of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OPTIONS = [
    *("train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"),
    *("train_dataloader.batch_size=2", "train_dataloader.dataset.num_scenes=12"),
    *("val_dataloader.dataset.num_scenes=6", "model.backbone.base_channels=4"),
    *("model.decode_head.in_channels=4", "model.decode_head.channels=4"),
]


def tiny(name):
    """A shipped config with fewer channels, and its model."""
    cfg = Config.fromfile(config_path(name))
    cfg.merge_from_dict(dict(option.split("=") for option in OPTIONS[-3:]))
    for key in ("backbone.base_channels", "decode_head.in_channels", "decode_head.channels"):
        part, setting = key.split(".")
        cfg.model[part][setting] = int(cfg.model[part][setting])
    init_default_scope("mmseg")
    torch.manual_seed(3)
    return cfg, MODELS.build(cfg.model)


def save_checkpoint(folder):
    """Random weights, scaled so that probabilities spread over (0, 1), with some statistics."""
    _, model = tiny(CE)
    model.train()
    for _ in range(3):
        model.extract_feat(torch.randn(2, 3, 96, 192))
    nn.init.normal_(model.decode_head.conv_seg.weight, std=0.7)
    path = folder / "tiny.pth"
    torch.save({"state_dict": model.state_dict(), "meta": {}}, path)
    return path
