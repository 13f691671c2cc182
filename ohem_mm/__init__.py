"""Online hard example mining (OHEM) cross-entropy and overlap losses for OpenMMLab and PyTorch."""

from .loss import OhemCrossEntropyLoss, ohem_cross_entropy
from .region import RegionLoss, region_loss
from .rule import OhemRule, RegionRule

__all__ = [
    "OhemCrossEntropyLoss",
    "OhemRule",
    "RegionLoss",
    "RegionRule",
    "ohem_cross_entropy",
    "region_loss",
]
__version__ = "0.1.0"

try:
    from mmengine.registry import MODELS
except ImportError:  # plain PyTorch: nothing to register in
    pass
else:
    # Registers them, and lets a config name the hooks as it may the loss: type="ohem_mm.NAME".
    from . import models  # noqa: F401
    from .hooks import (  # noqa: F401
        ChannelsLastHook,
        FusedOhemHook,
        OhemMonitorHook,
        OhemScheduleHook,
        OhemVisualizationHook,
    )

    # The root registry, so that every OpenMMLab scope finds it. Reloading the module is harmless.
    for _loss in (OhemCrossEntropyLoss, RegionLoss):
        if _loss.__name__ not in MODELS.module_dict:
            MODELS.register_module(module=_loss)
