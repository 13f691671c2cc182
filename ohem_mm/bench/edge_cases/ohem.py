"""The table of edge cases: what each OHEM implementation does where most of them break.

Our loss and mmseg's own classes are run as installed, and nnU-Net's where ``nnunetv2`` is. The
cells of PaddleSeg are on record: ``tests/record_paddleseg.py`` runs its class. The other
implementations, and nnU-Net elsewhere, are run as the restatements of their rules in
``ohem_mm.reference``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ohem_mm import OhemCrossEntropyLoss, reference
from ohem_mm.bench.edge_cases import Case, markdown, tried
from ohem_mm.bench.heads import bare_head, make_samples

RECORD = Path(__file__).with_name("paddleseg.json")
K = 4  # the floor in pixels; cases have 8 valid pixels unless they say otherwise


def cases() -> dict[str, Case]:
    """The ten cases: logits (1, C, 2, 6) and labels (1, 2, 6) with a column of ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 2, 6, generator=generator)
    target = torch.randint(0, 3, (1, 2, 6), generator=generator)
    target[..., 4:] = 255
    one = torch.full_like(target, 255)
    one[0, 0, 0] = target[0, 0, 0]
    labels = torch.where(target == 255, 0, target)
    onehot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)
    easy = onehot * 9.0 + logits * 0.1
    few = target.clone()
    few[0, 1] = 255
    few[0, 0, 3] = 255  # three valid pixels
    broken = logits.clone()
    broken[0, 0, 0, 0] = torch.nan
    binary = target.clamp(max=1) + 254 * (target == 255)
    return {
        "all ignored": Case(logits, torch.full_like(target, 255)),
        "one valid, easy pixel": Case(easy, one),
        "all easy": Case(easy, target),
        "all tied": Case(torch.zeros_like(logits), target, {"thresh": 0.2}),
        "n < k": Case(easy, few),
        "NaN logit": Case(broken, target),
        "out_channels=1": Case(logits[:, :1], binary),
        "class_weight + ignore": Case(logits, target, {"class_weight": [1.0, 2.0, 3.0]}),
        "fp16 saturation": Case((logits.sign() * 60000).half(), target),
        "min_kept=0": Case(logits, target, {"min_kept": 0}),
    }


def ours(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """This package."""
    return OhemCrossEntropyLoss(use_sigmoid=logits.shape[1] == 1, **rule)(logits, target)


def sampler(thresh: bool) -> Callable[..., Any]:
    """mmseg's OHEMPixelSampler and CrossEntropyLoss in a decode head."""

    def call(logits: Tensor, target: Tensor, **rule: Any) -> Any:
        binary = logits.shape[1] == 1
        loss = {"type": "CrossEntropyLoss", "use_sigmoid": binary}
        mining = {"type": "OHEMPixelSampler", "min_kept": rule["min_kept"]}
        head = bare_head(
            2 if binary else 3,
            loss | {"class_weight": rule.get("class_weight")},
            sampler=mining | {"thresh": rule["thresh"] if thresh else None},
            out_channels=1 if binary else 3,
            threshold=0.5 if binary else None,
        )
        losses = head.loss_by_feat(logits, make_samples(target))
        return next(value for key, value in losses.items() if "loss" in key)

    return call


def mmseg_loss(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """mmseg's OhemCrossEntropy."""
    import mmseg.models  # noqa: F401
    from mmseg.registry import MODELS

    rule["thres"] = rule.pop("thresh")
    return MODELS.build({"type": "OhemCrossEntropy", **rule})(logits, target)


def restated(name: str) -> Callable[..., Any]:
    """A rule of ``reference.ORIGINALS``, with the settings that it has."""

    def call(logits: Tensor, target: Tensor, **rule: Any) -> Any:
        if name in ("bisenet", "stdc", "detectron2"):
            rule["min_kept"] = {"bisenet": 1 / 16, "stdc": 1 / 16, "detectron2": 0.2}[name]
        if name == "detectron2":
            del rule["thresh"]
        if "class_weight" in rule:
            if name in ("bisenet", "stdc"):
                raise NotImplementedError("no class_weight")
            rule["class_weight"] = torch.tensor(rule["class_weight"])
        return reference.ORIGINALS[name](logits, target, **rule)

    return call


def nnunet(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """nnU-Net's TopKLoss, or its restatement where ``nnunetv2`` is not installed."""
    weight = rule.get("class_weight")
    weight = None if weight is None else torch.tensor(weight)
    try:
        from nnunetv2.training.loss.robust_ce_loss import TopKLoss
    except ImportError:
        return reference.nnunet(logits, target, class_weight=weight)
    return TopKLoss(weight=weight, ignore_index=255)(logits, target[:, None])


IMPLEMENTATIONS: dict[str, Callable[..., Any] | None] = {
    "**ohem_mm**": ours,
    "mmseg sampler": sampler(thresh=True),
    "mmseg sampler, top-k": sampler(thresh=False),
    "mmseg OhemCrossEntropy": mmseg_loss,
    "HRNet": restated("hrnet"),
    "BiSeNet": restated("bisenet"),
    "TorchSeg": restated("torchseg"),
    "STDC": restated("stdc"),
    "PaddleSeg": None,  # on record
    "detectron2": restated("detectron2"),
    "nnU-Net": nnunet,
}


def cell(implementation: Callable[..., Any], case: Case) -> str:
    """What one implementation does on one case: the loss, and how many pixels are trained."""
    logits, target, more = case
    rule = {"thresh": 0.7, "min_kept": K, **more}

    def describe(loss: Tensor, grad: Tensor) -> str:
        broken = grad.isnan().any(1)
        trained = int(((grad != 0).any(1) & ~broken).sum())
        nan = f", {int(broken.sum())} NaN" if broken.any() else ""
        return f"{loss.item():.3g} ({trained} of {int((target != 255).sum())}{nan})"

    return tried(lambda z: implementation(z, target.clone(), **rule), logits, describe)


def table() -> str:
    """The whole table, in Markdown: a row for each case."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))["cells"]

    def row(name: str, case: Case) -> list[str]:
        calls = IMPLEMENTATIONS.values()
        return [cell(call, case) if call else recorded[name] for call in calls]

    return markdown(IMPLEMENTATIONS, cases(), row)
