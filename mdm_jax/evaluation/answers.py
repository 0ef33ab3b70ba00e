"""Answers to prompts: their likelihood, multiple choice by likelihood, and accuracy by a checker.

Only the answer's tokens are eligible. Any estimator that returns a ``Likelihood`` works; with
``exact_when_short`` short answers have no Monte Carlo error. ``key`` is typed: masks and samples of
a row depend on it and the row's number alone. ``progress`` gets the number of rows done.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.datasets import PairLayout
from mdm_jax.data.pipeline import evaluation_batches
from mdm_jax.data.rows import StoredRows
from mdm_jax.data.tokenizers import Tokenizer
from mdm_jax.distributed import to_host
from mdm_jax.estimates import finite_or_none, standard_error_of_mean
from mdm_jax.evaluation.paired import PairedDifference, paired_difference
from mdm_jax.likelihood.estimators import Likelihood
from mdm_jax.likelihood.rows import Draw
from mdm_jax.likelihood.stopping import Stop, differences, replicate_until
from mdm_jax.samplers.canvas import canvas_like
from mdm_jax.types import Array, Batch, PyTree

Evaluate = Callable[..., Likelihood]
"""``evaluate(params, key, batches, progress=None) -> Likelihood``."""


@dataclasses.dataclass(frozen=True, eq=False)
class AnswerScores:
    """Bounds on ``-log p(answer | prompt)``; NaN (or 0) where there is no answer.

    Attributes:
        replicate_nats: [R, ...] each replicate's estimate for each answer, nats.
        tokens, units: [...] eligible tokens and units (characters) of each answer.
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

    Padding is not attended to. To score the end of an answer append the tokenizer's ``eos_id`` (up
    to ``answer_length`` for a network trained with ``answer_padding="eos_scored"``).

    Args:
        prompts, answers: [N] of token ids; an empty answer is a row without eligible tokens.
        prompt_length, answer_length: positions of each.
        units: [N] characters of each answer; None: its number of tokens.

    Raises ValueError if the numbers of prompts, answers and units differ, or one does not fit.
    """
    count = len(prompts)
    if len(answers) != count or (units is not None and len(units) != count):
        raise ValueError(
            f"{count} prompts need as many answers and units, got {len(answers)} answers"
            + ("" if units is None else f" and {len(units)} units")
        )
    layout = PairLayout(prompt_length, answer_length, "pad_hidden")
    return layout.rows(prompts, answers, pad_id=pad_id, units=units)


def score_answers(
    evaluate: Evaluate,
    params: PyTree,
    key: Array,
    rows: Batch,
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> AnswerScores:
    """Scores [N]: nats of each row's eligible tokens given the rest, ``batch_size`` rows per pass.

    ``rows`` [N, L] of :func:`answer_rows` or a dataset. ``evaluate`` is any estimator; for short
    answers ``make_subset_likelihood(..., exact_when_short(rotated_counts(16), 7))``.
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
    """``log p(second) - log p(first)`` of corresponding rows [N, L], on common subsets.

    ``per_row_nats`` of the result estimates the ratio, without bias under the conditions of
    ``likelihood.subsets``, else the difference of two bounds. Common subsets help more the more the
    rows share (variances: ``tests/unit/evaluation/test_answers.py``). Raises ValueError if the
    eligible positions differ: then no subset is common.
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


Rule = Callable[[AnswerScores], np.ndarray]
"""Maps scores to the numbers [R, Q, C] compared, smallest best; NaN for no candidate."""


def total_nats(scores: AnswerScores) -> np.ndarray:
    """The negative log-likelihood; favours short answers."""
    return scores.replicate_nats


def nats_per_token(scores: AnswerScores) -> np.ndarray:
    """Nats per token; depends on the tokenizer."""
    return scores.replicate_nats / np.maximum(scores.tokens, 1)


def nats_per_character(scores: AnswerScores) -> np.ndarray:
    """Nats per character (``units``); ValueError if an answer with tokens has none."""
    if np.any((scores.units < 1) & (scores.tokens > 0)):
        raise ValueError("an answer has tokens but no characters; give answer_rows its units")
    return scores.replicate_nats / np.maximum(scores.units, 1)


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
        certain: [Q] whether the chosen one is the best with certainty, as ``choose_until`` was
            asked; None if it was not.
        replicates: [Q, C] drawn of each candidate; None: equally many of all.
    """

    rule: str
    chosen: np.ndarray
    ties: np.ndarray
    credit: np.ndarray
    margin: np.ndarray
    margin_standard_error: np.ndarray
    chance: float
    certain: np.ndarray | None = None
    replicates: np.ndarray | None = None

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
        """Questions without a tie whose margin is within two Monte Carlo standard errors, or which
        ``choose_until`` left open."""
        if self.certain is not None:
            return int(((self.ties == 1) & ~self.certain).sum())
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

    ``evaluate`` and ``batch_size`` as for :func:`score_answers`, the layout as for
    :func:`answer_rows`.

    Args:
        prompts: [Q] of token ids.
        candidates: two or more answers for each question, token ids.
        characters: of each candidate; None: its number of tokens.
        progress: counts Q times the largest number of candidates.

    Raises ValueError for no question, fewer than two candidates, an empty one, or as
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
        correct: [Q] number of the correct candidate; ValueError if not one of the question's.
        rule: ``total_nats``, ``nats_per_token``, ``nats_per_character``, or a function of yours.
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


def choose_until(
    draw: Draw, number: ArrayLike, correct: ArrayLike, stop: Stop, divisor: ArrayLike = 1.0
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

    ValueError for fewer than two candidates.
    """
    number, correct = np.asarray(number), np.asarray(correct)
    present = number >= 0
    if present.sum(1).min() < 2:
        few = int(present.sum(1).argmin())
        raise ValueError(f"question {few} has {present[few].sum()} candidate; give it two or more")
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
        rule="choose_until",
        chosen=best,
        ties=tied.sum(1),
        credit=tied[every, correct] / tied.sum(1),
        margin=lead[closest],
        margin_standard_error=stopped.standard_error[closest],
        chance=float(np.mean(1 / present.sum(1))),
        certain=np.isfinite(values).sum(1) == 1,
        replicates=np.where(present, stopped.row_replicates[number], 0),
    )


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

    A row's eligible positions (ValueError if no row has any) are its answer, attended ones before,
    its prompt.

    Args:
        generate: ``generate(params, key, canvas, documents, row_offset=...) -> tokens [B, L]``,
            such as ``samplers.make_generator(...)``.
        batches: as of ``data.evaluation_batches``; rows without eligible positions are left out.
        check: as ``Dataset.check``.
    """
    prompts, answers, correct, seen = [], [], [], 0
    for batch in batches:
        tokens, eligible = map(np.asarray, batch[:2])
        canvas, documents = canvas_like(batch, tokenizer.mask_id)
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
