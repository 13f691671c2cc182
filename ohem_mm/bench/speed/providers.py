"""The losses that the speed benchmark compares.

A provider is a function that builds a step for a problem, and the rule that says in float64 what
its value must be. To add one: write both and give them a line in ``PROVIDERS``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._inductor.exc
from torch import Tensor, nn
from torch.nn import functional as F

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ohem_cross_entropy, ops, reference
from ohem_mm.bench.heads import bare_head, make_samples
from ohem_mm.bench.peers import submodule
from ohem_mm.bench.speed.problems import (
    IGNORE,
    SHARE,
    THRESH,
    Problem,
    Shape,
    Truth,
    check,
    make_problem,
)
from ohem_mm.errors import UserError
from ohem_mm.joint import joint_losses

BASELINE = "mmseg sampler thresh"

Step = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # small logits to loss and acc_seg
Build = Callable[[Problem, bool], Step]  # the bool asks for acc_seg
Settings = dict[str, Any]


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


# --- what the values must be ---------------------------------------------------------------------


def _plain(truth: Truth) -> Tensor:
    total = F.cross_entropy(truth.pairs, truth.target, ignore_index=IGNORE, reduction="sum")
    return total / truth.target.numel()


def _ohem(truth: Truth) -> Tensor:
    with backend("eager"):
        return ohem_cross_entropy(truth.pairs, truth.target, thresh=THRESH, min_kept=SHARE)


def _sampler(truth: Truth) -> Tensor:
    return reference.mmseg_sampler(truth.pairs, truth.target, thresh=THRESH, min_kept=truth.floor)


def _sampler_topk(truth: Truth) -> Tensor:
    return reference.mmseg_sampler_topk(truth.pairs, truth.target, min_kept=truth.floor)


def _mmseg_ohem(truth: Truth) -> Tensor:
    k = truth.floor * len(truth.target)
    return reference.hrnet(truth.pairs, truth.target, thresh=THRESH, min_kept=k)


def _valid_mean(truth: Truth) -> Tensor:
    return F.cross_entropy(truth.pairs, truth.target, ignore_index=IGNORE)


def _dice(truth: Truth, preset: str | None = None) -> Tensor:
    with backend("portable"):
        value: Tensor = RegionLoss(preset=preset)(truth.logits.double(), truth.labels)
    return value


def _ce_dice(truth: Truth) -> Tensor:
    return _valid_mean(truth) + _dice(truth)


def _ohem_dice(truth: Truth) -> Tensor:
    return _ohem(truth) + _dice(truth)


def _ce_smp_dice(truth: Truth) -> Tensor:
    return _plain(truth) + _dice(truth, "smp-dice")


def _probabilities(truth: Truth) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each image the probabilities, float64, (C, H, W), and the labels."""
    for image, labels in zip(truth.logits, truth.labels, strict=True):
        yield upsampled(image[None].double(), labels[None]).softmax(1)[0], labels


def _ce_mmseg_dice(truth: Truth) -> Tensor:
    losses = []
    for p, labels in _probabilities(truth):
        hit = p.gather(0, torch.where(labels == IGNORE, 0, labels)[None])[0]
        hit = torch.where(labels == IGNORE, 0, hit).sum()
        # What is predicted at ignored pixels counts.
        losses.append(1 - 2 * hit / (p.square().sum() + (labels != IGNORE).sum() + 2e-3))
    return _plain(truth) + torch.stack(losses).mean()


def _ce_lovasz(truth: Truth) -> Tensor:
    """Lovasz extension of the Jaccard loss of each class present; Berman et al., CVPR 2018."""
    parts = [(p.float()[:, t != IGNORE], t[t != IGNORE]) for p, t in _probabilities(truth)]
    p, labels = torch.cat([p for p, _ in parts], 1), torch.cat([t for _, t in parts])
    losses = []
    for place, own in enumerate(p):
        hot = (labels == place).double()
        if hot.any():
            error, order = (hot - own).abs().sort(descending=True)
            missed = hot.sum() - hot[order].cumsum(0)
            jaccard = 1 - missed / (hot.sum() + (1 - hot[order]).cumsum(0))
            losses.append(error @ torch.diff(jaccard, prepend=jaccard.new_zeros(1)))
    return _plain(truth) + torch.stack(losses).mean()


