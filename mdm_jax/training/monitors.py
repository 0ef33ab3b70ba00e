"""Monitors: running estimates for training metrics, pure functions called after the backward pass.

A step with non-finite losses or gradients leaves a monitor's state as it was, and is counted.
"""

from collections.abc import Callable, Iterable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mdm_jax.checks import Bins, Decay, Real, checked
from mdm_jax.draws import Draw, LossStats
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
    """All readings of ``TrainState.monitors`` as device scalars, those per bin with its number."""
    readings = {}
    for monitor in monitors:
        for name, value in monitor.read(states[monitor.name]).items():
            readings |= _scalars(name, jnp.asarray(value))
    return readings


def read_level_profile(
    transform: VarianceTransform, state: PyTree, num_levels: int = 1, bins: int = 10
) -> dict[str, Array]:
    """The current warp of a chain (``state``: ``TrainState.variance``), as scalars on the device.

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
    return _scalars("level_density", density.mean(-1)) | _scalars(
        "effective_weight", effective.mean(-1)
    )


def _scalars(name: str, value: Array) -> dict[str, Array]:
    if value.ndim == 0:
        return {name: value}
    return {f"{name}_{number:02d}": one for number, one in enumerate(value)}


class LevelSums(NamedTuple):
    """Exponentially forgotten sums by bin of the masking rate, [bins].

    ``nats`` and ``targets`` are of masked tokens, ``loss`` per token (``raw * weight / scored``),
    ``square`` its square; ``rows`` counts (view, row, level)s, ``rejected`` [] non-finite steps.
    """

    nats: Array
    targets: Array
    loss: Array
    square: Array
    rows: Array
    rejected: Array


@checked
def level_monitor(objective: Objective, bins: Bins = 10, decay: Decay = 0.99) -> Monitor:
    """Loss by masking rate, and a training loss without the noise of the levels.

    In masking rate m the bound is flat, nats per token = int_0^1 (mean cross-entropy of a masked
    token at rate m) dm. So the mean over equal bins of each bin's running cross-entropy is the
    training loss without the level's noise, up to the square of a bin's width; it lags by about
    ``1 / (1 - decay)`` visits of a bin. ``read`` gives this ``normalised_loss`` (nats per token,
    visited bins), ``level_nats_per_token`` [bins], ``level_loss`` and ``level_loss_deviation``
    [bins], mean and standard deviation of the per-token loss, and ``level_rejected``. ValueError
    unless bins >= 1 and decay (per visit of a bin) is in [0, 1).
    """

    def init(_params: PyTree) -> LevelSums:
        zeros = [jnp.zeros((bins,), jnp.float32) for _ in range(5)]
        return LevelSums(*zeros, rejected=jnp.zeros((), jnp.int32))

    def update(state: LevelSums, draw: Draw, stats: LossStats, _gradients: PyTree) -> LevelSums:
        rate = jax.nn.sigmoid(-objective.law.icdf(draw.u))
        index = jnp.clip((rate * bins).astype(jnp.int32), 0, bins - 1)
        scored = stats.eligible > 0
        member = jax.nn.one_hot(index, bins, dtype=jnp.float32) * scored[..., None]
        loss = stats.raw * stats.weight / jnp.maximum(stats.eligible, 1)
        columns = (stats.raw, stats.targets, loss, loss**2, jnp.ones_like(loss))
        values = jnp.stack([column.astype(jnp.float32) for column in columns])
        finite = jnp.all(jnp.isfinite(jnp.where(scored, values, 0.0)))
        values = jnp.where(scored & finite, values, 0.0)
        sums = jnp.einsum("cvbs,vbsj->cj", values, member, precision=jax.lax.Precision.HIGHEST)
        # A bin decays only when visited, so rare ones keep their estimate.
        keep = jnp.where(sums[4] > 0, decay, 1.0)
        totals = [old * keep + new for old, new in zip(state[:5], sums)]
        return LevelSums(*totals, rejected=state.rejected + jnp.where(finite, 0, 1))

    def read(state: LevelSums) -> dict[str, Array]:
        visited, rows = state.targets > 0, jnp.maximum(state.rows, 1e-30)
        nats = state.nats / jnp.where(visited, state.targets, 1.0)
        mean = state.loss / rows
        spread = jnp.sqrt(jnp.maximum(state.square / rows - mean**2, 0.0))
        any_visited = jnp.sum(visited) > 0
        average = jnp.sum(jnp.where(visited, nats, 0.0)) / jnp.maximum(jnp.sum(visited), 1)
        return {
            "normalised_loss": jnp.where(any_visited, average, jnp.nan),
            "level_nats_per_token": jnp.where(visited, nats, jnp.nan),
            "level_loss": jnp.where(state.rows > 0, mean, jnp.nan),
            "level_loss_deviation": jnp.where(state.rows > 0, spread, jnp.nan),
            "level_rejected": state.rejected,
        }

    return Monitor("levels", init, update, read)


class GradientMoments(NamedTuple):
    """Exponentially forgotten moments of the batch gradient, float32."""

    mean: PyTree
    square: Array
    weight: Array
    weight_square: Array
    rejected: Array


@checked
def gradient_noise_monitor(
    decay: Annotated[float, Real("(0, 1)", "per step", "of running gradients")] = 0.95,
) -> Monitor:
    """Noise of the batch gradient, from its change between steps.

    With weights w_i over the past steps (summing to one), r = sum w_i^2 and a mean gradient that
    changes little over ``1 / (1 - decay)`` steps,

        tr Cov(G) ~ (mean |G|^2 - |mean G|^2) / (1 - r) ,

    data noise included, also for coupled rows. Drift of the parameters adds to it;
    ``meter.efficiency`` measures at fixed parameters. ``read`` gives ``gradient_noise`` (trace of
    the covariance), ``gradient_signal`` (squared norm of the mean gradient, unbiased, may be
    negative), ``gradient_noise_share`` (noise over mean squared norm) and ``gradient_rejected``.
    Noise equals signal at the batch size times noise over signal. ``decay`` is in (0, 1), else
    ValueError. Costs a buffer of the size of the parameters. Reference: McCandlish et al. 2018, the
    simple noise scale, there from two batch sizes.
    """

    def init(params: PyTree) -> GradientMoments:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params)
        scalars = [jnp.zeros(()) for _ in range(3)]  # three buffers, so that all can be donated
        return GradientMoments(zeros, *scalars, rejected=jnp.zeros((), jnp.int32))

    def update(
        state: GradientMoments, _draw: Draw, _stats: LossStats, gradients: PyTree
    ) -> GradientMoments:
        square = _square_norm(gradients)
        finite = jnp.isfinite(square)
        keep, new = jnp.where(finite, decay, 1.0), jnp.where(finite, 1 - decay, 0.0)

        def mix(old: Array, value: Array) -> Array:
            return old * keep + jnp.where(finite, value.astype(jnp.float32), 0.0) * new

        return GradientMoments(
            mean=jax.tree.map(mix, state.mean, gradients),
            square=mix(state.square, square),
            weight=mix(state.weight, jnp.ones(())),
            weight_square=state.weight_square * keep**2 + new**2,
            rejected=state.rejected + jnp.where(finite, 0, 1),
        )

    def read(state: GradientMoments) -> dict[str, Array]:
        weight = jnp.maximum(state.weight, 1e-30)
        square, mean_square = state.square / weight, _square_norm(state.mean) / weight**2
        rest = 1 - state.weight_square / weight**2
        known = (state.weight > 0) & (rest > 1e-6)  # at least two steps
        noise = (square - mean_square) / jnp.where(known, rest, 1.0)
        return {
            "gradient_noise": jnp.where(known, noise, jnp.nan),
            "gradient_signal": jnp.where(known, square - noise, jnp.nan),
            "gradient_noise_share": jnp.where(known, noise / jnp.maximum(square, 1e-30), jnp.nan),
            "gradient_rejected": state.rejected,
        }

    return Monitor("gradient_noise", init, update, read)


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


def _square_norm(tree: PyTree) -> Array:
    return optax.tree.norm(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree), squared=True)
