"""Frechet distance between generated and held-out pictures in principal components.

Without a pretrained network, so comparable only between runs on one data set. Finite samples of one
law have a positive distance too: report that between two halves of the data beside it.
"""

from typing import NamedTuple

import numpy as np


class PrincipalSpace(NamedTuple):
    """An affine map to principal components: [L] mean, and basis [L, k] by falling variance."""

    mean: np.ndarray
    basis: np.ndarray

    def project(self, rows: np.ndarray) -> np.ndarray:
        """[N, L] -> [N, k] float64."""
        return (np.asarray(rows, np.float64) - self.mean) @ self.basis


def principal_space(rows: np.ndarray, components: int) -> PrincipalSpace:
    """The leading principal components of rows [N, L].

    Raises ValueError unless 1 <= components <= min(N - 1, L) and all numbers are finite.
    """
    rows = _check(rows, "rows")
    limit = min(rows.shape[0] - 1, rows.shape[1])
    if not 1 <= components <= limit:
        raise ValueError(
            f"components must lie in [1, {limit}] for rows of shape {rows.shape}, got {components}"
        )
    mean = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    return PrincipalSpace(mean, axes[:components].T)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to two samples [N, k] and [M, k].

    ``|mean difference|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))`` with unbiased covariances
    (Dowson & Landau 1982; Heusel et al. 2017 for its use), in the squared unit of the data. Raises
    ValueError for fewer than two rows, different widths or numbers that are not finite.
    """
    first, second = _check(first, "first"), _check(second, "second")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"samples must have the same width, got {first.shape} and {second.shape}")
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second)]
    root = _root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    shift = np.sum((first.mean(0) - second.mean(0)) ** 2)
    spread = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(shift + spread - 2 * np.sqrt(np.maximum(cross, 0.0)).sum())


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _check(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(f"{name} must be [N, L] with at least 2 rows, got shape {rows.shape}")
    if not np.all(np.isfinite(rows)):
        raise ValueError(f"{name} holds numbers that are not finite")
    return rows
