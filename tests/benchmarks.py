"""Benchmark files and records that the tests of ``ohem_mm.bench`` share."""

import argparse
from pathlib import Path

import pytest

from ohem_mm.config import config_path

pytest.importorskip("mmseg")

from ohem_mm.bench import files, report
from ohem_mm.bench.plan import Plan
from ohem_mm.bench.results import select

ROOT = Path(__file__).parents[1]
TOOL = config_path("tools/benchmark_miou.py")
CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OURS = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"


def write_yaml(text, name="bench.yaml"):
    """Write a benchmark file; return its name."""
    Path(name).write_text(text)
    return name


BENCH = """
name: tiny
title: Tiny | small
note: >
  Two
  lines.
seeds: [0, 1, 2]
baseline: ce
variants:
  ce: {label: plain CE, config: a}
  ours: {label: "ours|x", config: b, cfg_options: {optim_wrapper.optimizer.lr: 1e-3}}
"""
GRID = """
name: grid
seeds: [0]
baseline: t=0.5,k=0.0156,avg=kept
grid:
  config: a
  cfg_options: {x: 1}
  axes:
    t: {key: loss.thresh, values: [0.5, 0.7]}
    k: {key: [loss.min_kept, other.min_kept], values: [0.015625, 0.25], labels: [1/64, 1/4]}
    avg: {key: loss.avg, values: [kept, all]}
"""
COMPARED = """
name: crossed
seeds: [0, 1]
baseline: ce
variants:
  ce: {label: plain CE, config: a, cfg_options: {y: 1}}
  ours: {config: b}
grid:
  cfg_options: {x: 1}
  axes:
    rare: {key: [train.rare, test.rare], values: [100, 25], labels: [all, a quarter]}
    length: {key: iters, values: [300, 900]}
"""
SMALL = f"""
name: small
seeds: [0, 1]
threads: 1
baseline: ce
cfg_options:
  train_cfg: {{max_iters: 60, val_interval: 30}}
  param_scheduler.1.end: 60
  default_hooks.checkpoint.interval: 5
  model.data_preprocessor.size: [48, 48]
  train_dataloader: {{batch_size: 2, dataset: {{num_scenes: 20, size: [48, 48]}}}}
  val_dataloader.dataset: {{num_scenes: 2, size: [48, 48]}}
  test_dataloader.dataset: {{num_scenes: 3, size: [48, 48]}}
variants:
  ce: {{config: {CE}}}
  ours: {{config: {OURS}}}
"""
CLASSES = ["road", "a|b", "pole"]
SHARES = [0.9, 0.09, 0.01]


def fake(variant, seed, iou, name="tiny", **changes):
    """A record of a run with these IoU of three classes."""
    return {
        "benchmark": name,
        "variant": variant,
        "seed": seed,
        "config_hash": "h",
        "cfg_options": {},
        "jobs": 2,
        "threads": 1,
        "processes": 1,
        "class_shares": SHARES,
        "commit": "0123456789",
        "dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "iterations": 600,
        "train_seconds": 60.0,
        "test_seconds": 5.0,
        "peak_memory_mib": 500.0 + seed,
        "metrics": {"aAcc": 90.0, "mIoU": sum(iou) / 3, "mDice": 50.0},
        "classes": CLASSES,
        "IoU": iou,
        "Dice": iou,
        "kept_share": {"decode_head": 0.25} if variant == "ours" else None,
        "curve": [[300, 40.0], [600, 41.0 + seed]],
        "weights": f"w{seed}",
        "order": f"o{seed}",
        "batches": [f"b{seed}"],
        "resumed": [],
        **changes,
    }


def compared():
    """Differences of ours in the four cells, seed by seed: 4 and 6, 1 and 3, -1 and 1, none."""
    levels = {"100,length=300": 50, "100,length=900": 60, "25,length=300": 40, "25,length=900": 55}
    gains = {"100,length=300": (4, 6), "100,length=900": (1, 3), "25,length=300": (-1, 1)}
    for cell, level in levels.items():
        for seed in (0, 1):
            plain = [level + 10.0 * seed] * 3
            yield fake(f"ce,rare={cell}", seed, plain, name="crossed", curve=[])
            if cell in gains:
                iou = [value + gains[cell][seed] for value in plain]
                yield fake(f"ours,rare={cell}", seed, iou, name="crossed", curve=[])


def tiny_report(records):
    """The report of the benchmark of BENCH."""
    bench = files.load_benchmark(write_yaml(BENCH))
    return report.markdown(select(bench, records))


