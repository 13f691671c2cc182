"""Show which pixels a trained model finds hard: PNGs and a gallery, hardest images first.

    python tools/show_hard_pixels.py CONFIG CHECKPOINT

Runs the model over a split, mines each image by the settings of the loss in the config, and
writes, for the hardest images, a PNG with all panels, and ``index.html``: one file that holds its
pictures and needs no server.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in train.py

from ohem_mm import OhemCrossEntropyLoss, cli
from ohem_mm.errors import need


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Show the hard pixels of a trained model.")
    cli.add_config_argument(parser)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file")
    add(
        "--out-dir",
        help="folder for the PNGs and index.html, which replace those of an earlier run (default: "
        "hard_pixels in the work dir)",
    )
    add("--split", choices=["val", "test", "train"], default="val")
    add("--num-images", type=int, default=20, metavar="N", help="show the N hardest (default: 20)")
    add("--first", type=int, metavar="M", help="look at the first M images of the split only")
    add(
        "--no-images",
        action="store_true",
        help="leave out what is the data set's own, the photographs and the labels, where they "
        "may not be passed on",
    )
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run the model, mine and write."""
    args = parse_args()
    need("rich")
    for name, value in (("num-images", args.num_images), ("first", args.first)):
        if value is not None and value < 1:
            raise cli.UserError(f"--{name} must be at least 1, but got {value}")
    cfg = cli.load_config(args)
    # After load_config, which looks for mmseg.
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    from ohem_mm.cli import trained
    from ohem_mm.visualization import MainLoss, class_colours, main_loss
    from ohem_mm.visualization.gallery import Gallery, rule_in_words

    cli.check_checkpoint(args.checkpoint)
    cli.check_losses(cfg)
    cli.check_datasets(cfg, (args.split,))
    model = trained.build_model(cfg, args.checkpoint)
    loader = trained.whole_images(cfg, args.split, args.first)
    device = next(model.parameters()).device
    loss = main_loss(model) or MainLoss("", OhemCrossEntropyLoss().to(device), 255)
    batch_size = (cfg.get("train_dataloader") or {}).get("batch_size") or 1
    said = rule_in_words(loss, batch_size)
    print(said)

    head = model.decode_head
    num_classes = (head[-1] if hasattr(head, "__len__") else head).num_classes
    colours = class_colours(loader.dataset.metainfo, num_classes)
    gallery = Gallery(*colours, args.num_images, show_data=not args.no_images)
    batches = track(loader, "images", console=Console(stderr=True))
    gallery.collect(trained.mined_images(model, batches, loss, batch_size), loss.loss)
    thresh = loss.loss.rule.thresh
    page = gallery.write(
        Path(args.out_dir or Path(cfg.work_dir, "hard_pixels")),
        title=f"{Path(args.config).stem}, {args.split}",
        settings=said,
        hard_above=None if thresh is None else -math.log(thresh),
    )

    table = Table("class", title="share of ...")
    for title in ("the pixels", "the mined pixels", "the class that is mined"):
        table.add_column(title, justify="right")
    for row in sorted(gallery.class_rows(gallery.total), key=lambda row: -row["mined_of_class"]):
        shares = (f"{row[key]:.1%}" for key in ("pixels", "mined", "mined_of_class"))
        table.add_row(row["name"], *shares)
    Console().print(table)
    print(f"wrote {page} and {len(gallery.pictures)} PNGs")


if __name__ == "__main__":
    sys.exit(cli.run(main))
