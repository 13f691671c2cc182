"""Time and memory of the loss against the alternatives, on the CPU or one GPU.

A head step starts from the small logits of a decode head: upsampling, loss, the accuracy `acc_seg`
that mmseg logs, and the backward pass to the small logits. An iteration is a whole training step
of a shipped config with random input; only "fused hook" uses the hook there. All providers get the
same input in the same run, in an order that changes from repeat to repeat, and the value of each is
checked in float64 before it is timed.

    python tools/benchmark_loss.py                                # the device's usual shape
    python tools/benchmark_loss.py --shapes 4x19x512x512/8 --providers portable sampler
    python tools/benchmark_loss.py --sweep pixels classes --plot
    python tools/benchmark_loss.py --modes iteration --image 4x1024x1024
    python tools/benchmark_loss.py --report                       # tables from the records alone

Times are in milliseconds, memory is the peak above what is allocated before the step, in MiB. On a
GPU the level-2 cache is flushed before each step.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from ohem_mm.bench.speed.jobs import NETWORKS
from ohem_mm.bench.speed.problems import SHAPES, parse_image, parse_shape
from ohem_mm.bench.speed.providers import PROVIDERS, choose_providers
from ohem_mm.bench.speed.report import MODES, append, plot, read, tables
from ohem_mm.bench.speed.run import SWEEPS, run
from ohem_mm.errors import UserError

RECORDS = Path(__file__).resolve().parent / "benchmarks" / "loss.csv"


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options and fill in what depends on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, help=f"{', '.join(SHAPES)} or NxCxHxW/stride"
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        help=f"names or parts of them (without: those that have no plus): {', '.join(PROVIDERS)}",
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["step"])
    parser.add_argument("--acc-seg", choices=("with", "without", "both"))
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--image", type=parse_image, help="NxHxW, input of an iteration")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, help="timed steps (default: 10, on a GPU 100)")
    parser.add_argument("--warmup", type=int, help="steps before (default: 2, on a GPU 10)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="records to append to")
    parser.add_argument("--report", action="store_true", help="measure nothing; read the records")
    parser.add_argument("--plot", action="store_true", help="draw the sweeps beside the records")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu or cuda, but got {args.device!r}")
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if args.shapes is None:
        names = ["cityscapes-s8", "ade20k-s4"] if cuda else ["cpu"]
        args.shapes = [parse_shape(name) for name in names]
    args.image = args.image or parse_image("4x1024x1024" if cuda else "2x256x512")
    args.repeats = (100 if cuda else 10) if args.repeats is None else args.repeats
    args.warmup = (10 if cuda else 2) if args.warmup is None else args.warmup
    if args.repeats < 1 or args.warmup < 1:
        parser.error("--repeats and --warmup must be at least 1")
    args.acc_seg = args.acc_seg or ("with" if args.sweep else "both")
    args.providers = choose_providers(args.providers)
    return args


def main(argv: Sequence[str]) -> None:
    """Measure, or read the records, and print the tables."""
    args = parse_args(argv)
    if args.report:
        rows = read(args.out)
        print(tables(rows))
    else:
        rows = run(args, argv)
        append(args.out, rows)
        print(tables(rows))
        rows = read(args.out)
    if args.plot:
        for file in plot(rows, args.out.parent):
            print(f"\n{file.name} is drawn.")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="mm")  # remarks of mmseg and mmengine
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
