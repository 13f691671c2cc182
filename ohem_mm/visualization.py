"""Pictures of what is mined: image, ground truth, prediction, loss and mined pixels side by side.

``OhemVisualizationHook`` and ``tools/show_hard_pixels.py`` draw with these functions. They need
numpy, OpenCV and matplotlib, which mmengine brings along; matplotlib is loaded when a board is
drawn.
"""

from __future__ import annotations

import copy
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .loss import OhemCrossEntropyLoss

__all__ = [
    "ClassCounts",
    "MainLoss",
    "MinedImage",
    "board",
    "class_colours",
    "for_one_image",
    "loss_colours",
    "main_loss",
    "mine_sample",
    "panels",
    "predicted",
    "to_rgb",
]

UInt8 = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

MINED = (255, 190, 0)  # bright amber on dark grey: told apart by brightness alone
_STRIPES = ((96, 96, 96), (136, 136, 136))
_LABEL, _PREDICTION, _MINED = "ground truth", "prediction", "mined pixels"
# Small images are enlarged to about _GOOD pixels a side, large ones reduced to _WIDE.
_GOOD, _WIDE = 480, 800


class MainLoss(NamedTuple):
    """The loss whose mining is shown.

    Attributes:
        name: Module name of its head.
        loss: The loss.
        ignore_index: Label of pixels that do not count for it.
    """

    name: str
    loss: OhemCrossEntropyLoss
    ignore_index: int


@dataclass(frozen=True)
class MinedImage:
    """One image and what is mined of it.

    Attributes:
        name: What it is called in titles.
        image: The photograph, RGB, uint8, shape (H, W, 3).
        label: Ground truth, int64, shape (H, W).
        prediction: Predicted class, int64, shape (H, W).
        loss: Unweighted loss of each pixel, float32, shape (H, W).
        valid: Bool, shape (H, W): pixels that are not ignored.
        kept: Weight of each pixel in training, in [0, 1], shape (H, W).
    """

    name: str
    image: UInt8
    label: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float32]
    valid: Mask
    kept: npt.NDArray[np.float32]

    @property
    def mean_loss(self) -> float:
        """Mean loss of the valid pixels; 0 where there are none."""
        return float(self.loss[self.valid].mean()) if self.valid.any() else 0.0

    @property
    def kept_share(self) -> float:
        """Share of the valid pixels that is mined; 0 where there are none."""
        return float(self.kept.sum() / max(1, self.valid.sum()))


class ClassCounts:
    """Pixels and mined pixels of each class, summed over images.

    Args:
        num_classes: Number of classes, C.

    Attributes:
        pixels: Valid pixels of each class, int64, shape (C,).
        mined: Mined pixels of each class, by weight, float64, shape (C,).
    """

    def __init__(self, num_classes: int) -> None:
        self.pixels = np.zeros(num_classes, np.int64)
        self.mined = np.zeros(num_classes)

    def add(self, shot: MinedImage) -> ClassCounts:
        """Count the pixels of one image."""
        size = len(self.pixels)
        self.pixels += np.bincount(shot.label[shot.valid], minlength=size)
        self.mined += np.bincount(
            shot.label[shot.valid], weights=shot.kept[shot.valid], minlength=size
        )
        return self

    @property
    def pixel_share(self) -> npt.NDArray[np.float64]:
        """Share of the valid pixels that each class has, shape (C,)."""
        return np.asarray(self.pixels / max(1, self.pixels.sum()))

    @property
    def mined_share(self) -> npt.NDArray[np.float64]:
        """Share of the mined pixels that each class has, shape (C,)."""
        return np.asarray(self.mined / max(1, self.mined.sum()))

    @property
    def mined_of_class(self) -> npt.NDArray[np.float64]:
        """Share of each class that is mined, shape (C,); NaN for a class without pixels."""
        return self.mined / np.where(self.pixels > 0, self.pixels, np.nan)


# --- what is mined ---------------------------------------------------------------------------


