"""OhemScheduleHook: values at every time, resume, warm-up, and what it says of a bad config."""

import math

import pytest
import torch
from trainings import history, logs, train

pytest.importorskip("mmseg")

from torch import nn
from torch.nn import functional as F

from ohem_mm import OhemCrossEntropyLoss
from ohem_mm.cli import allow_mmengine_checkpoints
from ohem_mm.hooks import OhemScheduleHook

LINEAR = {"type": "linear", "start": 0.9, "stop": 0.5, "begin": 2, "end": 6}


def values(hook_settings, times, own=0.7, min_kept=0.1):
    """What a schedule sets at each time, on a model of one loss."""

    class Loop:
        max_iters = max_epochs = 10**6
        iter = epoch = 0
        train_loop = None

        def __init__(self):
            self.model = nn.ModuleDict({"loss_decode": OhemCrossEntropyLoss(own, min_kept)})
            self.message_hub = self.logger = self

        def update_scalar(self, key, value):
            pass

    loop, hook, seen = Loop(), OhemScheduleHook(**hook_settings), []
    hook.before_train(loop)
    for loop.iter in times:
        hook.before_train_iter(loop, loop.iter)
        loss = loop.model["loss_decode"]
        seen.append((loss.thresh, loss.min_kept))
    hook.after_train(loop)
    assert (loop.model["loss_decode"].thresh, loop.model["loss_decode"].min_kept) == (own, min_kept)
    return seen


def test_linear():
    found = [thresh for thresh, _ in values({"thresh": LINEAR}, [0, 1, 2, 3, 4, 5, 6, 7, 99])]
    assert found == pytest.approx([0.7, 0.7, 0.9, 0.8, 0.7, 0.6, 0.5, 0.5, 0.5])
    assert found[2] == 0.9
    assert found[6] == 0.5


def test_cosine():
    found = [t for t, _ in values({"thresh": {**LINEAR, "type": "cosine"}}, range(2, 8))]
    want = [0.5 + 0.2 * (1 + math.cos(math.pi * i / 4)) for i in range(5)] + [0.5]
    assert found == pytest.approx(want)


def test_step_and_pieces_one_after_another():
    step = {"type": "step", "values": [0.9, 0.8, 0.6], "milestones": [3, 5], "begin": 1}
    constant = {"type": "constant", "value": 0.4, "begin": 8}
    found = [t for t, _ in values({"thresh": [step, constant]}, range(10))]
    assert found == [0.7, 0.9, 0.9, 0.8, 0.8, 0.6, 0.6, 0.6, 0.4, 0.4]


def test_a_missing_end_is_the_setting_of_the_loss():
    down = {"type": "linear", "start": 1.0, "end": 4}
    assert [t for t, _ in values({"thresh": down}, [0, 2, 4])] == pytest.approx([1.0, 0.85, 0.7])
    away = {"type": "linear", "stop": 0.5, "end": 4}
    assert [t for t, _ in values({"thresh": away}, [0, 2, 4])] == pytest.approx([0.7, 0.6, 0.5])


def test_min_kept_in_pixels_stays_an_int():
    pixels = {"type": "linear", "start": 100, "stop": 5, "end": 4}
    found = [k for _, k in values({"min_kept": pixels}, range(5), min_kept=7)]
    assert found == [100, 76, 52, 29, 5]
    assert {type(k) for k in found} == {int}
    share = {"type": "linear", "start": 0.5, "stop": 0.0, "end": 2}
    assert [k for _, k in values({"min_kept": share}, range(3))] == [0.5, 0.25, 0.0]


def test_warm_up_comes_before_the_schedules():
    found = values({"thresh": LINEAR, "warmup": 4}, [0, 3, 4, 5])
    assert found[:2] == [(1.0, 1.0)] * 2
    assert found[2:] == [(pytest.approx(0.7), 0.1), (pytest.approx(0.6), 0.1)]


