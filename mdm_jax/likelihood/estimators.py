"""Which tokens the likelihood estimator masks: an even spread of counts along one permutation.

Of a row with n eligible tokens, view j of F masks

    k_j = 1 + (k_0 - 1 + floor(j n / F)) mod n

with k_0 uniform on {1..n}. In integer arithmetic every k_j is exactly uniform (a lattice formed in
floating point and rounded half to even is not), and the F counts lie evenly over the noise levels.
The masked tokens are those whose rank in a random permutation, rotated by floor(j n / F), is below
k_j: a uniform subset of that size.

The loop over a data set that every likelihood runs, and how its numbers are pooled.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import noise_ranks
from mdm_jax.distributed import spread_rows, to_host
from mdm_jax.draws import open_uniform
from mdm_jax.likelihood.result import LevelCurve, Likelihood
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, PyTree


def row_keys(key: Array, first_row: Array | int, num_rows: int, replicate: Array | int) -> Array:
    """[B] typed keys: functions of the key, the row's number in the stream and the replicate."""
    rows = first_row + jnp.arange(num_rows)
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), replicate))(rows)


def pass_masks(keys: Array, eligible: Array, view: Array | int, passes: int) -> tuple[Array, Array]:
    """What view j of one replicate masks: (mask [B, L] bool, count k_j [B] int32).

    Args:
        keys: [B] typed keys, the same for every view of a replicate.
        eligible: [B, L] bool; a row without eligible elements masks nothing.
        view: j in {0..passes-1}, may be traced.
        passes: F.
    """
    lap = view_lap(jnp.sum(eligible, axis=-1), view, passes)
    first_count, ranks = draw_design(keys, eligible, lap)
    return view_mask(first_count, ranks, eligible, view, passes)


def draw_design(keys: Array, eligible: Array, lap: Array) -> tuple[Array, Array]:
    """Randomness of one replicate: ``k_0`` [B] uniform on {1..n} and ranks [B, L] of a permutation.

    Args:
        keys: [B] typed keys, the same for every view of a replicate.
        eligible: [B, L] bool.
        lap: [B] number of the permutation; see :func:`view_lap`.
    """
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)

    def draw(key: Array, n: Array, which: Array) -> tuple[Array, Array]:
        order = jax.random.fold_in(stream(key, "order"), which)
        count = jax.random.randint(stream(key, "count"), (), 1, n + 1)
        return count, open_uniform(order, eligible.shape[-1:])

    first_count, noise = jax.vmap(draw)(keys, num_eligible, lap)
    return first_count, noise_ranks(noise, eligible)


def view_mask(
    first_count: Array, ranks: Array, eligible: Array, view: Array | int, passes: int
) -> tuple[Array, Array]:
    """What view j masks: (mask [B, L] bool, count k_j [B] int32).

    Args:
        first_count: [B] k_0 in {1..n}.
        ranks: [B, L] rank of each eligible element in the row's permutation.
        eligible: [B, L] bool; a row without eligible elements masks nothing.
        view: j in {0..passes-1}, may be traced.
        passes: F.
    """
    num_eligible = jnp.maximum(jnp.sum(eligible, axis=-1), 1)
    offset = view * num_eligible // passes
    count = 1 + (first_count - 1 + offset) % num_eligible
    rank = (ranks - offset[:, None]) % num_eligible[:, None]
    return eligible & (rank < count[:, None]), count


def view_lap(num_eligible: Array, view: Array | int, passes: int) -> Array:
    """[B] number of earlier views with the same count as view j; zero wherever F <= n.

    With more passes than tokens several views share a count. Each takes a permutation of its own:
    with the same one they would be the same forward pass.
    """
    num_eligible = jnp.maximum(num_eligible, 1)
    offset = view * num_eligible // passes
    first_view = (offset * passes + num_eligible - 1) // num_eligible
    return view - first_view


def logsnr_of_count(count: Array, num_eligible: Array) -> Array:
    """logSNR of the masking rate (k - 1/2) / n, float32.

    Training with fixed counts masks k tokens at the rates from (k - 1) / n to k / n; this is the
    level in their middle, finite at both ends.
    """
    kept = jnp.maximum(num_eligible, 1) - count
    return (jnp.log(kept + 0.5) - jnp.log(count - 0.5)).astype(jnp.float32)


Found = TypeVar("Found")


class ScoredRows(NamedTuple):
    """The rows of one batch that have something to score, N of its B.

    Attributes:
        place: [N] place of each in the batch.
        index: [N] number of each in the stream.
        eligible: [N, L] bool.
        size: [N] int64, eligible elements of each.
        units: [N] int64, units of measurement of each.
    """

    place: np.ndarray
    index: np.ndarray
    eligible: np.ndarray
    size: np.ndarray
    units: np.ndarray


