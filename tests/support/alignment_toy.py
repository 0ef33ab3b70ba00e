"""The toy of alignment with published digits: three positions, three tokens, one prompt token.

Logit of token v at position i: ``b[i, v] + sum over visible j of W[y_j, v] / |i - j| + P[x, v] /
(i + 1)``; theta = (b, W, P) row-major. The reward of y is 1 where its sum is 1 modulo 3. Rows of
three tokens have the prompt x = 1 built in, rows of four begin with it.
"""

import functools
import itertools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import alignment, variance
from mdm_jax.draws import Draw
from mdm_jax.types import Batch

DIGITS = json.loads((pathlib.Path(__file__).parents[1] / "data/alignment_toy.json").read_text())
MASK, PROMPT = 3, 1
ANSWERS = np.array([*itertools.product(range(3), repeat=3)], np.int32)
REWARDS = (ANSWERS.sum(1) % 3 == 1).astype(np.float64)
CHOSEN, REJECTED = (int(np.flatnonzero((y == ANSWERS).all(1))[0]) for y in ([0, 1, 0], [2, 2, 1]))
ORDERS = np.array([*itertools.permutations(range(3))])
HIDDEN = (np.arange(8)[:, None] >> np.arange(3)) & 1 == 1


def _reference():
    i, v = np.meshgrid(np.arange(3), np.arange(3), indexing="ij")
    parts = (
        0.6 * np.sin(1 + 3 * i + v),
        1.1 * np.cos(2 + 3 * i + 1.7 * v),
        0.8 * np.sin(4 + 3 * i + v),
    )
    return np.concatenate([part.ravel() for part in parts])


REFERENCE = _reference()
THETA = REFERENCE + 0.3 * np.cos(np.arange(27) + 1)


