"""Likelihood bounds by process, each by a fixed estimator with error bars.

A row's estimate is a mean over F views whose noise a design chooses (``subsets.py``), whatever the
training chain. Views are negatively correlated, so the standard error comes from R repetitions of
the design. References: Ou et al. 2024 (RADD), Nie et al. 2025 (LLaDA) for the fixed-count form.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import schedules
from mdm_jax.corruption.process import sum_levels
from mdm_jax.draws import GRID_BITS, Draw, from_grid, open_uniform
from mdm_jax.likelihood.estimators import (
    Estimator,
    Likelihood,
    ScoredRows,
    logsnr_of_count,
    make_evaluate,
    replicate_keys,
)
from mdm_jax.likelihood.subsets import (
    LEVELS,
    MAX_ELIGIBLE,
    SubsetDesign,
    check_design,
    counts,
    every_subset,
    quantile,
)
from mdm_jax.models.cross_entropy import Readout, exclude_token, position_losses, token_nats
from mdm_jax.models.masks import check_blocks
from mdm_jax.objectives.losses import uniform_nelbo
from mdm_jax.rng import stream
from mdm_jax.schedules import masked
from mdm_jax.types import Array


def make_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the masked bound; the forward pass is compiled once.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]``, or a
            readout of them (``models.readout_apply``), so that a pass holds the logits of a chunk.
            The level for k of n masked tokens is that of the rate (k - 1/2) / n.
        mask_id: the mask token; it is excluded from the softmax.
        passes: F >= 1, forward passes per row and replicate. May exceed n.
        replicates: R >= 1, repetitions of the design; 8 or more for a usable standard error.
        level_bins: bins of the loss curve over the masking rate.

    Returns ``evaluate(params, key, batches, progress=None) -> Likelihood``. A row's random numbers
    depend on the key and its number in the stream, not on the batch size: models evaluated with one
    key get the same masks. ``progress(rows)`` is called after each batch (``tqdm.update``).
    ValueError for numbers below 1, batches of different shapes (fill the last with rows that have
    no eligible token), or no eligible token in all the data.
    """
    return make_subset_likelihood(
        apply_fn, mask_id, counts(passes), replicates=replicates, level_bins=level_bins
    )


def make_subset_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    design: SubsetDesign,
    *,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the any-order bound by a subset design; all else as :func:`make_likelihood`.

    A batch takes the passes of its costliest row, and ``passes`` of the result is that of the
    costliest batch. A batch all of whose rows are fixed by the design is computed once; its
    replicates are equal. ValueError also for a row that the design refuses.
    """
    return make_evaluate(masked_estimator(apply_fn, mask_id, design), replicates, level_bins)


def masked_estimator(
    apply_fn: Callable[..., Array],
    mask_id: int,
    design: SubsetDesign,
    block_size: int | None = None,
    *,
    excludes_mask: bool = True,
) -> Estimator:
    """Estimator of the masked bound, or of the block bound with the design in every block.

    ``apply_fn`` as of :func:`make_likelihood`, of blocks as of :func:`make_block_likelihood`.
    Without ``excludes_mask`` the mask token is in the softmax, as LLaDA's own evaluation has it.
    """
    excluded = mask_id if excludes_mask else None

    def segments(eligible: Array) -> Array:
        if block_size:
            check_blocks(eligible.shape[-1], block_size)
        return eligible.reshape(-1, block_size or eligible.shape[-1])

    def draw(key: Array, eligible: Array, view: Array) -> tuple[Array, Array]:
        mask, weight = design.draw(key[None], eligible[None], view)
        return mask[0], weight[0]

    @jax.jit
    def score(params, keys, batch, replicate, view):
        tokens, by_segment = jnp.asarray(batch.tokens), segments(jnp.asarray(batch.eligible))
        num_rows, length = tokens.shape
        num = length // (block_size or length)
        keys = replicate_keys(keys, replicate)
        view = jnp.broadcast_to(view, (num_rows,))
        if block_size:
            keys = jax.vmap(lambda key: jax.random.split(key, num))(keys).reshape(-1)
            view = jnp.repeat(view, num)
        mask, weight = jax.vmap(draw)(keys, by_segment, view)
        count = jnp.sum(mask, axis=-1)
        logsnr = logsnr_of_count(jnp.maximum(count, 1), jnp.sum(by_segment, axis=-1))
        count, logsnr = (each.reshape(num_rows, num) for each in (count, logsnr))
        mask, weight = (each.reshape(tokens.shape) for each in (mask, weight))
        inputs = jnp.where(mask, mask_id, tokens)
        if block_size:
            inputs = jnp.concatenate([inputs, tokens], axis=-1)
        nats = token_nats(apply_fn(params, inputs, logsnr, batch.documents), tokens, mask, excluded)
        return jnp.sum(weight * nats, axis=-1), sum_levels(nats, num), count

    def of_sizes(function: Callable[[int], int], eligible: np.ndarray) -> np.ndarray:
        sizes = segments(eligible).sum(-1).reshape(len(eligible), -1)
        known = {int(n): function(int(n)) for n in np.unique(sizes)}
        return np.vectorize(known.__getitem__, otypes=[np.int64])(sizes)

    def levels(arrays: list[np.ndarray], rows: ScoredRows, bins: int):
        loss, count = arrays[0].astype(np.float64), arrays[1].astype(np.int64)
        size = segments(rows.eligible).sum(-1).reshape(count.shape[-2:])
        # Bin b holds b/bins < k/n <= (b+1)/bins, decided in integers; an empty mask adds nothing.
        level = np.maximum(-(-count * bins // np.maximum(size, 1)) - 1, 0).ravel()
        nats = np.bincount(level, loss.ravel(), minlength=bins)
        targets = np.bincount(level, count.ravel(), minlength=bins)
        return nats, targets, targets

    def views(eligible: np.ndarray) -> np.ndarray:
        return of_sizes(lambda n: design.passes(n) if n else 0, eligible).max(-1)

    def fixed(eligible: np.ndarray) -> np.ndarray:
        return of_sizes(lambda n: n == 0 or design.fixed(n), eligible).all(-1)

    where = f", in blocks of {block_size}" if block_size else ""
    words = f"{design.name}{where}; masking rates k / n, k = 1..n; {design.bias}"
    return Estimator(score, views, fixed, levels, words)


def make_block_likelihood(
    apply_fn: Callable[..., Array],
    mask_id: int,
    block_size: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the block bound; all else as :func:`make_likelihood`.

    With blocks of one token the bound is the autoregressive log-likelihood: one pass is run, and
    its Monte Carlo error is zero. ``apply_fn(params, inputs [B, 2L], logsnr [B, S], documents [B,
    L]) -> logits [B, L, K]`` is ``models.block_apply(model, block_size)``; levels, and ``passes``,
    are per block. ValueError also if L' does not divide the length of the rows.
    """
    design = block_design(counts(passes), block_size, replicates)
    estimator = masked_estimator(apply_fn, mask_id, design, block_size)
    return make_evaluate(estimator, replicates, level_bins)


