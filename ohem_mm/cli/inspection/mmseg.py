"""What is known of mmseg's own OHEM and of its heads."""

from __future__ import annotations

from typing import Any

from ohem_mm import cli

MMSEG, SAMPLER = "OhemCrossEntropy", "OHEMPixelSampler"
# Heads that call the losses of a list by place and hide the ignored label from those places.
BY_PLACE = {"DDRHead": (2, (0, 1)), "PIDHead": (4, (1, 3))}
_MASKS = ("classifies masks, not pixels", "keep the losses that it is made for")
# Heads that do not classify pixels by a loss of their own: what they are, and what to do instead.
OTHER_HEADS = {
    "IterativeDecodeHead": (
        "has no loss of its own",
        "set loss_decode of its kernel_generate_head",
    ),
    **dict.fromkeys(("MaskFormerHead", "Mask2FormerHead", "SideAdapterCLIPHead"), _MASKS),
    "VPDDepthHead": ("predicts depth, not classes", "keep the loss that it is made for"),
}


def asks_sampler(head: type) -> bool:
    """Whether the loss of a class of heads looks at the sampler, by the names in its code."""
    for base in head.__mro__:
        if method := vars(base).get("loss_by_feat"):
            names = method.__code__.co_names
            if "sampler" in names or "super" not in names:
                return "sampler" in names
    return False


def problem_of_loss(loss: Any, thresh: float | None, min_kept: Any) -> str:
    """What is wrong with an OhemCrossEntropy in any head: a sentence without its subject, or ''."""
    own = ("ignore_label", "thres", "min_kept", "loss_weight", "class_weight", "loss_name")
    if unknown := _unknown_setting(loss, own):
        return unknown
    if thresh is None:
        return "stops at the first batch when thres=None, although it is documented"
    if not 0 < thresh <= 1:
        return f"has thres={thresh!r}, which is no probability"
    if not isinstance(min_kept, int):
        return f"has min_kept={min_kept!r}, which is no number of pixels"
    return (
        "cannot read class_weight from a file" if isinstance(loss.get("class_weight"), str) else ""
    )


def problem_of_sampler(sampler: Any, losses: list[str], channels: int | None) -> str:
    """The same of an OHEMPixelSampler beside these losses, in a head of so many channels."""
    thresh, min_kept = sampler.get("thresh"), sampler.get("min_kept", 100_000)
    if unknown := _unknown_setting(sampler, ("thresh", "min_kept")):
        return unknown
    if not isinstance(min_kept, int) or min_kept < 2:
        return f"refuses min_kept={min_kept!r}: it takes an int of 2 pixels or more"
    if thresh is not None and not 0 < thresh <= 1:
        return f"has thresh={thresh!r}, which is no probability"
    if thresh is not None and channels == 1:
        return "with a thresh stops at the first batch when the head has one channel"
    return "beside DiceLoss stops at the first batch" if "DiceLoss" in losses else ""


def _unknown_setting(node: Any, names: tuple[str, ...]) -> str:
    unknown = [key for key in cli.settings_of(node) if key not in names]
    return f"has no setting {unknown[0]!r}; it has {', '.join(names)}" if unknown else ""
