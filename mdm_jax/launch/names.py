"""The table of config names: what each builds, and the settings that it takes.

A new method is a line here; its settings are the factory's arguments with plain defaults.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mdm_jax import (
    checks,
    corruption,
    data,
    meter,
    objectives,
    samplers,
    schedules,
    tasks,
    training,
    variance,
)
from mdm_jax.alignment import pairs
from mdm_jax.gaussian import parameterisations, paths, recipes, weightings
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.launch.modes.variance_report import BASELINE
from mdm_jax.meter.levels import LevelTable
from mdm_jax.variance.densities import level_variance, log_spaced_edges, second_moment
from mdm_jax.variance.learned.curves import cdtd_warp_logistic
from mdm_jax.variance.ppots import EprFit, fit_epr
from mdm_jax.variance.transform import VarianceTransform

PROCESSES = (
    *("masked", "block", "partition", "uniform", "autoregressive", "gaussian", "cdcd", "cdtd"),
)
VARIANCE = {
    "identity": variance.identity,
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "coarse_strata": variance.coarse_strata,
    "stratified_blocks": variance.stratified_blocks,
    "stratified_levels": variance.stratified_levels,
    "complement": variance.complement,
    "ppots": variance.ppots,
    "ppots_level_variance": functools.partial(variance.ppots, target=level_variance),
    "ppots_parametric": variance.ppots_parametric,
    "ppots_unweighted": variance.ppots_unweighted,
    "ppots_slopes": variance.ppots_slopes,
    "ema_bins": variance.ema_bins,
    "ema_bins_second_moment": functools.partial(variance.ema_bins, target=second_moment),
    "loss_history": variance.loss_history,
    "learned_quantile": variance.learned_quantile,
    "uncertainty_weighting": variance.uncertainty_weighting,
    "cdcd_warp": variance.cdcd_warp,
    "cdtd_warp": variance.cdtd_warp,
    "cdtd_warp_logistic": cdtd_warp_logistic,
    "log_uniform": variance.log_uniform,
    "clipped": variance.clipped,
    "clipped_adaptive": variance.clipped_adaptive,
    "clipped_mixture": variance.clipped_mixture,
    "mirror": variance.mirror,
    "rotate": variance.rotate,
    "rotate_ranks": variance.rotate_ranks,
    "repeat": variance.repeat,
}
AUTO = ("auto", "auto_truncated")
"""Orders that measure chains and take the best; the second one clipped ranges too."""
CORRUPTIONS = {
    "fixed_count": corruption.fixed_count,
    "rounded_count": corruption.rounded_count,
    "bernoulli": corruption.bernoulli,
    "rao_blackwell": corruption.rao_blackwell,
    "rao_blackwell_clipped": corruption.rao_blackwell_clipped,
    "bernoulli_shifted_rate": corruption.bernoulli_shifted_rate,
    "bernoulli_shifted_logit": corruption.bernoulli_shifted_logit,
}
LAWS = schedules.MASKED_SCHEDULES
WEIGHTINGS = {
    "law": objectives.law_factor,
    "min_snr": objectives.min_snr_factor,
    "p2": objectives.p2_factor,
    "entropy_rise": objectives.entropy_rise_factor,
}
SAMPLERS = {
    "ancestral": samplers.ancestral,
    "cached_ancestral": samplers.cached_ancestral,
    "first_hitting": samplers.first_hitting,
    "by_confidence": functools.partial(samplers.by_score, samplers.confidence),
    "by_margin": functools.partial(samplers.by_score, samplers.margin),
    "by_entropy": functools.partial(samplers.by_score, samplers.negative_entropy),
    "entropy_bounded": samplers.entropy_bounded,
    "low_confidence_remasking": samplers.low_confidence_remasking,
    "random_remasking": samplers.random_remasking,
    "confidence_parallel": samplers.confidence_parallel,
    "remdm_cap": samplers.remdm_cap,
    "remdm_rescale": samplers.remdm_rescale,
    "remdm_confidence": samplers.remdm_confidence,
    "remdm_loop": samplers.remdm_loop,
    "predictor_corrector": samplers.predictor_corrector,
}
UNIFORM_SAMPLERS = {
    "uniform_ancestral": samplers.uniform_ancestral,
    "uniform_corrected": samplers.uniform_corrected,
}
GAUSSIAN_SAMPLERS = {
    "ddim": gaussian_samplers.ddim,
    "ddpm_ancestral": gaussian_samplers.ddpm_ancestral,
    "dpm_solver_pp_2m": gaussian_samplers.dpm_solver_pp_2m,
    "dpm_solver_pp_2s": gaussian_samplers.dpm_solver_pp_2s,
    "dpm_solver_pp_3m": gaussian_samplers.dpm_solver_pp_3m,
    "edm_heun": gaussian_samplers.edm_heun,
    "euler_flow": gaussian_samplers.euler_flow,
    "heun_flow": gaussian_samplers.heun_flow,
    "indi": gaussian_samplers.indi,
}
GAUSSIAN_LAWS = gaussian_schedules.GAUSSIAN_SCHEDULES
GAUSSIAN_MODIFIERS = gaussian_schedules.MODIFIERS
GAUSSIAN_WEIGHTINGS = weightings.WEIGHTINGS
OUTPUTS, PATHS = parameterisations.OUTPUTS, paths.PATHS
RECIPES = recipes.RECIPES
TOKEN_GRIDS = ("uniform_masking_rate",)
GAUSSIAN_GRIDS = (
    *("law", "edm", *spacings.TABLE_SPACINGS),
    *(f"uniform_{quantity}" for quantity in spacings.QUANTITIES),
)
"""Names of sampling grids that are no schedules."""
SEARCHED_GRIDS = (
    *("equal information", "equal error", "learned density"),
    *("align steps, curve", "align steps, pairs"),
)
"""Names of grids that ``mdm spacing`` makes of what it measures."""
GRIDS = tuple(dict.fromkeys((*TOKEN_GRIDS, *LAWS, *GAUSSIAN_GRIDS, *GAUSSIAN_LAWS)))
COMPARED_GRIDS = (
    *SEARCHED_GRIDS,
    *(g for g in GRIDS if g not in ("edm", *spacings.TABLE_SPACINGS)),
)
"""Those whose last but one level is not that of the end."""
ALL_SAMPLERS = (*SAMPLERS, *UNIFORM_SAMPLERS, *GAUSSIAN_SAMPLERS)
DATA = {
    "embedded": data.embedded_text,
    "text": data.text,
    "jsonl": data.jsonl,
    "chat": data.chat,
    "documents": data.documents,
    "tfds_text": data.tfds_text,
    "tfds_images": data.tfds_images,
    "digits": data.digits,
    "table": data.table,
    "diabetes": data.diabetes,
    "preferences": pairs.preference_pairs,
    "task": tasks.task_dataset,
    "task_file": tasks.task_file_dataset,
}
TASKS = {
    "sudoku": tasks.Sudoku,
    "chain": tasks.Chain,
    "run": tasks.Run,
    "add": tasks.Add,
    "countdown": tasks.Countdown,
    "countdown_division": tasks.CountdownDivision,
    "zebra": tasks.Zebra,
}
OPTIMIZERS = {"adamw": training.adamw, "muon": training.muon}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MOMENT_DTYPES = DTYPES | {"int8": jnp.int8}
MONITORS = {
    "levels": training.level_monitor,
    "gradient_noise": training.gradient_noise_monitor,
    "weights": training.weight_monitor,
    "baseline": training.baseline_monitor,
}
CLIP_CRITERIA = {
    "gradient_noise_to_signal": meter.gradient_noise_to_signal,
    "relative_variance": meter.relative_variance,
    "raw_variance": meter.raw_variance,
}


CONFIGURED = "this run"
"""The method that is the run's own chain, process and state."""


