"""Paired comparisons: two likelihoods on common noise, two methods over a few seeds.

Shared masks, initial parameters and data order cancel in the difference, which is therefore far
more certain than either measurement.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax import files
from mdm_jax.estimates import (
    Estimate,
    finite_or_none,
    standard_error_of_mean,
    standard_error_of_ratio,
    total_of,
)
from mdm_jax.evaluation.accuracy import bootstrap
from mdm_jax.likelihood.estimators import Likelihood
from mdm_jax.likelihood.rows import DrawReplicates
from mdm_jax.likelihood.stopping import Stop, Stopped, differences, replicate_until
from mdm_jax.types import Array, Batch, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class PairedDifference:
    """First minus second, nats: positive where the second is more likely.

    ``standard_error_*`` is the Monte Carlo error of the paired differences (rows add up),
    ``data_standard_error_*`` their error over rows; ``unpaired_*`` are the errors that independent
    noise and different rows would have.
    """

    first: Likelihood
    second: Likelihood

    @property
    def replicate_row_nats(self) -> np.ndarray:
        """[R, N] difference of each replicate and row."""
        return self.first.replicate_row_nats - self.second.replicate_row_nats

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] difference of each row; ``log p(second) - log p(first)`` for one network."""
        return self.replicate_row_nats.mean(0)

    @property
    def per_row_standard_error(self) -> np.ndarray:
        """[N] Monte Carlo standard error of ``per_row_nats``; NaN for one replicate."""
        differences = self.replicate_row_nats
        return np.array([standard_error_of_mean(row) for row in differences.T])

    @property
    def nats(self) -> float:
        """Difference of the totals."""
        return float(self.replicate_row_nats.sum(1).mean())

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.first.tokens

    @property
    def standard_error_nats(self) -> float:
        return float(total_of(self.replicate_row_nats).standard_error[0])

    @property
    def standard_error_nats_per_token(self) -> float:
        return self.standard_error_nats / self.first.tokens

    @property
    def data_standard_error_nats_per_token(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.first.row_tokens)

    @property
    def unpaired_standard_error_nats_per_token(self) -> float:
        return math.hypot(*(r.standard_error_nats_per_token for r in (self.first, self.second)))

    @property
    def unpaired_data_standard_error_nats_per_token(self) -> float:
        both = (self.first, self.second)
        return math.hypot(*(r.data_standard_error_nats_per_token for r in both))

    @property
    def rows_won_by_second(self) -> Estimate:
        """Share of the rows on which the second is more likely; ties count half."""
        won = 0.5 + 0.5 * np.sign(self.per_row_nats)
        return Estimate(float(won.mean()), standard_error_of_mean(won))

    def to_dict(self) -> dict:
        """JSON values without the per-row arrays; undefined numbers are None."""
        names = ("nats", "nats_per_token", "standard_error_nats", "standard_error_nats_per_token")
        names += ("data_standard_error_nats_per_token", "unpaired_standard_error_nats_per_token")
        names += ("unpaired_data_standard_error_nats_per_token",)
        won, error = self.rows_won_by_second
        return {
            "rows": self.first.rows,
            "tokens": self.first.tokens,
            "passes": [self.first.passes, self.second.passes],
            "replicates": self.first.replicates,
            **{name: finite_or_none(getattr(self, name)) for name in names},
            "rows_won_by_second": won,
            "rows_won_by_second_standard_error": finite_or_none(error),
        }

    def summary(self) -> str:
        """A few lines for the terminal."""
        won, error = self.rows_won_by_second
        return "\n".join(
            [
                f"first minus second over {self.first.rows} rows, {self.first.tokens} tokens",
                f"  nats per token  {self.nats_per_token:+.5f}"
                f" ± {self.standard_error_nats_per_token:.5f}"
                f" (data ± {self.data_standard_error_nats_per_token:.5f})",
                f"  unpaired it would be ± {self.unpaired_standard_error_nats_per_token:.5f}"
                f" (data ± {self.unpaired_data_standard_error_nats_per_token:.5f})",
                f"  second more likely on {won:.1%} ± {error:.1%} of the rows",
            ]
        )


