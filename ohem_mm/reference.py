"""The oracle: the same definitions, written slowly and obviously, in float64.

Tests and benchmarks compare with it; nothing in the package calls it. It loops over pixels in
Python, sorts lists and leaves the gradient to autograd, so that each rule can be read off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def pixel_losses(
    logits: Tensor, target: Tensor, *, use_sigmoid: bool = False, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each pixel of a flat list.

    Args:
        logits: float64, shape (P, C).
        target: int64, shape (P,), in [0, C), or {0, 1} for one sigmoid channel.
        use_sigmoid: Binary cross-entropies, summed over the channels.
        label_smoothing: Share of the target mass spread evenly.

    Returns:
        float64, shape (P,).
    """
    classes = logits.shape[1]
    if use_sigmoid:
        hot = target[:, None] == torch.arange(classes) if classes > 1 else target[:, None] == 1
        soft = hot.double() * (1 - label_smoothing) + label_smoothing / 2
        return -(soft * F.logsigmoid(logits) + (1 - soft) * F.logsigmoid(-logits)).sum(1)
    soft = F.one_hot(target, classes).double() * (1 - label_smoothing) + label_smoothing / classes
    log_p = logits.log_softmax(1)
    return -torch.where(soft > 0, soft * log_p, 0).sum(1)  # a class may have probability 0


def kept_weights(
    losses: Sequence[float],
    target: Sequence[int],
    image: Sequence[int],
    *,
    thresh: float | None = 0.7,
    min_kept: int | float = 1 / 16,
    pool: str = "batch",
    min_kept_per: str = "batch",
    always_keep: Sequence[int] = (),
    images: int = 1,
) -> list[float]:
    """Decide for each of the VALID pixels with what weight it is kept.

    Args:
        losses: Unweighted loss of each valid pixel.
        target: Class of each valid pixel.
        image: Index of the image that each valid pixel lies in.
        thresh: See ``ohem_mm.ohem_cross_entropy``, as for the other settings.
        min_kept: Floor.
        pool: Pool of the floor.
        min_kept_per: Unit of an int floor.
        always_keep: Classes that are always kept.
        images: Number of images in the batch, N.

    Returns:
        The weight of each valid pixel, in [0, 1].
    """
    losses = [math.inf if math.isnan(loss) else loss for loss in losses]
    pools: dict[int, list[int]] = {}
    for pixel in range(len(losses)):
        key = {"batch": 0, "world": 0, "image": image[pixel], "class": target[pixel]}[pool]
        pools.setdefault(key, []).append(pixel)

    keep = [0.0] * len(losses)
    for members in pools.values():
        hard = [i for i in members if thresh is not None and losses[i] > -math.log(thresh)]
        if isinstance(min_kept, float):
            k = math.floor(Fraction(min_kept).limit_denominator(10**6) * len(members))
        elif min_kept_per == "image" and pool in ("batch", "world"):
            k = min_kept * images
        else:
            k = min_kept
        for i in hard:
            keep[i] = 1.0
        if len(hard) < k:
            k = min(k, len(members))
            kth = sorted((losses[i] for i in members), reverse=True)[k - 1]
            above = [i for i in members if losses[i] > kth]
            tied = [i for i in members if losses[i] == kth]
            for i in above:
                keep[i] = 1.0
            for i in tied:
                keep[i] = (k - len(above)) / len(tied)
    for i in range(len(losses)):
        if target[i] in always_keep or math.isinf(losses[i]):
            keep[i] = 1.0
    return keep


