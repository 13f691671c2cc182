"""How many pixels each thresh calls hard, and where each min_kept binds: what a trained model says.

``tools/choose_thresh.py`` is the command line.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ohem_mm import OhemCrossEntropyLoss, OhemRule, ohem_cross_entropy
from ohem_mm.drawing import COLOURS, draw_band, drawing, save
from ohem_mm.errors import UserError
from ohem_mm.hooks._losses import heads_of
from ohem_mm.mining import share_of

THRESHES = (0.5, 0.6, 0.7, 0.8, 0.9)
# What was measured: docs/which_loss.md.
ADVICE = (
    "The shares say what is kept, not whether mining pays: it does where plain cross-entropy finds "
    "rare classes in part, and RegionLoss gained as much or more wherever both were measured "
    "(docs/which_loss.md)."
)
CURVE = tuple(i / 100 for i in range(1, 101))
POOLS = {"batch": "batches", "image": "images", "class": "classes of a batch"}
CSV_COLUMNS = [
    *("head", "pool", "thresh", "hard_share", "hard_p10", "hard_p50", "hard_p90"),
    *("min_kept", "binds_share", "kept_share"),
]

Kept = int | float  # min_kept: pixels of a pool, or a share


class Counts:
    """Hard pixels of one loss at every thresh, for each pool of each batch with a valid pixel.

    Attributes:
        hard: int64, shape (pools, threshes), of ascending threshes.
        valid: Valid pixels, int64, shape (pools,).
        images: Images of the pool's batch, int64, shape (pools,).
    """

    def __init__(self, rule: OhemRule | None, threshes: Iterable[float], pool: str | None) -> None:
        self.rule = rule
        self.pool = pool or (rule.pool if rule and rule.pool != "world" else "batch")
        self.threshes = sorted(threshes)
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, mined: Tensor, valid: Tensor, target: Tensor, num_classes: int) -> None:
        """Count one batch: losses, validity and labels of its pixels, each of shape (N, ...)."""
        groups, group = 1, torch.zeros_like(target)
        if self.pool == "image":
            groups = len(target)
            group = torch.arange(groups).to(target).view(-1, *[1] * (target.dim() - 1)) + group
        elif self.pool == "class":
            groups, group = num_classes, target
        # Ascending losses; a pixel is hard at each thresh whose -log(thresh) is below its loss.
        bounds = [-math.log(thresh) for thresh in reversed(self.threshes)]
        loss = mined[valid].nan_to_num(nan=torch.inf)
        below = torch.bucketize(loss, torch.tensor(bounds).to(loss))
        index = group[valid] * (len(bounds) + 1) + below
        table = torch.bincount(index, minlength=groups * (len(bounds) + 1)).view(groups, -1)
        table = table[table.sum(1) > 0].cpu()
        # From the right: pixels in the buckets above each bound; then in order of thresh.
        hard = table.flip(1).cumsum(1)[:, :-1]
        self._parts.append((hard, table.sum(1), torch.full((len(table),), len(target))))

    def finish(self) -> bool:
        """Put the batches together; say whether there was a valid pixel at all."""
        if self._parts:
            self.hard, self.valid, self.images = map(torch.cat, zip(*self._parts, strict=True))
        return bool(self._parts) and len(self.valid) > 0

    def hard_share(self, thresh: float) -> float:
        """Share of hard pixels among all valid ones."""
        column = self.hard[:, self.threshes.index(thresh)]
        return column.sum().item() / max(1, self.valid.sum().item())

    def spread(self, thresh: float) -> tuple[float, float, float]:
        """The 10th, 50th and 90th percentile of the pools' hard shares."""
        shares = self.hard[:, self.threshes.index(thresh)].double() / self.valid
        p10, p50, p90 = torch.quantile(shares, torch.tensor([0.1, 0.5, 0.9]).double())
        return p10.item(), p50.item(), p90.item()

    def floor(self, min_kept: Kept, per_image: bool = False) -> Tensor:
        """``min_kept`` in pixels of each pool, int64, shape (pools,)."""
        if isinstance(min_kept, float):
            return share_of(self.valid, min_kept)
        k = min_kept * (self.images if per_image and self.pool == "batch" else 1)
        return torch.minimum(torch.as_tensor(k), self.valid)

    def binds(
        self, thresh: float | None, min_kept: Kept, per_image: bool = False
    ) -> tuple[float, float]:
        """Share of pools where the floor decides, and share of valid pixels kept in all."""
        floor = self.floor(min_kept, per_image)
        hard = torch.zeros_like(floor)
        if thresh is not None:
            hard = self.hard[:, self.threshes.index(thresh)]
        kept = torch.maximum(hard, floor).sum().item() / max(1, self.valid.sum().item())
        return (hard < floor).double().mean().item(), kept