def check_formula() -> None:
    """Compare the float64 paths that check our own providers with the oracle, on a small input."""
    problem = make_problem(Shape(2, 5, 24, 32, 4), "cpu")
    logits, labels = problem.logits.detach(), problem.labels
    oracle = reference.ohem_cross_entropy(logits, labels, thresh=THRESH, min_kept=SHARE)
    check("the float64 formula on a small input", float(_ohem(problem.truth)), float(oracle), 1e-9)
    oracle = reference.region_loss(logits, labels)
    check("that of the overlap on a small input", float(_dice(problem.truth)), float(oracle), 1e-9)


# --- what a provider needs -----------------------------------------------------------------------


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Choose an implementation of ``ohem_mm.ops``; None leaves the choice alone."""
    before = os.environ.get("OHEM_MM_BACKEND")
    if name is not None:
        os.environ["OHEM_MM_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OHEM_MM_BACKEND", None)
        else:
            os.environ["OHEM_MM_BACKEND"] = before


def need_backend(name: str, logits: Tensor) -> None:
    """Raise :class:`UnavailableError` where an implementation would not run natively."""
    if name not in ops.BACKENDS:
        raise UnavailableError(f"this version of ohem_mm has no backend {name}")
    if name == "triton":
        from ohem_mm.ops import triton

        if not logits.is_cuda or not triton.available(logits):
            raise UnavailableError("it needs Triton and a GPU")


def need_mmseg() -> None:
    """Raise :class:`UnavailableError` without mmseg."""
    try:
        import mmseg.models  # noqa: F401
        from mmengine.registry import init_default_scope
    except ImportError as error:
        raise UnavailableError(f"it needs mmseg ({error})") from error
    init_default_scope("mmseg")


def build_head(
    problem: Problem, loss: Settings | list[Settings], sampler: Settings | None = None
) -> Any:
    """A decode head of mmseg for a problem."""
    need_mmseg()
    return bare_head(problem.shape.c, loss, sampler=sampler).to(problem.logits.device)


def our_loss() -> OhemCrossEntropyLoss:
    """The loss that all our providers use."""
    return OhemCrossEntropyLoss(thresh=THRESH, min_kept=SHARE, ignore_index=IGNORE)


# --- steps ---------------------------------------------------------------------------------------


def direct(name: str) -> Build:
    """Our loss, called with the small logits, in one implementation."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        need_backend(name, problem.logits)
        loss = our_loss()

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            stats: dict[str, Tensor] | None = {} if acc_seg else None
            with backend(name):
                value = loss(logits, problem.labels, stats=stats)
            if stats is None:
                return value, None
            return value, 100 * stats["hits"] / stats["num_valid"]

        return step

    return build


def fused_hook(problem: Problem, acc_seg: bool) -> Step:
    """A head of mmseg as FusedOhemHook leaves it."""
    if not acc_seg:
        raise UnavailableError("a fused head always counts acc_seg")
    settings = {"type": "OhemCrossEntropyLoss", "thresh": THRESH, "min_kept": SHARE}
    head = build_head(problem, settings)
    from ohem_mm.hooks.fused import fuse_heads

    fuse_heads(nn.ModuleDict({"head": head}), [])
    return by_feat(head, make_samples(problem.labels), "loss_ohem")


def by_feat(head: Any, samples: list[Any], *names: str) -> Step:
    """Upsampling, loss and accuracy as a head of mmseg does them; losses are added up."""

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        out = head.loss_by_feat(logits, samples)
        return sum((out[name] for name in names[1:]), out[names[0]]), out["acc_seg"]

    return step


