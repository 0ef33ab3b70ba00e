"""How far the n-grams of generated texts are from those of held-out ones.

The divergence of two *samples* is positive even where they come from one law, the more so the
fewer and the longer the n-grams. So each value comes with a reference of the same size: held-out
texts in the place of the generated ones.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.evaluation.ngrams import Ngrams, Texts, as_texts, ngrams


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
