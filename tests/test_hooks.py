"""What hooks share: how they find and name losses, how they are named; and the order of weights."""

from types import SimpleNamespace

import pytest
import torch
from devices import DEVICES, network
from torch import nn

pytest.importorskip("mmengine")

from mmengine.registry import HOOKS

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.hooks import ChannelsLastHook, FusedOhemHook
from ohem_mm.hooks._losses import named_losses


def test_names_of_losses():
    def head(*losses):
        return nn.ModuleDict(
            {"loss_decode": losses[0] if len(losses) == 1 else nn.ModuleList(losses)}
        )

    ours = OhemCrossEntropyLoss
    model = nn.ModuleDict(
        {
            "decode_head": head(ours()),
            "pid": head(nn.Identity(), ours(), nn.Identity(), ours()),
            "two": head(nn.Identity(), ours()),
            "auxiliary_head": nn.ModuleList([head(ours()), head(nn.Identity()), head(ours())]),
            "criterion": ours(),
        }
    )
    assert list(named_losses(model, OhemCrossEntropyLoss)) == [
        "decode_head",
        "pid.1",
        "pid.3",
        "two",
        "auxiliary_head.0",
        "auxiliary_head.2",
        "criterion",
    ]


def test_registered_in_every_scope():
    assert HOOKS.get("FusedOhemHook") is FusedOhemHook
    # As the loss can be named where nothing imports the package.
    assert HOOKS.get("ohem_mm.FusedOhemHook") is FusedOhemHook


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
