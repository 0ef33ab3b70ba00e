"""A, B, C of a nested design: the estimators' arithmetic."""

import numpy as np
import pytest

from mdm_jax.meter import nested

EXAMPLE = np.array([[[1, 3], [2, 6]], [[5, 7], [4, 4]]], float)


def components(values):
    return nested.Components(*(part.mean(-1) for part in nested.row_terms(values)))


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


def test_terms_are_the_pseudo_values_of_the_jackknife():
    """n theta - (n - 1) theta without the row, of the variance over rows and of the components."""
    values = np.random.default_rng(1).standard_normal((5, 3, 2))
    without = [components(np.delete(values, row, axis=0)) for row in range(5)]
    for part in range(4):
        left = np.array([found[part] for found in without])
        expected = 5 * components(values)[part] - 4 * left
        np.testing.assert_allclose(nested.row_terms(values)[part], expected, atol=1e-12)
        found = nested.mean_over_rows(nested.row_terms(values)[part], probes=False)
        error = np.sqrt(4 / 5 * np.sum((left - left.mean()) ** 2))
        np.testing.assert_allclose(found, (components(values)[part], error), atol=1e-12)


def test_two_rows_have_no_error():
    two = nested.row_terms(EXAMPLE).data
    assert nested.mean_over_rows(two, probes=False)[0] == 1.0
    assert np.isnan(nested.mean_over_rows(two, probes=False)[1])


def test_one_probe_has_no_error():
    terms = np.random.default_rng(2).standard_normal((1, 5))
    value, error = nested.mean_over_rows(terms, probes=True)
    assert value == terms.mean() and np.isnan(error)
