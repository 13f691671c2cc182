"""All jobs of a benchmark: what is due, in which order, and the processes that do it."""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ohem_mm
from ohem_mm import cli
from ohem_mm.bench.files import Benchmark, Tune, Variant, check_shared_value
from ohem_mm.bench.progress import display_for, say
from ohem_mm.bench.records import append_record, read_records, record_key
from ohem_mm.bench.text import clock
from ohem_mm.bench.tuning import Choice, choose, drops
from ohem_mm.disk import read_json, write_json
from ohem_mm.system import kill_group, lock, own_group

# After cli, which says what to install when mmengine is missing.
from mmengine.config import Config  # isort: skip

POLL = 0.3  # seconds between two looks at the running jobs


@dataclass(eq=False)
class Job:
    """A variant with a seed, and the process that runs it."""

    name: str  # for people
    cfg: Config
    folder: Path
    record: dict[str, Any]  # what is known of the record before the run
    process: subprocess.Popen[bytes] | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"text": "starting", "share": 0.0})
    first: tuple[float, float] | None = None  # time and share when progress was first seen

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
        if self.first is None and self.share > 0:
            self.first = time.monotonic(), self.share

    @property
    def seconds_left(self) -> float | None:
        """Of the training."""
        if self.first is None or self.share == self.first[1]:
            return None
        rate = (time.monotonic() - self.first[0]) / (self.share - self.first[1])
        return rate * (1 - self.share)


