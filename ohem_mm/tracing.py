"""What can be asked of a tensor: it may be traced, transformed, or hold no values at all."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def is_traced(tensor: Tensor) -> bool:
    """Whether operators are recorded instead of run: by a compiler, or for shapes alone."""
    return torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor)


def is_transformed() -> bool:
    """Whether the caller runs within a transform of ``torch.func``, such as vmap or grad."""
    # There is no public question; torch.autograd.Function.apply asks this one.
    return torch._C._are_functorch_transforms_active()


def can_look(tensor: Tensor) -> bool:
    """Whether reading a value back to the host is possible and free: on the CPU, run as written."""
    return tensor.device.type == "cpu" and not (is_traced(tensor) or is_transformed())
