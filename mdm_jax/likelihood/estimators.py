"""Likelihood evaluation: the loop over a data set, and results with errors."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.distributed import spread_rows, to_host
from mdm_jax.estimates import Total, finite_or_none, standard_error_of_ratio, total_of
from mdm_jax.likelihood.stopping import Stop, replicate_until, total
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree

_LN2 = math.log(2.0)


class LevelCurve(NamedTuple):
    """Mean cross-entropy ``nats`` [bins] of a masked token (NaN: empty bin), of ``targets`` tokens.

    Bin b holds the passes with masking rate edges[b] < k/n <= edges[b+1].
    """

    edges: np.ndarray
    nats: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """An upper bound on the negative log-likelihood of a data set, with its uncertainty.

    Totals are pooled over rows before any ratio is taken. ``standard_error_*`` is the Monte Carlo
    error, from each row's spread over replicates of the design (NaN for one); rows have noise of
    their own, so their variances add up. ``data_standard_error_*`` is from the spread over rows,
    taken as independent, Monte Carlo noise included: what another sample of rows might change. A
    unit is a character, or a pixel and channel.

    Attributes:
        replicate_row_nats: [R, N] float64, each replicate's estimate of each scored row, nats.
        row_tokens, row_units, row_index: [N] eligible tokens, units of measurement and number in
            the data stream of each scored row.
        rows_seen: rows in the stream, those without eligible tokens included.
        passes: F, forward passes per row and replicate.
        levels: loss by masking rate.
        design: the estimator, in words; "" if unknown.
    """

    replicate_row_nats: np.ndarray
    row_tokens: np.ndarray
    row_units: np.ndarray
    row_index: np.ndarray
    rows_seen: int
    passes: int
    levels: LevelCurve
    design: str = ""

    @property
    def replicates(self) -> int:
        """R, independent repetitions of the design."""
        return self.replicate_row_nats.shape[0]

    @property
    def rows(self) -> int:
        """Number of scored rows: those with eligible tokens."""
        return self.row_tokens.shape[0]

    @property
    def tokens(self) -> int:
        """Number of eligible tokens."""
        return int(self.row_tokens.sum())

    @property
    def units(self) -> int:
        """Units of the eligible tokens."""
        return int(self.row_units.sum())

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] bound of each scored row."""
        return self.replicate_row_nats.mean(0)

    @property
    def replicate_nats(self) -> np.ndarray:
        """[R] total of each replicate."""
        return self.replicate_row_nats.sum(1)

    @property
    def nats(self) -> float:
        """Bound of the whole data set."""
        return float(self.replicate_nats.mean())

    @property
    def nats_per_token(self) -> float:
        return _ratio(self.nats, self.tokens)

    @property
    def bits_per_token(self) -> float:
        return self.nats_per_token / _LN2

    @property
    def bits_per_unit(self) -> float:
        """Total bits over total units: per character, or per dimension."""
        return _ratio(self.nats, self.units) / _LN2

    @property
    def perplexity(self) -> float:
        """``exp`` of the pooled nats per token; its standard error is to first order."""
        return float(np.exp(self.nats_per_token))

    @property
    def standard_error_nats(self) -> float:
        return float(total_of(self.replicate_row_nats).standard_error[0])

    def interval(self, coverage: float = 0.95, data: bool = False) -> tuple[float, float]:
        """Student's interval of ``nats_per_token``: Monte Carlo error, or with ``data`` that over
        rows, which includes it."""
        error = total_of(self.replicate_row_nats)
        if data:
            deviation = np.array([self.data_standard_error_nats_per_token * self.tokens])
            error = Total(error.value, deviation, np.array([self.rows - 1.0]))
        reach = _ratio(float(error.reach(coverage)[0]), self.tokens)
        return self.nats_per_token - reach, self.nats_per_token + reach

    @property
    def standard_error_nats_per_token(self) -> float:
        return _ratio(self.standard_error_nats, self.tokens)

    @property
    def standard_error_bits_per_token(self) -> float:
        return self.standard_error_nats_per_token / _LN2

    @property
    def standard_error_bits_per_unit(self) -> float:
        return _ratio(self.standard_error_nats, self.units) / _LN2

    @property
    def standard_error_perplexity(self) -> float:
        return self.perplexity * self.standard_error_nats_per_token

    @property
    def data_standard_error_nats_per_token(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.row_tokens)

    @property
    def data_standard_error_bits_per_token(self) -> float:
        return self.data_standard_error_nats_per_token / _LN2

    @property
    def data_standard_error_bits_per_unit(self) -> float:
        return standard_error_of_ratio(self.per_row_nats, self.row_units) / _LN2

    def to_dict(self) -> dict:
        """JSON values of everything but the per-row arrays; undefined numbers become None."""
        names = ("nats", "nats_per_token", "bits_per_token", "bits_per_unit", "perplexity")
        errors = tuple(f"standard_error_{name}" for name in names)
        data_errors = tuple(f"data_standard_error_{name}" for name in names[1:4])
        counts = ("rows", "rows_seen", "tokens", "units", "passes", "replicates")
        levels = {
            "masking_rate_edges": self.levels.edges.tolist(),
            "nats_per_masked_token": [finite_or_none(v) for v in self.levels.nats],
            "masked_tokens": [int(v) for v in self.levels.targets],
        }
        return (
            {name: getattr(self, name) for name in counts}
            | {name: finite_or_none(getattr(self, name)) for name in names + errors + data_errors}
            | {"levels": levels}
        )

    def summary(self) -> str:
        """A few lines for the terminal."""
        design = f"{self.replicates} replicates of {self.passes} passes per row"
        lines = [
            f"likelihood bound over {self.rows} rows, {self.tokens} tokens, {self.units} units"
            f" ({self.rows_seen - self.rows} rows without eligible tokens left out)",
            _line("bits per unit", self, "bits_per_unit"),
            _line("bits per token", self, "bits_per_token"),
            _line("nats per token", self, "nats_per_token"),
            f"  perplexity      {self.perplexity:.4f} ± {self.standard_error_perplexity:.4f}",
            f"  (± Monte Carlo standard error from {design}; data: from the spread over rows)",
        ]
        return "\n".join(lines)


