"""left_out.py: what cannot run is left out, and one line says so."""

import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

within = pytest.mark.skipif(True, reason="runs elsewhere")


@within
@pytest.mark.parametrize("i", range(20))
def test_elsewhere(i):
    raise AssertionError


@pytest.mark.skipif(False, reason="runs here")
def test_here():
    pass


def test_library():
    pytest.importorskip("no_such_library", reason="needs no_such_library")
"""


@pytest.mark.parametrize("processes", [0, 2])
def test_one_line_says_what_was_left_out(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(Path(__file__).with_name("left_out.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -rfExX")
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path)]
    command += ["-n", str(processes)] if processes else []
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stdout
    assert "left out: 20 (runs elsewhere); 1 (needs no_such_library)\n" in result.stdout
    assert "SKIPPED" not in result.stdout
    assert "1 passed, 1 skipped" in result.stdout
