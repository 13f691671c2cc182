"""What several losses of the same logits share."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from ..rule import OhemRule
from .region import Overlap, Sums


class Wanted(NamedTuple):
    """The loss that is wanted beside sums.

    Attributes:
        rule: Which pixels are kept and what divides their loss.
        label_smoothing: Of the loss.
        class_weight: Weight of each class, or None.
        reduction: 'mean', 'sum' or 'none'.
        maps: The loss of each pixel is asked for as well.
    """

    rule: OhemRule
    label_smoothing: float = 0.0
    class_weight: Tensor | None = None
    reduction: Literal["mean", "sum", "none"] = "mean"
    maps: bool = False


class Whole(NamedTuple):
    """A loss that was computed down to its mean or sum.

    Attributes:
        wanted: What it is.
        loss: Shape (), with the gradient.
        hits: As :func:`ohem_mm.ops.pixel_cross_entropy` gives it.
        num_valid: Number of valid pixels, int64, shape ().
    """

    wanted: Wanted
    loss: Tensor
    hits: Tensor
    num_valid: Tensor

    def is_for(self, wanted: Wanted) -> bool:
        """Whether it is what is wanted; of class weights, the same tensor."""
        return self.wanted.class_weight is wanted.class_weight and (
            self.wanted._replace(class_weight=None) == wanted._replace(class_weight=None)
        )


class Shared(NamedTuple):
    """What one pass over the pixels gave, for several losses of the same logits.

    Attributes:
        overlap: What ``sums`` are of.
        label_smoothing: Of the cross-entropy.
        sums: As :func:`ohem_mm.ops.class_sums` gives them.
        hits: As :func:`ohem_mm.ops.pixel_cross_entropy` gives it.
        pixels: ``mined`` and ``loss``, likewise; None where there is ``whole``.
        whole: The one loss that was computed together with the sums, or None.
    """

    overlap: Overlap
    label_smoothing: float
    sums: Sums
    hits: Tensor | None
    pixels: tuple[Tensor, Tensor] | None = None
    whole: Whole | None = None
