"""Accuracy of losses on one data set: paired training runs, records, tables and plots.

    python tools/benchmark_miou.py quickstart                  # scenes: no data, a few minutes
    python tools/benchmark_miou.py run camvid/frozen.yaml --data-root data/camvid --jobs 2
    python tools/benchmark_miou.py report camvid/frozen.yaml --plot plots

A benchmark file names configs, what each variant changes in them, and seeds. Each variant with each
seed is a job: a process that trains and tests through mmengine's Runner. Runs of one seed start
from the same weights and see the same batches in the same order. A finished job is one JSON line in
the records, and tables and plots are made from the records alone. Stop or kill it at any time: the
same command goes on from the last checkpoints and runs no finished job again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# As in train.py: torch's threads must not spin while other processes want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

import ohem_mm
from ohem_mm import cli, report
from ohem_mm.benchmark import (
    Benchmark,
    Variant,
    append_record,
    load_benchmark,
    lock,
    read_json,
    read_records,
    record_key,
    write_json,
)
from ohem_mm.config import config_path
from ohem_mm.report import clock

# After cli, which says what to install when mmengine is missing.
from mmengine.config import Config, DictAction  # isort: skip
from mmengine.hooks import Hook  # isort: skip

POLL = 0.3  # seconds between two looks at the running jobs
PLAIN_EVERY = 60  # seconds between two lines of progress where there is no terminal
HASHED_BATCHES = 10
MIB = 2**20


# --- one job: a process of its own -----------------------------------------------------------


class JobHook(Hook):
    """Reports progress, and collects what the record says about the training.

    What it collects lies in the message hub, so checkpoints carry it through a kill.
    """

    # Before the hook that writes checkpoints.
    priority = "VERY_HIGH"

    def __init__(self, folder: Path, metric: str) -> None:
        self.folder = folder
        self.metric = metric
        self.written = 0.0
        self.notes: dict[str, Any] = {}  # the message hub holds this very object

    def progress(self, runner: Any, text: str, done: int, loss: Any = None) -> None:
        """Tell the parent, about once a second; ``done`` counts iterations of the training."""
        if runner.rank > 0 or (time.monotonic() - self.written < 1 and done > 1):
            return
        self.written = time.monotonic()
        if loss is not None:
            text += f", loss {float(loss):.3f}"
        share = done / runner.max_iters
        write_json(self.folder / "progress.json", {"text": text, "share": share})

    def before_train(self, runner: Any) -> None:
        """Fingerprint the initial weights; make up for a validation that a kill prevented."""
        if runner.iter == 0:
            model = getattr(runner.model, "module", runner.model)
            # Parameters alone: a loss may keep settings (class weights) in buffers.
            weights = digest(model.parameters())
            self.notes = {"weights": weights, "order": "", "batches": []}
            self.notes |= {"curve": [], "memory": 0.0, "resumed": []}
        else:
            self.notes = runner.message_hub.get_info("benchmark")
            self.notes["resumed"].append(runner.iter)
        runner.message_hub.update_info("benchmark", self.notes)
        loop = runner.train_loop
        interval = getattr(loop, "val_interval", 0)
        # The checkpoint of an iteration is written before its validation.
        if (
            runner.iter > 0
            and runner.val_loop is not None
            and type(loop).__name__ == "IterBasedTrainLoop"
            and runner.iter >= loop.val_begin
            and (runner.iter % interval == 0 or runner.iter == loop.max_iters)
        ):
            runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Fingerprint the order of the images, and the content of the first batches."""
        samples = data_batch["data_samples"]
        order = [self.notes["order"], *(str(sample.get("img_path")) for sample in samples)]
        self.notes["order"] = hashlib.sha1("\n".join(order).encode()).hexdigest()[:12]
        # A resumed run gets the same images, but mmengine may augment them differently.
        if batch_idx < HASHED_BATCHES and not self.notes["resumed"]:
            labels = [sample.gt_sem_seg.data for sample in samples]
            self.notes["batches"].append(digest([*data_batch["inputs"], *labels]))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Note the peak memory, and report progress."""
        self.notes["memory"] = max(self.notes["memory"], peak_memory())
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        done = runner.iter + 1
        self.progress(runner, f"train {done}/{runner.max_iters}", done, loss)

    def after_val_iter(self, runner: Any, batch_idx: int, **_: Any) -> None:
        """Report progress."""
        text = f"validate {batch_idx + 1}/{len(runner.val_dataloader)}"
        self.progress(runner, text, runner.iter)

    def after_test_iter(self, runner: Any, batch_idx: int, **_: Any) -> None:
        """Report progress."""
        text = f"test {batch_idx + 1}/{len(runner.test_dataloader)}"
        self.progress(runner, text, runner.max_iters)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add a point to the curve."""
        if metrics and self.metric in metrics:
            self.notes["curve"].append([runner.iter, round(float(metrics[self.metric]), 4)])


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A short hash of the bytes of some tensors."""
    total = hashlib.sha1(usedforsecurity=False)
    for tensor in tensors:
        total.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return total.hexdigest()[:12]


def peak_memory() -> float:
    """Peak memory of this process in MiB: allocated on the GPU, else resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere


