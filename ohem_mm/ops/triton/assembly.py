"""The launches of a pass, and the machine code of their kernels: no GPU is needed.

Kernels are launched on tensors without data. Each launch is noted as Triton would specialise it,
and can be compiled ahead of time. Loops of machine code are found by their backward branches.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ...rule import OhemRule
from ..region import Overlap
from . import geometry, passes
from .inner import triton


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
        mock.patch.object(passes, "processors", return_value=processors),
    ):
        loss, *_ = package.ohem(
            logits, target, scale, rule=rule or OhemRule(), size=(height, width), **chosen
        )
        torch.autograd.grad(loss, logits)
    return found


def region_launches(
    sizes: geometry.Sizes,
    overlap: Overlap | None = None,
    *,
    weight: bool = False,
    rule: OhemRule | None = None,
    processors: int = 132,
) -> list[Launch]:
    """The same of the sums of overlap losses, for float32 logits and int64 labels.

    Args:
        sizes: Of logits and labels.
        overlap: Which sums.
        weight: With a weight for each pixel; alone.
        rule: Of a loss beside them; None: they are alone.
        processors: Multiprocessors of the device.
    """
    package = importlib.import_module(__package__ or "")
    n, c, h, w, height, width = sizes
    logits = torch.empty(n, c, h, w, device="meta", requires_grad=True)
    target = torch.empty(n, height, width, dtype=torch.int64, device="meta")
    scale = torch.empty(target.shape, device="meta") if weight else None
    with (
        record() as found,
        mock.patch.object(package, "available", return_value=True),
        mock.patch.object(passes, "processors", return_value=processors),
    ):
        overlap = overlap or Overlap()
        plain: dict[str, Any] = {"ignore_index": 255, "align_corners": False}
        if rule is None:
            sums, _ = package.class_sums(logits, target, scale, overlap, with_hits=True, **plain)
            loss = 0.0
        else:
            plain |= {"rule": rule, "class_weight": None, "reduction": "mean"}
            sums, loss, *_ = package.pair(logits, target, overlap, **plain)
        torch.autograd.grad((sums.intersection + sums.predicted).sum() + loss, logits)
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
    program = tool("cuobjdump")
    if program is None:
        return Code(None, None, shared, None, None, None)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(program, "-res-usage", str(cubin))
        text = _output(program, "-sass", str(cubin))
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
def tool(name: str) -> str | None:
    """A program of the CUDA toolkit that lies inside the wheel of Triton, or None."""
    if triton is None:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if os.access(path, os.X_OK) else None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