Evaluate = Callable[..., Likelihood]
"""``evaluate(params, key, batches, progress=None) -> Likelihood``."""


def _ratio(total: float, count: int) -> float:
    return total / count if count > 0 else math.nan


def _line(label: str, result: Likelihood, name: str) -> str:
    value = getattr(result, name)
    error = getattr(result, f"standard_error_{name}")
    data = getattr(result, f"data_standard_error_{name}")
    return f"  {label:<15} {value:.4f} ± {error:.4f} (data ± {data:.4f})"


def row_keys(key: Array, first_row: Array | int, num_rows: int, replicate: Array | int) -> Array:
    """[B] typed keys: functions of the key, the row's number in the stream and the replicate."""
    return replicate_keys(keys_by_number(key, first_row, num_rows), replicate)


def keys_by_number(key: Array, first_row: Array | int, num_rows: int) -> Array:
    """[B] typed keys of rows, by their numbers in the stream."""
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(first_row + jnp.arange(num_rows))


def replicate_keys(keys: Array, replicate: Array | int) -> Array:
    """[B] typed keys of a replicate [] or [B], from those of the rows."""
    return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(replicate, keys.shape))


def logsnr_of_count(count: Array, num_eligible: Array) -> Array:
    """logSNR of the rate (k - 1/2) / n, finite: the middle of those that fixed counts use for k."""
    kept = jnp.maximum(num_eligible, 1) - count
    return (jnp.log(kept + 0.5) - jnp.log(count - 0.5)).astype(jnp.float32)


class ScoredRows(NamedTuple):
    """The N of B rows of a batch that have eligible elements."""

    batch_index: np.ndarray  # [N] index in the batch
    index: np.ndarray  # [N] number in the stream
    eligible: np.ndarray  # [N, L] bool
    size: np.ndarray  # [N] int64, eligible elements
    units: np.ndarray  # [N] int64, units of measurement


