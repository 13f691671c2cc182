"""What docs/compatibility.md says, run again: ``nox -l`` lists the sessions.

Torch for the CPU is taken where PIP_CONSTRAINT and PIP_EXTRA_INDEX_URL lead to it (README.md says
how); else pip takes CUDA builds of several GB. Interpreters are those on the PATH.
"""

import nox

nox.options.default_venv_backend = "venv"

OLDEST = ["torch==2.4.0", "numpy==1.26.4"]
CORE = [  # need torch alone
    *("loss", "region", "joint", "mining", "overlap", "presets", "reference"),
    *("inputs", "rule", "settings", "ohem_mm", "docs_pytorch", "bench_edge_cases"),
    *("ops", "ops_compiled", "ops_eager", "ops_portable", "ops_portable_region", "ops_region"),
]
INSIDE = [  # need mmengine and mmseg
    *("openmmlab", "openmmlab_heads", "cli_configs", "models_optim"),
    *("hooks", "hooks_fused", "hooks_monitor", "hooks_schedule"),
]
RECIPES = [
    *("transformers[torch]", "torchvision", "segmentation-models-pytorch"),
    *("lightning", "nnunetv2", "monai"),
]


def run(session, *names):
    """Run test files, and say what with."""
    session.run(
        "python",
        "-c",
        "import sys, torch, numpy; print(sys.version, torch.__version__, numpy.__version__)",
    )
    files = [f"tests/test_{name}.py" for name in names]
    environment = {"OHEM_MM_REQUIRE": "1"}  # a library that is missing fails, and is not skipped
    session.run("pytest", "-q", *files, *session.posargs, env=environment)


def install(session, *packages):
    """Install this package with what its tests need, in one go, so that pip sees all pins."""
    session.install(".", "pytest", "pytest-timeout", "hypothesis", "scipy", "numpy", *packages)


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def newest(session):
    """The losses and the default stack with the newest torch, on every Python."""
    install(session, ".[mmseg,test]")
    run(session, *CORE, *INSIDE)


@nox.session(python="3.10")
def oldest(session):
    """The losses with the oldest torch and numpy."""
    install(session, *OLDEST)
    run(session, *CORE)


@nox.session(python="3.10")
def oldest_mmseg(session):
    """The default stack with the oldest torch, and the numpy that it wants."""
    # Not the extra `test`: its Triton is newer than the one that this torch pins.
    install(session, ".[mmseg]", OLDEST[0], "matplotlib", "rich", "tensorboard")
    run(session, *INSIDE)


@nox.session
def recipes(session):
    """docs/recipes.md, with the real libraries."""
    install(session, *RECIPES)
    run(session, "docs_recipes")


@nox.session
def siblings(session):
    """docs/openmmlab.md, with the real mmdet, mmpretrain and mim."""
    install(
        session,
        *(".[mmseg,test]", "torchvision"),
        *("onedl-mmdetection", "onedl-mmpretrain", "onedl-mim"),
    )
    session.run(
        "python",
        "-c",
        "import mmcv, os, shutil; target = os.path.join(mmcv.__path__[0], '_ext.py');"
        "shutil.copy('tests/stubs/mmcv_ext.py', target)",
    )
    run(session, "docs_openmmlab")
