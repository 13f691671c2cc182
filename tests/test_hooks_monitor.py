"""OhemMonitorHook: where the values are written, and when it warns."""

import json
import logging
import math

import pytest
import torch
from trainings import history, logs, train

pytest.importorskip("mmseg")

from mmengine.logging import MessageHub
from mmengine.runner import LogProcessor
from torch import nn

from ohem_mm import OhemCrossEntropyLoss, RegionLoss
from ohem_mm.cli import allow_mmengine_checkpoints
from ohem_mm.hooks import OhemMonitorHook
from ohem_mm.hooks.readings import SCALARS
from ohem_mm.joint import joint_losses

MONITOR = {"type": "OhemMonitorHook"}
SIX = {f"train/ohem/decode_head/{what}" for what in SCALARS}


# --- where and when it writes --------------------------------------------------------------------


class Stub:
    """As much of a runner as the hook uses, around a model that is called by hand."""

    def __init__(self, hook, classes=("road", "traffic light"), **losses):
        self.model = nn.ModuleDict({name: nn.Module() for name in losses})
        for name, loss in losses.items():
            self.model[name].loss_decode = loss
        self.message_hub = MessageHub(f"stub_{id(self)}")
        self.log_processor = LogProcessor(by_epoch=False)
        self.logger = logging.Logger("stub")
        self.lines, handler = [], logging.Handler()
        handler.emit = lambda record: self.lines.append((record.levelname, record.getMessage()))
        self.logger.addHandler(handler)
        self.hooks, self.cfg, self.iter, self.written = [hook], {}, 0, []
        self.visualizer = self
        self.train_dataloader = self
        self.dataset = type("Dataset", (), {"metainfo": {"classes": classes}})
        self.hook = hook
        hook.before_train(self)

    def __len__(self):
        return 10**6

    def add_scalars(self, values, step):
        self.written.append((step, values))

    def step(self, logits, target):
        self.hook.before_train_iter(self, self.iter)
        for head in self.model.values():
            head.loss_decode(logits, target)
        self.hook.after_train_iter(self, self.iter)
        self.iter += 1

    def warnings(self):
        return [text for level, text in self.lines if level == "WARNING"]


def two_classes(certain):
    """Logits that give class 0 the probability ``certain``; half of the labels are 0, half 1."""
    logits = torch.zeros(2, 2, 4, 4)
    logits[:, 0] = math.log(certain / (1 - certain))
    target = torch.zeros(2, 4, 4, dtype=torch.long)
    target[1] = 1
    return logits, target


def test_values_of_classes_go_to_the_backends_under_safe_names():
    runner = Stub(OhemMonitorHook(interval=2), head=OhemCrossEntropyLoss(0.6, 0))
    for _ in range(4):
        runner.step(*two_classes(0.8))
    assert [step for step, _ in runner.written] == [2, 4]
    assert runner.written[0][1] == {
        "ohem/head/kept_share_road": 0.0,
        "ohem/head/kept_share_traffic_light": 1.0,
        "iter": 2,
    }
    latest = runner.message_hub.get_info("train/ohem/head")
    assert latest["kept_share_traffic_light"] == 1
    assert latest["kept_share"] == 0.5


def test_with_several_losses_the_log_stays_short():
    runner = Stub(
        OhemMonitorHook(interval=1),
        classes=None,
        decode_head=OhemCrossEntropyLoss(0.6, 0),
        aux=OhemCrossEntropyLoss(0.1, 0.75),
    )
    runner.log_processor.log_with_hierarchy = True
    runner.step(*two_classes(0.8))
    assert set(runner.message_hub.log_scalars) == {
        f"train/ohem/{head}/{what}"
        for head in ("decode_head", "aux")
        for what in ("kept_share", "thresh_effective")
    }
    ((_, written),) = runner.written
    assert written["train/ohem/decode_head/floor_active"] == 0
    assert written["train/ohem/aux/floor_active"] == 1
    # Ties at the floor share the places that are left.
    assert written["train/ohem/aux/kept_share_0"] == 0.5
    assert runner.message_hub.get_scalar("train/ohem/aux/thresh_effective").current() == (
        pytest.approx(0.8)
    )


