"""Time and memory of the loss against the alternatives, on the CPU or one GPU.

A head step starts from the small logits of a decode head: upsampling, loss, the accuracy `acc_seg`
that mmseg logs, and the backward pass to the small logits. An iteration is a whole training step
of a shipped config with random input; only "fused hook" uses the hook there. All providers get the
same input in the same run, in an order that changes from repeat to repeat, and the value of each is
checked in float64 before it is timed.

    python tools/benchmark_loss.py                                # the device's usual shape
    python tools/benchmark_loss.py --shapes 4x19x512x512/8 --providers portable sampler
    python tools/benchmark_loss.py --sweep pixels classes --plot
    python tools/benchmark_loss.py --modes iteration --image 4x1024x1024
    python tools/benchmark_loss.py --report                       # tables from the records alone

Times are in milliseconds, memory is the peak above what is allocated before the step, in MiB. On a
GPU the level-2 cache is flushed before each step.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import json
import logging
import math
import os
import platform
import random
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start and stop

import torch
import torch._dynamo
import torch._inductor.exc
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

import ohem_mm
from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy, ops, reference
from ohem_mm.config import config_path

RECORDS = Path(__file__).resolve().parent / "benchmarks" / "loss.csv"
COLUMNS = [
    *("kernel", "provider", "mode", "metric", "unit", "x", "p50", "p20", "p80", "config"),
    *("device_name", "threads", "timestamp", "torch", "triton", "ohem_mm", "commit", "command"),
]

SHAPES = {
    "cityscapes-s8": "4x19x1024x1024/8",
    "ade20k-s4": "16x150x512x512/4",
    "cpu": "2x19x512x1024/8",
}
HEAD_MODES = ("step", "forward", "backward")
MODES = (*HEAD_MODES, "iteration")
NETWORKS = {
    "bisenetv2": "bisenetv2/bisenetv2_fcn_4xb4{}-160k_cityscapes-1024x1024",
    "segformer_mit-b0": "segformer/segformer_mit-b0_8xb1{}-160k_cityscapes-1024x1024",
}
SWEEPS = ("pixels", "classes", "stride", "kept")
BASELINE = "mmseg sampler thresh"
FLOOR = "byte floor"

THRESH, SHARE, IGNORE = 0.7, 1 / 16, 255
HARD = 0.2  # share of the pixels below the threshold, unless it is what a sweep varies
TOLERANCE = 1e-4  # relative; float32 may put a few pixels on the other side of the threshold

Row = dict[str, Any]
Step = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class UnavailableError(Exception):
    """A provider cannot run here; the message says why."""


class WrongValueError(Exception):
    """A provider does not compute what it should."""


# --- input ---------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Batch, classes and size of the labels, and the stride of the logits."""

    n: int
    c: int
    height: int
    width: int
    stride: int

    def __str__(self) -> str:
        return f"{self.n}x{self.c}x{self.height}x{self.width}/{self.stride}"

    @property
    def small(self) -> tuple[int, int]:
        """Size of the logits."""
        return self.height // self.stride, self.width // self.stride

    @property
    def image(self) -> str:
        """Size of the images of an iteration."""
        return f"{self.n}x{self.height}x{self.width}"

    @property
    def floor(self) -> int:
        """Pixels of one image that are kept at least: the sampler's reading of ``SHARE``."""
        return max(2, int(self.height * self.width * SHARE))


def parse_shape(text: str) -> Shape:
    """A name of ``SHAPES`` or NxCxHxW/stride."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)/(\d+)", SHAPES.get(text, text))
    if found is None:
        raise argparse.ArgumentTypeError(
            f"expected NxCxHxW/stride or one of {', '.join(SHAPES)}, but got {text!r}"
        )
    shape = Shape(*map(int, found.groups()))
    if min(shape) < 1 or not 2 <= shape.c < IGNORE or min(shape.small) < 1:
        raise argparse.ArgumentTypeError(
            f"a shape needs 2 to {IGNORE - 1} classes and a stride no larger than the image, but "
            f"got {text!r}"
        )
    return shape


def parse_image(text: str) -> tuple[int, int, int]:
    """NxHxW."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected NxHxW, but got {text!r}")
    n, height, width = map(int, found.groups())
    return n, height, width


class Problem(NamedTuple):
    """Input of one head step and what is known about it."""

    shape: Shape
    logits: Tensor  # float32 leaf, (N, C, h, w)
    labels: Tensor  # int64, (N, H, W)
    truth: Truth


