"""Train a segmentor: mmseg's train tool, for configs given by path or by short name."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

# On a CPU, torch's threads spin while they wait for each other. Beside a data loader that takes the
# core of the one they wait for; OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ohem_mm import cli
from ohem_mm.cli import checkpoints, inspection

if TYPE_CHECKING:
    from mmengine.config import Config


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Train a segmentor.")
    cli.add_config_argument(parser)
    add = parser.add_argument
    add("--work-dir", help="folder for logs and checkpoints")
    add("--resume", action="store_true", help="go on from the latest checkpoint in the work dir")
    add("--amp", action="store_true", help="train in mixed precision: float16, on a CPU bfloat16")
    add("--channels-last", action="store_true", help="order of the weights: faster on a CPU")
    cli.add_common_arguments(parser)
    return parser.parse_args()


def apply_resume(cfg: Config) -> None:
    """Resume from the latest checkpoint of the work dir; from ``load_from`` if that is set."""
    cfg.resume = True
    if cfg.get("load_from") is not None:
        return
    cfg.load_from = checkpoints.find_resume(cfg.work_dir)
    if cfg.load_from is None:
        print(
            f"warning: --resume: {cfg.work_dir!r} has no checkpoint, so training starts from "
            "the beginning",
            file=sys.stderr,
        )


def main() -> None:
    """Train."""
    args = parse_args()
    cfg = cli.load_config(args)
    from ohem_mm.cli import labels  # needs mmseg, which has been looked for now

    if args.amp:
        cli.use_amp(cfg)
    if args.channels_last:
        cli.use_channels_last(cfg)
    if args.resume or cfg.get("resume"):
        apply_resume(cfg)
    cli.check_losses(cfg)
    cli.check_hooks(cfg)
    inspection.check(cfg)
    cli.check_amp_device(cfg)
    cli.check_pretrained(cfg)
    if cfg.get("load_from") and cli.is_local(cfg.load_from):
        checkpoints.read(cfg.load_from)
    cli.check_datasets(cfg, ("train", "val"))
    labels.check_labels(cfg)
    cli.check_work_dir(cfg)
    cli.keep_two_checkpoints(cfg)
    runner = cli.build_runner(cfg)
    if cfg.get("resume") and cfg.get("load_from"):
        checkpoints.check_resume(cfg, runner.model, cfg.load_from)
    try:
        runner.train()
    except Exception as error:
        labels.explain(cfg, ("train", "val"), error)
        raise


if __name__ == "__main__":
    sys.exit(cli.run(main))
