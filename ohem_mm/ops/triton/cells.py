# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Tiles in which a thread owns a cell, and so reads its four corners once for all of its pixels.

Arrays over cells have shape (lanes,); those over pixels (rows, cols, lanes), of which the first two
lie within a thread.
"""

from __future__ import annotations

from .inner import LOG2_E, axis, begin, jit, tl, weight_in


@jit
def cells_of(
    program, low_h, low_w, high_h, high_w, down, across, kind: tl.constexpr, tile: tl.constexpr
):
    """For each axis: cell of each lane, its first pixel, the end of its pixels, and the longest.

    At full size the pixels of a lane lie in a row, as many columns apart as there are lanes.
    """
    lane = tl.arange(0, tile.lanes)
    block_x = program % across
    block_y = program // across % down
    if kind.full:
        cell_y, cell_x = 0 * lane, 0 * lane
        y_begin, x_begin = block_y * tile.rows + cell_y, block_x * (tile.cols * tile.lanes) + lane
        y_end, x_end = high_h + cell_y, high_w + cell_x
        height, width = tile.rows, 1
    else:
        cell_y = block_y * (tile.lanes // tile.wide) + lane // tile.wide
        cell_x = block_x * tile.wide + lane % tile.wide
        line_y = axis(low_h, high_h, kind.align_corners)
        line_x = axis(low_w, high_w, kind.align_corners)
        # Cells outside have no pixel: they begin where they end.
        y_begin, y_end = begin(cell_y, line_y, high_h), begin(cell_y + 1, line_y, high_h)
        x_begin, x_end = begin(cell_x, line_x, high_w), begin(cell_x + 1, line_x, high_w)
        height, width = tl.max(y_end - y_begin, 0), tl.max(x_end - x_begin, 0)
    return (cell_y, y_begin, y_end, height), (cell_x, x_begin, x_end, width)


@jit
def positions(cell, begin_at, steps, low, high, align_corners: tl.constexpr):
    """Pixels of each lane along one axis, and their weights of the cell's second corner."""
    at = begin_at[None, :] + steps[:, None]
    return at, weight_in(cell[None, :], at, axis(low, high, align_corners), low - 1)


@jit
def corners_of(cell_y, cell_x, low_h, low_w, stride_y, stride_x):
    """Places of the corners of each lane's cell within a plane of logits.

    In 32 bits and apart from the base, which is the same for all lanes: fewer instructions for each
    class. Clamped, so that cells outside read something.
    """
    above = tl.minimum(cell_y, low_h - 1) * stride_y
    below = tl.minimum(cell_y + 1, low_h - 1) * stride_y
    left = tl.minimum(cell_x, low_w - 1) * stride_x
    right = tl.minimum(cell_x + 1, low_w - 1) * stride_x
    return above + left, above + right, below + left, below + right


@jit
def probability(plane, corners, weight_y, weight_x, at, inside, norm, full: tl.constexpr):
    """Probability of one class, 0 at pixels that are ignored: their normaliser is infinite.

    A broken logit must not spoil these; pixels that count have a normaliser of NaN then.
    """
    if full:
        z = tl.load(plane + at, mask=inside, other=0.0).to(tl.float32) * LOG2_E
        z = tl.where(norm < float("inf"), z, 0.0)
    else:
        z00 = tl.load(plane + corners[0]).to(tl.float32)
        z10 = tl.load(plane + corners[2]).to(tl.float32)
        right = tl.load(plane + corners[1]).to(tl.float32) - z00
        down = z10 - z00
        both = (tl.load(plane + corners[3]).to(tl.float32) - z10) - right
        fine = tl.abs(both) < 1e37
        z00 = tl.where(fine, z00 * LOG2_E, 0.0)
        right = tl.where(fine, right * LOG2_E, 0.0)
        down = tl.where(fine, down, 0.0)
        both = tl.where(fine, both, 0.0)
        left = tl.fma(weight_y, down[None, :], z00[None, :])
        slope = tl.fma(weight_y, both[None, :], right[None, :])
        z = tl.fma(weight_x[None, :, :], slope[:, None, :], left[:, None, :])
    return tl.exp2(z - norm)


@jit
def pixels(base, at, column):
    """Addresses of the pixels of a tile.

    Columns are numbers for the compiler, so that the pixels of a row have one address. Without the
    hint, it would spread the pixels of a cell over threads.
    """
    return tl.max_contiguous(base + at[:, None, :] + column[None, :, None], [1, 1, 1])


@jit
def labelled(label_map, normaliser, at, column, inside):
    """Labels of the pixels of a tile, -1 where ignored, and normalisers, infinite there."""
    label = tl.load(pixels(label_map, at, column), mask=inside, other=-1).to(tl.int32)
    norm = tl.load(pixels(normaliser, at, column), mask=inside, other=0.0)
    return label, tl.where(label >= 0, norm, float("inf"))


@jit
def total(values):
    """Sum of a tile: within a thread first, so that one number of each crosses threads."""
    return tl.sum(tl.sum(tl.sum(values, 0), 0), 0)


@jit
def highest(labels):
    """Highest label of a tile."""
    return tl.max(tl.max(tl.max(labels, 0), 0), 0)
