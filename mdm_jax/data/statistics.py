"""Token statistics of a split: n-gram entropies, to compare likelihoods with; rare tokens."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.pipeline import evaluation_batches
from mdm_jax.data.rows import RowSource, gather
from mdm_jax.types import Batch

SHARES = (50, 90, 99, 100)
"""Percentages of rows at which lengths are shown."""


def length_quantiles(sizes: ArrayLike) -> tuple[int, ...]:
    """Lengths that 50, 90, 99 and 100 % of the ``sizes`` [N] do not exceed, each one of them."""
    return tuple(int(q) for q in np.percentile(sizes, SHARES, method="inverted_cdf"))


def length_table(sizes: Mapping[str, ArrayLike], unit: str = "tokens") -> str:
    """:func:`length_quantiles` by name, as lines of a table."""
    lines = [f"  {unit:<16}" + "".join(f"{f'{share} %':>8}" for share in SHARES)]
    for name, each in sizes.items():
        lines.append(f"  {name:<16}" + "".join(f"{q:>8,}" for q in length_quantiles(each)))
    return "\n".join(lines)


class NgramEntropies(NamedTuple):
    """Plug-in entropies, counted and evaluated on the same tokens.

    Low by about (K - 1) / (2 N ln 2) bits for N tokens and K parameters (Miller 1955), so no fitted
    unigram or bigram model reaches them on unseen text.

    Attributes:
        unigram, bigram: H(X_t), H(X_t | X_{t-1}), bits per token; bigram is None without pairs.
        tokens, pairs: numbers counted, pairs inside one row. ``units``: characters or dimensions.
        kinds: different pairs.
    """

    unigram: float
    bigram: float | None
    tokens: int
    pairs: int
    units: int
    kinds: int

    @property
    def unigram_per_unit(self) -> float:
        """Bits per character or dimension."""
        return self.unigram * self.tokens / self.units

    @property
    def bigram_per_unit(self) -> float | None:
        """Bits per character or dimension; None with fewer than five pairs of a kind, when it says
        more about the number of tokens than about them."""
        few = self.bigram is None or self.pairs < 5 * self.kinds
        return None if few else self.bigram * self.tokens / self.units


def ngram_entropies(
    tokens: ArrayLike,
    vocab_size: int,
    *,
    eligible: ArrayLike | None = None,
    units: int | None = None,
) -> NgramEntropies:
    """Unigram and bigram plug-in entropies of rows of tokens.

    ``tokens``: [L] or [N, L] integers in [0, vocab_size). ``eligible``: bool, same shape, which to
    count (a pair needs both in one row); None: all. ``units``: characters or dimensions; None: the
    tokens counted. ValueError for no eligible token, a wrong shape or a token out of range.
    """
    tokens = np.atleast_2d(np.asarray(tokens))
    keep = np.ones(tokens.shape, bool)
    if eligible is not None:
        keep = np.atleast_2d(np.asarray(eligible, bool))
    if tokens.ndim != 2 or keep.shape != tokens.shape:
        raise ValueError(
            f"tokens must be [L] or [N, L] and eligible alike, got {tokens.shape} and {keep.shape}"
        )
    counted = tokens[keep].astype(np.int64)
    if not counted.size:
        raise ValueError("entropies need at least one eligible token, got none")
    if counted.min() < 0 or counted.max() >= vocab_size:
        raise ValueError(
            f"tokens must be in [0, {vocab_size}), got {counted.min()} to {counted.max()}"
        )
    both = keep[:, 1:] & keep[:, :-1]
    before = tokens[:, :-1][both].astype(np.int64)
    pairs = before * vocab_size + tokens[:, 1:][both]
    return NgramEntropies(
        unigram=_entropy_bits(counted),
        bigram=_entropy_bits(pairs) - _entropy_bits(before) if len(pairs) else None,
        tokens=len(counted),
        pairs=len(pairs),
        units=len(counted) if units is None else int(units),
        kinds=len(np.unique(pairs)),
    )


def split_entropies(
    source: RowSource,
    vocab_size: int,
    max_rows: int | None = None,
    read: Callable[[RowSource, np.ndarray], Batch] = gather,
) -> NgramEntropies:
    """:func:`ngram_entropies` of eligible tokens; rest as in ``evaluation_batches``."""
    batches = list(evaluation_batches(source, 256, max_rows, read))
    return ngram_entropies(
        np.concatenate([batch.tokens for batch in batches]),
        vocab_size,
        eligible=np.concatenate([batch.eligible for batch in batches]),
        units=sum(int(batch.units.sum()) for batch in batches),
    )


def rare_tokens(
    source: RowSource, vocab_size: int, share: float, max_rows: int | None = 2000
) -> np.ndarray:
    """The least frequent tokens that together make up at most ``share`` of a split, [K] bool.

    Unseen ids too. For ``corruption.bernoulli_shifted_logit``. ValueError unless 0 < share < 1.
    """
    if not 0 < share < 1:
        raise ValueError(f"rare_tokens needs 0 < share < 1, got {share}")
    counts = np.zeros(vocab_size, np.int64)
    for batch in evaluation_batches(source, 256, max_rows):
        counts += np.bincount(batch.tokens[batch.eligible], minlength=vocab_size)
    order = np.argsort(counts, kind="stable")
    rare = np.empty(vocab_size, bool)
    rare[order] = np.cumsum(counts[order]) <= share * counts.sum()
    return rare


def _entropy_bits(symbols: np.ndarray) -> float:
    counts = np.unique(symbols, return_counts=True)[1]
    frequency = counts / counts.sum()
    return float(-(frequency * np.log2(frequency)).sum())


class RowSummary(NamedTuple):
    """What rows of a split hold.

    Attributes:
        rows, looked_at: of the split, and those that were read.
        lengths, answers: tokens of a document or conversation, and eligible ones of it, at the
            quantiles :data:`QUANTILES`; of EOS in a row, the first.
        eligible, prompt, padding: shares of positions.
    """

    rows: int
    looked_at: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]
    eligible: float
    prompt: float
    padding: float


QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


def summarise_rows(
    source: RowSource, eos_id: int | None = None, max_rows: int = 2000
) -> RowSummary:
    """Lengths and shares of at most ``max_rows`` rows, evenly spaced; ValueError without rows."""
    lengths, answers, totals, looked_at = [], [], np.zeros(3), 0
    for batch in evaluation_batches(source, 256, max_rows):
        visible = batch.documents > 0
        again = np.zeros(visible.shape, bool)
        again[:, 1:] = (batch.tokens[:, 1:] == eos_id) & (batch.tokens[:, :-1] == eos_id)
        for documents, counted, eligible in zip(batch.documents, ~again, batch.eligible):
            size = np.bincount(documents, counted)[1:]
            lengths += size[size > 0].tolist()
            of_answer = np.bincount(documents, counted & eligible)[1:]
            answers += of_answer[size > 0].tolist()
        filled = visible.any(1)  # without the empty rows that fill up the last batch
        looked_at += int(filled.sum())
        kinds = (batch.eligible, visible & ~batch.eligible, ~visible)
        totals += [float(kind[filled].sum()) for kind in kinds]

    def quantiles(values: list[float]) -> tuple[int, ...]:
        found = np.quantile(values, QUANTILES, method="inverted_cdf") if values else ()
        return tuple(int(value) for value in found)

    shares = totals / max(totals.sum(), 1)
    return RowSummary(len(source), looked_at, quantiles(lengths), quantiles(answers), *shares)