class RowScores(NamedTuple):
    """Results of the forward passes over one batch."""

    row_nats: np.ndarray  # [R, N] float64, each replicate's estimate of each row
    rows: ScoredRows
    levels: tuple[np.ndarray, np.ndarray, np.ndarray]  # [bins] loss, its divisor, tokens
    passes: int


Collected = TypeVar("Collected")


class Estimator(NamedTuple):
    """A likelihood estimate of rows, pass by pass.

    Attributes:
        score: ``score(params, keys [B], batch, replicate, view) -> (nats [B], ...)``, compiled; a
            replicate's estimate of a row is the sum over its views, which of further views adds 0.
            Replicate and view are [], or [B] of each row.
        views: ``views(eligible [N, L]) -> [N]``, forward passes of a row and replicate.
        fixed: ``fixed(eligible [N, L]) -> [N] bool``, rows without Monte Carlo error.
        levels: ``levels(arrays, rows, bins) -> (loss, divisor, tokens) [bins]`` by noise level, on
            the host, of the further outputs [R, F, N, ...] of ``score``.
        design: in words: levels, masks, passes, the rates covered, and whether exact.
    """

    score: Callable[..., tuple[Array, ...]]
    views: Callable[[np.ndarray], np.ndarray]
    fixed: Callable[[np.ndarray], np.ndarray]
    levels: Callable[..., tuple[np.ndarray, np.ndarray, np.ndarray]]
    design: str


def make_evaluate(
    estimator: Estimator, replicates: int, level_bins: int = 10
) -> Callable[..., Likelihood]:
    """The evaluation of a data set by ``replicates`` of an estimate; see ``make_likelihood``.

    A batch without Monte Carlo error is computed once; its replicates are equal.
    """
    check_at_least_one(replicates=replicates, level_bins=level_bins)

    def evaluate(
        params: PyTree,
        key: Array | None,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
        first_replicate: int = 0,
    ) -> Likelihood:
        key = stream(jax.random.key(0) if key is None else key, "likelihood")

        def score_all(batch: Batch, first_row: int, rows: ScoredRows) -> list:
            fixed, views = estimator.fixed(rows.eligible).all(), estimator.views(rows.eligible)
            keys = _keys_by_number(key, first_row, batch.tokens.shape[0])
            return [
                [
                    estimator.score(params, keys, batch, first_replicate + run, view)
                    for view in range(views.max())
                ]
                for run in range(1 if fixed else replicates)
            ]

        def collect(outputs: list, rows: ScoredRows) -> RowScores:
            arrays = zip(*(zip(*views) for views in outputs))  # output by output, [R', F, B, ...]
            nats, *rest = (np.array(each)[:, :, rows.batch_index] for each in arrays)
            nats = nats.astype(np.float64).sum(axis=1)
            nats = np.broadcast_to(nats, (replicates, nats.shape[1]))
            levels = estimator.levels(rest, rows, level_bins)
            return RowScores(nats, rows, levels, len(outputs[0]))

        return pool(*score_batches(params, batches, score_all, collect, progress), estimator.design)

    return evaluate