class Plan:
    """The jobs of a benchmark, each built and checked before anything is run.

    With ``tune`` not all of them are known at once: which value a variant keeps is seen when its
    tuning is done.

    Args:
        benchmark: The benchmark file.
        args: The tool's command line.
        folder: Where the jobs work.

    Raises:
        UserError: Something in the benchmark file or on the command line does not fit.
    """

    def __init__(self, benchmark: Benchmark, args: argparse.Namespace, folder: Path) -> None:
        self.benchmark, self.args, self.folder = benchmark, args, folder
        self.names = list(dict.fromkeys(args.variants or benchmark.variants))
        for name in self.names:
            if name not in benchmark.variants:
                raise cli.UserError(
                    f"{benchmark.path} has no variant {name!r}; it has "
                    + ", ".join(benchmark.variants)
                )
        self.seeds = list(dict.fromkeys(args.seeds or benchmark.seeds))
        tune = benchmark.tune
        values: tuple[float | None, ...] = (None,) if tune is None else tune.values
        if args.at is not None:
            values = (check_shared_value(benchmark, args.at),)
        # The baselines too: whether a variant is dropped depends on them.
        bases = [benchmark.baseline_of(name) for name in self.names] if tune else []
        self.configs: dict[tuple[str, float | None], tuple[Config, str, str]] = {}
        loaded: dict[str, Config] = {}
        for name in dict.fromkeys([*self.names, *bases]):
            variant = benchmark.variants[name]
            for value in values:
                try:
                    built = _variant_config(benchmark, variant, value, args, loaded)
                except cli.UserError as error:
                    where = f"variant {name!r} of {benchmark.path}"
                    raise cli.UserError(f"{where}: {error}") from error
                self.configs[name, value] = built
        self.jobs: dict[tuple[str, float | None, int], Job] = {}
        self.told: set[str] = set()

    def job(self, name: str, value: float | None, seed: int) -> Job:
        """The job of a variant at a value of what is tuned, with a seed."""
        key = name, value, seed
        if key not in self.jobs:
            benchmark, args = self.benchmark, self.args
            cfg, hashed, untuned = self.configs[name, value]
            own = copy.deepcopy(cfg)
            own["randomness"] = {**(own.get("randomness") or {}), "seed": seed}
            own.work_dir = str(self.folder / name / f"seed{seed}-{hashed}")
            variant = benchmark.variants[name]
            record = {
                "benchmark": benchmark.name,
                "variant": name,
                "label": variant.label,
                **({} if value is None else {"tuned": value, "untuned_hash": untuned}),
                "seed": seed,
                "config": variant.config,
                "config_hash": hashed,
                "cfg_options": args.cfg_options,
                "split": benchmark.split,
                "jobs": args.jobs,
                "threads": args.threads,
                "launcher": args.launcher,
                "processes": args.gpus if args.launcher != "none" else 1,
            }
            label = name
            if value is not None and benchmark.tune is not None:
                label += f", {benchmark.tune.label(value)}"
            self.jobs[key] = Job(f"{label}, seed {seed}", own, Path(own.work_dir), record)
        return self.jobs[key]

    def choices(self, records: list[dict[str, Any]]) -> dict[str, Choice]:
        """What tuning has found so far, from the records of these very configs."""
        hashes = {(name, value): hashed for (name, value), (_, hashed, _) in self.configs.items()}
        runs = [
            record
            for record in records
            if record["benchmark"] == self.benchmark.name
            and hashes.get((record["variant"], record.get("tuned"))) == record["config_hash"]
        ]
        return choose(self.benchmark, runs, {name: None for name, _ in self.configs})

    def due(self, records: list[dict[str, Any]]) -> list[Job]:
        """All jobs that are known, finished ones too, in the order in which they are run."""
        tune, at = self.benchmark.tune, self.args.at
        if tune is None or at is not None:
            # Seed by seed: an unfinished benchmark compares whole pairs.
            return [self.job(name, at, seed) for seed in self.seeds for name in self.names]
        jobs = [
            self.job(name, value, seed)
            for seed in tune.seeds
            for name in self.names
            for value in tune.values
        ]
        choices = self.choices(records)
        dropped = drops(self.benchmark, choices)
        for seed in self.seeds:
            for name in self.names:
                base = choices[self.benchmark.baseline_of(name)]
                # A variant waits for its baseline, unless that is not to be tuned in this run.
                waits = not base.finished and base.variant in self.names
                if choices[name].finished and not waits and name not in dropped:
                    job = self.job(name, choices[name].best, seed)
                    if job not in jobs:
                        jobs.append(job)
        return jobs

    def total(self, records: list[dict[str, Any]]) -> int:
        """How many jobs there are, with those that are not known yet."""
        tune = self.benchmark.tune
        if tune is None or self.args.at is not None:
            return len(self.names) * len(self.seeds)
        dropped = drops(self.benchmark, self.choices(records))
        kept = [name for name in self.names if name not in dropped]
        later = set(self.seeds) - set(tune.seeds)
        return len(self.names) * len(tune.values) * len(tune.seeds) + len(kept) * len(later)

    def news(self, records: list[dict[str, Any]]) -> list[str]:
        """What tuning has decided since this was last asked."""
        tune = self.benchmark.tune
        if tune is None or self.args.at is not None:
            return []
        choices = self.choices(records)
        lines = []
        for name, choice in choices.items():
            if choice.finished and choice.best is not None:
                end = ", the end of the range" if choice.at_end else ""
                score = f"{tune.split} {self.benchmark.metric} {choice.best_score:.2f}"
                lines.append(f"{name}: best at {tune.label(choice.best)}{end} ({score})")
        for name, behind in drops(self.benchmark, choices).items():
            lines.append(
                f"{name}: {behind:.2f} behind {self.benchmark.baseline_of(name)}, no further seeds"
            )
        new = [line for line in lines if line not in self.told]
        self.told.update(new)
        return new