class Method(NamedTuple):
    """``build`` makes a transform from the levels under ``corruption``; None is the run's own."""

    build: Callable[[LevelTable], VarianceTransform]
    corruption: str | None = "fixed_count"


def _fixed(*factories: Callable[[], VarianceTransform], corruption="fixed_count") -> Method:
    return Method(lambda _table: variance.chain(*(factory() for factory in factories)), corruption)


def _binned(table: LevelTable, target: Callable) -> VarianceTransform:
    edges = log_spaced_edges(16)
    moments = meter.binned_moments(table, table.gradient, edges)
    return variance.ppots_binned(edges, target(moments))


def fitted(table: LevelTable) -> EprFit:
    """The curve of P-POTS by the loss of a level table; errors as of ``fit_epr``."""
    value = table.loss.value
    spread = np.maximum(value.pattern, 0.0)  # the published target, v + g^2 of the loss
    # Over 1 - u, which is the masking rate where that is uniform.
    return fit_epr(1.0 - table.quantiles, value.mean, spread)


def _parametric(table: LevelTable) -> VarianceTransform:
    return variance.chain(variance.ppots_parametric(fitted(table).parameters))


def _stratified_binned(table: LevelTable) -> VarianceTransform:
    return variance.chain(variance.stratified(), _binned(table, level_variance))


