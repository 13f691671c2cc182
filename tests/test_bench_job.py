"""One job: where it goes on."""

from pathlib import Path

import pytest

pytest.importorskip("mmseg")

from ohem_mm.cli.checkpoints import numbered

pytestmark = pytest.mark.usefixtures("elsewhere")


def test_latest_checkpoint_is_a_whole_one(tmp_path):
    import torch

    assert numbered(tmp_path) == []
    for step in (90, 100, 110):
        torch.save({"x": torch.zeros(1000)}, f"iter_{step}.pth")
    content = Path("iter_110.pth").read_bytes()
    Path("iter_110.pth").write_bytes(content[: len(content) // 2])
    torch.save({}, "best_mIoU_iter_300.pth")
    assert numbered(tmp_path)[0].name == "iter_100.pth"
