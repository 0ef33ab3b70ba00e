"""Right answers: exact match, checkers, several answers to one prompt, intervals."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import to_host
from mdm_jax.samplers.canvas import canvas_like
from mdm_jax.samplers.filters import check_finite
from mdm_jax.types import Array, Batch, PyTree

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def extract_answer(text: str, marker: str | None = None) -> str | None:
    """The answer in a text: the line after the last ``marker``, or without one the last number.

    None where there is no marker or number. ``####`` is GSM8K's marker, ``#`` that of
    ``tasks.Chain``.
    """
    if marker is not None:
        _, found, rest = text.rpartition(marker)
        return normalised(rest.strip().partition("\n")[0]) if found else None
    numbers = _NUMBER.findall(text)
    return normalised(numbers[-1]) if numbers else None


def normalised(answer: str) -> str:
    """An answer without white space at its ends, ``$``, thousands' commas and a final full stop."""
    answer = answer.strip().removeprefix("$").removesuffix(".").strip()
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", answer)


def exact_match(text: str, target: str, marker: str | None = None) -> bool:
    """Whether the answers in a text and in its target are the same, by :func:`extract_answer`.

    A target without the marker, or number, is the answer itself.
    """
    wanted = extract_answer(target, marker)
    wanted = normalised(target) if wanted is None else wanted
    return extract_answer(text, marker) == wanted


def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's ``process_results``: exact match after the marker, and of the last number."""
    text, target = results[0], doc["answer"]
    marked = exact_match(text, target, doc.get("marker", "####"))
    return {"with_marker": float(marked), "last_number": float(exact_match(text, target))}


class Interval(NamedTuple):
    """A mean over problems with a percentile bootstrap interval; JSON by ``_asdict``."""

    value: float
    low: float
    high: float


def bootstrap(values: ArrayLike, coverage: float = 0.95, resamples: int = 2000) -> Interval:
    """The mean of problems [Q], and its interval from resampled problems; the same every time.

    ValueError if empty, not finite, or for a coverage outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"bootstrap needs finite values [Q], got shape {values.shape}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")
    low = high = mean = float(values.mean())
    if len(values) > 1:
        from scipy import stats  # slow to import

        options = {"method": "percentile", "n_resamples": resamples, "batch": 64, "rng": 0}
        found = stats.bootstrap((values,), np.mean, confidence_level=coverage, **options)
        low, high = map(float, found.confidence_interval)
    return Interval(mean, low, high)


def pass_at_k(correct: ArrayLike, samples: int, k: int) -> np.ndarray:
    """[Q] unbiased estimates of the chance that one of k answers is right (Chen et al. 2021).

    ``1 - C(n - c, k) / C(n, k)`` of c = ``correct`` [Q] among n = ``samples`` answers. ValueError
    unless 1 <= k <= n and 0 <= c <= n.
    """
    correct = np.asarray(correct)
    if not 1 <= k <= samples or np.any((correct < 0) | (correct > samples)):
        raise ValueError(
            f"pass@k needs 1 <= k <= samples and counts in [0, samples], got k={k}, "
            f"samples={samples}, counts {correct}"
        )
    total = math.comb(samples, k)
    return np.array([1 - math.comb(samples - int(c), k) / total for c in correct.ravel()])


def majority_vote(answers: Sequence[Sequence[str]], credit: ArrayLike) -> np.ndarray:
    """[Q] credit of each problem's most frequent answer; tied ones share it.

    Args:
        answers: [Q][n] texts that count as one vote where they are the same.
        credit: [Q, n] of each, 1 where right.
    """
    found = []
    for texts, own in zip(answers, np.asarray(credit, np.float64), strict=True):
        votes = collections.Counter(texts)
        most = max(votes.values())
        best = [text for text, count in votes.items() if count == most]
        found.append(np.mean([own[texts.index(text)] for text in best]))
    return np.array(found)


def repeated(answers: Sequence[Sequence[str]], credit: np.ndarray, samples: int) -> dict[str, Any]:
    """JSON values of pass@k for k = 1, 2, 4, ... and n, and of the vote, with intervals.

    ``credit`` [Q, n]; an answer is right where it is at least 1/2.
    """
    ks = sorted({2**i for i in range(samples.bit_length()) if 2**i <= samples} | {samples})
    counts = (credit >= 0.5).sum(1)
    figures = {f"pass@{k}": bootstrap(pass_at_k(counts, samples, k)) for k in ks}
    figures[f"majority@{samples}"] = bootstrap(majority_vote(answers, credit))
    return {name: figure._asdict() for name, figure in figures.items()}


Check = Callable[[str, str], bool]
"""``check(prompt, answer)``: whether a text is a correct answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class TaskAccuracy:
    """Answers of a model, and which are correct.

    ``answers``: N texts, up to the first EOS; padding or masks in an answer are shown and make it
    wrong. ``correct``: [N] bool.
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


class Answered(NamedTuple):
    """Prompts, a model's answers up to the first EOS, and [N] bool which hold no padding or mask
    (both are shown as ▁)."""

    prompts: tuple[str, ...]
    answers: tuple[str, ...]
    finished: np.ndarray


def answer_prompts(
    generate: Callable[..., Array],
    params: PyTree,
    key: Array,
    batches: Iterable[Batch],
    *,
    tokenizer: Tokenizer,
    progress: Callable[[int], None] | None = None,
) -> Answered:
    """Answers every prompt once.

    A row's eligible positions (ValueError if no row has any) are its answer, attended ones before,
    its prompt.

    Args:
        generate: ``generate(params, key, canvas, documents, row_offset=...) -> tokens [B, L]``,
            such as ``samplers.make_generator(...)``.
        batches: as of ``data.evaluation_batches``; rows without eligible positions are left out.
    """
    prompts, answers, finished, seen = [], [], [], 0
    for batch in batches:
        tokens, eligible = map(np.asarray, batch[:2])
        canvas, documents = canvas_like(batch, tokenizer.mask_id)
        generated = to_host(generate(params, key, canvas, documents, row_offset=seen))
        for row in np.flatnonzero(eligible.any(1)):
            first = np.flatnonzero(eligible[row])[0]
            is_prompt = (documents[row] > 0) & (np.arange(len(tokens[row])) < first)
            check_finite(generated[row], f"row {seen + row}")
            ids = tokenizer.truncate_at_eos(generated[row][eligible[row]])
            prompts.append(tokenizer.decode(tokens[row][is_prompt]))
            finished.append(not np.any((ids == tokenizer.pad_id) | (ids == tokenizer.mask_id)))
            shown = np.where(ids == tokenizer.pad_id, tokenizer.mask_id, ids)
            answers.append(tokenizer.decode(shown))
        seen += len(tokens)
        if progress is not None:
            progress(len(tokens))
    if not prompts:
        raise ValueError(f"nothing to answer: none of {seen} rows has an eligible position")
    return Answered(tuple(prompts), tuple(answers), np.array(finished, bool))


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
    """Answers every prompt once and checks the answers; arguments of :func:`answer_prompts`, and
    ``check`` as ``Dataset.check``."""
    found = answer_prompts(generate, params, key, batches, tokenizer=tokenizer, progress=progress)
    correct = [
        finished and check(prompt, answer)
        for prompt, answer, finished in zip(found.prompts, found.answers, found.finished)
    ]
    return TaskAccuracy(found.prompts, found.answers, np.array(correct, bool))
