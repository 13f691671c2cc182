"""Generated street-like scenes with rare, thin and small objects.

Nothing is read from or written to disk. A scene is a pure function of its numbers: the dataset
hands out ``scenes://`` addresses, and a small storage backend of mmengine draws the picture behind
an address when it is read. So ``LoadImageFromFile``, ``LoadAnnotations`` and
``SegVisualizationHook`` work on it as they are.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import cv2
from mmengine.fileio import BaseStorageBackend, register_backend
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from ohem_mm.datasets.streets import CLASSES, MIN_SIDE, PALETTE, SPLITS, draw_scene

__all__ = ["CLASSES", "PALETTE", "SPLITS", "StreetScenesDataset", "draw_scene"]

_ADDRESS = re.compile(
    r"scenes://(?P<split>train|val|test)-(?P<seed>\d+)-(?P<h>\d+)x(?P<w>\d+)(?:-rare(?P<rare>\d+))?/"
    r"(?P<index>\d+)(?P<label>_label)?\.png"
)


@register_backend("scenes", prefixes="scenes")
class ScenesBackend(BaseStorageBackend):  # type: ignore[misc]
    """Storage backend whose "files" are scenes, drawn when they are read.

    :class:`StreetScenesDataset` makes their addresses, ``scenes://{split}-{seed}-{H}x{W}`` and
    ``-rare{per cent}`` where not all rare things are drawn, then ``/{index}.png`` for the image and
    ``/{index}_label.png`` for the label map.
    """

    def get(self, filepath: str) -> bytes:
        """Return the PNG bytes behind an address."""
        match = _ADDRESS.fullmatch(str(filepath))
        if match is None:
            raise ValueError(
                f"no scene at {str(filepath)!r}: an address reads "
                "scenes://train-0-128x256/00007.png (or 00007_label.png)"
            )
        numbers = (int(match[name] or 100) for name in ("index", "h", "w", "seed", "rare"))
        index, height, width, seed, rare = numbers
        image, label = draw_scene(
            index, split=match["split"], size=(height, width), seed=seed, rare=rare
        )
        picture = label if match["label"] else image
        _, buffer = cv2.imencode(".png", picture, [cv2.IMWRITE_PNG_COMPRESSION, 0])
        return buffer.tobytes()

    def get_text(self, filepath: str, encoding: str = "utf-8") -> str:
        """Refuse: there is no text in this storage."""
        raise NotImplementedError("a scene is a picture, not text; use get()")


@DATASETS.register_module()
class StreetScenesDataset(BaseSegDataset):  # type: ignore[misc]
    """Generated street-like scenes: 10 classes, of which four are rare, thin or small.

    Person, pole, sign and light cover about 2 % of the pixels together; many are one to three
    pixels wide. Facades, lane marks, tree trunks and adverts look like them, and lighting and
    noise vary. The same arguments give the same scenes in every run, process and worker.

    Args:
        num_scenes: How many scenes the split has.
        split: ``'train'``, ``'val'`` or ``'test'``.
        size: (H, W) of a scene in pixels, each at least 48.
        seed: Seed of the data set, 0 or more; another seed is another data set.
        rare: Per cent of the people and poles (with their signs and lights) that are drawn, 0 to
            100: how rare the rare classes are.
        **kwargs: Of ``mmseg.datasets.BaseSegDataset``, such as ``pipeline`` or ``indices``.

    Raises:
        ValueError: An argument is out of its range.
    """

    METAINFO: ClassVar[dict[str, Any]] = {"classes": CLASSES, "palette": PALETTE}

    def __init__(
        self,
        num_scenes: int,
        split: str = "train",
        size: tuple[int, int] = (128, 256),
        seed: int = 0,
        rare: int = 100,
        **kwargs: Any,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
        if num_scenes < 1:
            raise ValueError(f"num_scenes is {num_scenes}; it must be 1 or more")
        if len(size) != 2 or min(size) < MIN_SIDE:
            raise ValueError(f"size is {size}; it must be (H, W), each {MIN_SIDE} or more")
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must be 0 or more")
        if not 0 <= rare <= 100:
            raise ValueError(f"rare is {rare}; it must be a per cent from 0 to 100")
        self.num_scenes = num_scenes
        self.folder = f"scenes://{split}-{seed}-{size[0]}x{size[1]}"
        if rare < 100:
            self.folder += f"-rare{rare}"
        super().__init__(img_suffix=".png", seg_map_suffix="_label.png", **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the addresses of the scenes."""
        return [
            {
                "img_path": f"{self.folder}/{i:05d}{self.img_suffix}",
                "seg_map_path": f"{self.folder}/{i:05d}{self.seg_map_suffix}",
                "label_map": self.label_map,
                "reduce_zero_label": self.reduce_zero_label,
                "seg_fields": [],
            }
            for i in range(self.num_scenes)
        ]