def end_with_parent() -> None:
    """End this process when the parent ends, even by kill -9: then stdin reaches its end."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def provenance() -> dict[str, Any]:
    """Commit, versions and hardware of this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    # The continuation of OpenMMLab has the same import names under other package names.
    for names in (("onedl-mmengine", "mmengine"), ("onedl-mmsegmentation", "mmsegmentation")):
        for name in names:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
                break
    versions["ohem_mm"] = ohem_mm.__version__
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = found.group(1).strip() if found else cpu
    has_affinity = hasattr(os, "sched_getaffinity")
    hardware = {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    return {**_commit(), "versions": versions, "hardware": hardware}


def _commit() -> dict[str, Any]:
    """The commit of the checkout, and whether code or configs differ from it."""
    root = config_path("tools/train.py").parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return {"commit": None, "dirty": None}
        code = ("ohem_mm", "configs", "tools", ":!*.jsonl", ":!*.md")
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", *code)),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint: a kill may have torn the last one."""
    steps = {}
    for path in folder.glob("*.pth"):
        found = re.fullmatch(r"(?:iter|epoch)_(\d+)\.pth", path.name)
        # The table of contents of a zip file, which a checkpoint is, lies at its end.
        if found and zipfile.is_zipfile(path):
            steps[int(found.group(1))] = path
    return steps[max(steps)] if steps else None


def run_job(file: Path) -> None:
    """Train and test one variant with one seed, and write its record beside ``file``."""
    end_with_parent()
    folder = file.parent
    spec = json.loads(file.read_text())
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))
    with (folder / "lock").open("w") as file_lock:
        if rank == 0:
            lock(file_lock, wait=True)  # a predecessor, whose parent was killed, is about to end
        record = _train_and_test(spec, folder, provenance())
    if rank == 0:
        write_json(folder / "record.json", record)


