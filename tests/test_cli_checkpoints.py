"""Checkpoints: what cannot be read or does not fit is said in a sentence."""

from pathlib import Path

import pytest
import torch
from tooling import OHEM, SMALL_TEST, one_sentence
from torch import nn

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.model import BaseTTAModel

from ohem_mm import cli
from ohem_mm.cli import checkpoints

pytestmark = pytest.mark.usefixtures("elsewhere")


class Net(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.auxiliary_head = nn.Conv2d(width, 1, 1)
        self.register_buffer("index", torch.zeros(1))

    def test_step(self, data):
        return data


class Flips(BaseTTAModel):
    def merge_preds(self, data_samples_list):
        return data_samples_list


def save(path, state=None, **meta):
    Path(path).parent.mkdir(exist_ok=True, parents=True)
    state = Net().state_dict() if state is None else state
    torch.save({"state_dict": state, "meta": meta}, path)
    return str(path)


# --- what cannot be read ---------------------------------------------------------------------


def test_files_that_are_no_checkpoints():
    whole = Path(save("whole.pth")).read_bytes()
    Path("empty.pth").touch()
    Path("torn.pth").write_bytes(whole[: len(whole) // 2])
    Path("garbage.pth").write_bytes(b"\x00\x01garbage" * 100)
    Path("text.pth").write_text("hello")
    torch.save([1, 2], "list.pth")
    for name, message in (
        ("none", "there is no checkpoint 'none.pth'"),
        ("empty", "the checkpoint 'empty.pth' is empty"),
        ("torn", "the checkpoint 'torn.pth' cannot be read: it is cut off, or no checkpoint"),
        ("garbage", "the checkpoint 'garbage.pth' cannot be read"),
        ("text", "the checkpoint 'text.pth' cannot be read"),
        ("list", "'list.pth' is no checkpoint: it holds a list"),
    ):
        with pytest.raises(cli.UserError, match=f"^{message}") as caught:
            checkpoints.read(f"{name}.pth")
        assert "\n" not in str(caught.value)
    assert set(checkpoints.read("whole.pth")) == {"state_dict", "meta"}


# --- what does not fit -----------------------------------------------------------------------


def test_weights_are_loaded():
    source = Net()
    file = save("a.pth", source.state_dict())
    wrapped = save("b.pth", {f"module.{key}": v for key, v in source.state_dict().items()})
    bare = Path("c.pth")
    torch.save(source.state_dict(), bare)
    for name in (file, wrapped, str(bare)):
        for outer in (lambda net: net, nn.DataParallel, Flips):
            net = Net()
            checkpoints.load_weights(outer(net), name)
            torch.testing.assert_close(net.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("drop", "to_train", "message"),
    [
        ("backbone.0.weight", False, "it has no backbone.0.weight"),
        ("backbone.1.running_var", False, "it has no backbone.1.running_var"),
        ("auxiliary_head.weight", True, "it has no auxiliary_head.weight"),
        # Not needed to test, or the same in every model.
        ("auxiliary_head.weight", False, None),
        ("backbone.1.num_batches_tracked", True, None),
        ("index", True, None),
    ],
)
def test_weights_that_are_missing(drop, to_train, message):
    state = Net().state_dict()
    del state[drop]
    file = save("x.pth", state)
    if message is None:
        checkpoints.load_weights(Net(), file, to_train=to_train)
        return
    with pytest.raises(cli.UserError) as caught:
        checkpoints.load_weights(Net(), file, to_train=to_train)
    assert str(caught.value) == f"the checkpoint 'x.pth' does not fit the model: {message}"


def test_weights_of_another_shape_and_left_over_ones():
    file = save("x.pth", Net(width=5).state_dict())
    with pytest.raises(cli.UserError, match=r"size mismatch for backbone.0.weight.*, and \d more"):
        checkpoints.load_weights(Net(), file)
    file = save("y.pth", {**Net().state_dict(), "more": torch.zeros(1)})
    checkpoints.load_weights(Net(), file)
    with pytest.raises(cli.UserError, match="does not fit the model: the model has no more$"):
        checkpoints.load_weights(Net(), file, to_train=True)


# --- where training goes on ------------------------------------------------------------------


def mark(text, folder="w"):
    Path(folder).mkdir(exist_ok=True)
    Path(folder, "last_checkpoint").write_text(str(text))


def test_where_to_go_on(capsys):
    assert checkpoints.find_resume("w") is None
    first, second = save("w/iter_90.pth"), save("w/iter_100.pth")
    assert checkpoints.numbered(Path("w")) == [Path(second), Path(first)]
    mark(first)
    assert checkpoints.find_resume("w") == first
    assert capsys.readouterr().err == ""

    # The work dir was moved: the marker has the old path.
    mark("/nowhere/w/iter_90.pth")
    assert checkpoints.find_resume("w") == first
    assert capsys.readouterr().err == ""

    # A kill left the marker empty, or the checkpoint that it names cut off.
    mark("")
    assert checkpoints.find_resume("w") == second
    assert "last_checkpoint is empty; going on from w/iter_100.pth" in capsys.readouterr().err
    mark(second)
    Path(second).write_bytes(Path(second).read_bytes()[:1000])
    assert checkpoints.find_resume("w") == first
    assert "names 'w/iter_100.pth', which is not whole; going on" in capsys.readouterr().err
    mark("s3://bucket/iter_5.pth")
    assert checkpoints.find_resume("w") == "s3://bucket/iter_5.pth"


def test_nowhere_to_go_on():
    mark("")
    assert checkpoints.find_resume("w") is None
    mark("gone.pth")
    with pytest.raises(cli.UserError, match="there is no checkpoint 'gone.pth'"):
        checkpoints.find_resume("w")
    mark("/old/iter_3.pth")
    Path("w/iter_3.pth").write_text("half")
    with pytest.raises(cli.UserError, match=r"'w/iter_3.pth' cannot be read"):
        checkpoints.find_resume("w")


def test_resuming(capsys):
    cfg = Config({"train_cfg": {"max_iters": 10}})
    checkpoints.check_resume(cfg, Net(), save("x.pth", iter=9, epoch=0))
    assert capsys.readouterr().err == ""
    checkpoints.check_resume(cfg, Net(), save("x.pth", iter=10, epoch=0))
    assert "x.pth is at iter 10 of 10, so nothing is left to train; to go on, raise" in (
        capsys.readouterr().err
    )
    epochs = Config({"train_cfg": {"max_epochs": 2}})
    checkpoints.check_resume(epochs, Net(), save("x.pth", iter=10, epoch=2))
    assert "epoch 2 of 2" in capsys.readouterr().err
    with pytest.raises(cli.UserError, match="holds weights alone"):
        checkpoints.check_resume(cfg, Net(), save("x.pth"))
    with pytest.raises(cli.UserError, match="does not fit the model"):
        checkpoints.check_resume(cfg, Net(width=3), save("x.pth", iter=9, epoch=0))


# --- through the tools -------------------------------------------------------------------------


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


def test_latest_checkpoint_is_a_whole_one(tmp_path):
    assert checkpoints.numbered(tmp_path) == []
    for step in (90, 100, 110):
        torch.save({"x": torch.zeros(1000)}, f"iter_{step}.pth")
    content = Path("iter_110.pth").read_bytes()
    Path("iter_110.pth").write_bytes(content[: len(content) // 2])
    torch.save({}, "best_mIoU_iter_300.pth")
    assert checkpoints.numbered(tmp_path)[0].name == "iter_100.pth"
