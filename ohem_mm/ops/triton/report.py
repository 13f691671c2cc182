"""What the compiler makes of the kernels, and the time that it takes: no GPU is needed.

Kernels are launched on tensors without data, each launch is noted as Triton would specialise it,
compiled ahead of time, and the machine code is read. Loops are found by their backward branches;
how often each runs follows from the sizes.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from ...rule import OhemRule
from . import geometry

try:
    import triton
except ImportError:
    triton = None


class Machine(NamedTuple):
    """A GPU: multiprocessors, clock in GHz, and bandwidth of a copy and of the L2 cache in TB/s."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    cache: float


# By compute capability. The bandwidth of a copy on the H100 was measured; the other numbers are of
# data sheets and papers, bandwidths reduced in the same proportion.
MACHINES = {
    80: Machine("A100", 108, 1.41, 1.7, 3.5),
    90: Machine("H100", 132, 1.755, 2.9, 5.5),
    100: Machine("B200", 148, 1.85, 6.9, 8.0),
}
SHAPES = {
    "4x19x1024x1024/8": geometry.Sizes(4, 19, 128, 128, 1024, 1024),
    "16x150x512x512/4": geometry.Sizes(16, 150, 128, 128, 512, 512),
}
ASSUMPTIONS = """\
Nothing here was measured on a GPU. Float32 logits, int64 labels, hits counted. A multiprocessor
issues 4 warp instructions a clock and starts 16 exponentials. Each map crosses the memory once, at
the bandwidth of a copy; the backward pass reads its maps again for each tile of classes, from the
L2 cache. A kernel takes the longest of the four, times 1.3 for the time that it waits (a latency
model said 1.15 to 1.45), and 4.5 us for its launch. Every pixel is kept, which is the most that the
backward pass can have to do. Floor idle: enough pixels are hard. Floor active: it is needed."""
_WAITING = 1.3
_LAUNCH_US = 4.5
# What each kernel moves through memory; a map that is read and written stands twice.
_MOVED = {
    "forward": ("logits", "target", "loss", "normaliser", "label_map"),
    "count_digits": ("loss",),
    "select": ("loss", "loss", "label_map", "label_map"),
    "backward": ("logits", "grad", "factor", "normaliser", "label_map", "target"),
}


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Name of the kernel, and the step of one that is launched for each."""
        step = f" {self.arguments['step']}" if "step" in self.arguments else ""
        return self.base + step

    @property
    def base(self) -> str:
        """Name of the kernel."""
        return str(self.kernel.__name__).removeprefix("_")

    def specialisation(self) -> tuple[Any, ...]:
        """What Triton compiles a kernel of its own for."""
        from triton.runtime.jit import create_function_from_signature

        backend = _backend(90)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialisation, _ = binder(**self.arguments, **self.options)
        return self.kernel.__name__, str(specialisation), str(self.options), bound, specialisation

    def compile(self, capability: int) -> Any:
        """Compile for a compute capability; the result has ``asm`` and ``metadata``."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        *_, bound, specialisation = self.specialisation()
        options, signature, constants, attributes = self.kernel._pack_args(
            _backend(capability), dict(self.options), bound, specialisation, None
        )
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options=dict(options.__dict__)
        )


