"""The toy of ``models/toy.py`` as a block model and as an autoregressive one."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np

from mdm_jax.testing import toys

PROBABILITIES = np.array(toys.ROW_PROBABILITIES)
ROWS = np.array(toys.ROWS)
BLOCK_NELBO = {
    1: (4.39138835, 5.04532358, 2.38058524),
    2: (4.61728707, 4.79474929, 2.40106769),
    4: (4.37020885, 4.52536593, 2.44006023),
}
BLOCK_MEAN = {1: 4.18540830, 2: 4.22728186, 4: 4.03072625}


def block_apply(block_size):
    """``apply_fn(params, inputs [N, 8], ...)``: the loop over blocks, each with what it may see.

    Padding in the blocks before is not seen: as if it were masked.
    """

    def apply_fn(params, inputs, logsnr=None, documents=None):
        noised, clean = inputs[:, : toys.LENGTH], inputs[:, toys.LENGTH :]
        block = jnp.arange(toys.LENGTH) // block_size
        parts = []
        for b in range(toys.LENGTH // block_size):
            earlier, own = (block < b)[None], (block == b)[None]
            if documents is not None:
                earlier = earlier & (documents > 0)
            seen = jnp.where(earlier, clean, jnp.where(own, noised, toys.MASK_ID))
            logits = _model(params).apply(params, seen)
            parts.append(logits[:, b * block_size : (b + 1) * block_size])
        return jnp.concatenate(parts, axis=1)

    return apply_fn


def causal_apply(params, inputs, logsnr=None, documents=None):
    """``apply_fn(params, tokens [N, 4], ...)``: place i sees the tokens before it."""
    places = []
    for i in range(toys.LENGTH):
        seen = jnp.where((jnp.arange(toys.LENGTH) < i)[None], inputs, toys.MASK_ID)
        places.append(_model(params).apply(params, seen)[:, i])
    return jnp.stack(places, axis=1)


@functools.cache
def block_law(block_size):
    """P(x) of the 81 rows, [3, 3, 3, 3]: product over blocks of the one-by-one law of a block."""
    every = np.array(list(itertools.product(range(3), repeat=toys.LENGTH)))
    law = np.ones(len(every))
    for start in range(0, toys.LENGTH, block_size):
        places = range(start, start + block_size)
        orders = list(itertools.permutations(places))
        total = np.zeros(len(every))
        for order in orders:
            logs = np.zeros(len(every))
            for number, place in enumerate(order):
                known = tuple(sorted([*range(start), *order[:number]]))
                logs += place_log_probabilities(known, place)
            total += np.exp(logs) / len(orders)
        law *= total
    return law.reshape((3,) * toys.LENGTH)


@functools.cache
def place_log_probabilities(known, place):
    """[81] log p(x_place | x_known) in float64."""
    every = np.array(list(itertools.product(range(3), repeat=toys.LENGTH)))
    token, theta = np.arange(3), np.array(toys.THETA)
    logits = np.tile(0.3 * np.cos(1.0 + place + 2.0 * token), (len(every), 1))
    for j in known:
        logits += theta[(token[None] - every[:, j, None]) % 3] / (1 + abs(place - j))
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits[np.arange(len(every)), every[:, place]]


def _model(params):
    return toys.Toy(dtype=params["params"]["theta"].dtype)


def block_losses(block_size):
    """S_b(x, M) of every row, block and mask of the block, [3, blocks, 2^L'] float64.

    Bit i of M is set iff position i of the block is masked.
    """
    blocks = toys.LENGTH // block_size
    bits = (np.arange(2**block_size)[:, None] >> np.arange(block_size)) & 1 == 1
    losses = np.zeros((3, blocks, len(bits)))
    for row, block, (mask, bit) in itertools.product(
        range(3), range(blocks), list(enumerate(bits))
    ):
        start = block * block_size
        known = [*range(start), *(start + np.flatnonzero(~bit))]
        number = int(ROWS[row] @ 3 ** np.arange(toys.LENGTH)[::-1])
        for place in start + np.flatnonzero(bit):
            losses[row, block, mask] -= place_log_probabilities(tuple(known), int(place))[number]
    return losses
