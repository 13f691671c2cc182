"""The package as it is imported: with torch alone, and beside any Triton."""

import math
import subprocess
import sys

import pytest


def test_imports_with_torch_alone():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmseg', 'numpy', 'cv2', 'PIL', 'triton'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch, ohem_mm
loss = ohem_mm.OhemCrossEntropyLoss(class_weight=[1.0, 2.0])
print(float(loss(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long))))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(math.log(2))


@pytest.mark.parametrize("version", [None, "3.0.0"])
def test_imports_without_triton_and_beside_an_old_one(version):
    """That of torch 2.4 has a ``jit`` that does not know what the kernels ask of it."""
    code = f"""
import sys, types, torch
old = types.ModuleType("triton")
old.__version__, old.jit, old.__path__ = {version!r}, None, []
old.language = types.ModuleType("triton.language")
missing = old.__version__ is None  # None among the modules makes an import fail
sys.modules["triton"] = None if missing else old
sys.modules["triton.language"] = None if missing else old.language
import ohem_mm
from ohem_mm.ops import triton
logits = torch.zeros(1, 2, 3, 4)
assert not triton.available(logits)
print(float(ohem_mm.ohem_cross_entropy(logits, torch.zeros(1, 6, 8, dtype=torch.long))))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(math.log(2))
