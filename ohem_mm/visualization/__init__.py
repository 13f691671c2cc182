"""Pictures of what is mined: image, ground truth, prediction, loss and mined pixels side by side.

``OhemVisualizationHook`` and ``tools/show_hard_pixels.py`` draw with these functions. They need
numpy, OpenCV and matplotlib, which mmengine brings along; matplotlib is loaded when a board is
drawn.
"""

# "As" the same name: part of this package's own.
from .mined import ClassCounts as ClassCounts
from .mined import MainLoss as MainLoss
from .mined import MinedImage as MinedImage
from .mined import for_one_image as for_one_image
from .mined import main_loss as main_loss
from .mined import mine_sample as mine_sample
from .mined import predicted as predicted
from .mined import to_rgb as to_rgb
from .pictures import MINED as MINED
from .pictures import board as board
from .pictures import class_colours as class_colours
from .pictures import loss_colours as loss_colours
from .pictures import panels as panels
