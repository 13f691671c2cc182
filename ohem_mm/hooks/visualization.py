"""Draw what is mined while a model trains."""

from __future__ import annotations

from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from ..loss import OhemCrossEntropyLoss
from ._losses import Listener, unwrap

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
        self._listener = Listener()
        self._main: Any = None
        self._calls: list[dict[str, Any]] = []
        self._drawn = 0
        self._told: set[str] = set()

    # --- training ----------------------------------------------------------------------------

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Listen to the loss in an iteration that is drawn."""
        from ..visualization import main_loss

        if not self.interval or (runner.iter + 1) % self.interval or not is_main_process():
            return
        self._main = main_loss(unwrap(runner.model))
        if self._main is None:
            self._tell(runner, "no OhemCrossEntropyLoss in the model; training is not drawn")
        else:
            self._listener.listen(self._main.loss, self._calls.append, maps=True)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Draw what the loss saw in its first call of the iteration."""
        self._listener.stop()
        calls, self._calls = self._calls, []
        if calls:
            self._draw_batch(runner, calls[0], data_batch)

    def _draw_batch(self, runner: Any, call: dict[str, Any], batch: Any) -> None:
        from ..visualization import MinedImage, predicted, to_rgb

        main, stats, pred = self._main, call["stats"], call["pred"].detach()
        if stats["kept"] is None or stats["kept"].dim() != 3:
            self._tell(runner, f"{main.name} scores no images but points; it is not drawn")
            return
        for index in range(min(self.num_images, len(pred))):
            target = call["target"][index].reshape(stats["kept"].shape[1:])
            shot = MinedImage.of(
                _name(batch["data_samples"][index], index),
                to_rgb(batch["inputs"][index], target.shape, pad=True),
                target,
                predicted(pred[index], target.shape, bool(call.get("align_corners"))),
                *(stats[key][index] for key in ("mined", "valid", "kept")),
            )
            # The runner has not counted the iteration yet.
            step, name = runner.iter + 1, f"ohem_train_{index}"
            self._draw(runner, shot, main.loss, pred.shape[1], name, step)

    # --- validation and test -------------------------------------------------------------------

    def _before_epoch(self, runner: Any, mode: str = "train") -> None:
        """Begin again at the first image."""
        self._drawn = 0

    def _after_iter(
        self,
        runner: Any,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = "train",
    ) -> None:
        """In validation and test, draw the first images."""
        from ..visualization import MainLoss, main_loss, mine_sample

        if self._drawn >= self.num_images or not is_main_process():
            return
        main = main_loss(unwrap(runner.model))
        if main is None:
            main = MainLoss("", OhemCrossEntropyLoss(), 255)
            self._tell(runner, f"no OhemCrossEntropyLoss in the model; drawn as by {main.loss}")
        batch_size = (runner.cfg.get("train_dataloader") or {}).get("batch_size") or 1
        for index, sample in enumerate((outputs or ())[: self.num_images - self._drawn]):
            if "gt_sem_seg" not in sample:
                self._tell(runner, f"the {mode} images have no labels; they are not drawn")
                return
            image, name = data_batch["inputs"][index], _name(sample, index)
            shot = mine_sample(sample, image, name, main, batch_size)
            classes = len(sample.seg_logits.data)
            self._draw(runner, shot, main.loss, classes, f"ohem_{mode}_{self._drawn}", runner.iter)
            self._drawn += 1

    # --- both ------------------------------------------------------------------------------------

    def _draw(
        self, runner: Any, shot: Any, loss: OhemCrossEntropyLoss, classes: int, name: str, step: int
    ) -> None:
        from ..visualization import board, class_colours

        names, colours = class_colours(runner.visualizer.dataset_meta or {}, max(2, classes))
        picture = board(shot, names, colours, loss, f"iteration {step}", self.show_data)
        runner.visualizer.add_image(name, picture, step)

    def _tell(self, runner: Any, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            runner.logger.warning(f"OhemVisualizationHook: {message}.")


def _name(sample: Any, index: int) -> str:
    """File name of an image, or its place in the batch."""
    return str(sample.metainfo.get("img_path") or f"image {index}").rpartition("/")[2]
