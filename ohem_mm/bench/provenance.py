"""Where a measurement comes from: commit, versions and hardware."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import ohem_mm
from ohem_mm.config import config_path


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware of this process."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # The continuation of OpenMMLab has the same import names under other package names.
        **(versions("onedl-mmengine") or versions("mmengine")),
        **(versions("onedl-mmsegmentation") or versions("mmsegmentation")),
        "ohem_mm": ohem_mm.__version__,
    }
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    has_affinity = hasattr(os, "sched_getaffinity")
    hardware = {
        "cpu": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {**_commit(), "versions": found, "hardware": hardware}


def versions(package: str) -> dict[str, str]:
    """The version of a package under its name; nothing where it is not installed."""
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError:
        return {}


def _commit() -> dict[str, Any]:
    """The commit of the checkout, and whether code or configs differ from it."""
    root = config_path("tools/train.py").parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if Path(git("rev-parse", "--show-toplevel")) == root:
            code = ("ohem_mm", "configs", "tools", ":!*.jsonl", ":!*.csv", ":!*.png", ":!*.md")
            dirty = bool(git("status", "--porcelain", "--", *code))
            return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    return {"commit": None, "dirty": None}
