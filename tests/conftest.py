import os
import sys
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from left_out import (  # noqa: F401
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)
from loading import load_tool

pytest.register_assert_rewrite("benchmarks", "originals", "tooling")

# One thread each: tests are small, and two cores run faster without contention.
torch.set_num_threads(1)
settings.register_profile(
    "ohem_mm",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("ohem_mm")

# timm imports torchvision, whose operators do not load beside a torch of another build (CPU and
# CUDA). timm needs none of them; torchvision only wants to see that they are declared.
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    library = torch.library.Library("torchvision", "DEF")  # lives as long as this module
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(params=["portable", "eager"])  # test_ops_triton.py has the third
def backend(request):
    """Each backend that runs anywhere, asked for by hand; returns its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OHEM_MM_BACKEND", request.param)
        yield request.param


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory):
    """A folder of its own for what Triton compiles."""
    folder = tmp_path_factory.mktemp("triton")
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(folder)):
        yield


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder of the test's own, and as no rank of a run of several."""
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Call a tool in this process; return its exit code and what it wrote to stderr."""
    from ohem_mm import cli

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setenv("LOCAL_RANK", "0")
        code = cli.run(load_tool(name).main)
        return code, capsys.readouterr().err

    return call