def test_it_listens_at_logging_steps_only():
    loss = OhemCrossEntropyLoss()
    runner = Stub(OhemMonitorHook(interval=3), head=loss)
    listening = []
    for runner.iter in range(7):
        runner.hook.before_train_iter(runner, runner.iter)
        listening.append(len(loss._forward_hooks) + len(loss._forward_pre_hooks))
        loss(*two_classes(0.8))
        runner.hook.after_train_iter(runner, runner.iter)
    assert listening == [0, 0, 2, 0, 0, 2, 0]
    assert not loss._forward_hooks
    assert not loss._forward_pre_hooks


def test_a_step_without_valid_pixels_is_left_out():
    runner = Stub(OhemMonitorHook(interval=1), head=OhemCrossEntropyLoss())
    logits, target = two_classes(0.8)
    runner.step(logits, torch.full_like(target, 255))
    runner.step(logits[:0], target[:0])
    assert not runner.written
    assert not runner.message_hub.log_scalars
    runner.step(logits, target)
    assert runner.message_hub.get_scalar("train/ohem/head/kept_share").current() == 0.5


# --- warnings ------------------------------------------------------------------------------------


def watch(loss, steps, data, patience=3):
    runner = Stub(OhemMonitorHook(interval=1, patience=patience), head=loss)
    for _ in range(steps):
        runner.step(*data)
    return runner.warnings()


def test_warns_once_where_nothing_is_dropped():
    data = two_classes(0.6)
    assert watch(OhemCrossEntropyLoss(0.7, 0), 2, data) == []
    (warning,) = watch(OhemCrossEntropyLoss(0.7, 0), 9, data)
    assert "head: dropped nothing in the last 3 measurements" in warning
    assert "below thresh=0.7; use a lower thresh" in warning
    (warning,) = watch(OhemCrossEntropyLoss(0.5, 100_000), 9, data)
    assert "the floor min_kept=100000 is as large as the pixels there are" in warning
    # Asked for, as in a warm-up.
    assert watch(OhemCrossEntropyLoss(0.5, 1.0), 9, data) == []
    assert watch(OhemCrossEntropyLoss(preset="torchseg", min_kept=0), 9, data) == []


def test_warns_once_where_the_floor_alone_decides():
    logits, target = two_classes(0.6)
    data = (torch.where(target[:, None] == 1, -logits, logits), target)  # all right
    data[0][0, :, 0] = 0.0  # but for four pixels in doubt, the floor
    (first, second) = watch(OhemCrossEntropyLoss(0.3, 4), 9, data)
    assert "kept pixels by its floor in the last 3 measurements: fewer than min_kept=4" in first
    assert "no pixel was kept of traffic_light" in second
    assert len(watch(OhemCrossEntropyLoss(None, 4), 9, data)) == 1  # top-k is meant: the class only


def test_warns_once_of_a_class_that_is_never_kept():
    data = two_classes(0.8)
    (warning,) = watch(OhemCrossEntropyLoss(0.7, 0), 9, data)
    assert "no pixel was kept of road in the last 3 measurements that saw it" in warning
    assert "pool='class' or always_keep=[0]" in warning
    # Once in three is not never; nor is a step without the class a step in which it was dropped.
    runner = Stub(OhemMonitorHook(interval=1, patience=3), head=OhemCrossEntropyLoss(0.7, 0))
    for step in range(12):
        runner.step(*two_classes(0.6 if step % 3 == 2 else 0.8))
    assert runner.warnings() == []
    logits, target = data
    for step in range(4):
        runner.step(logits, target.clamp(min=1) if step % 2 else target)
    assert runner.warnings() == []
    runner.step(logits, target)
    assert len(runner.warnings()) == 1