PAIR: list[Settings] = [
    {
        "type": "OhemCrossEntropyLoss",
        "thresh": None,
        "min_kept": 1.0,
        "loss_name": "loss_ce",
    },
    {"type": "RegionLoss"},
]


def fused_pair(problem: Problem, acc_seg: bool) -> Step:
    """A head with plain cross-entropy and the region term, as FusedOhemHook leaves it."""
    if not acc_seg:
        raise UnavailableError("a fused head always counts acc_seg")
    head = build_head(problem, PAIR)
    from ohem_mm.hooks.fused import fuse_heads

    fuse_heads(nn.ModuleDict({"head": head}), [])
    return by_feat(head, make_samples(problem.labels), "loss_ce", "loss_region")


def direct_pair(name: str, ohem: bool = False) -> Build:
    """Our cross-entropy, with or without mining, and Dice in one call, in one implementation."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        need_backend(name, problem.logits)
        plain = OhemCrossEntropyLoss(thresh=None, min_kept=1.0, ignore_index=IGNORE)
        region = RegionLoss(ignore_index=IGNORE)
        pair: list[OhemCrossEntropyLoss | RegionLoss] = [our_loss() if ohem else plain, region]

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            stats: dict[str, Tensor] | None = {} if acc_seg else None
            with backend(name):
                first, second = joint_losses(pair, logits, problem.labels, stats=stats)
            if stats is None:
                return first + second, None
            return first + second, 100 * stats["hits"] / stats["num_valid"]

        return step

    return build


def mmseg_pair(**second: Any) -> Build:
    """mmseg's CrossEntropyLoss and another of its losses in a head."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        need_mmseg()
        head = build_head(problem, [{"type": "CrossEntropyLoss"}, second])
        first, other = head.loss_decode
        if acc_seg:
            return by_feat(head, make_samples(problem.labels), "loss_ce", other.loss_name)

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            wide, labels = upsampled(logits, problem.labels), problem.labels
            options = {"ignore_index": IGNORE}
            return first(wide, labels, **options) + other(wide, labels, **options), None

        return step

    return build


def smp_dice(problem: Problem, acc_seg: bool) -> Step:
    """Cross-entropy and the DiceLoss of segmentation_models_pytorch."""
    try:
        losses = submodule("segmentation_models_pytorch", "losses")
    except ImportError as error:
        raise UnavailableError(f"it needs segmentation_models_pytorch ({error})") from error
    loss, labels = losses.DiceLoss("multiclass", ignore_index=IGNORE), problem.labels

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = upsampled(logits, labels)
        total = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum")
        seen = None
        if acc_seg:
            hits = (wide.detach().argmax(1) == labels).sum()
            seen = 100 * hits / (labels != IGNORE).sum()
        return total / labels.numel() + loss(wide, labels), seen

    return step


def in_head(sampler: Callable[[Shape], Settings | None]) -> Build:
    """mmseg's CrossEntropyLoss in a head, with or without a sampler."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        head = build_head(problem, {"type": "CrossEntropyLoss"}, sampler(problem.shape))
        if acc_seg:
            return by_feat(head, make_samples(problem.labels), "loss_ce")

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            labels = problem.labels
            wide = upsampled(logits, labels)
            weight = head.sampler.sample(wide, labels[:, None]) if head.sampler else None
            return head.loss_decode(wide, labels, weight=weight, ignore_index=IGNORE), None

        return step

    return build


def mmseg_loss(problem: Problem, acc_seg: bool) -> Step:
    """mmseg's OhemCrossEntropy, which ordinary heads cannot call."""
    need_mmseg()
    from mmseg.models.losses import OhemCrossEntropy, accuracy

    shape, labels = problem.shape, problem.labels
    loss = OhemCrossEntropy(thres=THRESH, min_kept=shape.floor * shape.n, ignore_label=IGNORE)

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = upsampled(logits, labels)
        seen = accuracy(wide, labels, ignore_index=IGNORE) if acc_seg else None
        return loss(wide, labels), seen

    return step


