"""Right answers: exact match, several answers to one prompt (pass@k, majority vote), intervals."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

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
    rng, means = np.random.default_rng(0), np.empty(resamples)
    for i in range(resamples):
        means[i] = values[rng.integers(len(values), size=len(values))].mean()
    low, high = np.quantile(means, [(1 - coverage) / 2, (1 + coverage) / 2])
    return Interval(float(values.mean()), float(low), float(high))


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
