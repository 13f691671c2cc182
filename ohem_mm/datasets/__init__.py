"""Datasets for mmseg: CamVid and generated street scenes.

Importing this package registers them, so a config that uses one says
``custom_imports = dict(imports=['ohem_mm', 'ohem_mm.datasets'])``.
"""

from ohem_mm.datasets.camvid import CamVidDataset
from ohem_mm.datasets.scenes import StreetScenesDataset

__all__ = ["CamVidDataset", "StreetScenesDataset"]
