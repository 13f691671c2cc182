"""Configs of the variants: what reaches them, and what their hashes see."""

import argparse
from pathlib import Path

import pytest
from benchmarks import LR, SMALL, arguments, tuned, write_yaml

pytest.importorskip("mmseg")

from ohem_mm.bench import files
from ohem_mm.bench.plan import Plan

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_config_hash_sees_settings_but_not_places():
    write_yaml(SMALL, "small.yaml")
    bench = files.load_benchmark("small.yaml")

    def hashes(**changes):
        settings = {"variants": None, "seeds": None, "cfg_options": {}, "data_root": None}
        settings |= {"jobs": 1, "threads": 1, "launcher": "none", "gpus": 1, "at": None}
        args = argparse.Namespace(**{**settings, **changes})
        jobs = Plan(bench, args, Path("work")).due([])
        return {job.record["variant"]: job.record["config_hash"] for job in jobs}

    first = hashes()
    assert first["ce"] != first["ours"]
    assert hashes(seeds=[7], jobs=4, launcher="pytorch", gpus=2) == first
    changed = hashes(cfg_options={"optim_wrapper.optimizer.lr": 0.5})
    assert not set(changed.values()) & set(first.values())


def test_values_and_scales_reach_the_config():
    plan = Plan(tuned(), arguments(), Path("work"))
    lrs = [plan.job("ce", value, 0).cfg.optim_wrapper.optimizer.lr for value in (0.001, 0.1)]
    assert lrs == [0.001, 0.1]
    own = plan.job("ce", 0.001, 0).cfg.optim_wrapper.optimizer.weight_decay
    hashes = {plan.job("ce", value, 0).record["config_hash"] for value in (0.001, 0.01, 0.1)}
    assert len(hashes) == 3
    changes = [
        (f"key: {LR}, values", f"key: [{LR}, optim_wrapper.optimizer.weight_decay], scales"),
        ("[0.001, 0.01, 0.1]", "[1, 10]"),
        ("avg: all", f"avg: all, {LR}: 0.5"),
    ]
    plan = Plan(tuned(*changes), arguments(), Path("work"))
    optimizer = plan.job("weak", 10, 0).cfg.optim_wrapper.optimizer
    assert optimizer.lr == 5
    assert optimizer.weight_decay == pytest.approx(10 * own)


def test_switches_of_a_benchmark_file():
    changed = tuned(("threads: 1", "threads: 1\namp: true\nchannels_last: true"))
    cfg = Plan(changed, arguments(), Path("work")).job("ours", 0.01, 0).cfg
    assert cfg.optim_wrapper.type == "Bf16OptimWrapper"
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ["FusedOhemHook", "ChannelsLastHook", "OhemMonitorHook"]
    plain = Plan(tuned(), arguments(), Path("work"))
    assert plain.job("ours", 0.01, 0).cfg.optim_wrapper.type == "OptimWrapper"