BAD = {
    "nothing to do": ({}, ValueError, "nothing to do"),
    "type": ({"thresh": {"type": "poly"}}, ValueError, "constant, linear, cosine, step.*'poly'"),
    "no dict": ({"thresh": 0.7}, TypeError, "list of dicts.*0.7"),
    "no dict in the list": ({"thresh": [0.7]}, TypeError, r"thresh\[0\] must be a dict.*0.7"),
    "no pieces": ({"thresh": []}, ValueError, "at least one piece"),
    "key": ({"thresh": {**LINEAR, "strat": 1}}, ValueError, "Did you mean 'start'"),
    "missing": ({"thresh": {"type": "linear", "stop": 0.5}}, ValueError, "needs 'end'"),
    "no values": ({"thresh": {"type": "linear", "end": 5}}, ValueError, "'start' or 'stop'"),
    "order": ({"thresh": {**LINEAR, "end": 2}}, ValueError, r"after begin \(2\), but got 2"),
    "time": ({"thresh": {**LINEAR, "end": 1e3}}, TypeError, "end must be an int.*1000.0"),
    "negative": ({"thresh": {**LINEAR, "begin": -1}}, ValueError, "begin must be >= 0.*-1"),
    "thresh": ({"thresh": {**LINEAR, "stop": 1.5}}, ValueError, r"thresh\[0\].*1.5"),
    "share": ({"min_kept": {**LINEAR, "stop": 1.5}}, ValueError, r"min_kept\[0\].*1.5"),
    "none": ({"thresh": {"type": "constant", "value": None}}, TypeError, "numbers, but got None"),
    "units": ({"min_kept": {**LINEAR, "stop": 5}}, ValueError, "0.9 and 5"),
    "overlap": ({"thresh": [LINEAR, {**LINEAR, "end": 9}]}, ValueError, r"\(6\).*got 2"),
    "step": (
        {"thresh": {"type": "step", "values": [0.5], "milestones": [1]}},
        ValueError,
        "got 1 and 1",
    ),
    "milestones": (
        {"thresh": {"type": "step", "values": [0.5, 0.6], "milestones": [0]}},
        ValueError,
        r"after begin \(0\)",
    ),
    "warmup": ({"warmup": -2}, ValueError, "warmup must be >= 0.*-2"),
    "warmup type": ({"warmup": 0.5}, TypeError, "warmup must be an int.*0.5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_config_is_refused_at_once(name):
    settings, error, message = BAD[name]
    with pytest.raises(error, match=message):
        OhemScheduleHook(**settings)


def test_a_constant_schedule_trains_as_without_the_hook(tmp_path):
    hook = {
        "type": "OhemScheduleHook",
        "thresh": {"type": "constant", "value": 0.7},
        "min_kept": {"type": "linear", "start": 1 / 16, "stop": 1 / 16, "end": 5},
    }
    without = train(tmp_path / "without", [])
    with_hook = train(tmp_path / "with", [hook])
    assert history(with_hook, "loss") == history(without, "loss")
    assert history(with_hook, "ohem/decode_head/thresh") == [0.7]


def test_warm_up_trains_as_plain_cross_entropy(tmp_path):
    """And the loss is the mean over the valid pixels, pixels of probability 1 among them."""
    # Early on few pixels have less than 0.05, so mining drops most of them.
    mined = {"model.decode_head.loss_decode.thresh": 0.05}
    runner = train(tmp_path / "warm", [{"type": "OhemScheduleHook", "warmup": 5}], **mined)
    plain = train(
        tmp_path / "plain",
        [],
        **{
            "model.decode_head.loss_decode": {
                "_delete_": True,
                "type": "CrossEntropyLoss",
                "avg_non_ignore": True,
            }
        },
    )
    assert history(runner, "loss")[:5] == pytest.approx(history(plain, "loss")[:5], rel=1e-4)
    assert history(runner, "loss")[5] > 1.01 * history(plain, "loss")[5]
    assert history(runner, "ohem/decode_head/thresh") == [1.0, 0.05]
    assert history(runner, "ohem/decode_head/min_kept") == [1.0, 1 / 16]

    logits = torch.randn(2, 3, 8, 8)
    logits[0, 1] = 200.0  # certain of class 1
    target = torch.randint(0, 3, (2, 8, 8))
    target[1, :3] = 255
    loss = OhemCrossEntropyLoss(thresh=1.0, min_kept=1.0)
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(loss(logits, target), expected, rtol=1e-6, atol=0)


def test_resume_goes_on_where_it_stopped(tmp_path):
    allow_mmengine_checkpoints()
    hook = {"type": "OhemScheduleHook", "thresh": LINEAR}
    whole = train(tmp_path / "whole", [hook])
    seen = history(whole, "ohem/decode_head/thresh")
    assert seen == pytest.approx([0.7, 0.9, 0.8, 0.7, 0.6])
    first = train(tmp_path / "first", [hook], **{"train_cfg.max_iters": 3})
    assert history(first, "ohem/decode_head/thresh") == seen[:2]
    checkpoint = str(tmp_path / "first" / "iter_3.pth")
    second = train(tmp_path / "second", [hook], resume=True, load_from=checkpoint)
    assert second.iter == 6
    assert history(second, "ohem/decode_head/thresh") == seen


def test_by_epoch(tmp_path):
    hook = {
        "type": "OhemScheduleHook",
        "by_epoch": True,
        "thresh": {**LINEAR, "begin": 0, "end": 2},
    }
    runner = train(
        tmp_path / "epochs",
        [hook],
        train_cfg={"_delete_": True, "type": "EpochBasedTrainLoop", "max_epochs": 3},
        **{"train_dataloader.sampler": {"type": "DefaultSampler", "shuffle": True}},
    )
    assert runner.iter == 12
    assert history(runner, "ohem/decode_head/thresh") == pytest.approx([0.9, 0.7, 0.5])
    with pytest.raises(ValueError, match="by_epoch=True, but this training counts iterations"):
        train(tmp_path / "iterations", [hook])


def test_the_log_warns_of_what_cannot_be_reached(tmp_path):
    long = {"type": "OhemScheduleHook", "thresh": {**LINEAR, "end": 7}, "warmup": 6}
    train(tmp_path / "long", [long])
    assert "schedule of thresh ends at iteration 7, but training ends at 6" in logs(tmp_path)
    assert "warmup=6 lasts for the whole training" in logs(tmp_path)
    train(tmp_path / "late", [{**long, "thresh": {**LINEAR, "begin": 6, "end": 7}}])
    assert "last piece of thresh begins at iteration 6" in logs(tmp_path / "late")
    plain = {"model.decode_head.loss_decode": {"_delete_": True, "type": "CrossEntropyLoss"}}
    train(tmp_path / "plain", [long], **plain, **{"train_cfg.max_iters": 1})
    assert "has no OhemCrossEntropyLoss" in logs(tmp_path / "plain")


def test_a_schedule_that_does_not_fit_the_loss():
    with pytest.raises(ValueError, match="loss has thresh=None"):
        values({"thresh": {"type": "linear", "start": 0.9, "end": 5}}, [0], own=None)
    with pytest.raises(ValueError, match="loss has min_kept=5.*from 0.5 to 5"):
        values({"min_kept": {"type": "linear", "start": 0.5, "end": 5}}, [0], min_kept=5)
