"""Likelihood evaluation: the count design, the loop over a data set, and results with errors.

Of a row with n eligible tokens, view j of F masks

    k_j = 1 + (k_0 - 1 + floor(j n / F)) mod n

tokens, k_0 uniform on {1..n}: those whose rank in a random permutation, rotated by floor(j n / F),
is below k_j. In integers every k_j is exactly uniform (a float lattice rounded half to even is
not), the F counts lie evenly over the noise levels, and each view is a uniform subset.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import noise_ranks
from mdm_jax.distributed import spread_rows, to_host
from mdm_jax.draws import open_uniform
from mdm_jax.estimates import finite_or_none, standard_error_of_mean, standard_error_of_ratio
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
    error, from the spread over replicates of the design (NaN for one). ``data_standard_error_*`` is
    from the spread over rows, taken as independent, Monte Carlo noise included: what another sample
    of rows might change. A unit is a character, or a pixel and channel.

    Attributes:
        replicate_row_nats: [R, N] float64, each replicate's estimate of each scored row, nats.
        row_tokens, row_units, row_index: [N] eligible tokens, units of measurement and number in
            the data stream of each scored row.
        rows_seen: rows in the stream, those without eligible tokens included.
        passes: F, forward passes per row and replicate.
        levels: loss by masking rate.
    """

    replicate_row_nats: np.ndarray
    row_tokens: np.ndarray
    row_units: np.ndarray
    row_index: np.ndarray
    rows_seen: int
    passes: int
    levels: LevelCurve

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
        return standard_error_of_mean(self.replicate_nats)

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


def _ratio(total: float, count: int) -> float:
    return total / count if count > 0 else math.nan


def _line(label: str, result: Likelihood, name: str) -> str:
    value = getattr(result, name)
    error = getattr(result, f"standard_error_{name}")
    data = getattr(result, f"data_standard_error_{name}")
    return f"  {label:<15} {value:.4f} ± {error:.4f} (data ± {data:.4f})"


def row_keys(key: Array, first_row: Array | int, num_rows: int, replicate: Array | int) -> Array:
    """[B] typed keys: functions of the key, the row's number in the stream and the replicate."""
    rows = first_row + jnp.arange(num_rows)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), replicate))(rows)


def pass_masks(keys: Array, eligible: Array, view: Array | int, passes: int) -> tuple[Array, Array]:
    """Mask [B, L] bool and count k_j [B] int32 of view j < F (may be traced); one key per row."""
    lap = view_lap(jnp.sum(eligible, axis=-1), view, passes)
    first_count, ranks = draw_design(keys, eligible, lap)
    return view_mask(first_count, ranks, eligible, view, passes)


def draw_design(keys: Array, eligible: Array, lap: Array) -> tuple[Array, Array]:
    """k_0 [B] uniform on {1..n}, and ranks [B, L] of permutation number ``lap`` [B]."""
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)

    def draw(key: Array, n: Array, number: Array) -> tuple[Array, Array]:
        order = jax.random.fold_in(stream(key, "order"), number)
        count = jax.random.randint(stream(key, "count"), (), 1, n + 1)
        return count, open_uniform(order, eligible.shape[-1:])

    first_count, noise = jax.vmap(draw)(keys, num_eligible, lap)
    return first_count, noise_ranks(noise, eligible)


def view_mask(
    first_count: Array, ranks: Array, eligible: Array, view: Array | int, passes: int
) -> tuple[Array, Array]:
    """:func:`pass_masks` for given k_0 [B] in {1..n} and ranks [B, L] of a permutation."""
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)
    offset = view * num_eligible // passes
    count = 1 + (first_count - 1 + offset) % num_eligible
    rank = (ranks - offset[:, None]) % num_eligible[:, None]
    return eligible & (rank < count[:, None]), count


def view_lap(num_eligible: Array, view: Array | int, passes: int) -> Array:
    """[B] number of earlier views with the count of view j, zero for F <= n."""
    num_eligible = jnp.maximum(num_eligible, 1)
    offset = view * num_eligible // passes
    first_view = (offset * passes + num_eligible - 1) // num_eligible
    return view - first_view


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
    level_nats: np.ndarray  # [bins] loss by level
    level_mass: np.ndarray  # [bins] divisor of the loss of a bin
    level_targets: np.ndarray  # [bins] tokens of a bin
    passes: int


Collected = TypeVar("Collected")


def make_evaluate(
    score: Callable[..., tuple[Array, ...]],
    collect: Callable[[tuple[np.ndarray, ...], ScoredRows], RowScores],
    design: Callable[[ScoredRows], tuple[int, int]],
    stream_name: str = "likelihood",
) -> Callable[..., Likelihood]:
    """The evaluation of a likelihood from one compiled pass over a batch, as ``make_likelihood``.

    Args:
        score: ``score(params, key, batch, first_row, replicate, view) -> arrays [B, ...]``.
        collect: ``collect(arrays [R', F, N, ...], rows)`` on the host, of the scored rows.
        design: ``design(rows) -> (R', F)``, replicates and views to run for a batch.
    """

    def evaluate(
        params: PyTree,
        key: Array | None,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = None if key is None else stream(key, stream_name)

        def score_all(batch: Batch, first_row: int, rows: ScoredRows) -> list:
            replicates, views = design(rows)
            return [
                [score(params, key, batch, first_row, r, j) for j in range(views)]
                for r in range(replicates)
            ]

        def collect_all(outputs: list, rows: ScoredRows) -> RowScores:
            arrays = zip(*(zip(*views) for views in outputs))  # output by output, [R', F, B, ...]
            return collect(tuple(np.array(each)[:, :, rows.batch_index] for each in arrays), rows)

        return pool(*score_batches(params, batches, score_all, collect_all, progress))

    return evaluate


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


def pool(scores: list[RowScores], rows_seen: int) -> Likelihood:
    """The likelihood of a data set from the scores of its batches."""
    nats, mass, targets = (
        sum(getattr(score, name) for score in scores)
        for name in ("level_nats", "level_mass", "level_targets")
    )
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
    )


def count_scores(
    row_nats: np.ndarray, rows: ScoredRows, loss: np.ndarray, count: np.ndarray, bins: int
) -> RowScores:
    """Scores of masked passes by share of masked tokens; count and loss are [R', F, N, S]."""
    size = rows.eligible.reshape(*count.shape[-2:], -1).sum(-1)
    # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers; an empty mask adds nothing.
    level = np.maximum(-(-count * bins // np.maximum(size, 1)) - 1, 0).ravel()
    nats = np.bincount(level, loss.ravel(), minlength=bins)
    targets = np.bincount(level, count.ravel(), minlength=bins)
    return RowScores(row_nats, rows, nats, targets, targets, count.shape[1])


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