def _train_and_test(
    spec: dict[str, Any], folder: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import METRICS

    per_class: dict[str, Any] = {}

    @METRICS.register_module()  # type: ignore[misc]
    class BenchmarkIoUMetric(IoUMetric):  # type: ignore[misc]
        """mmseg's metric; keeps the values of the classes, which mmseg prints and drops."""

        def compute_metrics(self, results: list[Any]) -> Any:
            areas = [sum(column) for column in zip(*results, strict=True)]
            per_class.update(self.total_area_to_metrics(*areas, metrics=["mIoU", "mDice"]))
            return super().compute_metrics(results)

    cfg = Config.fromstring(spec["config_text"], ".py")
    cfg.launcher = spec["launcher"]
    for _, node in cli.iter_dicts(cfg.test_evaluator):
        if cli.type_name(node) == "IoUMetric":
            node["type"] = BenchmarkIoUMetric.__name__
    checkpoint = latest_checkpoint(folder)
    if checkpoint is not None:
        cfg.resume, cfg.load_from = True, str(checkpoint)
    runner = cli.build_runner(cfg)
    runner.register_hook(JobHook(folder, spec["metric"]))
    runner.train()
    start = time.perf_counter()
    runner.test()
    test_seconds = time.perf_counter() - start
    if runner.rank > 0:  # mmengine brings all results to the first process
        return {}

    def percent(values: Any) -> list[float | None]:
        return [round(100 * float(v), 4) if math.isfinite(v) else None for v in values]

    def mean(name: str) -> float | None:
        values = [value for value in percent(per_class[name]) if value is not None]
        return round(statistics.fmean(values), 4) if values else None

    hub = runner.message_hub
    kept = {}
    for name, history in hub.log_scalars.items():
        found = re.fullmatch(r"train/ohem/(.+)/kept_share", name)
        if found:
            kept[found.group(1)] = round(float(history.data[0].mean()), 6)
    notes = hub.get_info("benchmark")
    return {
        **spec["record"],
        **provenance,
        "iterations": runner.max_iters,
        "train_seconds": round(float(hub.get_scalar("train/time").data[0].sum()), 1),
        "test_seconds": round(test_seconds, 1),
        "peak_memory_mib": round(notes["memory"], 1),
        "metrics": {
            "aAcc": percent([per_class["aAcc"]])[0],
            **{f"m{name}": mean(name) for name in ("IoU", "Acc", "Dice")},
        },
        "classes": list(runner.test_dataloader.dataset.metainfo["classes"]),
        "IoU": percent(per_class["IoU"]),
        "Dice": percent(per_class["Dice"]),
        "kept_share": kept or None,
        **{key: notes[key] for key in ("weights", "order", "batches", "resumed", "curve")},
        "loss": round(float(hub.get_scalar("train/loss").mean(50)), 6),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


# --- all jobs --------------------------------------------------------------------------------


@dataclass
class Job:
    """A variant with a seed, and the process that runs it."""

    variant: str
    seed: int
    cfg: Config
    folder: Path
    record: dict[str, Any]  # what is known of the record before the run
    process: subprocess.Popen[bytes] | None = None
    state: dict[str, Any] = field(default_factory=lambda: {"text": "starting", "share": 0.0})
    first: tuple[float, float] | None = None  # time and share when progress was first seen

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}, seed {self.seed}"

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


def make_jobs(benchmark: Benchmark, args: argparse.Namespace, folder: Path) -> list[Job]:
    """Build and check the config of every job, before anything is run."""
    names = dict.fromkeys(args.variants or benchmark.variants)
    for name in names:
        if name not in benchmark.variants:
            raise cli.UserError(
                f"{benchmark.path} has no variant {name!r}; it has {', '.join(benchmark.variants)}"
            )
    seeds = list(dict.fromkeys(args.seeds or benchmark.seeds))
    jobs = []
    for name in names:
        variant = benchmark.variants[name]
        try:
            cfg, hashed = _variant_config(benchmark, variant, args)
        except cli.UserError as error:
            raise cli.UserError(f"variant {name!r} of {benchmark.path}: {error}") from error
        for seed in seeds:
            own = copy.deepcopy(cfg)
            own["randomness"] = {**(own.get("randomness") or {}), "seed": seed}
            own.work_dir = str(folder / name / f"seed{seed}-{hashed}")
            record = {
                "benchmark": benchmark.name,
                "variant": name,
                "label": variant.label,
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
            jobs.append(Job(name, seed, own, Path(own.work_dir), record))
    # Seed by seed: an unfinished benchmark compares whole pairs.
    return sorted(jobs, key=lambda job: seeds.index(job.seed))


def _variant_config(
    benchmark: Benchmark, variant: Variant, args: argparse.Namespace
) -> tuple[Config, str]:
    """The config of a variant, and the hash of all that makes its results."""
    load = argparse.Namespace(
        config=variant.config, cfg_options={}, launcher="none", work_dir="", local_rank=0
    )
    cfg = cli.load_config(load)
    for options in (benchmark.cfg_options, *variant.cfg_options, args.cfg_options):
        cli.apply_options(cfg, copy.deepcopy(options))
    if benchmark.split == "val":
        cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
        cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)
        cfg.test_cfg = cfg.get("test_cfg") or {"type": "TestLoop"}
    content = cfg.to_dict()
    for key in ("work_dir", "launcher", "resume"):
        content.pop(key, None)
    (content.get("randomness") or {}).pop("seed", None)
    hashed = hashlib.sha1(
        json.dumps(content, sort_keys=True, default=str).encode(), usedforsecurity=False
    ).hexdigest()[:10]

    # What follows changes where the data lie and what is recorded, not the results.
    data_root = args.data_root or benchmark.data_root
    if data_root is not None:
        cli.apply_options(cfg, {"data_root": data_root})
    checkpoint = cfg.default_hooks.get("checkpoint")
    if checkpoint is None:
        raise cli.UserError("default_hooks.checkpoint is missing, and a killed job could not go on")
    # mmengine deletes the oldest checkpoint before it writes the next one.
    if 0 < checkpoint.get("max_keep_ckpts", -1) < 2:
        checkpoint["max_keep_ckpts"] = 2
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
    cli.check_losses(cfg)
    cli.check_hooks(cfg)
    cli.check_amp_device(cfg)
    cli.check_pretrained(cfg)
    cli.check_datasets(cfg, ("train", "val", "test"))
    return cfg, hashed


def class_shares(cfg: Config, cache: Path) -> list[float]:
    """The share of each class in the labelled pixels of the training set, counted once."""
    dataset_cfg = copy.deepcopy(cfg.train_dataloader.dataset)
    for _, node in cli.iter_dicts(dataset_cfg):
        if "pipeline" in node:
            steps = node["pipeline"]
            node["pipeline"] = [s for s in steps if cli.type_name(s) == "LoadAnnotations"]
        if cli.type_name(node) == "RepeatDataset":
            node["times"] = 1
    key = hashlib.sha1(str(dataset_cfg).encode(), usedforsecurity=False).hexdigest()
    cached = read_json(cache)
    if cached and cached["key"] == key:
        return list(cached["shares"])

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
    shares = [round(share, 6) for share in (count / count.sum()).tolist()]
    write_json(cache, {"key": key, "shares": shares})
    return shares


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


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
        jobs = make_jobs(benchmark, args, folder)
        waiting = [job for job in jobs if not collect(job, records, args.keep_checkpoints)]
        done = len(jobs) - len(waiting)
        say(f"{benchmark.title}: {len(jobs)} jobs, {done} of them finished before ({records})")
        if not waiting:
            say("nothing is left to run; to run them again, give another file with --records")
        if waiting:
            shares = class_shares(jobs[0].cfg, folder / "class_shares.json")
            for job in waiting:
                job.record["class_shares"] = shares
            failed = _run_jobs(waiting, args, records)
            _complain(failed, len(jobs))


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


def _run_jobs(jobs: list[Job], args: argparse.Namespace, records: Path) -> list[Job]:
    """Run the jobs, ``--jobs`` at a time; return those that failed."""
    slots: dict[int, Job] = {}
    waiting, failed = list(jobs), []
    with _display(jobs) as display:
        try:
            while waiting or slots:
                for slot in range(args.jobs):
                    if slot not in slots and waiting:
                        slots[slot] = waiting.pop(0)
                        _start(slots[slot], slot, args)
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
    script = [str(Path(__file__).resolve()), "job", str(job.folder / "job.json")]
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
            start_new_session=True,  # Ctrl-C is ours to handle
        )


