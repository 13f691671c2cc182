"""Schedules: pure functions of sizes."""

import pytest

geometry = pytest.importorskip("ohem_mm.ops.triton.geometry")
Sizes, Tiling = geometry.Sizes, geometry.Tiling
CITY = Sizes(4, 19, 128, 128, 1024, 1024)
ADE = Sizes(16, 150, 128, 128, 512, 512)
H100, A100 = 132, 108


def test_tiles_of_the_forward_pass():
    assert geometry.forward(CITY) == (8, 32, 128, 32, 4 * 128 * 32)
    assert geometry.forward(ADE) == (4, 64, 128, 8, 16 * 128 * 8)
    full = geometry.forward(Sizes(2, 19, 512, 1024, 512, 1024))
    assert full == (2, 128, 256, 8, 2 * 256 * 8)
    # A cell may hold all rows; a tile never has a dimension of 1.
    assert geometry.forward(Sizes(1, 2, 1, 1, 1000, 3))[:3] == (8, 32, 1)
    assert geometry.forward(Sizes(1, 2, 5, 5, 6, 6)).rows == 2


def test_every_pixel_is_in_a_forward_tile():
    for sizes in (CITY, ADE, Sizes(1, 2, 7, 9, 33, 65), Sizes(3, 2, 33, 65, 33, 65)):
        plan = geometry.forward(sizes)
        assert plan.across * plan.cols >= sizes.high_w > (plan.across - 1) * plan.cols
        rows = plan.down * plan.rows if sizes.full else plan.down
        assert rows >= (sizes.high_h if sizes.full else sizes.low_h)
        assert plan.programs == sizes.images * plan.across * plan.down


def test_tiles_of_the_region_term():
    plan = geometry.region(CITY)
    assert plan == ((2, 8, 8, 32), 32, 16, 14, 4 * 32 * 16, 128)
    plan = geometry.region(ADE)
    assert plan[:3] == ((4, 4, 8, 32), 32, 16)
    assert plan.tiles == 4  # cell 0 has half as many pixels again along each axis
    full = geometry.region(Sizes(2, 19, 512, 1000, 512, 1000))
    assert full[:5] == ((2, 4, 8, 32), 256, 8, 1, 2 * 256 * 8)


@pytest.mark.parametrize("size", [(7, 9, 33, 65), (1, 1, 9, 3), (5, 5, 6, 6), (33, 65, 33, 65)])
def test_every_cell_is_in_a_tile_of_the_region_term(size):
    sizes = Sizes(3, 2, *size)
    plan = geometry.region(sizes)
    tile = plan.tile
    assert tile.rows * tile.cols <= Tiling().pixels
    assert min(tile.rows, tile.cols) >= 2
    high, wide = tile.lanes // tile.wide, tile.wide
    if sizes.full:
        high, wide = tile.rows, tile.cols * tile.lanes
    assert plan.down * high >= sizes.low_h > (plan.down - 1) * high
    assert plan.across * wide >= sizes.low_w > (plan.across - 1) * wide
    assert plan.programs == 3 * plan.down * plan.across


def test_planes_of_the_region_term_keep_to_32_bits():
    assert not geometry.spans_too_much((1000, 1000), (3 * 10**9, 10**6, 1000, 1))
    # Channels last: a plane spans the whole image.
    assert geometry.spans_too_much((1000, 1000), (3 * 10**9, 1, 3 * 10**6, 3000))


def test_programs_of_the_mining():
    assert geometry.mining(CITY) == (1024, 256)
    assert geometry.mining(ADE) == (1024, 64)
    assert geometry.mining(Sizes(1, 2, 2, 2, 9, 9)) == (1024, 1)
    assert geometry.mining(Sizes(5000, 2, 8, 8, 64, 64)) == (1024, 1)
    assert geometry.mining(Sizes(0, 2, 2, 2, 9, 9)).parts == 1


