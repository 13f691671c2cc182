"""Mixed precision in bf16 and the order of the weights, on a CPU and where there is one, a GPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, OPTIM_WRAPPERS

from ohem_mm import cli
from ohem_mm.cli import checks, configs
from ohem_mm.hooks import ChannelsLastHook
from ohem_mm.models import Bf16OptimWrapper

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


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


@pytest.mark.parametrize("device", DEVICES)
def test_channels_last(device):
    assert HOOKS.get("ChannelsLastHook") is ChannelsLastHook
    plain, model = network().to(device), network().to(device)
    image = torch.randn(2, 3, 8, 8, device=device)
    ChannelsLastHook().before_run(SimpleNamespace(model=model))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    got, want = model(image), plain(image)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert not want.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # Loading keeps the order, and what is saved loads into a model of the usual order.
    model.load_state_dict(plain.state_dict())
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    plain.load_state_dict(model.state_dict())


def config(**wrapper):
    return Config({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}, **wrapper}})


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cpu", {}, {"type": "Bf16OptimWrapper"}),
        ("cpu", {"type": "OptimWrapper"}, {"type": "Bf16OptimWrapper"}),
        (
            "cpu",
            {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": 512.0, "clip_grad": None},
            {"type": "Bf16OptimWrapper", "clip_grad": None},
        ),
        ("cuda", {}, {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}),
        (
            "cuda",
            {"type": "OptimWrapper", "dtype": "bfloat16"},
            {"type": "AmpOptimWrapper", "dtype": "bfloat16", "loss_scale": "dynamic"},
        ),
    ],
)
def test_amp_on_each_device(monkeypatch, device, before, after):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: device)
    cfg = config(**before)
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == {"optimizer": {"type": "SGD", "lr": 0.1}, **after}
    cli.check_amp_device(cfg)


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cuda", "AmpOptimWrapper"), ("cpu", "Bf16OptimWrapper"), ("cuda", "Bf16OptimWrapper")],
)
def test_amp_twice(monkeypatch, capsys, device, kind):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: device)
    cfg = config(type=kind)
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.type == kind
    assert "trains in mixed precision already" in capsys.readouterr().err


def test_amp_with_a_wrapper_of_another_kind():
    cfg = config(type="ApexOptimWrapper")
    with pytest.raises(cli.UserError, match="--amp works .* the config has ApexOptimWrapper"):
        cli.use_amp(cfg)
    with pytest.raises(cli.UserError, match="bf16 works .* the config has ApexOptimWrapper"):
        cli.use_bf16(cfg)


def test_the_hook_is_added_once_and_beside_others():
    cfg = config()
    cli.use_channels_last(cfg)
    assert cfg.custom_hooks == [{"type": "ChannelsLastHook"}]
    cli.use_channels_last(cfg)
    assert len(cfg.custom_hooks) == 1
    cfg = Config({"custom_hooks": [{"type": "FusedOhemHook"}]})
    cli.use_channels_last(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ["FusedOhemHook", "ChannelsLastHook"]
