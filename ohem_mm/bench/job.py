"""One job of a benchmark: a process that trains and tests one variant with one seed.

``python -m ohem_mm.bench.job FOLDER`` is how the scheduler starts it.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# As in train.py: torch's threads must not spin while other processes want the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from ohem_mm import cli
from ohem_mm.bench.provenance import provenance
from ohem_mm.cli.checkpoints import numbered
from ohem_mm.disk import read_json, write_json
from ohem_mm.errors import is_first_rank
from ohem_mm.system import lock, peak_resident

# After cli, which says what to install when mmengine is missing.
from mmengine.config import Config  # isort: skip
from mmengine.hooks import Hook  # isort: skip

HASHED_BATCHES = 10
MIB = 2**20


class JobHook(Hook):  # type: ignore[misc]
    """Reports progress, and collects what the record says about the training.

    What it collects lies in the message hub, so checkpoints carry it through a kill.
    """

    # Before the hook that writes checkpoints.
    priority = "VERY_HIGH"

    def __init__(self, folder: Path, metric: str) -> None:
        self.folder = folder
        self.metric = metric
        self.written = 0.0
        self.notes: dict[str, Any] = {}  # the message hub holds this very object

    def before_train(self, runner: Any) -> None:
        """Fingerprint the initial weights; make up for a validation that a kill prevented."""
        if runner.iter == 0:
            model = getattr(runner.model, "module", runner.model)
            # Parameters alone: a loss may keep settings (class weights) in buffers.
            self.notes = {"weights": digest(model.parameters()), "order": "", "memory": 0.0}
            self.notes |= {"batches": [], "curve": [], "resumed": []}
        else:
            self.notes = runner.message_hub.get_info("benchmark")
            self.notes["resumed"].append(runner.iter)
        runner.message_hub.update_info("benchmark", self.notes)
        loop, done = runner.train_loop, runner.iter
        # The checkpoint of an iteration is written before its validation.
        if done and runner.val_loop and type(loop).__name__ == "IterBasedTrainLoop":
            due = done % loop.val_interval == 0 or done == loop.max_iters
            if done >= loop.val_begin and due:
                runner.val_loop.run()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Fingerprint the order of the images, and the content of the first batches."""
        samples = data_batch["data_samples"]
        order = [self.notes["order"], *(str(sample.get("img_path")) for sample in samples)]
        self.notes["order"] = hashlib.sha1("\n".join(order).encode()).hexdigest()[:12]
        # A resumed run gets the same images, but mmengine may augment them differently.
        if batch_idx < HASHED_BATCHES and not self.notes["resumed"]:
            labels = [sample.gt_sem_seg.data for sample in samples]
            self.notes["batches"].append(digest([*data_batch["inputs"], *labels]))

    def _after_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = "train",
    ) -> None:
        """Note the peak memory of training, and tell the parent about once a second what is done.

        mmengine calls it after each iteration of training, validation and test.
        """
        done, loss = runner.iter, None
        if mode == "train":
            self.notes["memory"] = max(self.notes["memory"], peak_memory())
            done, loss = runner.iter + 1, outputs.get("loss") if isinstance(outputs, dict) else None
            text = f"train {done}/{runner.max_iters}"
        elif mode == "val":
            text = f"validate {batch_idx + 1}/{len(runner.val_dataloader)}"
        else:
            text = f"test {batch_idx + 1}/{len(runner.test_dataloader)}"
        if runner.rank > 0 or (time.monotonic() - self.written < 1 and done > 1):
            return
        self.written = time.monotonic()
        if loss is not None:
            text += f", loss {float(loss):.3f}"
        progress = {"text": text, "share": done / runner.max_iters}
        write_json(self.folder / "progress.json", progress)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Add a point to the curve."""
        if metrics and self.metric in metrics:
            self.notes["curve"].append([runner.iter, round(float(metrics[self.metric]), 4)])


def digest(tensors: Iterable[torch.Tensor]) -> str:
    """A short hash of the bytes of some tensors."""
    total = hashlib.sha1(usedforsecurity=False)
    for tensor in tensors:
        flat = tensor.detach().cpu().reshape(-1).contiguous()
        total.update(flat.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:12]


def peak_memory() -> float:
    """Peak memory of this process in MiB: allocated on the GPU, else resident on the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / MIB
    return peak_resident()


