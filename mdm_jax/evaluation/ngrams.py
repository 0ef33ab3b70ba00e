"""Rows of tokens as texts, and the n-grams in them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


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