def _variant_config(
    benchmark: Benchmark,
    variant: Variant,
    value: float | None,
    args: argparse.Namespace,
    loaded: dict[str, Config],
) -> tuple[Config, str, str]:
    """The config of a variant at a value of what is tuned.

    Args:
        benchmark: The benchmark file.
        variant: One of its variants.
        value: Of what is tuned; None: nothing is.
        args: The tool's command line.
        loaded: Config files as they were read, each once; this one is added.

    Returns:
        The config, the hash of all that makes its results, and the hash of what the runs that
        tuning may compare have in common.
    """
    if variant.config not in loaded:
        load = argparse.Namespace(
            config=variant.config, cfg_options={}, launcher="none", work_dir="", local_rank=0
        )
        loaded[variant.config] = cli.load_config(load)
    cfg = copy.deepcopy(loaded[variant.config])
    for options in (benchmark.cfg_options, *variant.cfg_options):
        cli.apply_options(cfg, copy.deepcopy(options))
    if benchmark.amp:
        cli.use_bf16(cfg)
    if benchmark.channels_last:
        cli.use_channels_last(cfg)
    cli.apply_options(cfg, copy.deepcopy(args.cfg_options))
    if benchmark.split == "val":
        cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
        cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)
        cfg.test_cfg = cfg.get("test_cfg") or {"type": "TestLoop"}
    untuned = ""
    if benchmark.tune is not None and value is not None:
        untuned = _hash(cfg, [benchmark.tune.keys, benchmark.tune.scale])
        _set_tuned(cfg, benchmark.tune, value, variant, args)
    hashed = _hash(cfg)

    # What follows changes where the data lie and what is recorded, not the results.
    data_root = args.data_root or benchmark.data_root
    if data_root is not None:
        cli.apply_options(cfg, {"data_root": data_root})
    checkpoint = cfg.default_hooks.get("checkpoint")
    if checkpoint is None:
        raise cli.UserError("default_hooks.checkpoint is missing, and a killed job could not go on")
    cli.keep_two_checkpoints(cfg)
    if not any(
        cli.type_name(node) == "IoUMetric" for _, node in cli.iter_dicts(cfg.test_evaluator)
    ):
        raise cli.UserError("test_evaluator must be mmseg's IoUMetric")
    hooks = list(cfg.get("custom_hooks") or [])
    mines = any(
        cli.type_name(node) == ohem_mm.OhemCrossEntropyLoss.__name__
        for _, node in cli.iter_dicts(cfg.model)
    )
    monitor = "OhemMonitorHook"
    if mines and hasattr(ohem_mm.hooks, monitor) and monitor not in map(cli.type_name, hooks):
        cfg.custom_hooks = [*hooks, {"type": monitor}]
    if benchmark.tune is not None:
        _check_choosing_split(cfg, benchmark)
    cli.check_losses(cfg)
    cli.check_hooks(cfg)
    cli.check_amp_device(cfg)
    cli.check_pretrained(cfg)
    cli.check_datasets(cfg, ("train", "val", "test"))
    return cfg, hashed, untuned


def _hash(cfg: Config, *more: Any) -> str:
    """The hash of all that makes the results of a config, and of what else is given."""
    content = cfg.to_dict()
    for key in ("work_dir", "launcher", "resume"):
        content.pop(key, None)
    (content.get("randomness") or {}).pop("seed", None)
    text = json.dumps([content, *more] if more else content, sort_keys=True, default=str)
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()[:10]


def _set_tuned(
    cfg: Config, tune: Tune, value: float, variant: Variant, args: argparse.Namespace
) -> None:
    """Set the tuned keys of a config to a value, or multiply what it has by it."""
    options = {}
    for key in tune.keys:
        if key in args.cfg_options:
            raise cli.UserError(f"--cfg-options {key}: tune sets this key; --at chooses a value")
        if not tune.scale:
            if any(key in given for given in variant.cfg_options):
                raise cli.UserError(
                    f"cfg_options has {key}, which tune sets to the same values in all variants; "
                    "with scales instead of values each variant keeps its own"
                )
            options[key] = value
            continue
        node: Any = cfg
        for part in key.split("."):
            try:
                node = node[int(part)] if isinstance(node, list | tuple) else node[part]
            except (KeyError, IndexError, ValueError, TypeError):
                raise cli.UserError(f"tune: the config has no {key} to scale") from None
        if isinstance(node, bool) or not isinstance(node, int | float):
            raise cli.UserError(f"tune: {key} is {node!r} in the config; scales need a number")
        options[key] = node * value
    cli.apply_options(cfg, options)


