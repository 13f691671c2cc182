"""What people see while a benchmark runs."""

import math
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import Progress

pytest.importorskip("mmseg")

from ohem_mm.bench import progress
from ohem_mm.bench.plan import Job


def test_how_long_it_takes_is_told_from_the_work_of_this_session(monkeypatch, capsys):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    settings = {"speed_estimate_period": math.inf, "get_time": lambda: Clock.now}
    bars = Progress(console=Console(quiet=True), disable=True, **settings)
    display = progress.Display(bars, 4)
    job = Job("ce, seed 0", None, Path("work"), {}, state={"text": "train 4/8", "share": 0.5})
    job.first = 0.5  # where an earlier session stopped
    display.add(job)
    for now, share in ((10.0, 0.625), (30.0, 0.75)):
        Clock.now, job.state["share"] = now, share
        display.update([job], [])
    assert capsys.readouterr().out == ""  # not in the first minute
    # An eighth took 20 seconds, and 3.25 jobs are left.
    Clock.now, job.state["text"] = 70.0, "train 6/8"
    display.update([job], [])
    assert capsys.readouterr().out == "[1:10] ce, seed 0: train 6/8; about 8:40 left\n"
    job.state["share"] = 1.0
    display.update([], [])
    assert bars.tasks[0].fields["text"] == "1 of 4 finished"
    assert not bars.tasks[1].visible
