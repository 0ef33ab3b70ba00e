"""The masked diffusion bound of held-out data, by a fixed estimator and with error bars.

The estimator is the count design of ``design.py`` and never depends on how the model was trained.
With S_j the summed cross-entropy of the k_j of n tokens that view j masks, every ``(n / k_j) S_j``
is an unbiased estimate of

    NELBO(x) = sum_{k=1}^{n} (1/k) E[S | k masked]   (nats)

and a row's estimate is the mean over its F views. The views are negatively correlated, so their
spread says nothing about the error of the mean: the whole design is repeated R times with fresh
randomness, and the spread of the R totals gives the standard error.

References: Ou et al. 2024 (RADD) and Nie et al. 2025 (LLaDA) for the fixed-count form of the bound.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.corruption import cross_entropy
from mdm_jax.evaluation.design import logsnr_of_count, pass_masks, row_keys
from mdm_jax.evaluation.standard_errors import (
    finite_or_none,
    standard_error_of_mean,
    standard_error_of_ratio,
)
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree

_LN2 = math.log(2.0)


class LevelCurve(NamedTuple):
    """Mean cross-entropy by masking rate.

    Attributes:
        edges: [bins + 1] masking rates; bin b holds the passes with edges[b] < k/n <= edges[b+1].
        nats: [bins] mean cross-entropy of a masked token, NaN where no pass fell into the bin.
        targets: [bins] number of masked tokens behind the mean.
    """

    edges: np.ndarray
    nats: np.ndarray
    targets: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Likelihood:
    """An upper bound on the negative log-likelihood of a data set, with its uncertainty.

    Totals are pooled over rows before any ratio is taken. ``standard_error_*`` is the Monte Carlo
    error of the estimate, from the spread over replicates of the whole design (NaN for one
    replicate). ``data_standard_error_*`` is the spread over rows, taken as independent: what
    another sample of as many rows might change (it contains the Monte Carlo noise of the rows).

    Attributes:
        replicate_row_nats: [R, N] float64, each replicate's estimate of each scored row, nats.
        row_tokens: [N] eligible tokens of each scored row.
        row_units: [N] units of measurement of each scored row.
        row_index: [N] number of each scored row in the data stream.
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
        """Number of scored rows; rows without eligible tokens are not scored."""
        return self.row_tokens.shape[0]

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.row_tokens.sum())

    @property
    def units(self) -> int:
        """Characters, or pixels times channels, that the scored tokens stand for."""
        return int(self.row_units.sum())

    @property
    def per_row_nats(self) -> np.ndarray:
        """[N] bound of each scored row, nats."""
        return self.replicate_row_nats.mean(0)

    @property
    def replicate_nats(self) -> np.ndarray:
        """[R] each replicate's total, nats."""
        return self.replicate_row_nats.sum(1)

    @property
    def nats(self) -> float:
        """Bound of the whole data set, nats."""
        return float(self.replicate_nats.mean())

    @property
    def nats_per_token(self) -> float:
        """Total nats over total tokens."""
        return _ratio(self.nats, self.tokens)

    @property
    def bits_per_token(self) -> float:
        """Total bits over total tokens."""
        return self.nats_per_token / _LN2

    @property
    def bits_per_unit(self) -> float:
        """Total bits over total units: bits per character, or per dimension."""
        return _ratio(self.nats, self.units) / _LN2

    @property
    def perplexity(self) -> float:
        """``exp`` of the pooled nats per token."""
        return float(np.exp(self.nats_per_token))

    @property
    def standard_error_nats(self) -> float:
        """Monte Carlo standard error of ``nats``."""
        return standard_error_of_mean(self.replicate_nats)

    @property
    def standard_error_nats_per_token(self) -> float:
        """Monte Carlo standard error of ``nats_per_token``."""
        return _ratio(self.standard_error_nats, self.tokens)

    @property
    def standard_error_bits_per_token(self) -> float:
        """Monte Carlo standard error of ``bits_per_token``."""
        return self.standard_error_nats_per_token / _LN2

    @property
    def standard_error_bits_per_unit(self) -> float:
        """Monte Carlo standard error of ``bits_per_unit``."""
        return _ratio(self.standard_error_nats, self.units) / _LN2

    @property
    def standard_error_perplexity(self) -> float:
        """Monte Carlo standard error of ``perplexity``, to first order."""
        return self.perplexity * self.standard_error_nats_per_token

    @property
    def data_standard_error_nats_per_token(self) -> float:
        """Standard error of ``nats_per_token`` from the spread over rows."""
        return standard_error_of_ratio(self.per_row_nats, self.row_tokens)

    @property
    def data_standard_error_bits_per_token(self) -> float:
        """Standard error of ``bits_per_token`` from the spread over rows."""
        return self.data_standard_error_nats_per_token / _LN2

    @property
    def data_standard_error_bits_per_unit(self) -> float:
        """Standard error of ``bits_per_unit`` from the spread over rows."""
        return standard_error_of_ratio(self.per_row_nats, self.row_units) / _LN2

    def to_dict(self) -> dict:
        """Everything but the per-row arrays as JSON values; undefined numbers become None."""
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


