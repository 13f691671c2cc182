"""Configs are loaded, and do what the options say."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tooling import CE, CHASE, DDRNET, OHEM, load, one_sentence, roots

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.hooks import Hook

from ohem_mm import cli
from ohem_mm.cli import checks, configs

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_unknown_config(tool):
    code, message = tool("train", OHEM.replace("ohem", "ohm"))
    assert code == 2
    assert one_sentence(message)
    assert f"the nearest names are: {OHEM}" in message


def test_files_that_are_no_configs(tool):
    Path("README.md").write_text("# Hello")
    Path("broken.py").write_text("model = dict(")
    Path("typo.py").write_text("model = dict(a=b)")
    for name in ("README.md", "broken.py", "typo.py"):
        code, message = tool("train", name)
        assert code == 2
        assert one_sentence(message)
        assert f"{name} is no config: " in message


def test_the_tools_do_not_pass_on_what_mmseg_lacks():
    code = "import argparse; from ohem_mm import cli; "
    code += f"cli.load_config(argparse.Namespace(config={CE!r}, cfg_options={{}}, launcher='none', "
    code += "local_rank=0, work_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (
            "model.decode_hed.num_classes=3",
            "model has no 'decode_hed'; did you mean 'decode_head'?",
        ),
        ("optim_wraper.optimizer.lr=1", "the config has no 'optim_wraper'; did you mean"),
        ("work_dirs=x", "did you mean 'work_dir'?"),
        ("param_schedulers=x", "did you mean 'param_scheduler'?"),
        (
            "param_scheduler.2.begin=3",
            "param_scheduler is a list, so '2' must be an index from 0 to 1",
        ),
        ("param_scheduler.begin=3", "param_scheduler is a list, so 'begin' must be an index"),
        ("load_from.x=3", "load_from is None in the config and holds no 'x'"),
        ("data_root=/x", "changes nothing: no data set reads from disk"),
    ],
)
def test_option_that_does_not_fit_the_config(option, expected):
    with pytest.raises(cli.UserError) as caught:
        load(CE, option)
    assert expected in str(caught.value)


def test_new_keys_are_allowed_and_odd_ones_are_reported(capsys):
    cfg = load(CE, "find_unused_parameters=True", "model.decode_head.ignore_index=3", "a_b.c=1")
    assert cfg.find_unused_parameters is True
    assert cfg.model.decode_head.ignore_index == 3
    assert cfg.a_b.c == 1
    assert capsys.readouterr().err == (
        "warning: --cfg-options a_b.c: the config has no 'a_b'; it is added as a new key\n"
    )
    load(CE, "model.decode_head.loss_decode.class_weight=[1,2,3]")
    assert capsys.readouterr().err == ""
    load(CE, "train_cfg.max_iter=5")
    assert "has no 'max_iter'; it is added as a new key; did you mean 'max_iters'?" in (
        capsys.readouterr().err
    )


def test_lists_and_nested_options():
    cfg = load(CE, "param_scheduler.0.end=7", "model.backbone.strides=(2,1,1,1)")
    assert cfg.param_scheduler[0].end == 7
    assert cfg.model.backbone.strides == (2, 1, 1, 1)


def test_work_dir():
    assert load(OHEM).work_dir == f"work_dirs/{Path(OHEM).name}"
    Path("mine.py").write_text("work_dir = 'w'\n")
    assert load("mine.py").work_dir == "w"


@pytest.mark.parametrize("config", [CHASE, DDRNET])
def test_data_root_moves_the_data_sets_of_shipped_configs(config):
    assert len(set(roots(load(config)))) == 1
    cfg = load(config, "data_root=/elsewhere")
    assert set(roots(cfg)) == {"/elsewhere"}
    assert len(roots(cfg)) >= 3
    assert cfg.data_root == "/elsewhere"


def test_data_root_reaches_nested_data_sets_and_keeps_others():
    Path("mine.py").write_text(
        "data_root = 'a'\n"
        "train_dataloader = dict(dataset=dict(type='ConcatDataset', datasets=[\n"
        "    dict(type='RepeatDataset', times=2, dataset=dict(data_root=data_root)),\n"
        "    dict(data_root='other')]))\n"
        "val_dataloader = dict(dataset=dict(data_root=data_root))\n"
    )
    cfg = load("mine.py", "data_root=b", "val_dataloader.dataset.data_root=c")
    assert roots(cfg) == ["b", "other", "c"]


def test_data_root_without_one_at_the_top():
    Path("mine.py").write_text("val_dataloader = dict(dataset=dict(data_root='a'))\n")
    assert roots(load("mine.py", "data_root=b")) == ["b"]
    Path("two.py").write_text("x = dict(data_root='a')\ny = dict(data_root='b')\n")
    with pytest.raises(cli.UserError, match=r"changes nothing: the data sets lie in \['a', 'b'\]"):
        load("two.py", "data_root=c")


def test_two_checkpoints_are_kept():
    assert load(OHEM).default_hooks.checkpoint.max_keep_ckpts == 1
    for asked, kept in ((1, 2), (3, 3), (-1, -1)):
        cfg = load(OHEM, f"default_hooks.checkpoint.max_keep_ckpts={asked}")
        cli.keep_two_checkpoints(cfg)
        assert cfg.default_hooks.checkpoint.max_keep_ckpts == kept
    cli.keep_two_checkpoints(Config({"default_hooks": {"checkpoint": None}}))


def test_mixed_precision_and_channels_last_on_a_cpu(tool, monkeypatch):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: "cpu")
    seen = {}

    class Watch(Hook):
        def before_train_iter(self, runner, batch_idx, data_batch=None):
            weights = [w for w in runner.model.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1]
            seen["order"] = {w.is_contiguous(memory_format=torch.channels_last) for w in weights}
            seen["wrapper"] = type(runner.optim_wrapper).__name__
            seen["hooks"] = {type(hook).__name__ for hook in runner.hooks}
            layer = runner.model.decode_head.conv_seg
            # Validation follows, and is in float32.
            layer.register_forward_hook(
                lambda layer, _, logits: seen.update({f"training {layer.training}": logits.dtype})
            )

    build = cli.build_runner

    def build_and_watch(cfg):
        runner = build(cfg)
        runner.register_hook(Watch())
        return runner

    monkeypatch.setattr(cli, "build_runner", build_and_watch)
    options = ["train_cfg.max_iters=2", "train_cfg.val_interval=5", "train_dataloader.batch_size=2"]
    options += ["param_scheduler.1.end=60", "val_dataloader.dataset.num_scenes=2"]
    arguments = ("--amp", "--channels-last", "--work-dir", "work", "--cfg-options", *options)
    assert tool("train", OHEM, *arguments)[0] == 0
    assert seen["order"] == {True}
    assert seen["wrapper"] == "Bf16OptimWrapper"
    assert {"ChannelsLastHook", "FusedOhemHook"} <= seen["hooks"]
    assert seen["training True"] == torch.bfloat16
    assert seen["training False"] == torch.float32
    state = torch.load("work/iter_2.pth", weights_only=False)["state_dict"]
    assert {value.dtype for value in state.values()} <= {torch.float32, torch.int64}


def config(**wrapper):
    return Config({"optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}, **wrapper}})


@pytest.mark.parametrize(
    ("device", "before", "after"),
    [
        ("cpu", {}, {"type": "Bf16OptimWrapper"}),
        ("cpu", {"type": "OptimWrapper"}, {"type": "Bf16OptimWrapper"}),
        (
            "cpu",
            {"type": "AmpOptimWrapper", "dtype": "float16", "loss_scale": 512.0, "clip_grad": None},
            {"type": "Bf16OptimWrapper", "clip_grad": None},
        ),
        ("cuda", {}, {"type": "AmpOptimWrapper", "loss_scale": "dynamic"}),
        (
            "cuda",
            {"type": "OptimWrapper", "dtype": "bfloat16"},
            {"type": "AmpOptimWrapper", "dtype": "bfloat16", "loss_scale": "dynamic"},
        ),
    ],
)
def test_amp_on_each_device(monkeypatch, device, before, after):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: device)
    cfg = config(**before)
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.to_dict() == {"optimizer": {"type": "SGD", "lr": 0.1}, **after}
    cli.check_amp_device(cfg)


@pytest.mark.parametrize(
    ("device", "kind"),
    [("cuda", "AmpOptimWrapper"), ("cpu", "Bf16OptimWrapper"), ("cuda", "Bf16OptimWrapper")],
)
def test_amp_twice(monkeypatch, capsys, device, kind):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: device)
    cfg = config(type=kind)
    cli.use_amp(cfg)
    assert cfg.optim_wrapper.type == kind
    assert "trains in mixed precision already" in capsys.readouterr().err


def test_amp_with_a_wrapper_of_another_kind():
    cfg = config(type="ApexOptimWrapper")
    with pytest.raises(cli.UserError, match="--amp works .* the config has ApexOptimWrapper"):
        cli.use_amp(cfg)
    with pytest.raises(cli.UserError, match="bf16 works .* the config has ApexOptimWrapper"):
        cli.use_bf16(cfg)


def test_the_hook_is_added_once_and_beside_others():
    cfg = config()
    cli.use_channels_last(cfg)
    assert cfg.custom_hooks == [{"type": "ChannelsLastHook"}]
    cli.use_channels_last(cfg)
    assert len(cfg.custom_hooks) == 1
    cfg = Config({"custom_hooks": [{"type": "FusedOhemHook"}]})
    cli.use_channels_last(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ["FusedOhemHook", "ChannelsLastHook"]