def _stop(job: Job) -> None:
    if job.process is not None and job.process.poll() is None:
        if job.process.stdin is not None:
            job.process.stdin.close()
        try:
            job.process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


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
        lines = job.log.read_text(errors="replace").rstrip().splitlines()
        print("\n".join(lines[-8:]), file=sys.stderr)
    print("the same command tries them again", file=sys.stderr)
    raise SystemExit(1)


# --- progress --------------------------------------------------------------------------------


class Display:
    """Progress as plain lines, now and then."""

    def __init__(self, jobs: list[Job]) -> None:
        self.jobs = jobs
        self.start = self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        say(f"[{clock(time.monotonic() - self.start)}] {text}")

    def seconds_left(self, failed: list[Job]) -> float | None:
        """Of all jobs, from the work of this session."""
        done = sum(job.share - job.first[1] for job in self.jobs if job.first)
        left = sum(1 - job.share for job in self.jobs if job not in failed)
        return (time.monotonic() - self.start) / done * left if done > 0.01 else None

    def update(self, running: list[Job], failed: list[Job]) -> None:
        """Show the state of all jobs."""
        if running and time.monotonic() - self.shown > PLAIN_EVERY:
            self.shown = time.monotonic()
            jobs = "; ".join(f"{job.name}: {job.state['text']}" for job in running)
            self.say(f"{jobs}; about {clock(self.seconds_left(failed))} left")


