"""Configs of the variants of a benchmark: what makes their results, and checks before a run."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ohem_mm
from ohem_mm import cli
from ohem_mm.bench.files import Benchmark, Tune, Variant
from ohem_mm.bench.progress import say
from ohem_mm.disk import read_json, write_json

# After cli, which says what to install when mmengine is missing.
from mmengine.config import Config  # isort: skip


class Built(NamedTuple):
    """The config of a variant at a value of what is tuned."""

    cfg: Config
    hashed: str  # of all that makes its results
    untuned: str  # of what the runs that tuning may compare have in common; empty without tune


def build_config(
    benchmark: Benchmark, variant: Variant, value: float | None, args: argparse.Namespace, base: Any
) -> Built:
    """Build the config of a variant from its config file, at a value of what is tuned; check it."""
    cfg, tune = copy.deepcopy(base), benchmark.tune
    for options in (benchmark.cfg_options, *variant.cfg_options):
        cli.apply_options(cfg, copy.deepcopy(options))
    if benchmark.amp:
        cli.use_bf16(cfg)
    if benchmark.channels_last:
        cli.use_channels_last(cfg)
    cli.apply_options(cfg, copy.deepcopy(args.cfg_options))
    if benchmark.split == "val":
        cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
        cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)
        cfg.test_cfg = cfg.get("test_cfg") or {"type": "TestLoop"}
    untuned = ""
    if tune is not None and value is not None:
        untuned = _hash(cfg, [tune.keys, tune.scale])
        _set_tuned(cfg, tune, value, variant, args)
    hashed = _hash(cfg)

    # What follows changes where the data lie and what is recorded, not the results.
    data_root = args.data_root or benchmark.data_root
    if data_root is not None:
        cli.apply_options(cfg, {"data_root": data_root})
    if cfg.default_hooks.get("checkpoint") is None:
        raise cli.UserError("default_hooks.checkpoint is missing, and a killed job could not go on")
    cli.keep_two_checkpoints(cfg)
    if "IoUMetric" not in _types(cfg.test_evaluator):
        raise cli.UserError("test_evaluator must be mmseg's IoUMetric")
    hooks, monitor = list(cfg.get("custom_hooks") or []), {"type": "OhemMonitorHook"}
    mines = ohem_mm.OhemCrossEntropyLoss.__name__ in _types(cfg.model)
    if mines and monitor["type"] not in map(cli.type_name, hooks):
        cfg.custom_hooks = [*hooks, monitor]
    if tune is not None and tune.split != benchmark.split:
        _check_choosing_split(cfg)
    cli.check_losses(cfg)
    cli.check_hooks(cfg)
    cli.check_amp_device(cfg)
    cli.check_pretrained(cfg)
    cli.check_datasets(cfg, ("train", "val", "test"))
    return Built(cfg, hashed, untuned)


def _types(node: Any) -> set[str]:
    return {cli.type_name(part) for _, part in cli.iter_dicts(node)}


def _hash(cfg: Config, *more: Any) -> str:
    """The hash of all that makes the results of a config, and of what else is given."""
    content = cfg.to_dict()
    for key in ("work_dir", "launcher", "resume"):
        content.pop(key, None)
    (content.get("randomness") or {}).pop("seed", None)
    text = json.dumps([content, *more] if more else content, sort_keys=True, default=str)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:10]


def _set_tuned(
    cfg: Config, tune: Tune, value: float, variant: Variant, args: argparse.Namespace
) -> None:
    """Set the tuned keys of a config to a value, or multiply what it has by it."""
    options: dict[str, Any] = {}
    for key in tune.keys:
        if key in args.cfg_options:
            raise cli.UserError(f"--cfg-options {key}: tune sets this key; --at chooses a value")
        if not tune.scale and any(key in given for given in variant.cfg_options):
            raise cli.UserError(
                f"cfg_options has {key}, which tune sets to the same values in all variants; "
                "with scales instead of values each variant keeps its own"
            )
        options[key] = _number(cfg, key) * value if tune.scale else value
    cli.apply_options(cfg, options)


def _number(cfg: Config, key: str) -> float:
    """The number at a dotted key of a config."""
    node: Any = cfg
    for part in key.split("."):
        try:
            node = node[int(part)] if isinstance(node, list | tuple) else node[part]
        except (KeyError, IndexError, ValueError, TypeError):
            raise cli.UserError(f"tune: the config has no {key} to scale") from None
    if isinstance(node, bool) or not isinstance(node, int | float):
        raise cli.UserError(f"tune: {key} is {node!r} in the config; scales need a number")
    return node


def _check_choosing_split(cfg: Config) -> None:
    """Check that training ends with a validation, and that test images do not choose."""
    if cfg.get("val_dataloader") is None or cfg.get("val_evaluator") is None:
        raise cli.UserError(
            "tune chooses on val, but the config has no val_dataloader or no val_evaluator"
        )
    if cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
        raise cli.UserError(
            "tune chooses on val, and val_dataloader and test_dataloader have the same images; "
            "give val_dataloader.dataset other ones, or say split: test in tune, which the report "
            "then tells"
        )


def class_shares(cfg: Config, cache: Path) -> list[float]:
    """The share of each class in the labelled pixels of the training set, counted once."""
    known: dict[str, list[float]] = read_json(cache) or {}
    dataset_cfg = copy.deepcopy(cfg.train_dataloader.dataset)
    for _, node in cli.iter_dicts(dataset_cfg):
        if "pipeline" in node:
            steps = node["pipeline"]
            node["pipeline"] = [s for s in steps if cli.type_name(s) == "LoadAnnotations"]
        if cli.type_name(node) == "RepeatDataset":
            node["times"] = 1
    key = hashlib.sha1(str(dataset_cfg).encode(), usedforsecurity=False).hexdigest()
    if key in known:
        return known[key]

    import mmseg.datasets  # noqa: F401  (registers them)
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")
    dataset = DATASETS.build(dataset_cfg)
    count = torch.zeros(len(dataset.metainfo["classes"]), dtype=torch.int64)
    say(f"counting the classes of {len(dataset)} training images")
    for i in range(len(dataset)):
        labels = torch.as_tensor(dataset[i]["gt_seg_map"]).flatten().long()
        count += torch.bincount(labels, minlength=len(count))[: len(count)]
    known[key] = [round(share, 6) for share in (count / count.sum()).tolist()]
    write_json(cache, known)
    return known[key]
