"""The jobs of a benchmark: what is due, and in which order."""

from __future__ import annotations

import argparse
import copy
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ohem_mm import cli
from ohem_mm.bench.files import Benchmark
from ohem_mm.bench.tuning import Choice, choose, drops
from ohem_mm.bench.variants import Built, build_config
from ohem_mm.disk import read_json

# After cli, which says what to install when mmengine is missing.
from mmengine.config import Config  # isort: skip

NO_OPTIONS = {"cfg_options": {}, "launcher": "none", "work_dir": "", "local_rank": 0}


@dataclass(eq=False)
class Job:
    """A variant with a seed, and the process that runs it."""

    name: str  # for people
    cfg: Config
    folder: Path
    record: dict[str, Any]  # what is known of the record before the run
    process: subprocess.Popen[bytes] | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"text": "starting", "share": 0.0})
    first: float = 0.0  # the share that was seen first

    @property
    def log(self) -> Path:
        """Everything that the process prints."""
        return self.folder / "job.log"

    @property
    def share(self) -> float:
        """How much of the training is done, from 0 to 1."""
        return float(self.state["share"])

    def look(self) -> None:
        """Read how far the process is."""
        self.state = read_json(self.folder / "progress.json") or self.state
        self.first = self.first or self.share


class Plan:
    """The jobs of a benchmark, each built and checked before anything is run.

    With ``tune`` not all of them are known at once: which value a variant keeps is seen when its
    tuning is done.
    """

    def __init__(self, benchmark: Benchmark, args: argparse.Namespace, folder: Path) -> None:
        self.benchmark, self.args, self.folder = benchmark, args, folder
        self.at = None if args.at is None else benchmark.shared_value(args.at)
        self.tune = benchmark.tune if self.at is None else None  # None: no variant chooses
        self.names = list(dict.fromkeys(args.variants or benchmark.variants))
        for name in self.names:
            if name not in benchmark.variants:
                raise cli.UserError(
                    f"{benchmark.path} has no variant {name!r}; it has "
                    + ", ".join(benchmark.variants)
                )
        self.seeds = list(dict.fromkeys(args.seeds or benchmark.seeds))
        # The baselines too: whether a variant is dropped depends on them.
        bases = [benchmark.baseline_of(name) for name in self.names] if benchmark.tune else []
        self.configs: dict[tuple[str, float | None], Built] = {}
        read: dict[str, Config] = {}  # config files, each once
        for name in dict.fromkeys([*self.names, *bases]):
            variant = benchmark.variants[name]
            try:
                if variant.config not in read:
                    line = argparse.Namespace(config=variant.config, **NO_OPTIONS)
                    read[variant.config] = cli.load_config(line)
                for value in self.tune.values if self.tune else [self.at]:
                    built = build_config(benchmark, variant, value, args, read[variant.config])
                    self.configs[name, value] = built
            except cli.UserError as error:
                where = f"variant {name!r} of {benchmark.path}"
                raise cli.UserError(f"{where}: {error}") from error
        self.jobs: dict[tuple[str, float | None, int], Job] = {}
        self.told: set[str] = set()

    def job(self, name: str, value: float | None, seed: int) -> Job:
        """The job of a variant at a value of what is tuned, with a seed."""
        key = name, value, seed
        if key not in self.jobs:
            benchmark, args, variant = self.benchmark, self.args, self.benchmark.variants[name]
            built = self.configs[name, value]
            cfg = copy.deepcopy(built.cfg)
            cfg["randomness"] = {**(cfg.get("randomness") or {}), "seed": seed}
            cfg.work_dir = str(self.folder / name / f"seed{seed}-{built.hashed}")
            record = {
                "benchmark": benchmark.name,
                "variant": name,
                "label": variant.label,
                **({} if value is None else {"tuned": value, "untuned_hash": built.untuned}),
                "seed": seed,
                "config": variant.config,
                "config_hash": built.hashed,
                "cfg_options": args.cfg_options,
                "split": benchmark.split,
                "jobs": args.jobs,
                "threads": args.threads,
                "launcher": args.launcher,
                "processes": args.gpus if args.launcher != "none" else 1,
            }
            if value is not None and benchmark.tune is not None:
                name += f", {benchmark.tune.label(value)}"
            self.jobs[key] = Job(f"{name}, seed {seed}", cfg, Path(cfg.work_dir), record)
        return self.jobs[key]

    def choices(self, records: list[dict[str, Any]]) -> dict[str, Choice]:
        """What tuning has found so far, from the records of these very configs."""
        hashes = {key: built.hashed for key, built in self.configs.items()}
        runs = [
            record
            for record in records
            if record["benchmark"] == self.benchmark.name
            and hashes.get((record["variant"], record.get("tuned"))) == record["config_hash"]
        ]
        return choose(self.benchmark, runs, dict.fromkeys(name for name, _ in self.configs))

    def due(self, records: list[dict[str, Any]]) -> list[Job]:
        """All jobs that are known, finished ones too, in the order in which they are run."""
        if self.tune is None:
            # Seed by seed: an unfinished benchmark compares whole pairs.
            return [self.job(name, self.at, seed) for seed in self.seeds for name in self.names]
        jobs = [
            self.job(name, value, seed)
            for seed in self.tune.seeds
            for name in self.names
            for value in self.tune.values
        ]
        choices = self.choices(records)
        dropped = drops(self.benchmark, choices)
        for seed in self.seeds:
            for name in self.names:
                base = choices[self.benchmark.baseline_of(name)]
                # A variant waits for its baseline, unless that is not to be tuned in this run.
                waits = not base.finished and base.variant in self.names
                if choices[name].finished and not waits and name not in dropped:
                    jobs.append(self.job(name, choices[name].best, seed))
        return list(dict.fromkeys(jobs))

    def total(self, records: list[dict[str, Any]]) -> int:
        """How many jobs there are, with those that are not known yet."""
        if self.tune is None:
            return len(self.names) * len(self.seeds)
        dropped = drops(self.benchmark, self.choices(records))
        kept = [name for name in self.names if name not in dropped]
        later = set(self.seeds) - set(self.tune.seeds)
        tuning = len(self.names) * len(self.tune.values) * len(self.tune.seeds)
        return tuning + len(kept) * len(later)

    def news(self, records: list[dict[str, Any]]) -> list[str]:
        """What tuning has decided since this was last asked."""
        if self.tune is None:
            return []
        choices = self.choices(records)
        lines = []
        for name, choice in choices.items():
            if choice.finished and choice.best is not None:
                end = ", the end of the range" if choice.at_end else ""
                score = f"{self.tune.split} {self.benchmark.metric} {choice.best_score:.2f}"
                lines.append(f"{name}: best at {self.tune.label(choice.best)}{end} ({score})")
        for name, behind in drops(self.benchmark, choices).items():
            lines.append(
                f"{name}: {behind:.2f} behind {self.benchmark.baseline_of(name)}, no further seeds"
            )
        new = [line for line in lines if line not in self.told]
        self.told.update(new)
        return new
