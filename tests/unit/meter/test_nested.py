"""A, B, C of a nested design: the estimators' arithmetic."""

import numpy as np
import pytest

from mdm_jax.meter import nested

EXAMPLE = np.array([[[1, 3], [2, 6]], [[5, 7], [4, 4]]], float)


def components(values):
    return nested.components(nested.row_terms(values))


def test_the_small_example():
    found = components(EXAMPLE)
    np.testing.assert_allclose(found, (3.0, 0.5, 1.0, 4.5), atol=1e-12)
    doubled = components(np.stack([EXAMPLE, 2 * EXAMPLE]))
    np.testing.assert_allclose(doubled.pattern, [3, 12], atol=1e-12)


def test_designs_that_cannot_be_decomposed_are_refused():
    for shape in [(1, 2, 2), (2, 1, 2), (2, 2, 1)]:
        with pytest.raises(ValueError, match="each must be at least 2"):
            components(np.zeros(shape))
    with pytest.raises(ValueError, match="1 of 8 losses are not finite"):
        components(np.where(EXAMPLE == 7, np.nan, EXAMPLE))
    with pytest.raises(ValueError, match="got shape"):
        components(np.zeros((2, 2)))


def test_estimators_are_unbiased_for_the_smallest_designs():
    """Mean over 20000 designs of 3 x 2 x 2 with known components, 5 standard errors."""
    rng = np.random.default_rng(0)
    shape = (20_000, 3, 2, 2)
    data = 0.5 * rng.standard_normal((*shape[:2], 1, 1))
    rate = 0.3 * rng.exponential(size=(*shape[:3], 1))
    values = data + rate + 2.0 * rng.standard_normal(shape)
    found = components(values)
    for part, expected in zip(found, (4.0, 0.09, 0.25, 4.34)):
        error = part.std(ddof=1) / len(part) ** 0.5
        assert abs(part.mean() - expected) < 5 * error
    assert np.mean(found.data < 0) > 0.1  # the sign is kept


def errors_of(values, seed):
    terms = nested.row_terms(values)
    return nested.bootstrap_errors(
        lambda index: nested.components(terms.take(index)), len(values), 100, seed
    )


def test_bootstrap_errors_match_the_spread_over_designs():
    rng = np.random.default_rng(1)
    shape = (400, 40, 3, 2)
    values = rng.standard_normal((400, 40, 1, 1)) + rng.standard_normal(shape)
    spread = [part.std() for part in components(values)]
    errors = [errors_of(v, seed=i) for i, v in enumerate(values[:60])]
    np.testing.assert_allclose(np.mean(errors, axis=0), spread, rtol=0.15)
