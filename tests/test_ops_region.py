"""The sums and their gradient: what is refused."""

import pytest
import torch
from problems import batch

from ohem_mm import region_loss


def test_second_derivative_is_refused_not_wrong(backend):
    logits, target = batch(5, dtype=torch.float64)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(region_loss(logits, target), logits, create_graph=True)


def test_transforms_of_torch_func_are_refused(backend):
    logits, target = batch(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="torch.func cannot transform the region term"):
        torch.func.grad(lambda z: region_loss(z, target))(logits)
