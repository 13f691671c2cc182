"""What a config mines, head by head, and what is wrong with it. Needs neither data nor a GPU.

It reads the config and builds no model. mmseg's OHEMPixelSampler and OhemCrossEntropy are read by
their own rules. ``tools/inspect_config.py`` shows what it finds; ``tools/train.py`` looks as well.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.registry import DATASETS, HOOKS, MODELS, TASK_UTILS, Registry
from torch import nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, cli
from ohem_mm.hooks.fused import _fused_function

OURS, MMSEG, SAMPLER = "OhemCrossEntropyLoss", "OhemCrossEntropy", "OHEMPixelSampler"
# These hooks act on our loss alone.
OUR_HOOKS = ("FusedOhemHook", "OhemMonitorHook", "OhemScheduleHook")
# Heads that call the losses of a list by place and hide the ignored label from those places.
BY_PLACE = {"DDRHead": (2, (0, 1)), "PIDHead": (4, (1, 3))}
# Heads that do not classify pixels by a loss of their own: what they are, and what to do instead.
OTHER_HEADS = {
    "IterativeDecodeHead": (
        "has no loss of its own",
        "set loss_decode of its kernel_generate_head",
    ),
    **dict.fromkeys(
        ("MaskFormerHead", "Mask2FormerHead", "SideAdapterCLIPHead"),
        ("classifies masks, not pixels", "keep the losses that it is made for"),
    ),
    "VPDDepthHead": ("predicts depth, not classes", "keep the loss that it is made for"),
}
# Findings with which no training gets past its first batch.
FATAL = ("unknown-type", "other-head", "bad-setting", "always-keep", "class-weight")
SEVERITIES = ("error", "warning", "note")

# Name of a finding: how bad it is, what is the matter, what to do.
FINDINGS = {
    "lost": (
        "error",
        "nothing reads {key!r}, so what it sets is lost{inside}",
        "call it {meant!r}, or delete it",
    ),
    "name-says-ohem": (
        "error",
        "the config is called {name!r}, and no head mines",
        f"set loss_decode=dict(type={OURS!r}) in the heads, or rename the config",
    ),
    "unknown-type": (
        "error",
        "nothing is registered under the type {type!r}",
        "{remedy}",
    ),
    "other-head": ("error", "{head} {problem}, so this loss does not work in it", "{remedy}"),
    "bad-setting": ("error", "it cannot be built: {problem}", "correct the setting"),
    "always-keep": (
        "error",
        "always_keep names class {cls}, but there are {num_classes} classes",
        "name classes below {num_classes}",
    ),
    "class-weight": (
        "error",
        "class_weight has {length} entries, but there are {expected} classes",
        "give one weight for each class",
    ),
    "one-channel": (
        "error",
        "the head has one channel, and a softmax over one channel has nothing to learn",
        "set use_sigmoid=True in the loss, or out_channels=2 in the head",
    ),
    "keeps-nothing": (
        "error",
        "thresh=None with min_kept=0 keeps no pixel: this loss is always 0",
        "set thresh, for example 0.7, or min_kept, for example 1/16",
    ),
    "thresh-idle": (
        "error",
        "{reason}, so nothing is ever dropped",
        f"lower it; to turn mining off on purpose, use {OURS} with thresh=None, min_kept=1.0",
    ),
    "min-kept-above-batch": (
        "error",
        "min_kept is {pixels:,} pixels and {pool} has {total:,}, so nothing is ever dropped",
        "lower it; 1/16 of the pixels is a good start",
    ),
    "mmseg-loss": (
        "error",
        f"{MMSEG} {{problem}}",
        f"use type={OURS!r}, preset='hrnet', which works in every head",
    ),
    "bad-sampler": (
        "error",
        f"{SAMPLER} {{problem}}",
        f"correct it, or delete it and use type={OURS!r} in loss_decode",
    ),
    "sampler-beside-loss": (
        "error",
        f"{{sampler}} picks pixels, and {OURS} mines again among all of them",
        "delete the sampler",
    ),
    "sampler-idle": (
        "error",
        "{head} never asks its sampler, so nothing is mined",
        f"delete it and use type={OURS!r} in loss_decode",
    ),
    "loss-count": (
        "error",
        "{head} calls {expected} losses by place, but loss_decode has {length}",
        "give loss_decode as a list of that length",
    ),
    "ignored-label": (
        "error",
        "{head} does not tell this loss which label is ignored, so it takes 255 for a class",
        f"use type={OURS!r}; with thresh=None, min_kept=1.0 it is plain cross-entropy",
    ),
    "loss-name": (
        "error",
        "mmseg optimises only names that contain 'loss', and this is {name!r}",
        "call it 'loss_{name}'",
    ),
    "reduce-zero-label": (
        "error",
        "reduce_zero_label turns label 0 into 255, but the ignored label is {ignored}",
        "ignore 255",
    ),
    "ignore-index": (
        "warning",
        "the ignored label differs: {values}",
        "use one value everywhere; where none is written it is 255",
    ),
    "ignored-class": (
        "warning",
        "the ignored label {ignored} is one of the {num_classes} classes",
        "mark ignored pixels with 255",
    ),
    "absent-classes": (
        "warning",
        "with classes='all' and smooth=0 a class that is absent costs 1, whatever is predicted",
        "set smooth=1.0, or classes='present'",
    ),
    "region-alone": (
        "note",
        "an overlap loss alone gives no gradient to a class that is predicted nowhere",
        f"put a cross-entropy beside it, such as {OURS} with thresh=None, min_kept=1.0",
    ),
    "one-pixel": (
        "warning",
        "min_kept=1 is an int and means a single pixel",
        "write 1.0 for every pixel, 1/16 for a share",
    ),
    "reduction": (
        "warning",
        "reduction={reduction!r}: {effect}",
        "leave it out; avg= chooses the divisor",
    ),
    "loss-weight": (
        "warning",
        "loss_weight=0: it is computed and trains nothing",
        "delete it, or set another weight",
    ),
    "sampler-other-loss": (
        "warning",
        "{loss} has no loss for each pixel, so the sampler does not act on it",
        "use the sampler with cross-entropy alone",
    ),
    "hook-idle": (
        "warning",
        f"{{hook}} acts on {OURS}, and no head has one",
        "use that loss, or delete the hook",
    ),
    "not-imported": (
        "warning",
        "type={type!r} is known only once ohem_mm is imported",
        "write 'ohem_mm.{type}', or add custom_imports=dict(imports=['ohem_mm'])",
    ),
    "no-floor": (
        "note",
        "min_kept=0: late in training, when few pixels are hard, little is trained on",
        "set a floor, for example min_kept=1/16",
    ),
    "thresh-below-chance": (
        "note",
        "thresh={thresh:g} is not above chance (1/{classes}): only badly wrong pixels are hard",
        "0.7 is usual",
    ),
    "one-vs-rest": (
        "note",
        "use_sigmoid=True with {channels} channels sums {channels} binary losses a pixel, so "
        "thresh bounds the product of their probabilities",
        "leave use_sigmoid out; or, with two classes, set out_channels=1 in the head",
    ),
    "unit-idle": (
        "note",
        "min_kept_per='image' has no effect on a share, and none with pool={pool!r}",
        "leave it out",
    ),
    "top-k": (
        "note",
        "without thresh the sampler keeps the min_kept pixels with the largest loss",
        "set thresh=0.7 for the thresholded rule",
    ),
    "scaled-gradient": (
        "note",
        "{who} divides by all pixels, so the gradient shrinks by the kept share",
        f"type={OURS!r} with avg='kept' (and no sampler) keeps the scale",
    ),
    "mmseg-unsafe": (
        "note",
        f"{MMSEG} gives a zero without a gradient for a batch with no valid pixel, and NaN when "
        "all valid pixels are tied",
        f"type={OURS!r}, preset='hrnet' is the same rule without these",
    ),
    "not-fused": ("note", "FusedOhemHook leaves this head alone: {reason}", "it is only slower"),
    "could-be-fused": (
        "note",
        "this head upsamples its logits before the loss",
        "custom_hooks=[dict(type='FusedOhemHook')] saves time and memory, with the same numbers",
    ),
    "schedule": (
        "note",
        "OhemScheduleHook changes thresh or min_kept during training",
        "read the table as the settings of the losses alone",
    ),
    "unknown-size": (
        "note",
        "the config does not say how many pixels a {pool} has, so min_kept is not checked",
        "a RandomCrop and a batch_size say it, and for pool='world' a name with _4xb2 in it",
    ),
    "no-heads": ("note", "there is no decode head with a loss", "is this the config of a model?"),
}


class Batch(NamedTuple):
    """What one GPU sees in one step; None where the config does not say."""

    gpus: int | None
    images: int | None
    height: int | None
    width: int | None

    def pixels(self, pool: str = "batch") -> int | None:
        """Pixels of a pool; for 'class', whose size is not known, those of the batch."""
        factors = [self.height, self.width]
        if pool != "image":
            factors.append(self.images)
        if pool == "world":
            factors.append(self.gpus)
        known = [factor for factor in factors if factor]
        return math.prod(known) if len(known) == len(factors) else None


@dataclasses.dataclass
class Row:
    """One loss of one head, and the rule that mines for it.

    Attributes:
        where: Place of the loss in the model.
        rule: What mines: our loss, mmseg's, its sampler, or ''.
        mines: 'yes', 'no' (no OHEM here), 'off' (OHEM that keeps everything on purpose) or
            'inert' (OHEM that cannot work).
        unit: Over what ``min_kept`` as written counts; 'valid' for a share.
        pixels: ``min_kept`` in pixels of its pool, when no pixel is ignored.
        share: The same as a share of the pool.
    """

    where: str
    head_type: str
    loss: str
    ignore_index: int | None
    rule: str = ""
    mines: str = "no"
    thresh: float | None = None
    min_kept: int | float | None = None
    unit: str = ""
    pool: str = ""
    pixels: int | None = None
    share: float | None = None
    divisor: str = ""
    fused: bool | None = None


class Finding(NamedTuple):
    """Something to know, one of ``FINDINGS``, and where it was seen."""

    severity: str
    code: str
    where: str
    what: str
    remedy: str


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

    @property
    def names(self) -> list[str]:
        """Names of its class and of the bases of that, nearest first."""
        return [base.__name__ for base in self.cls.__mro__] if self.cls else [self.type]

    @property
    def other(self) -> tuple[str, str] | None:
        """Entry of ``OTHER_HEADS``, if the head is one of those."""
        return next((OTHER_HEADS[name] for name in self.names if name in OTHER_HEADS), None)

    @property
    def places(self) -> tuple[int, tuple[int, ...]] | None:
        """Entry of ``BY_PLACE``, if the head is one of those."""
        return next((BY_PLACE[name] for name in self.names if name in BY_PLACE), None)

    @property
    def asks_sampler(self) -> bool:
        """Whether its loss looks at the sampler, by the names that its code uses."""
        for base in self.cls.__mro__ if self.cls else ():
            method = vars(base).get("loss_by_feat")
            if method is not None and not (
                "super" in (names := method.__code__.co_names) and "sampler" not in names
            ):
                return "sampler" in names
        return self.cls is None


class Inspector:
    """Reads one config.

    Attributes:
        batch: What one GPU sees in one step.
        rows: Every loss of every head.
        findings: What is wrong or worth knowing, worst first.
    """

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.name = Path(cfg.filename).stem
        self.model = cfg.get("model") or {}
        self.hooks = [cli.type_name(hook) for hook in cfg.get("custom_hooks") or []]
        self.padding = self.model.get("data_preprocessor") or cfg.get("data_preprocessor") or {}
        self.batch = _batch(cfg, self.padding, self.name)
        self.rows: list[Row] = []
        self.findings: list[Finding] = []
        for head in _heads(cfg):
            self._read_head(head)
        self._check_whole()
        self.findings = _merged(self.findings)

    def _add(self, code: str, where: str, **values: Any) -> None:
        severity, what, remedy = FINDINGS[code]
        what, remedy = what.format(**values), remedy.format(**values)
        self.findings.append(Finding(severity, code, where, what, remedy))

    def _inert(self, code: str, row: Row, where: str = "", **values: Any) -> None:
        row.mines = "inert"
        self._add(code, where or row.where, **values)

    def _check_type(self, registry: Registry, where: str, node: Any) -> None:
        """A name that no class is registered under; names of packages that are not here pass."""
        name = node.get("type") if isinstance(node, dict) else None
        scope = self.cfg.get("default_scope") or "mmseg"
        if not isinstance(name, str) or importlib.util.find_spec(scope) is None:
            return
        head, _, bare = name.rpartition(".")
        if head not in ("", scope, "mmengine", "ohem_mm") or _class_of(registry, node, self.cfg):
            return
        known = {*registry.module_dict}
        for child in registry.children.values():
            known |= {*child.module_dict}
        close = difflib.get_close_matches(bare, sorted(known))
        if close:
            remedy = f"did you mean {' or '.join(map(repr, close))}?"
        else:
            remedy = "correct the name, or add the module that registers it to custom_imports"
        self._add("unknown-type", where, type=name, remedy=remedy)

    # --- one head ----------------------------------------------------------------------------

    def _read_head(self, head: Head) -> None:
        built: dict[str, Any] = {}
        rows = []
        self._check_type(MODELS, head.path, head.node)
        if head.sampler:
            self._check_type(TASK_UTILS, f"{head.path}.sampler", head.sampler)
        for place, loss in head.losses.items():
            row = Row(f"{head.path}.{place}", head.type, cli.type_name(loss), head.ignore_index)
            self._check_type(MODELS, row.where, loss)
            if row.loss == OURS:
                built[place] = self._read_ours(head, loss, row)
            elif row.loss == MMSEG:
                self._read_mmseg(head, loss, row)
            elif row.loss == RegionLoss.__name__:
                built[place] = self._read_region(head, loss, row)
            elif cli.type_name(head.sampler) == SAMPLER:
                self._read_sampler(head, loss, row)
            if head.places or head.asks_sampler:
                self._check_loss(head, place, loss, row)
                self._check_ignored(head, row)
            rows.append(row)
        self.rows += rows
        if head.places and len(rows) != head.places[0]:
            expected = head.places[0]
            self._add("loss-count", head.path, head=head.type, expected=expected, length=len(rows))
        if head.sampler:
            self._check_sampler(head, rows)
        if head.other is not None:
            problem, remedy = head.other
            for row in rows:
                if row.rule:
                    self._inert("other-head", row, head=head.type, problem=problem, remedy=remedy)
        elif built and None not in built.values() and head.cls is not None:
            self._check_fused(head, built, rows)

    def _read_ours(self, head: Head, loss: Any, row: Row) -> OhemCrossEntropyLoss | None:
        row.rule, row.mines = OURS, "yes"
        try:
            ours = OhemCrossEntropyLoss(
                **{key: loss[key] for key in loss if key not in ("type", "_scope_")}
            )
        except (TypeError, ValueError, OSError, ImportError) as error:
            self._inert("bad-setting", row, problem=str(error).rstrip("."))
            return None
        rule = ours.rule
        row.thresh, row.min_kept, row.pool = rule.thresh, rule.min_kept, rule.pool
        per_image = rule.min_kept_per == "image"
        self._count(row, per_image and rule.pool in ("batch", "world"))
        row.divisor = f"{rule.avg} pixels" if ours.reduction == "mean" else ours.reduction
        if rule.weighted_mean and ours.class_weight is not None:
            row.divisor = f"weights of {rule.avg} pixels"
        if ours.ignore_index is not None:
            row.ignore_index = ours.ignore_index
        elif head.places and "FusedOhemHook" not in self.hooks:
            row.ignore_index = 255  # these heads do not tell their losses

        if rule.habits.zero_keeps_all and not rule.min_kept:
            row.mines = "off"
        elif row.unit == "valid" and rule.min_kept == 1:
            if rule.thresh is None:
                row.mines = "off"
            else:
                self._inert("thresh-idle", row, reason="min_kept=1.0 keeps every valid pixel")
        elif rule.thresh is None and not rule.min_kept and not rule.always_keep:
            self._inert("keeps-nothing", row)
        else:
            self._check_rule(row)
            if not rule.min_kept:
                self._add("no-floor", row.where)
        if row.unit != "valid" and rule.min_kept == 1:
            self._add("one-pixel", row.where)
        if per_image and (row.unit == "valid" or rule.pool in ("image", "class")):
            self._add("unit-idle", row.where, pool=rule.pool)
        if head.num_classes is not None:
            num_classes = max(2, head.num_classes)
            for cls in rule.always_keep:
                if cls >= num_classes:
                    self._add("always-keep", row.where, cls=cls, num_classes=num_classes)
        if head.channels == 1 and not ours.use_sigmoid:
            self._inert("one-channel", row)
        elif ours.use_sigmoid and (head.channels or 0) > 1:
            self._add("one-vs-rest", row.where, channels=head.channels)
        if ours.reduction == "none":
            effect = "mmseg then takes the mean over all pixels, as avg='all' does"
            self._add("reduction", row.where, reduction="none", effect=effect)
        elif ours.reduction == "sum":
            effect = "the gradient then grows with the number of pixels"
            self._add("reduction", row.where, reduction="sum", effect=effect)
        elif rule.avg == "all" and row.mines == "yes":
            self._add("scaled-gradient", row.where, who="avg='all'")
        return ours

    def _read_region(self, head: Head, loss: Any, row: Row) -> RegionLoss | None:
        try:
            region = RegionLoss(
                **{key: loss[key] for key in loss if key not in ("type", "_scope_")}
            )
        except (TypeError, ValueError, OSError, ImportError) as error:
            self._inert("bad-setting", row, problem=str(error).rstrip("."))
            return None
        if head.channels == 1 and not region.use_sigmoid:
            self._inert("one-channel", row)
        if region.rule.classes == "all" and not region.rule.smooth:
            self._add("absent-classes", row.where)
        if len(head.losses) == 1:
            self._add("region-alone", row.where)
        return region

    def _read_mmseg(self, head: Head, loss: Any, row: Row) -> None:
        row.rule, row.mines, row.pool, row.divisor = MMSEG, "yes", "batch", "kept pixels"
        row.thresh, row.min_kept = loss.get("thres", 0.7), loss.get("min_kept", 100_000)
        row.ignore_index = loss.get("ignore_label", 255)
        problem = _unknown_setting(head, row.loss, loss)
        if not problem and row.thresh is None:
            problem = "stops at the first batch when thres=None, although it is documented"
        elif not problem and not 0 < row.thresh <= 1:
            problem = f"has thres={row.thresh!r}, which is no probability"
        elif not problem and not isinstance(row.min_kept, int):
            problem = f"has min_kept={row.min_kept!r}, which is no number of pixels"
        elif not problem and isinstance(loss.get("class_weight"), str):
            problem = "cannot read class_weight from a file"
        elif not problem and not head.places:
            problem = f"does not take what {head.type} passes to it (TypeError)"
        if problem:
            self._inert("mmseg-loss", row, problem=problem)
            return
        self._count(row)
        self._check_rule(row)
        self._add("mmseg-unsafe", row.where)

    def _read_sampler(self, head: Head, loss: Any, row: Row) -> None:
        row.rule, row.mines, row.pool = SAMPLER, "yes", "batch"
        row.thresh = head.sampler.get("thresh")
        row.min_kept = head.sampler.get("min_kept", 100_000)
        row.divisor = "valid pixels" if loss.get("avg_non_ignore") else "all pixels"
        if loss.get("class_weight"):
            row.divisor = "weights of valid pixels"
        if isinstance(row.min_kept, int):
            self._count(row, per_image=True)

    def _check_sampler(self, head: Head, rows: list[Row]) -> None:
        where, sampler, kind = f"{head.path}.sampler", head.sampler, cli.type_name(head.sampler)
        losses = [row.loss for row in rows]
        if OURS in losses:
            self._add("sampler-beside-loss", where, sampler=kind)
        mined = [row for row in rows if row.rule == SAMPLER]
        if not head.asks_sampler:
            self._add("sampler-idle", where, head=head.type)
            for row in mined:
                row.mines = "inert"
        if not head.asks_sampler or kind != SAMPLER:
            return
        thresh, min_kept = sampler.get("thresh"), sampler.get("min_kept", 100_000)
        problem = _unknown_setting(head, kind, sampler)
        if not problem and (not isinstance(min_kept, int) or min_kept < 2):
            problem = f"refuses min_kept={min_kept!r}: it takes an int of 2 pixels or more"
        elif not problem and thresh is not None and not 0 < thresh <= 1:
            problem = f"has thresh={thresh!r}, which is no probability"
        elif not problem and thresh is not None and head.channels == 1:
            problem = "with a thresh stops at the first batch when the head has one channel"
        elif not problem and "DiceLoss" in losses:
            problem = "beside DiceLoss stops at the first batch"
        if problem:
            self._add("bad-sampler", where, problem=problem)
            for row in mined:
                row.mines = "inert"
            return
        for row in mined:
            self._check_rule(row, where)
        for loss in losses:
            if "CrossEntropy" not in loss:
                self._add("sampler-other-loss", where, loss=loss)
        if thresh is None:
            self._add("top-k", where)
        if any(row.mines == "yes" for row in mined):
            self._add("scaled-gradient", where, who=SAMPLER)

    def _check_rule(self, row: Row, where: str = "") -> None:
        """What holds for every rule: whether the floor or the threshold keeps everything."""
        total = self.batch.pixels(row.pool)
        if total is None and row.unit != "valid":
            self._add("unknown-size", where or row.where, pool=row.pool)
        if row.unit != "valid" and row.share is not None and row.share >= 1:
            pool = {"image": "an image", "world": "the batch of all GPUs"}.get(row.pool)
            pool = pool or "the batch"
            self._inert(
                "min-kept-above-batch", row, where, pixels=row.pixels, pool=pool, total=total
            )
        elif row.thresh == 1:
            self._inert("thresh-idle", row, where, reason="thresh=1 calls every pixel hard")

    def _check_loss(self, head: Head, place: str, loss: Any, row: Row) -> None:
        number = int(place.rpartition(".")[2]) if place[-1].isdigit() else None
        if row.loss == "CrossEntropyLoss" and head.places and number in head.places[1]:
            self._add("ignored-label", row.where, head=head.type)
        softmax = not loss.get("use_sigmoid", False)
        if head.channels and "CrossEntropy" in row.loss and (softmax or row.loss == OURS):
            weight = loss.get("class_weight")
            expected = 2 if head.channels == 1 and not softmax else head.channels
            if isinstance(weight, list | tuple) and len(weight) != expected:
                self._add("class-weight", row.where, length=len(weight), expected=expected)
        if row.loss != OURS and "loss" not in str(loss.get("loss_name", "loss_")):
            self._add("loss-name", row.where, name=loss["loss_name"])
        if row.mines != "no" and loss.get("loss_weight", 1) == 0:
            self._add("loss-weight", row.where)
        classes = max(2, head.channels or 2)
        if row.mines == "yes" and row.thresh is not None and row.thresh <= 1 / classes:
            self._add("thresh-below-chance", row.where, thresh=row.thresh, classes=classes)

    def _check_ignored(self, head: Head, row: Row) -> None:
        ignored = row.ignore_index
        if ignored is None:
            return
        values = {"loss": ignored, "head": head.ignore_index}
        for path, node in cli.iter_dicts(self.cfg.get("train_dataloader"), "train_dataloader"):
            if ".pipeline" in path:
                if "seg_pad_val" in node:
                    values[cli.type_name(node)] = node["seg_pad_val"]
            elif "pipeline" in node and "dataset" not in node:
                cls = _class_of(DATASETS, node, self.cfg)
                values[cli.type_name(node)] = _setting(node, cls, "ignore_index", 255)
                if _setting(node, cls, "reduce_zero_label", False) and ignored != 255:
                    self._add("reduce-zero-label", row.where, ignored=ignored)
        values["padding"] = self.padding.get("seg_pad_val", 255)
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{who} {value}" for who, value in values.items())
            self._add("ignore-index", row.where, values=listed)
        elif head.num_classes is not None and 0 <= ignored < max(2, head.num_classes):
            self._add("ignored-class", row.where, ignored=ignored, num_classes=head.num_classes)

    def _check_fused(self, head: Head, built: dict[str, Any], rows: list[Row]) -> None:
        # The hook's own decision, on a head that has nothing but what the decision looks at.
        bare = nn.Module.__new__(head.cls)
        nn.Module.__init__(bare)
        losses = [
            built.get(place) or type(cli.type_name(loss), (nn.Module,), {})()
            for place, loss in head.losses.items()
        ]
        bare.loss_decode = nn.ModuleList(losses)
        sampler = type(cli.type_name(head.sampler), (nn.Module,), {}) if head.sampler else None
        bare.sampler = sampler() if sampler else None
        bare.ignore_index = head.ignore_index
        function, reason = _fused_function(bare)
        hooked = "FusedOhemHook" in self.hooks
        for row in rows:
            row.fused = hooked and function is not None if row.rule == OURS else None
        if hooked and function is None:
            self._add("not-fused", head.path, reason=reason)
        elif not hooked and function is not None and any(row.mines == "yes" for row in rows):
            self._add("could-be-fused", head.path)

    def _count(self, row: Row, per_image: bool = False) -> None:
        """Fill ``unit``, ``pixels`` and ``share`` from ``min_kept``."""
        total = self.batch.pixels(row.pool)
        assert row.min_kept is not None
        if isinstance(row.min_kept, float):
            row.unit, row.share = "valid", row.min_kept
            row.pixels = None if total is None else int(row.min_kept * total)
            return
        row.unit = "image" if per_image else row.pool
        if not per_image:
            row.pixels = row.min_kept
        elif total and (image := self.batch.pixels("image")):
            row.pixels = row.min_kept * (total // image)
        if total and row.pixels is not None:
            row.share = row.pixels / total

    # --- the whole config --------------------------------------------------------------------

    def _check_whole(self) -> None:
        self._check_lost()
        mines = {row.mines for row in self.rows}
        has_errors = any(finding.severity == "error" for finding in self.findings)
        if not self.rows:
            self._add("no-heads", "model")
        if "ohem" in self.name.lower() and "yes" not in mines and not has_errors:
            self._add("name-says-ohem", "model", name=self.name)
        has_ours = any(row.rule == OURS for row in self.rows)
        has_region = any(row.loss == RegionLoss.__name__ for row in self.rows)
        for place, node in enumerate(self.cfg.get("custom_hooks") or []):
            self._check_type(HOOKS, f"custom_hooks.{place}", node)
        for hook in self.hooks:
            if hook in OUR_HOOKS and not has_ours and not (hook == OUR_HOOKS[0] and has_region):
                self._add("hook-idle", "custom_hooks", hook=hook)
        if has_ours and "OhemScheduleHook" in self.hooks:
            self._add("schedule", "custom_hooks")
        imports = (self.cfg.get("custom_imports") or {}).get("imports") or []
        imports = [imports] if isinstance(imports, str) else imports
        if not any(name.split(".")[0] == "ohem_mm" for name in imports):
            for part in ("model", "custom_hooks"):
                for path, node in cli.iter_dicts(self.cfg.get(part), part):
                    if node.get("type") in (OURS, RegionLoss.__name__, *OUR_HOOKS):
                        self._add("not-imported", path, type=node["type"])

    def _check_lost(self) -> None:
        """OHEM settings, or a whole model, under a top-level key that nothing reads."""
        used = [node for _, node in cli.iter_dicts(self.model)]
        for key in self.cfg:
            if key in ("model", "custom_hooks", "default_hooks"):
                continue
            lost = [
                cli.type_name(node)
                for _, node in cli.iter_dicts(self.cfg[key], key)
                if cli.type_name(node) in (OURS, MMSEG, SAMPLER, *OUR_HOOKS)
                # A variable that the model was made from stays in the config.
                and not any(all(other.get(k) == v for k, v in node.items()) for other in used)
            ]
            meant = "custom_hooks" if lost and lost[0] in OUR_HOOKS else "model"
            alike = difflib.SequenceMatcher(None, key.lower(), meant).ratio() > 0.8
            if lost or (alike and isinstance(self.cfg[key], dict)):
                inside = ", ".join(f"{lost.count(name)} {name}" for name in dict.fromkeys(lost))
                inside = inside and f" ({inside})"
                self._add("lost", key, key=key, inside=inside, meant=meant)


def check(cfg: Any) -> None:
    """Look at a config before it is trained.

    Errors and warnings go to stderr, once for all ranks.

    Raises:
        UserError: The training would stop at its start, or at its first batch.
    """
    found = Inspector(cfg).findings
    for finding in found:
        text = f"{finding.where}: {sentence(finding.what)} Remedy: {sentence(finding.remedy)}"
        if finding.code in FATAL:
            raise cli.UserError(text)
        if finding.severity != "note" and cli.is_first_rank():
            print(f"warning: {text}", file=sys.stderr)


def sentence(text: str) -> str:
    """A text with its full stop, unless it ends already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."


