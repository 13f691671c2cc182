"""The report: from its records and from nothing else."""

import json
import random
import re
from pathlib import Path

import pytest
from benchmarks import (
    COMPARED,
    GRID,
    ROOT,
    TUNING,
    all_records,
    compared,
    fake,
    place,
    tiny_records,
    tiny_report,
    tuned,
    write_yaml,
)

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

from ohem_mm import cli
from ohem_mm.bench import files, plots, report
from ohem_mm.bench import records as recs
from ohem_mm.bench.results import select
from ohem_mm.bench.tuning import choose

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def records():
    return tiny_records()


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


def committed_reports():
    pages = [ROOT / "README.md", *sorted((ROOT / "configs").rglob("*.md"))]
    for page in pages:
        pattern = r"<!-- report: (\S+) -->\n(.*?)<!-- end of report -->"
        for name, text in re.findall(pattern, page.read_text(), re.DOTALL):
            yield pytest.param(name, text, id=f"{page.parent.name}-{name}")


@pytest.mark.parametrize(("name", "text"), list(committed_reports()))
def test_committed_tables_are_what_the_records_give(name, text):
    benchmark, _, at = name.partition("@")
    (path,) = (
        path
        for path in (ROOT / "configs").rglob("*.yaml")
        if f"\nname: {benchmark}\n" in f"\n{path.read_text()}"
    )
    bench = files.load_benchmark(str(path))
    records = recs.read_records(bench.path.with_suffix(".jsonl"))
    results = select(bench, records, float(at) if at else None)
    assert results.block == name
    assert report.markdown(results) == text


# --- tuned ----------------------------------------------------------------------------------------


def test_choosing_on_the_reported_split_is_possible_and_told():
    benchmark = tuned(("0.1]}", "0.1], split: test}"))
    runs = all_records(benchmark)
    choices = choose(benchmark, runs, benchmark.variants)
    assert {choice.best for choice in choices.values()} == {0.1}
    text = report.markdown(select(benchmark, runs))
    assert "made on the images that are reported (test), so the scores are too high" in text


def test_report_of_a_tuned_benchmark():
    benchmark = tuned()
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
    # A seed at a value that was not chosen is for --at alone.
    other = next(run for run in runs if place(run) == ("ce", 0.001, 0))
    assert report.markdown(select(benchmark, [*runs, {**other, "seed": 1}])) == text
    assert report.markdown(select(benchmark, runs[::-1])) == text
    assert report.markdown(select(benchmark, json.loads(json.dumps(runs)))) == text


def test_report_while_it_is_being_tuned():
    benchmark = tuned()
    runs = [run for run in all_records(benchmark) if place(run) in TUNING[:4]]
    text = report.markdown(select(benchmark, runs))
    assert "Not tuned yet: ohem (lr 0.01, seed 0; lr 0.1, seed 0); weak." in text
    assert "Not run yet: plain CE (seed 1, 2)." in text
    assert "| ohem     | **61.00** |         - |      - |" in text
    # Nothing is said of ends and of dropping before all values have been tried.
    assert "No further seeds" not in text
    assert "end of the range" not in text
