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

Draw = Callable[[np.ndarray, int, int], np.ndarray]
"""``draw(rows [n], first, count) -> [count, n]`` replicates, nats; see ``replicate_until``."""


class RowDraws:
    """Replicates of the estimates of N rows, nats; called as ``Draw``.

    Rows go in batches of one size, padded on the right to the smallest of ``lengths`` that fits, so
    that few programs are compiled; all passes of a call are dispatched before the host waits. A
    row's noise is a function of its key, the replicate and the number of a token among the row's
    eligible ones: not of the batch. Rows without Monte Carlo error are computed once, those without
    eligible tokens are 0.

    Args:
        keys: [N] typed keys. Rows with one key have common noise.
        lengths: ascending; default powers of two. Multiples of the block size, for blocks.

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
    ) -> None:
        check_at_least_one(batch_size=batch_size)
        if len(keys) != len(rows):
            raise ValueError(f"{len(rows)} rows need as many keys, got {len(keys)}")
        self.estimator, self.params = estimator, params
        self._keys = np.asarray(jax.random.key_data(keys)), jax.random.key_impl(keys)
        self.batch_size, self.pad_id, self.progress = batch_size, pad_id, progress
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
        values = np.zeros((count, len(rows)))
        pending = []
        for length in sorted({self.length[row] for row in rows}):
            place = np.array([i for i, row in enumerate(rows) if self.length[row] == length])
            eligible = self._eligible(rows[place], length)
            views = np.where(eligible.any(-1), self.estimator.views(eligible), 0)
            fixed = self.estimator.fixed(eligible)
            for is_fixed in (False, True):
                own = np.flatnonzero((fixed == is_fixed) & (views > 0))
                if is_fixed:
                    own = own[[rows[place[i]] not in self._exact for i in own]]
                own = own[np.argsort(views[own], kind="stable")]
                for at in range(0, len(own), self.batch_size):
                    part = own[at : at + self.batch_size]
                    runs = range(1) if is_fixed else range(first, first + count)
                    outputs = self._score(rows[place[part]], length, runs, views[part].max())
                    pending.append((place[part], is_fixed, outputs))
                    self.passes += len(part) * len(runs) * int(views[part].max())
        for place, is_fixed, outputs in pending:
            nats = np.array(to_host(outputs), np.float64).sum(axis=1)[:, : len(place)]
            if is_fixed:
                self._exact |= dict(zip(rows[place], nats[0]))
            else:
                values[:, place] = nats
            if self.progress is not None:
                self.progress(len(place))
        for i, row in enumerate(rows):
            if row in self._exact:
                values[:, i] = self._exact[row]
        return values

    def _eligible(self, rows: np.ndarray, length: int) -> np.ndarray:
        return np.stack([np.pad(self.rows[r][1], (0, length - len(self.rows[r][1]))) for r in rows])

    def _score(self, rows: np.ndarray, length: int, runs: range, views: int) -> list[list[Array]]:
        filled = np.resize(rows, self.batch_size)  # repeats rows; their copies are not read
        tokens = np.full((self.batch_size, length), self.pad_id, np.int32)
        documents = np.zeros_like(tokens)
        for i, row in enumerate(filled):
            own = self.rows[row][0]
            tokens[i, : len(own)], documents[i, : len(own)] = own, 1
        eligible = self._eligible(filled, length)
        batch = Batch(tokens, eligible, documents, eligible.sum(-1).astype(np.int32))
        data, impl = self._keys
        batch = spread_rows(batch, self.params)
        keys = jax.random.wrap_key_data(data[filled], impl=impl)
        score = self.estimator.score
        return [[score(self.params, keys, batch, r, j)[0] for j in range(views)] for r in runs]


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
