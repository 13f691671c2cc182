"""What the tests of the tools share: shipped configs, and ways to load a config and run a tool."""

import argparse
import os
import socket
import subprocess
import sys

import pytest

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

from ohem_mm import cli

CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OHEM = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
CHASE = "chase_db1/unet-s5-d16_fcn_4xb4-ohem-40k_chase-db1-128x128"
DDRNET = "ddrnet/ddrnet_23-slim_in1k-pre_2xb6-ohem-120k_cityscapes-1024x1024"
SHORT = ["train_cfg.val_interval=1000", "default_hooks.logger.interval=1"]
SMALL_TEST = ["test_dataloader.dataset.num_scenes=10"]


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


def environment(**extra):
    """For a process of its own, on one core and without a GPU."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}


def run_tool(name, *arguments):
    """Run a tool as a process; return all that it printed."""
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
    """Run a launcher on a free port; return all that its ranks printed."""
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


def roots(cfg):
    """The ``data_root`` of each data set of a config."""
    return [node["data_root"] for path, node in cli.iter_dicts(cfg) if path and "data_root" in node]
