"""Records of the machine code of the kernels, and their tables."""

import pytest

pytest.importorskip("triton", reason="needs Triton")

from ohem_mm.bench import kernels
from ohem_mm.errors import UserError
from ohem_mm.ops.triton import report


def row(kernel, microseconds, registers=32):
    return report.Row(
        *(kernel, "4x19x1024x1024/8", "idle", "sm_90 H100", 8, 1, registers, 0, 0, 0),
        *(100, 20, 8, 1.5, 2.0, microseconds, "issue"),
    )


def test_records_and_tables(tmp_path):
    path = tmp_path / "kernels.csv"
    old = [row("forward", 90.0, 120), row("choose_digit 0", 4.5)]
    new = [row("forward", 60.0, 114), row("begin_floor", 4.5)]
    kernels.append(path, kernels.records(old, "made by hand", commit="1111111"))
    kernels.append(path, kernels.records(new, "made by hand", commit="2222222"))
    rows = kernels.read(path)
    assert [entry["commit"] for entry in rows] == ["1111111"] * 2 + ["2222222"] * 2
    text = kernels.tables(rows)
    assert "sm_90 H100, 4x19x1024x1024/8, floor idle, 1111111 / 2222222:" in text
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["forward", "120 / 114", "20 / 20", "1.5 / 1.5", "90.0 / 60.0"] in cells
    assert ["choose_digit 0", "32 / -", "20 / -", "1.5 / -", "4.5 / -"] in cells
    assert ["2 launches / 2 launches", "", "", "", "94 / 64"] in cells


def test_one_commit_has_no_second_column():
    rows = kernels.records([row("forward", 60.0)], "made by hand", commit="2222222")
    assert "floor idle, 2222222:" in kernels.tables(rows)


def test_files_of_others(tmp_path):
    with pytest.raises(UserError, match="no records at .* run without --report first"):
        kernels.read(tmp_path / "kernels.csv")
    (tmp_path / "kernels.csv").write_text("a,b\n1,2\n")
    for use in (kernels.read, lambda path: kernels.append(path, [])):
        with pytest.raises(UserError, match="the columns of .* are not kernel, shape"):
            use(tmp_path / "kernels.csv")


def test_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(report, "tool", lambda name: None)
    assert "cuobjdump is not in this build of Triton" in report.missing()[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UserError, match="nothing is compiled with TRITON_INTERPRET=1"):
        report.missing()