class Watch:
    """Looks at what the heads of a model hand to their losses.

    Args:
        model: A segmentor.
        heads: Names of heads to look at; None: those that mine, or all when none does.
        threshes: What to report; if empty, ``THRESHES`` and those of the heads.
        pool: Instead of each head's own pool.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str] | None,
        threshes: Sequence[float],
        pool: str | None,
    ) -> None:
        found = {
            name: [(loss, _rule(head, loss)) for loss in losses]
            for name, head, losses in heads_of(model)
        }
        if missing := [name for name in heads or () if name not in found]:
            raise UserError(f"there is no head {missing[0]!r}; heads: {', '.join(found)}")
        mine = [name for name in found if any(rule for _, rule in found[name])]
        chosen = heads or mine or list(found)
        own = [rule.thresh for name in chosen for _, rule in found[name] if rule and rule.thresh]
        self.threshes = sorted({*(threshes or (*THRESHES, *own))})
        self.counts: dict[str, Counts] = {}
        self._seen: set[tuple[str, int, int]] = set()
        for name in chosen:
            for number, (loss, rule) in enumerate(found[name]):
                if rule is None and name in mine:
                    continue
                counts = Counts(rule, {*self.threshes, *CURVE, *own}, pool)
                self.counts[f"{name}, loss {number}" if len(found[name]) > 1 else name] = counts
                look = partial(self._look, name, counts)
                loss.register_forward_pre_hook(look, with_kwargs=True)

    def _look(self, head: str, counts: Counts, loss: Any, args: Any, kwargs: Any) -> None:
        pred, target = args[:2]
        key = (head, pred.data_ptr(), target.data_ptr())
        # A second loss on the same logits (CE and Dice) has nothing new to tell.
        if pred.dim() != 4 or target.is_floating_point() or key in self._seen:
            return
        self._seen.add(key)
        ignored = [getattr(loss, name, None) for name in ("ignore_index", "ignore_label")]
        ignored += [kwargs.get("ignore_index"), 255]
        stats: dict[str, Any] = {"kept": None}  # asks for the maps
        ohem_cross_entropy(
            pred,
            target,
            rule=OhemRule(thresh=None, min_kept=1.0),
            ignore_index=next(value for value in ignored if value is not None),
            use_sigmoid=getattr(loss, "use_sigmoid", False),
            stats=stats,
        )
        target = target.reshape(stats["mined"].shape).long()
        counts.add(stats["mined"], stats["valid"], target, max(2, pred.shape[1]))

    def run(self, model: Any, batches: Iterable[Any]) -> int:
        """Look at every batch; return the number of images."""
        images = 0
        for data in batches:
            self._seen.clear()
            data = model.data_preprocessor(data, True)
            images += len(data["data_samples"])
            with torch.no_grad():
                model(**data, mode="loss")
        self.counts = {name: counts for name, counts in self.counts.items() if counts.finish()}
        return images


def _rule(head: Any, loss: Any) -> OhemRule | None:
    """What decides which of the loss's pixels are kept; None where nothing mines."""
    if isinstance(loss, OhemCrossEntropyLoss):
        return None if loss.rule.thresh is None and loss.rule.keeps_all else loss.rule
    if type(loss).__name__ == "OhemCrossEntropy":
        return OhemRule(loss.thresh, loss.min_kept)
    if type(getattr(head, "sampler", None)).__name__ == "OHEMPixelSampler":
        return OhemRule(head.sampler.thresh, head.sampler.min_kept, min_kept_per="image")
    return None


# --- output ----------------------------------------------------------------------------------


def parse_min_kept(text: str) -> Kept:
    """An int, or a share written as 0.1 or 1/16; ValueError where it is neither."""
    if text.isdigit():
        return int(text)
    try:
        value = float(Fraction(text))
    except ZeroDivisionError:
        raise ValueError(text) from None
    if not 0 <= value <= 1:
        raise ValueError(text)
    return value


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _floor(min_kept: Kept, per_image: bool = False) -> str:
    if isinstance(min_kept, int):
        return f"{min_kept:,}" + (" per image" if per_image else "")
    share = Fraction(min_kept).limit_denominator(1000)
    return str(share) if share.numerator == 1 < share.denominator else f"{min_kept:g}"


