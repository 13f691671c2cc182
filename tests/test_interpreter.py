"""The kernels without a GPU: the files that test them once more, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import DEVICE, INTERPRETED
from marks import slow

pytest.importorskip("triton", reason="needs Triton")

FILES = sorted(
    path.name
    for path in Path(__file__).parent.glob("test_ops_triton*.py")
    if "from interpreter import" in path.read_text()
)


def test_the_files_are_found():
    assert {"test_ops_triton.py", "test_ops_triton_trial.py"} < set(FILES)


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the files themselves run the kernels")
@pytest.mark.parametrize("which", ["not slow", slow("slow")])
@pytest.mark.parametrize("file", FILES)
def test_in_the_interpreter(file, which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, file]
    result = subprocess.run(
        command,
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if which == "slow" and result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        pytest.skip("no slow tests in it")
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
