"""Checkpoints that a tool is given: whether they can be read, fit the model, and where to go on.

mmengine loads what fits and says the rest in the log; a file that is cut off ends in a traceback.
Here both end in one sentence, before any work is done.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseTTAModel
from mmengine.runner import CheckpointLoader
from torch import nn

from ohem_mm import cli
from ohem_mm.hooks._losses import unwrap


def read(file: str) -> dict[str, Any]:
    """The content of a checkpoint, a path or an address that mmengine loads from, on the CPU."""
    cli.check_checkpoint(file)
    path = Path(file).expanduser()
    if path.is_file() and path.stat().st_size == 0:
        raise cli.UserError(f"the checkpoint {file!r} is empty; a kill or a full disk may do that")
    cli.allow_mmengine_checkpoints()
    try:
        content = CheckpointLoader.load_checkpoint(file, map_location="cpu", logger="silent")
    except Exception as error:  # a broken pickle raises anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise cli.UserError(
            f"the checkpoint {file!r} cannot be read: it is cut off, or no checkpoint ({reason})"
        ) from error
    if not isinstance(content, dict):
        raise cli.UserError(f"{file!r} is no checkpoint: it holds a {type(content).__name__}")
    return content


def load_weights(model: nn.Module, file: str, *, to_train: bool = False) -> dict[str, Any]:
    """Load the weights of a checkpoint into a model, wrapped or not, and return its content.

    ``to_train`` asks that auxiliary heads fit too, and that nothing is left over.
    """
    content = read(file)
    model = unwrap(model)
    model = model.module if isinstance(model, BaseTTAModel) else model
    state = content.get("state_dict", content)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        # Its first line names the class; each line below, one parameter.
        misfits = [line.strip() for line in str(error).splitlines()[1:]]
    else:
        needed = {name for name, _ in model.named_parameters()}
        misfits = [
            f"it has no {key}"
            for key in result.missing_keys
            if (key in needed or key.endswith(("running_mean", "running_var")))
            and (to_train or not key.startswith("auxiliary_head"))
        ]
        if to_train:
            misfits += [f"the model has no {key}" for key in result.unexpected_keys]
    if misfits:
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise cli.UserError(
            f"the checkpoint {file!r} does not fit the model: {misfits[0].rstrip('.')}{more}"
        )
    return content


def numbered(folder: Path) -> list[Path]:
    """The whole checkpoints of a work dir, latest first; a kill may have cut off the last one."""
    # A checkpoint is a zip file, and the table of contents of that lies at its end.
    whole = [
        path
        for path in folder.glob("*.pth")
        if re.fullmatch(r"(iter|epoch)_\d+\.pth", path.name) and zipfile.is_zipfile(path)
    ]
    return sorted(whole, key=lambda path: -int(path.stem.rpartition("_")[2]))


def find_resume(work_dir: str) -> str | None:
    """The checkpoint from which training goes on.

    mmengine keeps its whole path in ``last_checkpoint``. Where that is empty, the work dir was
    moved, or the file is cut off, the latest whole checkpoint in the work dir is taken. None when
    there is no checkpoint yet.
    """
    folder, marker = Path(work_dir), Path(work_dir, "last_checkpoint")
    named = marker.read_text().strip() if marker.is_file() else ""
    path, moved = Path(named), folder / Path(named).name
    if named and ("://" in named or path.is_dir() or zipfile.is_zipfile(path)):
        return named
    if named and zipfile.is_zipfile(moved):
        return str(moved)
    if whole := numbered(folder):
        if named or marker.is_file():
            state = f"names {named!r}, which is not whole" if named else "is empty"
            cli.warn(f"{marker} {state}; going on from {whole[0]}", "note")
        return str(whole[0])
    if named:
        read(str(moved) if moved.is_file() and not path.is_file() else named)  # says what is wrong
        cli.check_checkpoint(named)
    return None


def check_resume(cfg: Config, model: nn.Module, file: str) -> None:
    """Check that training can go on from a checkpoint, and say when nothing is left to train."""
    meta = load_weights(model, file, to_train=True).get("meta") or {}
    if not {"iter", "epoch"} <= meta.keys():
        raise cli.UserError(
            f"--resume: {file!r} holds weights alone, so training cannot go on from it; to start "
            f"from these weights, use --cfg-options load_from={file} without --resume"
        )
    for key, unit in (("max_iters", "iter"), ("max_epochs", "epoch")):
        last = (cfg.get("train_cfg") or {}).get(key)
        if last is not None and meta[unit] >= last:
            cli.warn(
                f"--resume: {file} is at {unit} {meta[unit]} of {last}, so nothing is left to "
                f"train; to go on, raise train_cfg.{key} and the end of param_scheduler",
                "note",
            )
