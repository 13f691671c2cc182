"""The OHEM rules of other implementations, as settings of ``OhemCrossEntropyLoss``.

Each preset gives the loss and the gradient of its original wherever the original is well defined.
It does not reproduce defects (NaN, exceptions, zeros without a gradient, NaN logits that vanish);
there it follows our own rule, as it does between tied pixels, which share the places left.
``ohem_mm.reference.ORIGINALS`` states every original's rule independently.
"""

from __future__ import annotations

import difflib

from .rule import Habits, OhemRule

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
        habits=Habits(mine_weighted=True),
    ),
    # HRNet, DDRNet, PIDNet and mmseg's OhemCrossEntropy.
    "hrnet": OhemRule(thresh=0.7, min_kept=100_000),
    # CoinCheung's BiSeNet, and STDC, which builds on it.
    "bisenet": OhemRule(thresh=0.7, min_kept=1 / 16),
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
        habits=Habits(ignored_take_slots=True, mine_weighted=True),
    ),
    # nnU-Net's TopKLoss: the hardest 10 % of all voxels, ignored ones counted.
    "nnunet": OhemRule(
        thresh=None,
        min_kept=0.1,
        habits=Habits(ignored_take_slots=True, mine_weighted=True),
    ),
    # The thresholded form with a floor of a sixteenth of the valid pixels.
    "textbook": OhemRule(thresh=0.7, min_kept=1 / 16),
}


def preset_rule(name: str) -> OhemRule:
    """Rule of a preset.

    Args:
        name: A key of ``PRESETS``.

    Returns:
        The rule; ``dataclasses.replace`` makes another of it.

    Raises:
        ValueError: There is no such preset; the message lists them.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, but got {name!r}.{hint}")
    return PRESETS[name]