def main_loss(model: nn.Module) -> MainLoss | None:
    """Find the loss behind the model's prediction.

    Args:
        model: A segmentor.

    Returns:
        The first :class:`ohem_mm.OhemCrossEntropyLoss` of the last decode head that has one; of
        another head where no decode head has one; None where there is none at all.
    """
    heads: dict[str, OhemCrossEntropyLoss] = {}
    for name, module in model.named_modules():
        if isinstance(module, OhemCrossEntropyLoss):
            heads.setdefault(name.partition(".loss_decode")[0], module)
    if not heads:
        return None
    name = ([name for name in heads if name.startswith("decode_head")] or list(heads))[-1]
    loss = heads[name]
    ignore_index = loss.ignore_index
    if ignore_index is None:
        ignore_index = getattr(model.get_submodule(name), "ignore_index", 255)
    return MainLoss(name, loss, ignore_index)


def mine_sample(
    sample: Any, inputs: Tensor, name: str, main: MainLoss, batch_size: int = 1
) -> MinedImage:
    """Mine one test image as the loss would, by its own settings.

    The image is a pool of its own. A floor that counts pixels of a batch is divided by the batch
    size; every other setting is used as it is.

    Args:
        sample: What a segmentor of mmseg returns for the image: ``seg_logits``, ``pred_sem_seg``
            and ``gt_sem_seg`` of the same height and width.
        inputs: The image as the pipeline packs it: BGR, shape (3, h, w).
        name: What to call the image.
        main: The loss.
        batch_size: Batch size of the training.

    Returns:
        The image, at the size of its labels.

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
    return MinedImage(
        name,
        to_rgb(inputs, target.shape),
        *(
            array.cpu().numpy()
            for array in (
                target,
                sample.pred_sem_seg.data[0].long(),
                stats["mined"][0].float(),
                stats["valid"][0],
                stats["kept"][0].float(),
            )
        ),
    )


def for_one_image(loss: OhemCrossEntropyLoss, batch_size: int) -> OhemCrossEntropyLoss:
    """Make a copy of a loss that mines a single image.

    Args:
        loss: The loss. Its parameters and buffers are shared.
        batch_size: Batch size of the training. A ``min_kept`` that counts pixels of a batch is
            divided by it, rounded up.

    Returns:
        The copy; its pool is the image, or each class of it.
    """
    loss = copy.copy(loss)
    rule = loss.rule
    per_image = rule.pool == "image" or (rule.min_kept_per == "image" and rule.pool != "class")
    if isinstance(rule.min_kept, int) and not per_image:
        rule = replace(rule, min_kept=-(-rule.min_kept // batch_size))
    loss.rule = rule if rule.pool == "class" else replace(rule, pool="image")
    return loss


def predicted(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Class with the highest logit at each pixel of the labels.

    Args:
        logits: Raw scores of one image, shape (C, h, w); C=1 is one sigmoid channel.
        size: Height and width of the labels.
        align_corners: As in ``torch.nn.functional.interpolate``.

    Returns:
        int64, shape (height, width).
    """
    wide = nn.functional.interpolate(
        logits[None].float(), tuple(size), mode="bilinear", align_corners=align_corners
    )[0]
    return (wide[0] > 0).long() if len(wide) == 1 else wide.argmax(0)


def to_rgb(inputs: Tensor, size: Sequence[int], pad: bool = False) -> UInt8:
    """A packed image of mmseg as a picture.

    Args:
        inputs: BGR or grey, values 0 to 255, shape (channels, h, w).
        size: Height and width wanted.
        pad: Reach the size by padding at the bottom and right, as a preprocessor does in training,
            instead of by resizing.

    Returns:
        RGB, uint8, shape (height, width, 3).
    """
    image = inputs.detach().float().clamp(0, 255).byte().cpu().permute(1, 2, 0).numpy()
    image = np.repeat(image[..., :1], 3, 2) if image.shape[2] < 3 else image[..., 2::-1]
    height, width = size
    if pad and image.shape[0] <= height and image.shape[1] <= width:
        below, right = height - image.shape[0], width - image.shape[1]
        return np.pad(image, ((0, below), (0, right), (0, 0)))
    picture: UInt8 = _resize(np.ascontiguousarray(image), width, height)
    return picture


