"""Where the tests of the kernels run: on a GPU, or without one in Triton's interpreter.

Triton decides whether it interprets when it is imported, so that takes a process of its own, which
``test_interpreter.py`` starts.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="kernels run within test_interpreter.py"
)
