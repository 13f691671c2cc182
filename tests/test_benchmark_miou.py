"""tools/benchmark_miou.py: benchmark files, records, statistics, and runs that are killed."""

import argparse
import contextlib
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

from ohem_mm import cli
from ohem_mm.bench import files, plots, report
from ohem_mm.bench import records as recs
from ohem_mm.bench import text as words
from ohem_mm.bench.plan import Plan
from ohem_mm.bench.results import select
from ohem_mm.cli.checkpoints import numbered
from ohem_mm.config import config_path

ROOT = Path(__file__).parents[1]
TOOL = config_path("tools/benchmark_miou.py")
CE = "quickstart/unet-tiny_1xb4-1k_scenes-96x192"
OURS = "quickstart/unet-tiny_1xb4-ohem-1k_scenes-96x192"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def write_yaml(text, name="bench.yaml"):
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


# --- benchmark files -------------------------------------------------------------------------


def test_benchmark_file():
    bench = files.load_benchmark(write_yaml(BENCH))
    assert bench.seeds == (0, 1, 2)
    assert bench.note == "Two lines."
    assert bench.variants["ce"].label == "plain CE"
    # YAML 1.1 reads 1e-3 as a string.
    assert bench.variants["ours"].cfg_options == ({"optim_wrapper.optimizer.lr": 1e-3},)


def test_grid_expands_to_variants():
    bench = files.load_benchmark(write_yaml(GRID))
    assert len(bench.variants) == 8
    cell = bench.variants["t=0.7,k=0.0156,avg=all"]
    assert cell.cell == (1, 0, 1)
    assert cell.label == "t 0.7, k 1/64, avg all"
    options = {"loss.thresh": 0.7, "loss.min_kept": 1 / 64, "other.min_kept": 1 / 64}
    assert cell.cfg_options == ({"x": 1}, {**options, "loss.avg": "all"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1, 2]", "seed: [0]", "unknown key 'seed'; did you mean 'seeds'?"),
        ("seeds: [0, 1, 2]", "", "lacks the key 'seeds'"),
        ("[0, 1, 2]", "[0, 0]", "seeds is [0, 0]; it must be a list of different integers"),
        ("[0, 1, 2]", "3", "seeds is 3; it must be a list"),
        ("[0, 1, 2]", "[]", "seeds is []"),
        (
            "baseline: ce",
            "baseline: plain",
            "the baseline 'plain' is none of the variants: ce",
        ),
        ("name: tiny", "name: a/b", "name is 'a/b'"),
        ("name: tiny", "name: tiny\nmetric: IoU", "metric is 'IoU'; allowed are mIoU, mDice"),
        ("name: tiny", "name: tiny\nrare_below: 2", "rare_below is 2; it must be from 0 to 1"),
        ("  ce: {label: plain CE, config: a}", "  ce: {label: x}", "'ce' lacks the key 'config'"),
        ("name: tiny", "name: [tiny", "is not YAML"),
        (BENCH, "[1, 2]", "must be a mapping"),
        ("variants:", "grid: {config: a, axes: {}}\nvariants:", "has 0 axes"),
    ],
)
def test_mistakes_in_a_benchmark_file_are_named(old, new, message):
    assert old in BENCH
    with pytest.raises(cli.UserError, match=re.escape(message)) as caught:
        files.load_benchmark(write_yaml(BENCH.replace(old, new)))
    assert "bench.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- records ---------------------------------------------------------------------------------


def key(seed, variant="ce"):
    return {"benchmark": "tiny", "variant": variant, "seed": seed, "config_hash": "h"}


def test_a_record_is_appended_once():
    path = Path("new/records.jsonl")
    for seed in (0, 1, 0):
        recs.append_record(path, {**key(seed), "name": "é"})
    assert [record["seed"] for record in recs.read_records(path)] == [0, 1]
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("torn", ['{"benchmark": "ti', '{"benchmark": "tiny"}', "\u00e9"[:1]])
def test_a_torn_line_is_replaced(torn):
    path = Path("records.jsonl")
    recs.append_record(path, key(0))
    with path.open("a") as file:
        file.write(torn)
    assert recs.read_records(path) == [key(0)]
    recs.append_record(path, key(1))
    assert path.read_text() == f"{json.dumps(key(0))}\n{json.dumps(key(1))}\n"