# --- panels ----------------------------------------------------------------------------------


def class_colours(meta: Mapping[str, Any], num_classes: int) -> tuple[list[str], UInt8]:
    """Names and colours of the classes.

    Args:
        meta: ``metainfo`` of a data set; ``classes`` and ``palette`` may be missing.
        num_classes: Number of classes, C.

    Returns:
        C names, and RGB colours as uint8 of shape (C, 3).
    """
    names = [str(name) for name in meta.get("classes") or ()][:num_classes]
    names += [f"class {index}" for index in range(len(names), num_classes)]
    palette = np.array(meta.get("palette") or np.zeros((0, 3)), np.uint8)[:num_classes]
    # Hues a third of the circle apart, in three brightnesses, for classes without a colour.
    index = np.arange(len(palette), num_classes)
    hsv = np.stack([index * 67 % 180, np.full_like(index, 200), 255 - index % 3 * 60], 1)
    extra = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0] if len(index) else []
    return names, np.concatenate([palette.reshape(-1, 3), np.reshape(extra, (-1, 3))]).astype(
        np.uint8
    )


def panels(shot: MinedImage, colours: UInt8, show_data: bool = True) -> dict[str, UInt8]:
    """Draw the panels of one image.

    Args:
        shot: The image.
        colours: RGB of each class, uint8, shape (C, 3).
        show_data: False leaves out what is the data set's own, the photograph and the ground
            truth; mined pixels are then shown over the prediction, dimmed.

    Returns:
        Title to RGB panel, uint8, all of one size: small images are enlarged by a whole number,
        large ones reduced. Reduced pixels are as bright as the share of them that is mined.
    """
    height, width = shot.label.shape
    longest = max(height, width)
    scale = _WIDE / longest if longest > _WIDE else max(1, round(_GOOD / longest))
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    ignored = _resize(~shot.valid, width, height)
    prediction = _resize(shot.prediction.astype(np.int32), width, height)
    label = _resize(np.where(shot.valid, shot.label, -1).astype(np.int32), width, height)
    loss = loss_colours(_resize(np.nan_to_num(shot.loss, nan=np.inf), width, height, as_p=True))

    out: dict[str, UInt8] = {}
    if show_data:
        photo = out["image"] = _resize(shot.image, width, height)
        out[_LABEL] = _number(colours[np.maximum(label, 0)], label)
        grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None].repeat(3, 2) * 0.45
    else:
        grey = colours[prediction] * 0.35
    out[_PREDICTION] = _number(colours[prediction], prediction)
    out["loss"] = loss
    share = _resize(shot.kept, width, height)[..., None]
    out[_MINED] = (grey * (1 - share) + np.array(MINED) * share).astype(np.uint8)
    for title in {"loss", _MINED, _LABEL} & out.keys():
        out[title] = np.where(ignored[..., None], _stripes(height, width), out[title])
    return out


