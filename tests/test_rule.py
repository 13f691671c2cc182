"""The rules: what is refused when one is made, and what a rule says of itself."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from ohem_mm import OhemCrossEntropyLoss as Ohem
from ohem_mm import RegionLoss as Region
from ohem_mm.presets import PRESETS, preset_rule
from ohem_mm.rule import OhemRule


@pytest.mark.parametrize(
    ("loss", "kwargs", "error", "message"),
    [
        (
            Ohem,
            {"thresh": 0},
            ValueError,
            r"thresh must be None or a probability in \(0, 1\].*got 0",
        ),
        (Ohem, {"thresh": 1.5}, ValueError, "1.5"),
        (Ohem, {"thresh": math.nan}, ValueError, "nan"),
        (Ohem, {"thresh": "0.7"}, ValueError, "'0.7'"),
        (Ohem, {"thresh": True}, ValueError, "True"),
        (Ohem, {"thresh": np.float32(1.5)}, ValueError, "1.5"),
        (Ohem, {"min_kept": -1}, ValueError, "min_kept must be an int >= 0.*got -1"),
        (Ohem, {"min_kept": 1.5}, ValueError, "1.5"),
        (Ohem, {"min_kept": math.nan}, ValueError, "nan"),
        (Ohem, {"min_kept": None}, TypeError, "None"),
        (
            Ohem,
            {"pool": "gpu"},
            ValueError,
            "pool must be one of batch, image, class, world.*'gpu'",
        ),
        (Ohem, {"avg": "mean"}, ValueError, "avg must be one of kept, valid, all"),
        (Ohem, {"min_kept_per": "pixel"}, ValueError, "min_kept_per must be one of batch, image"),
        (Ohem, {"always_keep": [-1]}, ValueError, "-1"),
        (Ohem, {"always_keep": 1}, TypeError, "always_keep must be a list"),
        (Ohem, {"always_keep": [1.0]}, ValueError, "1.0"),
        (
            Region,
            {"kind": "iou"},
            ValueError,
            "kind must be one of dice, jaccard, tversky, but got 'iou'",
        ),
        (Region, {"pool": "class"}, ValueError, "pool must be one of batch, image, world.*'class'"),
        (
            Region,
            {"classes": [1]},
            ValueError,
            r"classes must be one of present, all, but got \[1\]",
        ),
        (
            Region,
            {"kind": "tversky", "alpha": -1},
            ValueError,
            "alpha must be a finite number >= 0.*-1",
        ),
        (Region, {"kind": "tversky", "beta": math.inf}, ValueError, "beta.*inf"),
        (Region, {"alpha": 0.5}, ValueError, "alpha=0.5 and beta=0.7 need kind='tversky'.*'dice'"),
        (Region, {"kind": "tversky", "alpha": 0, "beta": 0}, ValueError, "must not both be 0"),
        (Region, {"kind": "tversky", "squared": True}, ValueError, "squared=True goes with"),
        (Region, {"gamma": 0}, ValueError, "gamma must be a finite number > 0, but got 0"),
        (Region, {"gamma": "2"}, ValueError, "'2'"),
        (
            Region,
            {"smooth": -1e-3},
            ValueError,
            "smooth must be a finite number >= 0, but got -0.001",
        ),
        (Region, {"smooth": math.nan}, ValueError, "nan"),
    ],
)
def test_bad_settings_are_refused_at_build_time(loss, kwargs, error, message):
    with pytest.raises(error, match=message):
        loss(**kwargs)


def test_which_rules_the_fast_path_knows():
    """A habit that makes no difference must not cost the fused kernels."""
    plain = {name for name in PRESETS if preset_rule(name).plain}
    assert plain == {"mmseg-sampler", "hrnet", "bisenet", "torchseg", "textbook"}
    assert replace(preset_rule("hrnet"), min_kept=0).plain
    assert not replace(preset_rule("torchseg"), min_kept=0).plain


def test_the_percentage_is_the_one_that_was_divided():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(2000, generator=generator, dtype=torch.float64).mul(100).tolist()
    for digits in (0, 1, 2, 6, 12):
        for value in values:
            per_cent = round(value, digits)
            assert OhemRule(min_kept=per_cent / 100).per_cent == per_cent
    assert OhemRule(min_kept=0.29).per_cent == 29