def test_says_where_it_cannot_listen():
    hook = OhemMonitorHook(interval=1)
    runner = Stub(hook, head=OhemCrossEntropyLoss())
    for _ in range(2):
        hook.before_train_iter(runner, 0)
        hook.after_train_iter(runner, 0)
    (warning,) = runner.warnings()
    assert "head: was not called in a logging step" in warning
    runner.cfg = {"compile": True}
    hook.before_train(runner)
    assert "cannot be listened to" in runner.warnings()[-1]


# --- overlap -------------------------------------------------------------------------------------


def test_overlap_of_each_class_of_the_batch():
    runner = Stub(
        OhemMonitorHook(interval=2),
        decode_head=RegionLoss("jaccard", loss_weight=0.3),
        aux=RegionLoss(pool="image"),
    )
    logits, target = two_classes(0.8)
    for _ in range(2):
        runner.step(logits, target)
    # Class 0: I = 16 * .8, P = 32 * .8, T = 16; class 1: I = 16 * .2, P = 32 * .2, T = 16.
    jaccard = [12.8 / (25.6 + 16 - 12.8), 3.2 / (6.4 + 16 - 3.2)]
    dice = [2 * 12.8 / (25.6 + 16), 2 * 3.2 / (6.4 + 16)]
    assert runner.message_hub.log_scalars.keys() == {
        "train/region/decode_head/overlap",
        "train/region/aux/overlap",
    }
    for name, scores in (("decode_head", jaccard), ("aux", dice)):
        mean = runner.message_hub.get_scalar(f"train/region/{name}/overlap")
        assert mean.current() == pytest.approx(sum(scores) / 2)
        latest = runner.message_hub.get_info(f"train/region/{name}")
        assert latest["overlap_road"] == pytest.approx(scores[0])
        assert latest["overlap_traffic_light"] == pytest.approx(scores[1])
    ((step, written),) = runner.written
    assert step == 2
    assert written["region/aux/overlap_traffic_light"] == pytest.approx(dice[1])


def test_overlap_of_absent_classes_one_channel_and_no_valid_pixel():
    runner = Stub(OhemMonitorHook(interval=1), decode_head=RegionLoss())
    logits, target = two_classes(0.8)
    runner.step(logits, torch.zeros_like(target))
    latest = runner.message_hub.get_info("train/region/decode_head")
    assert set(latest) == {"overlap", "overlap_road"}
    runner.step(logits, torch.full_like(target, 255))
    assert len(runner.written) == 1
    one = Stub(OhemMonitorHook(interval=1), decode_head=RegionLoss(use_sigmoid=True))
    one.step(logits[:, 1:], target)
    p = 0.5  # logits of class 1 are 0
    assert one.message_hub.get_info("train/region/decode_head") == pytest.approx(
        dict.fromkeys(("overlap", "overlap_traffic_light"), 2 * 16 * p / (32 * p + 16))
    )


def test_overlap_and_mining_of_one_head():
    runner = Stub(OhemMonitorHook(interval=1), decode_head=OhemCrossEntropyLoss(0.6, 0))
    runner.model["decode_head"].loss_decode = nn.ModuleList(
        [OhemCrossEntropyLoss(0.6, 0), RegionLoss()]
    )
    runner.hook.before_train(runner)
    logits, target = two_classes(0.8)
    runner.hook.before_train_iter(runner, 0)
    joint_losses(list(runner.model["decode_head"].loss_decode), logits, target)
    runner.hook.after_train_iter(runner, 0)
    assert runner.message_hub.get_info("train/ohem/decode_head")["kept_share"] == 0.5
    dice = runner.message_hub.get_info("train/region/decode_head")["overlap_road"]
    assert dice == pytest.approx(2 * 12.8 / (25.6 + 16))


@pytest.mark.parametrize("bad", [{"interval": 0}, {"interval": 2.5}, {"patience": -1}])
def test_bad_config_is_refused(bad):
    ((name, value),) = bad.items()
    with pytest.raises(ValueError, match=f"{name} must be an int above 0, but got {value}"):
        OhemMonitorHook(**bad)


