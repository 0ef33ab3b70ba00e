"""A model small enough to enumerate: the ground truth of the tests and notebooks.

Four positions, three tokens, mask token 3. The logits are

    logit_i(v | z) = 0.3 cos(1 + i + 2 v)
                     + sum_{j != i visible} theta[(v - z_j) mod 3] / (1 + |i - j|)

(radians), so every quantity of masked diffusion is a finite sum that can be written down exactly.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.typing import Array

LENGTH = 4
NUM_TOKENS = 3
MASK_ID = 3
THETA = (1.2, -0.4, 0.1)
ROWS = ((0, 0, 1, 0), (1, 1, 1, 2), (2, 2, 2, 2))
ROW_PROBABILITIES = (0.5, 0.3, 0.2)


class Toy(nn.Module):
    """The toy network: ``apply(params, inputs [N, 4], logsnr, documents) -> logits [N, 4, 3]``.

    It ignores the noise level and the documents.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Array, logsnr: Array | None = None, documents: Array | None = None
    ) -> Array:
        del logsnr, documents
        theta = self.param("theta", lambda _: jnp.asarray(THETA, self.dtype))
        position, token = np.arange(LENGTH), np.arange(NUM_TOKENS)
        bias = 0.3 * np.cos(1.0 + position[:, None] + 2.0 * token[None, :])
        distance = np.abs(position[:, None] - position[None, :])
        reach = np.where(distance > 0, 1.0 / (1.0 + distance), 0.0)
        # Seen token z at j adds theta[(v - z) mod 3] to logit v; a masked one adds nothing.
        table = theta[(token[:, None] - token[None, :]) % NUM_TOKENS]
        seen = (inputs[..., None] == token.reshape(1, 1, -1)).astype(self.dtype)
        context = jnp.einsum("ij,njz,vz->niv", jnp.asarray(reach, self.dtype), seen, table)
        return jnp.asarray(bias, self.dtype)[None] + context


def toy_batch() -> Batch:
    """The three rows of the toy's data, all positions eligible; ROW_PROBABILITIES weighs them."""
    tokens = jnp.asarray(ROWS, jnp.int32)
    whole = jnp.ones(tokens.shape, bool)
    return Batch(tokens, whole, whole.astype(jnp.int32), jnp.full((len(ROWS),), LENGTH, jnp.int32))


def toy_params(dtype: jnp.dtype = jnp.float32) -> dict:
    """Parameters of :class:`Toy`."""
    return {"params": {"theta": jnp.asarray(THETA, dtype)}}
