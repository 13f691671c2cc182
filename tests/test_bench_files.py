"""Benchmark files: what they say, and what is said of mistakes in them."""

import re

import pytest
from benchmarks import BENCH, COMPARED, GRID, LR, tuned, write_yaml

pytest.importorskip("mmseg")

from ohem_mm import cli
from ohem_mm.bench import files
from ohem_mm.config import config_path

pytestmark = pytest.mark.usefixtures("elsewhere")


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


def test_a_benchmark_file_that_is_not_there():
    with pytest.raises(cli.UserError, match=r"^no benchmark file is called 'nosuch'; those") as no:
        files.load_benchmark("nosuch")
    assert "quickstart/benchmark.yaml" in str(no.value)
    assert "metafile" not in str(no.value)


def test_quickstart_file():
    bench = files.load_benchmark("ohem_mm::quickstart/benchmark.yaml")
    assert bench.shown_path == "quickstart/benchmark.yaml"
    assert len(bench.seeds) >= 2
    for variant in bench.variants.values():
        assert config_path(variant.config).is_file()


def test_tune_of_a_benchmark_file():
    tune = tuned().tune
    assert (tune.keys, tune.name, tune.scale) == ((LR,), "lr", False)
    assert (tune.values, tune.seeds, tune.split) == ((0.001, 0.01, 0.1), (0,), "val")
    assert tune.drop_below == 1.5
    assert tune.label(0.01) == "lr 0.01"
    tune = tuned(
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
        tuned((old, new))