# --- reading configs -------------------------------------------------------------------------


def _batch(cfg: Any, padding: Any, name: str) -> Batch:
    """Size of a training batch, from the loader, the pipeline, the padding and the name."""
    loader = cfg.get("train_dataloader") or {}
    size: Any = None
    for path, node in cli.iter_dicts(loader.get("dataset"), "dataset"):
        if cli.type_name(node) == "RandomCrop":
            size = node["crop_size"]
        elif cli.type_name(node) == "Resize" and not node.get("keep_ratio", False):
            scale = node.get("scale")
            size = scale[::-1] if isinstance(scale, list | tuple) else scale or size
        elif "pipeline" in node and ".pipeline" not in path:
            size = node.get("size", size)  # a data set that draws its images
    in_name = re.search(r"(\d+)x(\d+)$", name)
    size = size or (in_name and (int(in_name[1]), int(in_name[2]))) or (0, 0)
    pad = padding.get("size") or (0, 0)
    size, pad = (pair if isinstance(pair, list | tuple) else (pair, pair) for pair in (size, pad))
    height, width = (max(pair) or None for pair in zip(size, pad, strict=True))
    gpus = re.search(r"_(\d+)xb\d+", name)
    return Batch(int(gpus[1]) if gpus else None, loader.get("batch_size"), height, width)


