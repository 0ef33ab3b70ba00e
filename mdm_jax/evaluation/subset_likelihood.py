"""Log-likelihoods by denoising cross-entropy: what is exact, and what is a bound.

Let I be the visible part of n eligible tokens (the prompt is always visible). The time-free
identity of masked diffusion is

    -log p(x | prompt) = H_n E_I [ sum_{i not in I} -log p(x_i | x_I, prompt) ] ,

the size n - |I| = k having the probability 1 / (k H_n), I uniform given its size. Equivalently it
is the mean over all orders of revealing of the sum of ``-log p(next token | those before it)``.

* The identity is exact where all conditionals that occur are those of *one* joint law (an
  order-consistent model, such as the true data law): then every order has the same sum, by the
  chain rule, and p is that law.
* Any other network has no single p. The right-hand side is then the any-order bound (the NELBO of
  the network), and with P the law of exact one-by-one sampling in random order

      right-hand side >= -log P(x | prompt) ,

  with equality for a row if and only if all orders give it the same probability. The gap is that
  of ``exact_nelbo`` to ``any_order_log_likelihood``.

Either way the estimates here have the right-hand side as their expectation, by any design of
``subset_designs``; their Monte Carlo error is stated, and is zero for ``every_subset``. A
difference of two rows on common subsets (``paired_difference``) estimates a log-likelihood ratio.

Reference: Jeon et al. 2025, Information-Theoretic Discrete Diffusion (arXiv 2510.24088).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.batches import Batch
from mdm_jax.corruption import cross_entropy
from mdm_jax.evaluation.design import logsnr_of_count, row_keys
from mdm_jax.evaluation.likelihood import LevelCurve, Likelihood
from mdm_jax.evaluation.subset_designs import SubsetDesign
from mdm_jax.streams import stream
from mdm_jax.typing import Array, PyTree


def make_subset_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    design: SubsetDesign,
    *,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the any-order bound by a subset design; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``. The
            level shown for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        design: which subsets are masked. A batch takes the passes of its costliest row.
        replicates: R >= 1, independent repetitions of the design. A batch all of whose rows are
            fixed by the design is computed once, its replicates are equal.
        level_bins: bins of the loss curve over the masking rate.

    Returns:
        ``evaluate(params, key, batches, progress=None) -> Likelihood``, as ``make_likelihood``:
        all batches have one shape, and a row's subsets depend on the key and its number in the
        stream alone. ``passes`` of the result is that of the costliest batch.

    Raises:
        ValueError: for replicates or level_bins below 1, a row that the design refuses, batches of
            different shapes, or no eligible token in all the data.
    """
    for name, value in (("replicates", replicates), ("level_bins", level_bins)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")

    @jax.jit
    def score(params, key, batch, first_row, replicate, view):
        keys = row_keys(key, first_row, batch.tokens.shape[0], replicate)
        mask, weight = design.draw(keys, batch.eligible, view)
        count = jnp.sum(mask, axis=-1)
        logsnr = logsnr_of_count(jnp.maximum(count, 1), jnp.sum(batch.eligible, axis=-1))
        inputs = jnp.where(mask, mask_id, batch.tokens)
        logits = apply_fn(params, inputs, logsnr[:, None], batch.documents)
        nats = jnp.where(mask, cross_entropy(logits, batch.tokens, mask_id), 0.0)
        estimate = jnp.sum(weight * nats, axis=-1)
        return _Pass(estimate, jnp.sum(nats, axis=-1), count)

    def evaluate(
        params: PyTree,
        key: Array,
        batches: Iterable[Batch],
        progress: Callable[[int], None] | None = None,
    ) -> Likelihood:
        key = stream(key, "likelihood")
        shape, seen, passes, parts = None, 0, 0, []
        for batch in batches:
            shape = _check_shape(batch, shape)
            size = np.asarray(batch.eligible).sum(-1)
            sizes = {int(n) for n in size if n}
            if sizes:
                views = max(design.passes(n) for n in sizes)
                repeats = 1 if all(design.fixed(n) for n in sizes) else replicates
                batch = jax.tree.map(jnp.asarray, batch)
                found = [
                    [score(params, key, batch, seen, r, j) for j in range(views)]
                    for r in range(repeats)
                ]
                parts.append(_collect(found, batch, size, seen, replicates, level_bins))
                passes = max(passes, views)
            seen += shape[0]
            if progress is not None:
                progress(shape[0])
        if not parts:
            raise ValueError(f"nothing to score: none of {seen} rows has an eligible token")
        return _pool(parts, seen, passes, level_bins)

    return evaluate


class _Pass(NamedTuple):
    estimate: Array  # [B] the pass's part of the estimate
    loss: Array  # [B] summed cross-entropy of the masked tokens
    count: Array  # [B] masked tokens


class _Part(NamedTuple):
    row_nats: np.ndarray
    tokens: np.ndarray
    units: np.ndarray
    index: np.ndarray
    level_nats: np.ndarray
    level_targets: np.ndarray


def _collect(
    found: list[list[_Pass]],
    batch: Batch,
    size: np.ndarray,
    first_row: int,
    replicates: int,
    bins: int,
) -> _Part:
    scored = size > 0
    n = size[scored].astype(np.int64)

    def field(name: str, dtype: type) -> np.ndarray:
        values = [[np.asarray(getattr(p, name), dtype) for p in row] for row in found]
        return np.array(values)[..., scored]

    nats = field("estimate", np.float64).sum(axis=1)
    loss, count = field("loss", np.float64), field("count", np.int64)
    # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers; views without a mask add nothing.
    level = np.maximum(-(-count * bins // n) - 1, 0)
    return _Part(
        row_nats=np.broadcast_to(nats, (replicates, nats.shape[1])),
        tokens=n,
        units=np.asarray(batch.units, np.int64)[scored],
        index=first_row + np.flatnonzero(scored),
        level_nats=np.bincount(level.ravel(), loss.ravel(), minlength=bins),
        level_targets=np.bincount(level.ravel(), count.ravel(), minlength=bins),
    )


def _pool(parts: list[_Part], rows_seen: int, passes: int, bins: int) -> Likelihood:
    nats = sum(part.level_nats for part in parts)
    targets = sum(part.level_targets for part in parts)
    mean = np.divide(nats, targets, out=np.full(bins, np.nan), where=targets > 0)
    return Likelihood(
        replicate_row_nats=np.concatenate([part.row_nats for part in parts], axis=1),
        row_tokens=np.concatenate([part.tokens for part in parts]),
        row_units=np.concatenate([part.units for part in parts]),
        row_index=np.concatenate([part.index for part in parts]),
        rows_seen=rows_seen,
        passes=passes,
        levels=LevelCurve(np.arange(bins + 1) / bins, mean, targets.astype(np.int64)),
    )


def _check_shape(batch: Batch, shape: tuple | None) -> tuple[int, int]:
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
    return found
