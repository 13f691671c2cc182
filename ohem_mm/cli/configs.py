"""Configs: load one, walk through it, and change it as the options say."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import inspect
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.runner import Runner

from ohem_mm.config import config_path
from ohem_mm.errors import UserError, warn


def load_config(args: argparse.Namespace) -> Config:
    """Load ``args.config``, apply ``--cfg-options``, ``--launcher`` and ``--work-dir``.

    Without ``--work-dir`` and without ``work_dir`` in the config, the work directory is
    ``./work_dirs/<name of the config>``.
    """
    task = os.environ.get("SLURM_LOCALID") if args.launcher == "slurm" else None
    os.environ.setdefault("LOCAL_RANK", task or str(args.local_rank))
    path = config_path(args.config)
    # Imported now, without what mmseg prints about packages that it lacks.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(ImportError, RuntimeError):
        import mmseg.datasets  # noqa: F401
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:
        raise UserError(f"{path} imports a module that cannot be loaded: {error}") from error
    except Exception as error:  # a config is code, and that can fail in any way
        reason = " ".join(str(error).split()) or "nothing more is known"
        raise UserError(f"{path} is no config: {type(error).__name__}: {reason}") from error
    if cfg.get("default_scope") == "mmseg" and importlib.util.find_spec("mmseg") is None:
        raise UserError(
            "this config needs mmsegmentation; install it with: pip install 'ohem-mm[mmseg]'"
        )
    apply_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get("work_dir") is None:
        cfg.work_dir = str(Path("work_dirs") / path.stem)
    return cfg


def iter_dicts(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield ``(dotted path, dict)`` for every dict in a config node, outer ones first."""
    if isinstance(node, Config):
        node = {key: node[key] for key in node}
    if isinstance(node, dict):
        yield path, node
        items: Any = list(node.items())
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        return
    for key, value in items:
        yield from iter_dicts(value, f"{path}.{key}" if path else str(key))


def type_name(node: Any) -> str:
    """The bare class name in a config's ``type``: a (dotted or scoped) name or a class."""
    kind = node.get("type", "") if isinstance(node, dict) else node
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", "")


def settings_of(node: Any) -> dict[str, Any]:
    """What a config's dict passes to the class that it names."""
    return {key: node[key] for key in node if key not in ("type", "_scope_")}


def apply_options(cfg: Config, options: dict[str, Any]) -> None:
    """Merge ``--cfg-options`` (dotted keys or nested dicts) into the config, and check the keys."""
    for key in options:
        _check_option(cfg, key)
    old_root = cfg.get("data_root")
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UserError(f"--cfg-options do not fit the config: {error.args[0]}") from error
    if "data_root" in options:
        _move_data_root(cfg, old_root, options["data_root"])


def _check_option(cfg: Config, key: str) -> None:
    """Catch misspelt keys: mmengine would add them to the config without a word."""
    parts = key.split(".")
    node: Any = {name: cfg[name] for name in cfg}
    for depth, part in enumerate(parts):
        where = ".".join(parts[:depth]) or "the config"
        said = f"--cfg-options {key}: {where}"
        if isinstance(node, list | tuple):
            last = len(node) - 1
            if not part.isdigit() or int(part) > last:
                raise UserError(f"{said} is a list, so {part!r} must be an index from 0 to {last}")
            node = node[int(part)]
        elif not isinstance(node, dict):
            raise UserError(f"{said} is {node!r} in the config and holds no {part!r}")
        elif part in node:
            node = node[part]
        else:
            known = [*node, *(_TOP_LEVEL if depth == 0 else ())]
            if part in known:
                return
            # One letter too few or too many; class_weight and loss_weight are further apart.
            close = difflib.get_close_matches(part, sorted({*known}), cutoff=0.88)
            slip = f"{said} has no {part!r}"
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            # A new setting of an existing dict may well be meant; a new branch that looks
            # like an old one, or a top-level key that nobody reads, is a slip.
            is_leaf = depth == len(parts) - 1
            if close and (depth == 0 or not is_leaf):
                raise UserError(slip + hint)
            if close or not is_leaf:
                warn(f"{slip}; it is added as a new key{hint}")
            return


# Keys that mmengine and the tools read though a config need not have them.
_TOP_LEVEL = (
    *inspect.signature(Runner).parameters,
    *("runner_type", "find_unused_parameters", "sync_bn", "tta_model", "tta_pipeline"),
)


def _move_data_root(cfg: Config, old: str | None, new: str) -> None:
    """Put ``new`` wherever a data set has the ``data_root`` that the config had at its top.

    A config is evaluated before the options are merged, so its data sets hold copies of the
    old value.
    """
    dicts = [node for path, node in iter_dicts(cfg) if path]
    users = [node for node in dicts if isinstance(node.get("data_root"), str)]
    roots = {node["data_root"] for node in users}
    if old is None and len(roots - {new}) == 1:
        (old,) = roots - {new}
    moved = [node for node in users if node["data_root"] == old]
    if not moved and new not in roots:
        raise UserError(
            f"--cfg-options data_root={new} changes nothing: "
            + (f"the data sets lie in {sorted(roots)}" if roots else "no data set reads from disk")
        )
    for node in moved:
        node["data_root"] = new


def use_amp(cfg: Config) -> None:
    """Switch the optimizer wrapper to mixed precision: ``--amp``.

    On a GPU that is mmengine's ``AmpOptimWrapper`` (float16 unless the config says otherwise), and
    elsewhere :class:`ohem_mm.models.Bf16OptimWrapper`.
    """
    kind, on_cpu = _kind_of_wrapper(cfg, "--amp"), get_device() == "cpu"
    if kind == "Bf16OptimWrapper" or (kind == "AmpOptimWrapper" and not on_cpu):
        warn("--amp: the config trains in mixed precision already")
    elif on_cpu:
        use_bf16(cfg)
    else:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def use_bf16(cfg: Config) -> None:
    """Switch the optimizer wrapper to :class:`ohem_mm.models.Bf16OptimWrapper`, on any device."""
    _kind_of_wrapper(cfg, "bf16")
    for key in ("loss_scale", "dtype", "use_fsdp"):  # of AmpOptimWrapper
        cfg.optim_wrapper.pop(key, None)
    cfg.optim_wrapper.type = "Bf16OptimWrapper"


def _kind_of_wrapper(cfg: Config, option: str) -> str:
    kind = type_name(cfg.optim_wrapper)
    if kind not in ("OptimWrapper", "AmpOptimWrapper", "Bf16OptimWrapper", ""):
        raise UserError(f"{option} works with the OptimWrapper, but the config has {kind}")
    return kind


def use_channels_last(cfg: Config) -> None:
    """Add :class:`ohem_mm.hooks.ChannelsLastHook` to the config: ``--channels-last``."""
    hooks = list(cfg.get("custom_hooks") or [])
    if "ChannelsLastHook" not in map(type_name, hooks):
        cfg.custom_hooks = [*hooks, {"type": "ChannelsLastHook"}]


def keep_two_checkpoints(cfg: Config) -> None:
    """Keep two checkpoints where the config keeps one.

    mmengine deletes the oldest before it writes the next, so with one a kill between the two loses
    all. The configs stay as they are: their hashes stand in the records of the benchmarks.
    """
    checkpoint = (cfg.get("default_hooks") or {}).get("checkpoint")
    if checkpoint and checkpoint.get("max_keep_ckpts") == 1:
        checkpoint["max_keep_ckpts"] = 2
