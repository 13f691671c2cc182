"""Both passes of the sums of overlap losses, alone or together with the whole OHEM loss.

Together they have one forward pass, and one backward pass collects the gradient of both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..region import Overlap, refuse_graph
from . import backward, forward, geometry, mining, passes, region
from .inner import Kind


class Call(NamedTuple):
    """What is computed.

    Attributes:
        sizes: Of logits and labels.
        overlap: Which sums.
        settings: Of the loss; those of plain cross-entropy where it is not wanted.
        with_loss: Whether it is.
        weighted: Whether pixels have weights in the sums.
    """

    sizes: geometry.Sizes
    overlap: Overlap
    settings: passes.Settings
    with_loss: bool
    weighted: bool

    @property
    def kind(self) -> Kind:
        """What the kernels of the sums are compiled for."""
        return Kind(
            full=self.sizes.full,
            align_corners=self.settings.align_corners,
            sigmoid=False,
            single=False,
            smooth=False,
            overlap=True,
            squared=self.overlap.squared,
            weighted=self.weighted,
            pair=self.with_loss,
        )


class Overlapping(torch.autograd.Function):
    """Intersection, predicted sum and counts; loss; hits; and the number of valid pixels.

    Loss and number are None where the loss is not wanted. Weights are of the sums, class weights of
    the loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        class_weight: Tensor | None,
        call: Call,
    ) -> tuple[Tensor | None, ...]:
        """Launch the kernels of the forward pass."""
        sizes, settings = call.sizes, call.settings
        mined: mining.Result | None = None
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            maps, state = passes.pixel_losses(logits, target, sizes, settings)
            sums = region.sums(
                logits, maps, weight, sizes, call.kind, geometry.region(sizes, settings.tiling)
            )
            if call.with_loss:
                mined = mining.run(
                    maps,
                    state,
                    None,
                    class_weight,
                    None,
                    sizes,
                    settings.kind(sizes),
                    settings.rule,
                    settings.reduction,
                    plan=geometry.mining(sizes, settings.tiling),
                    apart=True,
                )
                hits = mined.hits
            else:
                # Without a pixel nothing was launched, and nothing written there.
                hits = maps.counts[2, : maps.counts.shape[1] if target.numel() else 0].sum()
        ctx.call = call
        saved = (None, None) if mined is None else (mined.factor, mined.divisor)
        ctx.save_for_backward(logits, maps.loss, maps.normaliser, maps.label, weight, *saved)
        ctx.set_materialize_grads(False)
        loss, valid = (None, None) if mined is None else (mined.loss, mined.valid)
        ctx.mark_non_differentiable(sums[2], hits, *([] if valid is None else [valid]))
        return *sums.unbind(), loss, hits, valid

    @staticmethod
    def backward(
        ctx: Any,
        by_intersection: Tensor | None,
        by_predicted: Tensor | None,
        _counts: None,
        by_loss: Tensor | None,
        *_: None,
    ) -> tuple[Tensor | None, ...]:
        """Launch the kernels of the backward pass."""
        refuse_graph()
        logits, loss, normaliser, label, weight, factor, divisor = ctx.saved_tensors
        call: Call = ctx.call
        sizes, tiling = call.sizes, call.settings.tiling
        a, b = (
            loss.new_zeros(sizes.images, sizes.classes) if by is None else by.float().contiguous()
            for by in (by_intersection, by_predicted)
        )
        mined = None
        if call.with_loss:
            by_loss = loss.new_zeros(()) if by_loss is None else by_loss
            mined = region.Mined(factor, divisor, by_loss)
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            shift, at_true = region.slopes(
                logits,
                forward.Maps(loss, loss, normaliser, label, loss),
                weight,
                a,
                b,
                mined,
                sizes,
                call.kind,
                geometry.region(sizes, tiling),
            )
            grad = backward.run(
                logits,
                backward.Saved(shift, normaliser, label, loss, at_true, weight, b),
                loss,
                sizes,
                call.kind._replace(pair=False),
                0.0,
                geometry.backward(sizes, passes.processors(logits.device), tiling),
            )
        return grad, None, None, None, None
