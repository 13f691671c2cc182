"""The frozen backbone and its cache."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmengine", reason="FrozenBackbone is mmengine's kind of module")

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict

from ohem_mm.frozen import FrozenBackbone


class TwoLevels(BaseModule):
    """Something that batch statistics, dropout and weights would all change."""

    def __init__(self, channels: int = 4, scale: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels))
        self.second = nn.Sequential(nn.Conv2d(channels, 8, 3, 2, 1), nn.Dropout(0.5))
        self.scale = scale
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += len(x)
        x = self.first(x * self.scale)
        return [x, self.second(x)]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS._module_dict, "TwoLevels", TwoLevels)


def build(cache_dir: Path | None = None, seed: int = 0, **settings: Any) -> FrozenBackbone:
    torch.manual_seed(seed)
    return FrozenBackbone({"type": "TwoLevels", **settings}, cache_dir)


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_stays_in_evaluation_mode_without_gradients() -> None:
    model = nn.Sequential(build()).train()
    assert model.training
    assert not any(module.training for module in model[0].modules())
    assert not any(p.requires_grad for p in model.parameters())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first, second = model(images()), model(images())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(level.requires_grad for level in first)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_without_a_cache_nothing_is_rounded() -> None:
    frozen = build()
    for level, expected in zip(frozen(images()), frozen.backbone(images()), strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=0)


def test_the_cache_gives_what_the_backbone_gives(tmp_path: Path) -> None:
    frozen = build(tmp_path)
    expected = frozen.backbone(images())
    frozen.backbone.calls = 0
    first = frozen(images())
    assert frozen.backbone.calls == 3
    again = frozen(images().flip(0))  # other order, same images
    assert frozen.backbone.calls == 3
    assert len(files(tmp_path)) == 3
    for new, old, exact in zip(first, again, expected, strict=True):
        assert new.dtype == torch.float32
        assert torch.equal(new, old.flip(0))
        torch.testing.assert_close(new, exact, rtol=1e-3, atol=1e-4)
    frozen(images().flip(3))  # mirrored: other images
    assert frozen.backbone.calls == 6


def test_other_weights_and_settings_have_other_entries(tmp_path: Path) -> None:
    frozen = build(tmp_path)
    before = frozen(images())[0]
    assert torch.equal(build(tmp_path)(images())[0], before)
    assert len(files(tmp_path)) == 3
    assert not torch.equal(build(tmp_path, seed=1)(images())[0], before)
    assert not torch.equal(build(tmp_path, scale=2.0)(images())[0], before)
    assert len(files(tmp_path)) == 9
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("loader", ["torch", "mmengine"])
def test_weights_that_are_loaded_later_count(loader: str, tmp_path: Path) -> None:
    frozen = build(tmp_path)
    before = frozen(images())[0]
    other = build(seed=1)
    if loader == "torch":
        nn.Sequential(frozen).load_state_dict(nn.Sequential(other).state_dict())
    else:
        load_state_dict(frozen, other.state_dict(), strict=True)
    after = frozen(images())[0]
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, other(images())[0], rtol=1e-3, atol=1e-4)


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    frozen = build(tmp_path, scale=1e6)
    with pytest.raises(ValueError, match=r"float16 cannot hold; set cache_dir=None"):
        frozen(images())
    assert not files(tmp_path)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        build(tmp_path)(images())
    assert not files(tmp_path)


def fill(folder: Path, barrier: Any) -> None:
    MODELS.register_module(module=TwoLevels)
    torch.set_num_threads(1)
    frozen = build(folder)
    barrier.wait()
    frozen(images(24))


def test_processes_share_a_cache(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    jobs = [context.Process(target=fill, args=(tmp_path, barrier)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(120)
    assert [job.exitcode for job in jobs] == [0, 0]
    assert len(files(tmp_path)) == 24  # no half-written file, nothing twice
    frozen = build(tmp_path)
    cached = frozen(images(24))
    assert frozen.backbone.calls == 0
    torch.testing.assert_close(cached[0], build()(images(24))[0], rtol=1e-3, atol=1e-4)
