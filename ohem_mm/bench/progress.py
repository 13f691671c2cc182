"""How far the jobs of a benchmark are: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Any

from ohem_mm.bench.text import clock
from ohem_mm.errors import need

PLAIN_EVERY = 60  # seconds between two lines of progress where there is no terminal


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


class Display:
    """Progress of ``count`` jobs in rich's bars, or, where those are disabled, in plain lines."""

    def __init__(self, bars: Any, count: int) -> None:
        self.bars, self.count, self.shown = bars, count, time.monotonic()
        self.whole = bars.add_task("all jobs", total=count, text="")
        self.tasks: dict[Any, Any] = {}  # the bar of each job that was started

    def add(self, job: Any) -> None:
        """Show this job too."""
        self.tasks[job] = self.bars.add_task(job.name, total=1, text="")

    def say(self, text: str) -> None:
        """Print a line, above the bars where there are some."""
        if self.bars.disable:
            say(f"[{clock(self.bars.tasks[0].elapsed)}] {text}")
        else:
            self.bars.console.print(text, markup=False, highlight=False)

    def update(self, running: list[Any], failed: list[Any]) -> None:
        """Show the state of all jobs."""
        for job, task in self.tasks.items():
            shown = {"text": job.state["text"], "visible": job in running}
            self.bars.update(task, completed=job.share, **shown)
        # How long it takes is told from the work of this session.
        before = sum(job.first for job in self.tasks)
        done = sum(1 if job in failed else job.share for job in self.tasks) - before
        text = f"{len(self.tasks) - len(running) - len(failed)} of {self.count} finished"
        self.bars.update(self.whole, completed=done, total=self.count - before, text=text)
        if self.bars.disable and running and time.monotonic() - self.shown > PLAIN_EVERY:
            self.shown = time.monotonic()
            jobs = "; ".join(f"{job.name}: {job.state['text']}" for job in running)
            self.say(f"{jobs}; about {clock(self.bars.tasks[0].time_remaining)} left")


@contextlib.contextmanager
def display_for(count: int) -> Iterator[Display]:
    """Show the progress of so many jobs; a UserError where rich is missing."""
    need("rich")
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    plain = not sys.stdout.isatty()
    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=Console(quiet=plain),
        disable=plain,
        speed_estimate_period=math.inf,  # a validation, in which a job stands still, is no end
    ) as bars:
        yield Display(bars, count)
