"""How a tool ends, alone or among several, and how its runner is built."""

import argparse
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tooling import environment, one_sentence

pytest.importorskip("mmseg")

from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from ohem_mm import cli
from ohem_mm.cli import checks, configs, process

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize(
    ("launcher", "local_rank", "task", "waits"),
    [
        ("slurm", None, "1", True),
        ("slurm", None, "0", False),
        ("pytorch", "0", "1", False),  # torchrun inside a task of Slurm
        ("pytorch", "1", "0", True),
    ],
)
def test_the_first_rank_speaks_first(monkeypatch, launcher, local_rank, task, waits):
    monkeypatch.setenv("SLURM_LOCALID", task)
    monkeypatch.setenv("LOCAL_RANK", local_rank or "")  # and taken back at the end
    if not local_rank:
        monkeypatch.delenv("LOCAL_RANK")
    waited = []
    monkeypatch.setattr(process.time, "sleep", waited.append)
    args = argparse.Namespace(config="nowhere.py", launcher=launcher, local_rank=0)
    assert cli.run(lambda: cli.load_config(args)) == 2
    assert bool(waited) == waits


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_full_disk_ends_in_a_sentence(capsys):
    assert cli.run(lambda: Path("/dev/full").write_text("x")) == 2
    message = capsys.readouterr().err
    assert one_sentence(message)
    assert "the disk is full" in message
    with pytest.raises(FileNotFoundError):  # any other is not the user's
        cli.run(lambda: Path("nowhere/x").write_text("x"))


def test_launcher_without_torchrun(monkeypatch):
    for module in (checks, configs):
        monkeypatch.setattr(module, "get_device", lambda: "cpu")
    with pytest.raises(cli.UserError, match="needs torchrun"):
        cli.build_runner(Config(dict(launcher="pytorch")))
    with pytest.raises(cli.UserError, match="slurm needs GPUs"):
        cli.build_runner(Config(dict(launcher="slurm")))


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
