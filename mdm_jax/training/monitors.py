"""Monitors: running estimates for training metrics, pure functions called after the backward pass.

A step with non-finite losses or gradients leaves a monitor's state as it was, and is counted.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.checks import Bins, Decay, Real, checked
from mdm_jax.draws import Draw, LossStats
from mdm_jax.estimates import BUCKETS, sketch, square_norm
from mdm_jax.objectives.objective import (
    Baseline,
    Objective,
    new_baseline,
    reported_loss,
    sum_losses,
    update_baseline,
)
from mdm_jax.types import Array, PyTree
from mdm_jax.variance.transform import Phase, VarianceTransform


class Monitor(NamedTuple):
    """Running statistics as pure functions; ``name`` is the key of the state.

    ``update(state, draw, stats, gradients) -> state`` gets the gradients of the whole batch before
    clipping; ``read(state) -> {name: scalar or [bins]}`` gives NaN without data.
    """

    name: str
    init: Callable[[PyTree], PyTree]
    update: Callable[[PyTree, Draw, LossStats, PyTree], PyTree]
    read: Callable[[PyTree], dict[str, Array]]


def read_monitors(monitors: Iterable[Monitor], states: dict[str, PyTree]) -> dict[str, Array]:
    """All readings of ``TrainState.monitors``: scalars or [bins] on the device."""
    return {
        name: jnp.asarray(value)
        for monitor in monitors
        for name, value in monitor.read(states[monitor.name]).items()
    }


def read_level_profile(
    transform: VarianceTransform, state: PyTree, num_levels: int = 1, bins: int = 10
) -> dict[str, Array]:
    """The current warp of a chain (``state``: ``TrainState.variance``), [bins] on the device.

    At the middle of ``bins`` equal bins of the quantile, noisy to clean, mean over levels:
    ``level_density``, relative to the objective's law, and ``effective_weight``, the factor on its
    weighting (p times w), 1 for exact transforms. Empty if nothing is warped.
    """
    members = transform.members or (transform,)
    if transform.profile is None or not any(t.phase == Phase.WARP for t in members):
        return {}
    middle = (jnp.arange(bins) + 0.5) / bins
    u = jnp.broadcast_to(middle[:, None], (bins, num_levels))
    profile = transform.profile(state, u)
    density = jnp.exp(profile.log_density)
    effective = jnp.exp(profile.log_density + profile.log_weight)
    return {"level_density": density.mean(-1), "effective_weight": effective.mean(-1)}


class LevelSums(NamedTuple):
    """Exponentially forgotten sums by bin of the masking rate, [bins].

    ``nats`` and ``targets`` are of masked tokens, ``loss`` per token (``raw * weight / scored``),
    ``square`` its square; ``rows`` counts (view, row, level)s. ``nats_square``, ``nats_targets``
    and ``targets_square`` are sums over these of products, under squared weights of forgetting, for
    the standard error of nats over targets. ``rejected`` [] counts non-finite steps.
    """

    nats: Array
    targets: Array
    loss: Array
    square: Array
    rows: Array
    nats_square: Array
    nats_targets: Array
    targets_square: Array
    rejected: Array


@checked
def level_monitor(objective: Objective, bins: Bins = 10, decay: Decay = 0.95) -> Monitor:
    """Loss by masking rate, and a training loss without the noise of the levels.

    In masking rate m the bound is flat, nats per token = int_0^1 (mean cross-entropy of a masked
    token at rate m) dm. So the mean over equal bins of each bin's running cross-entropy is the
    training loss without the level's noise, up to the square of a bin's width; it lags by about
    ``1 / (1 - decay)`` visits of a bin. ``read`` gives this ``normalised_loss`` (nats per token,
    visited bins) with its standard error (rows as independent, to first order; NaN until each bin
    has several), ``level_nats_per_token`` [bins], ``level_loss`` and ``level_loss_deviation``
    [bins], mean and standard deviation of the per-token loss, and ``level_rejected``. ValueError
    unless bins >= 1 and decay (per visit of a bin) is in [0, 1).
    """

    def init(_params: PyTree) -> LevelSums:
        zeros = [jnp.zeros((bins,), jnp.float32) for _ in range(8)]
        return LevelSums(*zeros, rejected=jnp.zeros((), jnp.int32))

    def update(state: LevelSums, draw: Draw, stats: LossStats, _gradients: PyTree) -> LevelSums:
        rate = jax.nn.sigmoid(-objective.law.icdf(draw.u))
        index = jnp.clip((rate * bins).astype(jnp.int32), 0, bins - 1)
        scored = stats.eligible > 0
        member = jax.nn.one_hot(index, bins, dtype=jnp.float32) * scored[..., None]
        loss = stats.raw * stats.weight / jnp.maximum(stats.eligible, 1)
        nats, targets = stats.raw, stats.targets.astype(jnp.float32)
        columns = (nats, targets, loss, loss**2, jnp.ones_like(loss))
        columns += (nats**2, nats * targets, targets**2)
        values = jnp.stack([column.astype(jnp.float32) for column in columns])
        finite = jnp.all(jnp.isfinite(jnp.where(scored, values, 0.0)))
        values = jnp.where(scored & finite, values, 0.0)
        sums = jnp.einsum("cvbs,vbsj->cj", values, member, precision=jax.lax.Precision.HIGHEST)
        # A bin decays only when visited, so rare ones keep their estimate.
        keep = jnp.where(sums[4] > 0, decay, 1.0)
        totals = [
            old * (keep if number < 5 else keep**2) + new
            for number, (old, new) in enumerate(zip(state[:8], sums))
        ]
        return LevelSums(*totals, rejected=state.rejected + jnp.where(finite, 0, 1))

    def read(state: LevelSums) -> dict[str, Array]:
        visited, rows = state.targets > 0, jnp.maximum(state.rows, 1e-30)
        nats = state.nats / jnp.where(visited, state.targets, 1.0)
        mean = state.loss / rows
        spread = jnp.sqrt(jnp.maximum(state.square / rows - mean**2, 0.0))
        any_visited = jnp.sum(visited) > 0
        count = jnp.maximum(jnp.sum(visited), 1)
        average = jnp.sum(jnp.where(visited, nats, 0.0)) / count
        residual = (
            state.nats_square - 2 * nats * state.nats_targets + nats**2 * state.targets_square
        )
        error = jnp.maximum(residual, 0.0) / jnp.maximum(state.targets, 1.0) ** 2
        known = jnp.all(jnp.where(visited, state.rows >= 4, True)) & any_visited
        error = jnp.sqrt(jnp.sum(jnp.where(visited, error, 0.0))) / count
        return {
            "normalised_loss": jnp.where(any_visited, average, jnp.nan),
            "normalised_loss_standard_error": jnp.where(known, error, jnp.nan),
            "level_nats_per_token": jnp.where(visited, nats, jnp.nan),
            "level_loss": jnp.where(state.rows > 0, mean, jnp.nan),
            "level_loss_deviation": jnp.where(state.rows > 0, spread, jnp.nan),
            "level_rejected": state.rejected,
        }

    return Monitor("levels", init, update, read)


class GradientMoments(NamedTuple):
    """Exponentially forgotten moments of the batch gradient, float32.

    ``mean`` [1024] and ``mean_weight`` are of sketches of past gradients. ``square`` is of squared
    norms, ``product`` and ``product_square`` of products with that mean, over ``steps`` of total
    ``weight`` and total squared ``weight_square``.
    """

    mean: Array
    mean_weight: Array
    steps: Array
    square: Array
    product: Array
    product_square: Array
    weight: Array
    weight_square: Array
    rejected: Array


@checked
def gradient_noise_monitor(
    decay: Annotated[float, Real("(0, 1)", "per step", "of the running figures")] = 0.95,
    past: Annotated[float, Real("[0, 1)", "per step", "of the mean of past gradients")] = 0.9,
) -> Monitor:
    """Signal and noise of the batch gradient G, from products of each with the mean M of past ones.

    Their noise is independent, so at parameters that change little over ``1 / (1 - past)`` steps

        |E G|^2 ~ mean of <G, M> ,     tr Cov(G) ~ mean of |G|^2 - <G, M> ,

    data noise included, also for coupled rows. The memory is a quarter of the steps so far, until
    ``decay`` is reached: large gradients of the first steps are soon forgotten. Drift of the
    parameters moves signal into noise where gradients turn, and noise into signal, even below zero,
    where they shrink; ``meter.efficiency`` measures at fixed parameters.

    ``read`` gives ``gradient_signal`` (may be negative) with its standard error over steps (up to a
    factor of two too small where the signal exceeds the noise, as errors of M repeat),
    ``gradient_noise`` (trace of the covariance), ``gradient_noise_share`` (noise over mean squared
    norm) and ``gradient_rejected``. The batch size times noise over signal is the simple noise
    scale of McCandlish et al. 2018, at which noise and signal are equal. Instead of a past gradient
    its sketch is kept
    (:func:`~mdm_jax.estimates.sketch`), 4 kB, so that the signal may be off by about 4%.
    """
    signs = jax.random.key(0)

    def init(_params: PyTree) -> GradientMoments:
        scalars = [jnp.zeros(()) for _ in range(7)]  # separate buffers, so that all can be donated
        return GradientMoments(jnp.zeros((BUCKETS,)), *scalars, rejected=jnp.zeros((), jnp.int32))

    def update(
        state: GradientMoments, _draw: Draw, _stats: LossStats, gradients: PyTree
    ) -> GradientMoments:
        square, own = square_norm(gradients), sketch(gradients, signs)
        finite = jnp.isfinite(square)
        product = jnp.dot(own, state.mean, precision=jax.lax.Precision.HIGHEST)
        product = product / jnp.maximum(state.mean_weight, 1e-30)
        new = jnp.where(finite & (state.mean_weight > 0), 1.0, 0.0)  # from the second step on
        keep = jnp.where(new > 0, jnp.minimum(decay, state.steps / (state.steps + 3)), 1.0)
        keep_mean = jnp.where(finite, past, 1.0)

        def mix(old: Array, value: Array) -> Array:
            return old * keep + jnp.where(new > 0, value, 0.0)

        return GradientMoments(
            mean=state.mean * keep_mean + jnp.where(finite, own, 0.0),
            mean_weight=state.mean_weight * keep_mean + jnp.where(finite, 1.0, 0.0),
            steps=state.steps + new,
            square=mix(state.square, square),
            product=mix(state.product, product),
            product_square=mix(state.product_square, product**2),
            weight=mix(state.weight, new),
            weight_square=state.weight_square * keep**2 + new,
            rejected=state.rejected + jnp.where(finite, 0, 1),
        )

    def read(state: GradientMoments) -> dict[str, Array]:
        weight = jnp.maximum(state.weight, 1e-30)
        square, signal = state.square / weight, state.product / weight
        share = state.weight_square / weight**2  # one over the number of steps that count
        spread = jnp.maximum(state.product_square / weight - signal**2, 0.0)
        error = jnp.sqrt(spread * share / jnp.maximum(1 - share, 1e-30))
        some, several = state.weight > 0, (state.weight > 0) & (share < 0.5)
        noise = square - signal
        return {
            "gradient_noise": jnp.where(some, noise, jnp.nan),
            "gradient_signal": jnp.where(some, signal, jnp.nan),
            "gradient_signal_standard_error": jnp.where(several, error, jnp.nan),
            "gradient_noise_share": jnp.where(some, noise / jnp.maximum(square, 1e-30), jnp.nan),
            "gradient_rejected": state.rejected,
        }

    return Monitor("gradient_noise", init, update, read)


class WeightSums(NamedTuple):
    """Exponentially forgotten sums over steps; ``largest`` is of the whole run.

    ``weight``, ``square`` and ``count`` are of importance weights; ``targets``, ``eligible`` and
    ``rows`` of elements and rows, a mean over views.
    """

    weight: Array
    square: Array
    count: Array
    largest: Array
    targets: Array
    eligible: Array
    rows: Array
    rejected: Array


@checked
def weight_monitor(decay: Decay = 0.99) -> Monitor:
    """Importance weights w of the levels, and the number of masked tokens.

    ``read`` gives ``effective_sample_size``, the share ``(sum w)^2 / (n sum w^2)`` of the n draws
    that equally weighted ones would need (Kish 1965; 1 where nothing is warped), over about
    ``1 / (1 - decay)`` steps, ``largest_weight`` of the run, ``masked_share`` of the eligible
    tokens, ``eligible_per_row`` and ``weights_rejected``. Rows without any are left out.
    """

    def init(_params: PyTree) -> WeightSums:
        zeros = [jnp.zeros(()) for _ in range(7)]
        return WeightSums(*zeros, rejected=jnp.zeros((), jnp.int32))

    def update(state: WeightSums, draw: Draw, stats: LossStats, _gradients: PyTree) -> WeightSums:
        scored = stats.eligible > 0
        weight = jnp.where(scored, jnp.exp(draw.log_weight), 0.0)
        finite = jnp.all(jnp.isfinite(jnp.where(scored, stats.raw, 0.0)))
        views = draw.u.shape[0]
        sums = (
            jnp.sum(weight),
            jnp.sum(weight**2),
            jnp.sum(scored),
            jnp.sum(stats.targets) / views,
            jnp.sum(stats.eligible) / views,
            jnp.sum(jnp.any(scored, axis=-1)) / views,
        )
        keep, new = jnp.where(finite, decay, 1.0), jnp.where(finite, 1.0, 0.0)
        old = (*state[:3], *state[4:7])
        totals = [o * keep + new * n.astype(jnp.float32) for o, n in zip(old, sums)]
        largest = jnp.maximum(state.largest, new * jnp.max(weight))
        return WeightSums(
            *totals[:3], largest, *totals[3:], rejected=state.rejected + jnp.where(finite, 0, 1)
        )

    def read(state: WeightSums) -> dict[str, Array]:
        def ratio(over: Array, under: Array) -> Array:
            return jnp.where(under > 0, over / jnp.maximum(under, 1e-30), jnp.nan)

        return {
            "effective_sample_size": ratio(state.weight**2, state.count * state.square),
            "largest_weight": jnp.where(state.count > 0, state.largest, jnp.nan),
            "masked_share": ratio(state.targets, state.eligible),
            "eligible_per_row": ratio(state.eligible, state.rows),
            "weights_rejected": state.rejected,
        }

    return Monitor("weights", init, update, read)


class ControlledLoss(NamedTuple):
    """A baseline, forgotten sums of controlled and plain losses (nats) and of eligible elements."""

    baseline: Baseline
    total: Array
    raw: Array
    scored: Array
    rejected: Array


@checked
def baseline_monitor(
    bins: Bins = 16,
    decay: Decay = 0.99,
    forget: Decay = 0.9,
    chain: VarianceTransform | None = None,
) -> Monitor:
    """The reported loss with an EMA baseline as control variate: same mean, less noise.

    Gradients do not change (:class:`~mdm_jax.objectives.objective.Baseline`). ``read`` gives
    ``controlled_loss`` and ``uncontrolled_loss``, nats per token, both averaged over about
    ``1 / (1 - forget)`` steps, and ``controlled_rejected``. ``decay`` is per visit of one of the
    quantile's ``bins``. ValueError unless the bias of the run's ``chain`` is "exact", since
    otherwise the mean is wrong.
    """
    if chain is not None and chain.bias != "exact":
        raise ValueError(
            f"baseline_monitor keeps the mean of the loss under exact chains, and {chain.name} is "
            f"{chain.bias}; leave the monitor 'baseline' out, or take a chain labelled exact"
        )

    def init(_params: PyTree) -> ControlledLoss:
        zeros = [jnp.zeros(()) for _ in range(3)]
        return ControlledLoss(new_baseline(bins), *zeros, rejected=jnp.zeros((), jnp.int32))

    def update(
        state: ControlledLoss, draw: Draw, stats: LossStats, _gradients: PyTree
    ) -> ControlledLoss:
        sums = sum_losses(draw, stats)
        # Before the baseline is updated with this batch, to keep the mean.
        new = (reported_loss(state.baseline, draw, stats), sums.loss, sums.eligible)
        finite = jnp.isfinite(new[0]) & jnp.isfinite(new[1])
        keep = jnp.where(finite, forget, 1.0)
        old = (state.total, state.raw, state.scored)
        mixed = [o * keep + jnp.where(finite, n, 0.0) for o, n in zip(old, new)]
        return ControlledLoss(
            update_baseline(state.baseline, draw, stats, decay),
            *mixed,
            rejected=state.rejected + jnp.where(finite, 0, 1),
        )

    def read(state: ControlledLoss) -> dict[str, Array]:
        def per_token(total: Array) -> Array:
            return jnp.where(state.scored > 0, total / jnp.maximum(state.scored, 1e-30), jnp.nan)

        return {
            "controlled_loss": per_token(state.total),
            "uncontrolled_loss": per_token(state.raw),
            "controlled_rejected": state.rejected,
        }

    return Monitor("baseline", init, update, read)
