"""How the losses take their settings: class weights, NumPy's numbers, unknown keywords."""

import json

import numpy as np
import pytest
import torch
from problems import batch

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy
from ohem_mm import OhemCrossEntropyLoss as Ohem
from ohem_mm import RegionLoss as Region


@pytest.mark.parametrize("suffix", ["npy", "json", "yaml", "pkl"])
def test_class_weight_from_file(tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    weights = [1.0, 2.5, 0.0, 4.0]
    if suffix == "npy":
        np.save(path, np.array(weights))
    elif suffix == "pkl":
        pytest.importorskip("mmengine").dump(weights, str(path))
    else:
        pytest.importorskip("mmengine")
        path.write_text(json.dumps(weights))
    logits, target = batch(16)
    expected = OhemCrossEntropyLoss(class_weight=weights)(logits, target)
    torch.testing.assert_close(
        OhemCrossEntropyLoss(class_weight=str(path))(logits, target), expected
    )


def test_repr_names_settings():
    text = repr(OhemCrossEntropyLoss(min_kept=100, class_weight=[1.0, 2.0], ignore_index=0))
    assert text == (
        "OhemCrossEntropyLoss(thresh=0.7, min_kept=100, ignore_index=0, class_weight=[1.0, 2.0])"
    )


def test_numbers_of_numpy():
    logits, target = batch(0)
    expected = ohem_cross_entropy(logits, target, thresh=0.5, min_kept=7)
    loss = OhemCrossEntropyLoss(thresh=np.float32(0.5), min_kept=np.int64(7))(logits, target)
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("loss", "kwargs", "error", "message"),
    [
        (Ohem, {"reduction": "avg"}, ValueError, "reduction must be one of none, mean, sum"),
        (Ohem, {"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        (Ohem, {"ignore_index": 1.5}, TypeError, "1.5"),
        (Ohem, {"loss_weight": -1}, ValueError, "loss_weight"),
        (Ohem, {"loss_name": "ohem"}, ValueError, "loss_name must start with 'loss_'"),
        (Ohem, {"class_weight": [1, -2]}, ValueError, "-2"),
        (Ohem, {"class_weight": []}, ValueError, "class_weight"),
        (Ohem, {"class_weight": "/no/such.npy"}, FileNotFoundError, "/no/such.npy"),
        (Ohem, {"thres": 0.9}, TypeError, "unknown keyword 'thres'. Did you mean thresh?"),
        (Ohem, {"min_keep": 9}, TypeError, "Did you mean min_kept?"),
        (Ohem, {"ignore_label": 9}, TypeError, "Did you mean ignore_index?"),
        (Ohem, {"avg_non_ignore": True}, TypeError, "Did you mean avg='valid'?"),
        (Ohem, {"xyzzy": 1}, TypeError, "unknown keyword 'xyzzy'. Allowed: thresh, min_kept"),
        (Region, {"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\)"),
        (Region, {"ignore_index": 1.5}, TypeError, "1.5"),
        (Region, {"loss_weight": -1}, ValueError, "loss_weight"),
        (Region, {"loss_name": "dice"}, ValueError, "loss_name must start with 'loss_'"),
        (Region, {"class_weight": [1, -2]}, ValueError, "-2"),
        (Region, {"preset": "smp"}, ValueError, "preset must be one of smp-dice.*'smp'"),
        (Region, {"eps": 0.1}, TypeError, "unknown keyword 'eps'. Did you mean smooth?"),
        (Region, {"naive_dice": True}, TypeError, "Did you mean squared?"),
        (Region, {"batch_dice": True}, TypeError, "Did you mean pool='batch'?"),
        (Region, {"knd": "dice"}, TypeError, "Did you mean kind?"),
        (Region, {"xyzzy": 1}, TypeError, "unknown keyword 'xyzzy'. Allowed: kind, alpha"),
    ],
)
def test_bad_settings_are_refused_at_build_time(loss, kwargs, error, message):
    with pytest.raises(error, match=message):
        loss(**kwargs)
