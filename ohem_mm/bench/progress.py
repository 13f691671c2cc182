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
    """Progress as plain lines, now and then.

    Args:
        count: How many jobs there are to run.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.jobs: list[Any] = []  # those that were started
        self.start = self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line."""
        say(f"[{clock(time.monotonic() - self.start)}] {text}")

    def started(self, job: Any) -> None:
        """A job has started."""
        self.jobs.append(job)

    def seconds_left(self, failed: list[Any]) -> float | None:
        """Of all jobs, from the work of this session."""
        done = sum(job.share - job.first[1] for job in self.jobs if job.first)
        left = self.count - sum(1 if job in failed else job.share for job in self.jobs)
        return (time.monotonic() - self.start) / done * left if done > 0.01 else None

    def update(self, running: list[Any], failed: list[Any]) -> None:
        """Show the state of all jobs."""
        if running and time.monotonic() - self.shown > PLAIN_EVERY:
            self.shown = time.monotonic()
            jobs = "; ".join(f"{job.name}: {job.state['text']}" for job in running)
            self.say(f"{jobs}; about {clock(self.seconds_left(failed))} left")


class Bars(Display):
    """Progress as bars on a terminal."""

    def __init__(self, count: int, progress: Any) -> None:
        super().__init__(count)
        self.progress = progress
        self.tasks: dict[str, Any] = {}
        self.all = progress.add_task("all jobs", total=count, text="", left="")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.progress.console.print(text, markup=False, highlight=False)

    def update(self, running: list[Any], failed: list[Any]) -> None:
        """Show the state of all jobs."""
        names = {job.name for job in running}
        for name in [name for name in self.tasks if name not in names]:
            self.progress.remove_task(self.tasks.pop(name))
        for job in running:
            if job.name not in self.tasks:
                self.tasks[job.name] = self.progress.add_task(job.name, total=1, text="", left="")
            self._show(self.tasks[job.name], job.share, job.state["text"], job.seconds_left)
        finished = sum(job.share == 1 and job not in running for job in self.jobs)
        share = sum(job.share for job in self.jobs)
        text = f"{finished} of {self.count} finished"
        self._show(self.all, share, text, self.seconds_left(failed), total=self.count)

    def _show(self, task: Any, done: float, text: str, left: float | None, **more: Any) -> None:
        self.progress.update(task, completed=done, text=text, left=clock(left), **more)


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
        yield Bars(count, progress)
