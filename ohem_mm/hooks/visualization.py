"""Draw what is mined while a model trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..loss import OhemCrossEntropyLoss
from ._losses import unwrap

__all__ = ["OhemVisualizationHook"]


@HOOKS.register_module()
class OhemVisualizationHook(Hook):  # type: ignore[misc]
    """Draw image, ground truth, prediction, loss and mined pixels side by side.

    The pictures go to the visualizer of the runner, and so to every backend that the config names
    (local files, TensorBoard, W&B), as ``ohem_train_<i>`` and ``ohem_val_<i>``.

    In training they show the very pixels that the iteration was trained on, mined over its batch.
    In validation they show the first images of the data set, so that pictures of different
    iterations compare; each image is mined on its own. Other iterations cost nothing.

    Args:
        interval: Training iterations between pictures; 0 draws in validation only.
        num_images: Images drawn each time.
        show_data: False leaves out the photograph and the ground truth, for data sets whose images
            may not be passed on.

    Raises:
        ValueError: On an interval below 0 or fewer images than one.
    """

    priority = "LOW"

    def __init__(self, interval: int = 500, num_images: int = 2, show_data: bool = True) -> None:
        if interval < 0:
            raise ValueError(f"interval must be an int >= 0, but got {interval!r}.")
        if num_images < 1:
            raise ValueError(f"num_images must be an int >= 1, but got {num_images!r}.")
        self.interval, self.num_images, self.show_data = interval, num_images, show_data
        self._handles: list[Any] = []
        self._seen: dict[str, Any] = {}
        self._drawn = 0
        self._told: set[str] = set()

    # --- training ----------------------------------------------------------------------------

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Listen to the loss in an iteration that is drawn."""
        from ..visualization import main_loss

        if not self.interval or (runner.iter + 1) % self.interval or not is_main_process():
            return
        main = main_loss(unwrap(runner.model))
        if main is None:
            self._tell(runner, "no OhemCrossEntropyLoss in the model; training is not drawn")
            return
        self._seen = {"main": main}
        self._handles = [
            main.loss.register_forward_pre_hook(self._ask, with_kwargs=True),
            main.loss.register_forward_hook(self._listen, with_kwargs=True),
        ]

    def _ask(
        self, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Ask the loss for its maps, whichever way it is called."""
        if kwargs.get("stats") is None:
            kwargs["stats"] = {}
        kwargs["stats"].setdefault("kept", None)
        return args, kwargs

    def _listen(
        self, loss: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor
    ) -> None:
        """Keep the first call of the iteration."""
        names = ("pred", "target")
        self._seen.setdefault("call", {**dict(zip(names, args, strict=False)), **kwargs})

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw what the loss saw."""
        while self._handles:
            self._handles.pop().remove()
        seen, self._seen = self._seen, {}
        if "call" in seen:
            self._draw_batch(runner, seen["main"], seen["call"], data_batch)

    def _draw_batch(self, runner: Any, main: Any, call: dict[str, Any], batch: Any) -> None:
        from ..visualization import MinedImage, predicted, to_rgb

        stats, pred = call["stats"], call["pred"].detach()
        if stats["kept"] is None or stats["kept"].dim() != 3:
            self._tell(runner, f"{main.name} scores no images but points; it is not drawn")
            return
        for index in range(min(self.num_images, len(pred))):
            target = call["target"][index].reshape(stats["kept"].shape[1:])
            maps = (
                target.long(),
                predicted(pred[index], target.shape, bool(call.get("align_corners"))),
                stats["mined"][index].detach().float(),
                stats["valid"][index],
                stats["kept"][index].float(),
            )
            sample = batch["data_samples"][index]
            shot = MinedImage(
                _name(sample, index),
                to_rgb(batch["inputs"][index], target.shape, pad=True),
                *(array.cpu().numpy() for array in maps),
            )
            self._draw(runner, shot, main.loss, pred.shape[1], f"ohem_train_{index}", 1)

    # --- validation and test -------------------------------------------------------------------

    def before_val_epoch(self, runner: Any) -> None:
        """Begin again at the first image."""
        self._drawn = 0

    def before_test_epoch(self, runner: Any) -> None:
        """Begin again at the first image."""
        self._drawn = 0

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw the first images."""
        self._draw_outputs(runner, "val", data_batch, outputs or ())

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw the first images."""
        self._draw_outputs(runner, "test", data_batch, outputs or ())

    def _draw_outputs(self, runner: Any, mode: str, batch: Any, outputs: Sequence[Any]) -> None:
        from ..visualization import MainLoss, main_loss, mine_sample

        if self._drawn >= self.num_images or not is_main_process():
            return
        main = main_loss(unwrap(runner.model))
        if main is None:
            main = MainLoss("", OhemCrossEntropyLoss(), 255)
            self._tell(runner, f"no OhemCrossEntropyLoss in the model; drawn as by {main.loss}")
        for index, sample in enumerate(outputs[: self.num_images - self._drawn]):
            if "gt_sem_seg" not in sample:
                self._tell(runner, f"the {mode} images have no labels; they are not drawn")
                return
            loader = runner.cfg.get("train_dataloader") or {}
            shot = mine_sample(
                sample,
                batch["inputs"][index],
                _name(sample, index),
                main,
                loader.get("batch_size") or 1,
            )
            classes = max(2, len(sample.seg_logits.data))
            self._draw(runner, shot, main.loss, classes, f"ohem_{mode}_{self._drawn}", 0)
            self._drawn += 1

    # --- both ------------------------------------------------------------------------------------

    def _draw(
        self,
        runner: Any,
        shot: Any,
        loss: OhemCrossEntropyLoss,
        num_classes: int,
        name: str,
        ahead: int,
    ) -> None:
        from ..visualization import board, class_colours

        # In after_train_iter the runner has not counted the iteration yet.
        step = runner.iter + ahead
        names, colours = class_colours(runner.visualizer.dataset_meta or {}, max(2, num_classes))
        picture = board(shot, names, colours, loss, f"iteration {step}", self.show_data)
        runner.visualizer.add_image(name, picture, step)

    def _tell(self, runner: Any, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            runner.logger.warning(f"OhemVisualizationHook: {message}.")


def _name(sample: Any, index: int) -> str:
    """File name of an image, or its place in the batch."""
    return str(sample.metainfo.get("img_path") or f"image {index}").rpartition("/")[2]
