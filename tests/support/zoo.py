"""Every variance transform in one list; a new one joins all property tests by one line here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import draws, variance
from mdm_jax.variance.densities import (
    level_variance,
    log_spaced_edges,
    moment_density,
    piecewise_density,
)
from mdm_jax.variance.learned.bins import LossHistory
from mdm_jax.variance.learned.curves import (
    LogisticShape,
    cdtd_warp_logistic,
    piecewise_linear_curve,
)
from mdm_jax.variance.ppots import PpotsState, epr_density, level_moments
from mdm_jax.variance.warps import ClippedDensity, LogUniformDensity, importance

EPR = (0.5, 2.0, 0.6, 1.5, 3.0, 1.2, 2.0)
GROWING = (0.5, 0.2, 0.6, 1.5, 3.0, 2.0, 2.0)
BINS = log_spaced_edges(6, 1e-2)
STEEP = (1.0, 2.0, 4.0, 9.0, 30.0, 200.0)
DENSITY = piecewise_density((0.0, 0.2, 0.7, 0.95, 1.0), (1.0, 2.0, 2.0, 1.0))

SINGLES = {
    "identity": variance.identity,
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "coarse_strata": variance.coarse_strata,
    "stratified_blocks": variance.stratified_blocks,
    "stratified_levels": variance.stratified_levels,
    "complement": variance.complement,
    "importance": lambda: importance(DENSITY),
    "log_uniform": lambda: variance.log_uniform(1e-2),
    "clipped": lambda: variance.clipped(0.3, 0.8),
    "clipped_adaptive": lambda: variance.clipped_adaptive(0.3, 0.8),
    "clipped_mixture": lambda: variance.clipped_mixture(0.3, 0.8, 0.2),
    "ppots_parametric": lambda: variance.ppots_parametric(EPR),
    "ppots_unweighted": lambda: variance.ppots_unweighted(GROWING),
    "ppots_binned": lambda: variance.ppots_binned(BINS, STEEP),
    "ppots": lambda: variance.ppots(num_bins=6),
    "ppots_slopes": lambda: variance.ppots_slopes(num_bins=8),
    "ema_bins": lambda: variance.ema_bins(num_bins=6, floor=0.1),
    "loss_history": lambda: variance.loss_history(num_bins=6, length=2, floor=0.1),
    "learned_quantile": lambda: variance.learned_quantile(resolution=4),
    "uncertainty_weighting": lambda: variance.uncertainty_weighting(num_features=8),
    "cdcd_warp": lambda: variance.cdcd_warp(num_bins=6),
    "cdtd_warp": lambda: variance.cdtd_warp(piecewise_linear_curve(8)),
    "mirror": variance.mirror,
    "rotate": lambda: variance.rotate(3),
    "rotate_ranks": lambda: variance.rotate_ranks(3),
    "repeat": lambda: variance.repeat(2),
}

CHAINS = {
    "empty": variance.chain,
    "stratified_mirror": lambda: variance.chain(variance.stratified(), variance.mirror()),
    "systematic_mirror": lambda: variance.chain(variance.systematic(), variance.mirror()),
    "nested": lambda: variance.chain(variance.chain(variance.stratified()), variance.mirror()),
    "levels_ppots_rotate": lambda: variance.chain(
        variance.stratified_levels(2), variance.ppots_binned(BINS, STEEP), variance.rotate(2)
    ),
    "blocks_importance_mirror": lambda: variance.chain(
        variance.stratified_blocks(), importance(DENSITY), variance.mirror()
    ),
    "pairs_complement_log_uniform": lambda: variance.chain(
        variance.antithetic_pairs(), variance.complement(), variance.log_uniform(1e-2)
    ),
}

LEARNERS = {
    "ppots_level_variance": lambda: variance.ppots(num_bins=6, target=level_variance),
    "cdtd_warp_logistic": cdtd_warp_logistic,
}
"""Adaptive warps in other settings."""

FACTORIES = SINGLES | CHAINS | LEARNERS
WARM = jnp.int32(1000)  # steps, more than any warm-up has


def _loaded(second, mean=0.0, weight=1.0):
    full = [jnp.broadcast_to(jnp.asarray(a, jnp.float32), (6,)) for a in (second, mean, weight)]
    return PpotsState(*full, WARM, jnp.int32(0))


def _history(*values):
    kept = jnp.broadcast_to(jnp.asarray(values, jnp.float32)[:, None], (6, 2))
    counts = jnp.full(6, 3, jnp.int32)
    return LossHistory(kept, counts, WARM, jnp.int32(0))


def _fresh(learner):
    return FACTORIES[learner]().init(draws.DrawSpec(1, 2, (1,)))


def _steep_net():
    """Few levels below 0.5, and the more the cleaner."""
    state = _fresh("learned_quantile")
    units = jnp.linspace(0.0, 1.0, state.net.height.size)
    net = dataclasses.replace(
        state.net, height=state.net.height - 3 * units, log_steepness=1.0 + 2.0 * (1 - units)
    )
    return state._replace(net=net)


def _scaled():
    """The clean half weighs more than the noisy one."""
    state = _fresh("uncertainty_weighting")
    return state._replace(coefficients=jnp.array([1.5, -1.0, 0.5, 1.0, -0.5, 0.7, -0.2, 0.3]))


def _warped():
    state = _fresh("cdcd_warp")
    heights = jnp.log(jnp.array([[0.05, 0.1, 0.3, 0.6, 1.0, 2.0]]))
    return state._replace(averages=state.averages._replace(heights=heights))


def _tied():
    state = _fresh("cdtd_warp_logistic")
    return state._replace(
        averages=LogisticShape(jnp.array([0.5, -0.5]), jnp.array([0.0, 1.0]), jnp.array([0.5, 1.0]))
    )


STATES = {
    "ppots_fresh": ("ppots", _loaded(0.0, 0.0, 0.0)),
    "ppots_zeros": ("ppots", _loaded(0.0)),
    "ppots_large": ("ppots", _loaded(1e30)),
    "ppots_overflow": ("ppots", _loaded(jnp.inf)),
    "ppots_huge_first_bin": ("ppots", _loaded([1e30, 1, 1, 1, 1, 1])),
    "ppots_huge_last_bin": ("ppots", _loaded([0, 0, 0, 0, 0, 1e30])),
    "ppots_few_visited": ("ppots", _loaded([4.0, 0, 0, 9.0, 0, 0], 0, [1, 0, 0, 0.5, 0, 0])),
    "ppots_steep": ("ppots", _loaded([1, 10, 100, 1e3, 1e4, 1e5])),
    "ppots_no_variance": ("ppots_level_variance", _loaded(4.0, 2.0)),
    "ppots_variance": ("ppots_level_variance", _loaded([4, 5, 7, 20, 90, 500], 2.0)),
    "ema_steep": ("ema_bins", _loaded(0.0, [1, 2, 4, 9, 30, 200])),
    "ema_half_visited": ("ema_bins", _loaded(0.0, [1, 2, 0, 0, 0, 3], [1, 0.5, 0, 0, 0, 0.1])),
    "history_steep": ("loss_history", _history(1, 2, 4, 9, 30, 200)),
    "history_zeros": ("loss_history", _history(0, 0, 0, 0, 0, 0)),
    "history_huge": ("loss_history", _history(0, 0, 0, 0, 0, 1e30)),
    "quantile_steep": ("learned_quantile", _steep_net()),
    "uncertainty_loaded": ("uncertainty_weighting", _scaled()),
    "cdcd_loaded": ("cdcd_warp", _warped()),
    "cdtd_loaded": ("cdtd_warp_logistic", _tied()),
}
"""Name -> (learner, state): adaptive warps that have seen extremes."""

ALL = FACTORIES | {name: FACTORIES[learner] for name, (learner, _) in STATES.items()}
MEMBERS = {name: (name, *(n for n in STATES if STATES[n][0] == name)) for name in FACTORIES}
"""Name of a factory -> members of ALL that differ in their states alone."""

TRUNCATED = ("clipped", "clipped_adaptive")
DRIFTING = ("ppots_unweighted", "uncertainty_loaded", "cdcd_loaded", "cdtd_loaded")
"""Biased members with states in which their bias shows."""
BIASED = ("uncertainty_weighting", "cdcd_warp", "cdtd_warp", "cdtd_warp_logistic", *DRIFTING)
EXACT = [name for name in ALL if name not in TRUNCATED + BIASED]
UNBIASED = [name for name in ALL if name not in BIASED]
SEPARATE_LEVELS = ("stratified_blocks", "blocks_importance_mirror")
"""Members that tie the levels of one row, where the spec says that these are separate."""
TIED_LEVELS = ("cdtd_warp", "cdtd_warp_logistic", "cdtd_loaded")
"""Biased members that tie the levels of one row."""
RANGES = dict.fromkeys(TRUNCATED, (1 - 0.8, 1 - 0.3))
"""Quantiles that a truncated member covers."""


def state(name, spec):
    """The state to test a member of ALL with."""
    return STATES[name][1] if name in STATES else ALL[name]().init(spec)


def densities():
    """Name -> density of the quantile, for every member of ALL that has a warp."""
    binned = moment_density(BINS, STEEP, 0.1)
    found = {
        "importance": DENSITY,
        "log_uniform": LogUniformDensity(1e-2),
        "clipped": ClippedDensity(0.3, 0.8),
        "clipped_adaptive": ClippedDensity(0.3, 0.8),
        "clipped_mixture": piecewise_density((0, 0.2, 0.7, 1), (0.04, 0.9, 0.06)),
        "ppots_parametric": epr_density(EPR, 0.1),
        "ppots_binned": binned,
        "levels_ppots_rotate": binned,
        "blocks_importance_mirror": DENSITY,
        "pairs_complement_log_uniform": LogUniformDensity(1e-2),
    }
    edges, equal = log_spaced_edges(6, 1e-3), np.linspace(0, 1, 7)
    of_state = {
        "ppots": lambda state: (edges, level_moments(state).second),
        "ppots_level_variance": lambda state: (
            edges,
            level_variance(level_moments(state)),
        ),
        "ema_bins": lambda state: (equal, level_moments(state).mean ** 2),
        "loss_history": lambda state: (equal, jnp.mean(state.values**2, axis=1)),
    }
    for name, (learner, loaded) in STATES.items():
        if learner in of_state:
            found[name] = moment_density(*of_state[learner](loaded), 0.1)
    return found | {"quantile_steep": STATES["quantile_steep"][1].net}


@functools.cache
def quick(function, **options):
    """``jax.jit`` that compiles fast and runs slowly; the same for the same function."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **options)


