"""How many pixels each thresh calls hard, and on how many batches each min_kept binds.

    python tools/choose_thresh.py CONFIG CHECKPOINT
    python tools/choose_thresh.py CONFIG CHECKPOINT --split val --thresh 0.5 0.7 0.9
    python tools/choose_thresh.py CONFIG CHECKPOINT --min-kept 1/16 100000 --plot thresh.png

The batches are those of training: its batch size, crops and augmentations, on the images of the
chosen split. Each goes once through the model of the checkpoint, without a gradient and with frozen
BatchNorm and dropout, and every head's own call of its loss is looked at. A pixel is hard when the
probability of its true class is below thresh; min_kept binds where fewer pixels of its pool are.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# See tools/train.py.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn

from ohem_mm import OhemCrossEntropyLoss, cli, ohem_cross_entropy
from ohem_mm.checkpoints import load_weights
from ohem_mm.mining import share_of

try:
    from mmengine.device import get_device
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.runner import Runner, set_random_seed
    from rich import box
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    print(f"error: {error}; install it with: pip install 'ohem-mm[mmseg,bench]'", file=sys.stderr)
    raise SystemExit(2) from None

if TYPE_CHECKING:
    from mmengine.config import Config

THRESHES = (0.5, 0.6, 0.7, 0.8, 0.9)
MIN_KEPTS = (1 / 64, 1 / 16, 1 / 4)
CURVE = tuple(i / 100 for i in range(1, 101))
POOLS = {"batch": "batches", "image": "images", "class": "classes of a batch"}
CSV_COLUMNS = [
    *("head", "pool", "thresh", "hard_share", "hard_p10", "hard_p50", "hard_p90"),
    *("min_kept", "binds_share", "kept_share"),
]


class Rule(NamedTuple):
    """What a head mines by: ``thresh``, ``min_kept`` in pixels of its pool or a share, pool."""

    thresh: float | None
    min_kept: int | float
    pool: str = "batch"
    per_image: bool = False


class Counts:
    """Hard pixels of one loss at every thresh, for each pool of each batch.

    Attributes:
        threshes: Ascending.
        hard: int64, shape (pools, threshes). Pools without a valid pixel are left out.
        valid: Valid pixels, int64, shape (pools,).
        images: Images of the pool's batch, int64, shape (pools,).
    """

    def __init__(self, rule: Rule | None, threshes: Iterable[float], pool: str | None) -> None:
        self.rule = rule
        self.pool = pool or (rule.pool if rule and rule.pool != "world" else "batch")
        self.threshes = sorted(threshes)
        self._parts: list[tuple[Tensor, Tensor, int]] = []

    def add(self, mined: Tensor, valid: Tensor, target: Tensor, num_classes: int) -> None:
        """Count one batch.

        Args:
            mined: Loss of each pixel, float32, shape (N, ...).
            valid: Bool, shape (N, ...).
            target: Labels, int64, shape (N, ...), in [0, num_classes) where valid.
            num_classes: Number of classes.
        """
        groups, group = 1, torch.zeros_like(target)
        if self.pool == "image":
            groups = len(target)
            group = group + torch.arange(groups, device=target.device).view(
                -1, *[1] * (target.dim() - 1)
            )
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
        self._parts.append((hard, table.sum(1), len(target)))

    def finish(self) -> bool:
        """Put the batches together; say whether there was a valid pixel at all."""
        if not any(len(valid) for _, valid, _ in self._parts):
            return False
        self.hard = torch.cat([hard for hard, _, _ in self._parts])
        self.valid = torch.cat([valid for _, valid, _ in self._parts])
        self.images = torch.cat([torch.full_like(v, n) for _, v, n in self._parts])
        return True

    def hard_share(self, thresh: float) -> float:
        """Share of hard pixels among all valid ones."""
        column = self.hard[:, self.threshes.index(thresh)]
        return column.sum().item() / max(1, self.valid.sum().item())

    def spread(self, thresh: float) -> tuple[float, float, float]:
        """The 10th, 50th and 90th percentile of the pools' hard shares."""
        shares = self.hard[:, self.threshes.index(thresh)].double() / self.valid
        p10, p50, p90 = torch.quantile(shares, torch.tensor([0.1, 0.5, 0.9]).double())
        return p10.item(), p50.item(), p90.item()

    def floor(self, min_kept: int | float, per_image: bool = False) -> Tensor:
        """``min_kept`` in pixels of each pool, int64, shape (pools,)."""
        if isinstance(min_kept, float):
            return share_of(self.valid, min_kept)
        per_image = per_image and self.pool == "batch"
        k = min_kept * (self.images if per_image else torch.ones_like(self.images))
        return torch.minimum(k, self.valid)

    def binds(
        self, thresh: float | None, min_kept: int | float, per_image: bool = False
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

    Attributes:
        threshes: What to report, ascending.
        counts: By name of the head, and number of the loss where it has several.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: Sequence[str] | None,
        threshes: Sequence[float],
        pool: str | None,
    ) -> None:
        from mmseg.models.decode_heads.decode_head import BaseDecodeHead

        found = {n: m for n, m in model.named_modules() if isinstance(m, BaseDecodeHead)}
        found = {n: m for n, m in found.items() if isinstance(m.loss_decode, nn.Module)}
        if missing := [name for name in heads or () if name not in found]:
            raise cli.UserError(f"there is no head {missing[0]!r}; heads: {', '.join(found)}")
        rules = {
            name: [_rule(head, loss) for loss in _losses(head)] for name, head in found.items()
        }
        chosen = heads or [n for n in found if any(rules[n])] or list(found)
        own = [rule.thresh for n in chosen for rule in rules[n] if rule and rule.thresh]
        self.threshes = sorted({*(threshes or (*THRESHES, *own))})
        self.counts: dict[str, Counts] = {}
        self._seen: set[tuple[str, int, int]] = set()
        for name in chosen:
            losses = _losses(found[name])
            for number, (loss, rule) in enumerate(zip(losses, rules[name], strict=True)):
                title = f"{name}, loss {number}" if len(losses) > 1 else name
                if rule is None and any(rules[name]):
                    continue
                counts = Counts(rule, {*self.threshes, *CURVE, *own}, pool)
                self.counts[title] = counts
                loss.register_forward_pre_hook(self._look(name, counts), with_kwargs=True)

    def _look(self, head: str, counts: Counts) -> Any:
        def look(loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            pred, target = args[:2]
            key = (head, pred.data_ptr(), target.data_ptr())
            # A second loss on the same logits (CE and Dice) has nothing new to tell.
            if pred.dim() != 4 or target.is_floating_point() or key in self._seen:
                return
            self._seen.add(key)
            ignored = getattr(loss, "ignore_index", None)
            for other in (getattr(loss, "ignore_label", None), kwargs.get("ignore_index"), 255):
                ignored = other if ignored is None else ignored
            stats: dict[str, Any] = {"kept": None}  # asks for the maps
            ohem_cross_entropy(
                pred,
                target,
                thresh=None,
                min_kept=1.0,
                ignore_index=ignored,
                use_sigmoid=getattr(loss, "use_sigmoid", False),
                stats=stats,
            )
            target = target.reshape(stats["mined"].shape).long()
            counts.add(stats["mined"], stats["valid"], target, max(2, pred.shape[1]))

        return look

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


def _losses(head: Any) -> list[Any]:
    losses = head.loss_decode
    return list(losses) if isinstance(losses, nn.ModuleList) else [losses]


def _rule(head: Any, loss: Any) -> Rule | None:
    """What decides which of the loss's pixels are kept; None where nothing mines."""
    if isinstance(loss, OhemCrossEntropyLoss):
        if loss.thresh is None and loss.min_kept == 1 and isinstance(loss.min_kept, float):
            return None
        return Rule(loss.thresh, loss.min_kept, loss.pool, loss.min_kept_per == "image")
    if type(loss).__name__ == "OhemCrossEntropy":
        return Rule(loss.thresh, loss.min_kept)
    if type(head.sampler).__name__ == "OHEMPixelSampler":
        return Rule(head.sampler.thresh, head.sampler.min_kept, per_image=True)
    return None


# --- model and data --------------------------------------------------------------------------


def build_model(cfg: Config, checkpoint: str) -> nn.Module:
    """The model of the config with the weights of the checkpoint, ready to be looked at."""
    init_default_scope(cfg.get("default_scope") or "mmseg")
    if cfg.get("data_preprocessor"):
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    load_weights(model, checkpoint, to_train=True)
    # Heads take their training path, but nothing is random and no statistic moves.
    model.train()
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or "Drop" in kind:
            module.eval()
    return model.to(get_device())


def build_batches(cfg: Config, split: str, seed: int) -> Any:
    """Training's loader; for 'val', with the images of the validation set."""
    loader = cfg.train_dataloader
    if split == "val":
        train = [node for _, node in cli.iter_dicts(loader.dataset) if "pipeline" in node]
        dataset = cfg.val_dataloader.dataset
        for _, node in cli.iter_dicts(dataset):
            if "pipeline" in node:
                node["pipeline"] = train[0]["pipeline"]
        loader = {**loader, "dataset": dataset}
    set_random_seed(seed)
    return Runner.build_dataloader(loader, seed=seed)


# --- output ----------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _floor(min_kept: int | float, per_image: bool = False) -> str:
    if isinstance(min_kept, int):
        return f"{min_kept:,}" + (" per image" if per_image else "")
    share = Fraction(min_kept).limit_denominator(1000)
    return str(share) if share.numerator == 1 < share.denominator else f"{min_kept:g}"


def show(
    counts: Counts, threshes: Sequence[float], min_kepts: Sequence[int | float], title: str
) -> Table:
    """Table of one loss: a row for each thresh, a column for each min_kept."""
    table = Table(title=title, title_justify="left")
    for name in ("thresh", "hard", f"10 to 90 % of {POOLS[counts.pool]}"):
        table.add_column(name, justify="right")
    for min_kept in min_kepts:
        table.add_column(f"min_kept={_floor(min_kept)} binds on", justify="right")
    for thresh in threshes:
        low, _, high = counts.spread(thresh)
        table.add_row(
            f"{thresh:g}",
            _percent(counts.hard_share(thresh)),
            f"{_percent(low)} to {_percent(high)}",
            *(_percent(counts.binds(thresh, min_kept)[0]) for min_kept in min_kepts),
        )
    return table


def sentences(counts: Counts, title: str) -> str:
    """What the head's own settings do."""
    rule = counts.rule
    if rule is None:
        return f"{title} does not mine."
    binds, kept = counts.binds(rule.thresh, rule.min_kept, rule.per_image)
    floor = f"min_kept={_floor(rule.min_kept, rule.per_image)}"
    if isinstance(rule.min_kept, int):
        pixels = counts.floor(rule.min_kept, rule.per_image).double() / counts.valid
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
    path: str,
    found: dict[str, Counts],
    threshes: Sequence[float],
    min_kepts: Sequence[int | float],
) -> None:
    """One row for each loss, thresh and min_kept."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        for title, counts in found.items():
            for thresh, min_kept in itertools.product(threshes, min_kepts):
                shares = [counts.hard_share(thresh), *counts.spread(thresh)]
                shares += counts.binds(thresh, min_kept)
                values = [f"{share:.6g}" for share in shares]
                writer.writerow(
                    [title, counts.pool, f"{thresh:g}", *values[:4], min_kept, *values[4:]]
                )


def draw(path: str, found: dict[str, Counts], min_kepts: Sequence[int | float]) -> None:
    """Hard share against thresh, a line for each loss, with the floors as level lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    colours = pyplot.get_cmap("viridis")
    for number, (title, counts) in enumerate(found.items()):
        colour = colours(0.85 * number / max(1, len(found) - 1))
        shares = [counts.hard_share(thresh) for thresh in CURVE]
        axes.plot(CURVE, shares, color=colour, label=title)
        if len(found) == 1:
            spread = [counts.spread(thresh) for thresh in CURVE]
            low, high = [s[0] for s in spread], [s[2] for s in spread]
            axes.fill_between(
                CURVE,
                low,
                high,
                color=colour,
                alpha=0.2,
                lw=0,
                label=f"10 to 90 % of {POOLS[counts.pool]}",
            )
        if counts.rule and counts.rule.thresh is not None:
            thresh = counts.rule.thresh
            point = {"label": "the head's own thresh"} if len(found) == 1 else {}
            axes.plot(thresh, counts.hard_share(thresh), "o", color=colour, **point)
    for min_kept in min_kepts:
        first = next(iter(found.values()))
        share = (first.floor(min_kept).double() / first.valid).mean().item()
        axes.axhline(share, color="0.4", lw=0.8, ls="--")
        label = f"min_kept={_floor(min_kept)}"
        axes.annotate(label, (0.99, share), va="bottom", ha="right", fontsize=8)
    axes.set(xlabel="thresh", ylabel="hard share of the valid pixels", xlim=(0, 1), yscale="log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# --- command line ----------------------------------------------------------------------------


def _thresh(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a probability in (0, 1], got {text!r}")
    return value


def _min_kept(text: str) -> int | float:
    """An int, or a share written as 0.1 or 1/16."""
    if text.isdigit():
        return int(text)
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be pixels, or a share in [0, 1], got {text!r}")
    return value


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Say how many pixels each thresh calls hard, and where min_kept binds."
    )
    parser.add_argument(
        "config",
        help="path of a config, or the name of a shipped one (quickstart/..., ohem_mm::...); "
        '"python -m ohem_mm.config --list" prints them all',
    )
    parser.add_argument("checkpoint", help="checkpoint file")
    parser.add_argument(
        "--split",
        choices=["train", "val"],
        default="train",
        help="whose images to take; crops and augmentations are those of training",
    )
    parser.add_argument("--num-batches", type=int, default=50, help="how many (default: 50)")
    parser.add_argument(
        "--thresh", type=_thresh, nargs="+", default=[], help=f"default: {THRESHES} and the heads'"
    )
    parser.add_argument(
        "--min-kept",
        type=_min_kept,
        nargs="+",
        default=list(MIN_KEPTS),
        help="pixels of a pool, or a share such as 1/16 (default: 1/64 1/16 1/4)",
    )
    parser.add_argument(
        "--head",
        nargs="+",
        metavar="NAME",
        help="such as decode_head or auxiliary_head.0 (default: those that mine, or all)",
    )
    parser.add_argument(
        "--pool", choices=POOLS, help="over what min_kept counts (default: as the head does)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    parser.add_argument("--plot", metavar="PNG", help="draw the curves")
    parser.add_argument("--csv", metavar="FILE", help="write the numbers")
    cli.add_config_options(parser)
    return parser.parse_args()


def main() -> None:
    """Run the model over some batches and report."""
    args = parse_args()
    if args.num_batches < 1:
        raise cli.UserError(f"--num-batches must be at least 1, got {args.num_batches}")
    for file in filter(None, (args.plot, args.csv)):
        if not Path(file).absolute().parent.is_dir():
            raise cli.UserError(f"the folder of {file!r} does not exist")
    cfg = cli.load_config(args)
    for key in ("train_dataloader", *(["val_dataloader"] if args.split == "val" else [])):
        if cfg.get(key) is None:
            raise cli.UserError(f"the config has no {key}, so there are no batches to look at")
    cli.check_checkpoint(args.checkpoint)
    cli.check_losses(cfg)
    cli.check_datasets(cfg, (args.split,))
    model = build_model(cfg, args.checkpoint)
    watch = Watch(model, args.head, args.thresh, args.pool)
    batches = itertools.islice(build_batches(cfg, args.split, args.seed), args.num_batches)
    progress = track(batches, "batches", total=args.num_batches, console=Console(stderr=True))
    images = watch.run(model, progress)
    if not watch.counts:
        raise cli.UserError("no head hands logits and labels with a valid pixel to a loss")

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(
        f"{images} images of {args.split} in batches of {cfg.train_dataloader.batch_size}"
    )
    for title, counts in watch.counts.items():
        table = show(counts, watch.threshes, args.min_kept, "" if args.markdown else title)
        if args.markdown:
            console.print(f"\n**{title}**\n")
            table.box, table.show_edge = box.MARKDOWN, True
        console.print(table)
        console.print(sentences(counts, title), highlight=False)
    if args.csv:
        write_csv(args.csv, watch.counts, watch.threshes, args.min_kept)
    if args.plot:
        draw(args.plot, watch.counts, args.min_kept)


if __name__ == "__main__":
    sys.exit(cli.run(main))
