"""A training of a few tiny steps, and what it wrote."""

import pytest

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.runner import Runner

from ohem_mm.config import config_path


def runner_for(work_dir, hooks, **options):
    """A training of a few tiny steps on generated scenes."""
    cfg = Config.fromfile(config_path("quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"))
    cfg.merge_from_dict(
        {
            "work_dir": str(work_dir),
            "custom_hooks": hooks,
            "train_cfg.max_iters": 6,
            "train_cfg.val_interval": 100,
            "train_dataloader.batch_size": 2,
            "train_dataloader.num_workers": 0,
            "train_dataloader.persistent_workers": False,
            "train_dataloader.dataset.num_scenes": 8,
            "train_dataloader.dataset.size": (48, 64),
            "val_dataloader.dataset.num_scenes": 1,
            "val_dataloader.num_workers": 0,
            "val_dataloader.persistent_workers": False,
            "model.data_preprocessor.size": (48, 64),
            "default_hooks.logger.interval": 1,
            "default_hooks.checkpoint.interval": 3,
            "randomness": {"seed": 0},
            **options,
        }
    )
    # Names are instances in mmengine: two runs of one name would share history and backends.
    cfg.experiment_name = cfg.visualizer.name = "_".join(work_dir.parts[-2:])
    return Runner.from_cfg(cfg)


def train(work_dir, hooks, **options):
    """Train to the end; return the runner."""
    runner = runner_for(work_dir, hooks, **options)
    runner.train()
    return runner


def history(runner, key):
    """Every value of a scalar of the training."""
    return runner.message_hub.get_scalar(f"train/{key}").data[0].tolist()


def logs(work_dir):
    """The text of all log files."""
    return "".join(path.read_text() for path in work_dir.rglob("*.log"))
