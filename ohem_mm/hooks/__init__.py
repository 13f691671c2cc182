"""Hooks for mmengine's Runner. They need mmengine; mmseg is imported when training starts."""

from .fused import FusedOhemHook

__all__ = ["FusedOhemHook"]
