"""Quality of generated texts and pictures.

Text quality and diversity come together: greedy and repetitive texts have a low generative
perplexity, random ones a high entropy. The Frechet distance of pictures, in principal components
and without a pretrained network, is comparable only between runs on one data set, and positive
between two samples of one law too: report that between two halves of the data beside it.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.rows import RowSource, gather
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.estimates import finite_or_none, standard_error_of_ratio
from mdm_jax.evaluation.ngrams import (
    NgramDivergence,
    SelfBleu,
    TokenEntropy,
    as_texts,
    distinct_ngrams,
    ngram_divergence,
    self_bleu,
    token_entropy,
)
from mdm_jax.likelihood.estimators import Evaluate
from mdm_jax.types import Array, Batch, PyTree

Score = Callable[[np.ndarray, np.ndarray], ArrayLike]
"""``score(tokens [B, L] int32, documents [B, L] int32) -> nats [B]``: -log p of each row's tokens
under a model that did not generate them. Documents are positive, and 0 on padding."""


class GenerativePerplexity(NamedTuple):
    """Perplexity of texts under another model, ``exp(nats_per_token)``, with their token entropy.

    ``standard_error`` is that of ``perplexity``, to first order, from the spread over texts.
    """

    perplexity: float
    standard_error: float
    nats_per_token: float
    tokens: int
    token_entropy: TokenEntropy


def generative_perplexity(
    score: Score, tokens: ArrayLike, valid: ArrayLike | None = None, *, batch_size: int = 64
) -> GenerativePerplexity:
    """Perplexity and token entropy of generated texts [N, L]; ``valid`` as in ``ngrams``.

    ``batch_size`` rows per call; the last batch is padded with rows of document 0. ValueError as
    ``ngrams``, for batch_size below 1, or a score that is not one finite number per row.
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
        row_nats = np.asarray(score(padded[part], documents[part]), np.float64)
        if row_nats.shape != (batch_size,):
            raise ValueError(
                f"the score must be one number per row, [{batch_size}], got {row_nats.shape}"
            )
        nats.append(row_nats)
    filled = texts.lengths > 0
    nats, size = np.concatenate(nats)[:rows][filled], texts.lengths[filled]
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
    """A likelihood as a score; exact for ``make_next_token_likelihood``.

    With an estimator that draws masks the perplexity is noisy and, being a bound, too high.
    ``key``, the same for every call, may be None where the estimator needs none.
    """

    def score(tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
        valid = documents > 0
        if not valid.any():
            return np.zeros(len(tokens))
        batch = Batch(tokens, valid, documents, valid.sum(1).astype(np.int32))
        result, nats = evaluate(params, key, [batch]), np.full(len(tokens), np.nan)
        nats[result.row_index] = result.per_row_nats
        return nats

    return score


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """Figures of one set of texts, see :func:`measure_text_quality`; None or empty where not
    measured.
    """

    texts: int
    tokens: int
    entropy: TokenEntropy
    distinct: dict[int, float]
    self_bleu: SelfBleu | None
    divergence: dict[int, NgramDivergence]
    perplexity: GenerativePerplexity | None

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON values; undefined numbers are None."""
        per_text = self.entropy.per_text
        values: dict[str, Any] = {
            "texts": self.texts,
            "tokens": self.tokens,
            "token_entropy": per_text.value,
            "token_entropy_standard_error": finite_or_none(per_text.standard_error),
            "corpus_token_entropy": self.entropy.corpus,
        }
        for order, share in self.distinct.items():
            values[f"distinct_{order}"] = finite_or_none(share)
        if self.self_bleu is not None:
            values[f"self_bleu_{self.self_bleu.order}"] = self.self_bleu.value
            values["self_bleu_texts"] = self.self_bleu.texts
        for order, found in self.divergence.items():
            values[f"divergence_{order}"] = finite_or_none(found.value)
            values[f"divergence_{order}_reference"] = finite_or_none(found.reference)
            values["divergence_texts"] = found.texts
        if self.perplexity is not None:
            values["generative_perplexity"] = finite_or_none(self.perplexity.perplexity)
            values["generative_perplexity_standard_error"] = finite_or_none(
                self.perplexity.standard_error
            )
            values["generative_nats_per_token"] = self.perplexity.nats_per_token
        return values

    def summary(self) -> str:
        """A few lines for the terminal."""
        per_text = self.entropy.per_text
        lines = [f"{self.texts} texts, {self.tokens} tokens"]
        if self.perplexity is not None:
            value, error = self.perplexity.perplexity, self.perplexity.standard_error
            lines.append(f"  generative perplexity {value:.3f} ± {error:.3f}")
        lines.append(
            f"  token entropy {per_text.value:.4f} ± {per_text.standard_error:.4f} nats in a text, "
            f"{self.entropy.corpus:.4f} in all"
        )
        if self.distinct:
            shares = ", ".join(f"{n}: {share:.4f}" for n, share in self.distinct.items())
            lines.append(f"  distinct n-grams {shares}")
        if self.self_bleu is not None:
            value, order, count = self.self_bleu
            lines.append(f"  self-BLEU-{order} {value:.4f} over {count} texts")
        for order, found in self.divergence.items():
            lines.append(
                f"  {order}-gram divergence {found.value:.4f} nats, between held-out texts "
                f"{found.reference:.4f} ({found.texts} texts each)"
            )
        return "\n".join(lines)


def measure_text_quality(
    tokens: ArrayLike,
    valid: ArrayLike | None = None,
    *,
    held_out: ArrayLike | None = None,
    held_out_valid: ArrayLike | None = None,
    score: Score | None = None,
    orders: Sequence[int] = (1, 2, 3, 4),
    bleu_order: int = 4,
    max_bleu_texts: int | None = None,
    batch_size: int = 64,
) -> TextQuality:
    """All figures of a set of generated texts; ValueError as the functions that measure each.

    Args:
        tokens, valid: [N, L]; valid is false after the end of a text, default all true.
        held_out, held_out_valid: [M, L'] texts for the n-gram divergence; None for no divergence.
        score: another model, for the generative perplexity; None for none.
        orders: n of distinct n-grams and of the divergence.
        bleu_order, max_bleu_texts: n of self-BLEU, which needs at least two texts, and the number
            of texts that it uses, the first ones; None for all.
        batch_size: rows per call of ``score``.
    """
    texts = as_texts(tokens, valid)
    several = np.count_nonzero(texts.lengths) > 1
    divergence = {
        n: ngram_divergence(tokens, held_out, n, valid=valid, held_out_valid=held_out_valid)
        for n in (orders if held_out is not None else ())
    }
    perplexity = None
    if score is not None:
        perplexity = generative_perplexity(score, tokens, valid, batch_size=batch_size)
    return TextQuality(
        texts=len(texts.tokens),
        tokens=int(texts.lengths.sum()),
        entropy=token_entropy(tokens, valid),
        distinct={n: distinct_ngrams(tokens, n, valid) for n in orders},
        self_bleu=self_bleu(tokens, valid, order=bleu_order, max_texts=max_bleu_texts)
        if several
        else None,
        divergence=divergence,
        perplexity=perplexity,
    )


_WORD = re.compile(r"[^\W\d_]+")


class WordShare(NamedTuple):
    """Words of texts that are known: ``known`` of ``words``, repeats counted; ``distinct`` ones."""

    known: int
    words: int
    distinct: int

    @property
    def share(self) -> float:
        """Known words of all words; NaN without words."""
        return self.known / self.words if self.words else math.nan


def words_of(text: str) -> list[str]:
    """Words of a text in order: runs of letters in lower case.

    A word that touches an end of the text is left out, because it may be cut there.
    """
    inside = (m for m in _WORD.finditer(text) if m.start() > 0 and m.end() < len(text))
    return [match[0].lower() for match in inside]


def word_share(texts: Iterable[str], known: Collection[str]) -> WordShare:
    """Share of the words of ``texts`` that are in ``known`` (lower case, best a set).

    Invented words lower it; order and meaning are not looked at.
    """
    words = list(itertools.chain.from_iterable(map(words_of, texts)))
    return WordShare(sum(word in known for word in words), len(words), len(set(words)))


def texts_of_rows(
    source: RowSource, tokenizer: Tokenizer, max_tokens: int = 2**20
) -> Iterable[str]:
    """Texts of the documents of evenly spaced rows, ``max_tokens`` positions of them or all."""
    if not len(source):
        return
    count = min(len(source), max(1, max_tokens // source[0].tokens.shape[-1]))
    batch = gather(source, np.linspace(0, len(source) - 1, count).astype(np.int64))
    for tokens, documents in zip(batch.tokens, batch.documents):
        for number in np.unique(documents[documents > 0]):
            yield tokenizer.decode(tokens[documents == number])


class PrincipalSpace(NamedTuple):
    """An affine map to principal components: [L] mean, and basis [L, k] by falling variance."""

    mean: np.ndarray
    basis: np.ndarray

    def project(self, rows: np.ndarray) -> np.ndarray:
        """[N, L] -> [N, k] float64."""
        return (np.asarray(rows, np.float64) - self.mean) @ self.basis


def principal_space(rows: np.ndarray, components: int) -> PrincipalSpace:
    """The leading principal components of rows [N, L].

    Raises ValueError unless 1 <= components <= min(N - 1, L) and all numbers are finite.
    """
    rows = _check(rows, "rows")
    limit = min(rows.shape[0] - 1, rows.shape[1])
    if not 1 <= components <= limit:
        raise ValueError(
            f"components must lie in [1, {limit}] for rows of shape {rows.shape}, got {components}"
        )
    mean = rows.mean(0)
    _, _, axes = np.linalg.svd(rows - mean, full_matrices=False)
    return PrincipalSpace(mean, axes[:components].T)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to two samples [N, k] and [M, k].

    ``|mean difference|^2 + tr(S1 + S2 - 2 (S1^(1/2) S2 S1^(1/2))^(1/2))`` with unbiased covariances
    (Dowson & Landau 1982; Heusel et al. 2017 for its use), in the squared unit of the data. Raises
    ValueError for fewer than two rows, different widths or numbers that are not finite.
    """
    first, second = _check(first, "first"), _check(second, "second")
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"samples must have the same width, got {first.shape} and {second.shape}")
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second)]
    root = _root(covariances[0])
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    shift = np.sum((first.mean(0) - second.mean(0)) ** 2)
    spread = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(shift + spread - 2 * np.sqrt(np.maximum(cross, 0.0)).sum())


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _check(rows: np.ndarray, name: str) -> np.ndarray:
    rows = np.asarray(rows, np.float64)
    if rows.ndim != 2 or rows.shape[0] < 2:
        raise ValueError(f"{name} must be [N, L] with at least 2 rows, got shape {rows.shape}")
    if not np.all(np.isfinite(rows)):
        raise ValueError(f"{name} holds numbers that are not finite")
    return rows
