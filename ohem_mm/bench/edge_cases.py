"""The table of edge cases: what each OHEM implementation does where most of them break.

Our loss and mmseg's own classes are run as installed. The other implementations are run as the
restatements of their rules in ``ohem_mm.reference``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ohem_mm import OhemCrossEntropyLoss, reference
from ohem_mm.bench.heads import bare_head, make_samples

Case = dict[str, Any]
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
    return {
        "all ignored": {"logits": logits, "target": torch.full_like(target, 255)},
        "one valid, easy pixel": {"logits": easy, "target": one},
        "all easy": {"logits": easy, "target": target},
        "all tied": {"logits": torch.zeros_like(logits), "target": target, "thresh": 0.2},
        "n < k": {"logits": easy, "target": few},
        "NaN logit": {"logits": broken, "target": target},
        "out_channels=1": {
            "logits": logits[:, :1],
            "target": target.clamp(max=1) + 254 * (target == 255),
        },
        "class_weight + ignore": {
            "logits": logits,
            "target": target,
            "class_weight": [1.0, 2.0, 3.0],
        },
        "fp16 saturation": {"logits": (logits.sign() * 60000).half(), "target": target},
        "min_kept=0": {"logits": logits, "target": target, "min_kept": 0},
    }


def ours(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """This package."""
    return OhemCrossEntropyLoss(use_sigmoid=logits.shape[1] == 1, **rule)(logits, target)


def sampler(thresh: bool) -> Callable[..., Any]:
    """mmseg's OHEMPixelSampler and CrossEntropyLoss in a decode head."""

    def call(logits: Tensor, target: Tensor, **rule: Any) -> Any:
        binary = logits.shape[1] == 1
        head = bare_head(
            2 if binary else 3,
            {
                "type": "CrossEntropyLoss",
                "use_sigmoid": binary,
                "class_weight": rule.get("class_weight"),
            },
            sampler={
                "type": "OHEMPixelSampler",
                "thresh": rule["thresh"] if thresh else None,
                "min_kept": rule["min_kept"],
            },
            out_channels=1 if binary else 3,
            threshold=0.5 if binary else None,
        )
        losses = head.loss_by_feat(logits, make_samples(target))
        return next(value for key, value in losses.items() if "loss" in key)

    return call


def mmseg_loss(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """mmseg's OhemCrossEntropy."""
    from mmseg.registry import MODELS

    rule["thres"] = rule.pop("thresh")
    return MODELS.build({"type": "OhemCrossEntropy", **rule})(logits, target)


def restated(name: str) -> Callable[..., Any]:
    """A rule of ``reference.ORIGINALS``, with the settings that it has."""

    def call(logits: Tensor, target: Tensor, **rule: Any) -> Any:
        if name in ("bisenet", "detectron2", "nnunet"):
            rule["min_kept"] = {"bisenet": 1 / 16, "detectron2": 0.2, "nnunet": 0.1}[name]
        if name in ("detectron2", "nnunet"):
            del rule["thresh"]
        if "class_weight" in rule:
            if name in ("bisenet", "paddleseg"):
                raise NotImplementedError("no class_weight")
            rule["class_weight"] = torch.tensor(rule["class_weight"])
        return reference.ORIGINALS[name](logits, target, **rule)

    return call


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "**ohem_mm**": ours,
    "mmseg sampler": sampler(thresh=True),
    "mmseg sampler, top-k": sampler(thresh=False),
    "mmseg OhemCrossEntropy": mmseg_loss,
    "HRNet": restated("hrnet"),
    "BiSeNet": restated("bisenet"),
    "TorchSeg": restated("torchseg"),
    "PaddleSeg": restated("paddleseg"),
    "detectron2": restated("detectron2"),
    "nnU-Net": restated("nnunet"),
}


def cell(implementation: Callable[..., Any], case: Case) -> str:
    """Run one implementation on one case and say what came out."""
    rule: dict[str, Any] = {"thresh": 0.7, "min_kept": K, **case}
    logits = rule.pop("logits").clone().requires_grad_()
    target = rule.pop("target")
    try:
        loss = implementation(logits, target.clone(), **rule)
        if not loss.requires_grad:
            return f"{loss.item():.2g}, no gradient"
        loss.backward()
    except NotImplementedError as error:
        return str(error)
    except Exception as error:
        return f"raises {type(error).__name__}"
    trained = int((logits.grad != 0).any(1).sum()) if logits.grad is not None else 0
    valid = int((target != 255).sum())
    return f"{loss.item():.3g} ({trained} of {valid})"


def table() -> str:
    """The whole table, in Markdown: a row for each case."""
    rows = [["", *IMPLEMENTATIONS], ["---"] * (len(IMPLEMENTATIONS) + 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in cases().items():
            rows.append([name, *(cell(call, case) for call in IMPLEMENTATIONS.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
