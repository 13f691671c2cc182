"""A trained model, and the images to look at with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from torch import nn

from ohem_mm import cli
from ohem_mm.cli.checkpoints import load_weights
from ohem_mm.visualization import MainLoss, MinedImage, mine_sample


def build_model(cfg: Config, checkpoint: str, *, training: bool = False) -> Any:
    """The model of a config with the weights of a checkpoint, on the device.

    With ``training`` heads take their training path; all the same nothing is random, and no
    statistic moves.
    """
    init_default_scope(cfg.get("default_scope") or "mmseg")
    if cfg.get("data_preprocessor"):
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_weights(model, checkpoint, to_train=training)
    model.train(training)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "Drop" in type(module).__name__:
            module.eval()
    return model.to(get_device())


def training_batches(cfg: Config, split: str, seed: int) -> Any:
    """Training's loader; for 'val', with the images of the validation set."""
    for key in ("train_dataloader", f"{split}_dataloader"):
        if cfg.get(key) is None:
            raise cli.UserError(f"the config has no {key}, so there are no batches to look at")
    init_default_scope(cfg.get("default_scope") or "mmseg")
    loader = cfg.train_dataloader
    if split != "train":
        dataset = cfg[f"{split}_dataloader"].dataset
        _take_pipeline(dataset, loader)
        loader = {**loader, "dataset": dataset}
    set_random_seed(seed)
    return Runner.build_dataloader(loader, seed=seed)


def whole_images(cfg: Config, split: str, first: int | None = None) -> Any:
    """A loader over a split, or its first images, in order and as in testing."""
    if cfg.get(f"{split}_dataloader") is None:
        raise cli.UserError(f"the config has no {split}_dataloader")
    init_default_scope(cfg.get("default_scope") or "mmseg")
    loader = cfg[f"{split}_dataloader"].copy()
    if split == "train":
        # No crops and no augmentation: the whole image, as the model is tested.
        _take_pipeline(loader.dataset, cfg.get("val_dataloader") or cfg.get("test_dataloader"))
        loader.batch_size = 1
        loader.pop("batch_sampler", None)
    loader.sampler = dict(type="DefaultSampler", shuffle=False)
    loader.drop_last = False
    if first is not None:
        for _, node in cli.iter_dicts(loader.dataset):
            if "pipeline" in node:
                node["indices"] = first
    return Runner.build_dataloader(loader)


def _take_pipeline(dataset: Any, loader: Any) -> None:
    """Give a data set, and those inside it, the pipeline of a loader."""
    pipeline = next(node["pipeline"] for _, node in cli.iter_dicts(loader) if "pipeline" in node)
    for _, node in cli.iter_dicts(dataset):
        if "pipeline" in node:
            node["pipeline"] = pipeline


def mined_images(model: Any, loader: Any, main: MainLoss, batch_size: int) -> Iterator[MinedImage]:
    """Yield every image of :func:`whole_images` with what a loss mines of it."""
    for batch in loader:
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
