"""Pictures of what is mined: image, ground truth, prediction, loss and mined pixels side by side.

``OhemVisualizationHook`` and ``tools/show_hard_pixels.py`` draw with these functions. They need
numpy, OpenCV and matplotlib, which mmengine brings along; matplotlib is loaded when a board is
drawn.
"""

from .mined import (
    ClassCounts,
    MainLoss,
    MinedImage,
    for_one_image,
    main_loss,
    mine_sample,
    predicted,
    to_rgb,
)
from .pictures import MINED, board, class_colours, loss_colours, panels

__all__ = [
    "MINED",
    "ClassCounts",
    "MainLoss",
    "MinedImage",
    "board",
    "class_colours",
    "for_one_image",
    "loss_colours",
    "main_loss",
    "mine_sample",
    "panels",
    "predicted",
    "to_rgb",
]
