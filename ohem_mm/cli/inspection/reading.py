"""What a config says of its batches and heads, with the defaults of the classes filled in."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.registry import MODELS, Registry

from ohem_mm import cli
from ohem_mm.cli.inspection.findings import Finding

# Heads that call the losses of a list by place and hide the ignored label from those places.
BY_PLACE = {"DDRHead": (2, (0, 1)), "PIDHead": (4, (1, 3))}
_MASKS = ("classifies masks, not pixels", "keep the losses that it is made for")
# Heads that do not classify pixels by a loss of their own: what they are, and what to do instead.
OTHER_HEADS = {
    "IterativeDecodeHead": (
        "has no loss of its own",
        "set loss_decode of its kernel_generate_head",
    ),
    **dict.fromkeys(("MaskFormerHead", "Mask2FormerHead", "SideAdapterCLIPHead"), _MASKS),
    "VPDDepthHead": ("predicts depth, not classes", "keep the loss that it is made for"),
}


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


class Head(NamedTuple):
    """A decode head of the config, with the defaults of its class filled in."""

    path: str
    node: Any
    type: str
    cls: Any  # None when it is not installed here
    losses: dict[str, Any]
    sampler: Any
    channels: int | None
    num_classes: int | None
    ignore_index: int | None

    def entry(self, table: dict[str, Any]) -> Any:
        """Entry of a table of heads, by the name of its class or of the nearest base; or None."""
        names = [base.__name__ for base in self.cls.__mro__] if self.cls else [self.type]
        return next((table[name] for name in names if name in table), None)

    @property
    def asks_sampler(self) -> bool:
        """Whether its loss looks at the sampler, by the names that its code uses."""
        for base in self.cls.__mro__ if self.cls else ():
            if method := vars(base).get("loss_by_feat"):
                names = method.__code__.co_names
                if "sampler" in names or "super" not in names:
                    return "sampler" in names
        return self.cls is None


class Reading:
    """A config, what it says about all of its heads, and what was found in it.

    Attributes:
        batch: What one GPU sees in one step.
        findings: In the order in which they were added.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.name = Path(cfg.filename).stem
        self.model = cfg.get("model") or {}
        self.hooks = [cli.type_name(hook) for hook in cfg.get("custom_hooks") or []]
        self.padding = self.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
        self.scope = cfg.get("default_scope") or "mmseg"
        self.batch = self._read_batch()
        self.findings: list[Finding] = []

    def add(self, code: str, where: str, **values: Any) -> None:
        """Add a finding."""
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

    def heads(self) -> Iterator[Head]:
        """Every dict of the model that is a decode head with losses of its own."""
        for path, node in cli.iter_dicts(self.model):
            named = re.search(r"(^|\.)(decode_head|auxiliary_head)(\.\d+)?$", path)
            inner = any("loss_decode" in part for place, part in cli.iter_dicts(node) if place)
            if "type" not in node or not ("loss_decode" in node or (named and not inner)):
                continue
            cls = self.class_of(MODELS, node)
            keys = ["loss_decode"] if "loss_decode" in node else [k for k in node if "loss" in k]
            losses = {key: node[key] for key in keys}
            losses = losses or {"loss_decode": setting(node, cls, "loss_decode", {})}
            num_classes = node.get("num_classes")
            yield Head(
                path,
                node,
                type=cli.type_name(node),
                cls=cls,
                losses={
                    place: loss
                    for place, loss in cli.iter_dicts(losses)
                    if place.count(".") < 2 and "type" in loss
                },
                sampler=node.get("sampler"),
                channels=node.get("out_channels") or num_classes,
                num_classes=num_classes,
                ignore_index=setting(node, cls, "ignore_index", 255),
            )

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