def draw_keys(count, seed=0):
    """The keys of :func:`all_draws`."""
    return jax.random.split(jax.random.key(seed), count)


def for_each(function, states, *arguments):
    """Name -> ``function(transform, state, *arguments)``, one program per factory.

    Args:
        function: returns a pytree of arrays.
        states: by name of a member of ALL.
        arguments: by name, too.
    """
    found = {}
    for factory, names in MEMBERS.items():
        names = [name for name in names if name in states]
        one = functools.partial(function, FACTORIES[factory]())
        if len(names) == 1:
            found[names[0]] = one(*(each[names[0]] for each in (states, *arguments)))
        elif names:
            stacked = (
                jax.tree.map(lambda *leaves: jnp.stack(leaves), *(each[n] for n in names))
                for each in (states, *arguments)
            )
            together = jax.vmap(one)(*stacked)
            found |= {n: jax.tree.map(lambda a, i=i: a[i], together) for i, n in enumerate(names)}
    return found


@functools.cache
def draw_function(spec, names):
    """Jitted keys [N] -> independent draws of members of ALL, name -> Draw [N, V, B, ...]."""
    states = {name: state(name, spec) for name in names}

    def draw(key):
        # As draw_batch, which starts from the same numbers for all.
        start = draws.iid(key, spec)
        return for_each(lambda transform, own: transform.draw(key, own, start, spec), states)

    return quick(jax.vmap(draw))


@functools.cache
def all_draws(spec, count, seed=0):
    """``count`` independent draws of every member of ALL."""
    return jax.tree.map(np.asarray, draw_function(spec, tuple(ALL))(draw_keys(count, seed)))
