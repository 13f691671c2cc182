"""docs/recipes.md: each recipe runs as it stands, and trains on the loss that it says it does.

A recipe whose library is not installed is skipped; ``nox -s recipes`` installs them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from ohem_mm import OhemCrossEntropyLoss, ohem_cross_entropy

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(
    re.findall(r"<!-- recipe: (\w+) -->\n```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
)


LABELS = {"background": 0, "organ": 1, "tumour": 2}  # nnU-Net's way to name them


def recipe(name):
    """The text of a recipe; skips the test where its library is missing, and may be."""
    if not os.environ.get("OHEM_MM_REQUIRE"):
        pytest.importorskip(name)
    return RECIPES[name]


@pytest.fixture
def calls(monkeypatch):
    """What the loss is called with while a recipe runs: logits, labels and the loss."""
    seen = []
    forward = OhemCrossEntropyLoss.forward

    def record(self, pred, target, *args, **kwargs):
        loss = forward(self, pred, target, *args, **kwargs)
        seen.append((self, pred, target, loss.detach()))
        return loss

    monkeypatch.setattr(OhemCrossEntropyLoss, "forward", record)
    return seen


def run(name, tmp_path, monkeypatch):
    text = recipe(name)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": name}
    exec(compile(text, f"docs/recipes.md: {name}", "exec"), names)
    return names


def test_recipes_are_short_and_all_tested():
    assert set(RECIPES) == {
        *("transformers", "segmentation_models_pytorch", "lightning", "nnunetv2", "monai"),
        "accelerate",
    }
    for name, text in RECIPES.items():
        assert len(text.strip().splitlines()) <= 30, name


def test_transformers(tmp_path, monkeypatch, calls):
    names = run("transformers", tmp_path, monkeypatch)
    assert len(calls) == 4  # two steps of two batches
    for _, logits, labels, _ in calls:
        assert logits.shape == (2, 5, 16, 16)
        assert labels.shape == (2, 64, 64)
    (logged,) = (x["train_loss"] for x in names["trainer"].state.log_history if "train_loss" in x)
    # What Trainer logs is the mean over the batches of a step, so nothing is scaled by hand twice.
    assert logged == pytest.approx(sum(float(loss) for *_, loss in calls) / 4, rel=1e-4)


def test_transformers_gradient_is_the_mean_over_the_accumulated_batches(tmp_path, monkeypatch):
    text = recipe("transformers").replace("max_steps=2,", "max_steps=1, max_grad_norm=0.0,")
    text = text.replace("model = S", "SegformerConfig = quiet(SegformerConfig)\nmodel = S")
    text, order = text.replace("trainer.train()", "").rstrip(), []
    assert "train()" not in text
    monkeypatch.chdir(tmp_path)

    def quiet(config):
        dropout = ("hidden_dropout_prob", "classifier_dropout_prob", "drop_path_rate")
        return lambda **kwargs: config(**kwargs, **dict.fromkeys(dropout, 0.0))

    names = {"__name__": "transformers_recipe", "quiet": quiet}
    exec(text, names)
    trainer, model = names["trainer"], names["model"]
    grads = {}

    def collate(samples):
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        order.append(batch)
        return batch

    def on_step(optimizer, args, kwargs):
        grads.update({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})

    trainer.data_collator = collate
    # BatchNorm in the decode head would see what it saw before; its output does not depend on that.
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(on_step)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer.train()
    model.load_state_dict(before)
    model.zero_grad()
    model.train()
    assert len(order) >= 2
    for batch in order[:2]:
        logits = model(pixel_values=batch["pixel_values"]).logits
        (ohem_cross_entropy(logits, batch["labels"]) / 2).backward()
    assert grads
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(grads[key], parameter.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_segmentation_models_pytorch(tmp_path, monkeypatch, calls):
    names = run("segmentation_models_pytorch", tmp_path, monkeypatch)
    import segmentation_models_pytorch as smp

    assert [logits.shape[-1] for _, logits, *_ in calls] == [16, 16, 16, 64]
    assert calls[2][3] < calls[0][3]
    # The loss of the small logits is the loss of smp's own, upsampled ones.
    whole = smp.FPN("resnet18", encoder_weights=None, classes=5)
    whole.load_state_dict(names["model"].state_dict())
    whole.eval()
    with torch.no_grad():
        small, full = names["model"](names["images"]), whole(names["images"])
    assert full.shape[-2:] == names["labels"].shape[-2:]
    expected = ohem_cross_entropy(full, names["labels"])
    torch.testing.assert_close(names["criterion"](small, names["labels"]), expected)


def test_lightning_two_processes_are_one(tmp_path):
    text = recipe("lightning") + (
        "    import os\n"
        "    torch.save((data, model.state_dict(), trainer.callback_metrics['loss']),\n"
        "               f\"{os.environ.get('LOCAL_RANK', 0)}.pt\")\n"
    )
    (tmp_path / "recipe.py").write_text(text, encoding="utf-8")
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "recipe.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    data, trained, logged = torch.load(tmp_path / "0.pt", weights_only=False)
    _, other, _ = torch.load(tmp_path / "1.pt", weights_only=False)
    # One process, the same weights, and the batches of both put together.
    names = {"__name__": "recipe"}
    exec(text, names)
    names["L"].seed_everything(0)
    for _ in range(8):  # the data are drawn before the weights
        torch.randn(3, 32, 32), torch.randint(0, 5, (32, 32))
    model = names["Segmenter"]()
    optimizer = model.configure_optimizers()
    # Lightning shuffles by its seed; each rank takes every other image.
    order = [list(DistributedSampler(data, 2, rank, seed=0)) for rank in range(2)]
    for first in (0, 2):
        batch = [data[i] for rank in order for i in rank[first : first + 2]]
        images = torch.stack([image for image, _ in batch])
        labels = torch.stack([label for _, label in batch])
        loss = ohem_cross_entropy(model.net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(logged, loss.detach())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(trained[key], other[key])


@pytest.mark.parametrize("ignore", [False, True])
def test_nnunet(tmp_path, monkeypatch, ignore, calls):
    text = recipe("nnunetv2")
    from batchgenerators.utilities.file_and_folder_operations import maybe_mkdir_p

    for name in ("raw", "preprocessed", "results", "extTrainer"):
        maybe_mkdir_p(str(tmp_path / name))
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_compile", "f")
    (tmp_path / "extTrainer" / "ohem_trainer.py").write_text(text, encoding="utf-8")
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    folder = tmp_path / "preprocessed" / "Dataset001_Toy" / "toy_3d"
    folder.mkdir(parents=True)
    (folder / "case.b2nd").touch()  # tells the format of the data; none are read here
    trainer = recursive_find_trainer_class_by_name("nnUNetTrainerOhem")(
        plans(),
        "3d_fullres",
        0,
        {
            "channel_names": {"0": "CT"},
            "labels": {**LABELS, "ignore": 3} if ignore else LABELS,
            "numTraining": 1,
            "file_ending": ".nii.gz",
        },
        torch.device("cpu"),
    )
    trainer.initialize()
    generator = torch.Generator().manual_seed(0)
    sizes = (16, 8, 4)
    labels = [torch.randint(0, 3 + ignore, (2, 1, s, s, s), generator=generator) for s in sizes]
    batch = {
        "data": torch.randn(2, 1, 16, 16, 16, generator=generator),
        "target": [label.float() for label in labels],
    }
    losses = [float(trainer.train_step(batch)["loss"]) for _ in range(3)]
    assert losses[-1] < losses[0]
    scales = len(trainer._get_deep_supervision_scales())
    assert len(calls) == 3 * (scales - 1)  # nnU-Net gives the coarsest output no weight
    for loss, logits, target, value in calls:
        assert logits.dim() == 5
        assert logits.shape[1] == 3
        expected = ohem_cross_entropy(
            logits.detach(), target, ignore_index=3 if ignore else -100, min_kept=loss.min_kept
        )
        torch.testing.assert_close(value, expected)


def plans():
    """Plans as nnU-Net's planner writes them, of a network of three stages."""
    base = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    configuration = {
        "data_identifier": "toy_3d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": base,
            "arch_kwargs": {
                "n_stages": 3,
                "features_per_stage": [4, 8, 16],
                "conv_op": "torch.nn.modules.conv.Conv3d",
                "kernel_sizes": [[3, 3, 3]] * 3,
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
                "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1],
                "conv_bias": True,
                "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
    }
    return {
        "dataset_name": "Dataset001_Toy",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "continue_training": False,
    }


def test_monai(tmp_path, monkeypatch, calls):
    run("monai", tmp_path, monkeypatch)
    from monai.data import MetaTensor

    assert len(calls) == 2
    for _, logits, target, value in calls:
        assert target.shape == (2, 1, 16, 16, 16)
        assert isinstance(target, MetaTensor)
        plain = ohem_cross_entropy(logits.detach().as_tensor(), target.as_tensor())
        torch.testing.assert_close(torch.as_tensor(value).as_subclass(torch.Tensor), plain)


def test_accelerate(tmp_path, monkeypatch, calls):
    names = run("accelerate", tmp_path, monkeypatch)
    first, last = calls[0][3], calls[-1][3]
    assert last < first
    assert isinstance(names["criterion"], OhemCrossEntropyLoss)
