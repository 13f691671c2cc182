"""Show what is mined: shares, thresholds and losses of the kept and the dropped pixels."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from torch import Tensor

from ..loss import OhemCrossEntropyLoss
from ..region import RegionLoss
from ..rule import is_int
from ._losses import Listener, named_losses, unwrap
from .describing import describe
from .readings import BRIEF, SCALARS, Measured, read

__all__ = ["OhemMonitorHook"]


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
        checked = {"interval": 1 if interval is None else interval, "patience": patience}
        for name, value in checked.items():
            if not is_int(value) or value < 1:
                raise ValueError(f"{name} must be an int above 0, but got {value!r}.")
        self.interval = interval
        self.patience = patience
        self._losses: dict[str, OhemCrossEntropyLoss] = {}
        self._regions: dict[str, RegionLoss] = {}
        self._in_log: Sequence[str] = ()
        self._classes: Sequence[str] = ()
        self._listener = Listener()
        # What was measured in this step, by kind and name of the loss.
        self._readings: dict[tuple[str, str], list[Tensor]] = {}
        self._streaks: Counter[tuple[str, str | int]] = Counter()
        self._warned: set[tuple[str, str | int]] = set()

    def before_train(self, runner: Any) -> None:
        """Say which heads mine, and prepare."""
        compiled = bool(runner.cfg.get("compile"))
        if compiled:
            runner.logger.warning(
                "OhemMonitorHook: nothing is recorded: a model under torch.compile cannot be "
                "listened to. Leave `compile` out of the config for a run that is monitored."
            )
        listens = not compiled and is_main_process()
        self._losses = named_losses(runner.model, OhemCrossEntropyLoss) if listens else {}
        self._regions = named_losses(runner.model, RegionLoss) if listens else {}
        self._in_log = ("overlap", *(SCALARS if len(self._losses) == 1 else BRIEF))
        self._streaks, self._warned = Counter(), set()
        metainfo = getattr(runner.train_dataloader.dataset, "metainfo", {})
        self._classes = metainfo.get("classes") or ()
        for line in describe(unwrap(runner.model)):
            runner.logger.info(f"OhemMonitorHook: {line}")
        # mmengine smooths everything with "loss" in its name over ten values, which here would be
        # ten logging steps. Ask for the latest one, as it shows the rest.
        processor = runner.log_processor
        known = {entry["data_src"] for entry in processor.custom_cfg}
        sources = [f"ohem/{name}/{what}" for name in self._losses for what in self._in_log[1:]]
        sources += [f"region/{name}/overlap" for name in self._regions]
        processor.custom_cfg += [
            {"data_src": source, "method_name": "current"}
            for source in sources
            if source not in known and re.search(processor.mean_pattern, source)
        ]

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """At logging steps, listen to the losses."""
        self._listener.stop()
        self._readings = {}
        if not self._is_logging_step(runner, batch_idx):
            return
        for name, loss in self._losses.items():
            found = self._readings["ohem", name] = []
            self._listener.listen(loss, partial(_record, found, loss), maps=True)
        for name, region in self._regions.items():
            found = self._readings["region", name] = []
            self._listener.listen(region, partial(_record_overlap, found))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """At logging steps, write what was measured."""
        if not self._listener:
            return
        self._listener.stop()
        readings = [reading for several in self._readings.values() for reading in several]
        # The one place where the host waits for the device: all numbers in one transfer.
        numbers = iter(torch.cat(readings).tolist() if readings else [])
        backends = {}
        prefix = "train/" if runner.log_processor.log_with_hierarchy else ""
        for (kind, name), several in self._readings.items():
            calls = [[next(numbers) for _ in range(len(reading))] for reading in several]
            if kind == "ohem":
                values = self._mining_values(runner, name, calls)
            else:
                values = self._overlap_values(calls, self._regions[name].use_sigmoid)
            for what, value in values.items():
                if what in self._in_log:
                    runner.message_hub.update_scalar(f"train/{kind}/{name}/{what}", value)
                else:
                    backends[f"{prefix}{kind}/{name}/{what}"] = value
            if values:
                runner.message_hub.update_info(f"train/{kind}/{name}", values, resumed=False)
        if backends:
            # W&B ignores the step; with "iter" its curves can be drawn over the iterations.
            runner.visualizer.add_scalars({**backends, "iter": runner.iter + 1}, runner.iter + 1)

    def after_train(self, runner: Any) -> None:
        """Leave the losses as they were."""
        self._listener.stop()

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

    def _mining_values(self, runner: Any, name: str, calls: list[list[float]]) -> dict[str, float]:
        """The values to log of a loss that mines; empty where no pixel was valid."""
        if not calls:
            if self._is_news(name, "silent"):
                runner.logger.warning(
                    f"OhemMonitorHook: {name}: was not called in a logging step, so nothing is "
                    "recorded. It may be unused or compiled."
                )
            return {}
        total = Measured.of(calls)
        values = total.values(self._losses[name].rule.thresh)
        if values:
            self._judge(runner, name, values, total)
            classes = len(total.valid_of_class)
            for place, share in total.class_shares.items():
                values[f"kept_share_{self._class_name(place, classes)}"] = share
        return values

    def _overlap_values(self, calls: list[list[float]], use_sigmoid: bool) -> dict[str, float]:
        """The values to log of a region loss, from its scores; empty where no class is present."""
        means = torch.tensor(calls, dtype=torch.float64).nanmean(0).tolist() if calls else []
        scores = {place: mean for place, mean in enumerate(means) if not math.isnan(mean)}
        if not scores:
            return {}
        one = use_sigmoid and len(means) == 1  # its channel is that of class 1
        values = {"overlap": sum(scores.values()) / len(scores)}
        for place, score in scores.items():
            values[f"overlap_{self._class_name(place + one, 2 if one else len(means))}"] = score
        return values

    def _class_name(self, place: int, classes: int) -> str:
        """Name of a class as part of a tag, of letters that every backend accepts."""
        if len(self._classes) != classes:
            return str(place)
        return re.sub(r"[^\w.-]+", "_", self._classes[place].strip())

    def _judge(self, runner: Any, name: str, values: dict[str, float], total: Measured) -> None:
        """Count how often in a row mining was in vain, and warn where that is `patience` times."""
        rule = self._losses[name].rule
        everything = total.kept == total.valid
        floor_alone = values.get("floor_active") == 1 and not everything
        times = f"in the last {self.patience} measurements"
        cause = (
            f"the floor min_kept={rule.min_kept} is as large as the pixels there are; use a "
            "smaller one, or a share such as 1/16."
        )
        if total.hard == total.valid:
            cause = f"all pixels had a probability below thresh={rule.thresh}; use a lower thresh."
        messages = []
        if self._lasts(name, "inert", everything and not rule.keeps_all):
            messages.append(f"dropped nothing {times}, so mining has no effect: {cause}")
        if self._lasts(name, "starved", floor_alone):
            messages.append(
                f"kept pixels by its floor {times}: fewer than min_kept={rule.min_kept} had a "
                f"probability below thresh={rule.thresh}, so thresh decided nothing. Use a smaller "
                "min_kept or a higher thresh, or thresh=None if you want the hardest pixels alone."
            )
        shares, classes = total.class_shares.items(), len(total.valid_of_class)
        never = [place for place, share in shares if self._lasts(name, place, share == 0)]
        if never:
            titles = ", ".join(self._class_name(place, classes) for place in never)
            messages.append(
                f"no pixel was kept of {titles} {times} that saw "
                f"{'it' if len(never) == 1 else 'them'}. That is well where the IoU is high; else "
                f"use pool='class' or always_keep={never}."
            )
        for message in messages:
            runner.logger.warning(f"OhemMonitorHook: {name}: {message}")

    def _lasts(self, name: str, what: str | int, happened: bool) -> bool:
        """Count; True the first time that it happened `patience` times in a row."""
        self._streaks[name, what] = self._streaks[name, what] + 1 if happened else 0
        return self._streaks[name, what] >= self.patience and self._is_news(name, what)

    def _is_news(self, name: str, what: str | int) -> bool:
        """Whether this was not said of the loss before; from now on it was."""
        known = (name, what) in self._warned
        self._warned.add((name, what))
        return not known


def _record(readings: list[Tensor], loss: OhemCrossEntropyLoss, call: dict[str, Any]) -> None:
    if call["target"].numel():
        readings.append(read(loss, call["pred"], call["target"], call["stats"]))


def _record_overlap(readings: list[Tensor], call: dict[str, Any]) -> None:
    readings.append(call["stats"]["overlap"])
