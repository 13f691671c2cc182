"""What each head of a model does, in words."""

from __future__ import annotations

from torch import nn

from ..loss import OhemCrossEntropyLoss
from ..region import RegionLoss
from ._losses import heads_of, named_losses

_POOLS = {
    "batch": "the batch",
    "image": "each image",
    "class": "each class",
    "world": "the batches of all ranks",
}


def describe(model: nn.Module) -> list[str]:
    """Say of every head of a model whether it mines, and with what settings; one line each."""
    lines = []
    told: set[int] = set()
    for name, head, losses in heads_of(model):
        told |= {id(loss) for loss in losses}
        words = [_describe_loss(loss, getattr(head, "ignore_index", None)) for loss in losses]
        if len(words) > 1:
            words = [f"loss {place} {text}" for place, text in enumerate(words)]
        sampler = getattr(head, "sampler", None)
        if sampler is not None:
            words.append(f"its {type(sampler).__name__} drops pixels too and is not monitored")
        lines.append(f"{name} ({type(head).__name__}): {'; '.join(words)}")
    lines += [
        f"{name}: {_describe_loss(loss, None)}"
        for name, loss in named_losses(model, OhemCrossEntropyLoss).items()
        if id(loss) not in told
    ]
    return lines or ["the model has no loss that mines"]


def _describe_loss(loss: nn.Module, head_ignores: int | None) -> str:
    if isinstance(loss, RegionLoss):
        return _describe_region(loss)
    if type(loss).__name__ == "OhemCrossEntropy":
        return "mines with mmseg's OhemCrossEntropy, which is not monitored"
    if not isinstance(loss, OhemCrossEntropyLoss):
        return f"does not mine ({type(loss).__name__})"
    rule, ignored = loss.rule, loss.ignore_index
    floor = f"{rule.min_kept} pixels of {_POOLS[rule.pool]}"
    if isinstance(rule.min_kept, float):
        floor = f"{100 * rule.min_kept:.4g} % of the valid pixels of {_POOLS[rule.pool]}"
    elif rule.min_kept_per == "image" and rule.pool in ("batch", "world"):
        floor = f"{rule.min_kept} pixels for each image of {_POOLS[rule.pool]}"
    if rule.keeps_all:
        kept = f"every valid pixel as long as min_kept={rule.min_kept}"
    elif rule.thresh is None:
        kept = f"the hardest {floor}"
    else:
        kept = f"pixels whose true class has a probability below {rule.thresh}"
        kept += f", at least {floor}" if rule.min_kept else ""
    words = [f"mines: keeps {kept}"]
    if rule.always_keep:
        words.append(f"always keeps the classes {list(rule.always_keep)}")
    words.append(f"averages over the {rule.avg} pixels")
    by_head = f"{255 if head_ignores is None else head_ignores} (of the head)"
    words.append(f"ignore_index {by_head if ignored is None else ignored}")
    return ", ".join([*words, _weights(loss)])


def _describe_region(loss: RegionLoss) -> str:
    rule, default = loss.rule, RegionLoss()
    words = [f"asks for overlap: {rule.kind} over {_POOLS[rule.pool]}"]
    if rule.kind == "tversky":
        words[0] += f" (alpha {rule.alpha:g}, beta {rule.beta:g})"
    words.append("all classes" if rule.classes == "all" else "classes present")
    for name in ("gamma", "smooth", "label_smoothing", "loss_weight"):
        if getattr(loss, name) != getattr(default, name):
            words.append(f"{name} {getattr(loss, name):g}")
    return ", ".join([*words, _weights(loss)])


def _weights(loss: OhemCrossEntropyLoss | RegionLoss) -> str:
    weights = loss.class_weight
    return "no class weights" if weights is None else f"class weights {weights.tolist()}"
