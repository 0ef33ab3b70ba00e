"""The likelihood of an autoregressive model: one pass, no Monte Carlo error."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.likelihood.masked import make_evaluation
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.types import Array


def make_next_token_likelihood(
    apply_fn: Callable[..., Array], mask_id: int, *, replicates: int = 2
) -> Callable[..., Likelihood]:
    """Exact evaluation of ``-log p(eligible tokens | prompt)``; compiled once.

    The result has the fields of the bounds. Its level curve has one bin: an autoregressive model
    predicts every token with its position masked.

    Args:
        apply_fn: ``apply_fn(params, tokens, logsnr, documents) -> logits [B, L, K]``, such as
            ``models.causal_apply(model, mask_id)``; logsnr is None.
        mask_id: the mask token; it is excluded from the softmax.
        replicates: copies of the same numbers in the result. Two or more give the true standard
            error, zero; a paired comparison with an estimate of R replicates needs R.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``; the key is not used and may
        be None.

    Raises:
        ValueError: for replicates below 1, batches of different shapes, or no eligible token in all
            the data.
    """

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        del key, first_row, replicate, view
        outputs = apply_fn(params, batch.tokens, None, batch.documents)
        nats = token_nats(outputs, batch.tokens, batch.eligible, mask_id)
        count = jnp.sum(batch.eligible, axis=-1, keepdims=True)
        return count, jnp.sum(nats, axis=-1, keepdims=True)

    return make_evaluation(score, passes=1, replicates=replicates, level_bins=1, exact=True)
