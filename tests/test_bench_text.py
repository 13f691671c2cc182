"""Numbers as text, and their intervals."""

import pytest

from ohem_mm.bench import text as words


def test_interval_against_tabled_quantiles():
    assert words.half_width([5.0]) is None
    # t(0.975) is 12.7062 with 1 and 4.3027 with 2 degrees of freedom.
    assert words.half_width([0.0, 1.0]) == pytest.approx(12.7062 * 0.5, abs=1e-4)
    assert words.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / 3**0.5, abs=1e-4)
    assert words.half_width([2.0, 2.0, 2.0]) == 0


def test_cells():
    assert words.mean_std([1.0]) == "1.00"
    assert words.mean_std([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert words.mean_std([]) == "-"
    assert words.difference([1.5]) == "+1.50"
    assert words.difference([1.0, 2.0, 3.0]) == "+2.00 [-0.48, +4.48]"
    assert words.difference([-2.0, -2.1, -1.9]) == "**-2.00 [-2.25, -1.75]**"
    assert words.difference([]) == "-"
    assert words.clock(3725.4) == "1:02:05"


def test_pooled_spread():
    assert words.pooled([[1.0], []]) is None
    spread, freedom = words.pooled([[1.0, 3.0], [10.0, 12.0, 14.0], [5.0]])
    # Sums of squares 2 and 8, with 1 and 2 degrees of freedom.
    assert (spread, freedom) == (pytest.approx((10 / 3) ** 0.5), 3)
    assert words.half_width_of(2.0, 2, 4) == pytest.approx(4.30265)
    assert words.least_shown([1.0, 2.0, 3.0]) == "2.48"
    assert words.least_shown([1.0]) == "-"
    assert words.least_shown([1.0, float("nan")]) == "-"