class Truth(NamedTuple):
    """What each pixel contributes, in float64."""

    pairs: Tensor  # logits of two channels with the same loss and true-class probability
    target: Tensor  # 0, or IGNORE
    accuracy: float  # per cent
    hard: float  # share of the valid pixels below the threshold
    unsure: float  # pixels that float32 may put on the other side of it, as a share of those


def make_labels(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Patches of 8 x 8 cells; one in twenty is ignored.

    Returns:
        Labels at the size of the logits, without ignored ones, (N, 1, h, w), and at full size,
        (N, H, W), both int64.
    """
    h, w = shape.small
    grid = (shape.n, 1, math.ceil(h / 8), math.ceil(w / 8))
    patches = torch.randint(0, shape.c, grid, generator=generator).float()
    ignored = torch.rand(grid, generator=generator) < 0.05
    ignored.view(-1)[0] = False
    small = F.interpolate(patches, size=(h, w), mode="nearest")
    full = F.interpolate(
        patches.masked_fill(ignored, IGNORE), size=(shape.height, shape.width), mode="nearest"
    )
    return small.long(), full[:, 0].long()


def make_problem(shape: Shape, device: str, hard: float = HARD) -> Problem:
    """Noise plus a margin for the true class, such that about ``hard`` of the pixels are hard."""
    generator = torch.Generator().manual_seed(0)
    small, labels = make_labels(shape, generator)
    noise = torch.randn(shape.n, shape.c, *shape.small, generator=generator)
    hot = torch.zeros_like(noise).scatter_(1, small, 1)

    # The margin is found on a corner of the first images.
    part = (slice(4), slice(None), *(slice(min(24, size)) for size in shape.small))
    corner = labels[:4, : 24 * shape.stride, : 24 * shape.stride]
    low, high = -10.0, 40.0
    for _ in range(16):
        margin = (low + high) / 2
        if measure_truth(noise[part] + margin * hot[part], corner).hard > hard:
            low = margin
        else:
            high = margin
    leaf = (noise + margin * hot).to(device).requires_grad_()
    labels = labels.to(device)
    return Problem(shape, leaf, labels, measure_truth(leaf, labels))


@torch.no_grad()
def measure_truth(logits: Tensor, labels: Tensor) -> Truth:
    """Upsample and compute cross-entropy in float64, one image at a time."""
    losses, hits = [], 0
    valid = labels != IGNORE
    for image, label, ok in zip(logits, labels, valid, strict=True):
        wide = F.interpolate(
            image[None].double(), size=label.shape, mode="bilinear", align_corners=False
        )
        index = torch.where(ok, label, 0)[None]
        losses.append(F.cross_entropy(wide, index, reduction="none"))
        hits += int(((wide.argmax(1) == index) & ok).sum())
    loss = torch.cat(losses)
    # Rules look only at the loss and the probability p of the true class, and two channels with
    # the logits log(p) and log(1 - p) have just those.
    pairs = torch.stack([-loss, (-torch.expm1(-loss)).log().clamp(min=-700)], 1)
    count = max(1, int(valid.sum()))
    beyond = (loss + math.log(THRESH))[valid]
    hard, unsure = int((beyond > 0).sum()), int((beyond.abs() < 2e-6).sum())
    target = torch.where(valid, 0, IGNORE)
    return Truth(pairs, target, 100 * hits / count, hard / count, unsure / max(1, hard))


# --- what the values must be ---------------------------------------------------------------------


def _plain(truth: Truth, floor: int) -> Tensor:
    total = F.cross_entropy(truth.pairs, truth.target, ignore_index=IGNORE, reduction="sum")
    return total / truth.target.numel()


def _ohem(truth: Truth, floor: int) -> Tensor:
    with backend("eager"):
        return ohem_cross_entropy(truth.pairs, truth.target, thresh=THRESH, min_kept=SHARE)


def _sampler(truth: Truth, floor: int) -> Tensor:
    return reference.mmseg_sampler(truth.pairs, truth.target, thresh=THRESH, min_kept=floor)


def _sampler_topk(truth: Truth, floor: int) -> Tensor:
    return reference.mmseg_sampler_topk(truth.pairs, truth.target, min_kept=floor)


def _mmseg_ohem(truth: Truth, floor: int) -> Tensor:
    k = floor * len(truth.target)
    return reference.hrnet(truth.pairs, truth.target, thresh=THRESH, min_kept=k)


def check(what: str, value: float, expected: float, tolerance: float = TOLERANCE) -> None:
    """Raise :class:`WrongValueError` where a value is not the expected one, or not a number."""
    if not abs(value - expected) <= tolerance * abs(expected):
        raise WrongValueError(f"{what} is {value!r}, but it should be {expected!r}")


def check_formula() -> None:
    """Compare the float64 path that checks our own providers with the oracle, on a small input."""
    problem = make_problem(Shape(2, 5, 24, 32, 4), "cpu")
    oracle = reference.ohem_cross_entropy(
        problem.logits.detach(), problem.labels, thresh=THRESH, min_kept=SHARE
    )
    expected, value = float(oracle), float(_ohem(problem.truth, problem.shape.floor))
    check("the float64 formula on a small input", value, expected, 1e-9)


# --- providers -----------------------------------------------------------------------------------


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


def build_head(problem: Problem, loss: Row, sampler: Row | None = None) -> Any:
    """A decode head of mmseg of which only the loss is used."""
    need_mmseg()
    from mmseg.models.decode_heads import FCNHead

    return FCNHead(
        in_channels=1,
        channels=1,
        num_convs=0,
        concat_input=False,
        num_classes=problem.shape.c,
        sampler=sampler,
        loss_decode=loss,
    ).to(problem.logits.device)


def make_samples(labels: Tensor) -> list[Any]:
    """Labels as mmseg's heads take them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]


def our_loss() -> OhemCrossEntropyLoss:
    """The loss that all our providers use."""
    return OhemCrossEntropyLoss(thresh=THRESH, min_kept=SHARE, ignore_index=IGNORE)


def direct(name: str) -> Callable[[Problem, bool], Step]:
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
            return value, 100 * stats["hits"] / stats["valid"].sum()

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


def in_head(sampler: Callable[[Shape], Row | None]) -> Callable[[Problem, bool], Step]:
    """mmseg's CrossEntropyLoss in a head, with or without a sampler."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        loss = {"type": "CrossEntropyLoss"}
        head = build_head(problem, loss, sampler(problem.shape))
        if acc_seg:
            return by_feat(head, make_samples(problem.labels), "loss_ce")
        from mmseg.models.utils import resize

        def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
            labels = problem.labels
            wide = resize(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            weight = head.sampler.sample(wide, labels[:, None]) if head.sampler else None
            return head.loss_decode(wide, labels, weight=weight, ignore_index=IGNORE), None

        return step

    return build


def mmseg_loss(problem: Problem, acc_seg: bool) -> Step:
    """mmseg's OhemCrossEntropy, which ordinary heads cannot call."""
    need_mmseg()
    from mmseg.models.losses import OhemCrossEntropy, accuracy
    from mmseg.models.utils import resize

    shape, labels = problem.shape, problem.labels
    loss = OhemCrossEntropy(thres=THRESH, min_kept=shape.floor * shape.n, ignore_label=IGNORE)

    def step(logits: Tensor) -> tuple[Tensor, Tensor | None]:
        wide = resize(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
        seen = accuracy(wide, labels, ignore_index=IGNORE) if acc_seg else None
        return loss(wide, labels), seen

    return step


def compiled(ohem: bool) -> Callable[[Problem, bool], Step]:
    """The whole expression under torch.compile, with a cheaper accuracy than mmseg's."""

    def build(problem: Problem, acc_seg: bool) -> Step:
        loss = our_loss()

        def expression(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
            wide = F.interpolate(
                logits, size=labels.shape[1:], mode="bilinear", align_corners=False
            )
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
            step(problem.logits)[0].backward()
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UnavailableError(f"torch.compile cannot build it here ({reason})") from error
        return step

    return build


def thresh_sampler(shape: Shape) -> Row:
    """The sampler's configuration."""
    return {"type": "OHEMPixelSampler", "thresh": THRESH, "min_kept": shape.floor}


class Provider(NamedTuple):
    """One way to compute a loss."""

    build: Callable[[Problem, bool], Step]
    rule: Callable[[Truth, int], Tensor]  # its value, from the truth and the floor of an image
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
    """Names of providers: a word selects the one that is so called, or all that contain it."""
    if not words:
        return list(PROVIDERS)
    chosen = []
    for word in words:
        found = [word] if word in PROVIDERS else [name for name in PROVIDERS if word in name]
        if not found:
            raise SystemExit(
                f"error: no provider is called {word!r}; there are {', '.join(PROVIDERS)}"
            )
        chosen += found
    return [name for name in PROVIDERS if name in chosen]


# --- jobs ----------------------------------------------------------------------------------------


class Job(NamedTuple):
    """Something to be timed: phases that run one after the other."""

    provider: str
    acc_seg: bool
    phases: list[Callable[[], object]]
    reset: Callable[[], None]  # drops what a step leaves behind


def head_job(name: str, problem: Problem, acc_seg: bool) -> Job:
    """A head step in two phases, forward and backward; its value is checked first."""
    step = PROVIDERS[name].build(problem, acc_seg)
    value, seen = step(problem.logits)
    expected = PROVIDERS[name].rule(problem.truth, problem.shape.floor)
    check(
        f"the loss of {name} at {problem.shape}",
        float(value.detach()),
        float(expected),
        TOLERANCE + problem.truth.unsure,
    )
    if seen is not None:
        check(f"acc_seg of {name} at {problem.shape}", float(seen), problem.truth.accuracy)
    del value, seen
    losses: list[Tensor] = []

    def reset() -> None:
        losses.clear()
        problem.logits.grad = None

    phases = [lambda: losses.append(step(problem.logits)[0]), lambda: losses.pop().backward()]
    return Job(name, acc_seg, phases, reset)


def network_job(name: str, network: str, shape: Shape, device: str) -> tuple[Job, float]:
    """A training iteration of a shipped config, and the share of hard pixels in its main head."""
    provider = PROVIDERS[name]
    if provider.variant is None:
        raise UnavailableError("the network's heads cannot use it")
    if provider.backend:
        need_backend(provider.backend, torch.empty(1, 1, 1, 1, device=device))
    need_mmseg()
    from mmengine.config import Config
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import build_optim_wrapper
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead
    from mmseg.registry import MODELS

    cfg = Config.fromfile(config_path(NETWORKS[network].format(provider.variant)))
    cfg.model.data_preprocessor.size = (shape.height, shape.width)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(device).train()
    heads = [head for head in model.modules() if isinstance(head, BaseDecodeHead)]
    for head in heads:
        if head.sampler is not None:
            head.sampler.min_kept = shape.floor
            if "top-k" in name:
                head.sampler.thresh = None
    if provider.fused:
        from ohem_mm.hooks.fused import fuse_heads

        fuse_heads(model, [])
    logging.disable()  # it would list every parameter
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    logging.disable(logging.NOTSET)
    for group in wrapper.optimizer.param_groups:
        group["lr"] = 0.0  # the work is the same, and all providers keep the same network

    generator = torch.Generator().manual_seed(0)
    _, labels = make_labels(shape, generator)
    size = (shape.n, 3, shape.height, shape.width)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device)
    labels = labels.to(device)
    data = {"inputs": list(images), "data_samples": make_samples(labels)}

    seen: list[Tensor] = []  # the small logits of each head
    hooks = [
        head.conv_seg.register_forward_hook(lambda _, __, out: seen.append(out)) for head in heads
    ]
    with backend(provider.backend), torch.no_grad():
        losses = model(**model.data_preprocessor(data, True), mode="loss")
    for hook in hooks:
        hook.remove()
    truths = [measure_truth(logits, labels) for logits in seen]
    expected = sum(float(provider.rule(truth, shape.floor)) for truth in truths)
    value = sum(float(loss) for key, loss in losses.items() if "loss" in key)
    unsure = max(truth.unsure for truth in truths)
    check(f"the loss of {name} in {network}", value, expected, TOLERANCE + unsure)

    def step() -> None:
        with backend(provider.backend):
            model.train_step(data, wrapper)

    return Job(name, True, [step], lambda: model.zero_grad(set_to_none=True)), truths[0].hard


# --- measuring -----------------------------------------------------------------------------------


class Meter:
    """Times phases and tracks memory on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.set_device(device)
        self.flush = torch.empty(2**28 if self.cuda else 0, dtype=torch.uint8, device=device)

    def times(self, job: Job) -> list[float]:
        """Milliseconds of each phase."""
        job.reset()
        if not self.cuda:
            marks = [time.perf_counter()]
            for phase in job.phases:
                phase()
                marks.append(time.perf_counter())
            return [1000 * (end - start) for start, end in pairwise(marks)]
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(job.phases) + 1)]
        torch.cuda.synchronize()
        # While the device is busy with this, the host gets ahead of it.
        self.flush.zero_()
        events[0].record()
        for phase, event in zip(job.phases, events[1:], strict=True):
            phase()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]

    def memory(self, job: Job, phases: int) -> float:
        """Peak MiB of the first ``phases`` phases, above what was allocated before."""
        job.reset()

        def run() -> None:
            for phase in job.phases[:phases]:
                phase()

        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = cpu_peak(run)
        job.reset()
        return peak / 2**20

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a millisecond that a copy reads and writes, best of ten."""
        size = 2**28 if self.cuda else 2**26  # larger than the caches
        source = torch.zeros(size, dtype=torch.uint8, device=self.flush.device)
        into = torch.empty_like(source)
        job = Job("", False, [lambda: into.copy_(source)], lambda: None)
        return 2 * source.numel() / min(self.times(job)[0] for _ in range(10))


def cpu_peak(run: Callable[[], None]) -> int:
    """Peak bytes that PyTorch's allocator handed out while ``run`` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The profiler's summaries are per operation; its events are single allocations.
    events = profiler.profiler.kineto_results.events()
    memory = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    peak = now = 0
    for _, size in memory:
        now += size
        peak = max(peak, now)
    return peak


def byte_floor(shape: Shape) -> int:
    """Bytes that any implementation moves.

    Twice the int64 labels, three times a float32 loss map, twice the small logits and once their
    gradient.
    """
    small = shape.n * shape.c * math.prod(shape.small)
    return shape.n * shape.height * shape.width * (2 * 8 + 3 * 4) + small * 3 * 4


class Point(NamedTuple):
    """One point of one series of measurements: a head step, or an iteration of a network."""

    kernel: str
    shape: Shape
    sweep: str  # what varies, or 'shape'
    hard: float = HARD

    @property
    def is_network(self) -> bool:
        """Whether whole iterations are measured."""
        return self.kernel in NETWORKS


def make_jobs(
    point: Point, args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Job], float]:
    """Build and check what is to be timed; also return the share of hard pixels."""
    problem = None if point.is_network else make_problem(point.shape, args.device, point.hard)
    accuracies = {"with": [True], "without": [False], "both": [True, False]}[args.acc_seg]
    jobs, hard = [], 0.0
    for name in args.providers:
        for acc_seg in [True] if problem is None else accuracies:
            try:
                if problem is None:
                    job, hard = network_job(name, point.kernel, point.shape, args.device)
                else:
                    job, hard = head_job(name, problem, acc_seg), problem.truth.hard
            except UnavailableError as reason:
                say(f"{name} is left out: {reason}")
            else:
                jobs.append(job)
    return jobs, hard


def measure(
    point: Point,
    args: argparse.Namespace,
    meter: Meter,
    progress: Progress,
    say: Callable[[str], None],
) -> list[Row]:
    """Check, warm up and time all providers at one point; return rows without the run's facts."""
    title = f"{point.kernel} {point.shape}"
    task = progress.add_task(f"{title}: checking", total=None)
    torch._dynamo.reset()
    jobs, hard = make_jobs(point, args, say)
    times: list[list[list[float]]] = [[] for _ in jobs]
    order = list(zip(times, jobs, strict=True))
    progress.update(task, total=len(jobs) * (args.warmup + args.repeats))
    for repeat in range(args.warmup + args.repeats):
        random.shuffle(order)  # nobody always runs after the same neighbour
        for samples, job in order:
            progress.update(task, advance=1, description=f"{title}: {job.provider}")
            sample = meter.times(job)
            job.reset()
            if repeat >= args.warmup:
                samples.append(sample)

    config = {
        "sweep": point.sweep,
        "shape": point.shape.image if point.is_network else str(point.shape),
        "hard": round(hard, 4),
        "thresh": THRESH,
        "min_kept": "1/16",
        "dtype": "float32",
    }
    places = {"classes": point.shape.c, "stride": point.shape.stride, "kept": config["hard"]}
    pixels = point.shape.n * point.shape.height * point.shape.width
    rows = []

    def add(provider: str, acc_seg: bool, mode: str, metric: str, values: list[float]) -> None:
        numbers = torch.tensor(values, dtype=torch.float64)
        low, median, high = numbers.quantile(numbers.new_tensor([0.2, 0.5, 0.8])).tolist()
        rows.append(
            {
                "kernel": point.kernel,
                "provider": provider,
                "mode": mode,
                "metric": metric,
                "unit": {"time": "ms", "memory": "MiB"}[metric],
                "x": places.get(point.sweep, pixels),
                "p50": f"{median:.5g}",
                "p20": f"{low:.5g}",
                "p80": f"{high:.5g}",
                "config": json.dumps({**config, "acc_seg": acc_seg}),
            }
        )

    phases = {"step": slice(2), "forward": slice(1), "backward": slice(1, 2)}
    if point.is_network:
        phases = {"iteration": slice(1)}
    modes = [mode for mode in args.modes if mode in phases]
    for job, samples in zip(jobs, times, strict=True):
        for mode in modes:
            wanted = phases[mode]
            add(job.provider, job.acc_seg, mode, "time", [sum(s[wanted]) for s in samples])
            if mode != "backward":  # its peak is that of the step
                peak = meter.memory(job, wanted.stop)
                add(job.provider, job.acc_seg, mode, "memory", [peak])
    if "step" in modes:
        floor = byte_floor(point.shape) / meter.bandwidth
        add(FLOOR, args.acc_seg != "without", "step", "time", [floor])
    progress.remove_task(task)
    return rows


def sweep_points(sweep: str, base: Shape) -> list[Point]:
    """The points of a sweep around a shape."""
    if sweep == "pixels":
        shapes = [
            base._replace(height=base.height // part, width=base.width // part)
            for part in (8, 4, 2, 1)
            if min(base.small) >= 4 * part
        ]
    elif sweep == "classes":
        shapes = [base._replace(c=c) for c in (2, 8, 19, 64, 150)]
    elif sweep == "stride":
        shapes = [base._replace(stride=s) for s in (1, 2, 4, 8, 16)]
    else:
        shares = (0.02, 0.05, 0.1, 0.2, 0.5, 0.95)
        return [Point("head_step", base, sweep, share) for share in shares]
    return [Point("head_step", shape, sweep) for shape in shapes]


def run_facts(device: str, argv: Sequence[str]) -> Row:
    """What all rows of a run share."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = ""
    return {
        "device_name": name,
        "threads": torch.get_num_threads(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton_version,
        "ohem_mm": ohem_mm.__version__,
        "commit": commit(),
        "command": shlex.join(["python", "tools/benchmark_loss.py", *argv]),
    }


def cpu_name() -> str:
    """Name of the processor, as far as the system tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short commit of the checkout, with a mark where what is measured has changed since."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "ohem_mm", "tools/benchmark_loss.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- records, tables, plots ----------------------------------------------------------------------


def append(path: Path, rows: list[Row]) -> None:
    """Append rows to the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    if not fresh:
        read(path)  # refuses a file of another form
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """All rows of the records."""
    if not path.is_file():
        raise SystemExit(f"error: no records at {str(path)!r}; run without --report first")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows: list[Row] = list(reader)
    if reader.fieldnames != COLUMNS:
        raise SystemExit(f"error: the columns of {str(path)!r} are not {', '.join(COLUMNS)}")
    return rows


def series(row: Row) -> tuple[Any, ...]:
    """What rows of one table have in common, other than the run."""
    config = json.loads(row["config"])
    shape = config["shape"] if config["sweep"] == "shape" else ""
    return row["kernel"], config["sweep"], shape, row["device_name"], str(row["threads"])


def latest(rows: list[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows of the last run of each series: times of different runs are not compared."""
    last: dict[tuple[Any, ...], str] = {}
    for row in rows:
        last[series(row)] = max(row["timestamp"], last.get(series(row), ""))
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["timestamp"] == last[series(row)]:
            groups.setdefault(series(row), []).append(row)
    return groups


def tables(rows: list[Row]) -> str:
    """Markdown tables of the last run of each series and mode."""
    parts = []
    for (kernel, sweep, shape, device, threads), group in latest(rows).items():
        first = group[0]
        where = _where(device, threads)
        shares = [round(100 * json.loads(row["config"])["hard"]) for row in group]
        hard = f"{min(shares)} to {max(shares)}" if len(set(shares)) > 1 else f"{shares[0]}"
        commit = f" ({first['commit']})" if first["commit"] else ""
        for mode in MODES:
            chosen = [row for row in group if row["mode"] == mode]
            if not chosen:
                continue
            title = f"**{kernel}, {mode}, {shape if sweep == 'shape' else f'over {sweep}'}**"
            about = f"{where}; torch {first['torch']}, ohem_mm {first['ohem_mm']}{commit}"
            if sweep == "shape":
                note = "Median (p20 to p80); faster and less than " + BASELINE
                body = _shape_table(chosen)
            else:
                note, body = "Median ms / peak MiB", _sweep_table(chosen, sweep)
            parts.append(f"{title}; {hard} % of the pixels hard. {about}. {note}.\n\n{body}")
    return "\n\n".join(parts)


def _where(device: str, threads: str) -> str:
    if "NVIDIA" in device:  # there the threads of the CPU hardly matter
        return device
    return f"{device}, {threads} thread{'' if threads == '1' else 's'}"


def _index(rows: list[Row]) -> dict[tuple[str, bool, str], Row]:
    return {
        (row["provider"], json.loads(row["config"])["acc_seg"], row["metric"]): row for row in rows
    }


def _number(value: str) -> str:
    return f"{float(value):.3g}" if abs(float(value)) < 100 else f"{float(value):.0f}"


def _shape_table(rows: list[Row]) -> str:
    """A line for each provider, with the baseline's numbers over its own."""
    index = _index(rows)
    accuracies = [acc for acc in (True, False) if any(key[1] is acc for key in index)]
    head, lines = ["provider"], []
    metrics = [name for name in ("time", "memory") if any(key[2] == name for key in index)]
    for acc_seg in accuracies:
        for metric in metrics:
            unit, ratio = {"time": ("ms", "times faster"), "memory": ("MiB", "times less")}[metric]
            head += [unit if acc_seg else f"{unit}, no `acc_seg`", ratio]
    for provider in dict.fromkeys(key[0] for key in index):
        line = [provider]
        for acc_seg in accuracies:
            for metric in metrics:
                row = index.get((provider, acc_seg, metric))
                base = index.get((BASELINE, acc_seg, metric))
                if row is None:
                    line += ["", ""]
                    continue
                cell = _number(row["p50"])
                if metric == "time" and provider != FLOOR:
                    cell += f" ({_number(row['p20'])} to {_number(row['p80'])})"
                ratio = ""
                if base is not None and float(row["p50"]) > 0:
                    ratio = f"{float(base['p50']) / float(row['p50']):.2f}"
                line += [cell, ratio]
        lines.append(line)
    return _markdown(head, lines)


def _sweep_table(rows: list[Row], sweep: str) -> str:
    """A line for each point, a column for each provider: milliseconds and MiB."""
    columns = list(dict.fromkeys(_label(row) for row in rows))
    cells: dict[tuple[float, str, str], str] = {
        (float(row["x"]), _label(row), row["metric"]): _number(row["p50"]) for row in rows
    }
    lines = []
    for x in sorted({key[0] for key in cells}):
        pairs = [(cells.get((x, c, "time")), cells.get((x, c, "memory"))) for c in columns]
        lines.append([f"{x:g}", *(" / ".join(filter(None, pair)) for pair in pairs)])
    return _markdown([sweep, *columns], lines)


def _label(row: Row) -> str:
    acc_seg = json.loads(row["config"])["acc_seg"]
    return str(row["provider"]) + ("" if acc_seg else ", no acc_seg")


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    body = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in body)


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw time and memory of the last run of each sweep; return the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axis = {
        "pixels": "pixels of the labels",
        "classes": "classes",
        "stride": "stride of the logits",
        "kept": "share of hard pixels",
    }
    files = []
    for (_, sweep, _, device, threads), group in latest(rows).items():
        lines: dict[tuple[str, str], list[tuple[float, float, float, float]]] = {}
        for row in group:
            if row["mode"] == "step":
                numbers = tuple(float(row[key]) for key in ("x", "p50", "p20", "p80"))
                lines.setdefault((row["metric"], _label(row)), []).append(numbers)
        if sweep == "shape" or not lines:
            continue
        figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
        labels = list(dict.fromkeys(label for _, label in lines))
        for panel, metric in zip(panels, ("time", "memory"), strict=True):
            for place, label in enumerate(labels):
                if (metric, label) not in lines:
                    continue
                x, middle, low, high = zip(*sorted(lines[metric, label]), strict=True)
                floor = label == FLOOR
                style = {"color": "black", "linestyle": "--"} if floor else {"marker": "o"}
                color = None if floor else f"C{place}"
                panel.plot(x, middle, label=label, markersize=3.5, **({"color": color} | style))
                panel.fill_between(x, low, high, color=color or "black", alpha=0.15, linewidth=0)
            panel.set(xscale="log", yscale="log", xlabel=axis[sweep])
            panel.set_ylabel({"time": "head step, ms", "memory": "peak above input, MiB"}[metric])
            panel.grid(which="both", alpha=0.2)
        where = _where(device, threads)
        figure.suptitle(f"Upsampling, loss, acc_seg and backward; {where}", fontsize=10)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        files.append(folder / f"loss-{sweep}-{slug}.png")
        figure.savefig(files[-1], dpi=120)
        pyplot.close(figure)
    return files


# --- command line --------------------------------------------------------------------------------


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Read the options and fill in what depends on the device."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, help=f"{', '.join(SHAPES)} or NxCxHxW/stride"
    )
    parser.add_argument(
        "--providers", nargs="+", help=f"names or parts of them: {', '.join(PROVIDERS)}"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["step"])
    parser.add_argument("--acc-seg", choices=("with", "without", "both"))
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=[])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--image", type=parse_image, help="NxHxW, input of an iteration")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, help="threads of the CPU")
    parser.add_argument("--repeats", type=int, help="timed steps (default: 10, on a GPU 100)")
    parser.add_argument("--warmup", type=int, help="steps before (default: 2, on a GPU 10)")
    parser.add_argument("--out", type=Path, default=RECORDS, help="records to append to")
    parser.add_argument("--report", action="store_true", help="measure nothing; read the records")
    parser.add_argument("--plot", action="store_true", help="draw the sweeps beside the records")
    args = parser.parse_args(argv)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device):
        parser.error(f"--device must be cpu or cuda, but got {args.device!r}")
    cuda = args.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, and torch sees none")
    if args.shapes is None:
        names = ["cityscapes-s8", "ade20k-s4"] if cuda else ["cpu"]
        args.shapes = [parse_shape(name) for name in names]
    args.image = args.image or ((4, 1024, 1024) if cuda else (2, 256, 512))
    args.repeats = (100 if cuda else 10) if args.repeats is None else args.repeats
    args.warmup = (10 if cuda else 2) if args.warmup is None else args.warmup
    if args.repeats < 1 or args.warmup < 1:
        parser.error("--repeats and --warmup must be at least 1")
    args.acc_seg = args.acc_seg or ("with" if args.sweep else "both")
    args.providers = choose_providers(args.providers)
    return args


