"""Marks of parameters."""

import pytest


def slow(*values):
    """Values of a test's parameters that are left to the long tests."""
    return pytest.param(*values, marks=pytest.mark.slow)
