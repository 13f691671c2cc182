"""The value of a setting at which each variant does best, from records alone.

Pure functions: the scheduler asks them what to run next, the report what to show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ohem_mm.bench.files import Benchmark

Run = dict[str, Any]


@dataclass(frozen=True)
class Choice:
    """What tuning found for one variant."""

    variant: str
    scores: dict[float, dict[int, float]]  # value, then seed: the score on the split that chooses
    missing: tuple[tuple[float, int], ...]  # (value, seed) that tuning has not seen yet

    @property
    def means(self) -> dict[float, float]:
        """Mean over the tuning seeds, for the values that have all of them."""
        open_ = {value for value, _ in self.missing}
        return {v: fmean(seeds.values()) for v, seeds in self.scores.items() if v not in open_}

    @property
    def finished(self) -> bool:
        """Whether all values have been tried with all tuning seeds."""
        return not self.missing

    @property
    def best(self) -> float | None:
        """The value with the highest mean, the smaller one of two that are equal."""
        # NaN (a training that diverged) is never the best.
        means = {v: -math.inf if math.isnan(m) else m for v, m in self.means.items()}
        return max(means, key=means.__getitem__) if means else None

    @property
    def best_score(self) -> float:
        """The mean at the best value; NaN where there is none."""
        return math.nan if self.best is None else self.means[self.best]

    @property
    def at_end(self) -> bool:
        """Whether the best value is the smallest or the largest one of those tried."""
        return self.finished and self.best in (min(self.scores), max(self.scores))


def tuning_score(benchmark: Benchmark, run: Run) -> float:
    """The score of a run on the split that chooses: on ``val``, after the training."""
    assert benchmark.tune is not None
    reported = benchmark.tune.split == benchmark.split
    return float(run["metrics"][benchmark.metric] if reported else run["curve"][-1][1])


def choose(benchmark: Benchmark, runs: Iterable[Run], variants: Iterable[str]) -> dict[str, Choice]:
    """What tuning has found for some variants, from records of the current configs alone."""
    tune = benchmark.tune
    assert tune is not None
    found = {
        (run["variant"], float(run["tuned"]), run["seed"]): tuning_score(benchmark, run)
        for run in runs
        if run.get("tuned") is not None
    }
    tried = list(itertools.product(tune.values, tune.seeds))
    choices = {}
    for name in variants:
        scores: dict[float, dict[int, float]] = {value: {} for value in tune.values}
        for value, seed in tried:
            if (name, value, seed) in found:
                scores[value][seed] = found[name, value, seed]
        missing = tuple((value, seed) for value, seed in tried if seed not in scores[value])
        choices[name] = Choice(name, scores, missing)
    return choices


def drops(benchmark: Benchmark, choices: Mapping[str, Choice]) -> dict[str, float]:
    """The variants that get no further seeds, and how many points each lies behind its baseline."""
    assert benchmark.tune is not None
    margin = benchmark.tune.drop_below
    dropped: dict[str, float] = {}
    for name, choice in choices.items():
        base = choices.get(benchmark.baseline_of(name))
        if margin is not None and base is not None and base.finished and choice.finished:
            behind = base.best_score - choice.best_score
            # A variant whose every training diverged has no score.
            if name != base.variant and (behind > margin or math.isnan(choice.best_score)):
                dropped[name] = behind
    return dropped
