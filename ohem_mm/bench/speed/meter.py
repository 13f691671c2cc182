"""A clock and a memory gauge for one device."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports every start and stop

import torch
from torch.profiler import ProfilerActivity, profile

from ohem_mm.bench.speed.jobs import Job


class Meter:
    """Times phases and tracks memory on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        if self.cuda:
            torch.cuda.set_device(device)
        self.flush = torch.empty(2**28 if self.cuda else 0, dtype=torch.uint8, device=device)

    def times(self, job: Job) -> list[float]:
        """Milliseconds of each phase."""
        job.reset()
        if not self.cuda:
            marks = [time.perf_counter()]
            for phase in job.phases:
                phase()
                marks.append(time.perf_counter())
            return [1000 * (end - start) for start, end in pairwise(marks)]
        new_event: Callable[..., Any] = torch.cuda.Event
        events = [new_event(enable_timing=True) for _ in range(len(job.phases) + 1)]
        torch.cuda.synchronize()
        # While the device is busy with this, the host gets ahead of it.
        self.flush.zero_()
        events[0].record()
        for phase, event in zip(job.phases, events[1:], strict=True):
            phase()
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(events)]

    def memory(self, job: Job, phases: int) -> float:
        """Peak MiB of the first ``phases`` phases, above what was allocated before."""
        job.reset()

        def run() -> None:
            for phase in job.phases[:phases]:
                phase()

        if self.cuda:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
        else:
            peak = cpu_peak(run)
        job.reset()
        return peak / 2**20

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a millisecond that a copy reads and writes, best of ten."""
        size = 2**28 if self.cuda else 2**26  # larger than the caches
        source = torch.zeros(size, dtype=torch.uint8, device=self.flush.device)
        into = torch.empty_like(source)
        job = Job("", False, [lambda: into.copy_(source)], lambda: None)
        return 2 * source.numel() / min(self.times(job)[0] for _ in range(10))


def cpu_peak(run: Callable[[], object]) -> int:
    """Peak bytes that PyTorch's allocator handed out while ``run`` ran."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # The profiler's summaries are per operation; its events are single allocations.
    events = profiler.profiler.kineto_results.events()
    memory = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    peak = now = 0
    for _, size in memory:
        now += size
        peak = max(peak, now)
    return peak
