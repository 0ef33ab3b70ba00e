"""Multiple choice by likelihood, drawn until it is certain."""

import dataclasses
import itertools
import math

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.estimates import finite_or_none, standard_error_of_mean
from mdm_jax.likelihood.rows import DrawReplicates
from mdm_jax.likelihood.stopping import Stop, differences, replicate_until


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Chosen candidates and their accuracy.

    Attributes:
        chosen: [Q] number of the chosen candidate, the first one in a tie.
        ties: [Q] candidates with the smallest value; 1 where there is no tie.
        credit: [Q] 1 or 0, or a fair draw's share of correct among the tied.
        margin: [Q] value of the runner-up minus that of the chosen one; 0 for a tie.
        margin_standard_error: [Q] its Monte Carlo error, paired over replicates.
        chance: accuracy of guessing.
        certain: [Q] whether the chosen one is the best with certainty, as was asked.
        replicates: [Q, C] drawn of each candidate.
    """

    chosen: np.ndarray
    ties: np.ndarray
    credit: np.ndarray
    margin: np.ndarray
    margin_standard_error: np.ndarray
    chance: float
    certain: np.ndarray
    replicates: np.ndarray

    @property
    def accuracy(self) -> float:
        """Mean credit."""
        return float(self.credit.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of ``accuracy`` from the spread over questions."""
        return standard_error_of_mean(self.credit)

    @property
    def tied_questions(self) -> int:
        """Questions with more than one best candidate."""
        return int((self.ties > 1).sum())

    @property
    def unsure_questions(self) -> int:
        """Questions without a tie that were left open."""
        return int(((self.ties == 1) & ~self.certain).sum())

    def to_dict(self) -> dict:
        """JSON values without the choices themselves."""
        return {
            "questions": len(self.credit),
            "accuracy": self.accuracy,
            "standard_error": finite_or_none(self.standard_error),
            "chance": self.chance,
            "tied_questions": self.tied_questions,
            "unsure_questions": self.unsure_questions,
        }

    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"{len(self.credit)} questions: accuracy {self.accuracy:.4f} ± "
            f"{self.standard_error:.4f} (chance {self.chance:.4f}), {self.tied_questions} ties, "
            f"{self.unsure_questions} left open"
        )


def choose_until(
    draw: DrawReplicates,
    number: ArrayLike,
    correct: ArrayLike,
    stop: Stop,
    divisor: ArrayLike = 1.0,
) -> Choices:
    """The most likely candidate of each question, drawn until it is certain.

    A candidate is out when another of its question is certainly better, by the sign of their
    difference on common noise; the last one left is certain. With C candidates the level of each of
    the at most C - 1 comparisons that could drop the best one is that of ``stop`` over C - 1, so
    that a certain choice is wrong with a probability of at most ``1 - coverage``. Compare racing
    (Maron and Moore 1994), here with group-sequential tests.

    Args:
        draw: ``likelihood.RowDraws`` of all candidates, those of one question under one key.
        number: [Q, C] row of each candidate; -1 where a question has fewer.
        correct: [Q] number of the correct candidate among its question's.
        divisor: [Q, C] that nats are compared over: tokens, characters, or 1.

    ``Stop(most=8, first=8)`` draws 8 of each and decides then. ValueError for fewer than two
    candidates, or a correct one that a question does not have.
    """
    number, correct = np.asarray(number), np.asarray(correct)
    present = number >= 0
    if present.sum(1).min() < 2:
        few = int(present.sum(1).argmin())
        raise ValueError(f"question {few} has {present[few].sum()} candidate; give it two or more")
    named = np.take_along_axis(present, np.clip(correct, 0, present.shape[1] - 1)[:, None], 1)
    if np.any((correct < 0) | (correct >= present.shape[1]) | ~named[:, 0]):
        raise ValueError(
            f"correct must name one of the candidates of each of {len(present)} questions, "
            f"got {correct.tolist()}"
        )
    weight = 1 / np.broadcast_to(np.float64(divisor), number.shape)
    pairs = [
        (q, a, b)
        for q, own in enumerate(present)
        for a, b in itertools.combinations(np.flatnonzero(own), 2)
    ]
    question, first, second = np.array(pairs).T
    targets = differences(number[question, first], number[question, second])
    ends = [weight[question, first], -weight[question, second]]
    targets = targets._replace(weight=np.concatenate(ends))
    out = np.zeros(number.shape, bool)

    def needed(sign: np.ndarray, _unsettled: np.ndarray) -> np.ndarray:
        out[question[sign > 0], first[sign > 0]] = True
        out[question[sign < 0], second[sign < 0]] = True
        return ~out[question, first] & ~out[question, second]

    level = (1 - stop.coverage) / (number.shape[1] - 1)
    stop = dataclasses.replace(stop, sign=True, coverage=1 - level)
    stopped = replicate_until(draw, int(number.max()) + 1, targets, stop, needed)
    values = np.where(present & ~out, stopped.row_value[number] * weight, np.inf)
    best, every = values.argmin(1), np.arange(len(number))
    tied = values == values[every, best][:, None]
    # Every other candidate's lead over the chosen one.
    is_best = [end == best[question] for end in (first, second)]
    lead = np.where(is_best[0], -stopped.value, np.where(is_best[1], stopped.value, np.inf))
    closest = np.array([np.where(question == q, lead, np.inf).argmin() for q in every])
    return Choices(
        chosen=best,
        ties=tied.sum(1),
        credit=tied[every, correct] / tied.sum(1),
        margin=lead[closest],
        margin_standard_error=stopped.standard_error[closest],
        chance=float(np.mean(1 / present.sum(1))),
        certain=np.isfinite(values).sum(1) == 1,
        replicates=np.where(present, stopped.row_replicates[number], 0),
    )


def beside_leader(values: ArrayLike, leader: ArrayLike) -> tuple[float, float]:
    """Mean of replicates [r], and its Monte Carlo standard error, by those of a leader [R], R >= r.

    Replicates i of both have common noise. Of candidates that left a race early, the leader's mean
    plus the mean difference from it: they stay beaten, and have less noise.
    """
    values, leader = np.asarray(values, np.float64), np.asarray(leader, np.float64)
    count = len(values)
    if count >= len(leader) or count < 2:
        return float(values.mean()), standard_error_of_mean(values)
    difference = values - leader[:count]
    (of_leader, both), (_, of_difference) = np.cov(leader[:count], difference)
    variance = (of_leader + 2 * both) / len(leader) + of_difference / count
    return float(leader.mean() + difference.mean()), math.sqrt(max(variance, 0.0))
