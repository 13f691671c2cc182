"""Decode heads of mmseg of which only the loss is used."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def bare_head(
    num_classes: int, loss: dict[str, Any] | list[dict[str, Any]], **settings: Any
) -> Any:
    """mmseg's FCNHead, with these settings too, without layers before its classifier."""
    from mmseg.models.decode_heads import FCNHead

    one = {"in_channels": 1, "channels": 1, "num_convs": 0, "concat_input": False}
    return FCNHead(num_classes=num_classes, loss_decode=loss, **one, **settings)


def make_samples(labels: Tensor) -> list[Any]:
    """Labels (N, H, W) as mmseg's heads take them."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    return [SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels]