_online = functools.partial(variance.ppots, num_bins=16, warmup_steps=10, decay=0.99)
_by_logits = functools.partial(variance.ppots_slopes, num_bins=16, warmup_steps=10)

METHODS: dict[str, Method] = {
    BASELINE: _fixed(variance.identity),
    "stratified": _fixed(variance.stratified),
    "systematic": _fixed(variance.systematic),
    "antithetic pairs": _fixed(variance.antithetic_pairs),
    "coarse strata": _fixed(variance.coarse_strata),
    "stratified levels": _fixed(variance.stratified_levels),
    "repeat": _fixed(variance.repeat),
    "mirror": _fixed(variance.mirror),
    "complement": _fixed(variance.complement),
    "rounded counts, complement": _fixed(variance.complement, corruption="rounded_count"),
    "rotate, 4 views": _fixed(functools.partial(variance.rotate, 4)),
    "rotate ranks, 4 views": _fixed(functools.partial(variance.rotate_ranks, 4)),
    "stratified, mirror": _fixed(variance.stratified, variance.mirror),
    "stratified, rotate ranks": _fixed(variance.stratified, variance.rotate_ranks),
    "ppots": _fixed(_online),
    "ppots, parametric": Method(_parametric),
    "ppots, slopes": _fixed(_by_logits),
    "stratified, ppots slopes": _fixed(variance.stratified, _by_logits),
    "ppots, binned": Method(lambda table: _binned(table, second_moment)),
    "stratified, ppots binned": Method(_stratified_binned),
    "stratified, ppots binned, mirror": Method(
        lambda table: variance.chain(_stratified_binned(table), variance.mirror())
    ),
    "ema bins": _fixed(functools.partial(variance.ema_bins, num_bins=16, warmup_steps=10)),
    "loss history": _fixed(functools.partial(variance.loss_history, num_bins=16)),
    "learned quantile": _fixed(variance.learned_quantile),
    "clipped": _fixed(functools.partial(variance.clipped, 0.3, 0.8)),
    "clipped mixture": _fixed(functools.partial(variance.clipped_mixture, 0.3, 0.8, 0.3)),
    "rao-blackwell": _fixed(variance.identity, corruption="rao_blackwell"),
    "rao-blackwell, complement": _fixed(variance.complement, corruption="rao_blackwell"),
    "bernoulli": _fixed(variance.identity, corruption="bernoulli"),
    "bernoulli, log-uniform": _fixed(variance.log_uniform, corruption="bernoulli"),
    "bernoulli, ppots": _fixed(_online, corruption="bernoulli"),
}


def lookup(table: Mapping[str, Any], name: str, field: str) -> Any:
    """``table[name]``; ValueError with the field and close matches otherwise."""
    if name in table:
        return table[name]
    raise ValueError(f"{field}: {checks.unknown_name(name, table, 'name')}")


def settings(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config subsection of a name, empty if it has none."""
    return dict(section.get(name, {}))


class Setting(NamedTuple):
    """A setting of the config: its default, and what is allowed (None: not stated)."""

    default: Any
    rule: checks.Rule | None


def defaults(factory: Callable[..., Any], **changes: Any) -> dict[str, Setting]:
    """Settings of a factory: its arguments with plain finite defaults or in ``changes``.

    A change is another default or, where the config means something else, a :class:`Setting`.
    """
    parameters = inspect.signature(factory).parameters
    found = {}
    for name in [n for n, p in parameters.items() if _is_plain(p.default)] + [*changes]:
        value = changes.get(name, parameters[name].default if name in parameters else None)
        if not isinstance(value, Setting):
            value = Setting(value, checks.rule_of(parameters[name]) or _plain_rule(value))
        found[name] = value
    return found


def sections(table: Mapping[str, Callable[..., Any]], **changes: Mapping[str, Any]) -> dict:
    """:func:`defaults` by name, for all of a table that have settings."""
    found = {name: defaults(table[name], **changes.get(name, {})) for name in table}
    return {name: plain for name, plain in found.items() if plain}


def _plain_rule(default: Any) -> checks.Rule | None:
    several = isinstance(default, tuple) and bool(default)
    kind = type(default[0] if several else default)
    return checks.Plain(kind, several=several) if kind in (bool, str) else None


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int | str | tuple)
