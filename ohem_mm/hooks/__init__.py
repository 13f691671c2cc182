"""Hooks for mmengine's Runner. They need mmengine; mmseg is imported when training starts."""

from .fused import FusedOhemHook
from .monitor import OhemMonitorHook
from .schedule import OhemScheduleHook
from .visualization import OhemVisualizationHook

__all__ = ["FusedOhemHook", "OhemMonitorHook", "OhemScheduleHook", "OhemVisualizationHook"]
