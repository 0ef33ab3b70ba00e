"""Rows of tokens as texts, and the n-grams in them.

How far the n-grams of generated texts are from those of held-out ones.

The divergence of two *samples* is positive even where they come from one law, the more so the
fewer and the longer the n-grams. So each value comes with a reference of the same size: held-out
texts in the place of the generated ones.

How varied texts are: token entropy, distinct n-grams, self-BLEU.

Every figure depends on how many texts there are and how long they are, so only sets of one size can
be compared.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.meter.nested import Estimate


class Texts(NamedTuple):
    """Texts as rows of one length.

    Attributes:
        tokens: [N, L] integers, not negative.
        valid: [N, L] bool, the tokens that belong to the text.
    """

    tokens: np.ndarray
    valid: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N] valid tokens of each text."""
        return self.valid.sum(1)


class Ngrams(NamedTuple):
    """Occurrences of n-grams.

    Attributes:
        number: [M] which n-gram; equal ones have equal numbers, 0 to the number of distinct ones.
        row: [M] text that it occurs in.
    """

    number: np.ndarray
    row: np.ndarray


def as_texts(tokens: ArrayLike, valid: ArrayLike | None = None) -> Texts:
    """Tokens [N, L] and which of them count (all, if not given).

    Raises:
        ValueError: if shapes are wrong, a token is negative or not an integer, or none is valid.
    """
    tokens = np.asarray(tokens)
    valid = np.ones(tokens.shape, bool) if valid is None else np.asarray(valid, bool)
    if tokens.ndim != 2 or valid.shape != tokens.shape:
        raise ValueError(
            f"texts must be tokens [N, L] and valid alike, got {tokens.shape} and {valid.shape}"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers, got {tokens.dtype}")
    if not valid.any():
        raise ValueError(f"none of the tokens of {len(tokens)} texts is valid")
    if tokens[valid].min() < 0:
        raise ValueError(f"tokens must not be negative, got {tokens[valid].min()}")
    return Texts(np.where(valid, tokens, 0).astype(np.int64), valid)


def ngrams(sets: Sequence[Texts], order: int) -> list[Ngrams]:
    """The n-grams of each set of texts, numbered alike in all sets.

    An n-gram is ``order`` neighbouring valid tokens of one row.

    Raises:
        ValueError: for an order below 1.
    """
    if order < 1:
        raise ValueError(f"the order of n-grams must be at least 1, got {order}")
    size = 1 + max(int(texts.tokens.max()) for texts in sets)
    numbers = [texts.tokens for texts in sets]
    whole = [texts.valid for texts in sets]
    for last in range(1, order):
        # A gram is known by the number of all but its last token, and that token.
        numbers = [
            found[:, : max(texts.tokens.shape[1] - last, 0)] * size + texts.tokens[:, last:]
            for found, texts in zip(numbers, sets)
        ]
        whole = [
            found[:, : max(texts.tokens.shape[1] - last, 0)] & texts.valid[:, last:]
            for found, texts in zip(whole, sets)
        ]
        numbers = _renumber(numbers, whole)
    numbers = _renumber(numbers, whole)
    return [Ngrams(number[there], np.nonzero(there)[0]) for number, there in zip(numbers, whole)]


def _renumber(numbers: list[np.ndarray], whole: list[np.ndarray]) -> list[np.ndarray]:
    """The same numbers from 0 up without gaps, 0 where there is no whole n-gram."""
    found = np.concatenate([number[there] for number, there in zip(numbers, whole)])
    _, compact = np.unique(found, return_inverse=True)
    cuts = np.cumsum([there.sum() for there in whole])[:-1]
    out = []
    for there, part in zip(whole, np.split(compact, cuts)):
        filled = np.zeros(there.shape, np.int64)
        filled[there] = part
        out.append(filled)
    return out


class NgramDivergence(NamedTuple):
    """Jensen-Shannon divergence of n-gram frequencies, nats, in [0, log 2].

    Attributes:
        value: generated texts against one half of the held-out ones.
        reference: the other half against the same one; where a perfect sampler would end up. A
            little above it is good, well below it means that held-out text was copied.
        order: n.
        texts: number of texts in each of the three sets.
        ngrams: n-grams in the generated, the other and the one half.
    """

    value: float
    reference: float
    order: int
    texts: int
    ngrams: tuple[int, int, int]


def ngram_divergence(
    tokens: ArrayLike,
    held_out: ArrayLike,
    order: int,
    *,
    valid: ArrayLike | None = None,
    held_out_valid: ArrayLike | None = None,
) -> NgramDivergence:
    """Divergence of generated texts from held-out ones, and its reference.

    The held-out texts at even places are compared with; those at odd places give the reference. All
    three sets are cut to the same number of texts, the first of each.

    Args:
        tokens: [N, L] generated.
        held_out: [M, L'] texts of the same tokenizer, M >= 2, best of the same length.
        order: n.
        valid: [N, L] bool; all if not given.
        held_out_valid: [M, L'] bool; all if not given.

    Raises:
        ValueError: if shapes are wrong, no token is valid, there are fewer than two held-out texts
            or the order is below 1.
    """
    generated, held_out = as_texts(tokens, valid), as_texts(held_out, held_out_valid)
    if len(held_out.tokens) < 2:
        raise ValueError("a reference needs at least two held-out texts, got one")
    count = min(len(generated.tokens), len(held_out.tokens) // 2)
    one, other = (Texts(*(field[half::2] for field in held_out)) for half in (0, 1))
    sets = [Texts(*(field[:count] for field in texts)) for texts in (generated, other, one)]
    found = ngrams(sets, order)
    size = 1 + max((int(part.number.max()) for part in found if len(part.number)), default=0)
    mine, theirs, base = (_frequencies(part, size) for part in found)
    return NgramDivergence(
        jensen_shannon(mine, base),
        jensen_shannon(theirs, base),
        order,
        count,
        tuple(len(part.number) for part in found),
    )


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """Jensen-Shannon divergence of two laws on the same outcomes [K], nats, in [0, log 2].

    ``(KL(p, m) + KL(q, m)) / 2`` with ``m = (p + q) / 2``; NaN where a law is not defined.
    """
    middle = (first + second) / 2
    if np.isnan(middle).any():
        return math.nan
    terms = [law[law > 0] * np.log(law[law > 0] / middle[law > 0]) for law in (first, second)]
    return max(0.0, float(sum(term.sum() for term in terms)) / 2)


def _frequencies(found: Ngrams, size: int) -> np.ndarray:
    counts = np.bincount(found.number, minlength=size).astype(np.float64)
    return counts / len(found.number) if len(found.number) else np.full(size, np.nan)


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
