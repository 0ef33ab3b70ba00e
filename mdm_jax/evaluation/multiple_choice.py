"""Multiple choice: the most likely of several answers.

Candidates of a question are scored on common noise: their masks are a function of the question's
number and of their length. What is compared is named, since the rules disagree: the negative
log-likelihood, undivided or per token or per character.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.estimates import finite_or_none, standard_error_of_mean
from mdm_jax.evaluation.answers import AnswerScores, Evaluate, answer_rows, row_batches, spread_rows
from mdm_jax.types import Array, PyTree

Rule = Callable[[AnswerScores], np.ndarray]
"""Maps scores to the numbers [R, Q, C] compared, smallest best; NaN for no candidate."""


def total_nats(scores: AnswerScores) -> np.ndarray:
    """The negative log-likelihood; favours short answers."""
    return scores.replicate_nats


def nats_per_token(scores: AnswerScores) -> np.ndarray:
    """Nats per token; depends on the tokenizer."""
    return scores.replicate_nats / np.maximum(scores.tokens, 1)


def nats_per_character(scores: AnswerScores) -> np.ndarray:
    """Nats per character (``units``); does not depend on the tokenizer.

    Raises:
        ValueError: if an answer with tokens has no characters.
    """
    if np.any((scores.units < 1) & (scores.tokens > 0)):
        raise ValueError("an answer has tokens but no characters; give answer_rows its units")
    return scores.replicate_nats / np.maximum(scores.units, 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """Chosen candidates and their accuracy.

    In a tie ``chosen`` is the first candidate, and the credit that of a fair draw among the tied.

    Attributes:
        rule: name of the rule.
        chosen: [Q] number of the chosen candidate.
        ties: [Q] candidates with the smallest value; 1 where there is no tie.
        credit: [Q] 1 for correct, 0 for wrong, a fraction for a tie with the correct answer.
        margin: [Q] value of the runner-up minus that of the chosen one; 0 for a tie.
        margin_standard_error: [Q] its Monte Carlo error, paired over replicates.
        chance: accuracy of guessing.
    """

    rule: str
    chosen: np.ndarray
    ties: np.ndarray
    credit: np.ndarray
    margin: np.ndarray
    margin_standard_error: np.ndarray
    chance: float

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
        """Questions without a tie whose margin is within two Monte Carlo standard errors."""
        unsure = self.margin <= 2 * self.margin_standard_error
        return int((unsure & (self.ties == 1)).sum())

    def to_dict(self) -> dict:
        """JSON values without the choices themselves."""
        return {
            "rule": self.rule,
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
            f"{len(self.credit)} questions by {self.rule}: accuracy {self.accuracy:.4f} ± "
            f"{self.standard_error:.4f} (chance {self.chance:.4f}), {self.tied_questions} ties, "
            f"{self.unsure_questions} within two Monte Carlo standard errors"
        )


def score_candidates(
    evaluate: Evaluate,
    params: PyTree,
    key: Array,
    prompts: Sequence[ArrayLike],
    candidates: Sequence[Sequence[ArrayLike]],
    batch_size: int,
    *,
    prompt_length: int,
    answer_length: int,
    pad_id: int,
    characters: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> AnswerScores:
    """Scores [Q, C] of every candidate of every question, NaN beyond a question's candidates.

    Args:
        evaluate, params, key, batch_size: as for ``score_answers``.
        prompts: [Q] of token ids.
        candidates: for each question two or more answers, token ids.
        prompt_length, answer_length, pad_id: layout, see ``answer_rows``.
        characters: of each candidate; None: its number of tokens.
        progress: called with the number of rows done, of Q times the largest number of candidates.

    Raises:
        ValueError: for no question, fewer than two candidates, an empty candidate, or as
            ``answer_rows``.
    """
    if not len(prompts) or len(prompts) != len(candidates):
        raise ValueError(
            f"{len(prompts)} prompts and {len(candidates)} lists of candidates; "
            "each question needs one of both"
        )
    for number, answers in enumerate(candidates):
        if len(answers) < 2 or not all(len(answer) for answer in answers):
            raise ValueError(
                f"question {number} needs at least two candidates, none of them empty, "
                f"got lengths {[len(answer) for answer in answers]}"
            )
    width = max(map(len, candidates))
    if characters is None:
        characters = [[len(answer) for answer in answers] for answers in candidates]
    parts = []
    # One stream of rows per candidate number: row q is question q in each, hence common noise.
    for number in range(width):
        rows = answer_rows(
            prompts,
            [answers[number] if number < len(answers) else () for answers in candidates],
            prompt_length=prompt_length,
            answer_length=answer_length,
            pad_id=pad_id,
            units=[sizes[number] if number < len(sizes) else 0 for sizes in characters],
        )
        result = evaluate(params, key, row_batches(rows, batch_size), progress)
        parts.append(spread_rows(result, len(prompts)))
    return AnswerScores(
        np.stack([part.replicate_nats for part in parts], -1),
        np.stack([part.tokens for part in parts], -1),
        np.stack([part.units for part in parts], -1),
    )


def choose(scores: AnswerScores, correct: ArrayLike, rule: Rule = total_nats) -> Choices:
    """The most likely candidate of each question.

    Args:
        scores: [Q, C], of :func:`score_candidates`.
        correct: [Q] number of the correct candidate.
        rule: ``total_nats``, ``nats_per_token``, ``nats_per_character``, or a function of yours.

    Raises:
        ValueError: if a correct candidate is not one of the question's.
    """
    present, correct = scores.tokens > 0, np.asarray(correct)
    if correct.shape != present.shape[:1] or np.any((correct < 0) | (correct >= present.sum(1))):
        raise ValueError(
            f"correct must name one of the candidates of each of {len(present)} questions, "
            f"got {correct.tolist()}"
        )
    figures = rule(scores)
    mean = np.where(present, figures.mean(0), np.inf)
    question = np.arange(len(mean))
    order = np.argsort(mean, axis=1, kind="stable")
    best, second = order[:, 0], order[:, 1]
    tied = mean == mean[question, best][:, None]
    ties = tied.sum(1)
    margins = figures[:, question, second] - figures[:, question, best]
    return Choices(
        rule=getattr(rule, "__name__", str(rule)),
        chosen=best,
        ties=ties,
        credit=tied[question, correct] / ties,
        margin=margins.mean(0),
        margin_standard_error=np.array([standard_error_of_mean(m) for m in margins.T]),
        chance=float(np.mean(1 / present.sum(1))),
    )
