"""The losses that the speed benchmark compares.

A provider is a function that builds a step for a problem, and the names of the float64 values that
make up its own. To add one: write the function and give it a line in ``PROVIDERS``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch._inductor.exc
from torch import Tensor, nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss, ops
from ohem_mm.bench.heads import bare_head, make_samples
from ohem_mm.bench.peers import submodule
from ohem_mm.bench.speed.problems import IGNORE, THRESH, Problem, upsampled
from ohem_mm.bench.speed.values import RULE, backend, cross_entropy
from ohem_mm.errors import UserError
from ohem_mm.joint import joint_losses

BASELINE = "mmseg sampler thresh"

Step = Callable[[Tensor], tuple[Tensor, Tensor | None]]  # small logits to loss and acc_seg
Build = Callable[[Problem, bool], Step]  # the bool asks for acc_seg
Loss = Callable[[Tensor, Tensor], Tensor]  # of full-size logits and labels
Settings = dict[str, Any]

# Configs of our losses, and of those of mmseg.
OHEM = {"type": "OhemCrossEntropyLoss", **RULE}
CE = {"type": "OhemCrossEntropyLoss", "thresh": None, "min_kept": 1.0, "loss_name": "loss_ce"}
DICE = {"type": "RegionLoss"}
MMSEG_CE = {"type": "CrossEntropyLoss"}
MMSEG_DICE = {"type": "DiceLoss", "use_sigmoid": False}
LOVASZ = {"type": "LovaszLoss", "reduction": "none"}
SAMPLER = {"type": "OHEMPixelSampler", "thresh": THRESH}


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


# --- what a provider needs -----------------------------------------------------------------------


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


def build_head(problem: Problem, losses: Sequence[Settings], sampler: Settings | None) -> Any:
    """A decode head of mmseg for a problem."""
    need_mmseg()
    loss = losses[0] if len(losses) == 1 else list(losses)
    head = bare_head(problem.logits.shape[1], loss, sampler=sampler)
    return head.to(problem.logits.device)


def build_loss(settings: Settings) -> Any:
    """One of our losses, without mmseg."""
    kinds = {"OhemCrossEntropyLoss": OhemCrossEntropyLoss, "RegionLoss": RegionLoss}
    rule = {key: value for key, value in settings.items() if key != "type"}
    return kinds[settings["type"]](**rule, ignore_index=IGNORE)


def total(losses: Sequence[Tensor]) -> Tensor:
    """Their sum; of one, itself."""
    return sum(losses[1:], losses[0])


def accuracy(wide: Tensor, labels: Tensor) -> Tensor:
    """What mmseg logs as acc_seg, computed more cheaply."""
    return 100 * (wide.detach().argmax(1) == labels).sum() / (labels != IGNORE).sum()


# --- steps ---------------------------------------------------------------------------------------


def direct(name: str, *settings: Settings) -> Build:
    """Our losses in one call with the small logits, in one implementation."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        need_backend(name, problem.logits)
        losses = list(map(build_loss, settings))

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            stats: dict[str, Tensor] | None = {} if acc_seg else None
            with backend(name):
                value = total(joint_losses(losses, logits, problem.labels, stats=stats))
            return value, None if stats is None else 100 * stats["hits"] / stats["num_valid"]

        return step

    return build


def by_feat(head: Any, problem: Problem) -> Step:
    """Upsampling, losses and accuracy as a head of mmseg does them."""
    samples = make_samples(problem.labels)

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        out = head.loss_by_feat(logits, samples)
        return total([value for key, value in out.items() if key != "acc_seg"]), out["acc_seg"]

    return step


def fused(*settings: Settings) -> Build:
    """A head of mmseg with our losses, as FusedOhemHook leaves it."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        if not acc_seg:
            raise UnavailableError("a fused head always counts acc_seg")
        head = build_head(problem, settings, None)
        from ohem_mm.hooks.fused import fuse_heads

        fuse_heads(nn.ModuleDict({"head": head}), [])
        return by_feat(head, problem)

    return build


def in_head(*settings: Settings, sampler: Settings | None = None) -> Build:
    """Losses of mmseg in a head, with or without a sampler."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        own = None if sampler is None else {**sampler, "min_kept": problem.floor}
        head = build_head(problem, settings, own)
        if acc_seg:
            return by_feat(head, problem)
        losses = [head.loss_decode] if len(settings) == 1 else head.loss_decode

        def summed(wide: Tensor, labels: Tensor) -> Tensor:
            weight = None if own is None else head.sampler.sample(wide, labels[:, None])
            return total([loss(wide, labels, weight, ignore_index=IGNORE) for loss in losses])

        return full_size(problem, summed)

    return build


