"""How far the jobs of a benchmark are: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
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
    """Progress of the jobs: bars, or plain lines now and then.

    Attributes:
        count: How many jobs there are to run.
        jobs: Those that were started.
        bars: rich's progress display; None: plain lines.
    """

    def __init__(self, count: int, bars: Any = None) -> None:
        self.count, self.bars = count, bars
        self.jobs: list[Any] = []
        self.tasks: dict[str, Any] = {}
        self.start = self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line, above the bars where there are some."""
        if self.bars is not None:
            self.bars.console.print(text, markup=False, highlight=False)
        else:
            say(f"[{clock(time.monotonic() - self.start)}] {text}")

    def update(self, running: list[Any], failed: list[Any]) -> None:
        """Show the state of all jobs."""
        # From the work of this session.
        work = sum(job.share - job.first[1] for job in self.jobs if job.first)
        rest = self.count - sum(1 if job in failed else job.share for job in self.jobs)
        left = clock((time.monotonic() - self.start) / work * rest if work > 0.01 else None)
        if self.bars is None:
            if running and time.monotonic() - self.shown > PLAIN_EVERY:
                self.shown = time.monotonic()
                jobs = "; ".join(f"{job.name}: {job.state['text']}" for job in running)
                self.say(f"{jobs}; about {left} left")
            return
        finished = sum(job.share == 1 and job not in running for job in self.jobs)
        text = f"{finished} of {self.count} finished"
        self._show("all jobs", sum(job.share for job in self.jobs), self.count, text, left)
        for job in running:
            self._show(job.name, job.share, 1, job.state["text"], clock(job.seconds_left))
        for name in self.tasks.keys() - {"all jobs", *(job.name for job in running)}:
            self.bars.remove_task(self.tasks.pop(name))

    def _show(self, name: str, done: float, total: int, text: str, left: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, text=text, left=left)
        self.bars.update(self.tasks[name], completed=done, total=total, text=text, left=left)


@contextlib.contextmanager
def display_for(count: int) -> Iterator[Display]:
    """Show the progress of so many jobs.

    Raises:
        UserError: There is a terminal, but not the package that draws bars on it.
    """
    if not sys.stdout.isatty():
        yield Display(count)
        return
    need("rich")
    from rich.progress import BarColumn, Progress, TextColumn

    columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")]
    with Progress(*columns, TextColumn("{task.fields[left]} left")) as progress:
        yield Display(count, progress)
