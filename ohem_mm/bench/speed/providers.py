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

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, ops, reference
from ohem_mm.bench.heads import bare_head, make_samples
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


def check_formula() -> None:
    """Compare the float64 path that checks our own providers with the oracle, on a small input."""
    problem = make_problem(Shape(2, 5, 24, 32, 4), "cpu")
    oracle = reference.ohem_cross_entropy(
        problem.logits.detach(), problem.labels, thresh=THRESH, min_kept=SHARE
    )
    expected, value = float(oracle), float(_ohem(problem.truth))
    check("the float64 formula on a small input", value, expected, 1e-9)


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


def build_head(problem: Problem, loss: Settings, sampler: Settings | None = None) -> Any:
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


def by_feat(head: Any, samples: list[Any], name: str) -> Step:
    """Upsampling, loss and accuracy as a head of mmseg does them."""

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        out = head.loss_by_feat(logits, samples)
        return out[name], out["acc_seg"]

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
}


def choose_providers(words: Sequence[str] | None) -> list[str]:
    """Names of providers: a word selects the one that is so called, or all that contain it.

    Raises:
        UserError: A word selects none.
    """
    chosen = []
    for word in words or [""]:
        found = [word] if word in PROVIDERS else [name for name in PROVIDERS if word in name]
        if not found:
            raise UserError(f"no provider is called {word!r}; there are {', '.join(PROVIDERS)}")
        chosen += found
    return [name for name in PROVIDERS if name in chosen]
