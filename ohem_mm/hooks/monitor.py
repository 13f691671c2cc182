"""Show what is mined: shares, thresholds and losses of the kept and the dropped pixels."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..loss import OhemCrossEntropyLoss
from ..region import RegionLoss
from ._losses import ohem_losses, region_losses, unwrap

__all__ = ["OhemMonitorHook"]

SCALARS = (
    "kept_share",
    "hard_share",
    "thresh_effective",
    "floor_active",
    "loss_kept",
    "loss_dropped",
)
# What goes to the text log where several losses mine: all six of each would fill the screen.
BRIEF = ("kept_share", "thresh_effective")

_FORWARD = inspect.signature(OhemCrossEntropyLoss.forward)
# A reading, shape (8 + 2 C,): these numbers, then the valid and the kept pixels of each class.
_VALID, _KEPT, _HARD, _SUM_KEPT, _SUM_DROPPED, _POOLS, _FLOORS, _LOWEST = range(8)


@HOOKS.register_module()
class OhemMonitorHook(Hook):  # type: ignore[misc]
    """Log what each :class:`ohem_mm.OhemCrossEntropyLoss` keeps, and warn when it mines in vain.

    At logging steps, and at no other, these are measured for each loss:

    - ``kept_share``: kept pixels, as a share of the valid ones.
    - ``hard_share``: pixels whose true class has a probability below ``thresh``, likewise. Not with
      ``thresh=None``.
    - ``thresh_effective``: the probability below which pixels were kept in fact: ``thresh``, or
      more where the floor ``min_kept`` reached higher (with several pools, the highest).
    - ``floor_active``: 1 if the floor kept pixels that are not hard, else 0; with pool 'image' or
      'class', the share of the pools in which it did. Not with ``thresh=None``.
    - ``loss_kept``, ``loss_dropped``: mean unweighted loss of the pixels that are kept, and of
      those that are not; 0 where there are none.
    - ``kept_share_<class>``: of the ground-truth pixels of a class, the share that is kept; not in
      steps where the class is absent.

    They are written as ``train/ohem/<head>/<what>``. All reach the visualisation backends
    (TensorBoard, W&B, MLflow, ``scalars.json``). The six, of a model with one such loss, go there
    through the message hub and so appear in the text log as well; where several losses mine, only
    ``kept_share`` and ``thresh_effective`` do. The values of the classes, and all others, are in
    the message hub under ``get_info('train/ohem/<head>')``, a dict that the log leaves out. A head
    with several losses has one entry for each, ``<head>.<place in its list>``.

    Of each :class:`ohem_mm.RegionLoss` the ``overlap`` of the batch is written, the mean score over
    the classes present, and ``overlap_<class>``, as ``train/region/<head>/<what>``. The mean is in
    the text log, the classes are where those of the mining are. With pool 'world' it is the overlap
    of all ranks.

    A step whose pixels are all ignored is left out. In distributed training the values are those of
    rank 0's batch, and the other ranks do nothing. Where gradients are accumulated, they are those
    of the last small batch. Models that mmengine compiles (``compile`` in the config) cannot be
    listened to; a warning says so.

    The start of the log says of each head whether it mines, and with what settings. Warnings come
    once for each loss: nothing was dropped, the floor alone decided, or a class was never kept, in
    ``patience`` measurements one after another (of those in which the class was present). A resumed
    training counts anew.

    Args:
        interval: Iterations between measurements. None: those of the LoggerHook.
        patience: Measurements in a row before a warning.

    Raises:
        ValueError: ``interval`` or ``patience`` is not an int above 0.
    """

    def __init__(self, interval: int | None = None, patience: int = 20) -> None:
        for name, value in (("interval", interval), ("patience", patience)):
            if value is None and name == "interval":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int above 0, but got {value!r}.")
        self.interval = interval
        self.patience = patience
        self._losses: dict[str, OhemCrossEntropyLoss] = {}
        self._regions: dict[str, RegionLoss] = {}
        self._overlaps: dict[str, list[Tensor]] = {}
        self._in_log: Sequence[str] = SCALARS
        self._classes: Sequence[str] = ()
        self._handles: list[Any] = []
        self._readings: dict[str, list[Tensor]] = {}
        self._streaks: dict[str, dict[str, int]] = {}
        self._warned: set[tuple[str, str]] = set()

    def before_train(self, runner: Any) -> None:
        """Say which heads mine, and prepare."""
        compiled = bool(runner.cfg.get("compile"))
        if compiled:
            runner.logger.warning(
                "OhemMonitorHook: nothing is recorded: a model under torch.compile cannot be "
                "listened to. Leave `compile` out of the config for a run that is monitored."
            )
        listens = not compiled and is_main_process()
        self._losses = ohem_losses(runner.model) if listens else {}
        self._regions = region_losses(runner.model) if listens else {}
        self._in_log = SCALARS if len(self._losses) == 1 else BRIEF
        self._streaks = {name: defaultdict(int) for name in self._losses}
        self._warned = set()
        metainfo = getattr(runner.train_dataloader.dataset, "metainfo", {})
        self._classes = metainfo.get("classes") or ()
        for line in describe(unwrap(runner.model)):
            runner.logger.info(f"OhemMonitorHook: {line}")
        # mmengine smooths everything with "loss" in its name over ten values, which here would be
        # ten logging steps. Ask for the latest one, as it shows the rest.
        known = {entry["data_src"] for entry in runner.log_processor.custom_cfg}
        sources = [f"ohem/{name}/{what}" for name in self._losses for what in self._in_log]
        sources += [f"region/{name}/overlap" for name in self._regions]
        for source in sources:
            if source not in known and re.search(runner.log_processor.mean_pattern, source):
                entry = {"data_src": source, "method_name": "current"}
                runner.log_processor.custom_cfg.append(entry)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any | None = None) -> None:
        """At logging steps, listen to the losses."""
        self._stop_listening()
        if not self._is_logging_step(runner, batch_idx):
            return
        self._readings = {name: [] for name in self._losses}
        for name, loss in self._losses.items():
            record = functools.partial(_record, self._readings[name])
            self._handles += [
                loss.register_forward_pre_hook(_ask_for_maps, with_kwargs=True),
                loss.register_forward_hook(record, with_kwargs=True),
            ]
        self._overlaps = {name: [] for name in self._regions}
        for name, region in self._regions.items():
            record = functools.partial(_record_overlap, self._overlaps[name])
            self._handles += [
                region.register_forward_pre_hook(_ask_for_stats, with_kwargs=True),
                region.register_forward_hook(record, with_kwargs=True),
            ]

    def after_train_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any | None = None,
        outputs: dict[str, Any] | None = None,
    ) -> None:
        """At logging steps, write what was measured."""
        if not self._handles:
            return
        self._stop_listening()
        found = [*self._readings.values(), *self._overlaps.values()]
        readings = [reading for several in found for reading in several]
        # The one place where the host waits for the device: all numbers in one transfer.
        numbers = iter(torch.cat(readings).tolist() if readings else [])
        backends = {}
        prefix = "train/" if runner.log_processor.log_with_hierarchy else ""
        for name, several in self._readings.items():
            if not several:
                self._warn(
                    runner,
                    name,
                    "silent",
                    "was not called in a logging step, so nothing is recorded. It may be unused "
                    "or compiled.",
                )
                continue
            total = combine([[next(numbers) for _ in range(len(reading))] for reading in several])
            values = summarize(total, self._losses[name].rule.thresh)
            if not values:
                continue
            shares = class_shares(total)
            values |= {
                f"kept_share_{self._class_name(place, num_classes(total))}": share
                for place, share in shares.items()
            }
            for what, value in values.items():
                if what in self._in_log:
                    runner.message_hub.update_scalar(f"train/ohem/{name}/{what}", value)
                else:
                    backends[f"{prefix}ohem/{name}/{what}"] = value
            runner.message_hub.update_info(f"train/ohem/{name}", values, resumed=False)
            self._judge(runner, name, values, total)
        for name, several in self._overlaps.items():
            calls = [[next(numbers) for _ in range(len(reading))] for reading in several]
            values = self._overlap_values(calls, self._regions[name].use_sigmoid)
            for what, value in values.items():
                if what == "overlap":
                    runner.message_hub.update_scalar(f"train/region/{name}/{what}", value)
                else:
                    backends[f"{prefix}region/{name}/{what}"] = value
            if values:
                runner.message_hub.update_info(f"train/region/{name}", values, resumed=False)
        if backends:
            # W&B ignores the step; with "iter" its curves can be drawn over the iterations.
            runner.visualizer.add_scalars({**backends, "iter": runner.iter + 1}, runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """Leave the losses as they were."""
        self._stop_listening()

    def _stop_listening(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _is_logging_step(self, runner: Any, batch_idx: int) -> bool:
        """Whether the LoggerHook writes after this iteration, or would with our interval."""
        logger = next((hook for hook in runner.hooks if isinstance(hook, LoggerHook)), None)
        interval = self.interval or (logger.interval if logger else 10)
        if self.every_n_inner_iters(batch_idx, interval):
            return True
        ignore_last = logger.ignore_last if logger else True
        return bool(
            self.end_of_epoch(runner.train_dataloader, batch_idx)
            and (not ignore_last or len(runner.train_dataloader) <= interval)
        )

    def _overlap_values(
        self, calls: Sequence[Sequence[float]], use_sigmoid: bool
    ) -> dict[str, float]:
        """The values to log of a region loss, from its scores; empty where no class is present."""
        scores = {}
        for place, column in enumerate(zip(*calls, strict=True)):
            present = [score for score in column if not math.isnan(score)]
            if present:
                scores[place] = sum(present) / len(present)
        if not scores:
            return {}
        one = use_sigmoid and len(calls[0]) == 1  # its channel is that of class 1
        classes = 2 if one else len(calls[0])
        return {"overlap": sum(scores.values()) / len(scores)} | {
            f"overlap_{self._class_name(place + one, classes)}": score
            for place, score in scores.items()
        }

    def _class_name(self, place: int, classes: int) -> str:
        """Name of a class as part of a tag, of letters that every backend accepts."""
        if len(self._classes) != classes:
            return str(place)
        return re.sub(r"[^\w.-]+", "_", self._classes[place].strip())

    def _judge(
        self, runner: Any, name: str, values: dict[str, float], total: Sequence[float]
    ) -> None:
        """Count how often in a row mining was in vain, and warn where that is `patience` times."""
        thresh, min_kept = self._losses[name].rule.thresh, self._losses[name].min_kept
        everything = total[_KEPT] == total[_VALID]
        floor_alone = values.get("floor_active") == 1 and not everything
        times = f"in the last {self.patience} measurements"
        if self._streak(name, "inert", everything and not _is_off(self._losses[name])):
            if total[_HARD] == total[_VALID]:
                cause = f"all pixels had a probability below thresh={thresh}; use a lower thresh."
            else:
                cause = (
                    f"the floor min_kept={min_kept} is as large as the pixels there are; use a "
                    "smaller one, or a share such as 1/16."
                )
            self._warn(
                runner, name, "inert", f"dropped nothing {times}, so mining has no effect: {cause}"
            )
        if self._streak(name, "starved", floor_alone):
            self._warn(
                runner,
                name,
                "starved",
                f"kept pixels by its floor {times}: fewer than min_kept={min_kept} had a "
                f"probability below thresh={thresh}, so thresh decided nothing. Use a smaller "
                "min_kept or a higher thresh, or thresh=None if you want the hardest pixels alone.",
            )
        never = [
            place
            for place, share in class_shares(total).items()
            if self._streak(name, f"class {place}", share == 0)
            and (name, f"class {place}") not in self._warned
        ]
        if never:
            self._warned |= {(name, f"class {place}") for place in never}
            titles = ", ".join(self._class_name(place, num_classes(total)) for place in never)
            runner.logger.warning(
                f"OhemMonitorHook: {name}: no pixel was kept of {titles} {times} that saw "
                f"{'it' if len(never) == 1 else 'them'}. That is well where the IoU is high; else "
                f"use pool='class' or always_keep={never}."
            )

    def _streak(self, name: str, what: str, happened: bool) -> bool:
        """Count; True once it happened `patience` times in a row."""
        streaks = self._streaks[name]
        streaks[what] = streaks[what] + 1 if happened else 0
        return streaks[what] >= self.patience

    def _warn(self, runner: Any, name: str, what: str, message: str) -> None:
        if (name, what) not in self._warned:
            self._warned.add((name, what))
            runner.logger.warning(f"OhemMonitorHook: {name}: {message}")


# --- measuring ---------------------------------------------------------------------------------


def _ask_for_maps(loss: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    stats = {} if kwargs.get("stats") is None else kwargs["stats"]
    stats.setdefault("kept", None)  # asks for the maps on every path
    return args, {**kwargs, "stats": stats}


def _record(
    readings: list[Tensor], loss: OhemCrossEntropyLoss, args: Any, kwargs: Any, output: Tensor
) -> None:
    given = _FORWARD.bind(loss, *args, **kwargs).arguments
    if given["target"].numel():
        readings.append(read(loss, given["pred"], given["target"], given["stats"]))


def _ask_for_stats(loss: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, {**kwargs, "stats": {} if kwargs.get("stats") is None else kwargs["stats"]}


def _record_overlap(
    readings: list[Tensor], loss: RegionLoss, args: Any, kwargs: Any, output: Tensor
) -> None:
    readings.append(kwargs["stats"]["overlap"])


@torch.no_grad()
def read(
    loss: OhemCrossEntropyLoss, logits: Tensor, target: Tensor, stats: dict[str, Tensor]
) -> Tensor:
    """Reduce the maps of one call of a loss, on their device.

    Args:
        loss: The loss that was called.
        logits: Its logits, shape (N, C, ...).
        target: Its labels, shape (N, ...) or (N, 1, ...), not empty.
        stats: What it filled in: 'valid', 'kept' (weights) and 'mined', each of shape (N, ...).

    Returns:
        The numbers that all values follow from, shape (8 + 2 C,).
    """
    valid, kept, mined = stats["valid"], stats["kept"], stats["mined"]
    classes = 2 if loss.use_sigmoid and logits.shape[1] == 1 else logits.shape[1]
    label = torch.where(valid, target.reshape(valid.shape), classes)
    # NaN is mined as the hardest.
    rank = mined.nan_to_num(nan=math.inf, posinf=math.inf)
    rule = loss.rule
    limit = math.inf if rule.thresh is None else -math.log(rule.thresh)
    hard = valid & (rank > limit)
    lifted = (kept > 0) & ~hard  # by the floor
    for place in rule.always_keep:
        lifted &= label != place

    # Counts of pixels need more than the 24 bits of float32, which is all that MPS has.
    dtype = torch.float32 if mined.device.type == "mps" else torch.float64

    def of_each_class(weights: Tensor) -> Tensor:
        # The last bin collects the rest.
        sums = torch.zeros(classes + 1, dtype=dtype, device=label.device)
        return sums.index_add_(0, label.flatten(), weights.flatten().to(dtype))[:classes]

    valid_of_class = of_each_class(valid)
    if rule.pool == "class":
        pools, floors = valid_of_class > 0, of_each_class(lifted) > 0
    elif rule.pool == "image":
        pools, floors = valid.flatten(1).any(1), lifted.flatten(1).any(1)
    else:
        pools, floors = valid.any(), lifted.any()
    numbers = (
        valid.sum(),
        kept.sum(dtype=dtype),
        hard.sum(),
        torch.where(kept > 0, kept * mined, 0).sum(),
        torch.where(valid & (kept < 1), (1 - kept) * mined, 0).sum(),
        pools.sum(),
        floors.sum(),
        torch.where(lifted, rank, math.inf).amin(),
    )
    parts = (torch.stack([n.to(dtype) for n in numbers]), valid_of_class, of_each_class(kept))
    return torch.cat([part.to(dtype) for part in parts])


def combine(numbers: Sequence[Sequence[float]]) -> list[float]:
    """Add up the numbers of several calls of one loss."""
    total = [math.fsum(column) for column in zip(*numbers, strict=True)]
    total[_LOWEST] = min(row[_LOWEST] for row in numbers)
    return total


def num_classes(total: Sequence[float]) -> int:
    """Number of classes that the numbers of a reading are about."""
    return (len(total) - _LOWEST - 1) // 2


def summarize(total: Sequence[float], thresh: float | None) -> dict[str, float]:
    """The values to log, from the numbers of a reading; empty where no pixel is valid."""
    valid, kept, hard, sum_kept, sum_dropped, pools, floors, lowest = total[: _LOWEST + 1]
    if not valid:
        return {}
    values = {"kept_share": kept / valid}
    if thresh is not None:
        values["hard_share"] = hard / valid
    if floors or thresh is not None:
        values["thresh_effective"] = max(math.exp(-lowest) if floors else 0.0, thresh or 0.0)
    if thresh is not None:
        values["floor_active"] = floors / pools
    values["loss_kept"] = sum_kept / kept if kept else 0.0
    values["loss_dropped"] = sum_dropped / (valid - kept) if valid > kept else 0.0
    return values


def class_shares(total: Sequence[float]) -> dict[int, float]:
    """Share of the kept pixels of each class that is present."""
    classes = num_classes(total)
    valid, kept = total[_LOWEST + 1 : _LOWEST + 1 + classes], total[_LOWEST + 1 + classes :]
    return {place: kept[place] / valid[place] for place in range(classes) if valid[place]}


# --- describing --------------------------------------------------------------------------------


def describe(model: nn.Module) -> list[str]:
    """Say of every head of a model whether it mines, and with what settings; one line each."""
    lines = []
    told: set[int] = set()
    for name, head in model.named_modules():
        found = getattr(head, "loss_decode", None)
        if not isinstance(found, nn.Module):
            continue
        losses = list(found) if isinstance(found, nn.ModuleList) else [found]
        told |= {id(loss) for loss in losses}
        words = []
        for place, loss in enumerate(losses):
            start = f"loss {place} " if len(losses) > 1 else ""
            words.append(start + _describe_loss(loss, getattr(head, "ignore_index", None)))
        sampler = getattr(head, "sampler", None)
        if sampler is not None:
            words.append(f"its {type(sampler).__name__} drops pixels too and is not monitored")
        lines.append(f"{name} ({type(head).__name__}): {'; '.join(words)}")
    lines += [
        f"{name}: {_describe_loss(loss, None)}"
        for name, loss in ohem_losses(model).items()
        if id(loss) not in told
    ]
    return lines or ["the model has no loss that mines"]


def _is_off(loss: OhemCrossEntropyLoss) -> bool:
    """Whether ``min_kept`` says that nothing shall be dropped, as in a warm-up."""
    if not loss.rule.min_kept:
        return loss.rule.habits.zero_keeps_all
    return isinstance(loss.rule.min_kept, float) and loss.rule.min_kept == 1


def _describe_loss(loss: nn.Module, head_ignores: int | None) -> str:
    if not isinstance(loss, OhemCrossEntropyLoss):
        if type(loss).__name__ == "OhemCrossEntropy":
            return "mines with mmseg's OhemCrossEntropy, which is not monitored"
        if isinstance(loss, RegionLoss):
            return _describe_region(loss)
        return f"does not mine ({type(loss).__name__})"
    pool = {
        "batch": "the batch",
        "image": "each image",
        "class": "each class",
        "world": "the batches of all ranks",
    }[loss.rule.pool]
    if isinstance(loss.rule.min_kept, float):
        floor = f"{100 * loss.rule.min_kept:.4g} % of the valid pixels of {pool}"
    elif loss.rule.min_kept_per == "image" and loss.rule.pool in ("batch", "world"):
        floor = f"{loss.rule.min_kept} pixels for each image of {pool}"
    else:
        floor = f"{loss.rule.min_kept} pixels of {pool}"
    if _is_off(loss):
        rule = f"keeps every valid pixel as long as min_kept={loss.rule.min_kept}"
    elif loss.rule.thresh is None:
        rule = f"keeps the hardest {floor}"
    else:
        rule = f"keeps pixels whose true class has a probability below {loss.rule.thresh}"
        if loss.rule.min_kept:
            rule += f", at least {floor}"
    words = [f"mines: {rule}"]
    if loss.rule.always_keep:
        words.append(f"always keeps the classes {list(loss.rule.always_keep)}")
    words.append(f"averages over the {loss.rule.avg} pixels")
    if loss.ignore_index is not None:
        words.append(f"ignore_index {loss.ignore_index}")
    else:
        words.append(f"ignore_index {255 if head_ignores is None else head_ignores} (of the head)")
    weights = loss.class_weight
    words.append("no class weights" if weights is None else f"class weights {weights.tolist()}")
    return ", ".join(words)


def _describe_region(loss: RegionLoss) -> str:
    rule = loss.rule
    pool = {
        "batch": "the batch",
        "image": "each image",
        "world": "the batches of all ranks",
    }[rule.pool]
    words = [f"asks for overlap: {rule.kind} over {pool}"]
    if rule.kind == "tversky":
        words[0] += f" (alpha {rule.alpha:g}, beta {rule.beta:g})"
    words.append("all classes" if rule.classes == "all" else "classes present")
    words += [f"{name} {value:g}" for name, value in _changed(loss).items()]
    weights = loss.class_weight
    words.append("no class weights" if weights is None else f"class weights {weights.tolist()}")
    return ", ".join(words)


def _changed(loss: RegionLoss) -> dict[str, float]:
    """Numbers of a region loss that differ from what they are by default."""
    default = RegionLoss()
    names = ("gamma", "smooth", "label_smoothing", "loss_weight")
    return {
        name: getattr(loss, name) for name in names if getattr(loss, name) != getattr(default, name)
    }
