"""The time of the kernels by a model of the machine, from their machine code and sizes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ...errors import UserError
from ...rule import OhemRule
from . import geometry
from .assembly import Code, Launch, Loop, launches, read, region_launches, tool
from .passes import PLAIN


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
# What is computed; None: the OHEM loss alone.
STEPS = {"": None, ", OHEM and region": OhemRule(), ", plain CE and region": PLAIN}
ASSUMPTIONS = """\
Nothing here was measured on a GPU. Float32 logits, int64 labels, hits counted. A multiprocessor
issues 4 warp instructions a clock and starts 16 exponentials; with w warps on a scheduler both take
1 + 1.1 / w as long, for the time that all of them wait (fitted to a latency model, which said 1.3
with four warps and 1.45 to 1.6 with two). Each map crosses the memory once, at the bandwidth of a
copy; the backward pass reads its maps again for each tile of classes, from the L2 cache. A kernel
takes the longest of the four, and 4.5 us for its launch. Every pixel is kept, which is the most
that the backward pass can have to do. Floor idle: enough pixels are hard. Floor active: it is
needed, and every pixel takes part in each of its steps. Tiles of the region term have pixels of two
labels. Only these kernels are counted: not the small operations of torch that turn the sums of the
region term into its value, and their gradient."""
_WAITING = 1.1
_LAUNCH_US = 4.5
_LABELS = 2.0
# What each kernel moves through memory; a map that is read and written stands twice.
_MOVED = {
    "forward": ("logits", "target", "loss", "normaliser", "label_map"),
    "count_digits": ("loss",),
    "select": ("loss", "factor_map", "label_map", "label_map"),
    "sums": ("logits", "loss", "normaliser", "label_map", "parts"),
    "slopes": ("logits", "loss", "normaliser", "label_map", "shift", "at_true"),
    "backward": ("logits", "grad", "factor", "normaliser", "label_map", "target"),
}


@dataclass(frozen=True)
class Row:
    """One launch of one shape on one machine; None where machine code could not be read.

    Attributes:
        kernel: Its name.
        shape: Images x classes x rows x columns of the labels / stride of the logits; and the step.
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


def missing() -> list[str]:
    """What cannot be reported here, in sentences."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("nothing is compiled with TRITON_INTERPRET=1; unset it")
    if tool("cuobjdump") is None:
        return ["cuobjdump is not in this build of Triton: no registers, instructions and times."]
    return []


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
        slower = 1 + _WAITING / _resident(code.registers)
        times["issue"] = slower * issued / rate
        times["exponentials"] = slower * programs * warps * exponentials * 8 / rate
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
        None if issued is None else round(times[bound] + _LAUNCH_US, 1),
        None if issued is None else bound,
    )


def _resident(registers: int | None) -> int:
    """Warps of a scheduler that fit its 16384 registers, which are given out 8 by 8."""
    return min(16, 16384 // (32 * 8 * geometry.cdiv(max(registers or 0, 32), 8)))


def _bytes(launch: Launch, sizes: geometry.Sizes, active: bool) -> tuple[float, float]:
    """Bytes through memory, and through the cache by programs that share maps."""
    names = _MOVED.get(launch.base.removesuffix("_full"), ())
    if launch.base.startswith("backward") and launch.arguments["kind"].overlap:
        names = (*names, "at_true")  # otherwise ``factor`` stands there once more
    if launch.base == "select" and launch.arguments["rule"].apart:
        names = names[:-1]  # labels are read alone
    if launch.base == "slopes" and launch.arguments["kind"].pair:
        names = (*names, "factor")
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
    if launch.base in ("sums", "slopes"):
        if sizes.full:
            return [1, 1, sizes.classes]
        rows, cols, wide, lanes = own["tile"]
        return [
            _mean_tiles(sizes.low_h, scale_y, lanes // wide, rows),
            _mean_tiles(sizes.low_w, scale_x, wide, cols),
            sizes.classes,
        ]
    if launch.base == "backward":
        # Cell 0 also has the pixels before its first column, and its neighbours wait for it.
        across = geometry.cdiv(sizes.low_w, own["cells"] - 1)
        return [own["walk"] + 1, scale_y, scale_x * (1 + 0.5 / across)]
    if launch.base == "backward_full":
        return [sizes.classes]
    if launch.base == "count_digits" and not _runs(launch, active):
        return [0]
    if launch.base in ("count_digits", "select"):
        pixels = sizes.images * sizes.high_h * sizes.high_w
        return [math.ceil(pixels / own["block"] / programs)]
    number = own.get("share_programs", own.get("programs", 1))
    return [math.ceil(number / own["block"])] if "block" in own else []


def _mean_tiles(low: int, scale: float, cells: int, step: int) -> float:
    """Tiles of a program along one axis; cell 0 also has the pixels before its first column."""
    programs = geometry.cdiv(low, cells)
    return ((programs - 1) * math.ceil(scale / step) + math.ceil(1.5 * scale / step)) / programs


def _turns(loop: Loop, trips: list[float], launch: Launch) -> tuple[float, float]:
    """Instructions and exponentials of one turn of a loop, with those inside."""
    own, exponentials = float(loop.own), float(loop.exponentials)
    for inside in sorted(loop.inside, key=Loop.weight, reverse=True):
        part, powers = _turns(inside, trips[1:], launch)
        turns = trips[0] if trips else 1.0
        if not inside.inside and inside.exponentials:
            # The compiler may have unrolled it.
            tile = launch.arguments.get("class_tile", 0)
            if "tile" in launch.arguments:
                tile = launch.arguments["tile"].rows * launch.arguments["tile"].cols
            each = tile or launch.arguments["rows"] * launch.arguments["cols"] // 32
            turns /= max(1.0, inside.exponentials / each)
        own, exponentials = own + turns * part, exponentials + turns * powers
        # What stands beside the main loop turns once.
        trips = [_LABELS if launch.base == "sums" else 1.0] * len(trips)
    return own, exponentials


def report(
    capabilities: Iterable[int] = tuple(MACHINES), shapes: Mapping[str, geometry.Sizes] = SHAPES
) -> list[Row]:
    """Compile all kernels for all machines and shapes, with an idle and with an active floor.

    Rows of steps with the region term, beside OHEM or beside plain cross-entropy, say so behind
    their shape.
    """
    rows = []
    for capability in capabilities:
        for shape, sizes in shapes.items():
            processors = MACHINES[capability].processors
            for step, rule in STEPS.items():
                if rule is None:
                    found = launches(sizes, processors=processors)
                else:
                    found = region_launches(sizes, rule=rule, processors=processors)
                codes = [read(launch.compile(capability)) for launch in found]
                # Plain cross-entropy has no floor.
                for active in (False,) if rule == PLAIN else (False, True):
                    rows += [
                        describe(launch, code, sizes, shape + step, capability, active)
                        for launch, code in zip(found, codes, strict=True)
                    ]
    return rows
