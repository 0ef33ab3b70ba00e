"""Which variants of a test the default suite runs; the others are slow tests."""

from collections.abc import Iterable

import pytest


def slow_except(kept: Iterable[str], names: Iterable[str]) -> list:
    """All of ``names`` for ``pytest.mark.parametrize``, those that are not kept as slow tests."""
    kept, names = set(kept), list(names)
    assert kept <= set(names), f"no variants {sorted(kept - set(names))}"
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow) for name in names]
