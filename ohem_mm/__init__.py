"""Online hard example mining (OHEM) cross-entropy for OpenMMLab and plain PyTorch."""

from .loss import OhemCrossEntropyLoss, ohem_cross_entropy
from .rule import OhemRule

__all__ = ["OhemCrossEntropyLoss", "OhemRule", "ohem_cross_entropy"]
__version__ = "0.1.0"

try:
    from mmengine.registry import MODELS
except ImportError:  # plain PyTorch: nothing to register in
    pass
else:
    # Registers them, and lets a config name the hooks as it may the loss: type="ohem_mm.NAME".
    from . import optim  # noqa: F401
    from .hooks import (  # noqa: F401
        ChannelsLastHook,
        FusedOhemHook,
        OhemMonitorHook,
        OhemScheduleHook,
        OhemVisualizationHook,
    )

    # The root registry, so that every OpenMMLab scope finds it. Reloading the module is harmless.
    if OhemCrossEntropyLoss.__name__ not in MODELS.module_dict:
        MODELS.register_module(module=OhemCrossEntropyLoss)
