"""The name under which configs import :class:`ohem_mm.models.FrozenBackbone`."""

from ohem_mm.models.frozen import FrozenBackbone

__all__ = ["FrozenBackbone"]