def table(counts: Counts, threshes: Sequence[float], min_kepts: Sequence[Kept], title: str) -> Any:
    """Table of one loss, for rich: a row for each thresh, a column for each min_kept."""
    from rich.table import Column, Table

    header = ["thresh", "hard", f"10 to 90 % of {POOLS[counts.pool]}"]
    header += [f"min_kept={_floor(min_kept)} binds on" for min_kept in min_kepts]
    columns = (Column(name, justify="right") for name in header)
    out = Table(*columns, title=title, title_justify="left")
    for thresh in threshes:
        low, _, high = counts.spread(thresh)
        out.add_row(
            f"{thresh:g}",
            _percent(counts.hard_share(thresh)),
            f"{_percent(low)} to {_percent(high)}",
            *(_percent(counts.binds(thresh, min_kept)[0]) for min_kept in min_kepts),
        )
    return out


def sentences(counts: Counts, title: str) -> str:
    """What the head's own settings do."""
    rule = counts.rule
    if rule is None:
        return f"{title} does not mine."
    per_image = rule.min_kept_per == "image"
    binds, kept = counts.binds(rule.thresh, rule.min_kept, per_image)
    floor = f"min_kept={_floor(rule.min_kept, per_image)}"
    if isinstance(rule.min_kept, int):
        pixels = counts.floor(rule.min_kept, per_image).double() / counts.valid
        floor += f" ({_percent(pixels.mean().item())} of the valid pixels)"
    if rule.thresh is None:
        return f"{title}: no threshold; {floor} keeps {_percent(kept)} of the valid pixels."
    if rule.pool == "world":
        floor += ", counted over the batch of one GPU,"
    return (
        f"{title}: at thresh {rule.thresh:g}, {_percent(counts.hard_share(rule.thresh))} of the "
        f"valid pixels are hard; {floor} binds on {_percent(binds)} of the {POOLS[counts.pool]}, "
        f"and {_percent(kept)} are kept in all."
    )


def write_csv(
    path: str, found: dict[str, Counts], threshes: Sequence[float], min_kepts: Sequence[Kept]
) -> None:
    """One row for each loss, thresh and min_kept."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        rows = itertools.product(found.items(), threshes, min_kepts)
        for (title, counts), thresh, min_kept in rows:
            hard = (f"{x:.6g}" for x in (counts.hard_share(thresh), *counts.spread(thresh)))
            binds = (f"{x:.6g}" for x in counts.binds(thresh, min_kept))
            writer.writerow([title, counts.pool, f"{thresh:g}", *hard, min_kept, *binds])


def draw(path: str, found: dict[str, Counts], min_kepts: Sequence[Kept]) -> None:
    """Hard share against thresh, a line for each loss, with the floors as level lines."""
    with drawing("thresh"):
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for place, (title, counts) in enumerate(found.items()):
            shares = [counts.hard_share(thresh) for thresh in CURVE]
            low, _, high = zip(*map(counts.spread, CURVE), strict=True)
            ranges = (low, high) if len(found) == 1 else (shares, shares)
            draw_band(axes, place, title, CURVE, shares, *ranges, marker=None)
            if len(found) == 1:
                axes.collections[-1].set_label(f"10 to 90 % of {POOLS[counts.pool]}")
            if counts.rule and counts.rule.thresh is not None:
                own = counts.rule.thresh, counts.hard_share(counts.rule.thresh)
                label = "the head's own thresh" if len(found) == 1 else None
                axes.plot(*own, "o", color=COLOURS[place % len(COLOURS)], label=label)
        first = next(iter(found.values()))
        for min_kept in min_kepts:
            share = (first.floor(min_kept).double() / first.valid).mean().item()
            axes.axhline(share, color="0.4", lw=0.8, ls="--")
            label = f"min_kept={_floor(min_kept)}"
            axes.annotate(label, (0.99, share), va="bottom", ha="right", fontsize=8)
        axes.set(xlabel="thresh", ylabel="hard share of the valid pixels")
        axes.set(xlim=(0, 1), yscale="log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
        axes.legend(loc="upper left")
        save(figure, Path(path))