def tiny_records():
    """Of the benchmark of BENCH: two variants, three seeds each."""
    plain = [[90.0, 50.0, 10.0], [91.0, 50.0, 12.0], [92.0, 50.0, 14.0]]
    ours = [[90.0, 50.0, 13.0], [91.0, 50.0, 18.0], [92.0, 50.0, 17.0]]
    rows = [fake("ce", seed, iou) for seed, iou in enumerate(plain)]
    return rows + [fake("ours", seed, iou) for seed, iou in enumerate(ours)]


# --- a benchmark that tunes -----------------------------------------------------------------------


LR = "optim_wrapper.optimizer.lr"
TUNED = f"""
name: tuned
seeds: [0, 1, 2]
threads: 1
baseline: ce
tune: {{key: {LR}, values: [0.001, 0.01, 0.1]}}
cfg_options:
  train_cfg: {{max_iters: 8, val_interval: 8}}
  param_scheduler.0.end: 2
  param_scheduler.1: {{begin: 2, end: 8}}
  default_hooks.checkpoint.interval: 1
  model.data_preprocessor.size: [48, 48]
  train_dataloader:
    batch_size: 2
    num_workers: 0
    persistent_workers: false
    dataset: {{num_scenes: 8, size: [48, 48]}}
  val_dataloader: &two
    {{num_workers: 0, persistent_workers: false, dataset: {{num_scenes: 2, size: [48, 48]}}}}
  test_dataloader: *two
variants:
  ce: {{label: plain CE, config: {CE}}}
  ours: {{label: ohem, config: {OURS}}}
  weak: {{label: weak, config: {OURS}, cfg_options: {{model.decode_head.loss_decode.avg: all}}}}
"""
# (variant, lr, seed): val and test mIoU. On test, lr 0.1 would be the best for all.
SCORES = {
    ("ce", 0.001, 0): (50, 50),
    ("ce", 0.01, 0): (60, 59),
    ("ce", 0.1, 0): (55, 70),
    ("ours", 0.001, 0): (61, 60),
    ("ours", 0.01, 0): (58, 61),
    ("ours", 0.1, 0): (50, 71),
    ("weak", 0.001, 0): (40, 40),
    ("weak", 0.01, 0): (57, 58),
    ("weak", 0.1, 0): (58, 72),
    ("ce", 0.01, 1): (61, 60),
    ("ce", 0.01, 2): (62, 61),
    ("ours", 0.001, 1): (62, 62),
    ("ours", 0.001, 2): (60, 61),
}


def tuned(*changes, text=TUNED):
    """The benchmark of TUNED, with some of its text replaced."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("tuned.yaml").write_text(text)
    return files.load_benchmark("tuned.yaml")


def arguments(**changes):
    """Options of ``benchmark_miou.py run``."""
    settings = {"variants": None, "seeds": None, "cfg_options": {}, "data_root": None}
    settings |= {"jobs": 1, "threads": 1, "launcher": "none", "gpus": 1, "at": None}
    settings |= {"work_dir": None, "keep_checkpoints": False, "metric": "mIoU", "partition": None}
    return argparse.Namespace(**{**settings, **changes})


def written(start, val, test):
    """What a job with these scores would write."""
    return {
        **start,
        "class_shares": [0.9, 0.09, 0.01],
        "counted": start.get("class_shares"),
        "commit": "0123456789",
        "dirty": False,
        "versions": {"torch": "2.13.0"},
        "hardware": {"cpu": "A CPU", "cores": 2, "gpu": None},
        "iterations": 8,
        "train_seconds": 60.0,
        "test_seconds": 5.0,
        "peak_memory_mib": 500.0,
        "metrics": {"aAcc": 90.0, "mIoU": float(test), "mDice": 50.0},
        "classes": ["road", "sky", "pole"],
        "IoU": [90.0, 50.0, test - 20.0],
        "Dice": [90.0, 50.0, 20.0],
        "kept_share": None,
        "curve": [[4, 99.0], [8, float(val)]],
        "weights": "w",
        "order": "o",
        "batches": ["b"],
        "resumed": [],
    }


def place(job_record):
    """Where a record has its place among SCORES."""
    return job_record["variant"], job_record["tuned"], job_record["seed"]


def all_records(benchmark):
    """The records of all jobs in SCORES, as the plan names them."""
    plan = Plan(benchmark, arguments(), Path("work"))
    return [written(plan.job(*where).record, *scores) for where, scores in SCORES.items()]


TUNING = [(name, lr, 0) for name in ("ce", "ours", "weak") for lr in (0.001, 0.01, 0.1)]
LATER = [("ce", 0.01, 1), ("ours", 0.001, 1), ("ce", 0.01, 2), ("ours", 0.001, 2)]
