"""The small rooms of the benchmarks: parts of other packages, imported without the top of them.

How far jobs are shows in ``test_bench_jobs.py``, where a measurement comes from in the records.
"""

import sys

import pytest

from ohem_mm.bench.peers import submodule


@pytest.fixture
def package(tmp_path, monkeypatch):
    top = tmp_path / "broken_at_the_top"
    (top / "losses").mkdir(parents=True)
    (top / "__init__.py").write_text("import no_such_dependency")
    (top / "losses" / "__init__.py").write_text("from .dice import VALUE")
    (top / "losses" / "dice.py").write_text("VALUE = 7")
    (top / "wrong.py").write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(tmp_path)
    yield top.name
    for name in [name for name in sys.modules if name.startswith(top.name)]:
        del sys.modules[name]


def test_a_subpackage_and_a_module(package):
    assert submodule(package, "losses").VALUE == 7
    assert submodule(package, "losses") is submodule(package, "losses")
    assert submodule(package, "losses.dice").VALUE == 7
    assert package not in sys.modules


def test_what_is_not_there_is_an_import_error(package):
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_package'"):
        submodule("no_such_package", "losses")
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{package}.nothing'"):
        submodule(package, "nothing")
    for _ in range(2):  # a part that fails is not kept
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            submodule(package, "wrong")
