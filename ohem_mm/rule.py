"""The rules: which pixels are kept and what divides their loss; which overlap is asked of whom."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, get_args

Pool = Literal["batch", "image", "class", "world"]
Unit = Literal["batch", "image"]
Average = Literal["kept", "valid", "all"]
Kind = Literal["dice", "jaccard", "tversky"]
RegionPool = Literal["batch", "image", "world"]
Classes = Literal["present", "all"]


class Habits(NamedTuple):
    """Ways of other implementations that a preset keeps; see ``ohem_mm.presets``.

    Attributes:
        one_less: The floor keeps k - 1 pixels where the pool has more than k.
        zero_keeps_one: ``min_kept=0`` means 1; the rule reads so from then on.
        zero_keeps_all: ``min_kept=0`` turns mining off and keeps every valid pixel.
        ignored_take_slots: Ignored pixels have loss 0 and take part: they count in a share, and
            in the kept pixels that the loss is divided by, wherever the floor reaches them.
        float_share: How a share of n pixels, ignored ones counted, is computed before it is rounded
            down: 1: in floating point, as ``n * share``; 100: the same, as ``n * P / 100`` with P
            the share in per cent; 0: exactly.
        mine_optimised: Mining looks at the loss as it is optimised, after weights and label
            smoothing.
        eps: The divisor grows by ``eps`` times the number of all pixels.
    """

    one_less: bool = False
    zero_keeps_one: bool = False
    zero_keeps_all: bool = False
    ignored_take_slots: bool = False
    float_share: Literal[0, 1, 100] = 0
    mine_optimised: bool = False
    eps: float = 0.0


OURS = Habits()


@dataclass(frozen=True)
class OhemRule:
    """Which pixels are kept and what divides their loss; checked once, when it is made.

    A valid pixel (its label is not ``ignore_index``) is *hard* when its true class has probability
    below ``thresh``. If fewer than ``min_kept`` pixels of a pool are hard, the ``min_kept`` hardest
    are kept instead. Pixels tied at the last of these places share what is left of them: with
    ``a`` pixels above the k-th value and ``b`` at it, each tied pixel has weight ``(k - a) / b``,
    which is the mean over all ways to break the tie.

    Attributes:
        thresh: Probability in (0, 1]. None: no threshold, the ``min_kept`` hardest alone.
        min_kept: Floor: an int in pixels, or a float in [0, 1] as a share of the pool's valid
            pixels, rounded down.
        pool: Over what the floor is counted: 'batch', each 'image', each ground-truth 'class', or
            'world', all ranks of a distributed run together. With 'world' the result, averaged over
            ranks as DistributedDataParallel averages gradients, is that of one big batch.
        min_kept_per: 'image' reads an int ``min_kept`` as pixels per image, pooled over the batch.
        always_keep: Classes whose valid pixels are always kept.
        avg: Divisor for reduction 'mean': number of 'kept' pixels, of 'valid' pixels, or of 'all'.
        weighted_mean: Where there are weights, divide by the sum of the weights of the pixels that
            ``avg`` counts, instead of by their number; ignored pixels weigh nothing.
        habits: Ways of other implementations, set by the presets.
        per_cent: Not a setting: the shortest P with P / 100 == ``min_kept``, 29 for 0.29, where
            100 * 0.29 is less.

    Raises:
        ValueError: On a setting out of range; the message names it and what is allowed.
        TypeError: On a setting of the wrong type.
    """

    thresh: float | None = 0.7
    min_kept: int | float = 1 / 16
    pool: Pool = "batch"
    min_kept_per: Unit = "batch"
    always_keep: Sequence[int] = ()
    avg: Average = "kept"
    weighted_mean: bool = False
    habits: Habits = OURS
    per_cent: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.thresh is not None:
            if not is_number(self.thresh) or not 0 < self.thresh <= 1:
                raise ValueError(
                    f"thresh must be None or a probability in (0, 1], but got {self.thresh!r}."
                )
            object.__setattr__(self, "thresh", float(self.thresh))
        if not is_number(self.min_kept):
            raise TypeError(
                f"min_kept must be an int (pixels) or a float (share of the valid pixels), but got "
                f"{self.min_kept!r}."
            )
        # NumPy's numbers become Python's, whose type says what is meant.
        min_kept = int(self.min_kept) if is_int(self.min_kept) else float(self.min_kept)
        if not min_kept >= 0 or (isinstance(min_kept, float) and min_kept > 1):
            raise ValueError(
                f"min_kept must be an int >= 0 (pixels) or a float in [0, 1] (share of the valid "
                f"pixels), but got {self.min_kept!r}."
            )
        habits = Habits(*self.habits)
        if habits.zero_keeps_one:
            min_kept = min_kept or 1
        object.__setattr__(self, "habits", habits)
        object.__setattr__(self, "min_kept", min_kept)
        rounded = (float(f"{100 * min_kept:.{digits}g}") for digits in range(1, 18))
        per_cent = next((value for value in rounded if value / 100 == min_kept), 100.0 * min_kept)
        object.__setattr__(self, "per_cent", per_cent)
        for name, allowed in (("pool", Pool), ("min_kept_per", Unit), ("avg", Average)):
            check_choice(name, getattr(self, name), get_args(allowed))
        if isinstance(self.always_keep, str) or not isinstance(self.always_keep, Sequence):
            raise TypeError(
                f"always_keep must be a list of class indices, but got {self.always_keep!r}."
            )
        for cls in self.always_keep:
            if not is_int(cls) or cls < 0:
                raise ValueError(f"always_keep must hold class indices >= 0, but got {cls!r}.")
        object.__setattr__(self, "always_keep", tuple(int(cls) for cls in self.always_keep))

    @property
    def keeps_all(self) -> bool:
        """Whether ``min_kept`` says that no valid pixel shall be dropped, as in a warm-up."""
        if not self.min_kept:
            return self.habits.zero_keeps_all
        return isinstance(self.min_kept, float) and self.min_kept == 1

    @property
    def plain(self) -> bool:
        """Whether no habit makes a difference to the rule as it stands."""
        # What min_kept=0 means is settled when the rule is made, or does not arise.
        zero = self.habits.zero_keeps_all and not self.min_kept
        return self.habits._replace(zero_keeps_one=False, zero_keeps_all=zero) == OURS


class RegionHabits(NamedTuple):
    """Ways of other implementations that a preset keeps; see ``ohem_mm.presets``.

    Attributes:
        joint: One ratio of the sums over all classes, instead of the mean of the classes' ratios.
        absent_are_zero: Classes that do not count have loss 0 in the mean instead of being left
            out of it.
        gamma_of_mean: ``gamma`` is the exponent of the mean, not of each class.
        smooth_below: ``smooth`` is added to the denominator alone.
    """

    joint: bool = False
    absent_are_zero: bool = False
    gamma_of_mean: bool = False
    smooth_below: bool = False


_PLAIN = RegionHabits()


@dataclass(frozen=True)
class RegionRule:
    """What an overlap loss asks of a class, and of which classes; checked when it is made.

    With p the probability of a class and t its target, sums over the valid pixels of a pool give
    I = sum p t, P = sum p and T = sum t. The loss of the class in the pool is
    ``(1 - score) ** gamma``. The result is the mean over the classes that count, then over the
    pools in which any does.

    Attributes:
        kind: The score: 'dice' (2 I + s) / (P + T + s), 'jaccard' (I + s) / (P + T - I + s), or
            'tversky' (I + s) / (I + alpha (P - I) + beta (T - I) + s).
        alpha: Cost of what is predicted and not labelled, for 'tversky'.
        beta: Cost of what is labelled and not predicted, for 'tversky'. The defaults are those of
            Salehi et al., "Tversky loss function for image segmentation", MLMI 2017.
        gamma: Exponent; above 1, classes that overlap little get more of the gradient.
        pool: Over what the sums go: 'batch', each 'image', or 'world', all ranks of a distributed
            run together. With 'world' the result, and the gradient averaged over ranks as
            DistributedDataParallel does, is that of one big batch.
        classes: Which classes count: those 'present' in the labels of the pool, or 'all'. A class
            that is not there costs P / (P + s), so 'all' asks for a ``smooth`` above 0; without one
            it costs 1 whatever is predicted, and 0 where P is 0.
        smooth: s above.
        squared: P and T sum squares (Milletari et al., "V-Net", 3DV 2016); not for 'tversky'.
        weighted_mean: Divide by the sum of the weights of the classes that count, instead of by
            their number. A class of weight 0 is then left out.
        habits: Ways of other implementations, set by the presets.

    Raises:
        ValueError: On a setting out of range; the message names it and what is allowed.
    """

    kind: Kind = "dice"
    alpha: float = 0.3
    beta: float = 0.7
    gamma: float = 1.0
    pool: RegionPool = "batch"
    classes: Classes = "present"
    smooth: float = 0.0
    squared: bool = False
    weighted_mean: bool = False
    habits: RegionHabits = _PLAIN

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("pool", RegionPool), ("classes", Classes)):
            check_choice(name, getattr(self, name), get_args(allowed))
        for name in ("alpha", "beta", "smooth", "gamma"):
            value, positive = getattr(self, name), name == "gamma"
            if not is_number(value) or not 0 <= value < math.inf or (positive and not value):
                raise ValueError(
                    f"{name} must be a finite number {'> 0' if positive else '>= 0'}, but got "
                    f"{value!r}."
                )
            object.__setattr__(self, name, float(value))
        costs = (self.alpha, self.beta)
        if self.kind != "tversky" and costs != (RegionRule.alpha, RegionRule.beta):
            raise ValueError(
                f"alpha={self.alpha!r} and beta={self.beta!r} need kind='tversky', but got "
                f"kind={self.kind!r}."
            )
        if self.kind == "tversky" and self.squared:
            raise ValueError("squared=True goes with kind='dice' or 'jaccard', not with 'tversky'.")
        if self.kind == "tversky" and costs == (0, 0):
            raise ValueError("alpha and beta must not both be 0: then nothing costs anything.")
        object.__setattr__(self, "habits", RegionHabits(*self.habits))


SETTINGS = tuple(setting.name for setting in fields(OhemRule) if setting.init)


def check_choice(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of the words that are allowed."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")


def is_int(value: object) -> bool:
    """Whether a value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
