"""A network whose conditionals are those of one joint law: an order-consistent model."""

import itertools

import jax.numpy as jnp
import numpy as np

from mdm_jax.types import Batch

LENGTH, NUM_TOKENS, MASK_ID = 4, 3, 3
STATES = np.array(list(itertools.product(range(NUM_TOKENS), repeat=LENGTH)))
LAW = np.random.default_rng(7).dirichlet(np.full(len(STATES), 0.5))


def apply_joint(params, inputs, logsnr=None, documents=None):
    """Logits log p(x_i = v | visible tokens), [N, 4, 3]; params is the law [81]."""
    fits = (inputs[:, None] == STATES[None]) | (inputs[:, None] == MASK_ID)
    weight = jnp.where(fits.all(-1), params[None], 0.0)
    token = jnp.asarray(STATES[..., None] == np.arange(NUM_TOKENS), weight.dtype)
    return jnp.log(jnp.maximum(jnp.einsum("ns,siv->niv", weight, token), 1e-30))


def rows_of(states, eligible=None) -> Batch:
    """Rows [N, 4] with the given positions [N, 4] eligible, all if not given."""
    states = np.asarray(states, np.int32)
    eligible = np.ones(states.shape, bool) if eligible is None else np.asarray(eligible)
    whole = np.ones(states.shape, np.int32)
    return Batch(states, eligible, whole, eligible.sum(1).astype(np.int32))


def conditional_nats(states, eligible) -> np.ndarray:
    """-log p(eligible tokens | the others) of each row, by summation."""
    nats = []
    for row, free in zip(states, eligible):
        same = (row == STATES) | free
        nats.append(-np.log(LAW[(row == STATES).all(1)].sum() / LAW[same.all(1)].sum()))
    return np.array(nats)
