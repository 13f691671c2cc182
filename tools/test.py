"""Test a segmentor: mmseg's test tool, for configs given by path or by short name."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

# On a CPU, torch's threads spin while they wait for each other. Beside a data loader that takes the
# core of the one they wait for; OpenMP reads this when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ohem_mm import cli
from ohem_mm.cli import checkpoints

if TYPE_CHECKING:
    from mmengine.config import Config


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Test a segmentor and print its IoU per class.")
    cli.add_config_argument(parser)
    add = parser.add_argument
    add("checkpoint", help="checkpoint file")
    add("--work-dir", help="folder for logs and the metrics as JSON")
    add("--out", help="folder for the predicted label maps, one PNG per image")
    add("--show", action="store_true", help="show the predictions in a window")
    add(
        "--show-dir",
        help="folder for painted predictions; the images are in vis_data/vis_image below it",
    )
    add("--wait-time", type=float, default=2, help="seconds that --show shows an image")
    add("--tta", action="store_true", help="average over the augmentations of tta_pipeline")
    cli.add_common_arguments(parser)
    return parser.parse_args()


def apply_show(cfg: Config, args: argparse.Namespace) -> None:
    """Turn on the visualisation hook, for every image unless the config says otherwise."""
    hook = cfg.get("default_hooks", {}).get("visualization")
    if hook is None or cfg.get("visualizer") is None:
        raise cli.UserError(
            "--show and --show-dir need default_hooks.visualization and visualizer in the config"
        )
    hook.draw = True
    hook.setdefault("interval", 1)
    if args.show:
        hook.show = True
        hook.wait_time = args.wait_time
    if args.show_dir:
        cfg.visualizer.save_dir = args.show_dir


def apply_tta(cfg: Config) -> None:
    """Wrap the model and replace the pipeline of every test data set, nested ones too."""
    if cfg.get("tta_model") is None or cfg.get("tta_pipeline") is None:
        raise cli.UserError("--tta needs tta_model and tta_pipeline in the config")
    for _, node in cli.iter_dicts(cfg.test_dataloader.dataset):
        if "pipeline" in node:
            node["pipeline"] = cfg.tta_pipeline
    cfg.model = dict(cfg.tta_model, module=cfg.model)


def apply_out(cfg: Config, folder: str) -> None:
    """Make every IoU metric write its predictions into ``folder``."""
    evaluators = cfg.test_evaluator
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if cli.type_name(evaluator) == "IoUMetric":
            evaluator["output_dir"] = folder
            evaluator["keep_results"] = True


def main() -> None:
    """Test."""
    args = parse_args()
    cfg = cli.load_config(args)
    from ohem_mm.cli import labels  # needs mmseg, which has been looked for now

    for key in ("test_dataloader", "test_evaluator", "test_cfg"):
        if cfg.get(key) is None:
            raise cli.UserError(f"the config has no {key}, so there is nothing to test on")
    cli.check_checkpoint(args.checkpoint)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        apply_show(cfg, args)
    if args.out is not None:
        apply_out(cfg, args.out)
    cli.check_losses(cfg)
    cli.check_datasets(cfg, ("test",))
    if args.tta:
        apply_tta(cfg)
    runner = cli.build_runner(cfg)
    checkpoints.load_weights(runner.model, args.checkpoint)
    try:
        runner.test()
    except Exception as error:
        labels.explain(cfg, ("test",), error)
        raise


if __name__ == "__main__":
    sys.exit(cli.run(main))
