"""A tool as a process: how it ends, alone or among several, and the runner that it runs."""

from __future__ import annotations

import atexit
import errno
import gc
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import thread as pools
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ohem_mm.cli.configs import iter_dicts, type_name
from ohem_mm.config import UnknownConfigError
from ohem_mm.errors import UserError


def run(main: Callable[[], None]) -> int:
    """Run a tool's ``main`` and return its exit code: 2, and a sentence, after a user's mistake.

    A rank of a gloo group does not return when all is well: its process ends here, with 0.
    """
    try:
        main()
    except (UserError, UnknownConfigError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"the disk is full ({error}); free some space and start the same command again, "
            "training with --resume: it goes on from the last whole checkpoint"
        )
    else:
        if dist.is_available() and dist.is_initialized():
            _leave_together()
        return 0
    # All ranks meet the same mistake. The launcher ends the others when the first one exits, so
    # waiting here leaves one sentence on the screen instead of one per rank.
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    return 2


def _leave_together() -> None:
    """End the process group, and with gloo this process.

    Where one rank leaves while another still talks to it, a thread of gloo can outlive the group,
    and the C++ runtime then aborts the process at its exit ("terminate called without an active
    exception"), after all work is done. So the ranks wait for each other, and the process ends
    after Python's own clean-up, without that of the C++ libraries.
    """
    gc.collect()  # DistributedDataParallel, in cycles of the runner, holds the group
    backend = str(dist.get_backend())
    dist.barrier()
    dist.destroy_process_group()
    if "gloo" not in backend:
        return
    pools._python_exit()  # their idle threads would wait for work for ever
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()  # writers of logs, data workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def build_runner(cfg: Config) -> Runner:
    """Build the runner of ``cfg``; on the CPU, with several processes, over gloo."""
    allow_mmengine_checkpoints()
    _prepare_cpu_ranks(cfg)
    return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def _history_buffer_method(owner: object, name: str) -> Any:
    """``getattr`` for checkpoints, limited to the statistics that mmengine pickles by name."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in ("min", "max", "current", "mean"):
        raise UnpicklingError(
            f"the checkpoint asks for {owner!r}.{name}, which mmengine never writes"
        )
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)`` read the training state in mmengine's checkpoints.

    mmengine keeps its log history (``HistoryBuffer``, numpy arrays) beside the weights. Since
    torch 2.6 loading is restricted by default, and upstream mmengine 0.10.7 does not list these
    classes, so it cannot resume from, or test, a checkpoint of its own. They are added to
    torch's list here; loading stays restricted.
    """
    # Older releases load without the restriction and have no named entries in the list.
    if torch.__version__ < "2.6":
        return
    import numpy as np
    from mmengine.logging import HistoryBuffer

    core = np._core if hasattr(np, "_core") else np.core
    multiarray: Any = core.multiarray
    kinds = (np.bool_, np.int32, np.int64, np.uint8, np.uint32, np.float32, np.float64)
    torch.serialization.add_safe_globals(
        [
            HistoryBuffer,
            np.ndarray,
            np.dtype,
            *{type(np.dtype(kind)) for kind in kinds},
            # numpy 1 and 2 write different module names; either may have written the file.
            *((multiarray._reconstruct, f"numpy.{n}.multiarray._reconstruct") for n in _CORES),
            *((multiarray.scalar, f"numpy.{n}.multiarray.scalar") for n in _CORES),
            (_history_buffer_method, "builtins.getattr"),
        ]
    )


_CORES = ("core", "_core")


def _prepare_cpu_ranks(cfg: Config) -> None:
    """Make several processes work without a GPU: gloo, no device ids, plain BatchNorm.

    mmengine's own launcher code selects a CUDA device first, so the process group is set up
    here; mmengine then uses the one it finds.
    """
    if cfg.launcher == "none" or get_device() != "cpu":
        return
    if cfg.launcher != "pytorch":
        raise UserError(f"--launcher {cfg.launcher} needs GPUs, and this machine shows none")
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise UserError(
            "--launcher pytorch needs torchrun; start the tool through tools/dist_train.sh or "
            "tools/dist_test.sh"
        )
    env_cfg = cfg.setdefault("env_cfg", {})
    env_cfg["dist_cfg"] = {**(env_cfg.get("dist_cfg") or {}), "backend": "gloo"}
    wrapper = cfg.get("model_wrapper_cfg") or {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        "find_unused_parameters": cfg.get("find_unused_parameters", False),
    }
    cfg.model_wrapper_cfg = {**wrapper, "device_ids": None}
    # SyncBatchNorm has no CPU kernel. Weights carry over: the parameters have the same names.
    cfg.pop("sync_bn", None)
    for _, node in iter_dicts(cfg.model, "model"):
        if type_name(node) in ("SyncBN", "MMSyncBN"):
            node["type"] = "BN"
    dist.init_process_group("gloo")