def evaluate_until(
    estimator: Estimator, stop: Stop, level_bins: int = 10
) -> Callable[..., Likelihood]:
    """The evaluation of a data set in rounds, until the interval of its bits per unit is narrow.

    As :func:`make_evaluate`, with all batches kept in memory; ``stop.width`` is in bits per unit.
    """
    rounds = {
        n: make_evaluate(estimator, n, level_bins) for n in np.diff((0, *stop.looks)).tolist()
    }

    def evaluate(
        params: PyTree,
        key: Array | None,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        batches, parts = list(batches), []

        def draw(_rows: np.ndarray, first: int, count: int) -> np.ndarray:
            parts.append(rounds[count](params, key, batches, progress, first_replicate=first))
            return parts[-1].replicate_row_nats

        eligible = np.concatenate([np.any(batch.eligible, axis=-1) for batch in batches])
        units = np.concatenate([np.asarray(batch.units) for batch in batches])[eligible].sum()
        targets = total(int(eligible.sum()), 1 / (_LN2 * max(units, 1)))
        replicate_until(draw, int(eligible.sum()), targets, stop)
        return _joined(parts, f"{estimator.design}; {stop.describe()}")

    return evaluate


def _joined(parts: list[Likelihood], design: str) -> Likelihood:
    """One likelihood of all replicates of the same rows."""
    targets = np.stack([part.levels.targets for part in parts])
    nats = np.stack([np.where(part.levels.targets, part.levels.nats, 0) for part in parts])
    mean = np.sum(targets * nats, axis=0) / np.where(targets.sum(0), targets.sum(0), np.nan)
    return dataclasses.replace(
        parts[0],
        replicate_row_nats=np.concatenate([part.replicate_row_nats for part in parts]),
        levels=LevelCurve(parts[0].levels.edges, mean, targets.sum(0)),
        design=design,
    )


_keys_by_number = jax.jit(keys_by_number, static_argnums=2)


def score_batches(
    params: PyTree,
    batches: Iterable[Batch],
    score: Callable[[Batch, int, ScoredRows], PyTree],
    collect: Callable[[PyTree, ScoredRows], Collected],
    progress: Callable[[int], None] | None,
    element: str = "token",
) -> tuple[list[Collected], int]:
    """Score every batch that has an eligible element: results of ``collect``, number of rows.

    ``score(batch, first_row, rows) -> arrays`` runs on the devices that hold ``params``,
    ``collect(arrays, rows)`` on the host; ``element`` is for messages. ValueError for batches of
    different shapes, or no eligible element in all the data.
    """
    shape, num_rows, collected = None, 0, []
    for batch in batches:
        shape = _check_batch_shape(batch, shape, element)
        rows = _scored_rows(batch, num_rows)
        if rows.batch_index.size:
            arrays = to_host(score(spread_rows(batch, params), num_rows, rows))
            collected.append(collect(arrays, rows))
        num_rows += shape[0]
        if progress is not None:
            progress(shape[0])
    if not collected:
        raise ValueError(f"nothing to score: none of {num_rows} rows has an eligible {element}")
    return collected, num_rows


def pool(scores: list[RowScores], rows_seen: int, design: str) -> Likelihood:
    """The likelihood of a data set from the scores of its batches."""
    nats, mass, targets = (sum(parts) for parts in zip(*(score.levels for score in scores)))
    bins = len(nats)
    mean = np.divide(nats, mass, out=np.full(bins, np.nan), where=mass > 0)
    return Likelihood(
        replicate_row_nats=np.concatenate([score.row_nats for score in scores], axis=1),
        row_tokens=np.concatenate([score.rows.size for score in scores]),
        row_units=np.concatenate([score.rows.units for score in scores]),
        row_index=np.concatenate([score.rows.index for score in scores]),
        rows_seen=rows_seen,
        passes=max(score.passes for score in scores),
        levels=LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64)),
        design=design,
    )


def check_at_least_one(**settings: int) -> None:
    """Raise ValueError unless every setting is at least 1."""
    for name, value in settings.items():
        if not (isinstance(value, int | np.integer) and value >= 1):
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_batch_shape(
    batch: Batch, shape: tuple[int, ...] | None, element: str
) -> tuple[int, ...]:
    """[B, L] of a batch, which must be that of the batches before it (None for the first)."""
    batch_shape = tuple(batch.tokens.shape)
    if len(batch_shape) != 2 or tuple(batch.eligible.shape) != batch_shape:
        raise ValueError(
            "a batch needs tokens and eligible of one shape [B, L], got "
            f"{batch_shape} and {tuple(batch.eligible.shape)}"
        )
    if shape is not None and batch_shape != shape:
        raise ValueError(
            f"all batches must have the shape of the first, {shape}, got {batch_shape}; "
            f"fill the last batch with rows that have no eligible {element}"
        )
    return batch_shape


def _scored_rows(batch: Batch, first_row: int) -> ScoredRows:
    eligible = np.asarray(batch.eligible)
    index = np.flatnonzero(eligible.any(-1))
    return ScoredRows(
        batch_index=index,
        index=first_row + index,
        eligible=eligible[index],
        size=eligible[index].sum(-1).astype(np.int64),
        units=np.asarray(batch.units, np.int64)[index],
    )
