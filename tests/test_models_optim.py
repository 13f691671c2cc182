"""Mixed precision in bf16, on a CPU and where there is one, a GPU."""

from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES, network
from torch import nn

pytest.importorskip("mmengine")

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS

from ohem_mm.models import Bf16OptimWrapper


def step(wrapper_type, device):
    """One step of a network; its weights after it, and the type of what its layers gave."""
    model = network().to(device)
    wrapper = OPTIM_WRAPPERS.build(
        {"type": wrapper_type, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    )
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(device)
    with wrapper.optim_context(model):
        logits = model(image)
        loss = nn.functional.cross_entropy(logits, torch.ones(2, 8, 8, dtype=torch.long).to(device))
    grads = [weight.grad for weight in model.parameters()]
    assert grads == [None] * 4
    wrapper.update_params(loss)
    return [weight.detach() for weight in model.parameters()], logits.dtype, loss.dtype, wrapper


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_in_bf16(device):
    exact, plain_type, _, plain = step("OptimWrapper", device)
    weights, logits_type, loss_type, wrapper = step("Bf16OptimWrapper", device)
    assert (plain_type, logits_type, loss_type) == (torch.float32, torch.bfloat16, torch.float32)
    start = list(network().parameters())
    for weight, want, before in zip(weights, exact, start, strict=True):
        assert weight.dtype == torch.float32
        moved = (want.cpu() - before.detach()).norm()
        assert moved > 0
        # bf16 has 8 bits of mantissa.
        assert 0 < (weight - want).norm() < 0.05 * moved
    # Nothing is scaled, so checkpoints are those of the plain wrapper.
    assert wrapper.state_dict().keys() == plain.state_dict().keys()


def test_accumulation_is_that_of_the_base_class():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    wrapper = Bf16OptimWrapper(optimizer=optimizer, accumulative_counts=2)
    assert isinstance(wrapper, OptimWrapper)
    wrapper.initialize_count_status(model, 0, 4)
    before = model[0].weight.detach().clone()
    for moved in (False, True):
        with wrapper.optim_context(model):
            loss = model(torch.ones(1, 3, 4, 4)).float().square().mean()
        wrapper.update_params(loss)
        assert torch.equal(model[0].weight, before) != moved


def test_a_gpu_without_bf16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An old GPU")
    wrapper = Bf16OptimWrapper(optimizer=torch.optim.SGD(network().parameters(), 0.1))
    weight = SimpleNamespace(device=torch.device("cuda"))
    model = SimpleNamespace(parameters=lambda: iter([weight]))
    with pytest.raises(RuntimeError, match="An old GPU has no bfloat16; use AmpOptimWrapper"):
        wrapper.optim_context(model).__enter__()