def ohem_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    thresh: float | None = 0.7,
    min_kept: int | float = 1 / 16,
    pool: str = "batch",
    min_kept_per: str = "batch",
    always_keep: Sequence[int] = (),
    avg: str = "kept",
    weighted_mean: bool = False,
    avg_factor: float | Tensor | None = None,
    ignore_index: int = 255,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """``ohem_mm.ohem_cross_entropy`` on the CPU in float64, with the same arguments and result."""
    logits = logits.double()
    if target.dim() == logits.dim():
        target = target.squeeze(1)
    size = target.shape[1:]
    if logits.shape[2:] != size:
        mode = ["", "linear", "bilinear", "trilinear"][len(size)]
        logits = F.interpolate(logits, size=size, mode=mode, align_corners=align_corners)
    channels = logits.shape[1]
    flat = logits.movedim(1, -1).reshape(-1, channels)
    labels = target.reshape(-1).long()
    places = [i for i, label in enumerate(labels.tolist()) if label != ignore_index]
    classes = labels[places]
    image = [i // max(1, size.numel()) for i in places]

    options = {"use_sigmoid": use_sigmoid}
    mined = pixel_losses(flat[places].detach(), classes, **options)
    losses = pixel_losses(flat[places], classes, label_smoothing=label_smoothing, **options)
    keep = kept_weights(
        mined.tolist(),
        classes.tolist(),
        image,
        thresh=thresh,
        min_kept=min_kept,
        pool=pool,
        min_kept_per=min_kept_per,
        always_keep=always_keep,
        images=len(target),
    )

    scale = torch.ones(len(places), dtype=torch.float64)
    if class_weight is not None:
        scale = scale * class_weight.double()[classes]
    if weight is not None:
        scale = scale * weight.double().reshape(target.shape).reshape(-1)[places]
    share = torch.tensor(keep, dtype=torch.float64)
    chosen = [i for i, kept in enumerate(keep) if kept]  # so that no NaN is multiplied by 0
    if reduction == "none":
        out = torch.zeros(len(labels), dtype=torch.float64)
        index = torch.tensor([places[i] for i in chosen], dtype=torch.long)
        return out.index_add(0, index, (share * scale * losses)[chosen]).view(target.shape)
    total = (share * scale * losses)[chosen].sum()
    if not chosen:
        total = total + 0 * logits.nan_to_num(0, 0, 0).sum()
    if reduction == "sum":
        return total
    if avg_factor is None:
        divisors = {"kept": float(share.sum()), "valid": len(places), "all": len(labels)}
        avg_factor = float(divisors[avg])
        if weighted_mean and (class_weight is not None or weight is not None):
            avg_factor = (share * scale if avg == "kept" else scale).sum()
    return total / avg_factor if avg_factor > 0 else total


# The rules of other implementations, each restated from its published behaviour and independently
# of `ohem_mm.presets`. They keep the defects of the originals: the comments say where.
#
# Arguments: logits float32 or float64 (N, C, H, W), for the originals compute in what they are
# given; target int64 (N, H, W); thresh; min_kept as the original counts it; class_weight (C,) or
# None; ignore_index 255.


def _flat(logits: Tensor, target: Tensor, class_weight: Tensor | None) -> tuple[Tensor, ...]:
    """Losses (weighted), true-class probabilities and validity of all pixels in one list."""
    losses = F.cross_entropy(
        logits, target, weight=class_weight, ignore_index=255, reduction="none"
    )
    valid = target != 255
    index = torch.where(valid, target, 0)[:, None]
    probs = logits.detach().softmax(1).gather(1, index).squeeze(1)
    return losses.flatten(), probs.flatten(), valid.flatten()


def mmseg_sampler(
    logits: Tensor,
    target: Tensor,
    *,
    thresh: float | None = 0.7,
    min_kept: float = 100_000,
    class_weight: Tensor | None = None,
) -> Tensor:
    """mmseg's OHEMPixelSampler and CrossEntropyLoss(avg_non_ignore=False) in a decode head.

    Defects: with n <= k valid pixels and no hard one, n - 1 are kept, and pixels tied at the limit
    are dropped. ``min_kept`` is per image, and below 2 it is refused.
    """
    assert min_kept > 1
    losses, probs, valid = _flat(logits, target, class_weight)
    k = int(min_kept) * len(target)
    if thresh is not None:
        order = probs[valid].sort().values
        limit = max(float(order[min(k, len(order) - 1)]), thresh) if len(order) else thresh
        keep = valid & (probs < limit)
    else:
        keep = torch.zeros_like(valid)
        places = valid.nonzero().flatten()
        keep[places[losses.detach()[places].argsort(descending=True)[:k]]] = True
    divisor = float(target.numel())
    if class_weight is not None:
        divisor = float(class_weight[target.flatten()[valid]].sum())
    return (losses * keep).sum() / divisor


def mmseg_sampler_topk(
    logits: Tensor,
    target: Tensor,
    *,
    min_kept: float = 100_000,
    class_weight: Tensor | None = None,
) -> Tensor:
    """The same sampler with ``thresh=None``: it sorts the losses as they are optimised."""
    return mmseg_sampler(logits, target, thresh=None, min_kept=min_kept, class_weight=class_weight)


def hrnet(
    logits: Tensor,
    target: Tensor,
    *,
    thresh: float = 0.7,
    min_kept: float = 100_000,
    class_weight: Tensor | None = None,
) -> Tensor:
    """OhemCrossEntropy of HRNet, DDRNet, PIDNet and mmseg.

    Defects: an error (mmseg: a zero without a gradient) when all is ignored, NaN when nothing lies
    strictly below the limit, n - 1 pixels when n <= k, pixels tied at the limit dropped.
    """
    losses, probs, valid = _flat(logits, target, class_weight)
    order = probs[valid].sort().values
    limit = max(float(order[min(max(1, int(min_kept)), len(order) - 1)]), thresh)
    return losses[valid][probs[valid] < limit].mean()


def bisenet(
    logits: Tensor, target: Tensor, *, thresh: float = 0.7, min_kept: float = 1 / 16
) -> Tensor:
    """OhemCELoss of CoinCheung's BiSeNet. Defect: NaN where a sixteenth of the pixels is none."""
    losses, _, valid = _flat(logits, target, None)
    least = int(valid.sum()) // round(1 / min_kept)
    hard = losses[losses > -math.log(thresh)]
    if len(hard) < least:
        hard = losses.topk(least).values
    return hard.mean()


def stdc(
    logits: Tensor, target: Tensor, *, thresh: float = 0.7, min_kept: float = 1 / 16
) -> Tensor:
    """OhemCELoss of STDC: n_min is a sixteenth of all pixels, ignored pixels are zeros among them.

    Defects: NaN where n_min is 0 and nothing is hard, an error where there are no n_min + 1 pixels.
    """
    order = _flat(logits, target, None)[0].sort(descending=True).values
    least = target.numel() // round(1 / min_kept) if isinstance(min_kept, float) else int(min_kept)
    limit = -math.log(thresh)
    return (order[order > limit] if order[least] > limit else order[:least]).mean()


def torchseg(
    logits: Tensor,
    target: Tensor,
    *,
    thresh: float = 0.6,
    min_kept: float = 256,
    class_weight: Tensor | None = None,
) -> Tensor:
    """ProbOhemCrossEntropy2d of TorchSeg and TorchSemiSeg. It keeps all tied at the limit."""
    _, probs, valid = _flat(logits, target, None)
    labels = target.flatten().clone()
    if 0 < min_kept <= int(valid.sum()):
        order = torch.where(valid, probs, 1).sort().values
        limit = max(float(order[int(min_kept) - 1]), thresh)
        labels[~(probs <= limit)] = 255
    return F.cross_entropy(
        logits, labels.view_as(target), weight=class_weight, ignore_index=255, reduction="mean"
    )


def paddleseg(
    logits: Tensor,
    target: Tensor,
    *,
    thresh: float = 0.7,
    min_kept: float = 10_000,
    class_weight: Tensor | None = None,
) -> Tensor:
    """OhemCrossEntropyLoss of PaddleSeg.

    For the value of the loss, not for its gradient, logits are cut off at 64 below the highest, as
    Paddle's kernel for the CPU does. Defect: pixels tied at the limit are dropped.
    """
    _, probs, valid = _flat(logits, target, None)
    keep = valid
    if 0 < min_kept < int(valid.sum()):
        order = torch.where(valid, probs, probs + 1).sort().values
        keep = valid & (probs < max(float(order[int(min_kept) - 1]), thresh))
    kept = keep.view_as(target)
    # What is dropped is an ignored pixel from here on: a NaN in it reaches nothing.
    logits, labels = torch.where(kept[:, None], logits, 0), torch.where(kept, target, 0)
    losses = F.cross_entropy(logits, labels, reduction="none")
    cut = (logits - logits.amax(1, keepdim=True)).clamp_min(-64)
    losses = losses + (F.cross_entropy(cut, labels, reduction="none") - losses).detach()
    if class_weight is not None:
        losses = losses * class_weight[labels]
    return (losses * kept).mean() / (keep.to(losses.dtype).mean() + 1e-5)


def detectron2(
    logits: Tensor, target: Tensor, *, min_kept: float = 0.2, class_weight: Tensor | None = None
) -> Tensor:
    """DeepLabCE of detectron2: mean of the largest of all losses. Defect: NaN where none are."""
    losses = _flat(logits, target, class_weight)[0]
    return losses.topk(int(min_kept * losses.numel())).values.mean()


def nnunet(
    logits: Tensor,
    target: Tensor,
    *,
    min_kept: float = 10,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """TopKLoss of nnU-Net: the same of the smoothed loss; ``min_kept`` is its k, in per cent."""
    losses = F.cross_entropy(
        logits,
        target,
        weight=class_weight,
        ignore_index=255,
        reduction="none",
        label_smoothing=label_smoothing,
    ).flatten()
    return losses.topk(int(losses.numel() * min_kept / 100)).values.mean()


ORIGINALS: dict[str, Callable[..., Tensor]] = {
    "mmseg-sampler": mmseg_sampler,
    "mmseg-sampler-topk": mmseg_sampler_topk,
    "hrnet": hrnet,
    "bisenet": bisenet,
    "stdc": stdc,
    "torchseg": torchseg,
    "paddleseg": paddleseg,
    "detectron2": detectron2,
    "nnunet": nnunet,
    "textbook": bisenet,
}


# Overlap losses.


def overlap_score(
    p: Tensor,
    t: Tensor,
    w: Tensor,
    *,
    kind: str = "dice",
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 0.0,
    squared: bool = False,
    soft: bool = False,
) -> Tensor:
    """Overlap of one class over one pool.

    Args:
        p: Probability of the class at each pixel, float64, shape (P,).
        t: Its target, likewise.
        w: Weight of each pixel, likewise.
        kind: 'dice', 'jaccard' or 'tversky'.
        alpha: Cost of false positives.
        beta: Cost of false negatives.
        smooth: Added to numerator and denominator.
        squared: Squares in the denominator.
        soft: The target is not 0 or 1.

    Returns:
        A scalar; 1 where the denominator is 0.
    """
    both = torch.minimum(p, t) if soft and not squared else p * t
    intersection = (w * both).sum()
    predicted = (w * (p * p if squared else p)).sum()
    labelled = (w * (t * t if squared else t)).sum()
    if kind == "dice":
        above, below = 2 * intersection, predicted + labelled
    elif kind == "jaccard":
        above, below = intersection, predicted + labelled - intersection
    else:
        above = intersection
        below = intersection + alpha * (predicted - intersection) + beta * (labelled - intersection)
    if below + smooth == 0:
        return 1 + 0 * above
    return (above + smooth) / (below + smooth)


def region_loss(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 1.0,
    pool: str = "batch",
    classes: str = "present",
    weighted_mean: bool = False,
    ignore_index: int = 255,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    **score: Any,
) -> Tensor:
    """``ohem_mm.region_loss`` on the CPU in float64, with the same arguments and result."""
    logits = logits.double()
    if target.dim() == logits.dim():
        target = target.squeeze(1)
    size = target.shape[1:]
    if logits.shape[2:] != size:
        mode = ["", "linear", "bilinear", "trilinear"][len(size)]
        logits = F.interpolate(logits, size=size, mode=mode, align_corners=align_corners)
    channels = logits.shape[1]
    one = use_sigmoid and channels == 1
    flat = logits.movedim(1, -1).reshape(-1, channels)
    labels = target.reshape(-1).tolist()
    pixel_weight = torch.ones(len(labels), dtype=torch.float64)
    if weight is not None:
        pixel_weight = weight.double().reshape(-1)

    pools: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        if label != ignore_index:
            image = i // max(1, size.numel())
            pools.setdefault(image if pool == "image" else 0, []).append(i)

    nothing = 0 * logits.nan_to_num(0, 0, 0).sum()
    means = []
    for members in pools.values():
        z, w = flat[members], pixel_weight[members]
        if w.sum() == 0:
            continue
        p = z.sigmoid() if use_sigmoid else z.softmax(1)
        total, divisor = nothing, 0.0
        for channel in range(channels):
            cls = 1 if one else channel
            hot = torch.tensor([labels[i] == cls for i in members]).double()
            if classes == "present" and (w * hot).sum() == 0:
                continue
            spread = label_smoothing / (2 if use_sigmoid else channels)
            t = hot * (1 - label_smoothing) + spread
            loss = 1 - overlap_score(p[:, channel], t, w, soft=label_smoothing > 0, **score)
            if gamma != 1:
                loss = loss**gamma if loss > 0 else 0 * loss
            share = 1.0 if class_weight is None else float(class_weight[cls])
            total = total + share * loss
            divisor += share if weighted_mean else 1.0
        if divisor > 0:
            means.append(total / divisor)
    return torch.stack(means).mean() if means else nothing


# The overlap losses of other implementations, each restated from its published behaviour and
# independently of `ohem_mm.presets`. Arguments: logits float64 (N, C, H, W); target int64
# (N, H, W) with 255 for ignored pixels; class_weight (C,) or None.


def _maps(logits: Tensor, target: Tensor, use_sigmoid: bool) -> tuple[Tensor, Tensor]:
    """Probabilities and one-hot targets, (N, C, P), both 0 at ignored pixels."""
    images, channels = logits.shape[:2]
    p = (logits.sigmoid() if use_sigmoid else logits.softmax(1)).reshape(images, channels, -1)
    labels = target.reshape(images, 1, -1)
    classes = torch.tensor([1]) if channels == 1 else torch.arange(channels)
    keep = labels != 255
    return p * keep, ((labels == classes[None, :, None]) & keep).double()


def smp_overlap(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float,
    beta: float,
    gamma: float = 1.0,
    smooth: float = 0.0,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
) -> Tensor:
    """DiceLoss (alpha = beta = .5), JaccardLoss (1) and TverskyLoss of segmentation_models_pytorch.

    ``gamma`` is TverskyLoss's. An absent class counts as a loss of 0.
    """
    p, t = _maps(logits, target, use_sigmoid)
    hit = (p * t).sum((0, 2))
    wrong, missed = p.sum((0, 2)) - hit, t.sum((0, 2)) - hit
    score = (hit + smooth) / (hit + alpha * wrong + beta * missed + smooth).clamp_min(1e-7)
    loss = (1 - score) * (t.sum((0, 2)) > 0)
    if class_weight is None:
        return loss.mean() ** gamma
    return ((loss * class_weight).sum() / class_weight.sum()) ** gamma


def monai_overlap(
    logits: Tensor,
    target: Tensor,
    *,
    jaccard: bool = False,
    batch: bool = False,
    smooth: float = 1e-5,
    use_sigmoid: bool = False,
    class_weight: Tensor | None = None,
) -> Tensor:
    """DiceLoss of MONAI: each class of each image, absent ones too."""
    p, t = _maps(logits, target, use_sigmoid)
    over = (0, 2) if batch else (2,)
    hit, both = (p * t).sum(over), p.sum(over) + t.sum(over)
    below = 2 * (both - hit) if jaccard else both
    loss = 1 - (2 * hit + smooth) / (below + smooth)
    if class_weight is not None and loss.shape[-1] > 1:
        loss = loss * class_weight
    return loss.mean()


def nnunet_dice(
    logits: Tensor,
    target: Tensor,
    *,
    do_bg: bool = True,
    smooth: float = 1e-5,
    use_sigmoid: bool = False,
) -> Tensor:
    """1 + MemoryEfficientSoftDiceLoss of nnU-Net with batch_dice, ignored pixels in its mask."""
    p, t = _maps(logits, target, use_sigmoid)
    hit, both = (p * t).sum((0, 2)), p.sum((0, 2)) + t.sum((0, 2))
    score = (2 * hit + smooth) / (both + smooth).clamp_min(1e-8)
    return 1 - (score if do_bg else score[1:]).mean()


def jdt(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    smooth: float = 1e-3,
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """JDTLoss of JDTLosses (mIoUD): the L1 form of arXiv 2302.05666 and 2303.16296.

    With soft labels all classes count, as by its default.
    """
    p, t = _maps(logits, target, False)
    if label_smoothing:
        t = (t * (1 - label_smoothing) + label_smoothing / t.shape[1]) * (
            target.reshape(len(t), 1, -1) != 255
        )
    sizes = p.abs().sum((0, 2)), t.abs().sum((0, 2))
    hit = (sizes[0] + sizes[1] - (p - t).abs().sum((0, 2))) / 2
    score = (hit + smooth) / (hit + alpha * (sizes[0] - hit) + beta * (sizes[1] - hit) + smooth)
    loss = (1 - score) ** gamma
    if class_weight is not None:
        loss = loss * class_weight
    active = t.amax((0, 2)) > (-1 if label_smoothing else 0.01)
    return loss[active].mean() if active.any() else 0 * hit.sum()


def mmseg_dice(
    logits: Tensor, target: Tensor, *, use_sigmoid: bool = True, naive: bool = False
) -> Tensor:
    """mmseg's DiceLoss. Defect: what is predicted at ignored pixels is a false positive."""
    p = logits.sigmoid() if use_sigmoid else logits.softmax(1)
    t = _maps(logits, target, use_sigmoid)[1].reshape(logits.shape)
    hit = (p * t).flatten(1).sum(1)
    if naive:
        score = (2 * hit + 1e-3) / (p.flatten(1).sum(1) + t.flatten(1).sum(1) + 1e-3)
    else:
        score = 2 * hit / ((p * p + t * t).flatten(1).sum(1) + 2e-3)
    return (1 - score).mean()


def mmseg_tversky(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
    class_weight: Tensor | None = None,
) -> Tensor:
    """mmseg's TverskyLoss: each class of each image, absent ones too."""
    p, t = _maps(logits, target, False)
    hit = (p * t).sum(2)
    wrong, missed = p.sum(2) - hit, t.sum(2) - hit
    loss = 1 - (hit + smooth) / (hit + alpha * wrong + beta * missed + smooth)
    return (loss if class_weight is None else loss * class_weight).mean()


REGION_ORIGINALS: dict[str, Callable[..., Tensor]] = {
    "smp-dice": partial(smp_overlap, alpha=0.5, beta=0.5),
    "smp-jaccard": partial(smp_overlap, alpha=1.0, beta=1.0),
    "smp-tversky": partial(smp_overlap, alpha=0.5, beta=0.5),
    "monai-dice": monai_overlap,
    "monai-jaccard": partial(monai_overlap, jaccard=True),
    "nnunet": nnunet_dice,
    "jdt": jdt,
    "mmseg-dice": mmseg_dice,
    "mmseg-tversky": mmseg_tversky,
}
