"""All tools: their launchers, what they say without mmengine, and whole runs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tooling import CE, OHEM, SHORT, SMALL_TEST, environment, one_sentence, run_ranks, run_tool

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

pytestmark = pytest.mark.usefixtures("elsewhere")


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