def _check_choosing_split(cfg: Config, benchmark: Benchmark) -> None:
    """Check that training ends with a validation, and that it does not choose on the test images.

    Raises:
        UserError: It is not so.
    """
    assert benchmark.tune is not None
    if benchmark.tune.split == benchmark.split:
        return
    if cfg.get("val_dataloader") is None or cfg.get("val_evaluator") is None:
        raise cli.UserError(
            "tune chooses on val, but the config has no val_dataloader or no val_evaluator"
        )
    if cfg.val_dataloader.dataset == cfg.test_dataloader.dataset:
        raise cli.UserError(
            "tune chooses on val, and val_dataloader and test_dataloader have the same images; "
            "give val_dataloader.dataset other ones, or say split: test in tune, which the report "
            "then tells"
        )


def class_shares(cfg: Config, cache: Path) -> list[float]:
    """The share of each class in the labelled pixels of the training set, counted once."""
    known: dict[str, list[float]] = read_json(cache) or {}
    dataset_cfg = copy.deepcopy(cfg.train_dataloader.dataset)
    for _, node in cli.iter_dicts(dataset_cfg):
        if "pipeline" in node:
            steps = node["pipeline"]
            node["pipeline"] = [s for s in steps if cli.type_name(s) == "LoadAnnotations"]
        if cli.type_name(node) == "RepeatDataset":
            node["times"] = 1
    key = hashlib.sha1(str(dataset_cfg).encode(), usedforsecurity=False).hexdigest()
    if key in known:
        return known[key]

    import mmseg.datasets  # noqa: F401  (registers them)
    from mmengine.registry import init_default_scope
    from mmseg.registry import DATASETS

    init_default_scope("mmseg")
    dataset = DATASETS.build(dataset_cfg)
    count = torch.zeros(len(dataset.metainfo["classes"]), dtype=torch.int64)
    say(f"counting the classes of {len(dataset)} training images")
    for i in range(len(dataset)):
        labels = torch.as_tensor(dataset[i]["gt_seg_map"]).flatten().long()
        count += torch.bincount(labels, minlength=len(count))[: len(count)]
    known[key] = [round(share, 6) for share in (count / count.sum()).tolist()]
    write_json(cache, known)
    return known[key]


