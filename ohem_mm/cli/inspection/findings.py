"""What can be wrong with a config: how bad it is, what is the matter, and what to do."""

from __future__ import annotations

import re
from typing import NamedTuple

SEVERITIES = ("error", "warning", "note")
# Findings with which no training gets past its first batch.
FATAL = ("unknown-type", "other-head", "bad-setting", "always-keep", "class-weight")

# Each begins with its severity and its name; what to do stands behind the arrow.
_TABLE = """
error lost: nothing reads {key!r}, so what it sets is lost{inside}
    -> call it {meant!r}, or delete it
error name-says-ohem: the config is called {name!r}, and no head mines
    -> set loss_decode=dict(type='OhemCrossEntropyLoss') in the heads, or rename the config
error unknown-type: nothing is registered under the type {type!r}
    -> {remedy}
error other-head: {head} {problem}, so this loss does not work in it
    -> {remedy}
error bad-setting: it cannot be built: {problem}
    -> correct the setting
error always-keep: always_keep names class {cls}, but there are {num_classes} classes
    -> name classes below {num_classes}
error class-weight: class_weight has {length} entries, but there are {expected} classes
    -> give one weight for each class
error one-channel: the head has one channel, and a softmax over one channel has nothing to learn
    -> set use_sigmoid=True in the loss, or out_channels=2 in the head
error keeps-nothing: thresh=None with min_kept=0 keeps no pixel: this loss is always 0
    -> set thresh, for example 0.7, or min_kept, for example 1/16
error thresh-idle: {reason}, so nothing is ever dropped
    -> lower it; to turn mining off on purpose, use OhemCrossEntropyLoss with thresh=None,
    min_kept=1.0
error min-kept-above-batch: min_kept is {pixels:,} pixels and {pool} has {total:,}, so nothing is
    ever dropped
    -> lower it; 1/16 of the pixels is a good start
error mmseg-loss: OhemCrossEntropy {problem}
    -> use type='OhemCrossEntropyLoss', preset='hrnet', which works in every head
error bad-sampler: OHEMPixelSampler {problem}
    -> correct it, or delete it and use type='OhemCrossEntropyLoss' in loss_decode
error sampler-beside-loss: {sampler} picks pixels, and OhemCrossEntropyLoss mines again among all of
    them
    -> delete the sampler
error sampler-idle: {head} never asks its sampler, so nothing is mined
    -> delete it and use type='OhemCrossEntropyLoss' in loss_decode
error loss-count: {head} calls {expected} losses by place, but loss_decode has {length}
    -> give loss_decode as a list of that length
error ignored-label: {head} does not tell this loss which label is ignored, so it takes 255 for a
    class
    -> use type='OhemCrossEntropyLoss'; with thresh=None, min_kept=1.0 it is plain cross-entropy
error loss-name: mmseg optimises only names that contain 'loss', and this is {name!r}
    -> call it 'loss_{name}'
error reduce-zero-label: reduce_zero_label turns label 0 into 255, but the ignored label is
    {ignored}
    -> ignore 255
warning ignore-index: the ignored label differs: {values}
    -> use one value everywhere; where none is written it is 255
warning ignored-class: the ignored label {ignored} is one of the {num_classes} classes
    -> mark ignored pixels with 255
warning absent-classes: with classes='all' and smooth=0 a class that is absent costs 1, whatever is
    predicted
    -> set smooth=1.0, or classes='present'
warning one-pixel: min_kept=1 is an int and means a single pixel
    -> write 1.0 for every pixel, 1/16 for a share
warning reduction: reduction={reduction!r}: {effect}
    -> leave it out; avg= chooses the divisor
warning loss-weight: loss_weight=0: it is computed and trains nothing
    -> delete it, or set another weight
warning sampler-other-loss: {loss} has no loss for each pixel, so the sampler does not act on it
    -> use the sampler with cross-entropy alone
warning hook-idle: {hook} acts on OhemCrossEntropyLoss, and no head has one
    -> use that loss, or delete the hook
warning not-imported: type={type!r} is known only once ohem_mm is imported
    -> write 'ohem_mm.{type}', or add custom_imports=dict(imports=['ohem_mm'])
note region-alone: an overlap loss alone gives no gradient to a class that is predicted nowhere
    -> put a cross-entropy beside it, such as OhemCrossEntropyLoss with thresh=None, min_kept=1.0
note mined-region: mining beside an overlap loss took away part of what that gains, wherever both
    were measured
    -> thresh=None, min_kept=1.0 beside it is plain cross-entropy; compare both (docs/which_loss.md)
note no-floor: min_kept=0: late in training, when few pixels are hard, little is trained on
    -> set a floor, for example min_kept=1/16
note thresh-below-chance: thresh={thresh:g} is not above chance (1/{classes}): only badly wrong
    pixels are hard
    -> 0.7 is usual
note one-vs-rest: use_sigmoid=True with {channels} channels sums {channels} binary losses a pixel,
    so thresh bounds the product of their probabilities
    -> leave use_sigmoid out; or, with two classes, set out_channels=1 in the head
note unit-idle: min_kept_per='image' has no effect on a share, and none with pool={pool!r}
    -> leave it out
note top-k: without thresh the sampler keeps the min_kept pixels with the largest loss
    -> set thresh=0.7 for the thresholded rule
note scaled-gradient: {who} divides by all pixels, so the gradient shrinks by the kept share
    -> type='OhemCrossEntropyLoss' with avg='kept' (and no sampler) keeps the scale
note mmseg-unsafe: OhemCrossEntropy gives a zero without a gradient for a batch with no valid pixel,
    and NaN when all valid pixels are tied
    -> type='OhemCrossEntropyLoss', preset='hrnet' is the same rule without these
note not-fused: FusedOhemHook leaves this head alone: {reason}
    -> it is only slower
note could-be-fused: this head upsamples its logits before the loss
    -> custom_hooks=[dict(type='FusedOhemHook')] saves time and memory, with the same numbers
note schedule: OhemScheduleHook changes thresh or min_kept during training
    -> read the table as the settings of the losses alone
note unknown-size: the config does not say how many pixels a {pool} has, so min_kept is not checked
    -> a RandomCrop and a batch_size say it, and for pool='world' a name with _4xb2 in it
note no-heads: there is no decode head with a loss
    -> is this the config of a model?
"""
_ENTRY = re.compile(r"^(\w+) ([\w-]+): (.+?)\s+-> (.+?)$(?!\n )", re.MULTILINE | re.DOTALL)

# By name: severity, what is the matter, what to do.
FINDINGS = {
    name: (severity, " ".join(what.split()), " ".join(remedy.split()))
    for severity, name, what, remedy in _ENTRY.findall(_TABLE)
}


class Finding(NamedTuple):
    """Something to know, one of ``FINDINGS``, and where it was seen."""

    severity: str
    code: str
    where: str
    what: str
    remedy: str

    @classmethod
    def of(cls, code: str, where: str, /, **values: object) -> Finding:
        """The finding of a name, with the values that its text takes."""
        severity, what, remedy = FINDINGS[code]
        return cls(severity, code, where, what.format(**values), remedy.format(**values))


def merged(findings: list[Finding]) -> list[Finding]:
    """Worst first; what holds in several places is said once."""
    places: dict[Finding, dict[str, None]] = {}
    for finding in findings:
        places.setdefault(finding._replace(where=""), {})[finding.where] = None
    once = [finding._replace(where=", ".join(where)) for finding, where in places.items()]
    return sorted(once, key=lambda finding: SEVERITIES.index(finding.severity))


def sentence(text: str) -> str:
    """A text with its full stop, unless it ends already."""
    return text if text.endswith((".", "?", "!")) else f"{text}."