@lru_cache
def _backend(capability: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    return make_backend(GPUTarget("cuda", capability, 32))


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Note every launch of a Triton kernel instead of running it."""
    launches: list[Launch] = []

    def note(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False))
        arguments |= {name: kwargs.pop(name) for name in names if name in kwargs}
        launches.append(Launch(kernel, tuple(grid), arguments, kwargs))

    with mock.patch.object(triton.JITFunction, "run", note):
        yield launches


def launches(
    sizes: geometry.Sizes,
    rule: OhemRule | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    labels: torch.dtype = torch.int64,
    weight: bool = False,
    class_weight: bool = False,
    processors: int = 132,
    **options: Any,
) -> list[Launch]:
    """The launches of a forward and a backward pass, on tensors without data.

    Args:
        sizes: Of logits and labels.
        rule: What is kept.
        dtype: Of the logits.
        labels: Dtype of the labels.
        weight: With a weight for each pixel.
        class_weight: With a weight for each class.
        processors: Multiprocessors of the device.
        **options: Of :func:`ohem_mm.ops.triton.ohem`.
    """
    package = importlib.import_module(__package__ or "")
    n, c, h, w, height, width = sizes
    logits = torch.empty(n, c, h, w, dtype=dtype, device="meta", requires_grad=True)
    target = torch.empty(n, height, width, dtype=labels, device="meta")
    chosen: dict[str, Any] = {
        "ignore_index": 255,
        "align_corners": False,
        "use_sigmoid": False,
        "label_smoothing": 0.0,
        "avg_factor": None,
        "reduction": "mean",
        "with_hits": True,
    }
    chosen |= options
    wide = max(2, c) if chosen["use_sigmoid"] else c
    chosen["class_weight"] = torch.empty(wide, device="meta") if class_weight else None
    scale = torch.empty(target.shape, device="meta") if weight else None
    with (
        record() as found,
        mock.patch.object(package, "available", return_value=True),
        mock.patch.object(package, "_processors", return_value=processors),
    ):
        loss, *_ = package.ohem(
            logits, target, scale, rule=rule or OhemRule(), size=(height, width), **chosen
        )
        torch.autograd.grad(loss, logits)
    return found


# --- machine code --------------------------------------------------------------------------------


@dataclass
class Loop:
    """A loop of machine code.

    Attributes:
        own: Instructions of one turn, without those of the loops inside.
        exponentials: Of one turn, without those of the loops inside.
        inside: The loops directly inside.
    """

    own: int = 0
    exponentials: int = 0
    inside: list[Loop] = field(default_factory=list)

    def hottest(self) -> Loop:
        """The innermost loop on the path with most exponentials, then most instructions."""
        if not self.inside:
            return self
        return max(self.inside, key=lambda loop: loop.weight()).hottest()

    def weight(self) -> tuple[int, int]:
        """Exponentials and instructions, with those inside."""
        inner = [loop.weight() for loop in self.inside]
        return (
            self.exponentials + sum(one for one, _ in inner),
            self.own + sum(two for _, two in inner),
        )


@dataclass(frozen=True)
class Code:
    """What machine code shows; None where the tools that read it are missing."""

    registers: int | None
    spills: int | None
    shared: int
    fences: int | None
    instructions: int | None
    loops: Loop | None


def read(compiled: Any) -> Code:
    """Registers, spills and so on of a compiled kernel."""
    shared = int(compiled.metadata.shared)
    tool = _tool("cuobjdump")
    if tool is None:
        return Code(None, None, shared, None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(tool, "-res-usage", str(cubin))
        text = _output(tool, "-sass", str(cubin))
    registers = re.search(r"REG:(\d+)", usage)
    stack = re.search(r"STACK:(\d+)", usage)
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", text)
    code = [(int(at, 16), name, rest) for at, name, rest in lines if name != "NOP"]
    return Code(
        int(registers[1]) if registers else None,
        sum(name.split(".")[0] in ("LDL", "STL") for _, name, _ in code)
        + (int(stack[1]) if stack else 0),
        shared,
        sum(name.split(".")[0] in ("MEMBAR", "ERRBAR", "CCTL", "FENCE") for _, name, _ in code),
        len(code),
        _loops(code),
    )


def _loops(code: list[tuple[int, str, str]]) -> Loop:
    """The tree of loops: a backward branch closes one. Code after the last EXIT is padding."""
    spans: dict[int, int] = {}
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target and int(target[1], 16) < at:
            start = int(target[1], 16)
            spans[start] = max(at, spans.get(start, 0))
    root = Loop()
    nodes = {span: Loop() for span in spans.items()}
    for (start, end), loop in nodes.items():
        around = [
            span for span in nodes if span != (start, end) and span[0] <= start <= end <= span[1]
        ]
        parent = min(around, key=lambda span: span[1] - span[0], default=None)
        (root if parent is None else nodes[parent]).inside.append(loop)
    for at, name, _ in code:
        holding = [span for span in nodes if span[0] <= at <= span[1]]
        span = min(holding, key=lambda span: span[1] - span[0], default=None)
        loop = root if span is None else nodes[span]
        loop.own += 1
        loop.exponentials += name.startswith("MUFU.EX2")
    return root


@lru_cache
def _tool(name: str) -> str | None:
    """A program of the CUDA toolkit that lies inside the wheel of Triton, or None."""
    if triton is None:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if os.access(path, os.X_OK) else None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


# --- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One launch of one shape on one machine; None where machine code could not be read.

    Attributes:
        kernel: Its name.
        shape: Images x classes x rows x columns of the labels / stride of the logits.
        floor: 'idle' or 'active'.
        machine: Compute capability and name.
        programs: Number of programs.
        warps: Of each program.
        registers: Of each thread.
        spills: Instructions that spill, and bytes of stack.
        shared: Bytes of shared memory of each program.
        fences: Instructions that order memory.
        code: Instructions of the kernel.
        loop: Instructions of one turn of its hottest loop.
        exponentials: Of one turn of that loop.
        issued: Warp instructions of the whole launch, in millions.
        megabytes: Moved through memory.
        microseconds: By the model.
        bound: What the kernel waits for by the model.
    """

    kernel: str
    shape: str
    floor: str
    machine: str
    programs: int
    warps: int
    registers: int | None
    spills: int | None
    shared: int
    fences: int | None
    code: int | None
    loop: int | None
    exponentials: int | None
    issued: float | None
    megabytes: float
    microseconds: float | None
    bound: str | None


def describe(
    launch: Launch, code: Code, sizes: geometry.Sizes, shape: str, capability: int, active: bool
) -> Row:
    """What is known of one launch."""
    machine = MACHINES[capability]
    programs, warps = math.prod(launch.grid), launch.options.get("num_warps", 4)
    moved, again = _bytes(launch, sizes, active)
    times = {"memory": moved / machine.bandwidth / 1e6, "cache": again / machine.cache / 1e6}
    issued = None
    if code.loops is not None:
        own, exponentials = _turns(code.loops, _trips(launch, sizes, active), launch)
        issued = programs * warps * own
        rate = machine.processors * 4 * machine.clock * 1e3
        times["issue"] = issued / rate
        times["exponentials"] = programs * warps * exponentials * 8 / rate
    bound = max(times, key=lambda name: times[name])
    hottest = None if code.loops is None else code.loops.hottest()
    return Row(
        launch.name,
        shape,
        "active" if active else "idle",
        f"sm_{capability} {machine.name}",
        programs,
        warps,
        code.registers,
        code.spills,
        code.shared,
        code.fences,
        code.instructions,
        None if hottest is None else hottest.own,
        None if hottest is None else hottest.exponentials,
        None if issued is None else round(issued / 1e6, 2),
        round(moved / 1e6, 1),
        None if issued is None else round(_WAITING * times[bound] + _LAUNCH_US, 1),
        None if issued is None else bound,
    )


def _bytes(launch: Launch, sizes: geometry.Sizes, active: bool) -> tuple[float, float]:
    """Bytes through memory, and through the cache by programs that share maps."""
    names = _MOVED.get(launch.base.removesuffix("_full"), ())
    values = [launch.arguments[name] for name in names if name in launch.arguments]
    sums = [float(v.nbytes) for v in values if isinstance(v, Tensor)]
    if launch.base == "count_digits" and not _runs(launch, active):
        return 0.0, 0.0
    if launch.base != "backward":
        return sum(sums), 0.0
    deep = geometry.cdiv(sizes.classes, launch.arguments["class_tile"])
    return sum(sums), deep * sum(sums[2:])


def _runs(launch: Launch, active: bool) -> bool:
    """Whether a step of the mining does not leave at once; old kernels always did the first."""
    return active or (
        "hard" in launch.arguments
        and "found" not in launch.arguments
        and launch.arguments["step"] == 0
    )


def _trips(launch: Launch, sizes: geometry.Sizes, active: bool) -> list[float]:
    """How often each loop of a nest turns, from the outermost, when nothing is unrolled."""
    own = launch.arguments
    programs = math.prod(launch.grid)
    scale_y, scale_x = sizes.high_h / sizes.low_h, sizes.high_w / sizes.low_w
    if launch.base == "forward":
        return [1 if sizes.full else max(1, scale_y / own["rows"]), sizes.classes]
    if launch.base == "backward":
        return [own["walk"] + 1, scale_y, scale_x]
    if launch.base == "backward_full":
        return [sizes.classes]
    if launch.base == "count_digits" and not _runs(launch, active):
        return [0]
    if launch.base in ("count_digits", "select"):
        pixels = sizes.images * sizes.high_h * sizes.high_w
        return [math.ceil(pixels / own["block"] / programs)]
    number = own.get("share_programs", own.get("programs", 1))
    return [math.ceil(number / own["block"])] if "block" in own else []


def _turns(loop: Loop, trips: list[float], launch: Launch) -> tuple[float, float]:
    """Instructions and exponentials of one turn of a loop, with those inside."""
    own, exponentials = float(loop.own), float(loop.exponentials)
    for inside in sorted(loop.inside, key=Loop.weight, reverse=True):
        part, powers = _turns(inside, trips[1:], launch)
        turns = trips[0] if trips else 1.0
        if not inside.inside and inside.exponentials:
            # The compiler may have unrolled it.
            tile = launch.arguments.get("class_tile", 0)
            each = tile or launch.arguments["rows"] * launch.arguments["cols"] // 32
            turns /= max(1.0, inside.exponentials / each)
        own, exponentials = own + turns * part, exponentials + turns * powers
        trips = [1.0] * len(trips)  # what stands beside the main loop turns once
    return own, exponentials


def report(
    capabilities: Iterable[int] = tuple(MACHINES), shapes: Mapping[str, geometry.Sizes] = SHAPES
) -> list[Row]:
    """Compile all kernels for all machines and shapes, with an idle and with an active floor."""
    rows = []
    for capability in capabilities:
        for shape, sizes in shapes.items():
            found = launches(sizes, processors=MACHINES[capability].processors)
            codes = [read(launch.compile(capability)) for launch in found]
            for active in (False, True):
                rows += [
                    describe(launch, code, sizes, shape, capability, active)
                    for launch, code in zip(found, codes, strict=True)
                ]
    return rows
