"""How many pixels each thresh calls hard, and on how many batches each min_kept binds.

    python tools/choose_thresh.py CONFIG CHECKPOINT
    python tools/choose_thresh.py CONFIG CHECKPOINT --split val --thresh 0.5 0.7 0.9
    python tools/choose_thresh.py CONFIG CHECKPOINT --min-kept 1/16 100000 --plot thresh.png

The batches are those of training: its batch size, crops and augmentations, on the images of the
chosen split. Each goes once through the model of the checkpoint, without a gradient and with frozen
BatchNorm and dropout, and every head's own call of its loss is looked at. A pixel is hard when the
probability of its true class is below thresh; min_kept binds where fewer pixels of its pool are.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from pathlib import Path

# See tools/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ohem_mm import cli
from ohem_mm.cli import thresholds
from ohem_mm.errors import need


def _thresh(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability in (0, 1], got {text!r}")
    return value


def _min_kept(text: str) -> int | float:
    try:
        return thresholds.parse_min_kept(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be pixels, or a share in [0, 1], got {text!r}"
        ) from None


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Say how many pixels each thresh calls hard, and where min_kept binds."
    )
    cli.add_config_argument(parser)
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--split",
        choices=["train", "val"],
        default="train",
        help="whose images to take; crops and augmentations are those of training",
    )
    parser.add_argument("--num-batches", type=int, default=50, help="how many (default: 50)")
    parser.add_argument(
        "--thresh",
        type=_thresh,
        nargs="+",
        default=[],
        help=f"default: {thresholds.THRESHES} and the heads'",
    )
    parser.add_argument(
        "--min-kept",
        type=_min_kept,
        nargs="+",
        default=[1 / 64, 1 / 16, 1 / 4],
        help="pixels of a pool, or a share such as 1/16 (default: 1/64 1/16 1/4)",
    )
    parser.add_argument(
        "--head",
        nargs="+",
        metavar="NAME",
        help="such as decode_head or auxiliary_head.0 (default: those that mine, or all)",
    )
    parser.add_argument(
        "--pool",
        choices=thresholds.POOLS,
        help="over what min_kept counts (default: as the head does)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    parser.add_argument("--plot", metavar="PNG", help="draw the curves")
    parser.add_argument("--csv", metavar="FILE", help="write the numbers")
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run the model over some batches and report."""
    args = parse_args()
    need("rich")
    from rich import box
    from rich.console import Console
    from rich.progress import track

    if args.num_batches < 1:
        raise cli.UserError(f"--num-batches must be at least 1, got {args.num_batches}")
    for file in filter(None, (args.plot, args.csv)):
        if not Path(file).absolute().parent.is_dir():
            raise cli.UserError(f"the folder of {file!r} does not exist")
    cfg = cli.load_config(args)
    from ohem_mm.cli import trained  # after load_config, which looks for mmseg

    cli.check_checkpoint(args.checkpoint)
    cli.check_losses(cfg)
    cli.check_datasets(cfg, (args.split,))
    batches = trained.training_batches(cfg, args.split, args.seed)
    model = trained.build_model(cfg, args.checkpoint, training=True)
    watch = thresholds.Watch(model, args.head, args.thresh, args.pool)
    batches = itertools.islice(batches, args.num_batches)
    progress = track(batches, "batches", total=args.num_batches, console=Console(stderr=True))
    images = watch.run(model, progress)
    if not watch.counts:
        raise cli.UserError("no head hands logits and labels with a valid pixel to a loss")

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    size = cfg.train_dataloader.batch_size
    console.print(f"{images} images of {args.split} in batches of {size}")
    for title, counts in watch.counts.items():
        shown = "" if args.markdown else title
        table = thresholds.table(counts, watch.threshes, args.min_kept, shown)
        if args.markdown:
            console.print(f"\n**{title}**\n")
            table.box, table.show_edge = box.MARKDOWN, True
        console.print(table)
        console.print(thresholds.sentences(counts, title), highlight=False)
    console.print(thresholds.ADVICE, highlight=False, soft_wrap=True)
    if args.csv:
        thresholds.write_csv(args.csv, watch.counts, watch.threshes, args.min_kept)
    if args.plot:
        thresholds.draw(args.plot, watch.counts, args.min_kept)


if __name__ == "__main__":
    sys.exit(cli.run(main))