def full_size(problem: Problem, loss: Loss, see: Loss | None = None) -> Step:
    """Upsampling, then a loss of full-size logits, and the accuracy there."""

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = upsampled(logits, problem.labels)
        seen = None if see is None else see(wide, problem.labels)
        return loss(wide, problem.labels), seen

    return step


def mmseg_loss(problem: Problem, acc_seg: bool) -> Step:
    """mmseg's OhemCrossEntropy, which ordinary heads cannot call."""
    need_mmseg()
    from mmseg.models import losses

    floor = problem.floor * len(problem.labels)
    loss = losses.OhemCrossEntropy(thres=THRESH, min_kept=floor, ignore_label=IGNORE)
    see = partial(losses.accuracy, ignore_index=IGNORE)
    return full_size(problem, loss, see if acc_seg else None)


def smp_dice(problem: Problem, acc_seg: bool) -> Step:
    """Cross-entropy and the DiceLoss of segmentation_models_pytorch."""
    try:
        losses = submodule("segmentation_models_pytorch", "losses")
    except ImportError as error:
        raise UnavailableError(f"it needs segmentation_models_pytorch ({error})") from error
    dice = losses.DiceLoss("multiclass", ignore_index=IGNORE)

    def summed(wide: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = cross_entropy(wide, labels) + dice(wide, labels)
        return value

    return full_size(problem, summed, accuracy if acc_seg else None)


def compiled(loss: Loss) -> Build:
    """The whole expression under torch.compile."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        expression = full_size(problem, loss, accuracy if acc_seg else None)
        step: Step = torch.compile(expression, dynamic=False)
        try:
            step(problem.logits)[0].backward()  # type: ignore[no-untyped-call]
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnavailableError(f"torch.compile cannot build it here ({reason})") from error
        return step

    return build


class Provider(NamedTuple):
    """One way to compute a loss."""

    build: Build
    value: str  # what it must be, of ``VALUES``
    # In a network: which twin of a config has it (None: none), and how it is run there.
    variant: str | None = None
    backend: str | None = None
    fused: bool = False


PROVIDERS = {
    "ohem_mm fused hook": Provider(fused(OHEM), "ohem", "-ohem", fused=True),
    "ohem_mm triton": Provider(direct("triton", OHEM), "ohem", "-ohem", "triton"),
    "ohem_mm portable": Provider(direct("portable", OHEM), "ohem", "-ohem", "portable"),
    "ohem_mm eager": Provider(direct("eager", OHEM), "ohem", "-ohem", "eager"),
    "ohem_mm compiled": Provider(compiled(build_loss(OHEM)), "ohem"),
    BASELINE: Provider(in_head(MMSEG_CE, sampler=SAMPLER), "mmseg sampler", "-sampler"),
    "mmseg sampler top-k": Provider(
        in_head(MMSEG_CE, sampler={**SAMPLER, "thresh": None}), "mmseg top-k", "-sampler"
    ),
    "mmseg OhemCrossEntropy": Provider(mmseg_loss, "mmseg ohem"),
    "plain CE": Provider(in_head(MMSEG_CE), "mmseg ce", ""),
    "plain CE compiled": Provider(compiled(cross_entropy), "mmseg ce"),
    # The region term. OHEM + Dice against `ohem_mm portable` is what it costs beside mining.
    "CE + Dice (hook)": Provider(fused(CE, DICE), "ce + dice"),
    "CE + Dice (row bands)": Provider(direct("portable", CE, DICE), "ce + dice"),
    "CE + Dice (full size)": Provider(direct("eager", CE, DICE), "ce + dice"),
    "OHEM + Dice (row bands)": Provider(direct("portable", OHEM, DICE), "ohem + dice"),
    "CE + mmseg DiceLoss": Provider(in_head(MMSEG_CE, MMSEG_DICE), "mmseg ce + mmseg dice"),
    "CE + mmseg LovaszLoss": Provider(in_head(MMSEG_CE, LOVASZ), "mmseg ce + mmseg lovasz"),
    "CE + smp DiceLoss": Provider(smp_dice, "mmseg ce + smp dice"),
}


def choose_providers(words: Sequence[str] | None) -> list[str]:
    """Names of providers: a word selects the one that is so called, or all that contain it.

    Without words, all but the pairs with an overlap loss, whose names have a plus in them.
    """
    if not words:
        return [name for name in PROVIDERS if " + " not in name]
    chosen = []
    for word in words:
        found = [word] if word in PROVIDERS else [name for name in PROVIDERS if word in name]
        if not found:
            raise UserError(f"no provider is called {word!r}; there are {', '.join(PROVIDERS)}")
        chosen += found
    return [name for name in PROVIDERS if name in chosen]
