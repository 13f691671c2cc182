"""Hooks of pytest: what cannot run here is left out, and one line of the summary says so."""

from collections import Counter

import pytest

LEFT_OUT = pytest.StashKey[Counter]()  # reason: number of tests


def pytest_configure(config):
    config.stash[LEFT_OUT] = Counter()


def pytest_collection_modifyitems(config, items):
    """Leave out what cannot run here, such as the kernels outside Triton's interpreter.

    Hundreds of tests run in processes of ``test_interpreter.py`` and nowhere else.
    """
    left_out = []
    for item in items:
        for mark in item.iter_markers("skipif"):
            if any(condition and not isinstance(condition, str) for condition in mark.args):
                left_out.append(item)
                config.stash[LEFT_OUT][mark.kwargs["reason"]] += 1
                break
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    # Every process collects the same tests.
    node.config.stash[LEFT_OUT].update(
        Counter(getattr(node, "workeroutput", {}).get("left_out", {})) - node.config.stash[LEFT_OUT]
    )


def pytest_terminal_summary(terminalreporter, config):
    """One line says what did not run and why."""
    reasons = config.stash[LEFT_OUT].copy()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    if reasons:
        said = "; ".join(f"{number} ({reason})" for reason, number in reasons.most_common())
        terminalreporter.write_line(f"left out: {said}")
