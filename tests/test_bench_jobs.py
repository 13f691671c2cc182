"""Jobs: in which order they run, and what is left of them when they fail or are killed."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from benchmarks import (
    LATER,
    OURS,
    SCORES,
    SMALL,
    TOOL,
    TUNED,
    TUNING,
    arguments,
    place,
    tuned,
    write_yaml,
    written,
)
from loading import load_tool

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

from ohem_mm import cli
from ohem_mm.bench import files, jobs, plots, report
from ohem_mm.bench import records as recs
from ohem_mm.bench.jobs import run_benchmark
from ohem_mm.bench.plan import Plan
from ohem_mm.bench.records import read_records
from ohem_mm.bench.results import select
from ohem_mm.bench.tuning import choose
from ohem_mm.disk import write_json

pytestmark = pytest.mark.usefixtures("elsewhere")


def processes(folder):
    """Ids of the processes of the jobs that work in a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has just ended
            line = path.read_text()
            if str(folder) in line and "\0ohem_mm.bench.job\0" in line:
                found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_killed_runs_go_on(tmp_path):
    work = tmp_path / "work_dirs" / "small"
    command = [sys.executable, str(TOOL), "run", "small.yaml", "--jobs", "2"]
    command += ["--work-dir", str(work.parent)]
    write_yaml(SMALL, "small.yaml")

    def folder(job):
        variant, seed = job
        return next(iter(work.glob(f"{variant}/seed{seed}-*")), work / "none")

    def trains(job):
        return any(map(zipfile.is_zipfile, folder(job).glob("iter_*.pth")))

    # A job is killed: the others go on, and the tool says what happened.
    parent = subprocess.Popen(command, stdout=subprocess.PIPE)
    wait_for(lambda: trains(("ce", 0)))
    os.kill(min(processes(folder(("ce", 0)))), signal.SIGKILL)  # its data loader came later
    # Then the tool itself: its jobs end too.
    wait_for(lambda: trains(("ce", 1)) or trains(("ours", 1)))
    parent.kill()
    parent.communicate()
    wait_for(lambda: not processes(work), 60)

    before = len(recs.read_records(Path("small.jsonl")))
    assert before < 4
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    records = recs.read_records(Path("small.jsonl"))
    jobs = [(record["variant"], record["seed"]) for record in records]
    assert sorted(jobs) == [("ce", 0), ("ce", 1), ("ours", 0), ("ours", 1)]
    assert "resumed epoch: 0, iter: " in (folder(("ce", 0)) / "job.log").read_text()
    assert not list(work.rglob("*.pth"))
    by_job = dict(zip(jobs, records, strict=True))
    assert len(by_job["ce", 0]["resumed"]) == 1
    for record in records:
        assert record["iterations"] == 60
        assert [step for step, _ in record["curve"]] == [30, 60]
        assert record["peak_memory_mib"] > 50
        assert record["train_seconds"] > 0
        assert record["metrics"]["mIoU"] == pytest.approx(
            sum(filter(None, record["IoU"])) / sum(v is not None for v in record["IoU"]), abs=1e-3
        )
        assert sum(record["class_shares"]) == pytest.approx(1, abs=1e-4)

    # Runs of a seed are paired, also when they were resumed, and seeds differ.
    for what in ("weights", "order"):
        values = {job: record[what] for job, record in by_job.items()}
        assert values["ce", 0] == values["ours", 0] != values["ce", 1] == values["ours", 1]
    for seed in (0, 1):
        batches = [by_job[variant, seed]["batches"] for variant in ("ce", "ours")]
        assert 5 <= min(map(len, batches)) <= 10
        assert all(a == b for a, b in zip(*batches, strict=False))
    text = report.markdown(select(files.load_benchmark("small.yaml"), records))
    assert "Runs of one seed have the same initial weights and order of the images." in text

    # The same command again runs nothing, and prints the same report as report does.
    logs = {log: log.stat().st_size for log in work.rglob("job.log")}
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 jobs, 4 of them finished before" in again
    assert {log: log.stat().st_size for log in work.rglob("job.log")} == logs
    printed = subprocess.run(
        [sys.executable, str(TOOL), "report", "small.yaml"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert again.endswith(printed)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Call the tool in this process; return its exit code and what it wrote to stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmark_miou", *arguments])
        code = cli.run(load_tool("benchmark_miou").main)
        return code, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            f"config: {OURS}",
            f"config: {OURS}, cfg_options: {{model.decode_head.loss_decode.thresh: 2}}",
            "variant 'ours' of .*small.yaml: model.decode_head.loss_decode: thresh",
        ),
        (OURS, OURS[:-3], "no config is called .* the nearest names are"),
        ("param_scheduler.1.end", "param_schedular.1.end", "did you mean 'param_scheduler'"),
        ("name: small", "name: small\ndata_root: nowhere", "data_root=nowhere changes nothing"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tool, old, new, message):
    assert old in SMALL
    write_yaml(SMALL.replace(old, new), "small.yaml")
    code, error = tool("run", "small.yaml")
    assert code == 2
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last), error
    assert not list(Path("work_dirs").rglob("job.json"))


def test_failed_jobs_do_not_stop_others_and_are_reported(tool, capsys):
    write_yaml(SMALL.replace("train_cfg: {", "train_cfg: {type: NoSuchLoop, "), "small.yaml")
    with pytest.raises(SystemExit) as caught:
        tool("run", "small.yaml", "--seeds", "0")
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "error: 2 of 2 jobs failed" in error
    for variant in ("ce", "ours"):
        (log,) = Path("work_dirs/small").glob(f"{variant}/seed0-*/job.log")
        assert f"--- {variant}, seed 0: exit status 1, the log {log} ends with" in error
    assert "KeyError: 'NoSuchLoop is not in the mmseg::loop registry." in error
    assert not Path("small.jsonl").exists()