def make_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``. The
            level shown for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        passes: F >= 1, forward passes per row and replicate. May exceed n.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: bins of the loss curve over the masking rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``. All batches have one shape
        (fill the last with rows that have no eligible token). The randomness of a row depends on
        the key and its number in the stream, not on the batch size: two models evaluated with one
        key see the same masks. ``progress(rows)`` is called after each batch (``tqdm.update``). A
        forward pass holds the logits of one batch.

    Raises:
        ValueError: for passes, replicates or level_bins below 1, batches of different shapes, or no
            eligible token in all the data.
    """

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        tokens, eligible = jnp.asarray(batch.tokens), jnp.asarray(batch.eligible)
        keys = row_keys(key, first_row, tokens.shape[0], replicate)
        mask, count = pass_masks(keys, eligible, view, passes)
        logsnr = logsnr_of_count(count, jnp.sum(eligible, axis=-1))
        inputs = jnp.where(mask, mask_id, tokens)
        logits = apply_fn(params, inputs, logsnr[:, None], batch.documents)
        nats = cross_entropy(logits, tokens, mask_id)
        return count[:, None], jnp.sum(jnp.where(mask, nats, 0.0), axis=-1, keepdims=True)

    return make_evaluation(score, passes=passes, replicates=replicates, level_bins=level_bins)


def make_evaluation(
    score: Callable[..., tuple[Array, Array]],
    *,
    passes: int,
    replicates: int,
    level_bins: int,
    exact: bool = False,
) -> Callable[..., Likelihood]:
    """Runs a compiled pass over a data set and pools what it finds.

    Args:
        score: ``score(params, key, batch, first_row, replicate, view) -> (count [B, S], nats
            [B, S])`` for S contiguous segments of every row: how many of a segment's n eligible
            tokens are masked, and their summed cross-entropy, of which ``n / count`` times as much
            estimates the segment's bound.
        passes: F, as in :func:`make_likelihood`.
        replicates: R, likewise.
        level_bins: likewise.
        exact: the pass draws nothing: one stands for all passes and replicates, which are equal.

    Returns:
        ``evaluate``, as :func:`make_likelihood` describes it.

    Raises:
        ValueError: likewise.
    """
    for name, value in (("passes", passes), ("replicates", replicates), ("level_bins", level_bins)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    num_passes, num_runs = (1, 1) if exact else (passes, replicates)

    def evaluate(
        params: PyTree,
        key: Array | None,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = None if exact else stream(key, "likelihood")
        shape, seen, parts = None, 0, []
        for batch in batches:
            shape = _check_shape(batch, shape, num_passes)
            num_rows = shape[0]
            if np.any(batch.eligible):
                batch = jax.tree.map(jnp.asarray, batch)
                passed = [
                    [score(params, key, batch, seen, r, j) for j in range(num_passes)]
                    for r in range(num_runs)
                ]
                parts.append(_collect(passed, batch, seen, level_bins))
            seen += num_rows
            if progress is not None:
                progress(num_rows)
        if not parts:
            raise ValueError(f"nothing to score: none of {seen} rows has an eligible token")
        return _pool(parts, seen, num_passes, replicates // num_runs, level_bins)

    return evaluate


class _Part(NamedTuple):
    row_nats: np.ndarray
    tokens: np.ndarray
    units: np.ndarray
    index: np.ndarray
    level_nats: np.ndarray
    level_targets: np.ndarray


def _collect(passed, batch: Batch, first_row: int, bins: int) -> _Part:
    count = np.array([[np.asarray(c) for c, _ in row] for row in passed], np.int64)
    loss = np.array([[np.asarray(s) for _, s in row] for row in passed], np.float64)
    rows, segments = count.shape[-2:]
    n = np.asarray(batch.eligible).reshape(rows, segments, -1).sum(-1).astype(np.int64)
    scored = n.any(-1)
    n, count, loss = n[scored], count[..., scored, :], loss[..., scored, :]
    count = np.where(n > 0, count, 0)
    # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers.
    level = np.maximum(-(-count * bins // np.maximum(n, 1)) - 1, 0)
    return _Part(
        row_nats=(n / np.maximum(count, 1) * loss).sum(-1).mean(axis=1),
        tokens=n.sum(-1),
        units=np.asarray(batch.units, np.int64)[scored],
        index=first_row + np.flatnonzero(scored),
        level_nats=np.bincount(level.ravel(), loss.ravel(), minlength=bins),
        level_targets=np.bincount(level.ravel(), count.ravel(), minlength=bins),
    )


def _pool(parts: list[_Part], rows_seen: int, passes: int, repeats: int, bins: int) -> Likelihood:
    nats = sum(part.level_nats for part in parts)
    targets = sum(part.level_targets for part in parts)
    mean = np.divide(nats, targets, out=np.full(bins, np.nan), where=targets > 0)
    return Likelihood(
        replicate_row_nats=np.tile(np.concatenate([p.row_nats for p in parts], 1), (repeats, 1)),
        row_tokens=np.concatenate([part.tokens for part in parts]),
        row_units=np.concatenate([part.units for part in parts]),
        row_index=np.concatenate([part.index for part in parts]),
        rows_seen=rows_seen,
        passes=passes,
        levels=LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64)),
    )


def _check_shape(batch: Batch, shape: tuple | None, passes: int) -> tuple[int, int]:
    found = tuple(batch.tokens.shape)
    if len(found) != 2 or tuple(batch.eligible.shape) != found:
        raise ValueError(
            "a batch needs tokens and eligible of one shape [B, L], got "
            f"{found} and {tuple(batch.eligible.shape)}"
        )
    if shape is not None and found != shape:
        raise ValueError(
            f"all batches must have the shape of the first, {shape}, got {found}; "
            "fill the last batch with rows that have no eligible token"
        )
    if passes * found[1] >= 2**31:
        raise ValueError(f"passes * length must stay below 2**31, got {passes} * {found[1]}")
    return found


def _ratio(total: float, count: int) -> float:
    return total / count if count > 0 else math.nan


def _line(label: str, result: Likelihood, name: str) -> str:
    value = getattr(result, name)
    error = getattr(result, f"standard_error_{name}")
    data = getattr(result, f"data_standard_error_{name}")
    return f"  {label:<15} {value:.4f} ± {error:.4f} (data ± {data:.4f})"
