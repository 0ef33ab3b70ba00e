"""Quality and diversity of generated texts, measured together.

No figure means anything alone: greedy and repetitive texts have a low generative perplexity, random
ones a high entropy. :class:`TextQuality` keeps them side by side.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.evaluation.diversity import (
    SelfBleu,
    TokenEntropy,
    distinct_ngrams,
    self_bleu,
    token_entropy,
)
from mdm_jax.evaluation.generative_perplexity import (
    GenerativePerplexity,
    Score,
    generative_perplexity,
)
from mdm_jax.evaluation.ngram_divergence import NgramDivergence, ngram_divergence
from mdm_jax.evaluation.ngrams import as_texts
from mdm_jax.evaluation.standard_errors import finite_or_none


@dataclasses.dataclass(frozen=True)
class TextQuality:
    """Figures of one set of texts; those that were not asked for are None or empty.

    Attributes:
        texts: number of texts.
        tokens: number of tokens.
        entropy: of the tokens, nats.
        distinct: distinct n-grams over all n-grams, by n.
        self_bleu: BLEU of each text against the others.
        divergence: of the n-grams from held-out ones, by n.
        perplexity: under another model.
    """

    texts: int
    tokens: int
    entropy: TokenEntropy
    distinct: dict[int, float]
    self_bleu: SelfBleu | None
    divergence: dict[int, NgramDivergence]
    perplexity: GenerativePerplexity | None

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON values; undefined numbers become None."""
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
    """All figures of a set of generated texts.

    Args:
        tokens: [N, L].
        valid: [N, L] bool, false from the end of a text on; all if not given.
        held_out: [M, L'] texts to compare the n-grams with; if not given there is no divergence.
        held_out_valid: [M, L'] bool; all if not given.
        score: another model, for the generative perplexity; none if not given.
        orders: n of distinct n-grams and of the divergence.
        bleu_order: n of self-BLEU, which needs at least two texts.
        max_bleu_texts: take the first so many texts for self-BLEU; None for all.
        batch_size: rows per call of ``score``.

    Raises:
        ValueError: as the functions that measure each figure.
    """
    texts = as_texts(tokens, valid)
    several = np.count_nonzero(texts.lengths) > 1
    divergence = {}
    if held_out is not None:
        for n in orders:
            divergence[n] = ngram_divergence(
                tokens, held_out, n, valid=valid, held_out_valid=held_out_valid
            )
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
