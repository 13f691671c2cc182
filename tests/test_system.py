"""Calls of the operating system, on this one and on a Windows that is played by small fakes."""

import builtins
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ohem_mm import system
from ohem_mm.errors import is_first_rank

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="asks POSIX")


@pytest.fixture
def windows(monkeypatch):
    """No fcntl and no resource; msvcrt locks bytes of files as Windows does, in a table."""
    real = builtins.__import__

    def without_posix(name, *args, **kwargs):
        if name in ("fcntl", "resource"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    held = {}

    def locking(number, mode, size):
        assert (mode, size) == (fake.LK_NBLCK, 1)
        key = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR)
        if held.setdefault(key, number) != number:
            raise OSError("locked by another")

    fake = SimpleNamespace(LK_NBLCK=2, locking=locking, held=held)
    monkeypatch.setattr(builtins, "__import__", without_posix)
    monkeypatch.setitem(sys.modules, "msvcrt", fake)
    monkeypatch.setattr(system.sys, "platform", "win32")
    return fake


def test_lock_on_windows(windows, tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"a line\n")
    with path.open("a+b") as first, path.open("a+b") as second:
        second.seek(3)
        assert system.lock(first, wait=True)
        assert not system.lock(second, wait=False)
        assert second.tell() == 3  # where it was
        assert os.lseek(second.fileno(), 0, os.SEEK_CUR) == 3
        # The byte that is locked lies behind the content, which others may read and append to.
        ((_, place),) = windows.held
        assert place > 2**30
        # One that waits goes on as soon as the first has let go.
        monkeypatch.setattr(time, "sleep", lambda seconds: windows.held.clear())
        assert system.lock(second, wait=True)
        second.write(b"another\n")
    assert path.read_bytes() == b"a line\nanother\n"


@POSIX
def test_lock_is_held_against_other_processes(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys; from ohem_mm.system import lock;"
        f"sys.exit(int(lock(open({str(path)!r}, 'w'), wait=False)))"
    )
    with path.open("w") as file:
        assert system.lock(file, wait=False)
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_own_group_on_windows(windows, monkeypatch):
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    assert system.own_group() == {"creationflags": 512}


def test_kill_group_on_windows(windows, monkeypatch):
    commands, waited = [], []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(os, "killpg", None, raising=False)  # there is none
    system.kill_group(SimpleNamespace(pid=41, wait=lambda: waited.append(True)))
    assert commands == [["taskkill", "/F", "/T", "/PID", "41"]]
    assert waited == [True]


@POSIX
def test_kill_group_ends_the_children_too(tmp_path):
    grandchild = "import time; time.sleep(60)"
    code = (
        f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', "
        f"{grandchild!r}]); print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, **system.own_group()
    )
    child = int(process.stdout.readline())
    assert os.getpgid(child) == process.pid != os.getpgid(0)
    system.kill_group(process)
    assert process.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid):
    """Whether a process runs; one that has ended and that nobody has asked about does not."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat").read_text() if os.path.isdir("/proc/self") else ""
    except OSError:
        return False
    return ") Z " not in stat


def test_peak_memory_on_windows(windows, monkeypatch):
    counters = SimpleNamespace(peak_wset=300 * 2**20)
    process = SimpleNamespace(memory_info=lambda: counters)
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    assert system.peak_resident() == 300


@POSIX
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_peak_memory_in_the_unit_of_the_platform(monkeypatch, platform):
    import resource

    unit = 2**20 if platform == "darwin" else 2**10
    usage = SimpleNamespace(ru_maxrss=300 * 2**20 // (unit if platform == "linux" else 1))
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(system.sys, "platform", platform)
    assert system.peak_resident() == 300


def test_only_this_module_calls_posix():
    """Whatever POSIX alone has is called in one place, which has an alternative for it."""
    root = Path(__file__).parents[1]
    calls = (
        r"import (fcntl|resource|pwd|grp|termios)\b|\bos\.(fork|killpg|getpgid|setsid|getuid|nice|"
        r"mkfifo|statvfs)\b|signal\.(SIGKILL|SIGHUP|SIGUSR|alarm|setitimer)|start_new_session|"
        r"get_context\(.fork|preexec_fn"
    )
    found = [
        str(path.relative_to(root))
        for folder in ("ohem_mm", "tools")
        for path in sorted((root / folder).rglob("*.py"))
        if re.search(calls, path.read_text(encoding="utf-8"))
    ]
    assert found == ["ohem_mm/system.py"]


@pytest.mark.parametrize(("rank", "task", "first"), [(0, 1, True), (1, 0, False)])
def test_torchrun_inside_a_task_of_slurm_has_one_first_rank(monkeypatch, rank, task, first):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("SLURM_PROCID", str(task))
    assert is_first_rank() == first
