"""A backbone that is not trained, and whose feature maps are computed once and kept on disk.

For comparing losses on a CPU: the backbone is most of the work, and while its weights and its input
stay the same, so do its feature maps. Importing this module registers :class:`FrozenBackbone`::

    custom_imports = dict(imports=["ohem_mm.frozen"])
    backbone = dict(type="FrozenBackbone", backbone=dict(type=...), cache_dir="work_dirs/features")
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor


@MODELS.register_module()
class FrozenBackbone(BaseModule):  # type: ignore[misc]
    """Any backbone, in evaluation mode, without gradients, with a cache of what it returns.

    The cache holds one file for each image, named after the image's values, in a folder named after
    the backbone's settings and weights. So it is worth having where the same image comes again:
    whole images, at most mirrored. Random crops would fill the disk and never be found again.
    Several processes may share it.

    With a cache, feature maps are rounded to float16, the first time as well, and each image goes
    through the backbone alone: a result depends neither on what the cache holds nor on the batch.

    Args:
        backbone: Config of the backbone. It must return a sequence of tensors.
        cache_dir: Folder of the cache, made when needed. None: nothing is kept and nothing rounded.
    """

    def __init__(
        self, backbone: dict[str, Any], cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        super().__init__()
        self._settings = json.dumps(backbone, sort_keys=True, default=repr)
        self.backbone = MODELS.build(backbone).requires_grad_(False)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self._folder: Path | None = None
        self.train()

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Stay in evaluation mode, whatever is asked for."""
        super().train(False)
        return self

    def init_weights(self) -> None:
        """Initialise the backbone by its own ``init_cfg``."""
        super().init_weights()
        self._folder = None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._folder = None  # other weights, other feature maps

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of a batch of preprocessed images.

        Args:
            images: Shape (N, C, H, W), floating point.

        Returns:
            For each level that the backbone returns one tensor of shape (N, C_i, H_i, W_i), with
            the dtype and on the device of ``images`` when they come from the cache.

        Raises:
            ValueError: A feature map is not finite in float16, so it cannot be cached.
        """
        if self.cache_dir is None:
            return tuple(self.backbone(images))
        if self._folder is None:
            self._folder = self.cache_dir / self._fingerprint()
            self._folder.mkdir(parents=True, exist_ok=True)
        levels = zip(*(self._cached(image[None]) for image in images), strict=True)
        return tuple(torch.cat(maps).to(images) for maps in levels)

    def _cached(self, image: Tensor) -> Sequence[Tensor]:
        """Feature maps of one image (1, C, H, W) in float16, from the cache or for it."""
        assert self._folder is not None
        file = self._folder / f"{_digest(image)}.pt"
        maps: list[Tensor]
        if file.is_file():
            maps = torch.load(file, map_location=image.device, weights_only=True)
            return maps
        with torch.autocast(image.device.type, enabled=False):
            maps = [level.half() for level in self.backbone(image)]
        if not all(level.isfinite().all() for level in maps):
            raise ValueError(
                "A feature map holds a value that float16 cannot hold; set cache_dir=None."
            )
        # Written aside and renamed: another process sees the whole file or none.
        with tempfile.TemporaryDirectory(dir=self._folder) as aside:
            torch.save(maps, f"{aside}/maps")
            os.replace(f"{aside}/maps", file)
        return maps

    def _fingerprint(self) -> str:
        """What the feature maps depend on besides the image: settings and weights."""
        total = hashlib.blake2b(self._settings.encode(), digest_size=16)
        for name, value in sorted(self.backbone.state_dict().items()):
            total.update(f"{name} {_digest(value)}".encode())
        return total.hexdigest()


def _digest(values: Tensor) -> str:
    """Hash of a tensor's dtype, shape and values; one or two milliseconds per megabyte."""
    total = hashlib.blake2b(f"{values.dtype} {tuple(values.shape)}".encode(), digest_size=16)
    total.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()