def test_unknown_variant_and_missing_benchmark(tool):
    write_yaml(SMALL, "small.yaml")
    code, error = tool("run", "small.yaml", "--variants", "focal")
    assert (code, error) == (
        2,
        f"error: {Path.cwd() / 'small.yaml'} has no variant 'focal'; it has ce, ours\n",
    )
    assert tool("report", "missing.yaml")[0] == 2


def test_one_run_of_a_benchmark_at_a_time(tool):
    write_yaml(SMALL, "small.yaml")
    lock = Path("work_dirs/small/lock")
    lock.parent.mkdir(parents=True)
    code = f"import fcntl, time; f = open({str(lock)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX)"
    code += "; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        assert tool("run", "small.yaml")[1].startswith("error: another process runs this benchmark")
        other.kill()


# --- tuned ----------------------------------------------------------------------------------------


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
            write_json(job.folder / "record.json", written(job.record, *scores))
        job.log.write_text("a line\n")
        job.process = subprocess.Popen([sys.executable, "-c", f"raise SystemExit({int(failed)})"])

    monkeypatch.setattr(jobs, "_start", start)
    monkeypatch.setattr(jobs, "POLL", 0.01)
    return started


def test_tuning_comes_first_and_a_dropped_variant_gets_no_seeds(ran, capsys):
    run_benchmark(tuned(), arguments(), Path("tuned.jsonl"))
    assert ran == TUNING + LATER
    printed = capsys.readouterr().out
    assert "15 jobs, 0 of them finished before" in printed
    assert "ce: best at lr 0.01 (val mIoU 60.00)" in printed
    assert "ours: best at lr 0.001, the end of the range (val mIoU 61.00)" in printed
    assert "weak: 2.00 behind ce, no further seeds" in printed
    assert printed.count("weak: 2.00 behind") == 1
    run_benchmark(tuned(), arguments(), Path("tuned.jsonl"))
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
        run_benchmark(tuned(), arguments(), Path("tuned.jsonl"))
    assert caught.value.code == 130
    monkeypatch.setattr(jobs, "_start", start)
    run_benchmark(tuned(), arguments(), Path("tuned.jsonl"))
    assert ran == TUNING + LATER


def test_a_record_that_nobody_collected_counts(ran):
    # The tool was killed after the job had written its record.
    benchmark = tuned()
    plan = Plan(benchmark, arguments(), Path("work_dirs/tuned"))
    for where in TUNING:
        job = plan.job(*where)
        job.folder.mkdir(parents=True)
        write_json(job.folder / "record.json", written(job.record, *SCORES[where]))
    run_benchmark(benchmark, arguments(), Path("tuned.jsonl"))
    assert ran == LATER
    assert len(read_records(Path("tuned.jsonl"))) == 13


def test_jobs_side_by_side_run_the_same(ran):
    run_benchmark(tuned(), arguments(jobs=3), Path("tuned.jsonl"))
    assert sorted(ran) == sorted(TUNING + LATER)


def test_parts_of_a_benchmark(ran):
    records = Path("tuned.jsonl")
    # Without the baseline's tuning nothing can be dropped.
    run_benchmark(tuned(), arguments(variants=["ours"], seeds=[0]), records)
    assert ran == TUNING[3:6]
    run_benchmark(tuned(), arguments(variants=["ce"]), records)
    assert ran[3:] == [*TUNING[:3], LATER[0], LATER[2]]
    # Now it is known that this one is behind.
    run_benchmark(tuned(), arguments(variants=["weak", "ours"]), records)
    assert ran[8:] == [*TUNING[6:], LATER[1], LATER[3]]


def test_one_shared_value(ran, monkeypatch):
    for name in ("ours", "weak"):
        for seed in (1, 2):
            monkeypatch.setitem(SCORES, (name, 0.01, seed), (50, 51))
    benchmark = tuned()
    run_benchmark(benchmark, arguments(at=0.01), Path("tuned.jsonl"))
    assert ran == [(name, 0.01, seed) for seed in (0, 1, 2) for name in ("ce", "ours", "weak")]
    results = select(benchmark, read_records(Path("tuned.jsonl")), at=0.01)
    text = report.markdown(results)
    assert text.startswith("### tuned, all at lr 0.01\n\n**All variants share lr 0.01: ")
    assert "chosen by" not in text
    assert "run tuned.yaml --at 0.01`" in text
    assert "Not run yet" not in text
    assert plots._draw_tuning(results) is None
    # Beside the plots of the tuned report, and not over them.
    drawn = [file.name for file in plots.plot(results, Path("plots"))]
    assert drawn == ["tuned@0.01-classes.svg", "tuned@0.01-curves.svg"]


def test_a_failed_job_leaves_the_others(ran, monkeypatch, capsys):
    monkeypatch.setitem(SCORES, ("ours", 0.01, 0), None)
    with pytest.raises(SystemExit):
        run_benchmark(tuned(), arguments(), Path("tuned.jsonl"))
    # Its tuning is not finished, so it gets no seeds.
    assert ran == [*TUNING, LATER[0], LATER[2]]
    assert "ours, lr 0.01, seed 0: exit status 1" in capsys.readouterr().err


TUNED_GRID = """grid:
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
    benchmark = tuned(text=TUNED + TUNED_GRID)
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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_tuning_that_is_killed_goes_on(tmp_path):
    tuned(
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
