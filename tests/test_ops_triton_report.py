"""The model of the kernels' time: its aims, and what is said where the tools are missing."""

import os

import pytest

pytest.importorskip("triton", reason="needs Triton")
report = pytest.importorskip("ohem_mm.ops.triton.report")
assembly = pytest.importorskip("ohem_mm.ops.triton.assembly")

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled in the interpreter"
)

CITY, _ = report.SHAPES.values()


@pytest.mark.slow
def test_the_model_meets_its_aims(triton_cache):
    if report.missing():
        pytest.skip("needs cuobjdump, which lies inside the wheel of Triton")
    rows = report.report([90])

    def total(shape, floor):
        return sum(row.microseconds for row in rows if (row.shape, row.floor) == (shape, floor))

    for shape, aim in zip(report.SHAPES, (350, 1600), strict=True):
        for floor in ("idle", "active"):
            assert 0 < total(shape, floor) <= aim
            # Every logit is looked at twice more.
            pair = total(shape + ", OHEM and region", floor)
            assert 1.2 < pair / total(shape, floor) <= 1.5
        plain = total(shape + ", plain CE and region", "idle")
        assert 1.15 < plain / total(shape, "idle") <= 1.5
    # What a pixel moves: four float32 maps, two of them written, one byte or two of label.
    slopes = next(row for row in rows if row.kernel == "slopes" and "OHEM" in row.shape)
    pixels, logits = 4 * 1024 * 1024, 4 * 4 * 19 * 128 * 128
    assert slopes.megabytes == pytest.approx((pixels * (5 * 4 + 1) + logits) / 1e6, abs=0.1)


def test_without_tools_it_reports_what_it_can(triton_cache, monkeypatch):
    monkeypatch.setattr(assembly, "tool", lambda name: None)
    launch = report.launches(CITY)[-1]
    code = report.read(launch.compile(90))
    row = report.describe(launch, code, CITY, "city", 90, True)
    assert (row.kernel, row.programs, row.registers, row.microseconds) == (
        "backward",
        1560,
        None,
        None,
    )
    assert row.megabytes > 40
