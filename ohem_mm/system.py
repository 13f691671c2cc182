"""What the tools ask of the operating system: POSIX calls, and what Windows has instead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

__all__ = ["kill_group", "lock", "own_group", "peak_resident"]

MIB = 2**20
# Windows locks bytes against reading too, so the byte that is locked lies behind every content.
LOCKED_BYTE = 2**31 - 2


def lock(file: Any, wait: bool) -> bool:
    """Lock an open file for this process; the lock ends with the process, however it ends.

    Record locks, not flock: processes forked from this one (data loaders) do not hold them.

    Args:
        file: The open file.
        wait: Wait until another process has let go of it.

    Returns:
        Whether this process has the lock now.
    """
    try:
        import fcntl
    except ImportError:
        return _lock_on_windows(file, wait)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _lock_on_windows(file: Any, wait: bool) -> bool:
    import msvcrt

    windows: Any = msvcrt  # typed for Windows alone
    place = os.lseek(file.fileno(), 0, os.SEEK_CUR)
    try:
        while True:
            os.lseek(file.fileno(), LOCKED_BYTE, os.SEEK_SET)
            try:
                windows.locking(file.fileno(), windows.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
                time.sleep(0.1)  # its own way to wait gives up after ten seconds
            else:
                return True
    finally:
        os.lseek(file.fileno(), place, os.SEEK_SET)


def own_group() -> dict[str, Any]:
    """Keywords of ``subprocess.Popen`` for a process that Ctrl-C here does not reach."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with :func:`own_group`, and those that it started."""
    if sys.platform == "win32":
        command = ["taskkill", "/F", "/T", "/PID", str(process.pid)]
        subprocess.run(command, capture_output=True, check=False)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def peak_resident() -> float:
    """Peak resident memory of this process in MiB."""
    try:
        import resource
    except ImportError:
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / MIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
