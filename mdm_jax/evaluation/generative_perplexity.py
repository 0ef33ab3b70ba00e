"""Perplexity of generated texts under a model that did not write them.

Any callable will do; a network of ours becomes one by :func:`likelihood_score`. It never comes
without the token entropy, since the perplexity of repetition is low too.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.batches import Batch
from mdm_jax.evaluation.answers import Evaluate, spread_rows
from mdm_jax.evaluation.diversity import TokenEntropy, token_entropy
from mdm_jax.evaluation.ngrams import as_texts
from mdm_jax.evaluation.standard_errors import standard_error_of_ratio
from mdm_jax.typing import Array, PyTree

Score = Callable[[np.ndarray, np.ndarray], ArrayLike]
"""``score(tokens [B, L] int32, documents [B, L] int32) -> nats [B]``: -log p of each row's tokens
with a positive document under a model that did not generate them. Documents are 0 on padding."""


class GenerativePerplexity(NamedTuple):
    """What another model thinks of the texts, next to their entropy.

    Attributes:
        perplexity: ``exp(nats_per_token)``.
        standard_error: of ``perplexity``, to first order, from the spread over texts.
        nats_per_token: total nats over total tokens.
        tokens: number of tokens.
        token_entropy: of the same texts.
    """

    perplexity: float
    standard_error: float
    nats_per_token: float
    tokens: int
    token_entropy: TokenEntropy


def generative_perplexity(
    score: Score, tokens: ArrayLike, valid: ArrayLike | None = None, *, batch_size: int = 64
) -> GenerativePerplexity:
    """Perplexity and token entropy of generated texts.

    Args:
        score: nats of each row, see ``Score``.
        tokens: [N, L].
        valid: [N, L] bool; all if not given.
        batch_size: rows per call; the last is filled up with rows of document 0.

    Raises:
        ValueError: if shapes are wrong, no token is valid, batch_size is below 1, or the score is
            not one finite number per row.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    texts = as_texts(tokens, valid)
    rows = len(texts.tokens)
    fill = ((0, -rows % batch_size), (0, 0))
    padded = np.pad(texts.tokens.astype(np.int32), fill)
    documents = np.pad(texts.valid.astype(np.int32), fill)
    nats = []
    for start in range(0, len(padded), batch_size):
        part = slice(start, start + batch_size)
        found = np.asarray(score(padded[part], documents[part]), np.float64)
        if found.shape != (batch_size,):
            raise ValueError(
                f"the score must be one number per row, [{batch_size}], got {found.shape}"
            )
        nats.append(found)
    nats = np.concatenate(nats)[:rows]
    scored = texts.lengths > 0
    nats, size = nats[scored], texts.lengths[scored]
    if not np.all(np.isfinite(nats)):
        raise ValueError(
            f"the score of {int((~np.isfinite(nats)).sum())} texts is not finite; a perplexity "
            "needs a model that gives every token a probability"
        )
    mean = float(nats.sum() / size.sum())
    perplexity = float(np.exp(mean))
    return GenerativePerplexity(
        perplexity=perplexity,
        standard_error=perplexity * standard_error_of_ratio(nats, size),
        nats_per_token=mean,
        tokens=int(size.sum()),
        token_entropy=token_entropy(tokens, valid),
    )


def likelihood_score(evaluate: Evaluate, params: PyTree, key: Array | None = None) -> Score:
    """A likelihood as a score: ``make_next_token_likelihood`` gives an exact one.

    With an estimator that draws masks the perplexity is noisy and, of a bound, too high.

    Args:
        evaluate: ``evaluate(params, key, batches) -> Likelihood``.
        params: parameters.
        key: typed key, the same for every call; None where the estimator needs none.
    """

    def score(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
        valid = documents > 0
        if not valid.any():
            return np.zeros(len(tokens))
        batch = Batch(tokens, valid, documents, valid.sum(1).astype(np.int32))
        return spread_rows(evaluate(params, key, [batch]), len(tokens)).nats

    return score
