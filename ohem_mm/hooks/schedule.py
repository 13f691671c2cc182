"""Change ``thresh`` and ``min_kept`` while training."""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop

from ..loss import OhemCrossEntropyLoss
from ..rule import OhemRule, check_choice
from ._losses import named_losses

__all__ = ["OhemScheduleHook"]

Number = int | float

# What a piece of each type says: required keys, then optional ones.
_KEYS = {
    "constant": (("value",), ("begin",)),
    "linear": (("end",), ("begin", "start", "stop")),
    "cosine": (("end",), ("begin", "start", "stop")),
    "step": (("values", "milestones"), ("begin",)),
}


class _Piece(NamedTuple):
    """From ``start`` at ``begin`` to ``stop`` at ``end``; None is the loss's own setting."""

    begin: int
    end: int
    start: Number | None
    stop: Number | None
    cosine: bool = False

    def ends(self, own: Number | None) -> tuple[Number | None, Number | None]:
        """Both ends, for a loss that was built with a setting."""
        return own if self.start is None else self.start, own if self.stop is None else self.stop


@HOOKS.register_module()
class OhemScheduleHook(Hook):  # type: ignore[misc]
    """Change ``thresh`` and ``min_kept`` of every :class:`ohem_mm.OhemCrossEntropyLoss`.

    A schedule is a list of pieces (one piece may stand without the list). Times are iterations
    that are done, or epochs with ``by_epoch``. A piece is one of::

        dict(type='constant', value=0.8, begin=0)
        dict(type='linear', start=0.95, stop=0.7, begin=0, end=4000)
        dict(type='cosine', start=0.95, stop=0.7, begin=0, end=4000)
        dict(type='step', values=[0.9, 0.8, 0.7], milestones=[1000, 2000], begin=0)

    ``begin`` is 0 unless given. ``start`` and ``stop``, where left out, are the setting that the
    loss was built with. Before its first piece a setting is as the loss was built; after a piece
    it stays at the value reached until the next piece begins. Between two ints ``min_kept`` stays
    an int (pixels), between two floats a float (share).

    Values depend on the iteration (epoch) alone, so a resumed training goes on where it was. They
    are set before each iteration and written to the message hub, and so to the log, as
    ``train/ohem/<head>/thresh`` and ``train/ohem/<head>/min_kept``. When training ends, the losses
    get back the settings that they were built with.

    Args:
        thresh: Schedule of ``thresh``. None: not scheduled.
        min_kept: Schedule of ``min_kept``. None: not scheduled.
        warmup: Number of iterations (epochs with ``by_epoch``) at the start during which nothing is
            mined: all valid pixels are kept, whatever the schedules say. The loss is then plain
            cross-entropy, averaged as the loss's ``avg`` says, by default over the valid pixels.
        by_epoch: Count epochs instead of iterations. Needs an epoch-based training loop.

    Raises:
        ValueError: On times or values out of range, a piece that is not understood, or nothing to
            do. Once training starts, also on a schedule that does not fit the setting of a loss.
        TypeError: On a schedule, time or value of the wrong type.

    Example:
        >>> custom_hooks = [
        ...     dict(
        ...         type='OhemScheduleHook',
        ...         thresh=dict(type='linear', start=0.95, stop=0.7, begin=500, end=4000),
        ...         warmup=500,
        ...     )
        ... ]
    """

    # Before hooks of normal priority, which then see the settings in effect.
    priority = "ABOVE_NORMAL"

    def __init__(
        self,
        thresh: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        min_kept: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        warmup: int = 0,
        by_epoch: bool = False,
    ) -> None:
        given = {"thresh": thresh, "min_kept": min_kept}
        self.schedules = {name: _parse(name, p) for name, p in given.items() if p is not None}
        self.warmup = _time("warmup", warmup)
        self.by_epoch = by_epoch
        if not self.schedules and not self.warmup:
            raise ValueError("OhemScheduleHook has nothing to do: give thresh, min_kept or warmup.")
        self._losses: dict[str, OhemCrossEntropyLoss] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._logged: dict[str, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Find the losses, check the schedules against them and the training, and set them."""
        if self.by_epoch and isinstance(runner.train_loop, IterBasedTrainLoop):
            raise ValueError(
                "OhemScheduleHook has by_epoch=True, but this training counts iterations only; "
                "use by_epoch=False or an EpochBasedTrainLoop."
            )
        self._losses = named_losses(runner.model, OhemCrossEntropyLoss)
        self._own = {
            name: {"thresh": loss.rule.thresh, "min_kept": loss.rule.min_kept}
            for name, loss in self._losses.items()
        }
        self._logged = {}
        if not self._losses:
            runner.logger.warning(
                "OhemScheduleHook: the model has no OhemCrossEntropyLoss; nothing is scheduled."
            )
        for name, own in self._own.items():
            for setting, pieces in self.schedules.items():
                for piece in pieces:
                    _check_piece(name, setting, piece, own[setting])
        for message in self._unreachable(runner):
            runner.logger.warning(f"OhemScheduleHook: {message}")
        self._apply(runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any | None = None) -> None:
        """Set the losses for this iteration, and log what changed."""
        self._apply(runner)
        for name, loss in self._losses.items():
            for setting in ("thresh", "min_kept") if self.warmup else self.schedules:
                value, key = getattr(loss.rule, setting), f"train/ohem/{name}/{setting}"
                # The log shows the latest value, so one that stays need not be written again.
                if value is not None and self._logged.get(key) != value:
                    runner.message_hub.update_scalar(key, value)
                    self._logged[key] = value

    def after_train(self, runner: Any) -> None:
        """Give the losses back the settings that they were built with."""
        for name, loss in self._losses.items():
            loss.rule = replace(loss.rule, **self._own[name])

    def _apply(self, runner: Any) -> None:
        time = runner.epoch if self.by_epoch else runner.iter
        for name, loss in self._losses.items():
            settings = dict(self._own[name])
            for setting, pieces in self.schedules.items():
                settings[setting] = _value(pieces, time, settings[setting])
            if time < self.warmup:
                settings = {"thresh": 1.0, "min_kept": 1.0}
            loss.rule = replace(loss.rule, **settings)

    def _unreachable(self, runner: Any) -> Iterator[str]:
        """Sentences about what lies behind the end of the training."""
        unit = "epoch" if self.by_epoch else "iteration"
        last = runner.max_epochs if self.by_epoch else runner.max_iters
        if self.warmup >= last:
            yield (
                f"warmup={self.warmup} lasts for the whole training of {last} {unit}s, so nothing "
                "is ever mined; use a smaller warmup."
            )
        for setting, (*_, piece) in self.schedules.items():
            if piece.begin >= last:
                yield (
                    f"the last piece of {setting} begins at {unit} {piece.begin}, but training "
                    f"ends at {last}; it has no effect."
                )
            elif piece.end > last:
                yield (
                    f"the schedule of {setting} ends at {unit} {piece.end}, but training ends at "
                    f"{last}; its last value is not reached."
                )


def _parse(setting: str, pieces: Any) -> list[_Piece]:
    """Check a schedule as it stands in the config; return its pieces in order."""
    pieces = [pieces] if isinstance(pieces, Mapping) else pieces
    _check_list(setting, pieces, "a list of dicts (pieces)")
    if not pieces:
        raise ValueError(f"{setting} must have at least one piece, but got {pieces!r}.")
    out: list[_Piece] = []
    for index, given in enumerate(pieces):
        where = f"{setting}[{index}]"
        if not isinstance(given, Mapping):
            raise TypeError(f"{where} must be a dict, but got {given!r}.")
        try:
            new = _parse_piece(setting, given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from None
        if out and (new[0].begin < out[-1].end or new[0].begin <= out[-1].begin):
            raise ValueError(
                f"{where}: begin must not lie before the end of the piece before it "
                f"({out[-1].end}), nor two pieces begin at once, but got {new[0].begin}."
            )
        out += new
    return out


def _parse_piece(setting: str, given: Mapping[str, Any]) -> list[_Piece]:
    kind = given.get("type")
    check_choice("type", kind, _KEYS)
    required, allowed = _KEYS[str(kind)][0], sum(_KEYS[str(kind)], ())
    for key in given:
        if key not in ("type", *allowed):
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"type {kind!r} has no key {key!r}.{hint} It has {', '.join(allowed)}."
            )
    for key in required:
        if key not in given:
            raise ValueError(f"type {kind!r} needs {key!r}.")
    begin = _time("begin", given.get("begin", 0))
    if kind in ("constant", "step"):
        values: Any = [given["value"]] if kind == "constant" else given["values"]
        milestones: Any = [] if kind == "constant" else given["milestones"]
        _check_list("values", values)
        _check_list("milestones", milestones)
        if len(values) != len(milestones) + 1:
            counts = f"{len(values)} and {len(milestones)}"
            raise ValueError(f"values must be one more than milestones, but got {counts}.")
        times = [begin, *(_time("milestones", time) for time in milestones)]
        if any(a >= b for a, b in itertools.pairwise(times)):
            got = f"after begin ({begin}), but got {list(milestones)!r}"
            raise ValueError(f"milestones must grow and lie {got}.")
        for value in values:
            _check_number(setting, value)
        return [_Piece(t, t, value, value) for t, value in zip(times, values, strict=True)]
    end = _time("end", given["end"])
    if end <= begin:
        raise ValueError(f"end must lie after begin ({begin}), but got {end}.")
    ends = start, stop = given.get("start"), given.get("stop")
    for value in ends:
        if value is not None:
            _check_number(setting, value)
    if start is None and stop is None:
        raise ValueError(f"type {kind!r} needs 'start' or 'stop'.")
    if setting == "min_kept" and None not in ends and type(start) is not type(stop):
        raise ValueError(
            "start and stop must both be ints (pixels) or both be floats (shares), but got "
            f"{start!r} and {stop!r}."
        )
    return [_Piece(begin, end, start, stop, kind == "cosine")]


def _time(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but got {value!r}.")
    if value < 0:
        raise ValueError(f"{name} must be >= 0, but got {value!r}.")
    return value


def _check_list(name: str, value: Any, kind: str = "a list") -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be {kind}, but got {value!r}.")


def _check_number(setting: str, value: Any) -> None:
    """Raise what the rule raises of a value of ``thresh`` or ``min_kept``."""
    if value is None:
        raise TypeError("a schedule needs numbers, but got None.")
    replace(OhemRule(thresh=None, min_kept=0), **{setting: value})


def _check_piece(name: str, setting: str, piece: _Piece, own: Number | None) -> None:
    """Whether the setting that a loss was built with can stand in for a missing end."""
    start, stop = piece.ends(own)
    if start is None or stop is None:
        raise ValueError(
            f"OhemScheduleHook: {name} has {setting}=None, which has no numbers between; give "
            "both start and stop."
        )
    if setting == "min_kept" and type(start) is not type(stop):
        raise ValueError(
            f"OhemScheduleHook: {name} has min_kept={own!r}, but the schedule leads from {start!r} "
            f"to {stop!r}; use pixels (int) or shares (float) for both."
        )


def _value(pieces: list[_Piece], time: int, own: Any) -> Any:
    """The value of a schedule; ``own`` is the setting that the loss was built with."""
    index = bisect.bisect_right(pieces, time, key=lambda piece: piece.begin) - 1
    if index < 0:
        return own
    piece = pieces[index]
    start, stop = piece.ends(own)
    if time >= piece.end or start == stop or start is None or stop is None:
        return stop
    done = (time - piece.begin) / (piece.end - piece.begin)
    if piece.cosine:
        done = (1 - math.cos(math.pi * done)) / 2
    value = start + (stop - start) * done
    return round(value) if isinstance(stop, int) and isinstance(start, int) else value
