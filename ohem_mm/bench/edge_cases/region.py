"""The table of edge cases: what each overlap loss does where most of them break.

Ours and those of other packages are run as installed; what is not installed is named and left out.
JDTLosses, which no registry has, is run as it is restated in ``ohem_mm.reference``. The others need
``pip install --no-deps segmentation-models-pytorch monai nnunetv2``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ohem_mm import RegionLoss, reference
from ohem_mm.bench.edge_cases import Case, markdown, tried
from ohem_mm.bench.peers import submodule

Loss = Callable[[Tensor, Tensor], Any]


def cases() -> dict[str, Case]:
    """The cases: three classes; with ``other``, the change is shown that those logits make."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, 6, generator=generator)
    target = torch.randint(0, 3, (1, 4, 6), generator=generator)
    target[..., 4:] = 255
    labels = torch.where(target == 255, 0, target)
    one = torch.full_like(target, 255)
    one[0, 0, 0] = 1
    two = torch.where(target == 2, 1, target)
    void = logits.clone()
    void[..., 4:] *= -5
    at_ignored, at_valid = logits.clone(), logits.clone()
    at_ignored[0, 0, 0, 5] = torch.nan
    at_valid[0, 0, 0, 0] = torch.nan
    perfect = F.one_hot(labels, 3).movedim(-1, 1) * 200.0 - 100
    big = torch.randn(1, 3, 400, 400, generator=generator)
    classes = torch.randint(0, 3, (1, 400, 400), generator=generator)
    return {
        "all classes present": Case(logits, target),
        "a class in no pixel": Case(logits, two),
        "perfect prediction": Case(perfect, target),
        "perfect, a class in no pixel": Case(
            F.one_hot(torch.where(two == 255, 0, two), 3).movedim(-1, 1) * 200.0 - 100, two
        ),
        "one valid pixel": Case(logits, one),
        "all ignored": Case(logits, torch.full_like(target, 255)),
        "other logits at ignored pixels": Case(logits, target, {"other": void}),
        "NaN at an ignored pixel": Case(at_ignored, target),
        "NaN at a valid pixel": Case(at_valid, target),
        "uint8 labels": Case(logits, target.to(torch.uint8)),
        "out_channels=1": Case(logits[:, :1], torch.where(target == 255, 255, target % 2)),
        "half precision, 400x400": Case(big.half(), classes),
    }


def ours(logits: Tensor, target: Tensor, **rule: Any) -> Any:
    """This package, with settings."""
    return RegionLoss(use_sigmoid=logits.shape[1] == 1, **rule)(logits, target)


def smp(logits: Tensor, target: Tensor) -> Any:
    """DiceLoss of segmentation_models_pytorch."""
    kind = submodule("segmentation_models_pytorch", "losses").DiceLoss
    mode = "binary" if logits.shape[1] == 1 else "multiclass"
    return kind(mode, ignore_index=255)(logits, target)


def monai(logits: Tensor, target: Tensor) -> Any:
    """DiceLoss of MONAI over the batch."""
    kind, one = importlib.import_module("monai.losses").DiceLoss, logits.shape[1] == 1
    loss = kind(softmax=not one, sigmoid=one, to_onehot_y=not one, batch=True, ignore_index=255)
    return loss(logits, target[:, None])


def nnunet(logits: Tensor, target: Tensor) -> Any:
    """MemoryEfficientSoftDiceLoss of nnU-Net, with batch_dice and a mask, plus 1."""
    kind = submodule("nnunetv2", "training.loss.dice").MemoryEfficientSoftDiceLoss
    one = logits.shape[1] == 1
    apply = torch.sigmoid if one else lambda z: z.softmax(1)
    keep = (target != 255)[:, None]
    labels = torch.where(keep, target[:, None], 0)
    loss = kind(apply, batch_dice=True, smooth=1e-5, ddp=False)
    return 1 + loss(logits, labels.float() if one else labels, loss_mask=keep)


def mmseg(name: str, **settings: Any) -> Loss:
    """A loss of mmseg."""

    def call(logits: Tensor, target: Tensor) -> Any:
        losses = importlib.import_module("mmseg.models.losses")
        more = {"use_sigmoid": logits.shape[1] == 1} if name == "DiceLoss" else {}
        return getattr(losses, name)(**settings, **more)(logits, target)

    return call


IMPLEMENTATIONS: dict[str, Loss] = {
    "**ohem_mm**": ours,
    "**ohem_mm**, all, smooth 1": partial(ours, classes="all", smooth=1.0),
    "smp DiceLoss": smp,
    "MONAI DiceLoss": monai,
    "nnU-Net": nnunet,
    "JDTLosses (restated)": reference.REGION_ORIGINALS["jdt"],
    "mmseg DiceLoss": mmseg("DiceLoss"),
    "mmseg TverskyLoss": mmseg("TverskyLoss"),
    "mmseg LovaszLoss": mmseg("LovaszLoss", reduction="none", per_image=False),
}


def cell(loss: Loss, case: Case) -> str:
    """What one implementation does on one case: the loss, and what is odd about the gradient."""

    def describe(value: Tensor, grad: Tensor) -> str:
        if "other" in case.more:
            change = (loss(case.more["other"], case.target.clone()) - value).item()
            return "no change" if abs(change) < 1e-6 else f"{change:+.3f}"
        odd = "" if grad.any() else ", gradient 0"
        return f"{value.item():.3g}{odd if grad.isfinite().all() else ', NaN gradient'}"

    return tried(lambda z: loss(z, case.target.clone()), case.logits, describe)


def table() -> str:
    """The whole table, in Markdown: a row for each case, and what is missing."""
    losses, missing = {}, ""
    logits, target, _ = cases()["all classes present"]
    for name, loss in IMPLEMENTATIONS.items():
        try:
            loss(logits, target.clone())
            losses[name] = loss
        except ImportError as error:
            missing += f"\n\nNot installed: {name}: {error}"

    def row(_: str, case: Case) -> list[str]:
        return [cell(loss, case) for loss in losses.values()]

    return markdown(losses, cases(), row) + missing
