"""Uniform-token diffusion by matrices, in float64 and without any of the package's formulas.

Only the definition enters: in a step that survives with probability b, a token becomes uniform with
probability 1 - b. Posteriors follow by Bayes' rule and bounds by summing divergences over steps.
"""

import itertools

import numpy as np


def states(length, num_tokens):
    """Every row, [num_tokens ** length, length]; a row's number is its digits, first one first."""
    return np.array(list(itertools.product(range(num_tokens), repeat=length)))


def kernel(survival, num_tokens):
    """P(z | x) of one token, [K, K] with x first; survival of any shape is put in front."""
    survival = np.asarray(survival, np.float64)[..., None, None]
    return survival * np.eye(num_tokens) + (1 - survival) / num_tokens


def row_kernel(survival, length, num_tokens):
    """P(z | x) of rows, [K^L, K^L]."""
    matrix, one = np.ones((1, 1)), kernel(survival, num_tokens)
    for _ in range(length):
        matrix = np.kron(matrix, one)
    return matrix


def leave_one_out(rows, probabilities, survival, num_tokens):
    """P(x_i = v | z without z_i) for every noisy row z, [K^L, L, K], by enumeration."""
    rows = np.asarray(rows)
    noisy = states(rows.shape[1], num_tokens)
    single = kernel(survival, num_tokens)
    found = np.zeros((*noisy.shape, num_tokens))
    for i in range(rows.shape[1]):
        joint = np.array(probabilities)[:, None] * np.ones(len(noisy))
        for place in set(range(rows.shape[1])) - {i}:
            joint = joint * single[rows[:, place]][:, noisy[:, place]]
        for value in range(num_tokens):
            found[:, i, value] = joint[rows[:, i] == value].sum(0)
    return found / found.sum(-1, keepdims=True)


def reverse_matrix(clean, start, stop, num_tokens):
    """P(z_s | z_t) [K, K], z_t first, from survival ``start`` to ``stop``, c [K, K] given z_t."""
    step = kernel(start / stop, num_tokens)  # P(z_t | z_s)
    joint = (clean @ kernel(stop, num_tokens)) * step.T
    return joint / joint.sum(-1, keepdims=True)


def discrete_bound(denoiser, x, survival, num_tokens):
    """Sum over the steps of a grid of E KL(q(z_s | z_t, x) || p(z_s | z_t)), nats.

    ``denoiser(survival) -> c [K, K]`` given z_t; the grid's survival falls from 1 to 0.
    """
    total, truth = 0.0, np.tile(np.eye(num_tokens)[x], (num_tokens, 1))
    for stop, start in itertools.pairwise(survival):
        q = reverse_matrix(truth, start, stop, num_tokens)
        p = reverse_matrix(denoiser(start), start, stop, num_tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(q > 0, q * np.log(q / p), 0.0)
        total += kernel(start, num_tokens)[x] @ terms.sum(-1)
    return total


def total_variation(p, q):
    return np.abs(np.asarray(p) - np.asarray(q)).sum() / 2
