"""Principal components and the Frechet distance against closed forms."""

import numpy as np
import pytest

from mdm_jax.evaluation import quality as picture_quality


def exact_sample(covariance, mean, count=64, seed=0):
    """Rows whose sample mean and unbiased covariance are exactly the given ones."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, len(mean)))
    rows -= rows.mean(0)
    white = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_distance_of_commuting_gaussians_is_that_of_their_deviations():
    first = exact_sample(np.diag([4.0, 9.0]), np.array([1.0, 0.0]))
    second = exact_sample(np.diag([1.0, 16.0]), np.array([1.0, 2.0]), seed=1)
    found = picture_quality.frechet_distance(first, second)
    assert found == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_distance_of_gaussians_that_do_not_commute():
    """2 x 2: tr (S1 S2)^(1/2) = sqrt(tr(S1 S2) + 2 sqrt(det S1 det S2))."""
    s1, s2 = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[1.0, -0.5], [-0.5, 2.0]])
    found = picture_quality.frechet_distance(
        exact_sample(s1, np.zeros(2)), exact_sample(s2, np.zeros(2), seed=1)
    )
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1) * np.linalg.det(s2)))
    assert found == pytest.approx(np.trace(s1 + s2) - 2 * root)


def test_distance_is_symmetric_and_zero_to_itself():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(30, 5)), rng.normal(size=(40, 5)) * [1, 0, 2, 3, 1]
    assert picture_quality.frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert picture_quality.frechet_distance(first, second) == pytest.approx(
        picture_quality.frechet_distance(second, first)
    )


def test_principal_space_finds_the_plane_that_the_rows_lie_in():
    rng = np.random.default_rng(3)
    plane = np.linalg.qr(rng.normal(size=(6, 2)))[0]
    rows = rng.normal(size=(50, 2)) * [3.0, 1.0] @ plane.T + 5.0
    space = picture_quality.principal_space(rows, 2)
    back = space.project(rows) @ space.basis.T + space.mean
    np.testing.assert_allclose(back, rows, atol=1e-9)
    spread = space.project(rows).std(0)
    assert spread[0] > spread[1]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: picture_quality.principal_space(np.eye(4), 4), r"components must lie in \[1, 3\]"),
        (lambda: picture_quality.frechet_distance(np.ones((1, 2)), np.ones((3, 2))), "at least 2"),
        (lambda: picture_quality.frechet_distance(np.eye(2), np.eye(3)), "same width"),
        (lambda: picture_quality.frechet_distance(np.eye(2) / 0.0, np.eye(2)), "not finite"),
    ],
)
def test_bad_samples_are_refused(call, words):
    with pytest.raises(ValueError, match=words), np.errstate(all="ignore"):
        call()
