"""Losses of other packages, without what those packages import and a loss does not need."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any


def submodule(package: str, path: str) -> Any:
    """Import ``package.path`` without running the ``__init__`` of the package.

    segmentation_models_pytorch imports torchvision and timm there, nnU-Net half a toolbox.

    Raises:
        ImportError: The package is not installed, or has no such part.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    if package in sys.modules:
        return importlib.import_module(f"{package}.{path}")
    bare = sys.modules[package] = ModuleType(package)
    bare.__path__ = found.submodule_search_locations
    try:
        return importlib.import_module(f"{package}.{path}")
    finally:
        del sys.modules[package]
