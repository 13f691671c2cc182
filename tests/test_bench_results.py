"""Which records count, and what they say before and after tuning."""

import pytest
from benchmarks import LR, TUNING, all_records, fake, place, tiny_report, tuned

pytest.importorskip("mmseg")

from ohem_mm import cli
from ohem_mm.bench import report
from ohem_mm.bench.results import select

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_no_records():
    with pytest.raises(cli.UserError, match=r"no records of 'tiny'.*miou\.py run bench\.yaml"):
        tiny_report([fake("ce", 0, [1.0, 1.0, 1.0], name="other")])


def test_a_report_before_anything_is_chosen():
    benchmark = tuned(("0.1]}", "0.1], seeds: [0, 9]}"))
    with pytest.raises(cli.UserError, match=r"no value of 'tuned' .* yet; go on with: "):
        select(benchmark, all_records(tuned()))


def test_seeds_that_only_choose_are_not_reported():
    benchmark = tuned(("0.1]}", "0.1], seeds: [7]}"))
    runs = all_records(tuned())
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
    benchmark = tuned()
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
    without = tuned((f"tune: {{key: {LR}, values: [0.001, 0.01, 0.1]}}\n", ""))
    assert select(without, [*runs, plain]).records == [plain]
