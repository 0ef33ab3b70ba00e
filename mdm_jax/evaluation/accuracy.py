"""Accuracy of answers to held-out prompts, by a checker."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import to_host
from mdm_jax.types import Array, Batch, PyTree

Check = Callable[[str, str], bool]
"""``check(prompt, answer)``: whether a text is a correct answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class TaskAccuracy:
    """Answers of a model, and which are correct.

    Attributes:
        prompts: N prompts.
        answers: N texts, up to the first EOS; padding or masks in an answer are shown and make it
            wrong.
        correct: [N] bool.
    """

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    correct: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of correct answers."""
        return float(self.correct.mean())

    @property
    def standard_error(self) -> float:
        """Binomial, ``sqrt(a (1 - a) / N)``; 0 where a is 0 or 1, see :meth:`interval` there."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self.correct))

    def interval(self, deviations: float = 1.96) -> tuple[float, float]:
        """Wilson's interval (1927), about 95 % by default; never empty."""
        count, square = len(self.correct), deviations**2
        middle = (self.accuracy + square / (2 * count)) / (1 + square / count)
        spread = math.hypot(self.standard_error, deviations / (2 * count))
        half = deviations * spread / (1 + square / count)
        return max(0.0, middle - half), min(1.0, middle + half)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        low, high = self.interval()
        return {
            "accuracy": self.accuracy,
            "standard_error_accuracy": self.standard_error,
            "accuracy_interval": [low, high],
            "answers": len(self.correct),
        }


def measure_task_accuracy(
    generate: Callable[..., Array],
    params: PyTree,
    key: Array,
    batches: Iterable[Batch],
    *,
    check: Check,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] | None = None,
) -> TaskAccuracy:
    """Answers every prompt once and checks the answers.

    A row's eligible positions are its answer, the attended positions before them its prompt.

    Args:
        generate: ``generate(params, key, canvas, documents, row_offset=...) -> tokens [B, L]``,
            such as ``samplers.make_generator(...)``.
        params: parameters.
        key: typed key. An answer depends on it and the row's number alone.
        batches: as of ``data.evaluation_batches``; rows without eligible positions are left out.
        check: as ``Dataset.check``.
        tokenizer: of the data.
        progress: called with the number of rows after each batch.

    Raises:
        ValueError: if no row has an eligible position.
    """
    prompts, answers, correct, seen = [], [], [], 0
    for batch in batches:
        tokens, eligible, documents = map(np.asarray, batch[:3])
        canvas = np.where(eligible, np.int32(tokenizer.mask_id), tokens)
        generated = to_host(generate(params, key, canvas, documents, row_offset=seen))
        for row in np.flatnonzero(eligible.any(1)):
            first = np.flatnonzero(eligible[row])[0]
            is_prompt = (documents[row] > 0) & (np.arange(len(tokens[row])) < first)
            ids = tokenizer.truncate_at_eos(generated[row][eligible[row]])
            prompts.append(tokenizer.decode(tokens[row][is_prompt]))
            finished = not np.any((ids == tokenizer.pad_id) | (ids == tokenizer.mask_id))
            # Padding is shown as ▁, like masks.
            shown = np.where(ids == tokenizer.pad_id, tokenizer.mask_id, ids)
            answers.append(tokenizer.decode(shown))
            correct.append(finished and check(prompts[-1], answers[-1]))
        seen += len(tokens)
        if progress is not None:
            progress(len(tokens))
    if not prompts:
        raise ValueError(f"nothing to answer: none of {seen} rows has an eligible position")
    return TaskAccuracy(tuple(prompts), tuple(answers), np.array(correct, bool))
