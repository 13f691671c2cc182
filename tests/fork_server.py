"""Programs as processes of their own, forked from one that has their libraries loaded.

A start costs a fraction of a second instead of the seconds that importing torch and mmseg takes.
Only the start differs from ``python SCRIPT``: a child has a session of its own, runs the script as
``__main__`` and ends as any Python process does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


class ForkServer:
    """The server as its client sees it; a context manager.

    Args:
        modules: What it imports beforehand.
        path: Folders on the import path of every child, and of what the children start.
    """

    def __init__(self, modules: Sequence[str], path: Sequence[Path]) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, path)),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_VISIBLE_DEVICES": "",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, **request: object) -> object:
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(self, argv: Sequence[object], folder: Path, log: Path, **environment: str) -> int:
        """Run a script in ``folder``, with its output appended to ``log``; return its id."""
        argv = list(map(str, argv))
        return self._ask(argv=argv, folder=str(folder), log=str(log), environment=environment)

    def poll(self, pid: int) -> int | None:
        """The exit code of a child, as ``subprocess`` has it; None while it runs. Once only."""
        return self._ask(poll=pid)


def serve() -> dict:
    """Answer requests; return in each child, with what it has to run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    children = set()
    # The client waits for each answer, so a child never holds a request that was read ahead.
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            found, status = os.waitpid(request["poll"], os.WNOHANG)
            children.discard(found)
            print(json.dumps(os.waitstatus_to_exitcode(status) if found else None), flush=True)
            continue
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.close(told)
            os.close(ready)
            return request
        os.close(told)
        os.read(ready, 1)  # ends when the child has closed its side: it has its session now
        os.close(ready)
        print(json.dumps(pid), flush=True)
        children.add(pid)
    for pid in children:  # the client is gone
        os.killpg(pid, signal.SIGKILL)
    sys.exit()


def main() -> None:
    """Serve, and in a child run the script."""
    with contextlib.redirect_stdout(sys.stderr):
        for module in sys.argv[1:]:
            importlib.import_module(module)
    gc.freeze()  # a child need not look through what was imported here when it ends
    request = serve()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(request["folder"])
    os.environ.update(request["environment"])
    sys.argv = request["argv"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
