"""What is mined of an image, and of each class, as numpy arrays."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..loss import OhemCrossEntropyLoss

UInt8 = npt.NDArray[np.uint8]


class MainLoss(NamedTuple):
    """The loss whose mining is shown, the module name of its head, and the label it ignores."""

    name: str
    loss: OhemCrossEntropyLoss
    ignore_index: int


@dataclass(frozen=True)
class MinedImage:
    """One image, RGB of shape (H, W, 3), and what is mined of it: maps of shape (H, W).

    ``loss`` is unweighted, ``valid`` is where the label is not ignored, and ``kept`` is the weight
    of each pixel in training, in [0, 1].
    """

    name: str
    image: UInt8
    label: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.float32]

    @classmethod
    def of(cls, name: str, image: UInt8, *maps: Tensor) -> MinedImage:
        """The image with its maps, in the order of the fields, given as tensors."""
        dtypes = (torch.long, torch.long, torch.float32, torch.bool, torch.float32)
        typed = (values.detach().to("cpu", d) for values, d in zip(maps, dtypes, strict=True))
        return cls(name, image, *(values.numpy() for values in typed))

    @property
    def mean_loss(self) -> float:
        """Mean loss of the valid pixels; 0 where there are none."""
        return float(self.loss[self.valid].mean()) if self.valid.any() else 0.0

    @property
    def kept_share(self) -> float:
        """Share of the valid pixels that is mined; 0 where there are none."""
        return float(self.kept.sum() / max(1, self.valid.sum()))


class ClassCounts:
    """Valid pixels of each class, and mined ones by weight, summed over images."""

    def __init__(self, num_classes: int) -> None:
        self.pixels = np.zeros(num_classes, np.int64)
        self.mined = np.zeros(num_classes)

    def add(self, shot: MinedImage) -> ClassCounts:
        """Count the pixels of one image."""
        label, kept, size = shot.label[shot.valid], shot.kept[shot.valid], len(self.pixels)
        self.pixels += np.bincount(label, minlength=size)
        self.mined += np.bincount(label, weights=kept, minlength=size)
        return self

    @property
    def pixel_share(self) -> npt.NDArray[np.float64]:
        """Share of the valid pixels that each class has."""
        return np.asarray(self.pixels / max(1, self.pixels.sum()))

    @property
    def mined_share(self) -> npt.NDArray[np.float64]:
        """Share of the mined pixels that each class has."""
        return np.asarray(self.mined / max(1, self.mined.sum()))

    @property
    def mined_of_class(self) -> npt.NDArray[np.float64]:
        """Share of each class that is mined; NaN for a class without pixels."""
        return self.mined / np.where(self.pixels > 0, self.pixels, np.nan)


def main_loss(model: nn.Module) -> MainLoss | None:
    """The first loss that mines of the last decode head that has one; else of another head."""
    heads: dict[str, OhemCrossEntropyLoss] = {}
    for name, module in model.named_modules():
        if isinstance(module, OhemCrossEntropyLoss):
            heads.setdefault(name.partition(".loss_decode")[0], module)
    if not heads:
        return None
    name = ([name for name in heads if name.startswith("decode_head")] or list(heads))[-1]
    ignored = heads[name].ignore_index
    if ignored is None:
        ignored = getattr(model.get_submodule(name), "ignore_index", 255)
    return MainLoss(name, heads[name], ignored)


def mine_sample(
    sample: Any, inputs: Tensor, name: str, main: MainLoss, batch_size: int = 1
) -> MinedImage:
    """Mine one test image as the loss would, by its own settings.

    Args:
        sample: What a segmentor of mmseg returns for the image.
        inputs: The image as the pipeline packs it: BGR, shape (3, h, w).
        name: What to call the image.
        main: The loss.
        batch_size: That of the training; see :func:`for_one_image`.

    Raises:
        ValueError: The label map has another size than the logits, or holds an unknown label.
    """
    logits = sample.seg_logits.data.float()
    if len(logits) == 1:
        logits = logits.logit()  # mmseg returns probabilities where there is one channel
    target = sample.gt_sem_seg.data[0].to(logits.device).long()
    stats: dict[str, Any] = {"kept": None}
    loss = for_one_image(main.loss, batch_size)
    with torch.no_grad():
        loss(logits[None], target[None], ignore_index=main.ignore_index, stats=stats)
    maps = (target, sample.pred_sem_seg.data[0], *(stats[k][0] for k in ("mined", "valid", "kept")))
    return MinedImage.of(name, to_rgb(inputs, target.shape), *maps)


def for_one_image(loss: OhemCrossEntropyLoss, batch_size: int) -> OhemCrossEntropyLoss:
    """A copy, with the same parameters, that mines a single image, or each class of it.

    A ``min_kept`` that counts pixels of a batch is divided by the batch size, rounded up.
    """
    loss = copy.copy(loss)
    rule = loss.rule
    per_image = rule.pool == "image" or (rule.min_kept_per == "image" and rule.pool != "class")
    if isinstance(rule.min_kept, int) and not per_image:
        rule = replace(rule, min_kept=-(-rule.min_kept // batch_size))
    loss.rule = rule if rule.pool == "class" else replace(rule, pool="image")
    return loss


def predicted(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Class with the highest logit, (C, h, w), at each pixel of labels of a height and width."""
    wide = nn.functional.interpolate(
        logits[None].float(), tuple(size), mode="bilinear", align_corners=align_corners
    )[0]
    return (wide[0] > 0).long() if len(wide) == 1 else wide.argmax(0)


def to_rgb(inputs: Tensor, size: Sequence[int], pad: bool = False) -> UInt8:
    """A packed image of mmseg, BGR or grey of shape (channels, h, w), as a picture.

    It is resized to ``size``, (height, width), or padded as a preprocessor does in training.
    """
    image = inputs.detach().float().clamp(0, 255).byte().cpu().permute(1, 2, 0).numpy()
    image = np.repeat(image[..., :1], 3, 2) if image.shape[2] < 3 else image[..., 2::-1]
    height, width = size
    if pad and image.shape[0] <= height and image.shape[1] <= width:
        below, right = height - image.shape[0], width - image.shape[1]
        return np.pad(image, ((0, below), (0, right), (0, 0)))
    picture: UInt8 = resize(np.ascontiguousarray(image), width, height)
    return picture


def resize(array: npt.NDArray[Any], width: int, height: int, as_p: bool = False) -> Any:
    """Enlarge by repeating, reduce by averaging; label maps and masks take the nearest pixel."""
    kind = array.dtype
    if as_p:
        array = 1 - np.exp(-array)
    elif kind == np.bool_:
        array = array.astype(np.uint8)
    shrink = width < array.shape[1] and kind not in (np.bool_, np.int32)
    how = cv2.INTER_AREA if shrink else cv2.INTER_NEAREST
    return cv2.resize(array, (width, height), interpolation=how).astype(kind)
