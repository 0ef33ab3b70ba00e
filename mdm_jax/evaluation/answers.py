"""Likelihood of answers given prompts, one number per answer.

Only the answer's tokens are eligible. Any estimator that returns a ``Likelihood`` works; with
``exact_when_short`` short answers have no Monte Carlo error.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.datasets import StoredRows
from mdm_jax.data.pipeline import evaluation_batches
from mdm_jax.estimates import standard_error_of_mean
from mdm_jax.evaluation.paired import PairedDifference, paired_difference
from mdm_jax.likelihood.result import Likelihood
from mdm_jax.types import Array, Batch, PyTree

Evaluate = Callable[..., Likelihood]
"""``evaluate(params, key, batches, progress=None) -> Likelihood``."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerScores:
    """Bounds on ``-log p(answer | prompt)``. Fields are NaN (or 0) where there is no answer.

    Attributes:
        replicate_nats: [R, ...] each replicate's estimate for each answer, nats.
        tokens: [...] eligible tokens of each answer.
        units: [...] units (characters) of each answer.
    """

    replicate_nats: np.ndarray
    tokens: np.ndarray
    units: np.ndarray

    @property
    def nats(self) -> np.ndarray:
        """[...] nats of each answer."""
        return self.replicate_nats.mean(0)

    @property
    def standard_error(self) -> np.ndarray:
        """[...] Monte Carlo standard error of ``nats``; NaN for one replicate."""
        flat = self.replicate_nats.reshape(len(self.replicate_nats), -1)
        errors = [standard_error_of_mean(answer) for answer in flat.T]
        return np.array(errors).reshape(self.tokens.shape)


def answer_rows(
    prompts: Sequence[ArrayLike],
    answers: Sequence[ArrayLike],
    *,
    prompt_length: int,
    answer_length: int,
    pad_id: int,
    units: ArrayLike | None = None,
) -> Batch:
    """Rows ``[PAD ... prompt][answer PAD ...]``, the layout of ``data.jsonl``, as one batch.

    Only the answer's tokens are eligible; padding is not attended to. To score the end of an answer
    append the tokenizer's ``eos_id`` (up to ``answer_length`` for a network that was trained with
    ``answer_padding="eos_scored"``).

    Args:
        prompts: [N] of token ids; may be empty.
        answers: [N] of token ids; an empty one is a row without eligible tokens.
        prompt_length, answer_length: positions for prompt and answer.
        pad_id: padding token.
        units: [N] characters of each answer; None: its number of tokens.

    Raises:
        ValueError: if the numbers of prompts, answers and units differ, or one does not fit.
    """
    count = len(prompts)
    if len(answers) != count or (units is not None and len(units) != count):
        raise ValueError(
            f"{count} prompts need as many answers and units, got {len(answers)} answers"
            + ("" if units is None else f" and {len(units)} units")
        )
    shape = (count, prompt_length + answer_length)
    tokens = np.full(shape, pad_id, np.int32)
    visible, eligible = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        prompt, answer = np.asarray(prompt, np.int32), np.asarray(answer, np.int32)
        if len(prompt) > prompt_length or len(answer) > answer_length:
            raise ValueError(
                f"pair {row} does not fit: {len(prompt)} prompt tokens in {prompt_length} "
                f"positions, {len(answer)} answer tokens in {answer_length}"
            )
        begin, end = prompt_length - len(prompt), prompt_length + len(answer)
        tokens[row, begin:prompt_length], tokens[row, prompt_length:end] = prompt, answer
        visible[row, begin:end], eligible[row, prompt_length:end] = True, True
    units = eligible.sum(1) if units is None else units
    return Batch(tokens, eligible, visible.astype(np.int32), np.asarray(units, np.int32))


def score_answers(
    evaluate: Evaluate,
    params: PyTree,
    key: Array,
    rows: Batch,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> AnswerScores:
    """Scores [N]: nats of each row's eligible tokens given the rest.

    Args:
        evaluate: any estimator; for short answers
            ``make_subset_likelihood(..., exact_when_short(rotated_counts(16), 7))``.
        params: parameters.
        key: typed key. The masks of a row depend on it and the row's number alone.
        rows: [N, L], of :func:`answer_rows` or of a dataset.
        batch_size: rows per forward pass.
        progress: called with the number of rows done.
    """
    result = evaluate(params, key, row_batches(rows, batch_size), progress)
    return spread_rows(result, len(rows.tokens))


def log_likelihood_ratios(
    evaluate: Evaluate,
    params: PyTree,
    key: Array,
    first: Batch,
    second: Batch,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> PairedDifference:
    """``log p(second) - log p(first)`` of corresponding rows, on common subsets.

    ``per_row_nats`` of the result estimates the ratio, without bias under the conditions of
    ``likelihood.subsets``, else the difference of two bounds. Common subsets help the more, the
    more the rows have in common (``tests/unit/evaluation/test_answers.py`` has variances).

    Args:
        evaluate, params, key, batch_size, progress: as for :func:`score_answers`.
        first: [N, L].
        second: [N, L], with the eligible positions of ``first``.

    Raises:
        ValueError: if the eligible positions differ: then no subset is common.
    """
    if not np.array_equal(first.eligible, second.eligible):
        raise ValueError(
            "the two batches must have the same eligible positions, or they have no subsets in "
            "common; answers of different lengths can only be scored one by one (score_answers)"
        )
    batches = (row_batches(rows, batch_size) for rows in (first, second))
    return paired_difference(*[evaluate(params, key, part, progress) for part in batches])


def row_batches(rows: Batch, batch_size: int) -> Iterator[Batch]:
    """The rows [N, L] in batches of one shape; see ``data.evaluation_batches``."""
    return evaluation_batches(StoredRows(jax.tree.map(np.asarray, rows)), batch_size)


def spread_rows(result: Likelihood, rows: int) -> AnswerScores:
    """A likelihood as scores of all ``rows`` rows, NaN for those without eligible tokens."""
    nats = np.full((result.replicates, rows), np.nan)
    nats[:, result.row_index] = result.replicate_row_nats
    tokens, units = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
    tokens[result.row_index], units[result.row_index] = result.row_tokens, result.row_units
    return AnswerScores(nats, tokens, units)