@pytest.mark.parametrize(("processors", "walk", "rounds"), [(H100, 5, 1), (A100, 3, 2)])
def test_the_backward_walk_of_city_fills_the_device(processors, walk, rounds):
    plan = geometry.backward(CITY, processors)
    assert (plan.cells, plan.class_tile, plan.across, plan.deep) == (32, 8, 5, 3)
    assert plan.walk == walk
    # Three warps for each of four schedulers of a multiprocessor, and hardly fewer.
    assert 0.98 < plan.programs / (12 * processors * rounds) <= 1
    assert plan.registers == 168


def test_the_backward_walk_of_ade_is_the_longest():
    plan = geometry.backward(ADE, H100)
    assert (plan.walk, plan.deep, plan.programs) == (16, 19, 5 * 19 * 16 * 8)


def test_small_inputs_have_short_walks_and_huge_ones_long():
    assert geometry.backward(Sizes(1, 19, 64, 64, 512, 512), H100).walk == 1
    assert geometry.backward(Sizes(1, 2, 1, 1, 4, 4), H100).walk == 1
    assert geometry.backward(Sizes(64, 150, 256, 256, 1024, 1024), H100).walk == 16
    assert geometry.backward(CITY, H100, Tiling(walk=3)).walk == 3
    full = geometry.backward(Sizes(2, 19, 100, 200, 100, 200), H100)
    assert (full.walk, full.cells, full.programs) == (2, 128, 2 * 50 * 2)


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 19, 150])
def test_every_class_and_cell_is_in_a_backward_program(classes):
    sizes = Sizes(2, classes, 33, 32, 100, 100)
    plan = geometry.backward(sizes, H100)
    assert plan.class_tile * plan.deep >= classes
    assert plan.across * (plan.cells - 1) >= sizes.low_w
    assert plan.programs == 2 * plan.deep * plan.across * -(-sizes.low_h // plan.walk)


def contiguous(sizes):
    plane = sizes.low_h * sizes.low_w
    return (plane * sizes.classes, plane, sizes.low_w, 1)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        (CITY, None),
        (ADE, None),
        (Sizes(65536, 2, 2, 2, 4, 4), "cannot take 65536 images at once, only 65535"),
        (Sizes(65535, 2, 2, 2, 4, 4), None),
        (Sizes(0, 2, 2, 2, 4, 4), None),
        (Sizes(2048, 19, 128, 128, 1024, 1024), "pixels pass"),
        (Sizes(1, 2, 40_000, 2, 40_000, 2), "positions pass"),
        (Sizes(1, 2, 30_000, 2, 30_000, 2), None),
        (Sizes(1, 3000, 1000, 1000, 1000, 1000), None),
        (Sizes(1, 0, 2, 2, 4, 4), "without channels, rows or columns"),
        (Sizes(1, 2, 0, 2, 4, 4), "without channels, rows or columns"),
        # More than 65535 rows of programs: they lie along the first axis of the grid.
        (Sizes(1, 150, 20_000, 8, 20_000, 16), None),
    ],
)
def test_limits(sizes, reason):
    found = geometry.refusal(sizes, contiguous(sizes))
    assert (found is None) if reason is None else (reason in found)


def test_limits_of_strides():
    assert geometry.refusal(CITY, (2**40, 2**35, 2**35, 1)) is None
    assert "strides pass" in geometry.refusal(CITY, (1, 1, 1, 2**24))


@pytest.mark.parametrize("align_corners", [False, True])
def test_no_cell_is_longer_than_the_bound(align_corners):
    for low in range(1, 9):
        for high in range(low, 40):
            line = (2 * low, low - high, 2 * high)
            if align_corners:
                line = (1, 0, 1) if 1 in (low, high) else (low - 1, 0, high - 1)
            a, b, d = line
            cells = [min(max(a * i + b, 0) // d, low - 1) for i in range(high)]
            rows = max(cells.count(cell) for cell in set(cells))
            assert rows <= geometry._longest(low, high)
