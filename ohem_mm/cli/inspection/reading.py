"""What a config says of its batches, and where its heads are."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.registry import Registry

from ohem_mm import cli
from ohem_mm.cli.inspection.findings import Finding


class Batch(NamedTuple):
    """What one GPU sees in one step; None where the config does not say."""

    gpus: int | None
    images: int | None
    height: int | None
    width: int | None

    def pixels(self, pool: str = "batch") -> int | None:
        """Pixels of a pool; for 'class', whose size is not known, those of the batch."""
        count = {"image": 2, "world": 4}.get(pool, 3)
        known = list(filter(None, (self.height, self.width, self.images, self.gpus)[:count]))
        return math.prod(known) if len(known) == count else None


class Reading:
    """A config, what it says about all of its heads, and what was found in it."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.name = Path(cfg.filename).stem
        self.model = cfg.get("model") or {}
        self.hooks = [cli.type_name(hook) for hook in cfg.get("custom_hooks") or []]
        self.padding = self.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
        self.scope = cfg.get("default_scope") or "mmseg"
        self.batch = self._read_batch()
        self.findings: list[Finding] = []

    def add(self, code: str, where: str, when: object = True, /, **values: Any) -> None:
        """Add a finding, where it holds, with the values that its text takes."""
        if when:
            self.findings.append(Finding.of(code, where, **values))

    def class_of(self, registry: Registry, node: Any) -> Any:
        """The class that a config's dict names; None when it is not installed here."""
        kind = node.get("type")
        if not isinstance(kind, str):
            return kind
        try:
            with registry.switch_scope_and_registry(self.scope) as scoped:
                return scoped.get(kind)
        except (ImportError, RuntimeError, KeyError):
            return None

    def check_type(self, registry: Registry, where: str, node: Any) -> None:
        """A name that no class is registered under; names of packages that are not here pass."""
        name = node.get("type") if isinstance(node, dict) else None
        if not isinstance(name, str) or importlib.util.find_spec(self.scope) is None:
            return
        package, _, bare = name.rpartition(".")
        ours = ("", self.scope, "mmengine", "ohem_mm")
        if package not in ours or self.class_of(registry, node):
            return
        known = {*registry.module_dict}.union(*(r.module_dict for r in registry.children.values()))
        remedy = "correct the name, or add the module that registers it to custom_imports"
        if close := difflib.get_close_matches(bare, sorted(known)):
            remedy = f"did you mean {' or '.join(map(repr, close))}?"
        self.add("unknown-type", where, type=name, remedy=remedy)

    def heads(self) -> Iterator[tuple[str, Any]]:
        """Path and dict of every decode head of the model that has losses of its own."""
        for path, node in cli.iter_dicts(self.model):
            named = re.search(r"(^|\.)(decode_head|auxiliary_head)(\.\d+)?$", path)
            inner = any("loss_decode" in part for place, part in cli.iter_dicts(node) if place)
            if "type" in node and ("loss_decode" in node or (named and not inner)):
                yield path, node

    def _read_batch(self) -> Batch:
        """From the loader, the pipeline, the padding and the name."""
        loader = self.cfg.get("train_dataloader") or {}
        size: Any = None
        for path, node in cli.iter_dicts(loader.get("dataset"), "dataset"):
            if cli.type_name(node) == "RandomCrop":
                size = node["crop_size"]
            elif cli.type_name(node) == "Resize" and not node.get("keep_ratio", False):
                scale = node.get("scale")
                size = scale[::-1] if isinstance(scale, list | tuple) else scale or size
            elif "pipeline" in node and ".pipeline" not in path:
                size = node.get("size", size)  # a data set that draws its images
        in_name = re.search(r"(\d+)x(\d+)$", self.name)
        size = size or (in_name and (int(in_name[1]), int(in_name[2]))) or (0, 0)
        pad = self.padding.get("size") or (0, 0)
        pairs = (pair if isinstance(pair, list | tuple) else (pair, pair) for pair in (size, pad))
        height, width = (max(pair) or None for pair in zip(*pairs, strict=True))
        gpus = re.search(r"_(\d+)xb\d+", self.name)
        return Batch(int(gpus[1]) if gpus else None, loader.get("batch_size"), height, width)


def setting(node: Any, cls: Any, name: str, fallback: Any) -> Any:
    """A setting as written, or else the default of the class or its nearest base that has one."""
    if name in node:
        return node[name]
    for base in cls.__mro__ if cls else ():
        if "__init__" in vars(base):
            parameter = inspect.signature(base.__init__).parameters.get(name)
            if parameter is not None and parameter.default is not parameter.empty:
                return parameter.default
    return fallback
