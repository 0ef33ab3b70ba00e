"""Likelihoods of rows of any length, each with noise of its own key, until a stop."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.distributed import spread_rows, to_host
from mdm_jax.likelihood.estimators import Estimator, check_at_least_one
from mdm_jax.likelihood.stopping import Stop, Stopped, Targets, each_row, replicate_until
from mdm_jax.types import Array, Batch, PyTree

Row = tuple[ArrayLike, ArrayLike]
"""Token ids [n] and eligible positions [n] bool: True where the token is scored, False on a prompt
and on special tokens that are given."""

DrawReplicates = Callable[[np.ndarray, int, int], np.ndarray]
"""``draw(rows [n], first, count) -> [count, n]`` replicates, nats; see ``replicate_until``."""


class RowDraws:
    """Replicates of the estimates of N rows, nats; called as :data:`DrawReplicates`.

    A pass runs ``batch_size`` rows, of any replicates and views, padded on the right to the
    smallest of ``lengths`` that fits, so that few programs are compiled; all passes of a call are
    dispatched before the host waits. A row's noise is a function of its key, the replicate and the
    number of a token among the row's eligible ones: not of the batch. Rows without Monte Carlo
    error are computed once, those without eligible tokens are 0.

    Args:
        keys: [N] typed keys. Rows with one key have common noise.
        lengths: ascending; default powers of two. Multiples of the block size, for blocks.
        keep: gets the numbers [n] of rows of a pass and each further output [n, ...] of the score.

    ``passes`` counts the forward passes of rows so far. ValueError for rows and keys that differ in
    number, tokens and eligible positions of different shapes, or a row longer than the last length.
    """

    def __init__(
        self,
        estimator: Estimator,
        params: PyTree,
        rows: Sequence[Row],
        keys: Array,
        *,
        batch_size: int,
        pad_id: int,
        lengths: Sequence[int] = tuple(2**i for i in range(5, 21)),
        progress: Callable[[int], None] | None = None,
        keep: Callable[..., None] | None = None,
    ) -> None:
        check_at_least_one(batch_size=batch_size)
        if len(keys) != len(rows):
            raise ValueError(f"{len(rows)} rows need as many keys, got {len(keys)}")
        self.estimator, self.params = estimator, params
        self._keys = np.asarray(jax.random.key_data(keys)), jax.random.key_impl(keys)
        self.batch_size, self.pad_id = batch_size, pad_id
        self.progress, self.keep = progress, keep
        self.rows = [(np.asarray(t, np.int32), np.asarray(e, bool)) for t, e in rows]
        self.length, self.passes, self._exact = [], 0, {}
        for number, (tokens, eligible) in enumerate(self.rows):
            if tokens.ndim != 1 or tokens.shape != eligible.shape:
                raise ValueError(
                    f"row {number} needs token ids [n] and as many eligible positions, got shapes "
                    f"{tokens.shape} and {eligible.shape}"
                )
            fitting = [length for length in lengths if length >= len(tokens)]
            if not fitting:
                raise ValueError(
                    f"row {number} has {len(tokens)} tokens, more than the longest length "
                    f"{max(lengths)}; cut it, or score it in windows (evaluation.sliding_windows)"
                )
            self.length.append(fitting[0])

    def __call__(self, rows: np.ndarray, first: int, count: int) -> np.ndarray:
        values, pending, fresh = np.zeros((count, len(rows))), [], []
        for length in sorted({self.length[row] for row in rows}):
            place = [i for i, row in enumerate(rows) if self.length[row] == length]
            place = np.array([i for i in place if rows[i] not in self._exact], int)
            if not len(place):
                continue
            eligible = self._eligible(rows[place], length)
            views = np.where(eligible.any(-1), self.estimator.views(eligible), 0)
            fixed = self.estimator.fixed(eligible)
            fresh += place[fixed].tolist()
            runs = np.where(fixed, 1, count)
            index = np.repeat(np.arange(len(place)), runs * views)
            first_of_row = np.cumsum(runs * views) - runs * views
            run, view = np.divmod(np.arange(len(index)) - first_of_row[index], views[index])
            for at in range(0, len(index), self.batch_size):
                part = slice(at, at + self.batch_size)
                own = place[index[part]]
                outputs = self._score(rows[own], length, first + run[part], view[part])
                pending.append((own, run[part], outputs))
            self.passes += len(index)
        for place, run, outputs in pending:
            nats, *further = (np.asarray(each)[: len(place)] for each in to_host(outputs))
            np.add.at(values, (run, place), nats.astype(np.float64))  # views in their order
            if self.keep is not None:
                self.keep(rows[place], *further)
        if self.progress is not None:
            self.progress(sum(self.rows[row][1].any() for row in rows))
        self._exact |= {rows[i]: values[0, i] for i in fresh}
        for i, row in enumerate(rows):
            if row in self._exact:
                values[:, i] = self._exact[row]
        return values

    def _eligible(self, rows: np.ndarray, length: int) -> np.ndarray:
        return np.stack([np.pad(self.rows[r][1], (0, length - len(self.rows[r][1]))) for r in rows])

    def _score(
        self, rows: np.ndarray, length: int, replicate: np.ndarray, view: np.ndarray
    ) -> tuple[Array, ...]:
        """One pass; filled up with copies, which are not read."""
        rows, replicate, view = (np.resize(a, self.batch_size) for a in (rows, replicate, view))
        tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
        documents = np.zeros_like(tokens)
        for i, row in enumerate(rows):
            own = self.rows[row][0]
            tokens[i, : len(own)], documents[i, : len(own)] = own, 1
        eligible = self._eligible(rows, length)
        batch = Batch(tokens, eligible, documents, eligible.sum(-1).astype(np.int32))
        data, impl = self._keys
        inputs = (batch, data[rows], replicate.astype(np.int32), view.astype(np.int32))
        batch, data, replicate, view = spread_rows(inputs, self.params)
        keys = jax.random.wrap_key_data(data, impl=impl)
        outputs = self.estimator.score(self.params, keys, batch, replicate, view)
        return outputs if self.keep is not None else outputs[:1]


@dataclasses.dataclass(frozen=True, eq=False)
class RowLikelihoods:
    """Bounds on ``-log p(eligible tokens | the others)`` of N rows, nats.

    Attributes:
        stopped: values, intervals and replicates of the targets; by default the rows.
        nats: [N] of each row, from all its replicates; 0 without eligible tokens.
        standard_error: [N] Monte Carlo error; 0 where exact, NaN for one replicate.
        passes: forward passes of rows, all together.
        design: estimator and stop, in words.
    """

    stopped: Stopped
    nats: np.ndarray
    standard_error: np.ndarray
    passes: int
    design: str


def loglikelihoods(
    estimator: Estimator,
    params: PyTree,
    rows: Sequence[Row],
    keys: Array,
    *,
    stop: Stop,
    batch_size: int,
    pad_id: int,
    targets: Targets | None = None,
    **options,
) -> RowLikelihoods:
    """Likelihoods of N rows, drawn until all targets (default: each row) are settled.

    Arguments and errors as of :class:`RowDraws`, :class:`Stop` and ``replicate_until``. Where keys
    are functions of a row's content, so are the results, up to what a compiled program of another
    shape rounds otherwise. Rows that share a key, for common noise, are not independent: their
    total is ``stopping.total(N, groups=...)``.
    """
    draw = RowDraws(estimator, params, rows, keys, batch_size=batch_size, pad_id=pad_id, **options)
    number = len(rows)
    stopped = replicate_until(draw, number, targets or each_row(number), stop)
    error = np.nanstd(stopped.row_values, axis=0, ddof=1) / np.sqrt(stopped.row_replicates)
    words = f"{estimator.design}; {stop.describe()}"
    return RowLikelihoods(stopped, stopped.row_value, error, draw.passes, words)