def end_with_parent() -> None:
    """End this process when the parent ends, even by kill -9: then stdin reaches its end."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_job(folder: Path) -> None:
    """Train and test one variant with one seed, as ``job.json`` says, and write its record."""
    end_with_parent()
    with (folder / "lock").open("w") as file:
        if is_first_rank():
            lock(file, wait=True)  # a predecessor, whose parent was killed, is about to end
        record = _train_and_test(read_json(folder / "job.json"), folder, provenance())
    if is_first_rank():
        write_json(folder / "record.json", record)


def _train_and_test(
    spec: dict[str, Any], folder: Path, provenance: dict[str, Any]
) -> dict[str, Any]:
    from mmseg.evaluation import IoUMetric
    from mmseg.registry import METRICS

    per_class: dict[str, Any] = {}

    @METRICS.register_module()
    class BenchmarkIoUMetric(IoUMetric):  # type: ignore[misc]
        """mmseg's metric; keeps the values of the classes, which mmseg prints and drops."""

        def compute_metrics(self, results: list[Any]) -> Any:
            areas = [sum(column) for column in zip(*results, strict=True)]
            per_class.update(self.total_area_to_metrics(*areas, metrics=["mIoU", "mDice"]))
            return super().compute_metrics(results)

    cfg = Config.fromstring(spec["config_text"], ".py")
    cfg.launcher = spec["launcher"]
    for _, node in cli.iter_dicts(cfg.test_evaluator):
        if cli.type_name(node) == "IoUMetric":
            node["type"] = BenchmarkIoUMetric.__name__
    checkpoints = numbered(folder)
    if checkpoints:
        cfg.resume, cfg.load_from = True, str(checkpoints[0])
    runner = cli.build_runner(cfg)
    runner.register_hook(JobHook(folder, spec["metric"]))
    runner.train()
    start = time.perf_counter()
    runner.test()
    test_seconds = round(time.perf_counter() - start, 1)
    if runner.rank > 0:  # mmengine brings all results to the first process
        return {}

    def percent(values: Any) -> list[float | None]:
        return [round(100 * float(v), 4) if math.isfinite(v) else None for v in values]

    def mean(name: str) -> float | None:
        values = [value for value in percent(per_class[name]) if value is not None]
        return round(statistics.fmean(values), 4) if values else None

    hub = runner.message_hub
    kept, kept_last = {}, {}
    for name, history in hub.log_scalars.items():
        found = re.fullmatch(r"train/ohem/(.+)/kept_share", name)
        if found:
            shares = history.data[0]
            last = shares[-(len(shares) // 10 + 1) :]  # what is still hard at the end
            kept[found[1]] = round(float(shares.mean()), 6)
            kept_last[found[1]] = round(float(last.mean()), 6)
    notes = hub.get_info("benchmark")
    return {
        **spec["record"],
        **provenance,
        "iterations": runner.max_iters,
        "train_seconds": round(float(hub.get_scalar("train/time").data[0].sum()), 1),
        "test_seconds": test_seconds,
        "peak_memory_mib": round(notes["memory"], 1),
        "metrics": {
            "aAcc": percent([per_class["aAcc"]])[0],
            **{f"m{name}": mean(name) for name in ("IoU", "Acc", "Dice")},
        },
        "classes": list(runner.test_dataloader.dataset.metainfo["classes"]),
        "IoU": percent(per_class["IoU"]),
        "Dice": percent(per_class["Dice"]),
        "kept_share": kept or None,
        "kept_share_last_tenth": kept_last or None,
        **{key: notes[key] for key in ("weights", "order", "batches", "resumed", "curve")},
        "loss": round(float(hub.get_scalar("train/loss").mean(50)), 6),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


if __name__ == "__main__":
    sys.exit(cli.run(lambda: run_job(Path(sys.argv[1]))))