def _heads(cfg: Any) -> Iterator[Head]:
    """Every dict of the model that is a decode head with losses of its own."""
    for path, node in cli.iter_dicts(cfg.get("model") or {}):
        named = re.search(r"(^|\.)(decode_head|auxiliary_head)(\.\d+)?$", path)
        inner = any("loss_decode" in part for place, part in cli.iter_dicts(node) if place)
        if "type" not in node or not ("loss_decode" in node or (named and not inner)):
            continue
        cls = _class_of(MODELS, node, cfg)
        keys = ["loss_decode"] if "loss_decode" in node else [k for k in node if "loss" in k]
        losses = {key: node[key] for key in keys}
        if not losses:
            losses = {"loss_decode": _setting(node, cls, "loss_decode", {})}
        flat = {
            place: loss
            for place, loss in cli.iter_dicts(losses)
            if place.count(".") < 2 and "type" in loss
        }
        num_classes = node.get("num_classes")
        channels = node.get("out_channels") or num_classes
        ignored = _setting(node, cls, "ignore_index", 255)
        kind, sampler = cli.type_name(node), node.get("sampler")
        yield Head(path, node, kind, cls, flat, sampler, channels, num_classes, ignored)


def _class_of(registry: Any, node: Any, cfg: Any) -> Any:
    """The class that a config's dict names; None when it is not installed here."""
    kind = node.get("type")
    if not isinstance(kind, str):
        return kind
    try:
        with registry.switch_scope_and_registry(cfg.get("default_scope") or "mmseg") as scoped:
            return scoped.get(kind)
    except (ImportError, RuntimeError, KeyError):
        return None