def network(theta, inputs, logsnr=None, documents=None):
    """Logits [N, L, 3] of rows with or without the prompt token; b is repeated for six tokens."""
    del logsnr, documents
    b, w, p = (part.reshape(3, 3) for part in jnp.split(theta, 3))
    size = 6 if inputs.shape[1] == 6 else 3
    answer, b = inputs[:, -size:], jnp.tile(b, (size // 3, 1))
    prompt = inputs[:, 0] if inputs.shape[1] == 4 else jnp.full(inputs.shape[:1], PROMPT)
    distance = np.abs(np.arange(size)[:, None] - np.arange(size))
    reach = np.where(distance > 0, 1 / np.maximum(distance, 1), 0.0)
    seen = jax.nn.one_hot(answer, 3, dtype=theta.dtype)
    context = jnp.einsum("ij,nju,uv->niv", reach, seen, w)
    of_prompt = jax.nn.one_hot(prompt, 3, dtype=theta.dtype) @ p
    logits = b[None] + context + of_prompt[:, None] / (np.arange(size) + 1)[None, :, None]
    return jnp.concatenate([jnp.zeros_like(logits[:, : inputs.shape[1] - size]), logits], axis=1)


def batch(answers=ANSWERS, with_prompt=False):
    tokens = np.asarray(answers)
    eligible = np.ones(tokens.shape, bool)
    if with_prompt:
        tokens = np.concatenate([np.full((len(tokens), 1), PROMPT, np.int32), tokens], axis=1)
        eligible = np.concatenate([np.zeros((len(eligible), 1), bool), eligible], axis=1)
    return Batch(tokens, eligible, np.ones(tokens.shape, np.int32), eligible.sum(1))


MIRROR = variance.chain(variance.mirror())


def mirrored(draw, rows):
    """Two fixed-count views of reversed ranks, as one surrogate."""
    views = alignment.fixed_counts(
        MIRROR.draw(jax.random.key(0), MIRROR.init(None), draw, None), rows
    )
    pairs = [jnp.stack(jnp.split(a[0], 2)) for a in views]
    return alignment.Views(pairs[0], pairs[1] / 2)


class Atoms(NamedTuple):
    """Draws [V, B, ...] that stand for all of a surrogate's randomness, with probabilities [V]."""

    draw: Draw
    probability: np.ndarray


def counted(levels, rows=27):
    """Equally many masked tokens of each level, in every order of the noise."""
    u = np.repeat((np.arange(levels) + 0.5) / levels, len(ORDERS))
    noise = np.tile((ORDERS + 0.5) / 3, (levels, 1))
    return _atoms(u, noise, np.full(len(u), 1 / len(u)), rows)


def rated(low, high, nodes=24, log=False, rows=27):
    """Rates uniform on (low, high), by Gauss-Legendre, and every Bernoulli mask; u: quantiles."""
    points, weights = np.polynomial.legendre.leggauss(nodes)
    points, weights = (points + 1) / 2, weights / 2
    rates = low + (high - low) * points
    if log:
        rates = low * (high / low) ** points
        weights = weights * rates * np.log(high / low) / (high - low)
    rate = np.repeat(rates, 8)
    masked = np.tile(HIDDEN, (nodes, 1))
    noise = np.where(masked, rate[:, None] / 2, (1 + rate[:, None]) / 2)
    chance = np.prod(np.where(masked, rate[:, None], 1 - rate[:, None]), axis=1)
    u = (rate - low) / (high - low)
    return _atoms(u, noise, np.repeat(weights, 8) * chance, rows)


def _atoms(u, noise, probability, rows):
    u = np.broadcast_to(u[:, None, None], (len(u), rows, 1)).astype(np.float64)
    noise = np.broadcast_to(noise[:, None], (len(u), rows, 3)).astype(np.float64)
    return Atoms(Draw(u, np.zeros_like(u), noise), probability)


class Tables(NamedTuple):
    """log p of every answer's tokens under every mask, and gradients: [mask, answer, position]."""

    theta: np.ndarray
    gradient: np.ndarray
    reference: np.ndarray
    prompt_hidden: np.ndarray
    prompt_hidden_gradient: np.ndarray


@functools.cache
def scores_and_gradients():
    """``(theta, hide_prompt) -> (log p [8, 27, 3], gradients [8, 27, 3, 27])``, jitted."""

    def scores(theta, hide_prompt):
        answer = np.broadcast_to(HIDDEN[:, None, None], (8, 1, 27, 3))
        prompt = jnp.broadcast_to(hide_prompt, (8, 1, 27, 1))
        hidden = jnp.concatenate([prompt, answer], axis=-1)
        weight = jnp.concatenate([jnp.zeros((8, 1, 27, 1)), answer * 1.0], axis=-1)
        views = alignment.Views(hidden, weight)
        model_fn = functools.partial(network, theta)
        found = alignment.token_scores(model_fn, batch(with_prompt=True), views, MASK)
        return found[:, 0, :, 1:]

    def both(theta, hide_prompt):
        value = scores(theta, hide_prompt)
        return value, jax.jacfwd(scores)(theta, hide_prompt)

    return jax.jit(both)


def tables_at(theta, hide_prompt=False):
    """log p [8, 27, 3] and their gradients [8, 27, 3, 27], float64."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, scores_and_gradients()(jnp.asarray(theta), hide_prompt))


@functools.cache
def tables():
    theta, reference = tables_at(THETA), tables_at(REFERENCE)[0]
    return Tables(*theta, reference, *tables_at(THETA, True))


def read(table, views):
    """Weighted scores [V, B, ...] of views of three positions, from a table [8, 27, 3, ...]."""
    index = np.sum(np.asarray(views.hidden) * [1, 2, 4], axis=-1)  # [W, V, B]
    picked = table[index, np.arange(index.shape[-1]) % 27]
    weight = np.asarray(views.weight)
    return np.sum(weight.reshape(*weight.shape, *(1,) * (table.ndim - 3)) * picked, axis=(0, 3))


def views_of(surrogate, atoms, rows=None, **options):
    """The surrogate's views of all atoms, float64."""
    with jax.enable_x64(True):
        rows = batch() if rows is None else rows
        make = jax.jit(lambda draw: surrogate(draw, rows, **options))
        return jax.tree.map(np.asarray, make(jax.tree.map(jnp.asarray, atoms.draw)))


def order_steps(rows=ANSWERS):
    """Rows in every order: the answers [6 N, 3] and the step of each position [6 N, 3]."""
    steps = np.repeat(np.argsort(ORDERS, axis=1), len(rows), axis=0).astype(np.int32)
    return np.tile(rows, (6, 1)), steps


@functools.cache
def _order_views():
    rows, steps = order_steps()
    return views_of(alignment.trace(steps), counted(1, len(rows)), batch(rows))


def log_orders(table):
    """log p of answer and order [6, 27, ...], by the views of a trace."""
    found = read(table, _order_views())[0]
    return found.reshape(6, 27, *found.shape[1:])


def cosine(a, b):
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