def test_a_line_that_lacks_only_its_end_counts():
    path = Path("records.jsonl")
    path.write_text(json.dumps(key(0)))
    recs.append_record(path, key(0))
    recs.append_record(path, key(1))
    assert recs.read_records(path) == [key(0), key(1)]


def test_a_broken_line_in_the_middle_is_an_error():
    path = Path("records.jsonl")
    path.write_text(f"{json.dumps(key(0))}\nnonsense\n")
    with pytest.raises(cli.UserError, match=r"records\.jsonl, line 2 is not a record"):
        recs.read_records(path)


def test_appending_from_many_processes_loses_nothing():
    code = (
        "import sys; from pathlib import Path; from ohem_mm.bench.records import append_record\n"
        "for i in range(20):\n"
        "    record = dict(benchmark='b', variant=sys.argv[1] * (i % 2), seed=i, config_hash='')\n"
        "    append_record(Path('records.jsonl'), {**record, 'x': 'y' * 5000})"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, name]) for name in ("a", "b")]
    assert [process.wait() for process in processes] == [0, 0]
    records = recs.read_records(Path("records.jsonl"))
    # The even ones are the same job in both.
    assert len(records) == 30
    assert len(set(map(recs.record_key, records))) == 30


# --- statistics and the report ---------------------------------------------------------------


def test_interval_against_tabled_quantiles():
    assert words.half_width([5.0]) is None
    # t(0.975) is 12.7062 with 1 and 4.3027 with 2 degrees of freedom.
    assert words.half_width([0.0, 1.0]) == pytest.approx(12.7062 * 0.5, abs=1e-4)
    assert words.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert words.half_width([2.0, 2.0, 2.0]) == 0


