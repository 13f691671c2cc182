"""The fault campaign: that it sees losses, a small one of each part, and the page of its counts."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("mmseg")

import exits
import faults
import torch

from ohem_mm.bench import report

DOCS = Path(__file__).parents[1] / "docs"
LINE = "11/24 11:40:12 - mmengine - INFO - Iter(train) [{:>3}/90]  lr: 1.0e-03  loss: 2.3"


def log(first, last, resumed=None):
    lines = [] if resumed is None else [f"resumed epoch: 0, iter: {resumed}"]
    return "\n".join([*lines, *map(LINE.format, range(first, last + 1))])


def test_what_is_repeated_after_a_fault():
    assert faults.check_resume(log(1, 7), newest=0, left=0) == 7
    assert faults.check_resume(log(11, 20, resumed=10), newest=10, left=10) == 10
    assert faults.check_resume(log(11, 20, resumed=10), newest=10, left=20) == 0
    assert faults.check_resume("it was still starting", newest=10, left=10) == 0


@pytest.mark.parametrize(
    ("text", "newest", "left", "message"),
    [
        (log(1, 5), 10, 10, "iteration 10 was on the disk, and training began at 1"),
        (log(11, 15, resumed=20), 20, 20, "training began at 11"),
        (log(11, 15), 10, 10, "without resuming"),
        (log(11, 25, resumed=10), 10, 10, "iteration 25 was reached, and 10 is on the disk"),
        (log(1, 12), 0, 0, "iteration 12 was reached, and 0 is on the disk"),
        ("", 20, 10, "iteration 20 was on the disk, now it is 10"),
    ],
)
def test_losses_of_training_are_seen(text, newest, left, message):
    with pytest.raises(faults.LostError, match=message):
        faults.check_resume(text, newest, left)


def test_a_line_that_the_log_file_could_not_take_counts_once():
    echo = "\n--- Logging error ---\nMessage: 'Iter(train) [  3/90]  lr: 1.0e-03'\n"
    assert faults.iterations(log(1, 3) + echo) == [1, 2, 3]


def test_torn_checkpoints_are_seen(tmp_path):
    assert faults.whole(tmp_path) == 0
    for step in (10, 20):
        torch.save({"state_dict": torch.zeros(100)}, tmp_path / f"iter_{step}.pth")
    before = faults.written(tmp_path)
    assert faults.whole(tmp_path) == 20
    assert not faults.torn(tmp_path, before)
    content = (tmp_path / "iter_20.pth").read_bytes()
    (tmp_path / "iter_30.pth").write_bytes(content[: len(content) // 2])
    assert faults.whole(tmp_path) == 20
    assert faults.torn(tmp_path, before)
    assert not faults.torn(tmp_path, faults.written(tmp_path))  # of an earlier fault


def test_losses_of_records_are_seen(tmp_path):
    file = tmp_path / "records.jsonl"
    assert faults.parsed(file) == {}
    first, second = (json.dumps({"variant": name, "seed": 0}) for name in ("ce", "ours"))
    file.write_text(f"{first}\n{second[:9]}")  # the next start cuts it off
    assert faults.parsed(file) == {("ce", 0): first}
    file.write_text(f"{second[:9]}\n{first}\n")
    with pytest.raises(faults.LostError, match="does not parse"):
        faults.parsed(file)
    file.write_text(f"{first}\n{second}\n{first}\n")
    with pytest.raises(faults.LostError, match=r"has \('ce', 0\) twice"):
        faults.parsed(file)


@pytest.mark.parametrize("part", faults.PLANS)
def test_the_draws_depend_on_the_seed_alone(part):
    chains = faults.plan(part, 0, True, None)
    assert chains == faults.plan(part, 0, True, None) != faults.plan(part, 1, True, None)
    assert sum(map(len, chains)) == {"training": 80, "benchmark": 28}[part]
    assert {kind for chain in chains for *_, kind in chain} == set(faults.KINDS)
    rest = faults.plan(part, 0, False, None)
    assert {kind for chain in rest for *_, kind in chain} == set(faults.SIGNALS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("part", faults.PLANS)
def test_nothing_is_lost(part, tmp_path):
    lines = faults.run(part, tmp_path, seed=7, limit=1)
    assert [line["lost"] for line in lines] == [None] * faults.CHAIN
    again = faults.run(part, tmp_path, seed=7, limit=1)  # has nothing to do
    assert again == lines


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_rank_that_leaves_late(tmp_path):
    lines = exits.run(tmp_path, 2)
    assert [line["side"] for line in lines] == ["plain", "ours"] * 2
    assert all(line["worked"] for line in lines)
    assert not any(line["died"] for line in lines if line["side"] == "ours")


def test_counts_of_exits():
    line = {"late": 0, "seconds": 1.0, "worked": True, "codes": [0, 0], "died": False}
    line |= {"side": "ours", "terminate": False}
    died = {**line, "side": "plain", "codes": [-6, 0], "died": True, "terminate": True}
    plain, ours = exits.summary([line, died, line])
    assert plain == {
        "side": "plain", "runs": 1, "worked": 1, "died": 1, "terminate": 1, "codes": {"-6": 1}
    }  # fmt: skip
    assert (ours["runs"], ours["worked"], ours["died"], ours["codes"]) == (2, 2, 0, {})


@pytest.mark.parametrize("module", [faults, exits], ids=lambda module: module.__name__)
def test_the_page_has_the_recorded_counts(module):
    record = json.loads((DOCS / f"{module.__name__}.json").read_text())
    page = (DOCS / "faults.md").read_text()
    start, end = report.MARKS
    text = page.partition(start.format(module.__name__))[2].partition(end)[0]
    assert text == "\n" + faults.block(record, module.markdown(record["rows"]))
    assert all(row.get("lost", 0) == 0 for row in record["rows"])
