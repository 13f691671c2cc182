"""The hardest images of a split: a PNG for each, and one page that shows them all.

The page, ``index.html``, holds its pictures and needs no server.
"""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2  # which torch brings along
import numpy as np
from PIL import Image

from ..loss import OhemCrossEntropyLoss
from .mined import ClassCounts, MainLoss, MinedImage, UInt8, for_one_image
from .pictures import MINED, board, loss_colours, panels


class Gallery:
    """The ``size`` hardest images, and counts over all of them; ``show_data`` as for a board."""

    def __init__(
        self, names: Sequence[str], colours: UInt8, size: int, show_data: bool = True
    ) -> None:
        self.names, self.colours, self.size, self.show_data = names, colours, size, show_data
        self.total, self.seen = ClassCounts(len(names)), 0

    def collect(self, shots: Iterable[MinedImage], loss: OhemCrossEntropyLoss) -> None:
        """Look at images, mined by a loss, and keep the hardest ones, hardest first."""
        self.loss = loss
        counted = map(self._count, shots)
        self.pictures = heapq.nlargest(self.size, counted, key=lambda shot: shot.mean_loss)

    def _count(self, shot: MinedImage) -> MinedImage:
        self.total.add(shot)
        self.seen += 1
        return shot

    def class_rows(self, counts: ClassCounts) -> list[dict[str, Any]]:
        """What the page and the table on the screen say about each class that has pixels."""
        return [
            {
                **self._class(index),
                "pixels": float(counts.pixel_share[index]),
                "mined": float(counts.mined_share[index]),
                "mined_of_class": float(counts.mined_of_class[index]),
            }
            for index in np.flatnonzero(counts.pixels).tolist()
        ]

    def _class(self, index: int) -> dict[str, Any]:
        return {"index": index, "name": self.names[index], "colour": _hex(self.colours[index])}

    def write(self, folder: Path, **text: Any) -> Path:
        """Write the page, and return it, and the PNGs, in place of those of an earlier run.

        Args:
            folder: Where to.
            **text: What else the template needs: title, settings, hard_above.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
        )
        shown = [self._shown(rank, shot) for rank, shot in enumerate(self.pictures, 1)]
        html = environment.get_template("gallery.html").render(
            pictures=shown,
            classes=self.class_rows(self.total),
            count=self.seen,
            kept_share=float(self.total.mined.sum() / max(1, self.total.pixels.sum())),
            mined_colour=_hex(MINED),
            scale=_inline(loss_colours(np.tile(np.linspace(0, 1, 256), (12, 1)))),
            show_data=self.show_data,
            **text,
        )
        page = folder / "index.html"
        page.write_text(html, encoding="utf-8")
        # After the page, which is how the next run knows that they are ours.
        for one, shot in zip(shown, self.pictures, strict=True):
            whole = board(shot, self.names, self.colours, self.loss, show_data=self.show_data)
            Image.fromarray(whole).save(folder / one["file"], optimize=True)
        return page

    def _shown(self, rank: int, shot: MinedImage) -> dict[str, Any]:
        """One image, as the template takes it."""
        rows = self.class_rows(ClassCounts(len(self.names)).add(shot))
        labelled = {row["index"] for row in rows}
        predicted = set(np.unique(shot.prediction).tolist())
        return {
            "name": shot.name,
            "file": f"{rank:03d}_{Path(shot.name).stem}.png",
            "hardness": shot.mean_loss,
            "kept_share": shot.kept_share,
            "classes": rows,
            "only_predicted": [self._class(index) for index in sorted(predicted - labelled)],
            "panels": {
                title: _inline(panel, photo=title in ("image", "loss"))
                for title, panel in panels(shot, self.colours, self.show_data).items()
            },
        }


def rule_in_words(main: MainLoss, batch_size: int) -> str:
    """By which rule the pixels are mined; a :class:`MainLoss` without a name is no head's."""
    loss = main.loss
    rule = f"thresh {loss.rule.thresh}, min_kept {loss.rule.min_kept:g}, pool {loss.rule.pool}"
    text = f"The config has no OhemCrossEntropyLoss; mined by its defaults: {rule}."
    if main.name:
        text = f"Mined as by the loss of {main.name}: {rule}."
    text += " Each image is a pool of its own"
    own = for_one_image(loss, batch_size).rule.min_kept
    if own != loss.rule.min_kept:
        text += f", and its min_kept is that of a batch of {batch_size} divided: {own}"
    return text + "."


def _hex(colour: Any) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _inline(picture: UInt8, photo: bool = False) -> str:
    """A picture as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", lossless=not photo, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _clear(folder: Path) -> None:
    """Delete what an earlier run wrote: its pictures may be ones that must not be passed on."""
    page = folder / "index.html"
    if page.is_file() and "<title>Hard pixels: " in page.read_text(encoding="utf-8"):
        for path in folder.glob("[0-9][0-9][0-9]*_*.png"):
            if path.name.partition("_")[0].isdecimal():
                path.unlink()
