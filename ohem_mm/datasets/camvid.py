"""CamVid with the 11 classes of the SegNet split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from mmengine import fileio
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

__all__ = ["CLASSES", "PALETTE", "CamVidDataset"]

_COLOURS = {
    "sky": [128, 128, 128],
    "building": [128, 0, 0],
    "pole": [192, 192, 128],
    "road": [128, 64, 128],
    "pavement": [60, 40, 222],
    "tree": [128, 128, 0],
    "sign": [192, 128, 128],
    "fence": [64, 64, 128],
    "car": [64, 0, 128],
    "pedestrian": [64, 64, 0],
    "bicyclist": [0, 128, 192],
}
CLASSES, PALETTE = tuple(_COLOURS), list(_COLOURS.values())


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):  # type: ignore[misc]
    """CamVid: 367 / 101 / 233 frames of 480x360, 11 classes, void is 255.

    ``tools/dataset_converters/camvid.py`` makes the folders that it reads.

    Args:
        img_suffix: Ending of the image files. None looks into the image folder and takes
            ``.jpg`` or ``.png``, whichever is there.
        **kwargs: Of ``mmseg.datasets.BaseSegDataset``, such as ``data_root``, ``data_prefix``
            or ``pipeline``.

    Raises:
        FileNotFoundError: The image folder holds neither ``.jpg`` nor ``.png`` files.
        ValueError: It holds both and ``img_suffix`` does not say which to take.
    """

    METAINFO: ClassVar[dict[str, Any]] = {"classes": CLASSES, "palette": PALETTE}
    img_suffix: str | None

    def __init__(self, img_suffix: str | None = None, **kwargs: Any) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=".png", **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """List the frames."""
        if self.img_suffix is None:
            self.img_suffix = self._find_suffix()
        return list(super().load_data_list())

    def _find_suffix(self) -> str:
        folder, backend = self.data_prefix["img_path"], {"backend_args": self.backend_args}
        found: set[str] = set()
        if fileio.exists(folder, **backend):
            files = fileio.list_dir_or_file(folder, list_dir=False, **backend)
            found = {".jpg", ".png"} & {Path(file).suffix for file in files}
        if not found:
            raise FileNotFoundError(
                f"no .jpg or .png image in {folder!r}; "
                "tools/dataset_converters/camvid.py prepares CamVid"
            )
        if len(found) > 1:
            raise ValueError(
                f"{folder!r} holds .jpg and .png images; img_suffix must say which to take"
            )
        return found.pop()
