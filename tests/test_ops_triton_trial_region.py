"""The trial of the region term: it passes where the kernels are right and finds what is planted."""

import pytest
import torch
from interpreter import DEVICE, INTERPRETED, runs
from marks import slow
from planted import plant
from region_kernels import SMALL

pytest.importorskip("triton", reason="needs Triton")
kernels = pytest.importorskip("ohem_mm.ops.triton")
trial = pytest.importorskip("ohem_mm.ops.triton.trial")
trial_region = pytest.importorskip("ohem_mm.ops.triton.trial_region")


@pytest.fixture
def small_trial(monkeypatch):
    monkeypatch.setattr(trial, "LOW", (2, 5))
    monkeypatch.setattr(trial, "SIZE", (5, 11))
    monkeypatch.setattr(trial, "TILING", SMALL)


@runs
def test_the_trial_passes(small_trial):
    assert kernels.sums_trial(torch.device(DEVICE), torch.float32, 3) is None


FAULTS = {
    "intersection": lambda sums, hits: (
        sums._replace(intersection=sums.intersection * 1.001),
        hits,
    ),
    "predicted": lambda sums, hits: (sums._replace(predicted=sums.predicted * 1.001), hits),
    "counts": lambda sums, hits: (sums._replace(counts=sums.counts + 1), hits),
    "correct pixels": lambda sums, hits: (sums, hits + 2),
}


@runs
@pytest.mark.parametrize(
    "name", ["intersection", *map(slow, sorted(FAULTS.keys() - {"intersection"}))]
)
def test_the_trial_finds_a_planted_fault(small_trial, name):
    def faulty(*args, **options):
        return FAULTS[name](*kernels.class_sums(*args, **options))

    found = trial_region.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
    assert name in found


@runs
def test_the_trial_finds_weights_that_are_lost(small_trial):
    def faulty(logits, target, weight, *args, **options):
        return kernels.class_sums(logits, target, None, *args, **options)

    found = trial_region.sums_trial(faulty, torch.device(DEVICE), torch.float32, 3)
    assert "squares with weights" in found


@runs
def test_the_trial_finds_a_wrong_gradient(small_trial, monkeypatch):
    slopes = kernels.region.slopes

    def faulty(*args, **options):
        shift, at_true = slopes(*args, **options)
        return shift, at_true * 1.01

    monkeypatch.setattr(kernels.region, "slopes", faulty)
    found = kernels.sums_trial(torch.device(DEVICE), torch.float32, 3)
    assert "another gradient of sums" in found


@pytest.fixture
def small_pair_trial(monkeypatch):
    # Large enough for a floor that decides among ties.
    monkeypatch.setattr(trial, "LOW", (3, 6))
    monkeypatch.setattr(trial, "SIZE", (9, 18))
    monkeypatch.setattr(trial, "TILING", SMALL._replace(tile=64, cells=8))


@runs
def test_the_trial_of_a_pair_passes(small_pair_trial):
    assert kernels.pair_trial(torch.device(DEVICE), torch.float32, 2) is None


# Module, what to replace in its source, and by what.
PLANTED = {
    "last row of a tile": ("region", "(y < y_end[None, :])", "(y < y_end[None, :] - 1)"),
    "last column of a tile": ("region", "(x < x_end[None, :])", "(x < x_end[None, :] - 1)"),
    "tiles below the first": ("region", "range(0, height, tile.rows)", "range(0, 1, tile.rows)"),
    "tiles right of the first": ("region", "range(0, width, tile.cols)", "range(0, 1, tile.cols)"),
    "one place for all tiles": ("region", "            out += 1\n", "            out += 0\n"),
    "first label of a tile alone": ("region", "c = highest(label)\n\n", "c = -1\n\n"),
    "ignored pixels summed": (
        "cells",
        "tl.where(label >= 0, norm",
        "tl.where(label >= -1, norm",
    ),
    "squares not squared": ("region", "p *= p", "p *= 1.0"),
    "mean of squares halved": ("region", "mean *= 2.0", "mean *= 1.0"),
    "no mean": ("region", "-(mean + true)", "-(0 * mean + true)"),
    "loss left out of all classes": ("region", "everywhere += kept", "everywhere += 0 * kept"),
    "loss left out of the true class": ("region", "true -= kept", "true -= 0 * kept"),
    "loss not divided": ("region", ".to(tl.float32) / tl.load(divisor)", ".to(tl.float32)"),
    "wrong corner below": (
        "cells",
        "tl.minimum(cell_y + 1, low_h - 1)",
        "tl.minimum(cell_y, low_h - 1)",
    ),
    "wrong corner to the right": (
        "cells",
        "tl.minimum(cell_x + 1, low_w - 1)",
        "tl.minimum(cell_x, low_w - 1)",
    ),
    "wrong weight of a row": (
        "cells",
        "tl.fma(weight_y, both[None, :]",
        "tl.fma(0 * weight_y, both[None, :]",
    ),
    "labels of easy pixels lost": ("mining", "if not rule.apart:", "if True:"),
    "wrong true class": ("backward", "hot, at_true, 0.0", "hot, 0.0, at_true"),
    "wrong slope": ("backward", "tl.fma(weight, steep, shift)", "tl.fma(weight, 0 * steep, shift)"),
}


@pytest.mark.slow
@runs
@pytest.mark.skipif(not INTERPRETED, reason="each fault would be compiled")
@pytest.mark.parametrize("name", PLANTED)
def test_the_trial_of_a_pair_finds_what_is_planted(small_pair_trial, monkeypatch, tmp_path, name):
    plant(monkeypatch, tmp_path, *PLANTED[name])
    trouble = kernels.pair_trial(torch.device(DEVICE), torch.float32, 2)
    assert trouble is not None
    assert "fails" not in trouble