def test_cells():
    assert words.mean_std([1.0]) == "1.00"
    assert words.mean_std([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert words.mean_std([]) == "-"
    assert words.difference([1.5]) == "+1.50"
    assert words.difference([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48]"
    assert words.difference([-2.0, -2.1, -1.9]) == "**-2.00 [-2.25, -1.75]**"
    assert words.difference([]) == "-"
    assert words.clock(3725.4) == "1:02:05"


CLASSES = ["road", "a|b", "pole"]
SHARES = [0.9, 0.09, 0.01]


def fake(variant, seed, iou, name="tiny", **changes):
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


@pytest.fixture
def records():
    plain = [[90.0, 50.0, 10.0], [91.0, 50.0, 12.0], [92.0, 50.0, 14.0]]
    ours = [[90.0, 50.0, 13.0], [91.0, 50.0, 18.0], [92.0, 50.0, 17.0]]
    rows = [fake("ce", seed, iou) for seed, iou in enumerate(plain)]
    return rows + [fake("ours", seed, iou) for seed, iou in enumerate(ours)]


def tiny_report(records):
    bench = files.load_benchmark(write_yaml(BENCH))
    return report.markdown(select(bench, records))


def rows(text):
    """The cells of the first table."""
    table = text.split("\n\n| ")[1].split("\n\n")[0]
    return [re.split(r"\s*(?<!\\)\|\s*", line.strip("| ")) for line in table.splitlines()]


def test_report(records):
    text = tiny_report(records)
    header, _, plain, ours = rows(text)
    assert header[:5] == ["variant", "mIoU", "vs plain CE", "rare-class mIoU", "vs plain CE"]
    assert header[5:] == ["val mIoU", "aAcc", "kept", "training", "memory"]
    # Means of the three classes: 50, 51, 52 and 51, 53, 53; differences 1, 2, 1.
    assert plain[:4] == ["plain CE", "51.00 ± 1.00", "", "12.00 ± 2.00"]
    # 4/3 ± 4.30265 * 0.57735 / sqrt(3); for the rare class 4 ± 4.30265 * 1.73205 / sqrt(3).
    assert ours[:3] == ["ours\\|x", "52.33 ± 1.15", "+1.33 [-0.10, +2.77]"]
    assert ours[3:5] == ["16.00 ± 2.65", "+4.00 [-0.30, +8.30]"]
    assert ours[5:] == ["42.00 ± 1.00", "90.00 ± 0.00", "25.0 %", "1:00", "502 MiB"]
    assert "| a\\|b  |" in text
    assert "Rare classes (below 2 % of the pixels): pole." in text
    assert "Runs of one seed have the same initial weights and order of the images." in text
    assert "A CPU, 2 cores, no GPU, 1 thread a job, 2 at a time" in text
    assert "600 iterations; seeds 0, 1, 2; 6 runs, 6:30 in all" in text
    assert "commit 0123456." in text
    assert "Not run yet" not in text


def test_report_does_not_depend_on_the_order_of_the_records(records):
    text = tiny_report(records)
    random.Random(0).shuffle(records)
    assert tiny_report(json.loads(json.dumps(records))) == text


def test_report_of_one_seed_has_no_interval(records):
    text = tiny_report([record for record in records if record["seed"] == 0])
    assert rows(text)[3][1:3] == ["51.00", "+1.00"]
    assert "One seed: differences have no interval" in text
    assert "Not run yet: plain CE (seed 1, 2); ours|x (seed 1, 2)." in text


def test_report_uses_the_last_version_of_a_config(records):
    old = fake("ours", 2, [0.0, 0.0, 0.0], config_hash="old")
    text = tiny_report([old, *records])
    assert rows(text) == rows(tiny_report(records))
    assert "1 records of earlier versions of the configs are left out." in text
    # A new version counts alone, though the old one has more seeds.
    new = fake("ours", 2, [93.0, 50.0, 16.0], config_hash="new")
    assert rows(tiny_report([*records, new]))[3][1:3] == ["53.00", "+1.00"]


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("weights", "other", "initial weights"),
        ("order", "other", "order of the images"),
        ("batches", ["other"], "first batches"),
    ],
)
def test_report_says_when_runs_are_not_paired(records, key, value, words):
    records[-1][key] = value
    text = tiny_report(records)
    assert f"Unlike plain CE: {words} in ours|x." in text
    assert "Runs of one seed have" not in text


def test_report_says_which_runs_were_resumed(records):
    records[-1].update(resumed=[5], batches=[])
    text = tiny_report(records)
    assert "order of the images. 1 of the runs was interrupted and resumed." in text


def test_report_without_the_baseline(records):
    text = tiny_report([record for record in records if record["variant"] == "ours"])
    assert rows(text)[2][2] == "-"
    assert "Runs of one seed" not in text


def test_a_class_that_the_split_lacks(records):
    for record in records:
        record["IoU"] = [*record["IoU"][:2], None]
    text = tiny_report(records)
    assert rows(text)[3][3:5] == ["-", "-"]
    assert re.search(r"\| pole +\| +1\.00 % \| +- \| +- \|", text)


def test_no_records():
    with pytest.raises(cli.UserError, match=r"no records of 'tiny'.*miou\.py run bench\.yaml"):
        tiny_report([fake("ce", 0, [1.0, 1.0, 1.0], name="other")])


def test_grid_report():
    bench = files.load_benchmark(write_yaml(GRID))
    cells = [
        fake(name, 0, [60.0, 50.0 + i, 10.0], name="grid", curve=[])
        for i, name in enumerate(bench.variants)
    ]
    text = report.markdown(select(bench, cells[:-1]))
    assert text.count("| t   |") == 4
    # Columns are the second axis, and the third one makes the tables.
    assert "mIoU, avg all:\n\n| t   | k 1/64 | k 1/4 |\n" in text
    assert "| 0.5 |  40.33 | 41.00 |" in text
    assert "| 0.7 |  41.67 |     - |" in text
    assert "Not run yet: t 0.7, k 1/4, avg all (seed 0)." in text


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


def test_a_grid_without_a_config_compares_the_variants_in_each_cell():
    bench = files.load_benchmark(write_yaml(COMPARED))
    assert bench.rows == {"ce": "plain CE", "ours": "ours"}
    assert bench.baseline_label == "plain CE"
    assert len(bench.variants) == 8
    cell = bench.variants["ours,rare=25,length=900"]
    assert (cell.config, cell.cell, cell.row) == ("b", (1, 1), "ours")
    assert cell.label == "ours, rare a quarter, length 900"
    options = {"train.rare": 25, "test.rare": 25, "iters": 900}
    assert cell.cfg_options == ({}, {"x": 1}, options)
    assert bench.variants["ce,rare=25,length=900"].cfg_options == ({"y": 1}, {"x": 1}, options)
    assert bench.baseline_of("ours,rare=25,length=900") == "ce,rare=25,length=900"
    with pytest.raises(cli.UserError, match="'focal' is none of the variants: ce, ours"):
        files.load_benchmark(write_yaml(COMPARED.replace("baseline: ce", "baseline: focal")))
    alone = COMPARED.replace("variants:", "grid:").split("grid:")
    with pytest.raises(cli.UserError, match="grid needs a config, or variants to compare"):
        files.load_benchmark(write_yaml(f"{alone[0]}grid:{alone[2]}"))


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


def test_report_of_a_grid_in_which_variants_are_compared():
    bench = files.load_benchmark(write_yaml(COMPARED))
    results = select(bench, list(compared()))
    text = report.markdown(results)
    assert (
        "mIoU, plain CE:\n\n"
        "| rare      |   length 300 |   length 900 |\n"
        "| --------- | -----------: | -----------: |\n"
        "| all       | 55.00 ± 7.07 | 65.00 ± 7.07 |\n"
        "| a quarter | 45.00 ± 7.07 | 60.00 ± 7.07 |\n" in text
    )
    # Each pair of differences has a standard deviation of sqrt(2), and 3 pairs have 3 degrees of
    # freedom: t(0.975, 3) = 3.18245, times sqrt(2) / sqrt(2).
    assert (
        "mIoU, ours minus plain CE:\n\n"
        "| rare      | length 300 | length 900 |\n"
        "| --------- | ---------: | ---------: |\n"
        "| all       |  **+5.00** |      +2.00 |\n"
        "| a quarter |      +0.00 |          - |\n" in text
    )
    assert (
        "Noise of mIoU, ours minus plain CE: between seeds a difference varies by 1.41 (standard "
        "deviation, pooled over the cells, 3 degrees of freedom), so the mean of 2 seeds shows "
        "nothing below 3.18 (95 %)." in text
    )
    assert "Not run yet: ours, rare a quarter, length 900 (seed 0, 1)." in text
    assert "Runs of one seed have the same initial weights and order of the images." in text
    figure = plots._draw_grid(results)
    words = {
        (text.get_text(), text.get_fontweight()) for frame in figure.axes for text in frame.texts
    }
    assert {("+5.0", "bold"), ("+2.0", "normal"), ("+0.0", "normal"), ("65.0", "normal")} <= words
    # Runs of other seeds than the baseline's say nothing of the noise.
    one = [run for run in compared() if run["variant"][:2] == "ce" or run["seed"] == 0]
    assert "Noise" not in report.markdown(select(bench, one))


def test_pooled_spread():
    assert words.pooled([[1.0], []]) is None
    spread, freedom = words.pooled([[1.0, 3.0], [10.0, 12.0, 14.0], [5.0]])
    # Sums of squares 2 and 8, with 1 and 2 degrees of freedom.
    assert (spread, freedom) == (pytest.approx((10 / 3) ** 0.5), 3)
    assert words.half_width_of(2.0, 2, 4) == pytest.approx(4.30265)
    assert words.least_shown([1.0, 2.0, 3.0]) == "2.48"
    assert words.least_shown([1.0]) == "-"
    assert words.least_shown([1.0, float("nan")]) == "-"


def test_plots_are_the_same_bytes_every_time(records):
    bench = files.load_benchmark(write_yaml(BENCH))
    grid = files.load_benchmark(write_yaml(GRID, "grid.yaml"))
    cells = [fake(name, 0, [60.0, 50.0, 10.0], name="grid") for name in grid.variants]
    for _ in range(2):
        drawings = plots.plot(select(bench, records), Path("plots"))
        drawings += plots.plot(select(grid, cells), Path("plots"))
        names = [file.name for file in drawings]
        assert names == ["tiny-classes.svg", "tiny-curves.svg", "grid-grid.svg"]
        drawn = [file.read_bytes() for file in drawings]
        assert all(b"<svg" in content for content in drawn)
        for file in drawings:
            file.unlink()
        first = locals().get("first", drawn)
        assert drawn == first


def test_report_is_written_between_its_marks():
    page = "a\n<!-- report: tiny -->\nold\n<!-- end of report -->\nb\n<!-- end of report -->\n"
    path = Path("page.md")
    path.write_text(page)
    for _ in range(2):
        report.write(path, "tiny", "new\n")
        assert path.read_text() == page.replace("old", "new")
    with pytest.raises(cli.UserError, match=r"page\.md has no block from '<!-- report: x -->'"):
        report.write(path, "x", "new\n")
    with pytest.raises(cli.UserError, match=r"^there is no page 'nowhere\.md' to put the report"):
        report.write(Path("nowhere.md"), "tiny", "new\n")


def test_a_benchmark_file_that_is_not_there():
    with pytest.raises(cli.UserError, match=r"^no benchmark file is called 'nosuch'; those") as no:
        files.load_benchmark("nosuch")
    assert "quickstart/benchmark.yaml" in str(no.value)
    assert "metafile" not in str(no.value)


def committed_reports():
    pages = [ROOT / "README.md", *sorted((ROOT / "configs").rglob("*.md"))]
    for page in pages:
        pattern = r"<!-- report: (\S+) -->\n(.*?)<!-- end of report -->"
        for name, text in re.findall(pattern, page.read_text(), re.DOTALL):
            yield pytest.param(name, text, id=f"{page.parent.name}-{name}")


@pytest.mark.parametrize(("name", "text"), list(committed_reports()))
def test_committed_tables_are_what_the_records_give(name, text):
    (path,) = (
        path
        for path in (ROOT / "configs").rglob("*.yaml")
        if f"\nname: {name}\n" in f"\n{path.read_text()}"
    )
    bench = files.load_benchmark(str(path))
    records = recs.read_records(bench.path.with_suffix(".jsonl"))
    assert report.markdown(select(bench, records)) == text


# --- runs ------------------------------------------------------------------------------------

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
        spec = importlib.util.spec_from_file_location("benchmark_miou", TOOL)
        module = importlib.util.module_from_spec(spec)
        sys.modules["benchmark_miou"] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", ["benchmark_miou", *arguments])
        code = cli.run(module.main)
        return code, capsys.readouterr().err

    yield call
    sys.modules.pop("benchmark_miou", None)


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


def test_latest_checkpoint_is_a_whole_one(tmp_path):
    import torch

    assert numbered(tmp_path) == []
    for step in (90, 100, 110):
        torch.save({"x": torch.zeros(1000)}, f"iter_{step}.pth")
    content = Path("iter_110.pth").read_bytes()
    Path("iter_110.pth").write_bytes(content[: len(content) // 2])
    torch.save({}, "best_mIoU_iter_300.pth")
    assert numbered(tmp_path)[0].name == "iter_100.pth"


def test_quickstart_file():
    bench = files.load_benchmark("ohem_mm::quickstart/benchmark.yaml")
    assert bench.shown_path == "quickstart/benchmark.yaml"
    assert len(bench.seeds) >= 2
    for variant in bench.variants.values():
        assert config_path(variant.config).is_file()