def block_design(design: SubsetDesign, block_size: int, replicates: int) -> SubsetDesign:
    """Every subset of a block where that takes no more passes than the design's replicates."""
    affordable = design.passes(block_size) * replicates
    short = block_size <= MAX_ELIGIBLE and 2**block_size - 1 <= affordable
    return every_subset(block_size) if short else design


def make_uniform_likelihood(
    apply_fn: Callable[..., Array],
    num_tokens: int,
    *,
    passes: int,
    replicates: int = 8,
    level_bins: int = 10,
) -> Callable[..., Likelihood]:
    """Evaluation of the uniform-token bound; all else as :func:`make_likelihood`.

    ``apply_fn(params, inputs, logsnr [B, 1], documents) -> logits [B, L, K]`` is as of
    ``objectives.losses.bound_rate`` (see ``corruption.leave_one_out``), ``num_tokens`` >= 2 the K
    of ``corruption.uniform_tokens``. In the level curve rates are replacement rates, tokens all
    eligible ones, and a bin's mean is that of the bound's integrand, nats per token.
    """
    return make_evaluate(uniform_estimator(apply_fn, num_tokens, passes), replicates, level_bins)


def uniform_estimator(
    apply_fn: Callable[..., Array],
    num_tokens: int,
    passes: int,
    levels: str = "stratified",
    masks: str = "independent",
) -> Estimator:
    """Estimator of the uniform-token bound, as :func:`make_uniform_likelihood`.

    ``levels`` and ``masks`` (the base noise of a row's views) as of ``subsets.counts``, without
    harmonic levels and complementary masks, which are of masked tokens (ValueError).
    """
    points, paired = check_design(passes, levels, masks)
    if levels == "harmonic" or masks == "complementary":
        raise ValueError(f"uniform tokens have no {levels} levels with {masks} masks")
    law = schedules.law_of(masked.power(3.0))
    objective = uniform_nelbo(num_tokens, law)

    @jax.jit
    def score(params, keys, batch, replicate, view):
        numbers = pass_numbers(levels, masks, passes, batch.tokens.shape[-1])
        keys = replicate_keys(keys, replicate)
        u, share, noise = jax.vmap(numbers)(keys, jnp.broadcast_to(view, keys.shape))
        u = u[None, :, None]
        draw = Draw(u, jnp.zeros_like(u), noise[None])
        stats = objective.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)
        rate, weight, raw = (
            a[0, :, 0] for a in (jax.nn.sigmoid(-law.icdf(u)), stats.weight, stats.raw)
        )
        return share * weight * raw / passes, rate, weight, raw

    def by_level(arrays: list[np.ndarray], rows: ScoredRows, bins: int):
        rate, weight, raw = (a.astype(np.float64) for a in arrays)
        # Bin b holds b/bins < m <= (b+1)/bins.
        level = np.clip(np.ceil(rate * bins).astype(int) - 1, 0, bins - 1)
        size = np.broadcast_to(rows.size, rate.shape)
        return tuple(
            np.bincount(level.ravel(), values.ravel(), minlength=bins)
            for values in (weight * raw, weight * size, size)
        )

    return Estimator(
        score,
        lambda eligible: np.full(len(eligible), passes),
        lambda eligible: ~eligible.any(-1),
        by_level,
        f"{levels} levels, {masks} noise; every replacement rate; {LEVELS[levels]}",
    )


