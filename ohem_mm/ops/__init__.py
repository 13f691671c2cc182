"""Per-pixel losses with hand-written gradients. Nothing here knows OpenMMLab."""

from .eager import pixel_cross_entropy

__all__ = ["pixel_cross_entropy"]
