"""OhemVisualizationHook: what it draws while a model trains, and that nothing else changes."""

import io

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

import mmseg.models  # noqa: F401
from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.visualization import LocalVisBackend
from PIL import Image

from ohem_mm import ohem_cross_entropy
from ohem_mm.config import config_path
from ohem_mm.hooks import OhemVisualizationHook
from ohem_mm.visualization import MINED

OHEM = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"


def runner(tmp_path, base, hook, iterations=4, **more):
    config = Config.fromfile(config_path(base))
    for split in ("train", "val", "test"):
        loader = config[f"{split}_dataloader"]
        loader.num_workers, loader.persistent_workers, loader.batch_size = 0, False, 2
        loader.dataset.num_scenes = 4
    config.merge_from_dict(
        {
            "work_dir": str(tmp_path),
            "train_cfg.max_iters": iterations,
            "train_cfg.val_interval": iterations,
            "custom_hooks": [{"type": "FusedOhemHook"}, hook],
            "experiment_name": tmp_path.name,
            "visualizer.name": str(tmp_path),  # one of its own: instances are kept by name
            "default_hooks.checkpoint": None,
            **more,
        }
    )
    return Runner.from_cfg(config)


def pictures(tmp_path):
    return {file.name: file for file in tmp_path.rglob("ohem_*.png")}


def test_hook_draws_training_and_validation(tmp_path, monkeypatch):
    drawn = []
    add_image = LocalVisBackend.add_image

    def spy(self, name, image, step=0, **kwargs):
        drawn.append((name, step))
        add_image(self, name, image, step, **kwargs)

    monkeypatch.setattr(LocalVisBackend, "add_image", spy)
    built = runner(
        tmp_path, OHEM, {"type": "OhemVisualizationHook", "interval": 2, "num_images": 3}
    )
    loss = built.model.decode_head.loss_decode
    built.train()
    # A batch holds two images; validation goes on with the next batch.
    assert drawn == [
        *((f"ohem_train_{index}", step) for step in (2, 4) for index in range(2)),
        *((f"ohem_val_{index}", 4) for index in range(3)),
    ]
    assert set(pictures(tmp_path)) == {f"{name}_{step}.png" for name, step in drawn}
    assert not loss._forward_hooks
    assert not loss._forward_pre_hooks
    for file in pictures(tmp_path).values():
        assert (np.asarray(Image.open(file)) == MINED).all(2).sum() > 1000


@pytest.mark.parametrize("fused", [True, False])
def test_hook_shows_the_pixels_that_the_iteration_was_trained_on(tmp_path, monkeypatch, fused):
    seen, calls = [], []

    def remember(shot, names, colours, loss, note, show_data):
        seen.append(shot)
        return np.zeros((4, 4, 3), np.uint8)

    def listen(module, args, kwargs, out):
        calls.append((args[0].detach(), args[1]))

    monkeypatch.setattr("ohem_mm.visualization.board", remember)
    hooks = [{"type": "FusedOhemHook"}] if fused else []
    hook = {"type": "OhemVisualizationHook", "interval": 1}
    built = runner(tmp_path, OHEM, hook, 1, custom_hooks=[*hooks, hook], val_cfg=None,
                   val_dataloader=None, val_evaluator=None)  # fmt: skip
    built.model.decode_head.loss_decode.register_forward_hook(listen, with_kwargs=True)
    built.train()
    (logits, label), stats = calls[0], {"kept": None}
    assert (logits.shape[2:] != label.shape[-2:]) == fused
    ohem_cross_entropy(logits, label, stats=stats)
    assert len(seen) == 2
    for index, shot in enumerate(seen):
        np.testing.assert_array_equal(shot.kept, stats["kept"][index])
        np.testing.assert_array_equal(shot.label, label[index].squeeze())
        assert shot.image.shape == (96, 192, 3)
    assert seen[0].name != seen[1].name


def test_hook_changes_nothing_in_training(tmp_path):
    weights = []
    for hook in ({"type": "OhemVisualizationHook", "interval": 1}, {"type": "EMAHook"}):
        built = runner(tmp_path / hook["type"], OHEM, hook, 3)
        built.train()
        weights.append(built.model.decode_head.conv_seg.weight.detach())
    assert torch.equal(*weights)


def test_hook_without_our_loss_draws_validation_and_says_so(tmp_path, caplog):
    built = runner(tmp_path, CE, {"type": "OhemVisualizationHook", "interval": 1, "num_images": 1})
    built.train()
    assert set(pictures(tmp_path)) == {"ohem_val_0_4.png"}
    log = next(tmp_path.rglob("*.log")).read_text()
    assert log.count("no OhemCrossEntropyLoss in the model; training is not drawn") == 1
    assert "drawn as by OhemCrossEntropyLoss(thresh=0.7, min_kept=0.0625)" in log


def test_hook_draws_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    hook = {"type": "OhemVisualizationHook", "interval": 2, "num_images": 1}
    backends = [{"type": "TensorboardVisBackend"}]
    runner(tmp_path, OHEM, hook, 2, **{"visualizer.vis_backends": backends}).train()
    (events,) = tmp_path.rglob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    assert set(log.Tags()["images"]) == {"ohem_train_0", "ohem_val_0"}
    for tag in log.Tags()["images"]:
        (event,) = log.Images(tag)
        picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
        assert event.step == 2
        assert (picture == MINED).all(2).sum() > 1000


def test_hook_refuses_bad_settings():
    assert HOOKS.get("OhemVisualizationHook") is OhemVisualizationHook
    with pytest.raises(ValueError, match="interval must be an int >= 0, but got -1"):
        OhemVisualizationHook(interval=-1)
    with pytest.raises(ValueError, match="num_images must be an int >= 1, but got 0"):
        OhemVisualizationHook(num_images=0)