class Bars(Display):
    """Progress as bars on a terminal."""

    def __init__(self, jobs: list[Job], progress: Any) -> None:
        super().__init__(jobs)
        self.progress = progress
        self.tasks: dict[str, Any] = {}
        self.all = progress.add_task("all jobs", total=len(jobs), text="", left="")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(text, markup=False, highlight=False)

    def update(self, running: list[Job], failed: list[Job]) -> None:
        """Show the state of all jobs."""
        names = {job.name for job in running}
        for name in [name for name in self.tasks if name not in names]:
            self.progress.remove_task(self.tasks.pop(name))
        for job in running:
            if job.name not in self.tasks:
                self.tasks[job.name] = self.progress.add_task(job.name, total=1, text="", left="")
            self.progress.update(
                self.tasks[job.name],
                completed=job.share,
                text=job.state["text"],
                left=clock(job.seconds_left),
            )
        finished = sum(job.share == 1 and job not in running for job in self.jobs)
        self.progress.update(
            self.all,
            completed=sum(job.share for job in self.jobs),
            text=f"{finished} of {len(self.jobs)} finished",
            left=clock(self.seconds_left(failed)),
        )


@contextlib.contextmanager
def _display(jobs: list[Job]) -> Iterator[Display]:
    if not sys.stdout.isatty():
        yield Display(jobs)
        return
    try:
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        raise cli.UserError(report.EXTRA.format("rich")) from None
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, TextColumn("{task.fields[left]} left")) as progress:
        yield Bars(jobs, progress)


# --- command line ----------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("run", "run the jobs that have no record yet, and print the report"),
        ("report", "print the report, from the records alone"),
        ("quickstart", "plain cross-entropy, mmseg's sampler and ours on generated scenes"),
        ("job", "run one job (used by run)"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        if name == "job":
            command.add_argument("file", type=Path, help="job.json in the folder of the job")
            continue
        if name != "quickstart":
            command.add_argument(
                "benchmark", help="path of a benchmark file, or its name below configs/"
            )
            command.add_argument(
                "--records", type=Path, help="file of the records (default: BENCHMARK.jsonl)"
            )
            command.add_argument("--plot", type=Path, metavar="DIR", help="draw plots there")
        if name == "report":
            command.add_argument(
                "--write",
                type=Path,
                metavar="FILE.md",
                help="put the report between its marks in this file: "
                + " and ".join(report.MARKS).format("NAME"),
            )
            continue
        jobs = min(2, os.cpu_count() or 1) if name == "quickstart" else 1
        command.add_argument(
            "--jobs", type=int, default=jobs, help=f"jobs side by side (default: {jobs})"
        )
        command.add_argument("--data-root", help="where the data set lies")
        command.add_argument(
            "--work-dir", help="folder for logs and checkpoints (default: work_dirs)"
        )
        command.add_argument("--variants", nargs="+", help="only these")
        command.add_argument("--seeds", nargs="+", type=int, help="instead of the file's")
        command.add_argument(
            "--keep-checkpoints", action="store_true", help="also of jobs that have finished"
        )
        command.add_argument("--launcher", choices=["none", "pytorch", "slurm"], default="none")
        command.add_argument(
            "--gpus", type=int, default=1, help="processes of a job, with a launcher"
        )
        command.add_argument("--partition", help="of Slurm")
        command.add_argument(
            "--cfg-options",
            nargs="+",
            default={},
            action=DictAction,
            metavar="KEY=VALUE",
            help="change the config of every job",
        )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    if args.command == "job":
        run_job(args.file)
        return
    if args.command == "quickstart":
        benchmark = load_benchmark("ohem_mm::quickstart/benchmark.yaml")
        args.plot = Path(args.work_dir or "work_dirs", benchmark.name)
        args.records = args.plot / "records.jsonl"
    else:
        benchmark = load_benchmark(args.benchmark)
    records = args.records or benchmark.path.with_suffix(".jsonl")
    if args.command != "report":
        if args.jobs < 1 or args.gpus < 1:
            raise cli.UserError("--jobs and --gpus must be 1 or more")
        args.metric = benchmark.metric
        run_benchmark(benchmark, args, records)
    results = report.select(benchmark, read_records(records))
    text = report.markdown(results)
    if args.command == "report" and args.write:
        report.write(args.write, benchmark.name, text)
    else:
        print(text, end="")
    if args.plot:
        say("plots: " + ", ".join(map(str, report.plot(results, args.plot))))


if __name__ == "__main__":
    sys.exit(cli.run(main))
