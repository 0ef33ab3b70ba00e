"""Toys drawn at random, with rows of every kind, and their bounds by enumeration.

All are filled up to one shape, LENGTH positions and TOKENS tokens, so that one program serves them:
a shorter row ends in padding, and tokens that a toy lacks have probability zero. The network sees
the visible tokens of its own document, and has a logit for the mask token, which is left out.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.types import Batch

LENGTH, TOKENS, ROWS = 5, 4, 7
MASK_ID = TOKENS
BITS = (np.arange(2**LENGTH)[:, None] >> np.arange(LENGTH)) & 1 == 1
SIZES = (1, 5, 7)
KINDS = ("whole", "prompt", "padding", "two documents", "all prompt", "one token", "gaps")


class Toy(NamedTuple):
    """``batch`` [B, LENGTH] of rows that are ``length`` long, and the network's parameters."""

    seed: int
    length: int
    batch: Batch
    params: dict[str, np.ndarray]

    @property
    def rows(self):
        return len(self.batch.tokens)


def draw_toy(seed):
    """Toy number ``seed``; three in a row differ in B, and each B meets both lengths."""
    rng = np.random.default_rng(seed)
    length, tokens = 4 + seed % 2, 3 + seed // 2 % 2
    size = SIZES[seed % len(SIZES)]
    kinds = (
        KINDS
        if size == len(KINDS)
        else KINDS[1:6]
        if size == 5
        else [KINDS[rng.choice([1, 2, 3, 6])]]
    )
    rows = [draw_row(kind, length, rng) for kind in kinds]
    eligible, documents = (np.stack(part) for part in zip(*rows))
    batch = Batch(
        tokens=rng.integers(0, tokens, (size, LENGTH), dtype=np.int32),
        eligible=eligible,
        documents=documents,
        units=2 * eligible.sum(1, dtype=np.int32),
    )
    exists = np.arange(TOKENS + 1) < tokens
    exists[MASK_ID] = True
    bias = np.where(exists, rng.normal(size=(LENGTH, TOKENS + 1)), -1e9)
    table = 1.5 * rng.normal(size=(TOKENS, TOKENS + 1))
    reach = rng.uniform(0.2, 1.0, (LENGTH, LENGTH)) * (1 - np.eye(LENGTH))
    return Toy(seed, length, batch, {"bias": bias, "table": table, "reach": reach})


def draw_row(kind, length, rng):
    """Eligible positions and documents of a row of that kind, [LENGTH] each."""
    eligible, documents = np.arange(LENGTH) < length, (np.arange(LENGTH) < length).astype(np.int32)
    at = rng.integers(1, length - 1)
    if kind == "prompt":
        eligible[:at] = False
    elif kind == "padding":
        eligible[length - at :], documents[length - at :] = False, 0
    elif kind == "two documents":
        documents[at:length] = 2
        eligible[at] = False  # the second one's prompt
    elif kind == "all prompt":
        eligible[:] = False
    elif kind == "one token":
        eligible &= np.arange(LENGTH) == at
    elif kind == "gaps":
        eligible[rng.permutation(length)[:at]] = False
    return eligible, documents


def network(params, inputs, _logsnr, documents):
    """Logits [N, LENGTH, TOKENS + 1], in NumPy or JAX."""
    xp = np if isinstance(params["bias"], np.ndarray) else jnp
    tokens = np.arange(TOKENS).reshape(1, 1, -1)
    seen = ((inputs[..., None] == tokens) & (documents > 0)[..., None]).astype(params["bias"].dtype)
    near = (documents[:, :, None] == documents[:, None]).astype(params["bias"].dtype)
    near = near * params["reach"][None]
    return params["bias"][None] + 2 * xp.tanh(
        xp.einsum("nij,njz,zv->niv", near, seen, params["table"])
    )


def single(params):
    """Parameters as the network under test has them."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def exact_bound(toy, params=None):
    """NELBO of each row, [B] float64, from its definition, over all masks of all positions."""
    params = toy.params if params is None else params
    tokens, eligible, documents = (
        np.repeat(np.asarray(field), len(BITS), axis=0) for field in toy.batch[:3]
    )
    masked = np.tile(BITS, (toy.rows, 1))
    inputs = np.where(masked, MASK_ID, tokens)
    logits = network(params, inputs, None, documents)[..., :TOKENS]
    top = logits.max(-1, keepdims=True)
    total = top[..., 0] + np.log(np.exp(logits - top).sum(-1))
    nats = total - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    loss = np.where(masked, nats, 0.0).sum(-1)
    n, k = eligible.sum(1), masked.sum(1)
    lawful = ~np.any(masked & ~eligible, axis=1) & (k > 0)
    weight = [1 / (k * math.comb(n, k)) if ok else 0.0 for n, k, ok in zip(n, k, lawful)]
    return (np.array(weight) * loss).reshape(toy.rows, -1).sum(1)


def exact_gradient(toy, step=1e-5):
    """Gradient of the rows' summed bound by central differences, like ``toy.params``."""

    def along(name, index):
        ends = []
        for sign in (1, -1):
            moved = {key: value.copy() for key, value in toy.params.items()}
            moved[name][index] += sign * step
            ends.append(exact_bound(toy, moved).sum())
        return (ends[0] - ends[1]) / (2 * step)

    return {
        name: np.array([along(name, i) for i in np.ndindex(value.shape)]).reshape(value.shape)
        for name, value in toy.params.items()
    }


def tangent(toy):
    """A direction in the parameters."""
    rng = np.random.default_rng(toy.seed + 1)
    return {name: rng.normal(size=value.shape) for name, value in toy.params.items()}


def exact_derivative(toy, step=1e-5):
    """Derivative of each row's bound along :func:`tangent`, [B], by central differences."""
    along = tangent(toy)
    ends = [
        exact_bound(toy, {n: v + s * step * along[n] for n, v in toy.params.items()})
        for s in (1, -1)
    ]
    return (ends[0] - ends[1]) / (2 * step)


def filled(batch, rows):
    """A batch of ``rows`` rows, the new ones empty."""
    missing = rows - len(batch.tokens)
    return Batch(*(np.pad(f, [(0, missing)] + [(0, 0)] * (np.ndim(f) - 1)) for f in batch))