def _setting(node: Any, cls: Any, name: str, fallback: Any) -> Any:
    """A setting as written, or else the default of the class or its nearest base that has one."""
    if name in node:
        return node[name]
    for base in cls.__mro__ if cls else ():
        if "__init__" in vars(base):
            parameter = inspect.signature(base.__init__).parameters.get(name)
            if parameter is not None and parameter.default is not parameter.empty:
                return parameter.default
    return fallback


def _unknown_setting(head: Head, kind: str, node: Any) -> str:
    """A sentence about a setting that mmseg's class does not have, or ''."""
    names = ["ignore_label", "thres", "min_kept", "loss_weight", "class_weight", "loss_name"]
    names = ["thresh", "min_kept"] if kind == SAMPLER else names
    unknown = [key for key in node if key not in ("type", "_scope_", *names)]
    return f"has no setting {unknown[0]!r}; it has {', '.join(names)}" if unknown else ""


def _merged(findings: list[Finding]) -> list[Finding]:
    """Worst first; what holds in several places is said once."""
    places: dict[Finding, list[str]] = {}
    for finding in findings:
        places.setdefault(finding._replace(where=""), []).append(finding.where)
    merged = [
        finding._replace(where=", ".join(dict.fromkeys(where))) for finding, where in places.items()
    ]
    return sorted(merged, key=lambda finding: SEVERITIES.index(finding.severity))
