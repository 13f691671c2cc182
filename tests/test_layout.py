"""A file of tests mirrors a file of the package: the rule that ``CONTRIBUTING.md`` states."""

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ohem_mm"
TESTS = {path.stem for path in ROOT.glob("tests/test_*.py")}
SMALL = 60  # lines; a smaller file may go without tests of its own
# Files of tests that mirror none, and why.
ACROSS = {
    "test_layout": "mirrors all",
    "test_openmmlab": "the loss in mmengine's registries and mmseg's heads, which are not ours",
    "test_openmmlab_heads": "every head of mmseg",
}


def flat(path):
    """``ops/triton/cells.py`` as ``ops_triton_cells``; a package goes by the name of its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "_".join(part.lstrip("_") for part in parts if part != "__init__") or PACKAGE.name


MODULES = {path: flat(path) for path in sorted(PACKAGE.rglob("*.py"))}


def home(name):
    """The file with the tests of what has this name: the longest that the name begins with."""
    words = name.split("_")
    beginnings = ("_".join(["test", *words[:n]]) for n in range(len(words), 0, -1))
    return next((test for test in beginnings if test in TESTS), None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("loss", "test_loss"),
        ("ops_triton_trial_region", "test_ops_triton_trial_region"),
        ("ops_triton_cells", "test_ops_triton"),
        ("ops_compiled_region", "test_ops_compiled"),
        ("cli_inspection_heads", "test_cli_inspection"),
        ("configs", "test_configs"),  # and not test_config
        ("nothing_of_the_kind", None),
    ],
)
def test_the_rule(name, expected):
    assert home(name) == expected


def test_every_file_of_tests_mirrors_one():
    pages = (f"docs_{path.stem}" for path in ROOT.glob("docs/*.md"))
    helpers = (path.stem for path in ROOT.glob("tests/*.py") if f"test_{path.stem}" in TESTS)
    mirrored = {home(name) for name in [*MODULES.values(), *pages, "configs", "tools"]}
    mirrored |= {f"test_{name}" for name in helpers}
    assert TESTS - mirrored == set(ACROSS)


def test_every_file_of_the_package_has_its_tests():
    assert [name for name, times in Counter(MODULES.values()).items() if times > 1] == []
    homeless = [
        str(path.relative_to(ROOT))
        for path, name in MODULES.items()
        if home(name) is None and len(path.read_text(encoding="utf-8").splitlines()) > SMALL
    ]
    assert homeless == []
