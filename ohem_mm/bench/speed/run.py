"""Measure providers at the points of a series, and make rows for the records."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import random
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import _dynamo

from ohem_mm.bench.provenance import provenance, versions
from ohem_mm.bench.speed.jobs import NETWORKS, Job, head_job, network_job
from ohem_mm.bench.speed.meter import Meter
from ohem_mm.bench.speed.problems import HARD, THRESH, Shape, make_problem
from ohem_mm.bench.speed.providers import UnavailableError
from ohem_mm.bench.speed.report import FLOOR, Row
from ohem_mm.bench.speed.values import check_formula
from ohem_mm.errors import need

SWEEPS = ("pixels", "classes", "stride", "kept")
# The phases of a job that each mode takes together.
PHASES = {"step": slice(2), "forward": slice(1), "backward": slice(1, 2), "iteration": slice(1)}
UNITS = {"time": "ms", "memory": "MiB"}


class Point(NamedTuple):
    """One point of one series of measurements: a head step, or an iteration of a network."""

    kernel: str
    shape: Shape
    sweep: str  # what varies, or 'shape'
    hard: float = HARD

    @property
    def is_network(self) -> bool:
        """Whether whole iterations are measured."""
        return self.kernel in NETWORKS


def sweep_points(sweep: str, base: Shape) -> list[Point]:
    """The points of a sweep around a shape."""
    if sweep == "kept":
        shares = (0.02, 0.05, 0.1, 0.2, 0.5, 0.95)
        return [Point("head_step", base, sweep, share) for share in shares]
    if sweep == "pixels":
        parts = [part for part in (8, 4, 2, 1) if min(base.small) >= 4 * part]
        shapes = [base._replace(height=base.height // p, width=base.width // p) for p in parts]
    elif sweep == "classes":
        shapes = [base._replace(c=c) for c in (2, 8, 19, 64, 150)]
    else:
        shapes = [base._replace(stride=s) for s in (1, 2, 4, 8, 16)]
    return [Point("head_step", shape, sweep) for shape in shapes]


def byte_floor(shape: Shape) -> int:
    """Bytes that any implementation moves.

    Twice the int64 labels, three times a float32 loss map, twice the small logits and once their
    gradient.
    """
    small = shape.n * shape.c * math.prod(shape.small)
    return shape.pixels * (2 * 8 + 3 * 4) + small * 3 * 4


def run(args: argparse.Namespace, argv: Sequence[str]) -> list[Row]:
    """Measure all that the options ask for, which stand as typed in ``argv``; return the rows."""
    need("rich")
    from rich.console import Console
    from rich.progress import Progress

    if args.threads:
        torch.set_num_threads(args.threads)
    points = [point for sweep in args.sweep for point in sweep_points(sweep, args.shapes[0])]
    if not args.sweep and set(args.modes) - {"iteration"}:
        points += [Point("head_step", shape, "shape") for shape in args.shapes]
    if "iteration" in args.modes:
        points += [Point(network, args.image, "shape") for network in args.networks]
    check_formula()
    meter = Meter(args.device)
    facts, rows, said = run_facts(args.device, argv), [], set[str]()
    with Progress(console=Console(stderr=True), transient=True) as progress:

        def say(note: str) -> None:
            if note not in said:
                said.add(note)
                progress.console.print(note, highlight=False, soft_wrap=True)

        for point in progress.track(points, description="points"):
            rows += measure(point, args, meter, progress, say)
    return [{**row, **facts} for row in rows]


def run_facts(device: str, argv: Sequence[str]) -> Row:
    """What all rows of a run share."""
    where = provenance()
    return {
        "device_name": where["hardware"]["gpu" if device.startswith("cuda") else "cpu"],
        "threads": torch.get_num_threads(),
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": versions("triton").get("triton", ""),
        "ohem_mm": where["versions"]["ohem_mm"],
        "commit": (where["commit"] or "")[:7] + ("-dirty" if where["dirty"] else ""),
        "command": shlex.join(["python", "tools/benchmark_loss.py", *argv]),
    }


def make_jobs(
    point: Point, args: argparse.Namespace, say: Callable[[str], None]
) -> tuple[list[Job], float]:
    """Build and check what is to be timed; also return the share of hard pixels."""
    problem = None if point.is_network else make_problem(point.shape, args.device, point.hard)
    accuracies = {"with": [True], "without": [False], "both": [True, False]}[args.acc_seg]
    jobs, hard = [], 0.0
    for name in args.providers:
        for acc_seg in [True] if problem is None else accuracies:
            try:
                if problem is None:
                    job, hard = network_job(name, point.kernel, point.shape, args.device)
                else:
                    job, hard = head_job(name, problem, acc_seg, point.shape), problem.hard
            except UnavailableError as reason:
                say(f"{name} is left out: {reason}")
            else:
                jobs.append(job)
    return jobs, hard


def measure(
    point: Point, args: argparse.Namespace, meter: Meter, progress: Any, say: Callable[[str], None]
) -> list[Row]:
    """Check, warm up and time all providers at one point; return rows without the run's facts."""
    title = f"{point.kernel} {point.shape}"
    task = progress.add_task(f"{title}: checking", total=None)
    _dynamo.reset()
    jobs, hard = make_jobs(point, args, say)
    times: list[list[list[float]]] = [[] for _ in jobs]
    order = list(zip(times, jobs, strict=True))
    progress.update(task, total=len(jobs) * (args.warmup + args.repeats))
    for repeat in range(args.warmup + args.repeats):
        random.shuffle(order)  # nobody always runs after the same neighbour
        for samples, job in order:
            progress.update(task, advance=1, description=f"{title}: {job.provider}")
            sample = meter.times(job)
            job.reset()
            if repeat >= args.warmup:
                samples.append(sample)

    config = {
        "sweep": point.sweep,
        "shape": point.shape.image if point.is_network else str(point.shape),
        "hard": round(hard, 4),
        "thresh": THRESH,
        "min_kept": "1/16",
        "dtype": "float32",
    }
    places = {"classes": point.shape.c, "stride": point.shape.stride, "kept": config["hard"]}
    rows = []

    def add(provider: str, acc_seg: bool, mode: str, metric: str, values: list[float]) -> None:
        numbers = torch.tensor(values, dtype=torch.float64)
        quantiles = numbers.quantile(numbers.new_tensor([0.5, 0.2, 0.8])).tolist()
        row: Row = {"kernel": point.kernel, "provider": provider, "mode": mode, "metric": metric}
        row |= {"unit": UNITS[metric], "x": places.get(point.sweep, point.shape.pixels)}
        row |= {name: f"{v:.5g}" for name, v in zip(("p50", "p20", "p80"), quantiles, strict=True)}
        rows.append({**row, "config": json.dumps({**config, "acc_seg": acc_seg})})

    modes = [mode for mode in args.modes if point.is_network == (mode == "iteration")]
    for job, samples in zip(jobs, times, strict=True):
        for mode in modes:
            wanted = PHASES[mode]
            add(job.provider, job.acc_seg, mode, "time", [sum(s[wanted]) for s in samples])
            if mode != "backward":  # its peak is that of the step
                peak = meter.memory(job, wanted.stop)
                add(job.provider, job.acc_seg, mode, "memory", [peak])
    if "step" in modes:
        floor = byte_floor(point.shape) / meter.bandwidth
        add(FLOOR, args.acc_seg != "without", "step", "time", [floor])
    progress.remove_task(task)
    return rows
