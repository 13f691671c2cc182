"""The rules of other implementations, of ``OhemCrossEntropyLoss`` and of ``RegionLoss``.

Each preset gives the loss and the gradient of its original wherever the original is well defined.
It does not reproduce defects (NaN, exceptions, zeros without a gradient, NaN logits that vanish);
there it follows our own rule, as it does between tied pixels, which share the places left.
``ohem_mm.reference.ORIGINALS`` states every original's rule independently.
"""

from __future__ import annotations

import difflib
from typing import TypeVar

from .rule import Habits, OhemRule, RegionHabits, RegionRule

PRESETS: dict[str, OhemRule] = {
    # mmseg's OHEMPixelSampler beside its CrossEntropyLoss: min_kept pixels per image, pooled.
    "mmseg-sampler": OhemRule(
        thresh=0.7,
        min_kept=100_000,
        min_kept_per="image",
        avg="all",
        weighted_mean=True,
    ),
    # The same with thresh=None. It sorts the loss as it is optimised, class weights included.
    "mmseg-sampler-topk": OhemRule(
        thresh=None,
        min_kept=100_000,
        min_kept_per="image",
        avg="all",
        weighted_mean=True,
        habits=Habits(mine_optimised=True),
    ),
    # HRNet, DDRNet, PIDNet and mmseg's OhemCrossEntropy. min_kept=0 means 1 there.
    "hrnet": OhemRule(thresh=0.7, min_kept=100_000, habits=Habits(zero_keeps_one=True)),
    # CoinCheung's BiSeNet.
    "bisenet": OhemRule(thresh=0.7, min_kept=1 / 16),
    # STDC, which builds on it: the floor counts ignored pixels, which are the easiest.
    "stdc": OhemRule(thresh=0.7, min_kept=1 / 16, habits=Habits(ignored_take_slots=True)),
    # TorchSeg and TorchSemiSeg. min_kept=0 turns mining off there.
    "torchseg": OhemRule(
        thresh=0.6,
        min_kept=256,
        weighted_mean=True,
        habits=Habits(zero_keeps_all=True),
    ),
    # PaddleSeg's OhemCrossEntropyLoss: keeps one pixel less than it says, adds 1e-5 to the mean of
    # the mask that it divides by, and min_kept=0 turns mining off.
    "paddleseg": OhemRule(
        thresh=0.7,
        min_kept=10_000,
        habits=Habits(one_less=True, zero_keeps_all=True, eps=1e-5),
    ),
    # detectron2's DeepLabCE: the hardest 20 % of all pixels, ignored ones counted.
    "detectron2": OhemRule(
        thresh=None,
        min_kept=0.2,
        habits=Habits(ignored_take_slots=True, float_share=1, mine_optimised=True),
    ),
    # nnU-Net's TopKLoss: the hardest 10 % of all voxels, ignored ones counted.
    "nnunet": OhemRule(
        thresh=None,
        min_kept=0.1,
        habits=Habits(ignored_take_slots=True, float_share=100, mine_optimised=True),
    ),
    # The thresholded form with a floor of a sixteenth of the valid pixels.
    "textbook": OhemRule(thresh=0.7, min_kept=1 / 16),
}

# Overlap losses. ``docs/region.md`` says where they deviate from their originals.
_ABSENT_ARE_ZERO = RegionHabits(absent_are_zero=True)
REGION_PRESETS: dict[str, RegionRule] = {
    # segmentation_models_pytorch: absent classes pull the mean down; class weights are normalised.
    # A smooth of 1 there is 2 here in Dice, and 1 in the others; the default is 0.
    "smp-dice": RegionRule(weighted_mean=True, habits=_ABSENT_ARE_ZERO),
    "smp-jaccard": RegionRule(kind="jaccard", weighted_mean=True, habits=_ABSENT_ARE_ZERO),
    "smp-tversky": RegionRule(
        kind="tversky",
        alpha=0.5,
        beta=0.5,
        weighted_mean=True,
        habits=RegionHabits(absent_are_zero=True, gamma_of_mean=True),
    ),
    # MONAI's DiceLoss: each image by itself, absent classes too. With its jaccard=True the smooth
    # stands beside twice the intersection.
    "monai-dice": RegionRule(pool="image", classes="all", smooth=1e-5),
    "monai-jaccard": RegionRule(kind="jaccard", pool="image", classes="all", smooth=5e-6),
    # nnU-Net's MemoryEfficientSoftDiceLoss with batch_dice, summed over ranks. For do_bg=False give
    # class_weight=[0, 1, ...]. Its value is this one minus 1.
    "nnunet": RegionRule(pool="world", classes="all", smooth=1e-5, weighted_mean=True),
    # JDTLoss of JDTLosses with its defaults: the Jaccard metric loss over the classes present.
    "jdt": RegionRule(kind="jaccard", smooth=1e-3),
    # mmseg's DiceLoss: all classes of an image in one ratio of squares. Its default is sigmoid.
    "mmseg-dice": RegionRule(
        pool="image",
        classes="all",
        smooth=2e-3,
        squared=True,
        habits=RegionHabits(joint=True, smooth_below=True),
    ),
    # mmseg's TverskyLoss.
    "mmseg-tversky": RegionRule(kind="tversky", pool="image", classes="all", smooth=1.0),
}

_Rule = TypeVar("_Rule")


def preset_rule(name: str) -> OhemRule:
    """Rule of a preset.

    Args:
        name: A key of ``PRESETS``.

    Returns:
        The rule; ``dataclasses.replace`` makes another of it.

    Raises:
        ValueError: There is no such preset; the message lists them.
    """
    return _look_up(PRESETS, name)


def region_preset_rule(name: str) -> RegionRule:
    """Rule of a preset of the region term.

    Args:
        name: A key of ``REGION_PRESETS``.

    Returns:
        The rule.

    Raises:
        ValueError: There is no such preset; the message lists them.
    """
    return _look_up(REGION_PRESETS, name)


def _look_up(presets: dict[str, _Rule], name: str) -> _Rule:
    if name not in presets:
        near = difflib.get_close_matches(str(name), presets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset must be one of {', '.join(presets)}, but got {name!r}.{hint}")
    return presets[name]
