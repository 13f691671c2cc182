"""Panels of one image side by side, with titles and a legend of the classes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from ..loss import OhemCrossEntropyLoss
from .mined import ClassCounts, MinedImage, UInt8, resize

MINED = (255, 190, 0)  # bright amber on dark grey: told apart by brightness alone
_STRIPES = ((96, 96, 96), (136, 136, 136))
_LABEL, _PREDICTION, _MINED = "ground truth", "prediction", "mined pixels"
# Small images are enlarged to about _GOOD pixels a side, large ones reduced to _WIDE.
_GOOD, _WIDE = 480, 800


# --- panels ----------------------------------------------------------------------------------


def class_colours(meta: Mapping[str, Any], num_classes: int) -> tuple[list[str], UInt8]:
    """Names and RGB colours of the classes of a data set, whose ``metainfo`` may lack some."""
    names = [str(name) for name in meta.get("classes") or ()][:num_classes]
    names += [f"class {index}" for index in range(len(names), num_classes)]
    # Hues a third of the circle apart, in three brightnesses, for classes without a colour.
    index = np.arange(num_classes)
    hsv = np.stack([index * 67 % 180, np.full_like(index, 200), 255 - index % 3 * 60], 1)
    colours = np.asarray(cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2RGB)[0], np.uint8)
    if palette := list(meta.get("palette") or ())[:num_classes]:
        colours[: len(palette)] = palette
    return names, colours


def panels(shot: MinedImage, colours: UInt8, show_data: bool = True) -> dict[str, UInt8]:
    """The panels of one image, by title, all of one size.

    Small images are enlarged by a whole number, large ones reduced. Reduced pixels are as bright as
    the share of them that is mined. Without ``show_data``, what is the data set's own is left out,
    the photograph and the ground truth; mined pixels are shown over the prediction, dimmed.
    """
    height, width = shot.label.shape
    longest = max(height, width)
    scale = _WIDE / longest if longest > _WIDE else max(1, round(_GOOD / longest))
    size = width, height = max(1, round(width * scale)), max(1, round(height * scale))
    ignored = resize(~shot.valid, *size)
    prediction = resize(shot.prediction.astype(np.int32), *size)
    label = resize(np.where(shot.valid, shot.label, -1).astype(np.int32), *size)

    out: dict[str, UInt8] = {}
    if show_data:
        photo = out["image"] = resize(shot.image, *size)
        out[_LABEL] = _number(colours[np.maximum(label, 0)], label)
        grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[..., None].repeat(3, 2) * 0.45
    else:
        grey = colours[prediction] * 0.35
    out[_PREDICTION] = _number(colours[prediction], prediction)
    out["loss"] = loss_colours(resize(np.nan_to_num(shot.loss, nan=np.inf), *size, as_p=True))
    share = resize(shot.kept, *size)[..., None]
    out[_MINED] = (grey * (1 - share) + np.array(MINED) * share).astype(np.uint8)
    for title in {"loss", _MINED, _LABEL} & out.keys():
        out[title] = np.where(ignored[..., None], _stripes(height, width), out[title])
    return out


def loss_colours(shown: npt.ArrayLike) -> UInt8:
    """Colours of ``1 - exp(-loss)``, 1 minus the probability of the true class, for all pictures.

    The brightness of matplotlib's inferno rises evenly, for colour-blind readers and in print too.
    """
    from matplotlib import colormaps

    steps = np.rint(np.clip(shown, 0, 1) * 255).astype(np.intp)
    table = np.rint(colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8)
    return np.asarray(table[steps])


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
    """Draw all panels of one image; the title names the loss's settings, and a note.

    The legend lists every class that is labelled or predicted; it takes the free place beside the
    panels, or as many rows below them as it needs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pictures = panels(shot, colours, show_data)
    high, wide = next(iter(pictures.values())).shape[:2]
    font = max(13, wide // 40)
    legend = _Legend(_entries(shot, names, show_data), colours, loss.rule.thresh, font)
    line, gap = legend.line, font

    step = max(wide, 8 * font) + gap
    width = gap + max(3 * step, 2 * legend.column + gap)
    facts = (shot.name, f"mean loss {shot.mean_loss:.2f}", f"mined {shot.kept_share:.1%}")
    title = "   ".join(filter(None, (*facts, loss.extra_repr(), note)))
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


def _entries(
    shot: MinedImage, names: Sequence[str], show_data: bool
) -> list[tuple[int, str, str, str]]:
    """The classes that are seen in the panels: number, name, share of pixels and what is mined."""
    counts = ClassCounts(len(names)).add(shot)
    seen = set(np.unique(shot.prediction).tolist())
    if show_data:
        seen |= set(np.flatnonzero(counts.pixels).tolist())
    return [
        (
            index,
            f"{index} {name if len(name) <= 15 else name[:14] + '…'}",
            f"{counts.pixel_share[index]:.1%}",
            f"{counts.mined_of_class[index]:.0%}" if counts.pixels[index] else "-",
        )
        for index, name in enumerate(names)
        if index in seen
    ]


class _Legend:
    """A key in the first column, the classes in the others."""

    def __init__(self, entries: Any, colours: UInt8, thresh: float | None, font: int) -> None:
        self.entries, self.colours, self.thresh = entries, colours, thresh
        self.font, self.line, self.column = font, round(font * 1.5), font * 18

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
        for index, (picture, text) in enumerate(keys):
            y = top + round((3.6 + index) * line)
            place(picture, left, y + (line - font) // 2)
            write(text, left + 1.6 * font, y)

        def row(cells: Sequence[str], x: float, y: float, color: str) -> None:
            for cell, offset, side in zip(cells, (1.6, 13.4, 16.9), sides, strict=True):
                write(cell, x + offset * font, y, ha=side, color=color)

        rows, grey, sides = self._rows(width), "#555555", ("left", "right", "right")
        for index, (number, *cells) in enumerate(self.entries):
            x, y = left + self.column * (1 + index // rows), top + line * (1 + index % rows)
            if index % rows == 0:
                row(("class", "pixels", "mined"), x, top, grey)
            place(box * self.colours[number], x, y + (line - font) // 2)
            row(cells, x, y, "black")
        text, y = "pixels: of the image; mined: of the class", top + line * (rows + 1)
        write(text, left + self.column, y, color=grey, fontsize=font * 0.6)

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
