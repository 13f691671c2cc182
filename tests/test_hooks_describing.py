"""What the log says at its start of each head."""

import pytest

pytest.importorskip("mmengine")

from torch import nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss
from ohem_mm.hooks.describing import describe


def head(*losses, **attributes):
    module = nn.Module()
    module.loss_decode = losses[0] if len(losses) == 1 else nn.ModuleList(losses)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_says_what_each_head_does():
    class OhemCrossEntropy(nn.Module):
        pass

    class OHEMPixelSampler:
        pass

    ours = OhemCrossEntropyLoss
    model = nn.ModuleDict(
        {
            "decode_head": head(ours(0.6, 0.1), ignore_index=7),
            "image": head(ours(None, 500, pool="image", ignore_index=3, class_weight=[1, 2])),
            "per": head(ours(0.6, 500, min_kept_per="image", always_keep=[1], avg="valid")),
            "off": head(ours(0.6, 1.0)),
            "plain": head(nn.CrossEntropyLoss(), sampler=OHEMPixelSampler()),
            "two": head(OhemCrossEntropy(), ours(0.6, 0, pool="class")),
            "overlap": head(
                ours(None, 1.0),
                RegionLoss("tversky", gamma=2, pool="world", class_weight=[1, 2], loss_weight=0.5),
            ),
            "dice": head(RegionLoss(pool="image", classes="all", smooth=1)),
            "criterion": ours(0.6, 0.5, pool="class"),
        }
    )
    lines = dict(line.split(": ", 1) for line in describe(model))
    assert lines["decode_head (Module)"] == (
        "mines: keeps pixels whose true class has a probability below 0.6, at least 10 % of the "
        "valid pixels of the batch, averages over the kept pixels, ignore_index 7 (of the head), "
        "no class weights"
    )
    assert lines["image (Module)"] == (
        "mines: keeps the hardest 500 pixels of each image, averages over the kept pixels, "
        "ignore_index 3, class weights [1.0, 2.0]"
    )
    assert (
        "at least 500 pixels for each image of the batch, always keeps the classes [1]"
        in (lines["per (Module)"])
    )
    assert "averages over the valid pixels" in lines["per (Module)"]
    assert "keeps every valid pixel as long as min_kept=1.0" in lines["off (Module)"]
    assert lines["plain (Module)"] == (
        "does not mine (CrossEntropyLoss); its OHEMPixelSampler drops pixels too and is not "
        "monitored"
    )
    assert lines["two (Module)"].startswith(
        "loss 0 mines with mmseg's OhemCrossEntropy, which is not monitored; loss 1 mines: keeps "
        "pixels whose true class has a probability below 0.6, averages"
    )
    assert lines["overlap (Module)"].endswith(
        "; loss 1 asks for overlap: tversky over the batches of all ranks (alpha 0.3, beta 0.7), "
        "classes present, gamma 2, loss_weight 0.5, class weights [1.0, 2.0]"
    )
    assert lines["dice (Module)"] == (
        "asks for overlap: dice over each image, all classes, smooth 1, no class weights"
    )
    assert "50 % of the valid pixels of each class" in lines["criterion"]
    assert len(lines) == 9
    assert describe(nn.Identity()) == ["the model has no loss that mines"]
