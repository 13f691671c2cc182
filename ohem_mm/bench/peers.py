"""Losses of other packages, without what those packages import and a loss does not need."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["submodule"]


def submodule(package: str, path: str) -> Any:
    """Import a part of an installed package without running the ``__init__`` at its top.

    segmentation_models_pytorch imports torchvision and timm there, nnU-Net half a toolbox.

    Args:
        package: Name of the package.
        path: Dotted path of the module or subpackage inside it.

    Returns:
        The module.

    Raises:
        ImportError: The package is not installed, or has no such part.
    """
    name = f"{package}.{path}"
    if name in sys.modules:
        return sys.modules[name]
    top = importlib.util.find_spec(package)
    if top is None or not top.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    folder = Path(next(iter(top.submodule_search_locations)), *path.split("."))
    whole = folder / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name,
        whole if whole.exists() else folder.with_suffix(".py"),
        submodule_search_locations=[str(folder)] if whole.exists() else None,
    )
    if spec is None or spec.loader is None or not Path(spec.origin or "").exists():
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
