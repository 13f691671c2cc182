"""``custom_imports`` for fault campaigns: a disk on which a checkpoint takes its time."""

import time
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

BLOCKS = 30


@register_backend("slow")
class SlowBackend(LocalBackend):
    """Writes in blocks, with a pause after each."""

    def put(self, obj, filepath):
        Path(filepath).parent.mkdir(parents=True, exist_ok=True)
        step = -(-len(obj) // BLOCKS)
        with open(filepath, "wb", buffering=0) as file:
            for start in range(0, len(obj), step):
                rest = obj[start : start + step]
                while rest:  # a disk may take a part
                    rest = rest[file.write(rest) :]
                time.sleep(0.01)
        time.sleep(0.05)  # whole, and last_checkpoint does not name it yet
