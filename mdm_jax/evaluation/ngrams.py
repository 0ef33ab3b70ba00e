"""n-grams of generated texts: divergence from held-out text, entropy, distinct n-grams, self-BLEU.

All figures depend on the number and length of the texts: compare sets of one size only. Texts are
tokens [N, L], integers >= 0, with ``valid`` [N, L] bool (default all); functions raise ValueError
for other shapes or dtypes, if no token is valid, or for an order n below 1.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.estimates import Estimate, standard_error_of_mean

SMOOTHING = 0.1
"""Matches assumed for an order without a match in BLEU (Chen & Cherry 2014, method 1)."""


class Texts(NamedTuple):
    """Texts as rows of one length: tokens [N, L], and which of them are valid, [N, L] bool."""

    tokens: np.ndarray
    valid: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """[N] valid tokens of each text."""
        return self.valid.sum(1)


class Ngrams(NamedTuple):
    """Occurrences of n-grams: [M] which n-gram, numbered from 0 without gaps, and [M] its text."""

    number: np.ndarray
    row: np.ndarray


class NgramDivergence(NamedTuple):
    """Jensen-Shannon divergence of n-gram frequencies, nats, in [0, log 2].

    Attributes:
        value: generated texts from one half of the held-out texts.
        reference: the other half from the same half, which a perfect sampler would reach (samples
            of one law diverge too); a value well below it means that held-out text was copied.
        texts: texts in each of the three sets.
        ngrams: n-grams in the generated texts, the other half and the one half.
    """

    value: float
    reference: float
    order: int
    texts: int
    ngrams: tuple[int, int, int]


class TokenEntropy(NamedTuple):
    """Entropy of the tokens, nats.

    Attributes:
        per_text: mean over texts of the entropy of a text's own frequencies; low under repetition.
        corpus: entropy of the frequencies in all texts together; the plug-in estimate is low by
            about (K - 1) / (2 N) for N tokens of K kinds.
    """

    per_text: Estimate
    corpus: float


class SelfBleu(NamedTuple):
    """Mean BLEU in [0, 1] of each text against all others; 1 for identical texts.

    ``order``: longest n-grams; more ``texts`` give a larger value.
    """

    value: float
    order: int
    texts: int


def as_texts(tokens: ArrayLike, valid: ArrayLike | None = None) -> Texts:
    """Checked :class:`Texts` of tokens [N, L] and the valid ones among them."""
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
    """n-grams (``order`` neighbouring valid tokens of a row) of each set, in one numbering."""
    if order < 1:
        raise ValueError(f"the order of n-grams must be at least 1, got {order}")
    size = 1 + max(int(texts.tokens.max()) for texts in sets)
    numbers = [texts.tokens for texts in sets]
    complete = [texts.valid for texts in sets]
    for last in range(1, order):
        # An n-gram is numbered by the number of its first n - 1 tokens, and its last token.
        numbers = [
            prefix[:, : max(texts.tokens.shape[1] - last, 0)] * size + texts.tokens[:, last:]
            for prefix, texts in zip(numbers, sets)
        ]
        complete = [
            prefix[:, : max(texts.tokens.shape[1] - last, 0)] & texts.valid[:, last:]
            for prefix, texts in zip(complete, sets)
        ]
        numbers = _renumber(numbers, complete)
    numbers = _renumber(numbers, complete)
    return [Ngrams(number[mask], np.nonzero(mask)[0]) for number, mask in zip(numbers, complete)]


def ngram_divergence(
    tokens: ArrayLike,
    held_out: ArrayLike,
    order: int,
    *,
    valid: ArrayLike | None = None,
    held_out_valid: ArrayLike | None = None,
) -> NgramDivergence:
    """Divergence of generated from held-out texts, beside that of held-out texts themselves.

    Even ``held_out`` texts [M, L'] (same tokenizer, best of the same length) are compared with, odd
    ones give the reference; all three sets have the same number of texts. ValueError unless M >= 2.
    """
    generated, held_out = as_texts(tokens, valid), as_texts(held_out, held_out_valid)
    if len(held_out.tokens) < 2:
        raise ValueError("a reference needs at least two held-out texts, got one")
    count = min(len(generated.tokens), len(held_out.tokens) // 2)
    even, odd = (Texts(*(field[half::2] for field in held_out)) for half in (0, 1))
    sets = [Texts(*(field[:count] for field in texts)) for texts in (generated, odd, even)]
    grams = ngrams(sets, order)
    size = 1 + max((int(part.number.max()) for part in grams if len(part.number)), default=0)
    frequencies = [
        np.bincount(part.number, minlength=size) / len(part.number)
        if len(part.number)
        else np.full(size, np.nan)
        for part in grams
    ]
    return NgramDivergence(
        jensen_shannon(frequencies[0], frequencies[2]),
        jensen_shannon(frequencies[1], frequencies[2]),
        order,
        count,
        tuple(len(part.number) for part in grams),
    )


def jensen_shannon(first: np.ndarray, second: np.ndarray) -> float:
    """``(KL(p, m) + KL(q, m)) / 2``, ``m = (p + q) / 2``, nats; NaN for an undefined law."""
    middle = (first + second) / 2
    if np.isnan(middle).any():
        return math.nan
    terms = [law[law > 0] * np.log(law[law > 0] / middle[law > 0]) for law in (first, second)]
    return max(0.0, float(sum(term.sum() for term in terms)) / 2)


def token_entropy(tokens: ArrayLike, valid: ArrayLike | None = None) -> TokenEntropy:
    """Entropy of token frequencies, within texts and over all; texts without tokens are left out.

    Low entropy beside a low generative perplexity means repetition, not quality.
    """
    texts = as_texts(tokens, valid)
    (grams,) = ngrams([texts], 1)
    entropies = np.array(
        [
            _entropy(np.unique(row[mask], return_counts=True)[1])
            for row, mask in zip(*texts)
            if mask.any()
        ]
    )
    mean = Estimate(float(entropies.mean()), standard_error_of_mean(entropies))
    return TokenEntropy(mean, _entropy(np.bincount(grams.number)))


def distinct_ngrams(tokens: ArrayLike, order: int, valid: ArrayLike | None = None) -> float:
    """Distinct n-grams over all n-grams of the set ("distinct-n", Li et al. 2016).

    In (0, 1], falling with the size of the set; NaN where no text is long enough.
    """
    (grams,) = ngrams([as_texts(tokens, valid)], order)
    if not len(grams.number):
        return math.nan
    return (int(grams.number.max()) + 1) / len(grams.number)


def self_bleu(
    tokens: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    order: int = 4,
    max_texts: int | None = None,
) -> SelfBleu:
    """BLEU of each text with all others as references, averaged (Zhu et al. 2018).

    BLEU as in Papineni et al. 2002: geometric mean over orders 1 to n of the n-gram precisions,
    clipped at the largest count in one reference, times the brevity penalty ``exp(min(0, 1 - r /
    c))`` for a text of length c and the closest reference length r, the shorter of two. Orders
    without a match count ``SMOOTHING`` matches; orders that a text is too short for, and texts
    without tokens, are left out. ``max_texts`` keeps the first so many texts. ValueError for fewer
    than two texts with tokens.
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
        share = np.where(matches > 0, matches, SMOOTHING) / np.maximum(total, 1)
        log_precision += np.where(total > 0, np.log(share), 0.0)
        orders += total > 0
    length = texts.lengths
    brevity = np.minimum(0.0, 1 - _closest_other(length) / length)
    bleu = np.exp(log_precision / orders + brevity)
    return SelfBleu(float(bleu.mean()), order, len(kept))


def _renumber(numbers: list[np.ndarray], complete: list[np.ndarray]) -> list[np.ndarray]:
    """The same numbers from 0 up without gaps; 0 where there is no complete n-gram."""
    used = np.concatenate([number[mask] for number, mask in zip(numbers, complete)])
    _, compact = np.unique(used, return_inverse=True)
    cuts = np.cumsum([mask.sum() for mask in complete])[:-1]
    out = [np.zeros(mask.shape, np.int64) for mask in complete]
    for filled, mask, part in zip(out, complete, np.split(compact, cuts)):
        filled[mask] = part
    return out


def _clipped_matches(texts: Texts, order: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] n-grams of each text that occur in the others, with multiplicity, and [N] its n-grams."""
    (grams,) = ngrams([texts], order)
    rows = len(texts.tokens)
    pairs, count = np.unique(grams.number * rows + grams.row, return_counts=True)
    gram, row = pairs // rows, pairs % rows
    # The two largest counts of each n-gram give the largest in any other text.
    by_count = np.lexsort((-count, gram))
    first = by_count[np.r_[True, np.diff(gram[by_count]) > 0]] if len(pairs) else by_count
    rank = np.arange(len(pairs)) - np.searchsorted(gram[by_count], gram[by_count])
    runner_up = np.zeros(len(first), np.int64)
    second = by_count[rank == 1]
    runner_up[gram[second]] = count[second]
    limit = np.where(first[gram] == np.arange(len(pairs)), runner_up[gram], count[first[gram]])
    matches = np.bincount(row, np.minimum(count, limit), minlength=rows)
    return matches, np.bincount(grams.row, minlength=rows)


def _closest_other(length: np.ndarray) -> np.ndarray:
    """[N] the length closest to a text's own among the others; the shorter of two."""
    kinds, which, count = np.unique(length, return_inverse=True, return_counts=True)
    padded = np.r_[-np.inf, kinds.astype(np.float64), np.inf]
    shorter, longer = padded[:-2], padded[2:]
    neighbour = np.where(kinds - shorter <= longer - kinds, shorter, longer)
    return np.where(count > 1, kinds, neighbour)[which]


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-np.sum(share * np.log(share))) + 0.0
