"""Likelihood of texts longer than the context, in overlapping windows.

The first window scores all its tokens, each later one begins ``stride`` tokens on and scores the
new ones: every token counts once, with at least ``window - stride`` tokens of left context after
the first window. The sum over windows bounds ``-log p`` of the text under a model with that
context, and falls with the overlap: compare at one window and stride only.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.pipeline import evaluation_batches
from mdm_jax.data.rows import StoredRows
from mdm_jax.estimates import finite_or_none, standard_error_of_ratio
from mdm_jax.likelihood.estimators import Evaluate, Likelihood
from mdm_jax.types import Array, Batch, PyTree


class Windows(NamedTuple):
    """Texts cut into W windows.

    Attributes:
        rows: [W, window]; eligible are the tokens that a window scores.
        text, start: [W] number of a window's text, and position of its first token there.
    """

    rows: Batch
    text: np.ndarray
    start: np.ndarray
    window: int
    stride: int


@dataclasses.dataclass(frozen=True, eq=False)
class WindowedLikelihood:
    """A bound on the negative log-likelihood of long texts.

    ``likelihood`` is that of the N windows; its errors over rows treat windows as independent,
    which those of one text are not. The errors here are over texts. ``row_text``: [N] text of each
    window.
    """

    likelihood: Likelihood
    row_text: np.ndarray
    window: int
    stride: int

    @property
    def text_nats(self) -> np.ndarray:
        """[texts] bound of each text, nats; 0 for one without eligible tokens."""
        return np.bincount(self.row_text, self.likelihood.per_row_nats)

    @property
    def text_tokens(self) -> np.ndarray:
        """[texts] eligible tokens of each text."""
        return np.bincount(self.row_text, self.likelihood.row_tokens).astype(np.int64)

    @property
    def texts(self) -> int:
        """Number of texts with eligible tokens."""
        return int(np.count_nonzero(self.text_tokens))

    @property
    def data_standard_error_nats_per_token(self) -> float:
        """Standard error of nats per token from the spread over texts; NaN for a single one."""
        return self._error_over_texts(self.likelihood.row_tokens)

    @property
    def data_standard_error_bits_per_unit(self) -> float:
        """Standard error of bits per unit from the spread over texts; NaN for a single one."""
        return self._error_over_texts(self.likelihood.row_units) / math.log(2)

    def to_dict(self) -> dict:
        """JSON values: those of the likelihood, window, stride, and errors by text."""
        token = self.data_standard_error_nats_per_token
        unit = self.data_standard_error_bits_per_unit
        return self.likelihood.to_dict() | {
            "texts": self.texts,
            "window": self.window,
            "stride": self.stride,
            "data_standard_error_nats_per_token": finite_or_none(token),
            "data_standard_error_bits_per_token": finite_or_none(token / math.log(2)),
            "data_standard_error_bits_per_unit": finite_or_none(unit),
        }

    def summary(self) -> str:
        """A few lines for the terminal."""
        return (
            f"{self.texts} texts in windows of {self.window} tokens, stride {self.stride}: "
            f"at least {self.window - self.stride} tokens of left context\n"
            f"{self.likelihood.summary()}\n"
            f"  nats per token, texts as independent: data "
            f"± {self.data_standard_error_nats_per_token:.4f}"
        )

    def _error_over_texts(self, sizes: np.ndarray) -> float:
        scored = self.text_tokens > 0
        return standard_error_of_ratio(
            self.text_nats[scored], np.bincount(self.row_text, sizes)[scored]
        )


def sliding_windows(
    texts: Sequence[ArrayLike],
    window: int,
    stride: int,
    *,
    pad_id: int,
    eligible: Sequence[ArrayLike] | None = None,
    character_counts: ArrayLike | None = None,
) -> Windows:
    """Cuts texts of any length into windows; the last one ends where the text ends.

    Args:
        texts: token ids of each text.
        window, stride: L, the context of the network, and 1 <= stride <= L; L for no overlap.
        pad_id: padding of texts shorter than a window.
        eligible: of each text, the tokens to score (not a prompt, say); default all. Windows
            without any are left out.
        character_counts: [K] characters of each token id; default one unit per token.

    Raises ValueError if a size is out of range, masks and texts differ in shape, or nothing is
    eligible.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"the stride must lie in [1, window]: a larger one would leave tokens out; "
            f"got stride {stride} and window {window}"
        )
    texts = [np.asarray(text, np.int32) for text in texts]
    wanted = [np.ones(t.shape, bool) for t in texts] if eligible is None else eligible
    wanted = [np.asarray(mask, bool) for mask in wanted]
    if [t.shape for t in texts] != [mask.shape for mask in wanted] or any(
        t.ndim != 1 for t in texts
    ):
        raise ValueError(
            f"texts must be token ids [n] with eligible masks of the same lengths, got shapes "
            f"{[t.shape for t in texts]} and {[mask.shape for mask in wanted]}"
        )
    rows, owners, starts = [], [], []
    for number, (tokens, mask) in enumerate(zip(texts, wanted)):
        scored = 0
        while scored < len(tokens):
            end = min(scored + (stride if scored else window), len(tokens))
            start = max(end - window, 0)
            new = mask[start:end] & (np.arange(start, end) >= scored)
            if new.any():
                rows.append(_row(tokens[start:end], new, window, pad_id, character_counts))
                owners.append(number)
                starts.append(start)
            scored = end
    if not rows:
        raise ValueError(f"nothing to score: none of {len(texts)} texts has an eligible token")
    batch = Batch(*(np.stack(field) for field in zip(*rows)))
    return Windows(batch, np.array(owners), np.array(starts), window, stride)


def score_windows(
    evaluate: Evaluate,
    params: PyTree,
    key: Array,
    windows: Windows,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> WindowedLikelihood:
    """The bound of the texts of :func:`sliding_windows`, ``batch_size`` rows in a pass.

    ``evaluate`` is any estimator; ``progress`` gets the number of rows done.
    """
    batches = evaluation_batches(StoredRows(windows.rows), batch_size)
    result = evaluate(params, key, batches, progress)
    text = windows.text[result.row_index]
    return WindowedLikelihood(result, text, windows.window, windows.stride)


def _row(tokens, new, window: int, pad_id: int, character_counts) -> Batch:
    rest = (0, window - len(tokens))
    units = new.sum()
    if character_counts is not None:
        units = np.asarray(character_counts)[tokens[new]].sum()
    return Batch(
        tokens=np.pad(tokens, rest, constant_values=pad_id),
        eligible=np.pad(new, rest),
        documents=np.pad(np.ones(len(tokens), np.int32), rest),
        units=np.int32(units),
    )