def run_benchmark(benchmark: Benchmark, args: argparse.Namespace, records: Path) -> None:
    """Run all jobs that have no record yet.

    Raises:
        UserError: Something is wrong with the benchmark, or another process runs it.
        SystemExit: A job failed, or the user stopped the run.
    """
    if args.launcher == "slurm" and not args.partition:
        raise cli.UserError("--launcher slurm needs --partition")
    if args.launcher == "slurm" and shutil.which("srun") is None:
        raise cli.UserError("--launcher slurm needs srun, and this machine has none")
    folder = Path(args.work_dir or "work_dirs", benchmark.name)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        if not lock(file, wait=False):
            raise cli.UserError(f"another process runs this benchmark in {str(folder)!r}")
        args.threads = benchmark.threads or max(1, (os.cpu_count() or 1) // args.jobs)
        plan = Plan(benchmark, args, folder)
        waiting, done = _waiting(plan, records)
        total = plan.total(read_records(records))
        say(f"{benchmark.title}: {total} jobs, {done} of them finished before ({records})")
        for line in plan.news(read_records(records)):
            say(line)
        if not waiting:
            say("nothing is left to run; to run them again, give another file with --records")
        else:
            failed = _run_jobs(plan, records)
            _complain(failed, total)


def _waiting(plan: Plan, records: Path) -> tuple[list[Job], int]:
    """The jobs that have no record yet, and how many have one."""
    while True:
        known = read_records(records)
        due = plan.due(known)
        waiting = [job for job in due if not collect(job, records, plan.args.keep_checkpoints)]
        # A record that is taken over now may end a tuning, and more is due then.
        if len(read_records(records)) == len(known):
            return waiting, len(due) - len(waiting)


def collect(job: Job, records: Path, keep_checkpoints: bool) -> bool:
    """Take over the record of a job, if it has finished, and drop its checkpoints."""
    key = record_key(job.record)
    if key not in map(record_key, read_records(records)):
        record = read_json(job.folder / "record.json")
        if record is None or record_key(record) != key:
            return False
        append_record(records, record)
    if not keep_checkpoints:
        for checkpoint in job.folder.glob("*.pth"):
            checkpoint.unlink()
    return True


def _run_jobs(plan: Plan, records: Path) -> list[Job]:
    """Run the jobs, ``--jobs`` at a time; return those that failed."""
    args = plan.args
    slots: dict[int, Job] = {}
    failed: list[Job] = []
    waiting, before = _waiting(plan, records)
    with display_for(plan.total(read_records(records)) - before) as display:
        try:
            while waiting or slots:
                for slot in range(args.jobs):
                    if slot not in slots and waiting:
                        slots[slot] = job = waiting.pop(0)
                        shares = class_shares(job.cfg, plan.folder / "class_shares.json")
                        job.record["class_shares"] = shares
                        _start(job, slot, args)
                        display.started(job)
                time.sleep(POLL)
                for slot, job in list(slots.items()):
                    job.look()
                    if job.process is None or job.process.poll() is None:
                        continue
                    del slots[slot]
                    if job.process.returncode == 0 and collect(job, records, args.keep_checkpoints):
                        record = read_json(job.folder / "record.json")
                        result = f"{args.metric} {record['metrics'][args.metric]:.2f}"
                        display.say(f"{job.name}: {result}, {clock(record['train_seconds'])}")
                        job.state = {"text": "done", "share": 1.0}
                    else:
                        failed.append(job)
                        display.say(f"{job.name}: failed, see {job.log}")
                    known = read_records(records)
                    for line in plan.news(known):
                        display.say(line)
                    busy = [*slots.values(), *failed]
                    waiting = [job for job in _waiting(plan, records)[0] if job not in busy]
                    display.count = plan.total(known) - before
                display.update(list(slots.values()), failed)
        except KeyboardInterrupt:
            display.say("stopped; the same command goes on from the last checkpoints")
            raise SystemExit(130) from None
        finally:
            for job in slots.values():
                _stop(job)
    return failed


def _start(job: Job, slot: int, args: argparse.Namespace) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    for name in ("progress.json", "record.json"):
        (job.folder / name).unlink(missing_ok=True)
    spec = {
        "record": job.record,
        "metric": args.metric,
        "launcher": args.launcher,
        "config_text": job.cfg.pretty_text,
    }
    write_json(job.folder / "job.json", spec)
    script = ["-m", "ohem_mm.bench.job", str(job.folder / "job.json")]
    command = [sys.executable, *script]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(args.threads)
    # The package of this process, wherever it was found.
    package = str(Path(ohem_mm.__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [package, environment.get("PYTHONPATH")])
    )
    gpus = torch.cuda.device_count()
    if args.launcher == "pytorch":
        options = ["--standalone", f"--nproc_per_node={args.gpus}"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, *script]
    elif args.launcher == "slurm":
        per_node = min(args.gpus, 8)
        options = [f"-p{args.partition}", f"--gres=gpu:{per_node}", f"--ntasks={args.gpus}"]
        options += [f"--ntasks-per-node={per_node}", "--kill-on-bad-exit=1"]
        command = ["srun", *options, *command]
    elif gpus > 1:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = visible if len(visible) == gpus else list(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = devices[slot % gpus]
    with job.log.open("ab") as log:
        job.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # never written: its end tells the job that we are gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            **own_group(),  # Ctrl-C is ours to handle
        )


def _stop(job: Job) -> None:
    if job.process is not None and job.process.poll() is None:
        if job.process.stdin is not None:
            job.process.stdin.close()
        try:
            job.process.wait(10)
        except subprocess.TimeoutExpired:
            kill_group(job.process)


def _complain(failed: list[Job], total: int) -> None:
    """Say which jobs failed and why.

    Raises:
        SystemExit: Status 1, when there are any.
    """
    if not failed:
        return
    print(f"error: {len(failed)} of {total} jobs failed", file=sys.stderr)
    for job in failed:
        code = job.process.returncode if job.process is not None else None
        print(f"--- {job.name}: exit status {code}, the log {job.log} ends with", file=sys.stderr)
        lines = job.log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
        print("\n".join(lines[-8:]), file=sys.stderr)
    print("the same command tries them again", file=sys.stderr)
    raise SystemExit(1)
