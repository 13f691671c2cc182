"""Show which pixels a trained model finds hard: PNGs and a gallery, hardest images first.

    python tools/show_hard_pixels.py CONFIG CHECKPOINT

Runs the model over a split, mines each image by the settings of the loss in the config, and
writes, for the hardest images, a PNG with all panels, and ``index.html``: one file that holds its
pictures and needs no server.
"""

from __future__ import annotations

import argparse
import base64
import heapq
import io
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

import jinja2
import numpy as np
import torch

from ohem_mm import OhemCrossEntropyLoss, cli
from ohem_mm.cli.checkpoints import load_weights
from ohem_mm.visualization import (
    MINED,
    ClassCounts,
    MainLoss,
    MinedImage,
    UInt8,
    board,
    class_colours,
    for_one_image,
    loss_colours,
    main_loss,
    mine_sample,
    panels,
)

try:
    from mmengine.config import Config
    from mmengine.device import get_device
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import Runner
    from PIL import Image
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    print(f"error: {error}; install it with: pip install 'ohem-mm[mmseg]'", file=sys.stderr)
    raise SystemExit(2) from None


class Picture(NamedTuple):
    """One image as the gallery shows it; ordered by hardness."""

    hardness: float
    index: int
    kept_share: float
    name: str
    counts: ClassCounts
    predicted: list[int]
    panels: dict[str, UInt8]
    board: UInt8


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Show the hard pixels of a trained model.")
    parser.add_argument("config", help="path of a config, or the name of a shipped one")
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--out-dir",
        help="folder for the PNGs and index.html, which replace those of an earlier run (default: "
        "hard_pixels in the work dir)",
    )
    parser.add_argument("--split", choices=["val", "test", "train"], default="val")
    parser.add_argument(
        "--num-images", type=int, default=20, metavar="N", help="show the N hardest (default: 20)"
    )
    parser.add_argument(
        "--first", type=int, metavar="M", help="look at the first M images of the split only"
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="leave out what is the data set's own, the photographs and the labels, where they "
        "may not be passed on",
    )
    cli.add_config_options(parser)
    return parser.parse_args()


# --- model and data --------------------------------------------------------------------------


def build_model(cfg: Config, checkpoint: str) -> torch.nn.Module:
    """Build the model of a config and load its weights.

    Raises:
        UserError: The checkpoint does not fit the model.
    """
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_weights(model, checkpoint)
    return model.to(get_device()).eval()


def build_loader(cfg: Config, split: str, first: int | None) -> Any:
    """Build a loader over a split, in order and as in testing."""
    if cfg.get(f"{split}_dataloader") is None:
        raise cli.UserError(f"the config has no {split}_dataloader")
    loader = cfg[f"{split}_dataloader"].copy()
    if split == "train":
        # No crops and no augmentation: the whole image, as the model is tested.
        pipeline = next(
            node["pipeline"]
            for other in ("val", "test")
            for _, node in cli.iter_dicts(cfg.get(f"{other}_dataloader"))
            if "pipeline" in node
        )
        for _, node in cli.iter_dicts(loader.dataset):
            if "pipeline" in node:
                node["pipeline"] = pipeline
        loader.batch_size = 1
        loader.pop("batch_sampler", None)
    loader.sampler = dict(type="DefaultSampler", shuffle=False)
    loader.drop_last = False
    if first is not None:
        for _, node in cli.iter_dicts(loader.dataset):
            if "pipeline" in node:
                node["indices"] = first
    return Runner.build_dataloader(loader)


def mine_all(model: Any, loader: Any, main: MainLoss, batch_size: int) -> Iterator[MinedImage]:
    """Run the model and yield every image with what is mined of it."""
    for batch in track(loader, "images", console=Console(stderr=True)):
        with torch.no_grad():
            samples = model.test_step(batch)
        for inputs, sample in zip(batch["inputs"], samples, strict=True):
            path = sample.metainfo.get("img_path", "image")
            if "gt_sem_seg" not in sample:
                raise cli.UserError(f"{path} has no labels, so nothing can be mined on it")
            try:
                yield mine_sample(sample, inputs, Path(path).name, main, batch_size)
            except ValueError as error:
                raise cli.UserError(f"{path}: {error}") from error


# --- output ----------------------------------------------------------------------------------


