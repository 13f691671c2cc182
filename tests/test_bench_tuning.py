"""Tuning: what is chosen, from records alone."""

import pytest
from benchmarks import all_records, tuned, written

pytest.importorskip("mmseg")

from ohem_mm.bench.tuning import choose, drops

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_each_variant_has_its_own_best_on_val():
    benchmark = tuned()
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
        changed = tuned(("0.1]}", f"0.1], drop_below: {margin}}}"))
        assert drops(changed, choices) == dropped


def test_the_mean_over_the_tuning_seeds_decides():
    benchmark = tuned(("0.1]}", "0.1], seeds: [0, 5]}"))
    runs = []
    for value, scores in ((0.001, (50, 60)), (0.01, (59, 50)), (0.1, (10, 99))):
        for seed, val in zip((0, 5), scores, strict=True):
            start = {"variant": "ce", "tuned": value, "seed": seed}
            runs.append(written(start, val, 0))
    (choice,) = choose(benchmark, runs[:-1], ["ce"]).values()
    # The last value lacks a seed, so nothing is final.
    assert (choice.best, choice.best_score, choice.finished) == (0.001, 55, False)
    assert choice.missing == ((0.1, 5),)
    (choice,) = choose(benchmark, [*runs[:-1], written(start, 30, 0)], ["ce"]).values()
    assert (choice.best, choice.finished) == (0.001, True)


def test_a_training_that_diverged_is_never_the_best():
    benchmark = tuned()
    runs = [
        written({"variant": "ce", "tuned": value, "seed": 0}, val, 0)
        for value, val in ((0.001, float("nan")), (0.01, 30), (0.1, float("nan")))
    ]
    (choice,) = choose(benchmark, runs, ["ce"]).values()
    assert (choice.best, choice.best_score) == (0.01, 30)
