"""How varied texts are: token entropy, distinct n-grams, self-BLEU.

Every figure depends on how many texts there are and how long they are, so only sets of one size can
be compared.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.evaluation.nested import Estimate
from mdm_jax.evaluation.ngrams import Texts, as_texts, ngrams
from mdm_jax.evaluation.standard_errors import standard_error_of_mean

SMOOTHING = 0.1
"""Matches that an order without a match is given in BLEU (Chen & Cherry 2014, method 1)."""


class TokenEntropy(NamedTuple):
    """Entropy of the tokens, nats.

    Attributes:
        per_text: mean over texts of the entropy of the text's own token frequencies. Falls when
            texts repeat themselves; at most the logarithm of the text's length.
        corpus: entropy of the frequencies in all texts together. The plug-in estimate is low by
            about (K - 1) / (2 N) for N tokens of K kinds.
    """

    per_text: Estimate
    corpus: float


class SelfBleu(NamedTuple):
    """Mean BLEU of each text against all others; 1 for identical texts.

    Attributes:
        value: in [0, 1].
        order: longest n-grams.
        texts: number of texts compared; more of them give a larger value.
    """

    value: float
    order: int
    texts: int


def token_entropy(tokens: ArrayLike, valid: ArrayLike | None = None) -> TokenEntropy:
    """Entropy of token frequencies, within texts and over all.

    A low value next to a low generative perplexity means repetition, not quality.

    Args:
        tokens: [N, L].
        valid: [N, L] bool; all if not given. Texts without tokens are left out.

    Raises:
        ValueError: if shapes are wrong or no token is valid.
    """
    texts = as_texts(tokens, valid)
    (found,) = ngrams([texts], 1)
    corpus = _entropy(np.bincount(found.number))
    entropies = [
        _entropy(np.unique(row[there], return_counts=True)[1])
        for row, there in zip(*texts)
        if there.any()
    ]
    entropies = np.array(entropies)
    return TokenEntropy(
        Estimate(float(entropies.mean()), standard_error_of_mean(entropies)), corpus
    )


def distinct_ngrams(tokens: ArrayLike, order: int, valid: ArrayLike | None = None) -> float:
    """Distinct n-grams over all n-grams of the set ("distinct-n", Li et al. 2016).

    In (0, 1]; NaN where no text is long enough. Falls as the set grows.

    Args:
        tokens: [N, L].
        order: n.
        valid: [N, L] bool; all if not given.

    Raises:
        ValueError: if shapes are wrong, no token is valid or the order is below 1.
    """
    (found,) = ngrams([as_texts(tokens, valid)], order)
    if not len(found.number):
        return math.nan
    return (int(found.number.max()) + 1) / len(found.number)


def self_bleu(
    tokens: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    order: int = 4,
    max_texts: int | None = None,
) -> SelfBleu:
    """BLEU of each text with all others as references, averaged (Zhu et al. 2018).

    BLEU as defined by Papineni et al. 2002: the geometric mean, with equal weights over the orders
    1 to n, of the n-gram precisions clipped at the largest count in one reference, times the
    brevity penalty ``exp(min(0, 1 - r / c))`` for a text of length c and the closest reference
    length r, the shorter of two. An order without a match counts ``SMOOTHING`` matches; orders that
    the text is too short for are left out.

    The cost is that of sorting the n-grams, not of comparing all pairs of texts.

    Args:
        tokens: [N, L].
        valid: [N, L] bool; all if not given. Texts without tokens are left out.
        order: n.
        max_texts: take the first so many texts; None for all.

    Raises:
        ValueError: if shapes are wrong, the order is below 1 or fewer than two texts have tokens.
    """
    texts = as_texts(tokens, valid)
    kept = np.flatnonzero(texts.lengths)[:max_texts]
    texts = Texts(texts.tokens[kept], texts.valid[kept])
    if len(kept) < 2:
        raise ValueError(f"self-BLEU needs at least two texts with tokens, got {len(kept)}")
    if order < 1:
        raise ValueError(f"the order of n-grams must be at least 1, got {order}")
    log_precision, orders = np.zeros(len(kept)), np.zeros(len(kept))
    for n in range(1, order + 1):
        matches, total = _clipped_matches(texts, n)
        there = total > 0
        share = np.where(matches > 0, matches, SMOOTHING) / np.maximum(total, 1)
        log_precision += np.where(there, np.log(share), 0.0)
        orders += there
    length = texts.lengths
    brevity = np.minimum(0.0, 1 - _closest_other(length) / length)
    bleu = np.exp(log_precision / orders + brevity)
    return SelfBleu(float(bleu.mean()), order, len(kept))


def _clipped_matches(texts: Texts, order: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] n-grams of each text found in the others, with multiplicity, and [N] n-grams it has."""
    (found,) = ngrams([texts], order)
    rows = len(texts.tokens)
    pairs, count = np.unique(found.number * rows + found.row, return_counts=True)
    gram, row = pairs // rows, pairs % rows
    # The two largest counts of each n-gram say the largest in any other text.
    by_count = np.lexsort((-count, gram))
    first = by_count[np.r_[True, np.diff(gram[by_count]) > 0]] if len(pairs) else by_count
    rank = np.arange(len(pairs)) - np.searchsorted(gram[by_count], gram[by_count])
    runner_up = np.zeros(len(first), np.int64)
    second = by_count[rank == 1]
    runner_up[gram[second]] = count[second]
    limit = np.where(first[gram] == np.arange(len(pairs)), runner_up[gram], count[first[gram]])
    matches = np.bincount(row, np.minimum(count, limit), minlength=rows)
    return matches, np.bincount(found.row, minlength=rows)


def _closest_other(length: np.ndarray) -> np.ndarray:
    """[N] of each text, the length closest to its own among the others; the shorter of two."""
    kinds, which, count = np.unique(length, return_inverse=True, return_counts=True)
    padded = np.r_[-np.inf, kinds.astype(np.float64), np.inf]
    shorter, longer = padded[:-2], padded[2:]
    neighbour = np.where(kinds - shorter <= longer - kinds, shorter, longer)
    return np.where(count > 1, kinds, neighbour)[which]


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log(share))) + 0.0
