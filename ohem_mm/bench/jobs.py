"""The processes that do the jobs of a benchmark, ``--jobs`` of them at a time."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import ohem_mm
from ohem_mm import cli
from ohem_mm.bench.files import Benchmark
from ohem_mm.bench.plan import Job, Plan
from ohem_mm.bench.progress import display_for, say
from ohem_mm.bench.records import append_record, read_records, record_key
from ohem_mm.bench.text import clock
from ohem_mm.bench.variants import class_shares
from ohem_mm.disk import read_json, write_json
from ohem_mm.system import kill_group, lock, own_group

POLL = 0.3  # seconds between two looks at the running jobs


def run_benchmark(benchmark: Benchmark, args: argparse.Namespace, records: Path) -> None:
    """Run all jobs that have no record yet; SystemExit when one fails, or the user stops them."""
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
        known = read_records(records)
        total = plan.total(known)
        say(f"{benchmark.title}: {total} jobs, {done} of them finished before ({records})")
        for line in plan.news(known):
            say(line)
        if not waiting:
            say("nothing is left to run; to run them again, give another file with --records")
        else:
            _complain(_run_jobs(plan, records, waiting, done, total), total)


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


def _run_jobs(plan: Plan, records: Path, waiting: list[Job], before: int, total: int) -> list[Job]:
    """Run the jobs, and those that become due; return those that failed."""
    args = plan.args
    slots: dict[int, Job] = {}
    failed: list[Job] = []
    with display_for(total - before) as display:
        try:
            while waiting or slots:
                for slot in range(args.jobs):
                    if slot not in slots and waiting:
                        slots[slot] = job = waiting.pop(0)
                        shares = class_shares(job.cfg, plan.folder / "class_shares.json")
                        job.record["class_shares"] = shares
                        _start(job, slot, args)
                        display.add(job)
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
    spec = {"record": job.record, "metric": args.metric, "launcher": args.launcher}
    write_json(job.folder / "job.json", {**spec, "config_text": job.cfg.pretty_text})
    script = ["-m", "ohem_mm.bench.job", str(job.folder)]
    command = [sys.executable, *script]
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK")}
    environment["OMP_NUM_THREADS"] = environment["MKL_NUM_THREADS"] = str(args.threads)
    # The package of this process, wherever it was found.
    package = str(Path(ohem_mm.__file__).resolve().parents[1])
    others = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package, others]))
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
    """Say which jobs failed and why; raise SystemExit when there are any."""
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