def pass_numbers(
    levels: str, masks: str, passes: int, length: int
) -> Callable[[Array, Array], tuple[Array, Array, Array]]:
    """``numbers(key, view) -> (u [], share [], noise [length, 2])`` of a row's view.

    Quantile of the level and its share (``subsets.quantile``), and base noise. Coupled noise is
    1 - v of the other view of a pair, or frac(v + j / F) in view j.
    """
    points, paired = check_design(passes, levels, masks)

    def numbers(key: Array, view: Array) -> tuple[Array, Array, Array]:
        point = view // 2 if paired else view
        number = {"independent": view, "antithetic": point, "rotated": 0}[masks]
        own = stream(jax.random.fold_in(key, number), "noise")
        noise = open_uniform(own, (length, 2))
        if masks == "antithetic":
            noise = jnp.where(view % 2 == 1, 1 - noise, noise)
        elif masks == "rotated":
            index = jnp.floor(noise * 2**GRID_BITS).astype(jnp.int32)
            noise = from_grid((index + view * (2**GRID_BITS // passes)) % 2**GRID_BITS)
        return *quantile(levels, key, point, points), noise

    return numbers


def make_next_token_likelihood(
    apply_fn: Callable[..., Array], mask_id: int, *, replicates: int = 2
) -> Callable[..., Likelihood]:
    """Exact evaluation of ``-log p(eligible tokens | prompt)``, as :func:`make_likelihood`.

    ``apply_fn(params, tokens, None, documents) -> logits [B, L, K]`` is
    ``models.causal_apply(model, mask_id)`` or similar. The level curve has one bin (every token is
    predicted masked), the key may be None. ``replicates`` are copies: two or more give the true
    standard error, zero; a paired comparison with an estimate of R replicates needs R.
    """
    return make_evaluate(next_token_estimator(apply_fn, mask_id), replicates, level_bins=1)


def next_token_estimator(apply_fn: Callable[..., Array], mask_id: int | None) -> Estimator:
    """Estimator without noise, in one pass; arguments as :func:`make_next_token_likelihood`, with
    None for a softmax over all ids.

    The second further output of its score: how many tokens of a row are not the likeliest.
    """

    def signed(logits: Array, targets: Array) -> tuple[Array, Array]:
        """Nats, negative where the token is the likeliest; their gradient is not needed."""
        logits = exclude_token(logits, mask_id)
        own = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nats = jnp.maximum(jax.nn.logsumexp(logits, axis=-1) - own, 0)
        hit = own == jnp.max(logits, axis=-1)
        return jnp.where(hit, -nats, nats), jnp.zeros_like(logits)

    @jax.jit
    def score(params, keys, batch, replicate, view):
        del keys, replicate, view
        outputs = apply_fn(params, batch.tokens, None, batch.documents)
        if isinstance(outputs, Readout):
            each = position_losses(signed, outputs, batch.eligible, batch.tokens)
        else:
            each = jnp.where(batch.eligible, signed(outputs, batch.tokens)[0], 0.0)
        nats = jnp.sum(jnp.abs(each), axis=-1)
        return nats, nats, jnp.sum(each > 0, axis=-1)

    def levels(arrays: list[np.ndarray], rows: ScoredRows, bins: int):
        nats, targets = (np.zeros(bins) for _ in range(2))
        nats[-1], targets[-1] = arrays[0].sum(dtype=np.float64), rows.size.sum()
        return nats, targets, targets

    return Estimator(
        score,
        lambda eligible: eligible.any(-1).astype(int),
        lambda eligible: np.ones(len(eligible), bool),
        levels,
        "next-token; exact",
    )