def upsampled(logits: Tensor, labels: Tensor) -> Tensor:
    """What mmseg's resize does, without its checks."""
    return F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)


def compiled(ohem: bool) -> Build:
    """The whole expression under torch.compile, with a cheaper accuracy than mmseg's."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        loss = our_loss()

        def expression(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
            wide = upsampled(logits, labels)
            if ohem:
                value = loss(wide, labels)
            else:
                total = F.cross_entropy(wide, labels, ignore_index=IGNORE, reduction="sum")
                value = total / labels.numel()
            if not acc_seg:
                return value, None
            hits = (wide.detach().argmax(1) == labels).sum()
            return value, 100 * hits / (labels != IGNORE).sum()

        fast = torch.compile(expression, dynamic=False)

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            return fast(logits, problem.labels)

        try:
            step(problem.logits)[0].backward()  # type: ignore[no-untyped-call]
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnavailableError(f"torch.compile cannot build it here ({reason})") from error
        return step

    return build


def thresh_sampler(shape: Shape) -> Settings:
    """The sampler's configuration."""
    return {"type": "OHEMPixelSampler", "thresh": THRESH, "min_kept": shape.floor}


class Provider(NamedTuple):
    """One way to compute a loss."""

    build: Build
    rule: Callable[[Truth], Tensor]  # its value
    variant: str | None  # which twin of a config has it; None: none
    backend: str | None = None
    fused: bool = False


PROVIDERS = {
    "ohem_mm fused hook": Provider(fused_hook, _ohem, "-ohem", fused=True),
    "ohem_mm triton": Provider(direct("triton"), _ohem, "-ohem", "triton"),
    "ohem_mm portable": Provider(direct("portable"), _ohem, "-ohem", "portable"),
    "ohem_mm eager": Provider(direct("eager"), _ohem, "-ohem", "eager"),
    "ohem_mm compiled": Provider(compiled(True), _ohem, None),
    BASELINE: Provider(in_head(thresh_sampler), _sampler, "-sampler"),
    "mmseg sampler top-k": Provider(
        in_head(lambda shape: thresh_sampler(shape) | {"thresh": None}), _sampler_topk, "-sampler"
    ),
    "mmseg OhemCrossEntropy": Provider(mmseg_loss, _mmseg_ohem, None),
    "plain CE": Provider(in_head(lambda shape: None), _plain, ""),
    "plain CE compiled": Provider(compiled(False), _plain, None),
    # The region term. OHEM + Dice against `ohem_mm portable` is what it costs beside mining.
    "CE + Dice (hook)": Provider(fused_pair, _ce_dice, None, fused=True),
    "CE + Dice (row bands)": Provider(direct_pair("portable"), _ce_dice, None, "portable"),
    "CE + Dice (full size)": Provider(direct_pair("eager"), _ce_dice, None, "eager"),
    "OHEM + Dice (row bands)": Provider(
        direct_pair("portable", True), _ohem_dice, None, "portable"
    ),
    "CE + mmseg DiceLoss": Provider(
        mmseg_pair(type="DiceLoss", use_sigmoid=False), _ce_mmseg_dice, None
    ),
    "CE + mmseg LovaszLoss": Provider(
        mmseg_pair(type="LovaszLoss", reduction="none"), _ce_lovasz, None
    ),
    "CE + smp DiceLoss": Provider(smp_dice, _ce_smp_dice, None),
}


def choose_providers(words: Sequence[str] | None) -> list[str]:
    """Names of providers: a word selects the one that is so called, or all that contain it.

    Without words, all but the pairs with an overlap loss, whose names have a plus in them.

    Raises:
        UserError: A word selects none.
    """
    chosen = []
    if not words:
        return [name for name in PROVIDERS if " + " not in name]
    for word in words:
        found = [word] if word in PROVIDERS else [name for name in PROVIDERS if word in name]
        if not found:
            raise UserError(f"no provider is called {word!r}; there are {', '.join(PROVIDERS)}")
        chosen += found
    return [name for name in PROVIDERS if name in chosen]
