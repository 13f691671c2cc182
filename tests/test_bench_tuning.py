"""Tuning in a benchmark: what is chosen, what is run in which order, and what the report says."""

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

from ohem_mm import cli
from ohem_mm.bench import files, jobs, plots, progress, report
from ohem_mm.bench.jobs import run_benchmark
from ohem_mm.bench.plan import Plan
from ohem_mm.bench.records import read_records
from ohem_mm.bench.results import select
from ohem_mm.bench.tuning import choose, drops
from ohem_mm.config import config_path
from ohem_mm.disk import write_json

TOOL = config_path("tools/benchmark_miou.py")
CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OURS = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"
LR = "optim_wrapper.optimizer.lr"

BENCH = f"""
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


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def bench(*changes, text=BENCH):
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    Path("tuned.yaml").write_text(text)
    return files.load_benchmark("tuned.yaml")


def arguments(**changes):
    settings = {"variants": None, "seeds": None, "cfg_options": {}, "data_root": None}
    settings |= {"jobs": 1, "threads": 1, "launcher": "none", "gpus": 1, "at": None}
    settings |= {"work_dir": None, "keep_checkpoints": False, "metric": "mIoU", "partition": None}
    return argparse.Namespace(**{**settings, **changes})


def record(start, val, test):
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
    return job_record["variant"], job_record["tuned"], job_record["seed"]


@pytest.fixture
def ran(monkeypatch):
    """Replace the process of a job by one that writes the record at once; list what was run."""
    started = []

    def start(job, slot, args):
        started.append(place(job.record))
        job.folder.mkdir(parents=True, exist_ok=True)
        scores = SCORES[started[-1]]
        failed = scores is None
        if not failed:
            write_json(job.folder / "record.json", record(job.record, *scores))
        job.log.write_text("a line\n")
        job.process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(failed)})"])

    monkeypatch.setattr(jobs, "_start", start)
    monkeypatch.setattr(jobs, "POLL", 0.01)
    return started


def all_records(benchmark):
    """The records of all jobs in SCORES, as the plan names them."""
    plan = Plan(benchmark, arguments(), Path("work"))
    return [record(plan.job(*where).record, *scores) for where, scores in SCORES.items()]


# --- benchmark files -------------------------------------------------------------------------


def test_tune_of_a_benchmark_file():
    tune = bench().tune
    assert (tune.keys, tune.name, tune.scale) == ((LR,), "lr", False)
    assert (tune.values, tune.seeds, tune.split) == ((0.001, 0.01, 0.1), (0,), "val")
    assert tune.drop_below == 1.5
    assert tune.label(0.01) == "lr 0.01"
    tune = bench(
        (f"key: {LR}", f"key: [{LR}, optim_wrapper.optimizer.weight_decay], name: steps"),
        ("values: [0.001, 0.01, 0.1]", "scales: [1, 3], seeds: [3, 4], drop_below: null"),
    ).tune
    assert (tune.name, tune.scale, tune.values, tune.seeds) == ("steps", True, (1, 3), (3, 4))
    assert tune.drop_below is None
    assert tune.label(3) == "steps x 3"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"key: {LR}, ", "", "tune lacks the key 'key'"),
        ("values:", "value:", "tune has an unknown key 'value'; did you mean 'values'?"),
        (", values: [0.001, 0.01, 0.1]", "", "tune needs either values"),
        ("0.1]}", "0.1], scales: [1, 2]}", "tune needs either values"),
        ("[0.001, 0.01, 0.1]", "[0.01]", "values is [0.01]; it must be a list of two numbers"),
        ("[0.001, 0.01, 0.1]", "[0.1, 0.01]", "values is [0.1, 0.01]; it must be a list"),
        ("[0.001, 0.01, 0.1]", "[0.1, big]", "values is [0.1, 'big']; it must be a list"),
        ("0.1]}", "0.1], seeds: [0, 0]}", "tune: seeds is [0, 0]"),
        ("0.1]}", "0.1], split: train}", "tune: split is 'train'; allowed are val, test"),
        ("0.1]}", "0.1], drop_below: -1}", "drop_below is -1; it must be 0 or more, or null"),
        (f"key: {LR}", "key: [1]", "key is [1]; it must be a key or a list of them"),
    ],
)
def test_mistakes_in_tune_are_named(old, new, message):
    with pytest.raises(cli.UserError, match=re.escape(message)):
        bench((old, new))


SAME = "{split: val, num_scenes: 2, size: [48, 48]}"


@pytest.mark.parametrize(
    ("changes", "given", "message"),
    [
        (
            [("avg: all", f"avg: all, {LR}: 0.1")],
            {},
            f"variant 'weak' .*cfg_options has {LR}, which tune sets",
        ),
        ([], {"cfg_options": {LR: 0.5}}, f"--cfg-options {LR}: tune sets this key"),
        ([(LR, "optim_wrapper.optimiser.lr")], {}, "optim"),
        (
            [(f"key: {LR}, values", "key: model.nothing, scales")],
            {},
            "tune: the config has no model.nothing to scale",
        ),
        (
            [(f"key: {LR}, values", "key: model.type, scales")],
            {},
            "model.type is 'EncoderDecoder' in the config; scales need a number",
        ),
        (
            [
                ("val_dataloader: &two", "test_dataloader: &two"),
                ("test_dataloader: *two", "val_dataloader: null"),
            ],
            {},
            "has no val_dataloader",
        ),
        (
            [("test_dataloader: *two", f"test_dataloader: {{dataset: {SAME}}}")],
            {},
            "have the same images; .* or say split: test in tune",
        ),
        ([], {"at": 0.5}, "--at 0.5: the values of tune are 0.001, 0.01, 0.1"),
    ],
)
def test_a_tune_that_does_not_fit_is_told_before_anything_runs(changes, given, message):
    with pytest.raises(cli.UserError, match=message):
        Plan(bench(*changes), arguments(**given), Path("work"))


def test_values_and_scales_reach_the_config():
    plan = Plan(bench(), arguments(), Path("work"))
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
    plan = Plan(bench(*changes), arguments(), Path("work"))
    optimizer = plan.job("weak", 10, 0).cfg.optim_wrapper.optimizer
    assert optimizer.lr == 5
    assert optimizer.weight_decay == pytest.approx(10 * own)


def test_switches_of_a_benchmark_file():
    changed = bench(("threads: 1", "threads: 1\namp: true\nchannels_last: true"))
    cfg = Plan(changed, arguments(), Path("work")).job("ours", 0.01, 0).cfg
    assert cfg.optim_wrapper.type == "Bf16OptimWrapper"
    hooks = [hook.type for hook in cfg.custom_hooks]
    assert hooks == ["FusedOhemHook", "ChannelsLastHook", "OhemMonitorHook"]
    plain = Plan(bench(), arguments(), Path("work"))
    assert plain.job("ours", 0.01, 0).cfg.optim_wrapper.type == "OptimWrapper"


# --- what is chosen --------------------------------------------------------------------------


def test_each_variant_has_its_own_best_on_val():
    benchmark = bench()
    choices = choose(benchmark, all_records(benchmark), benchmark.variants)
    assert {name: choice.best for name, choice in choices.items()} == {
        "ce": 0.01,
        "ours": 0.001,
        "weak": 0.1,
    }
    assert {name: choice.at_end for name, choice in choices.items()} == {
        "ce": False,
        "ours": True,
        "weak": True,
    }
    # 58 against 60; ours is ahead.
    assert drops(benchmark, choices) == {"weak": 2.0}
    for margin, dropped in ((2, {}), (1.9, {"weak": 2.0}), ("null", {})):
        changed = bench(("0.1]}", f"0.1], drop_below: {margin}}}"))
        assert drops(changed, choices) == dropped


def test_the_mean_over_the_tuning_seeds_decides():
    benchmark = bench(("0.1]}", "0.1], seeds: [0, 5]}"))
    runs = []
    for value, scores in ((0.001, (50, 60)), (0.01, (59, 50)), (0.1, (10, 99))):
        for seed, val in zip((0, 5), scores, strict=True):
            start = {"variant": "ce", "tuned": value, "seed": seed}
            runs.append(record(start, val, 0))
    (choice,) = choose(benchmark, runs[:-1], ["ce"]).values()
    # The last value lacks a seed, so nothing is final.
    assert (choice.best, choice.best_score, choice.finished) == (0.001, 55, False)
    assert choice.missing == ((0.1, 5),)
    (choice,) = choose(benchmark, [*runs[:-1], record(start, 30, 0)], ["ce"]).values()
    assert (choice.best, choice.finished) == (0.001, True)


def test_a_training_that_diverged_is_never_the_best():
    benchmark = bench()
    runs = [
        record({"variant": "ce", "tuned": value, "seed": 0}, val, 0)
        for value, val in ((0.001, float("nan")), (0.01, 30), (0.1, float("nan")))
    ]
    (choice,) = choose(benchmark, runs, ["ce"]).values()
    assert (choice.best, choice.best_score) == (0.01, 30)


def test_choosing_on_the_reported_split_is_possible_and_told():
    benchmark = bench(("0.1]}", "0.1], split: test}"))
    runs = all_records(benchmark)
    choices = choose(benchmark, runs, benchmark.variants)
    assert {choice.best for choice in choices.values()} == {0.1}
    text = report.markdown(select(benchmark, runs))
    assert "made on the images that are reported (test), so the scores are too high" in text


# --- what is run -----------------------------------------------------------------------------

TUNING = [(name, lr, 0) for name in ("ce", "ours", "weak") for lr in (0.001, 0.01, 0.1)]
LATER = [("ce", 0.01, 1), ("ours", 0.001, 1), ("ce", 0.01, 2), ("ours", 0.001, 2)]


def test_tuning_comes_first_and_a_dropped_variant_gets_no_seeds(ran, capsys):
    run_benchmark(bench(), arguments(), Path("tuned.jsonl"))
    assert ran == TUNING + LATER
    printed = capsys.readouterr().out
    assert "15 jobs, 0 of them finished before" in printed
    assert "ce: best at lr 0.01 (val mIoU 60.00)" in printed
    assert "ours: best at lr 0.001, the end of the range (val mIoU 61.00)" in printed
    assert "weak: 2.00 behind ce, no further seeds" in printed
    assert printed.count("weak: 2.00 behind") == 1
    run_benchmark(bench(), arguments(), Path("tuned.jsonl"))
    assert ran == TUNING + LATER
    printed = capsys.readouterr().out
    assert "13 jobs, 13 of them finished before" in printed
    assert "nothing is left to run" in printed
    assert sorted(map(place, read_records(Path("tuned.jsonl")))) == sorted(SCORES)


@pytest.mark.parametrize("finished", [0, 1, 4, 8, 9, 10, 12])
def test_a_stopped_benchmark_goes_on_without_repeating_a_run(ran, monkeypatch, finished):
    start = jobs._start

    def stop(job, slot, args):
        if len(ran) == finished:
            raise KeyboardInterrupt
        start(job, slot, args)

    monkeypatch.setattr(jobs, "_start", stop)
    with pytest.raises(SystemExit) as caught:
        run_benchmark(bench(), arguments(), Path("tuned.jsonl"))
    assert caught.value.code == 130
    monkeypatch.setattr(jobs, "_start", start)
    run_benchmark(bench(), arguments(), Path("tuned.jsonl"))
    assert ran == TUNING + LATER


def test_a_record_that_nobody_collected_counts(ran):
    # The tool was killed after the job had written its record.
    benchmark = bench()
    plan = Plan(benchmark, arguments(), Path("work_dirs/tuned"))
    for where in TUNING:
        job = plan.job(*where)
        job.folder.mkdir(parents=True)
        write_json(job.folder / "record.json", record(job.record, *SCORES[where]))
    run_benchmark(benchmark, arguments(), Path("tuned.jsonl"))
    assert ran == LATER
    assert len(read_records(Path("tuned.jsonl"))) == 13


def test_jobs_side_by_side_run_the_same(ran):
    run_benchmark(bench(), arguments(jobs=3), Path("tuned.jsonl"))
    assert sorted(ran) == sorted(TUNING + LATER)


def test_parts_of_a_benchmark(ran):
    records = Path("tuned.jsonl")
    # Without the baseline's tuning nothing can be dropped.
    run_benchmark(bench(), arguments(variants=["ours"], seeds=[0]), records)
    assert ran == TUNING[3:6]
    run_benchmark(bench(), arguments(variants=["ce"]), records)
    assert ran[3:] == [*TUNING[:3], LATER[0], LATER[2]]
    # Now it is known that this one is behind.
    run_benchmark(bench(), arguments(variants=["weak", "ours"]), records)
    assert ran[8:] == [*TUNING[6:], LATER[1], LATER[3]]


def test_one_shared_value(ran, monkeypatch):
    for name in ("ours", "weak"):
        for seed in (1, 2):
            monkeypatch.setitem(SCORES, (name, 0.01, seed), (50, 51))
    benchmark = bench()
    run_benchmark(benchmark, arguments(at=0.01), Path("tuned.jsonl"))
    assert ran == [(name, 0.01, seed) for seed in (0, 1, 2) for name in ("ce", "ours", "weak")]
    results = select(benchmark, read_records(Path("tuned.jsonl")), at=0.01)
    text = report.markdown(results)
    assert text.startswith("### tuned, all at lr 0.01\n\n**All variants share lr 0.01: ")
    assert "chosen by" not in text
    assert "run tuned.yaml --at 0.01`" in text
    assert "Not run yet" not in text
    assert plots._draw_tuning(results) is None


def test_a_failed_job_leaves_the_others(ran, monkeypatch, capsys):
    monkeypatch.setitem(SCORES, ("ours", 0.01, 0), None)
    with pytest.raises(SystemExit):
        run_benchmark(bench(), arguments(), Path("tuned.jsonl"))
    # Its tuning is not finished, so it gets no seeds.
    assert ran == [*TUNING, LATER[0], LATER[2]]
    assert "ours, lr 0.01, seed 0: exit status 1" in capsys.readouterr().err


def test_how_long_it_takes_is_told_from_the_work_of_this_session(monkeypatch, capsys):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    settings = {"speed_estimate_period": math.inf, "get_time": lambda: Clock.now}
    bars = Progress(console=Console(quiet=True), disable=True, **settings)
    display = progress.Display(bars, 4)
    job = jobs.Job("ce, seed 0", None, Path("work"), {}, state={"text": "train 4/8", "share": 0.5})
    job.first = 0.5  # where an earlier session stopped
    display.add(job)
    for now, share in ((10.0, 0.625), (30.0, 0.75)):
        Clock.now, job.state["share"] = now, share
        display.update([job], [])
    assert capsys.readouterr().out == ""  # not in the first minute
    # An eighth took 20 seconds, and 3.25 jobs are left.
    Clock.now, job.state["text"] = 70.0, "train 6/8"
    display.update([job], [])
    assert capsys.readouterr().out == "[1:10] ce, seed 0: train 6/8; about 8:40 left\n"
    job.state["share"] = 1.0
    display.update([], [])
    assert bars.tasks[0].fields["text"] == "1 of 4 finished"
    assert not bars.tasks[1].visible


GRID = """grid:
  axes:
    rare: {key: train_dataloader.dataset.rare, values: [100, 25]}