def paired_difference(first: Likelihood, second: Likelihood) -> PairedDifference:
    """First minus second, of two results of one estimator and *one key*.

    An exact result (all replicates agree) can be paired with that of another estimator. Equal keys
    are checked only by the number of masked tokens; :func:`compare_parameters` is safe. The
    ValueError names what differs: rows, tokens per row or replicates, and, if both have noise,
    design, passes or the masked tokens by level.
    """
    same = [
        ("the rows", first.row_index, second.row_index),
        ("the eligible tokens of each row", first.row_tokens, second.row_tokens),
        ("the number of replicates", [first.replicates], [second.replicates]),
    ]
    if _has_noise(first) and _has_noise(second):
        same += [
            ("the designs", [first.design], [second.design]),
            ("the number of passes", [first.passes], [second.passes]),
            ("the masked tokens by level", first.levels.targets, second.levels.targets),
        ]
    for what, one, other in same:
        if not np.array_equal(one, other):
            raise ValueError(
                f"the two results cannot be paired, {what} differ: {_short(one)} and "
                f"{_short(other)}; evaluate both with one estimator, one key and the same rows"
            )
    return PairedDifference(first, second)


def compare_parameters(
    evaluate: Callable[..., Likelihood],
    first: PyTree,
    second: PyTree,
    key: Array,
    batches: Iterable[Batch],
    progress: Callable[[int], None] | None = None,
) -> PairedDifference:
    """Two checkpoints of one network on the same rows and masks.

    ``evaluate(params, key, batches, progress) -> Likelihood``; ``batches`` is read twice, so an
    iterator is a ValueError.
    """
    if isinstance(batches, Iterator):
        raise ValueError("batches is read twice, but is an iterator; give a list of batches")
    results = [evaluate(params, key, batches, progress) for params in (first, second)]
    return paired_difference(*results)


def compare_until(
    first: DrawReplicates, second: DrawReplicates, rows: int, stop: Stop, pooled: bool = False
) -> Stopped:
    """Two models on the same N rows, drawn until differences are narrow or their sign is certain.

    ``first`` and ``second`` are ``likelihood.RowDraws`` of the rows under the same keys, with their
    own estimator and parameters; targets are first minus second of each row, nats, or ``pooled``
    their total. Rows that are settled are left out of further rounds.
    """

    def draw(wanted: np.ndarray, start: int, count: int) -> np.ndarray:
        both = (wanted[wanted < rows], first), (wanted[wanted >= rows] - rows, second)
        return np.concatenate([model(own, start, count) for own, model in both], axis=1)

    number = np.arange(rows)
    return replicate_until(draw, 2 * rows, differences(number, rows + number, pooled), stop)


def _has_noise(result: Likelihood) -> bool:
    return result.replicates < 2 or bool(np.ptp(result.replicate_row_nats, axis=0).any())


def _short(values: np.ndarray) -> str:
    return np.array2string(np.asarray(values), threshold=8, edgeitems=3)


