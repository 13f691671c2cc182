"""A trained model and the images to look at with it.

The tools that look are in ``test_cli_thresholds.py`` and ``test_visualization_gallery.py``.
"""

from __future__ import annotations

import pytest
import torch
from tiny import save_checkpoint, tiny
from tooling import OHEM

pytest.importorskip("mmseg")

from ohem_mm.cli import thresholds, trained

pytestmark = pytest.mark.filterwarnings("ignore:Default ``avg_non_ignore``")


def test_looking_changes_nothing_in_the_model(tmp_path):
    cfg, _ = tiny(OHEM)
    model = trained.build_model(cfg, str(save_checkpoint(tmp_path)), training=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cfg.train_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    watch = thresholds.Watch(model, None, [], None)
    assert watch.threshes == [0.5, 0.6, 0.7, 0.8, 0.9]
    loader = trained.training_batches(cfg, "train", 0)
    assert watch.run(model, [next(iter(loader))]) == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
