"""One head of a config: which rule mines for each of its losses, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mmengine.registry import DATASETS, MODELS, TASK_UTILS
from torch import nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, cli
from ohem_mm.cli.inspection.mmseg import (
    BY_PLACE,
    MMSEG,
    OTHER_HEADS,
    SAMPLER,
    asks_sampler,
    problem_of_loss,
    problem_of_sampler,
)
from ohem_mm.cli.inspection.reading import Reading, setting
from ohem_mm.hooks.fused import _fused_function

OURS, REGION = OhemCrossEntropyLoss.__name__, RegionLoss.__name__
KINDS: dict[str, Any] = {OURS: OhemCrossEntropyLoss, REGION: RegionLoss}


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


class Head:
    """A decode head of a config: a row for each of its losses, and what is added to the findings.

    ``cls``, whose defaults fill in what is not written, is None when it is not installed.
    """

    def __init__(self, reading: Reading, path: str, node: Any) -> None:
        self.reading, self.add, self.batch = reading, reading.add, reading.batch
        self.path, self.type, self.sampler = path, cli.type_name(node), node.get("sampler")
        self.cls = reading.class_of(MODELS, node)
        self.num_classes = node.get("num_classes")
        self.channels = node.get("out_channels") or self.num_classes
        self.ignore_index = setting(node, self.cls, "ignore_index", 255)
        names = ["loss_decode"] if "loss_decode" in node else [key for key in node if "loss" in key]
        losses = {name: node[name] for name in names}
        losses = losses or {"loss_decode": setting(node, self.cls, "loss_decode", {})}
        self.losses = {
            place: loss
            for place, loss in cli.iter_dicts(losses)
            if place.count(".") < 2 and "type" in loss
        }
        self.by_place = self._entry(BY_PLACE)
        self.asks_sampler = self.cls is None or asks_sampler(self.cls)
        self.rows: list[Row] = []
        self.built: dict[str, Any] = {}
        reading.check_type(MODELS, path, node)
        if self.sampler:
            reading.check_type(TASK_UTILS, f"{path}.sampler", self.sampler)
        for place, loss in self.losses.items():
            self._read_loss(place, loss)
        self._check()

    def _entry(self, table: dict[str, Any]) -> Any:
        """Entry of a table of heads, by the name of its class or of the nearest base; or None."""
        names = [base.__name__ for base in self.cls.__mro__] if self.cls else [self.type]
        return next((table[name] for name in names if name in table), None)

    def _check(self) -> None:
        count, expected = len(self.rows), self.by_place and self.by_place[0]
        if expected and count != expected:
            self.add("loss-count", self.path, head=self.type, expected=expected, length=count)
        if self.sampler:
            self._check_sampler()
        if other := self._entry(OTHER_HEADS):
            for row in filter(lambda row: row.rule, self.rows):
                values = {"head": self.type, "problem": other[0], "remedy": other[1]}
                self._inert("other-head", row, **values)
        elif self.built and None not in self.built.values() and self.cls is not None:
            self._check_fused()
            self._check_pair()

    @property
    def mines(self) -> bool:
        """Whether any of its losses drops pixels."""
        return any(row.mines == "yes" for row in self.rows)

    def _inert(self, code: str, row: Row, where: str = "", **values: Any) -> None:
        row.mines = "inert"
        self.add(code, where or row.where, **values)

    # --- which rule mines ------------------------------------------------------------------

    def _read_loss(self, place: str, loss: Any) -> None:
        row = Row(f"{self.path}.{place}", self.type, cli.type_name(loss), self.ignore_index)
        self.reading.check_type(MODELS, row.where, loss)
        if row.loss == OURS:
            row.rule, row.mines = OURS, "yes"
        if kind := KINDS.get(row.loss):
            self.built[place] = built = self._build(kind, loss, row)
            if built is not None:
                (self._read_ours if kind is OhemCrossEntropyLoss else self._read_region)(built, row)
        elif row.loss == MMSEG:
            self._read_mmseg(loss, row)
        elif cli.type_name(self.sampler) == SAMPLER:
            self._read_sampler(loss, row)
        if self.by_place or self.asks_sampler:
            self._check_loss(place, loss, row)
            self._check_ignored(row)
        self.rows.append(row)

    def _build(self, kind: Any, loss: Any, row: Row) -> Any:
        """The loss itself, which checks its settings; None where one is bad."""
        try:
            return kind(**cli.settings_of(loss))
        except (TypeError, ValueError, OSError, ImportError) as error:
            self._inert("bad-setting", row, problem=str(error).rstrip("."))
            return None

    def _read_ours(self, ours: OhemCrossEntropyLoss, row: Row) -> None:
        rule, where = ours.rule, row.where
        row.thresh, row.min_kept, row.pool = rule.thresh, rule.min_kept, rule.pool
        per_image = rule.min_kept_per == "image"
        self._count(row, per_image and rule.pool in ("batch", "world"))
        row.divisor = f"{rule.avg} pixels" if ours.reduction == "mean" else ours.reduction
        if rule.weighted_mean and ours.class_weight is not None:
            row.divisor = f"weights of {rule.avg} pixels"
        if ours.ignore_index is not None:
            row.ignore_index = ours.ignore_index
        elif self.by_place and "FusedOhemHook" not in self.reading.hooks:
            row.ignore_index = 255  # these heads do not tell their losses

        if rule.keeps_all and (rule.thresh is None or not rule.min_kept):
            row.mines = "off"
        elif rule.keeps_all:
            self._inert("thresh-idle", row, reason="min_kept=1.0 keeps every valid pixel")
        elif rule.thresh is None and not rule.min_kept and not rule.always_keep:
            self._inert("keeps-nothing", row)
        else:
            self._check_rule(row)
            self.add("no-floor", where, not rule.min_kept)
        self.add("one-pixel", where, row.unit != "valid" and rule.min_kept == 1)
        idle = row.unit == "valid" or rule.pool in ("image", "class")
        self.add("unit-idle", where, per_image and idle, pool=rule.pool)
        num_classes = math.inf if self.num_classes is None else max(2, self.num_classes)
        for cls in rule.always_keep:
            self.add("always-keep", where, cls >= num_classes, cls=cls, num_classes=num_classes)
        if self.channels == 1 and not ours.use_sigmoid:
            self._inert("one-channel", row)
        elif ours.use_sigmoid and (self.channels or 0) > 1:
            self.add("one-vs-rest", where, channels=self.channels)
        effects = {
            "none": "mmseg then takes the mean over all pixels, as avg='all' does",
            "sum": "the gradient then grows with the number of pixels",
        }
        if effect := effects.get(ours.reduction):
            self.add("reduction", where, reduction=ours.reduction, effect=effect)
        elif rule.avg == "all" and row.mines == "yes":
            self.add("scaled-gradient", where, who="avg='all'")

    def _read_region(self, region: RegionLoss, row: Row) -> None:
        if self.channels == 1 and not region.use_sigmoid:
            self._inert("one-channel", row)
        rule = region.rule
        self.add("absent-classes", row.where, rule.classes == "all" and not rule.smooth)
        self.add("region-alone", row.where, len(self.losses) == 1)

    def _read_mmseg(self, loss: Any, row: Row) -> None:
        row.rule, row.mines, row.pool, row.divisor = MMSEG, "yes", "batch", "kept pixels"
        row.thresh, row.min_kept = loss.get("thres", 0.7), loss.get("min_kept", 100_000)
        row.ignore_index = loss.get("ignore_label", 255)
        problem = problem_of_loss(loss, row.thresh, row.min_kept)
        if not problem and not self.by_place:
            problem = f"does not take what {self.type} passes to it (TypeError)"
        if problem:
            self._inert("mmseg-loss", row, problem=problem)
            return
        self._count(row)
        self._check_rule(row)
        self.add("mmseg-unsafe", row.where)

    def _read_sampler(self, loss: Any, row: Row) -> None:
        sampler = self.sampler
        row.rule, row.mines, row.pool = SAMPLER, "yes", "batch"
        row.thresh, row.min_kept = sampler.get("thresh"), sampler.get("min_kept", 100_000)
        row.divisor = "valid pixels" if loss.get("avg_non_ignore") else "all pixels"
        if loss.get("class_weight"):
            row.divisor = "weights of valid pixels"
        if isinstance(row.min_kept, int):
            self._count(row, per_image=True)

    def _count(self, row: Row, per_image: bool = False) -> None:
        """Fill ``unit``, ``pixels`` and ``share`` from ``min_kept``."""
        total, k = self.batch.pixels(row.pool), row.min_kept
        assert k is not None
        if isinstance(k, float):
            row.unit, row.share = "valid", k
            row.pixels = None if total is None else int(k * total)
            return
        row.unit, row.pixels = ("image", None) if per_image else (row.pool, k)
        if per_image and total and (image := self.batch.pixels("image")):
            row.pixels = k * (total // image)
        if total and row.pixels is not None:
            row.share = row.pixels / total

    # --- what is wrong with it -------------------------------------------------------------

    def _check_rule(self, row: Row, where: str = "") -> None:
        """What holds for every rule: whether the floor or the threshold keeps everything."""
        total = self.batch.pixels(row.pool)
        unknown = total is None and row.unit != "valid"
        self.add("unknown-size", where or row.where, unknown, pool=row.pool)
        if row.unit != "valid" and row.share is not None and row.share >= 1:
            pools = {"image": "an image", "world": "the batch of all GPUs"}
            pool, code = pools.get(row.pool, "the batch"), "min-kept-above-batch"
            self._inert(code, row, where, pixels=row.pixels, pool=pool, total=total)
        elif row.thresh == 1:
            self._inert("thresh-idle", row, where, reason="thresh=1 calls every pixel hard")

    def _check_loss(self, place: str, loss: Any, row: Row) -> None:
        where = row.where
        number = int(place.rpartition(".")[2]) if place[-1].isdigit() else None
        hidden = self.by_place and number in self.by_place[1]
        self.add("ignored-label", where, hidden and row.loss == "CrossEntropyLoss", head=self.type)
        softmax = not loss.get("use_sigmoid", False)
        if self.channels and "CrossEntropy" in row.loss and (softmax or row.loss == OURS):
            weight = loss.get("class_weight")
            expected = 2 if self.channels == 1 and not softmax else self.channels
            if isinstance(weight, list | tuple) and len(weight) != expected:
                self.add("class-weight", where, length=len(weight), expected=expected)
        name, classes = loss.get("loss_name", "loss_"), max(2, self.channels or 2)
        self.add("loss-name", where, row.loss != OURS and "loss" not in str(name), name=name)
        self.add("loss-weight", where, row.mines != "no" and loss.get("loss_weight", 1) == 0)
        if row.mines == "yes" and row.thresh is not None and row.thresh <= 1 / classes:
            self.add("thresh-below-chance", where, thresh=row.thresh, classes=classes)

    def _check_ignored(self, row: Row) -> None:
        ignored, num_classes = row.ignore_index, self.num_classes
        if ignored is None:
            return
        values = {"loss": ignored, "head": self.ignore_index}
        loader = self.reading.cfg.get("train_dataloader")
        for path, node in cli.iter_dicts(loader, "train_dataloader"):
            if ".pipeline" in path:
                if "seg_pad_val" in node:
                    values[cli.type_name(node)] = node["seg_pad_val"]
            elif "pipeline" in node and "dataset" not in node:
                cls = self.reading.class_of(DATASETS, node)
                values[cli.type_name(node)] = setting(node, cls, "ignore_index", 255)
                if setting(node, cls, "reduce_zero_label", False) and ignored != 255:
                    self.add("reduce-zero-label", row.where, ignored=ignored)
        values["padding"] = self.reading.padding.get("seg_pad_val", 255)
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{who} {value}" for who, value in values.items())
            self.add("ignore-index", row.where, values=listed)
        elif num_classes is not None and 0 <= ignored < max(2, num_classes):
            self.add("ignored-class", row.where, ignored=ignored, num_classes=num_classes)

    def _check_sampler(self) -> None:
        where, kind = f"{self.path}.sampler", cli.type_name(self.sampler)
        losses = [row.loss for row in self.rows]
        mined = [row for row in self.rows if row.rule == SAMPLER]
        self.add("sampler-beside-loss", where, OURS in losses, sampler=kind)
        if not self.asks_sampler:
            self.add("sampler-idle", where, head=self.type)
        elif kind != SAMPLER:
            return
        elif problem := problem_of_sampler(self.sampler, losses, self.channels):
            self.add("bad-sampler", where, problem=problem)
        else:
            for row in mined:
                self._check_rule(row, where)
            for loss in losses:
                self.add("sampler-other-loss", where, "CrossEntropy" not in loss, loss=loss)
            self.add("top-k", where, self.sampler.get("thresh") is None)
            scales = any(row.mines == "yes" for row in mined)
            self.add("scaled-gradient", where, scales, who=SAMPLER)
            return
        for row in mined:
            row.mines = "inert"

    def _check_fused(self) -> None:
        # The hook's own decision, on a head that has nothing but what the decision looks at.
        bare = nn.Module.__new__(self.cls)
        nn.Module.__init__(bare)
        bare.loss_decode = nn.ModuleList(
            self.built.get(place) or _stand_in(loss) for place, loss in self.losses.items()
        )
        bare.sampler = _stand_in(self.sampler) if self.sampler else None
        bare.ignore_index = self.ignore_index
        function, reason = _fused_function(bare)
        hooked, fits = "FusedOhemHook" in self.reading.hooks, function is not None
        for row in self.rows:
            row.fused = hooked and fits if row.rule == OURS else None
        self.add("not-fused", self.path, hooked and not fits, reason=reason)
        self.add("could-be-fused", self.path, self.mines and fits and not hooked)

    def _check_pair(self) -> None:
        regions = any(row.loss == REGION for row in self.rows)
        self.add("mined-region", self.path, self.mines and regions)


def _stand_in(node: Any) -> nn.Module:
    """A module that has nothing but the name of its class."""
    module: nn.Module = type(cli.type_name(node), (nn.Module,), {})()
    return module