@dataclasses.dataclass(frozen=True)
class PairedSeeds:
    """Differences [N] of two methods over seeds, first minus second.

    Attributes:
        mean, standard_error: of the differences and, from their spread, of the mean.
        bootstrap, student: intervals of the mean: percentile bootstrap, and for normal differences.
        sign_flips: share of the 2^N signs of the differences whose mean is at least as far from 0;
            at least 2 / 2^N, which is 0.0625 for five seeds.
        student_p: two-sided, of Student's test of mean 0; NaN for one seed, like student and
            standard_error.
    """

    differences: np.ndarray
    mean: float
    standard_error: float
    bootstrap: tuple[float, float]
    student: tuple[float, float]
    sign_flips: float
    student_p: float

    @property
    def significant(self) -> bool:
        """Whether both intervals exclude 0; for one comparison, not for the best of many.

        The bootstrap alone is too narrow for few seeds, by ``sqrt((N - 1) / N)`` and because the
        spread is estimated too.
        """
        return all(low > 0 or high < 0 for low, high in (self.bootstrap, self.student))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; None where one seed is too few."""
        return {
            "differences": self.differences.tolist(),
            "mean": self.mean,
            "standard_error": finite_or_none(self.standard_error),
            "bootstrap": [finite_or_none(end) for end in self.bootstrap],
            "student": [finite_or_none(end) for end in self.student],
            "sign_flips": self.sign_flips,
            "student_p": finite_or_none(self.student_p),
            "significant": self.significant,
        }


def paired_seeds(
    first: Sequence[float],
    second: Sequence[float],
    coverage: float = 0.95,
    resamples: int = 100_000,
) -> PairedSeeds:
    """Compares two methods run with the same seeds, in the same order.

    Args:
        first, second: [N] a score per seed; ValueError if empty, not finite or of different shapes.
        coverage, resamples: of the intervals, in (0, 1) (ValueError), and of the bootstrap.
    """
    from scipy import special, stats  # slow to import

    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"paired_seeds needs one score per seed of both, got shapes {first.shape} and "
            f"{second.shape}"
        )
    values = first - second
    if not np.all(np.isfinite(values)):
        raise ValueError(f"paired_seeds needs finite scores, got differences {values}")
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be in (0, 1), got {coverage}")
    mean, error = float(values.mean()), standard_error_of_mean(values)
    freedom = max(len(values) - 1, 1)
    reach = special.stdtrit(freedom, (1 + coverage) / 2) * error  # NaN for one seed
    if error == 0:  # differences without any spread
        student_p = 0.0 if mean else 1.0
    else:
        student_p = float(2 * special.stdtr(freedom, -abs(mean) / error))
    interval, flips = (mean, mean), 1.0
    if len(values) > 1:
        bootstrap = stats.bootstrap(
            (values,),
            np.mean,
            confidence_level=coverage,
            method="percentile",
            n_resamples=resamples,
            rng=0,
        )
        interval = tuple(map(float, bootstrap.confidence_interval))
        # All signs are enumerated up to 16 seeds, and drawn beyond.
        signs = stats.permutation_test(
            (values,), np.mean, permutation_type="samples", n_resamples=2**16, rng=0
        )
        flips = float(min(signs.pvalue, 1.0))
    return PairedSeeds(
        differences=values,
        mean=mean,
        standard_error=error,
        bootstrap=interval,
        student=(mean - reach, mean + reach),
        sign_flips=flips,
        student_p=student_p,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for several comparisons (Holm 1979), in the same order.

    Those below 0.05 are false with a probability of at most 5 % *together*, however the comparisons
    depend on each other. ValueError for values outside [0, 1].
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or not np.all((values >= 0) & (values <= 1)):
        raise ValueError(f"holm needs p-values [N] in [0, 1], got {p_values}")
    order = np.argsort(values, kind="stable")
    corrected = np.empty_like(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return corrected.tolist()


# --- results that may be compared ---------------------------------------------------------------

DESIGN = ("levels", "masks", "passes", "replicates", "width", "certain", "exact_up_to", "seed")
DESIGN += ("check_greedy", "max_length", "truncate")
DECODING = ("rule", "steps", "block_size", "threshold", "factor", "approximation", "refresh")
DECODING += ("temperature", "top_p", "guidance", "max_tokens")


EVALUATED = ("split", "data_fingerprint", "tokenizer_fingerprint", "rows", "design", "passes")
"""Fields of ``evaluation.json`` in which bounds that are compared should agree."""


def unlike(
    evaluations: Mapping[str, Mapping[str, Any]], names: Sequence[str] = EVALUATED
) -> list[str]:
    """Lines about fields in which evaluations by name differ; one without a field is left out."""
    lines = []
    for field in names:
        groups: dict[Any, list[str]] = {}
        for name, evaluation in evaluations.items():
            if field in evaluation:
                groups.setdefault(evaluation[field], []).append(name)
        if len(groups) > 1:
            shown = "; ".join(f"{str(value)[:12]}: {', '.join(of)}" for value, of in groups.items())
            lines.append(
                f"{field.replace('_', ' ')} differs, so that scores may not compare: {shown}"
            )
    return lines


def check_comparable(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What sets two results of ``harness.run_tasks`` apart besides the model, a line each.

    ValueError if they have no task in common, or one on other data (documents or prompts).
    """
    common = [name for name in first["tasks"] if name in second["tasks"]]
    if not common:
        raise ValueError(
            f"no task in common: {', '.join(first['tasks'])} and {', '.join(second['tasks'])}"
        )
    for name in common:
        one, other = first["tasks"][name], second["tasks"][name]
        if one["data"] != other["data"]:
            raise ValueError(
                f"task {name}: the two results are on other documents or prompts "
                f"({one['documents']} and {other['documents']} documents, {one['fewshot']} and "
                f"{other['fewshot']} examples in a prompt); evaluate both with the same --limit, "
                "--num_fewshot, --template and data"
            )
    notes = []
    if first["tokenizer"] != second["tokenizer"]:
        notes.append("tokenizers differ: figures per token cannot be compared, per byte they can")
    likelihood = any(first["tasks"][name]["requests"] != "generate_until" for name in common)
    written = any(first["tasks"][name]["requests"] == "generate_until" for name in common)
    for what, names, read in (("designs", DESIGN, likelihood), ("decoding", DECODING, written)):
        for name in names if read else ():
            pair = [results["settings"].get(name) for results in (first, second)]
            if pair[0] != pair[1]:
                notes.append(f"{what} differ: {name} {pair[0]!r} and {pair[1]!r}")
    for name in ("process", "dtype", "mask_token", "chat_template"):
        pair = [results["audit"].get(name) for results in (first, second)]
        if pair[0] != pair[1]:
            notes.append(f"{name.replace('_', ' ')} differs: {pair[0]} and {pair[1]}")
    if first["model"] == second["model"]:
        notes.append("both are of the same model")
    return notes


