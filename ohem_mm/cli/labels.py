"""Which file of a data set is at fault: frameworks say what broke, not where.

Before training a few label maps of the training set are looked at. After a crash that came from
the data all of them are, until the one at fault is found.
"""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS
from mmseg.datasets.transforms import LoadAnnotations

from ohem_mm import cli

SAMPLES = 8
SECONDS = 120.0  # longest search after a crash
# Where a traceback passes through when the data are at fault.
DATA_CODE = (
    *("/mmcv/transforms/", "/mmseg/datasets/", "/torch/utils/data/"),
    *("/losses/", "/structures/sampler/", "/ohem_mm/loss.py", "/ohem_mm/ops/"),
)


class Labels(NamedTuple):
    """How many classes a model has, where it says so, and the labels that do not count."""

    num_classes: int | None
    ignored: frozenset[int]

    @classmethod
    def of(cls, cfg: Config) -> Labels:
        """Those of the heads of a config's model."""
        classes, ignored = [], {255}
        for path, node in cli.iter_dicts(cfg.get("model"), "model"):
            for key in ("ignore_index", "ignore_label"):
                if isinstance(node.get(key), int):
                    ignored.add(node[key])
            if "head" in path and isinstance(node.get("num_classes"), int):
                # One channel tells two classes apart.
                classes.append(max(2, node["num_classes"]))
        return cls(max(classes) if classes else None, frozenset(ignored))


def problem(dataset: Any, index: int, labels: Labels) -> tuple[str, bool]:
    """Load one image and its label map, by a pipeline that has a LoadAnnotations.

    Returns:
        What is wrong with them, naming the file, or '', and whether every pixel is ignored.
    """
    results = dataset.get_data_info(index)
    image, file = results.get("img_path"), results.get("seg_map_path")
    for step in dataset.pipeline.transforms:
        is_label = isinstance(step, LoadAnnotations)
        try:
            results = step(results)
        except Exception as error:  # a broken file raises anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            name = type(step).__name__
            return f"{file if is_label else image} does not load ({name}: {reason})", False
        if is_label:
            break
    else:
        return "", False
    label, pixels = results["gt_seg_map"], results.get("img")
    present, allowed = {*np.unique(label).tolist()}, labels.ignored | {dataset.ignore_index}
    classes = math.inf if labels.num_classes is None else labels.num_classes
    strange = sorted(value for value in present - allowed if value >= classes)
    found = ""
    if label.ndim != 2:
        found = f"has {label.shape[-1]} channels, and needs one that holds the index of the class"
    elif pixels is not None and pixels.shape[:2] != label.shape:
        sizes = [f"{shape[1]}x{shape[0]}" for shape in (label.shape, pixels.shape)]
        found = f"is {sizes[0]}, and its image {image} is {sizes[1]}"
    elif strange and _is_plain(dataset):
        shown = ", ".join(map(str, strange[:5])) + ", ..." * (len(strange) > 5)
        found = f"has the labels {shown}; with {classes} classes they are 0 to {classes - 1}, and "
        found += f"{_listed(allowed)} for ignored"
    return found and f"the label map {file} {found}", not found and present <= allowed


def check_labels(cfg: Config) -> None:
    """Look at a few samples of the training set before training."""
    labels = Labels.of(cfg)
    for dataset in _datasets(cfg, "train"):
        count = len(dataset)
        places = sorted({int(i) for i in np.linspace(0, count - 1, min(count, SAMPLES))})
        empty = []
        for index in places:
            found, is_empty = problem(dataset, index, labels)
            if found:
                raise cli.UserError(found)
            empty.append(is_empty)
        if empty and all(empty):
            file = dataset.get_data_info(places[0]).get("seg_map_path")
            cli.warn(
                f"in all {len(places)} label maps that were looked at ({file} ...) every pixel is "
                f"ignored ({_listed(labels.ignored)}), so there may be nothing to learn"
            )


def explain(cfg: Config, splits: Sequence[str], error: Exception) -> None:
    """Look for the file that stopped a run, if its error came from the data, and name it."""
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    is_data = any(part in name for name in frames for part in DATA_CODE)
    if not (is_data or "DataLoader worker" in str(error) or "device-side" in str(error)):
        return
    print("looking for the file that stopped the run ...", file=sys.stderr, flush=True)
    labels, end = Labels.of(cfg), time.monotonic() + SECONDS
    for split in splits:
        for dataset in _datasets(cfg, split):
            for index in range(len(dataset)):
                if time.monotonic() > end:
                    return
                found, _ = problem(dataset, index, labels)
                if found:
                    raise cli.UserError(found) from error


def _datasets(cfg: Config, split: str) -> Iterator[Any]:
    """The data sets that read files, out of those of a split, which may be nested."""
    loader = cfg.get(f"{split}_dataloader") or {}
    scope = cfg.get("default_scope") or "mmseg"
    for path, node in cli.iter_dicts(loader.get("dataset"), "dataset"):
        if "pipeline" in node and ".pipeline" not in path and not {"dataset", "datasets"} & {*node}:
            with DATASETS.switch_scope_and_registry(scope) as registry:
                dataset = registry.build(node)
            steps = getattr(getattr(dataset, "pipeline", None), "transforms", ())
            if any(isinstance(step, LoadAnnotations) for step in steps):
                yield dataset


def _is_plain(dataset: Any) -> bool:
    """Whether no step of the pipeline is a user's own, which could map the labels."""
    known = ("mmcv", "mmengine", "mmseg", "ohem_mm")
    return all(type(step).__module__.split(".")[0] in known for step in dataset.pipeline.transforms)


def _listed(values: Any) -> str:
    return " or ".join(map(str, sorted(values)))
