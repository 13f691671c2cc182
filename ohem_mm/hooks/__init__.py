"""Hooks for mmengine's Runner. They need mmengine; mmseg is imported when training starts."""

from .channels_last import ChannelsLastHook
from .fused import FusedOhemHook
from .monitor import OhemMonitorHook
from .schedule import OhemScheduleHook
from .visualization import OhemVisualizationHook

__all__ = [
    "ChannelsLastHook",
    "FusedOhemHook",
    "OhemMonitorHook",
    "OhemScheduleHook",
    "OhemVisualizationHook",
]