def compare_results(first: str | os.PathLike, second: str | os.PathLike) -> str:
    """First minus second by task and metric, paired over documents, with what else differs.

    Reads NAME.json and NAME.jsonl of ``mdm eval``; ValueError as :func:`check_comparable`.
    """
    both = [files.read_json(path) for path in (first, second)]
    for path, results in zip((first, second), both):
        if not {"tasks", "settings", "audit", "tokenizer", "model"} <= results.keys():
            raise ValueError(f"{path}: not results of mdm eval")
    lines = [f"not alike: {note}" for note in check_comparable(*both)]
    values = [_values(path) for path in (first, second)]
    for key in sorted(values[0].keys() & values[1].keys()):
        documents = sorted(values[0][key].keys() & values[1][key].keys())
        one, other = (np.array([v[key][d] for d in documents]) for v in values)
        low, high = bootstrap(one - other)[1:]
        lines.append(
            f"{key}: {one.mean():.4f} - {other.mean():.4f} = {(one - other).mean():+.4f} ± "
            f"{standard_error_of_mean(one - other):.4f} [{low:+.4f}, {high:+.4f}] over "
            f"{len(documents)} documents, {int((one != other).sum())} of them unlike"
        )
    return "\n".join(lines)


def _values(path: str | os.PathLike) -> dict[str, dict[int, float]]:
    """Metrics that are numbers by document; of perplexities the nats per unit of size.

    Others, as F1 or BLEU, are of all documents together, and left out.
    """
    found: dict[str, dict[int, float]] = {}
    for line in pathlib.Path(path).with_suffix(".jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        for metric, value in record["metrics"].items():
            if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
                metric, value = f"{metric} (nats per unit)", -value[0] / value[1]
            if not isinstance(value, int | float):
                continue
            key = f"{record['task']} {metric},{record['filter']}"
            found.setdefault(key, {})[record["document"]] = float(value)
    return found