"""


def test_every_cell_of_a_grid_is_tuned_by_itself(ran, monkeypatch):
    # lr 0.1 is the best of all in the second cell, and "weak" is behind there alone.
    for (name, lr, seed), (val, test) in list(SCORES.items()):
        monkeypatch.setitem(
            SCORES, (f"{name},rare=100", lr, seed), (val + 3 * (name == "weak"), test)
        )
        best = {0.001: 10, 0.01: 20, 0.1: 30}[lr]
        monkeypatch.setitem(
            SCORES, (f"{name},rare=25", lr, seed), (best - 5 * (name == "weak"), test)
        )
    for where in (("ce", 0.1), ("ours", 0.1), ("weak", 0.1)):
        for seed in (1, 2):
            monkeypatch.setitem(SCORES, (f"{where[0]},rare=25", where[1], seed), (30, 50))
            monkeypatch.setitem(SCORES, (f"{where[0]},rare=100", where[1], seed), (30, 50))
    benchmark = bench(text=BENCH + GRID)
    run_benchmark(benchmark, arguments(), Path("tuned.jsonl"))
    assert [where[0] for where in ran[:18:3]] == [
        f"{name},rare={rare}" for rare in (100, 25) for name in ("ce", "ours", "weak")
    ]
    later = [("ce,rare=100", 0.01), ("ours,rare=100", 0.001), ("weak,rare=100", 0.1)]
    later += [("ce,rare=25", 0.1), ("ours,rare=25", 0.1)]
    assert ran[18:] == [(*where, seed) for seed in (1, 2) for where in later]
    records = read_records(Path("tuned.jsonl"))
    # The classes are counted in each of the data sets.
    shares = {run["variant"].partition(",")[2]: run["counted"] for run in records}
    assert sum(shares["rare=25"][6:]) < 0.7 * sum(shares["rare=100"][6:])
    text = report.markdown(select(benchmark, records))
    assert "mIoU, ohem minus plain CE:" in text
    assert (
        "No further seeds for weak, rare 25: at its best it lies 5.00 points behind plain CE, "
        in text
    )


# --- the report ------------------------------------------------------------------------------


def test_report_of_a_tuned_benchmark():
    benchmark = bench()
    runs = all_records(benchmark)
    text = report.markdown(select(benchmark, runs))
    table = text.split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    header, _, plain, ours, weak = cells
    assert header[:6] == ["variant", "lr", "seeds", "mIoU", "vs plain CE", "least"]
    assert plain[:6] == ["plain CE", "0.01", "3", "60.00 ± 1.00", "", ""]
    # Differences 1, 2, 0: t(0.975, 2) = 4.30265 times 1 / sqrt(3).
    assert ours[:6] == ["ohem", "0.001", "3", "61.00 ± 1.00", "+1.00 [-1.48, +3.48]", "2.48"]
    # Its best on val; the 58 of lr 0.01 do not count.
    assert weak[:6] == ["weak", "0.1", "1", "72.00", "+13.00", "-"]
    assert "lr of each variant, chosen by the val mIoU after training (seed 0; " in text
    assert "| plain CE |     50.00 | **60.00** |     55.00 |" in text
    assert "a better one may lie beyond it: ohem, weak." in text
    assert (
        "No further seeds for weak: at its best it lies 2.00 points behind plain CE on val, more "
        "than 1.5." in text
    )
    assert "Not run yet" not in text
    assert "Not tuned yet" not in text
    # 13 runs; 7 are in the table.
    assert "13 runs, 6 of them to tune, 14:05 in all" in text
    assert report.markdown(select(benchmark, runs[::-1])) == text
    assert report.markdown(select(benchmark, json.loads(json.dumps(runs)))) == text


def test_report_while_it_is_being_tuned():
    benchmark = bench()
    runs = [run for run in all_records(benchmark) if place(run) in TUNING[:4]]
    text = report.markdown(select(benchmark, runs))
    assert "Not tuned yet: ohem (lr 0.01, seed 0; lr 0.1, seed 0); weak (lr 0.001, seed 0; " in text
    assert "Not run yet: plain CE (seed 1, 2)." in text
    assert "| ohem     | **61.00** |         - |      - |" in text
    # Nothing is said of ends and of dropping before all values have been tried.
    assert "No further seeds" not in text
    assert "end of the range" not in text


def test_a_report_before_anything_is_chosen():
    benchmark = bench(("0.1]}", "0.1], seeds: [0, 9]}"))
    with pytest.raises(cli.UserError, match=r"no value of 'tuned' .* yet; go on with: "):
        select(benchmark, all_records(bench()))


def test_seeds_that_only_choose_are_not_reported():
    benchmark = bench(("0.1]}", "0.1], seeds: [7]}"))
    runs = all_records(bench())
    for run in runs:
        if place(run) in TUNING:
            run["seed"] = 7
    results = select(benchmark, runs)
    assert {name: list(seeds) for name, seeds in results.runs.items()} == {
        "ce": [1, 2],
        "ours": [1, 2],
    }
    assert "Not run yet: plain CE (seed 0); ohem (seed 0)." in report.markdown(results)


def test_records_of_another_version_are_no_rivals():
    benchmark = bench()
    runs = all_records(benchmark)
    # lr 0.01 is the best of all, but it was made before the config changed.
    old = [
        {**run, "untuned_hash": "old", "config_hash": "old"} for run in runs if run["tuned"] == 0.01
    ]
    for run in old:
        run["curve"] = [[8, 99.0]]
    text = report.markdown(select(benchmark, [*old, *runs]))
    assert "2 records" not in text
    left_out = f"{len(old)} records of earlier versions of the configs are left out."
    assert left_out in text
    assert text.replace(f" {left_out}", "") == report.markdown(select(benchmark, runs))
    # And records from before there was a tune are no part of it.
    plain = {key: value for key, value in runs[0].items() if key not in ("tuned", "untuned_hash")}
    assert report.markdown(select(benchmark, [plain, *runs])) == report.markdown(
        select(benchmark, runs)
    )
    without = bench((f"tune: {{key: {LR}, values: [0.001, 0.01, 0.1]}}\n", ""))
    assert select(without, [*runs, plain]).records == [plain]


def test_plot_of_tuning():
    benchmark = bench()
    results = select(benchmark, all_records(benchmark))
    (axis,) = plots._draw_tuning(results).axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in lines] == ["plain CE", "ohem", "weak"]
    assert list(lines[0].get_xdata()) == [0.001, 0.01, 0.1]
    assert list(lines[0].get_ydata()) == [50, 60, 55]
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line not in lines]
    assert rings == [(0.01, 60), (0.001, 61), (0.1, 58)]
    assert axis.get_xscale() == "log"
    drawn = [plots.plot(results, Path("plots"))[-1].read_bytes() for _ in range(2)]
    assert drawn[0] == drawn[1]


# --- docs/accuracy.md ------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"


@pytest.fixture
def cracks():
    """The files of the page, and a small data set like the one that it speaks of."""
    for name, text in re.findall(
        r"<!-- test: (\S+) -->\n```\w+\n(.*?)```", PAGE.read_text(), re.DOTALL
    ):
        Path(name).write_text(text.replace("configs/quickstart", str(config_path(CE).parent)))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2), ("test", 3)):
        images, labels = (Path("data/cracks", kind, split) for kind in ("images", "labels"))
        for folder in (images, labels):
            folder.mkdir(parents=True)
        for i in range(count):
            image = rng.integers(100, 200, (48, 64, 3), dtype=np.uint8)
            label = np.zeros((48, 64), np.uint8)
            column = rng.integers(0, 62)
            image[:, column : column + 2] //= 3
            label[:, column : column + 2] = 1
            label[:2] = 255
            Image.fromarray(image).save(images / f"{i}.jpg")
            Image.fromarray(label).save(labels / f"{i}.png")
    assert len(Path("cracks.yaml").read_text().splitlines()) <= 13
    return files.load_benchmark("cracks.yaml")


def test_the_benchmark_of_the_docs_fits_a_data_set_of_two_classes(cracks):
    plan = Plan(cracks, arguments(), Path("work"))
    assert len(plan.due([])) == 8
    assert plan.total([]) == 12
    cfg = plan.job("ours", 0.01, 0).cfg
    assert cfg.model.decode_head.loss_decode.to_dict() == {"type": "OhemCrossEntropyLoss"}
    assert cfg.optim_wrapper.optimizer.lr == 0.01
    assert cfg.train_dataloader.dataset.type == "BaseSegDataset"
    shares = jobs.class_shares(cfg, Path("shares.json"))
    # Two columns of 64.
    assert shares == pytest.approx([31 / 32, 1 / 32], abs=1e-6)


@pytest.mark.slow
def test_the_benchmark_of_the_docs_runs(cracks):
    command = [sys.executable, str(TOOL), "run", "cracks.yaml", "--seeds", "0", "--cfg-options"]
    command += ["train_cfg.max_iters=52", "train_cfg.val_interval=52", "param_scheduler.1.end=52"]
    command += ["model.data_preprocessor.size=(48,64)", "train_dataloader.batch_size=2"]
    command += ["train_dataloader.num_workers=0", "train_dataloader.persistent_workers=False"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert len(read_records(Path("cracks.jsonl"))) == 8
    assert "| plain CE | 0.0" in result.stdout
    assert "lr of each variant, chosen by the val mIoU after training (seed 0" in result.stdout


# --- a real run that is killed ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_tuning_that_is_killed_goes_on(tmp_path):
    bench(
        ("seeds: [0, 1, 2]", "seeds: [0, 1]"),
        ("[0.001, 0.01, 0.1]", "[0.001, 0.1]"),
        ("  weak:", "  # weak:"),
    )
    command = [sys.executable, str(TOOL), "run", "tuned.yaml"]
    records = Path("tuned.jsonl")
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    end = time.monotonic() + 300
    while len(read_records(records)) < 2:
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    before = records.read_bytes()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert records.read_bytes().startswith(before)
    runs = read_records(records)
    places = list(map(place, runs))
    assert len(set(places)) == len(places)
    choices = choose(files.load_benchmark("tuned.yaml"), runs, ["ce", "ours"])
    dropped = "no further seeds" in result.stdout
    assert sorted(places) == sorted(
        [(name, lr, 0) for name in ("ce", "ours") for lr in (0.001, 0.1)]
        + [("ce", choices["ce"].best, 1)]
        + [("ours", choices["ours"].best, 1)] * (not dropped)
    )
    for run in runs:
        assert [step for step, _ in run["curve"]] == [8]
    # Runs of a seed are paired whatever the value.
    assert len({run["order"] for run in runs if run["seed"] == 0}) == 1
    printed = subprocess.run(
        [sys.executable, str(TOOL), "report", "tuned.yaml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert result.stdout.endswith(printed)
    assert "lr of each variant, chosen by the val mIoU" in printed