class RowScores(NamedTuple):
    """What the passes over one batch found.

    Attributes:
        row_nats: [R, N] float64, each replicate's estimate of each scored row.
        rows: which rows these are.
        level_nats: [bins] loss by level.
        level_mass: [bins] what the loss of a bin is divided by.
        level_targets: [bins] tokens behind a bin.
        passes: forward passes that were run.
    """

    row_nats: np.ndarray
    rows: ScoredRows
    level_nats: np.ndarray
    level_mass: np.ndarray
    level_targets: np.ndarray
    passes: int


def score_batches(
    params: PyTree,
    batches: Iterable[Batch],
    score: Callable[[Batch, int, ScoredRows], PyTree],
    collect: Callable[[PyTree, ScoredRows], Found],
    progress: Callable[[int], None] | None,
    element: str = "token",
) -> tuple[list[Found], int]:
    """Scores every batch that has an eligible element.

    Args:
        params: of the network; a batch is spread over the devices that hold them.
        batches: all of one shape.
        score: ``score(batch, first_row, rows) -> arrays`` on the devices.
        collect: ``collect(arrays, rows)``, what is kept of these arrays, on the host.
        progress: called with the number of rows after each batch.
        element: what an element is called in messages.

    Returns:
        What was collected of each batch that was scored, and the number of rows in all.

    Raises:
        ValueError: for batches of different shapes, or no eligible element in all the data.
    """
    shape, seen, parts = None, 0, []
    for batch in batches:
        shape = check_batch_shape(batch, shape, element)
        rows = _scored_rows(batch, seen)
        if rows.place.size:
            found = to_host(score(spread_rows(batch, params), seen, rows))
            parts.append(collect(found, rows))
        seen += shape[0]
        if progress is not None:
            progress(shape[0])
    if not parts:
        raise ValueError(f"nothing to score: none of {seen} rows has an eligible {element}")
    return parts, seen


def pool(parts: list[RowScores], rows_seen: int) -> Likelihood:
    """The likelihood of a data set from the scores of its batches."""
    nats, mass, targets = (
        sum(getattr(part, name) for part in parts)
        for name in ("level_nats", "level_mass", "level_targets")
    )
    bins = len(nats)
    mean = np.divide(nats, mass, out=np.full(bins, np.nan), where=mass > 0)
    return Likelihood(
        replicate_row_nats=np.concatenate([part.row_nats for part in parts], axis=1),
        row_tokens=np.concatenate([part.rows.size for part in parts]),
        row_units=np.concatenate([part.rows.units for part in parts]),
        row_index=np.concatenate([part.rows.index for part in parts]),
        rows_seen=rows_seen,
        passes=max(part.passes for part in parts),
        levels=LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64)),
    )


def count_scores(
    row_nats: np.ndarray, rows: ScoredRows, loss: np.ndarray, count: np.ndarray, bins: int
) -> RowScores:
    """Scores of masked passes, whose level is the share of tokens that they mask.

    Args:
        row_nats: [R, N].
        rows: the scored rows.
        loss: [R', F, N, S] summed cross-entropy of the masked tokens of each segment.
        count: [R', F, N, S] int64, how many they are.
        bins: of the level curve.
    """
    size = rows.eligible.reshape(*count.shape[-2:], -1).sum(-1)
    # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers; what masks nothing adds nothing.
    level = np.maximum(-(-count * bins // np.maximum(size, 1)) - 1, 0).ravel()
    nats = np.bincount(level, loss.ravel(), minlength=bins)
    targets = np.bincount(level, count.ravel(), minlength=bins)
    return RowScores(row_nats, rows, nats, targets, targets, count.shape[1])


def check_at_least_one(**settings: int) -> None:
    """Raises ValueError unless every setting is at least 1."""
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def check_batch_shape(
    batch: Batch, shape: tuple[int, ...] | None, element: str = "token"
) -> tuple[int, ...]:
    """The shape [B, L] of a batch.

    Args:
        batch: of any data set.
        shape: of the batches before it, None for the first.
        element: as for :func:`score_batches`.

    Raises:
        ValueError: unless tokens and eligible have one shape, that of the batches before.
    """
    found = tuple(batch.tokens.shape)
    if len(found) != 2 or tuple(batch.eligible.shape) != found:
        raise ValueError(
            "a batch needs tokens and eligible of one shape [B, L], got "
            f"{found} and {tuple(batch.eligible.shape)}"
        )
    if shape is not None and found != shape:
        raise ValueError(
            f"all batches must have the shape of the first, {shape}, got {found}; "
            f"fill the last batch with rows that have no eligible {element}"
        )
    return found


def _scored_rows(batch: Batch, first_row: int) -> ScoredRows:
    eligible = np.asarray(batch.eligible)
    place = np.flatnonzero(eligible.any(-1))
    return ScoredRows(
        place=place,
        index=first_row + place,
        eligible=eligible[place],
        size=eligible[place].sum(-1).astype(np.int64),
        units=np.asarray(batch.units, np.int64)[place],
    )