def loss_colours(shown: npt.ArrayLike) -> UInt8:
    """Colour losses on one scale for all pictures.

    Args:
        shown: ``1 - exp(-loss)``, that is 1 minus the probability of the true class, any shape.

    Returns:
        RGB, uint8, shape (..., 3), on matplotlib's inferno map: its brightness rises evenly, for
        colour-blind readers and in print as well.
    """
    from matplotlib import colormaps

    steps = np.rint(np.clip(shown, 0, 1) * 255).astype(np.intp)
    table = np.rint(colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return np.asarray(table[steps])


def _resize(array: npt.NDArray[Any], width: int, height: int, as_p: bool = False) -> Any:
    """Enlarge by repeating, reduce by averaging; label maps and masks take the nearest pixel."""
    kind = array.dtype
    if as_p:
        array = 1 - np.exp(-array)
    if kind == np.bool_:
        array = array.astype(np.uint8)
    is_map = kind == np.bool_ or kind == np.int32
    shrink = width < array.shape[1] and not is_map
    how = cv2.INTER_AREA if shrink else cv2.INTER_NEAREST
    return cv2.resize(array, (width, height), interpolation=how).astype(kind)


def _stripes(height: int, width: int) -> UInt8:
    rows, columns = np.ogrid[:height, :width]
    return np.asarray(np.array(_STRIPES, np.uint8)[(rows + columns) // 6 % 2])


def _number(picture: UInt8, label: npt.NDArray[np.int32]) -> UInt8:
    """Write its number into the widest place of each class, where there is room."""
    picture = np.ascontiguousarray(picture)
    face, size = cv2.FONT_HERSHEY_SIMPLEX, max(11, picture.shape[1] // 40)
    scale, thickness = cv2.getFontScaleFromHeight(face, size), 1 + size // 16
    for index in np.unique(label[label >= 0]):
        mask = np.pad((label == index).astype(np.uint8), 1)  # the border counts as an edge
        depth = cv2.distanceTransform(mask, cv2.DIST_L2, 3)[1:-1, 1:-1]
        row, column = np.unravel_index(depth.argmax(), depth.shape)
        (width, height), _ = cv2.getTextSize(str(index), face, scale, thickness)
        if depth[row, column] >= 0.6 * max(width, height):
            bright = picture[row, column] @ (0.299, 0.587, 0.114) > 140
            place = int(column) - width // 2, int(row) + height // 2
            ink = (0, 0, 0) if bright else (255, 255, 255)
            cv2.putText(picture, str(index), place, face, scale, ink, thickness, cv2.LINE_AA)
    return picture


# --- the board -------------------------------------------------------------------------------


def board(
    shot: MinedImage,
    names: Sequence[str],
    colours: UInt8,
    loss: OhemCrossEntropyLoss,
    note: str = "",
    show_data: bool = True,
) -> UInt8:
    """Draw all panels of one image, with titles and a legend of the classes in it.

    Args:
        shot: The image.
        names: Name of each class, C of them.
        colours: RGB of each class, uint8, shape (C, 3).
        loss: The loss whose settings are named.
        note: What else to say in the title, such as the iteration.
        show_data: As in :func:`panels`.

    Returns:
        RGB, uint8. The legend lists every class that is labelled or predicted; it takes the free
        place beside the panels, or as many rows below them as it needs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = panels(shot, colours, show_data)
    high, wide = next(iter(pictures.values())).shape[:2]
    font = max(13, wide // 40)
    line, gap = round(font * 1.5), font
    entries = _entries(shot, names, show_data)
    legend = _Legend(entries, colours, loss.rule.thresh, font, line)

    step = max(wide, 8 * font) + gap
    width = gap + max(3 * step, 2 * legend.column + gap)
    title = f"{shot.name}   mean loss {shot.mean_loss:.2f}   mined {shot.kept_share:.1%}"
    title = "   ".join(filter(None, (title, loss.extra_repr(), note)))
    lines = textwrap.wrap(title, max(20, int((width - 2 * gap) / (font * 0.55))))
    top = gap + len(lines) * line
    rows = -(-len(pictures) // 3)
    bottom = top + rows * (high + line) + gap
    if len(pictures) % 3 and wide >= 2 * legend.column and legend.height(wide) <= high:
        left, upper, room = gap + 2 * step, top + (rows - 1) * (high + line) + line, wide
        height = bottom
    else:
        left, upper, room = gap, bottom, width - 2 * gap
        height = bottom + legend.height(room) + gap

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def place(picture: UInt8, x: int, y: int) -> None:
        figure.figimage(picture, x, height - y - len(picture), origin="upper")

    def write(text: str, x: float, y: float, **style: Any) -> None:
        """Write one line whose box starts ``y`` pixels below the top."""
        options = {"fontsize": font * 0.72, "va": "center", "color": "black", **style}
        figure.text(x / width, 1 - (y + line / 2) / height, text, **options)

    for index, text in enumerate(lines):
        write(text, gap, gap / 2 + index * line, weight="bold" if index == 0 else "normal")
    for index, (name, picture) in enumerate(pictures.items()):
        x, y = gap + index % 3 * step, top + index // 3 * (high + line)
        write(name, x, y + 1)
        place(picture, x, y + line)
    legend.draw(left, upper, room, place, write)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return np.ascontiguousarray(pixels[..., :3])


class _Entry(NamedTuple):
    number: int
    name: str
    pixels: str
    mined: str


def _entries(shot: MinedImage, names: Sequence[str], show_data: bool) -> list[_Entry]:
    """The classes that are seen in the panels, with their shares in percent."""
    counts = ClassCounts(len(names)).add(shot)
    seen = set(np.unique(shot.prediction).tolist())
    if show_data:
        seen |= set(np.flatnonzero(counts.pixels).tolist())
    return [
        _Entry(
            index,
            names[index] if len(names[index]) <= 15 else names[index][:14] + "…",
            f"{counts.pixel_share[index]:.1%}",
            f"{counts.mined_of_class[index]:.0%}" if counts.pixels[index] else "-",
        )
        for index in sorted(seen)
    ]


class _Legend:
    """A key in the first column, the classes in the others."""

    def __init__(
        self, entries: list[_Entry], colours: UInt8, thresh: float | None, font: int, line: int
    ) -> None:
        self.entries, self.colours, self.thresh = entries, colours, thresh
        self.font, self.line, self.column = font, line, font * 18

    def _rows(self, width: int) -> int:
        return max(5, -(-len(self.entries) // max(1, width // self.column - 1)))

    def height(self, width: int) -> int:
        """Height that it takes at a width, in pixels."""
        return self.line * (self._rows(width) + 2)

    def draw(self, left: int, top: int, width: int, place: Any, write: Any) -> None:
        """Draw it with its upper left corner at (left, top)."""
        font, line = self.font, self.line
        bar = self.column - 4 * font
        write("loss", left, top)
        place(self._bar(bar, font), left, top + line)
        for value, text in self._ticks():
            write(text, left + value * bar, top + 2 * line - font * 0.3, ha="center")
        box = np.ones((font, font, 1), np.uint8)
        keys = [(box * np.array(MINED, np.uint8), "mined: trained on")]
        keys += [(_stripes(font, font), "ignored: no label")]
        for row, (picture, text) in enumerate(keys):
            y = top + round((3.6 + row) * line)
            place(picture, left, y + (line - font) // 2)
            write(text, left + 1.6 * font, y)

        rows = self._rows(width)
        for index, entry in enumerate(self.entries):
            x, y = left + self.column * (1 + index // rows), top + line * (1 + index % rows)
            pixels, mined = x + 13.4 * font, x + 16.9 * font
            if index % rows == 0:
                write("class", x + 1.6 * font, top, color="#555555")
                write("pixels", pixels, top, ha="right", color="#555555")
                write("mined", mined, top, ha="right", color="#555555")
            place(box * self.colours[entry.number], x, y + (line - font) // 2)
            write(f"{entry.number} {entry.name}", x + 1.6 * font, y)
            write(entry.pixels, pixels, y, ha="right")
            write(entry.mined, mined, y, ha="right")
        write(
            "pixels: of the image; mined: of the class",
            left + self.column,
            top + line * (rows + 1),
            color="#555555",
            fontsize=font * 0.6,
        )

    def _ticks(self) -> list[tuple[float, str]]:
        """Places on the bar in [0, 1] and what stands there."""
        ticks = [(1 - math.exp(-loss), f"{loss:g}") for loss in (0.0, 1.0, 3.0)]
        if self.thresh is not None and self.thresh < 1:
            mark = 1 - self.thresh
            ticks = [tick for tick in ticks if abs(tick[0] - mark) > 0.15]
            ticks.append((mark, f"{-math.log(self.thresh):.2g}"))
        return ticks

    def _bar(self, width: int, height: int) -> UInt8:
        """The colour scale, with a line at the threshold."""
        bar = loss_colours(np.tile(np.linspace(0, 1, width), (height, 1)))
        if self.thresh is not None:
            mark = round((1 - self.thresh) * (width - 1))
            bar[:, max(0, mark - 1) : mark + 1] = 255
        return bar