def inline(picture: UInt8, photo: bool = False) -> str:
    """A picture as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", lossless=not photo, quality=85)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def class_rows(counts: ClassCounts, names: list[str], colours: UInt8) -> list[dict[str, Any]]:
    """What the page and the table on the screen say about each class that has pixels."""
    return [
        {
            "index": index,
            "name": names[index],
            "colour": "#{:02x}{:02x}{:02x}".format(*colours[index]),
            "pixels": float(counts.pixel_share[index]),
            "mined": float(counts.mined_share[index]),
            "mined_of_class": float(counts.mined_of_class[index]),
        }
        for index in np.flatnonzero(counts.pixels)
    ]


def clear_gallery(folder: Path) -> None:
    """Delete what an earlier run wrote: its pictures may be ones that must not be passed on."""
    page = folder / "index.html"
    if page.is_file() and "<title>Hard pixels: " in page.read_text(encoding="utf-8"):
        for path in folder.glob("*.png"):
            if re.match(r"\d{3,}_", path.name):
                path.unlink()


def write_gallery(
    folder: Path,
    pictures: list[Picture],
    total: ClassCounts,
    names: list[str],
    colours: UInt8,
    text: dict[str, Any],
) -> Path:
    """Write the page and the PNGs, in place of those of an earlier run.

    Args:
        folder: Where to.
        pictures: Hardest first.
        total: Counts over all images of the split.
        names: Name of each class.
        colours: RGB of each class, uint8, shape (C, 3).
        text: What else the template needs.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear_gallery(folder)
    shown = []
    files = [f"{rank:03d}_{Path(one.name).stem}.png" for rank, one in enumerate(pictures, 1)]
    for file, picture in zip(files, pictures, strict=True):
        rows = class_rows(picture.counts, names, colours)
        known = {row["index"] for row in rows}
        shown.append(
            {
                "name": picture.name,
                "file": file,
                "hardness": picture.hardness,
                "kept_share": picture.kept_share,
                "classes": rows,
                "only_predicted": [
                    (names[index], "#{:02x}{:02x}{:02x}".format(*colours[index]), index)
                    for index in picture.predicted
                    if index not in known
                ],
                "panels": {
                    title: inline(panel, photo=title in ("image", "loss"))
                    for title, panel in picture.panels.items()
                },
            }
        )
    source = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        source
    )
    page = folder / "index.html"
    scale = loss_colours(np.tile(np.linspace(0, 1, 256), (12, 1)))
    page.write_text(
        template.render(
            pictures=shown,
            classes=class_rows(total, names, colours),
            mined_colour="#{:02x}{:02x}{:02x}".format(*MINED),
            scale=inline(scale),
            **text,
        ),
        encoding="utf-8",
    )
    # After the page, which is how the next run knows that they are ours.
    for file, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture.board).save(folder / file, optimize=True)
    return page


def print_classes(rows: list[dict[str, Any]]) -> None:
    """Print the per-class shares."""
    table = Table("class", title="share of ...")
    for title in ("the pixels", "the mined pixels", "the class that is mined"):
        table.add_column(title, justify="right")
    for row in sorted(rows, key=lambda row: -row["mined_of_class"]):
        table.add_row(
            row["name"], *(f"{row[key]:.1%}" for key in ("pixels", "mined", "mined_of_class"))
        )
    Console().print(table)


def settings(main: MainLoss, found: bool, batch_size: int) -> str:
    """Say in words by which rule the pixels were mined."""
    loss = main.loss
    rule = f"thresh {loss.thresh}, min_kept {loss.min_kept:g}, pool {loss.pool}"
    if found:
        text = f"Mined as by the loss of {main.name}: {rule}."
    else:
        text = f"The config has no OhemCrossEntropyLoss; mined by its defaults: {rule}."
    text += " Each image is a pool of its own"
    own = for_one_image(loss, batch_size)
    if own.min_kept != loss.min_kept:
        text += f", and its min_kept is that of a batch of {batch_size} divided: {own.min_kept}"
    return text + "."


def main() -> None:
    """Run the model, mine and write."""
    args = parse_args()
    for name, value in (("num-images", args.num_images), ("first", args.first)):
        if value is not None and value < 1:
            raise cli.UserError(f"--{name} must be at least 1, but got {value}")
    cfg = cli.load_config(args)
    cli.check_checkpoint(args.checkpoint)
    cli.check_losses(cfg)
    cli.check_datasets(cfg, (args.split,))
    init_default_scope(cfg.get("default_scope", "mmseg"))
    model = build_model(cfg, args.checkpoint)
    loader = build_loader(cfg, args.split, args.first)
    found = main_loss(model)
    loss = found or MainLoss("", OhemCrossEntropyLoss().to(get_device()), 255)
    batch_size = (cfg.get("train_dataloader") or {}).get("batch_size") or 1
    said = settings(loss, found is not None, batch_size)
    print(said)

    head = model.decode_head
    num_classes = (head[-1] if isinstance(head, torch.nn.ModuleList) else head).num_classes
    names, colours = class_colours(loader.dataset.metainfo, num_classes)
    total, hardest, seen = ClassCounts(num_classes), [], 0
    for index, shot in enumerate(mine_all(model, loader, loss, batch_size)):
        seen += 1
        total.add(shot)
        if len(hardest) == args.num_images and shot.mean_loss <= hardest[0].hardness:
            continue
        picture = Picture(
            shot.mean_loss,
            -index,
            shot.kept_share,
            shot.name,
            ClassCounts(num_classes).add(shot),
            np.unique(shot.prediction).tolist(),
            panels(shot, colours, not args.no_images),
            board(shot, names, colours, loss.loss, show_data=not args.no_images),
        )
        (heapq.heappush if len(hardest) < args.num_images else heapq.heappushpop)(hardest, picture)

    folder = Path(args.out_dir or Path(cfg.work_dir, "hard_pixels"))
    pictures = sorted(hardest, reverse=True)
    text = {
        "title": f"{Path(args.config).stem}, {args.split}",
        "settings": said,
        "count": seen,
        "kept_share": float(total.mined.sum() / max(1, total.pixels.sum())),
        "hard_above": None if loss.loss.thresh is None else -math.log(loss.loss.thresh),
        "show_data": not args.no_images,
    }
    page = write_gallery(folder, pictures, total, names, colours, text)
    print_classes(class_rows(total, names, colours))
    print(f"wrote {page} and {len(pictures)} PNGs")


if __name__ == "__main__":
    sys.exit(cli.run(main))
