"""Files that several processes share, and that a kill leaves whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ohem_mm.system import lock


def extend(path: Path, more: Callable[[bytes], tuple[bytes, int]]) -> None:
    """Append whole lines to a file, which is locked meanwhile, and have them on the disk.

    Args:
        path: The file; it and its folder are made if need be.
        more: From what the file holds: what to append, and how many bytes to cut off before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        lock(file, wait=True)
        file.seek(0)
        # Closing another handle of the file would end the lock.
        content = file.read()
        addition, torn = more(content)
        if not addition:
            return
        file.truncate(len(content) - torn)
        if not torn and content and not content.endswith(b"\n"):
            file.write(b"\n")
        file.write(addition)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    """Replace a file at once, so that a kill leaves the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file; None when there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
