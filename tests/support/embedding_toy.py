"""An exact model of embeddings: the posterior over tokens by enumeration of all rows."""

import types

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.gaussian import categorical, paths
from mdm_jax.models.cross_entropy import Projection, Readout

MASK = 3
SIZE = 4
ROWS = np.array([[0, 0], [0, 1], [1, 2], [2, 0], [2, 2]])
PROBS = np.array([0.35, 0.25, 0.2, 0.15, 0.05])
ENTROPY = float(-(PROBS * np.log(PROBS)).sum())


class ExactEmbeddings:
    """Stands for an EmbeddingTransformer; :meth:`run` is its ``apply_fn``."""

    config = types.SimpleNamespace(self_conditioning=False)
    mask_id, size = MASK, SIZE

    def __init__(self, noising=None):
        self.noising = paths.ve() if noising is None else noising
        self.table = categorical.unit_embeddings(
            jax.random.normal(jax.random.key(1), (MASK + 1, SIZE)), MASK
        )

    def apply(self, _params, method):
        assert method == "embeddings"
        return self.table

    def log_joint(self, x, given, tokens, logsnr):
        """log p(row) N(x; row) [N, rows] up to a constant of the level."""
        level = logsnr[:, :1, None]
        clean = self.table[ROWS][None]
        error = x[:, None] - self.noising.alpha(level)[:, None] * clean
        square = jnp.square(error / self.noising.sigma(level)[:, None]).sum(-1)
        known = jnp.where(jnp.asarray(ROWS)[None] == tokens[:, None], 0.0, -jnp.inf)
        return jnp.log(PROBS)[None] + jnp.where(given[:, None], known, -0.5 * square).sum(-1)

    def run(self, _params, inputs, logsnr, documents=None):
        del documents
        alpha = self.noising.alpha(logsnr)[..., None]
        x = alpha * self.table[inputs.tokens] + inputs.noise
        joint = self.log_joint(x, inputs.given, inputs.tokens, logsnr)
        member = jnp.where(ROWS[..., None] == np.arange(MASK + 1), 0.0, -jnp.inf)
        logits = jax.nn.logsumexp(joint[..., None, None] + member[None], axis=1)
        logits = jnp.maximum(logits, -1e30)
        return Readout(logits, jnp.eye(MASK + 1), Projection(False, jnp.float32, (MASK,)))
