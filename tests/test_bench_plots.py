"""Plots from records alone."""

from pathlib import Path

import pytest
from benchmarks import BENCH, GRID, all_records, fake, tiny_records, tuned, write_yaml

pytest.importorskip("mmseg")
pytest.importorskip("matplotlib")

from ohem_mm.bench import files, plots
from ohem_mm.bench.results import select

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture
def records():
    return tiny_records()


def test_plots_are_the_same_bytes_every_time(records):
    bench = files.load_benchmark(write_yaml(BENCH))
    grid = files.load_benchmark(write_yaml(GRID, "grid.yaml"))
    cells = [fake(name, 0, [60.0, 50.0, 10.0], name="grid") for name in grid.variants]
    for _ in range(2):
        drawings = plots.plot(select(bench, records), Path("plots"))
        drawings += plots.plot(select(grid, cells), Path("plots"))
        names = [file.name for file in drawings]
        assert names == ["tiny-classes.svg", "tiny-curves.svg", "grid-grid.svg"]
        drawn = [file.read_bytes() for file in drawings]
        assert all(b"<svg" in content for content in drawn)
        for file in drawings:
            file.unlink()
        first = locals().get("first", drawn)
        assert drawn == first


def test_plot_of_tuning():
    benchmark = tuned()
    results = select(benchmark, all_records(benchmark))
    (axis,) = plots._draw_tuning(results).axes
    lines = [line for line in axis.lines if len(line.get_xdata()) > 1]
    assert [line.get_label() for line in lines] == ["plain CE", "ohem", "weak"]
    assert list(lines[0].get_xdata()) == [0.001, 0.01, 0.1]
    assert list(lines[0].get_ydata()) == [50, 60, 55]
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axis.lines if line not in lines]
    assert rings == [(0.01, 60), (0.001, 61), (0.1, 58)]
    assert axis.get_xscale() == "log"
    drawn = [plots.plot(results, Path("plots"))[-1].read_bytes() for _ in range(2)]
    assert drawn[0] == drawn[1]