# --- real trainings ------------------------------------------------------------------------------

# Few pixels are below this at the start, so that pixels are dropped.
MINED = {"model.decode_head.loss_decode.thresh": 0.1}


@pytest.mark.parametrize("fused", [[], [{"type": "FusedOhemHook"}]], ids=["plain", "fused"])
def test_training_is_the_same_and_the_log_shows_the_values(tmp_path, fused):
    without = train(tmp_path / "without", fused, **MINED)
    runner = train(tmp_path / "with", [*fused, MONITOR], **MINED)
    assert history(runner, "loss") == history(without, "loss")
    assert set(runner.message_hub.log_scalars) >= SIX
    # avg='kept' and no weights: the loss is the mean over the kept pixels.
    assert history(runner, "ohem/decode_head/loss_kept") == pytest.approx(
        history(runner, "loss"), rel=1e-5
    )
    assert all(0 < share < 1 for share in history(runner, "ohem/decode_head/kept_share"))

    text = logs(tmp_path / "with")
    assert "OhemMonitorHook: decode_head (FCNHead): mines: keeps pixels" in text
    (line,) = (line for line in text.splitlines() if "Iter(train) [6/6]" in line)
    latest = runner.message_hub.get_info("train/ohem/decode_head")
    for what in SCALARS:  # the latest, not smoothed, the losses too
        assert f"ohem/decode_head/{what}: {latest[what]:.4f}" in line
    assert "kept_share_" not in line
    (scalars,) = (tmp_path / "with").rglob("scalars.json")
    rows = [json.loads(row) for row in scalars.read_text().splitlines()]
    sky = "ohem/decode_head/kept_share_sky"
    assert [row[sky] for row in rows if sky in row][-1] == latest["kept_share_sky"]


def test_default_interval_is_that_of_the_logger_and_resume_goes_on(tmp_path):
    allow_mmengine_checkpoints()
    options = {"default_hooks.logger.interval": 2, "default_hooks.checkpoint.interval": 4}
    first = train(tmp_path / "first", [MONITOR], **options, **{"train_cfg.max_iters": 4})
    seen = history(first, "ohem/decode_head/kept_share")
    assert len(seen) == 2
    checkpoint = str(tmp_path / "first" / "iter_4.pth")
    second = train(tmp_path / "second", [MONITOR], resume=True, load_from=checkpoint, **options)
    assert history(second, "ohem/decode_head/kept_share")[:2] == seen
    assert len(history(second, "ohem/decode_head/kept_share")) == 3


def test_with_the_schedule_it_shows_the_settings_in_effect(tmp_path):
    schedule = {"type": "OhemScheduleHook", "thresh": {"type": "constant", "value": 0.05}}
    runner = train(tmp_path / "both", [MONITOR, schedule], **{"train_cfg.max_iters": 2})
    assert "has a probability below 0.05" in logs(tmp_path)
    assert max(history(runner, "ohem/decode_head/hard_share")) < 0.1


def test_tensorboard_shows_the_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    backends = [{"type": "TensorboardVisBackend"}]
    runner = train(tmp_path / "tb", [MONITOR], **MINED, **{"visualizer.vis_backends": backends})
    (events,) = (tmp_path / "tb").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events))
    board.Reload()
    for what in SCALARS:
        points = board.Scalars(f"ohem/decode_head/{what}")
        assert [point.step for point in points] == [1, 2, 3, 4, 5, 6]
        assert [point.value for point in points] == pytest.approx(
            history(runner, f"ohem/decode_head/{what}")
        )
    latest = runner.message_hub.get_info("train/ohem/decode_head")
    last = board.Scalars("ohem/decode_head/kept_share_sky")[-1]
    assert (last.step, last.value) == (6, pytest.approx(latest["kept_share_sky"]))