def main(argv: Sequence[str]) -> None:
    """Measure, or read the records, and print the tables."""
    args = parse_args(argv)
    if args.report:
        rows = read(args.out)
        print(tables(rows))
    else:
        rows = run(args, argv)
        append(args.out, rows)
        print(tables(rows))
        rows = read(args.out)
    if args.plot:
        for file in plot(rows, args.out.parent):
            print(f"\n{file.name} is drawn.")


def run(args: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Measure all that was asked for; return rows for the records."""
    if args.threads:
        torch.set_num_threads(args.threads)
    points = [point for sweep in args.sweep for point in sweep_points(sweep, args.shapes[0])]
    if not args.sweep and set(args.modes) & set(HEAD_MODES):
        points += [Point("head_step", shape, "shape") for shape in args.shapes]
    if "iteration" in args.modes:
        n, height, width = args.image
        image = Shape(n, 19, height, width, 8)
        points += [Point(network, image, "shape") for network in args.networks]
    check_formula()
    facts, rows, said = run_facts(args.device, argv), [], set[str]()
    meter = Meter(args.device)
    with Progress(console=Console(stderr=True), transient=True) as progress:

        def say(note: str) -> None:
            if note not in said:
                said.add(note)
                progress.console.print(note, highlight=False, soft_wrap=True)

        for point in progress.track(points, description="points"):
            rows += measure(point, args, meter, progress, say)
    return [{**row, **facts} for row in rows]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="mm")  # remarks of mmseg and mmengine
    try:
        main(sys.argv[1:])
    except WrongValueError as error:
        sys.exit(f"error: {error}")
