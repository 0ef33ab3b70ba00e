"""The table of config names: what each builds, and the settings that it takes.

A new method is a line here; its settings are the factory's arguments with plain defaults.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from mdm_jax import (
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
from mdm_jax.gaussian import recipes
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.variance.densities import level_variance, second_moment

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
    "ppots_slopes": variance.ppots_slopes,
    "ema_bins": variance.ema_bins,
    "ema_bins_second_moment": functools.partial(variance.ema_bins, target=second_moment),
    "loss_history": variance.loss_history,
    "learned_quantile": variance.learned_quantile,
    "uncertainty_weighting": variance.uncertainty_weighting,
    "cdcd_warp": variance.cdcd_warp,
    "cdtd_warp": variance.cdtd_warp,
    "log_uniform": variance.log_uniform,
    "clipped": variance.clipped,
    "clipped_adaptive": variance.clipped_adaptive,
    "clipped_mixture": variance.clipped_mixture,
    "mirror": variance.mirror,
    "rotate": variance.rotate,
    "rotate_ranks": variance.rotate_ranks,
    "repeat": variance.repeat,
}
CORRUPTIONS = {
    "fixed_count": corruption.fixed_count,
    "bernoulli": corruption.bernoulli,
    "rao_blackwell": corruption.rao_blackwell,
    "rao_blackwell_clipped": corruption.rao_blackwell_clipped,
    "bernoulli_shifted_rate": corruption.bernoulli_shifted_rate,
    "bernoulli_shifted_logit": corruption.bernoulli_shifted_logit,
}
LAWS = schedules.MASKED_SCHEDULES
WEIGHTINGS = {"min_snr": objectives.min_snr_factor, "p2": objectives.p2_factor}
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
    "edm_heun": gaussian_samplers.edm_heun,
    "euler_flow": gaussian_samplers.euler_flow,
    "heun_flow": gaussian_samplers.heun_flow,
}
GAUSSIAN_LAWS = gaussian_schedules.GAUSSIAN_SCHEDULES
RECIPES = recipes.RECIPES
DATA = {
    "embedded": data.embedded_text,
    "text": data.text,
    "jsonl": data.jsonl,
    "documents": data.documents,
    "tfds_text": data.tfds_text,
    "tfds_images": data.tfds_images,
    "digits": data.digits,
    "task": tasks.task_dataset,
}
TASKS = {
    "sudoku": tasks.Sudoku,
    "chain": tasks.Chain,
    "run": tasks.Run,
    "add": tasks.Add,
    "countdown": tasks.Countdown,
}
OPTIMIZERS = {"adamw": training.adamw, "muon": training.muon}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MONITORS = {
    "levels": training.level_monitor,
    "gradient_noise": training.gradient_noise_monitor,
    "baseline": training.baseline_monitor,
}
CLIP_CRITERIA = {
    "gradient_noise_to_signal": meter.gradient_noise_to_signal,
    "relative_variance": meter.relative_variance,
    "raw_variance": meter.raw_variance,
}


def lookup(table: Mapping[str, Any], name: str, field: str) -> Any:
    """``table[name]``; ValueError with the field and close matches otherwise."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"{field}: unknown name {name!r}; {hint}known are {', '.join(sorted(table))}")


def settings(section: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The config subsection of a name, empty if it has none."""
    return dict(section.get(name, {}))


def defaults(factory: Callable[..., Any], **changes: Any) -> dict[str, Any]:
    """Settings of a factory: its arguments with plain finite defaults, and ``changes``."""
    arguments = inspect.signature(factory).parameters.values()
    return {p.name: p.default for p in arguments if _is_plain(p.default)} | changes


def sections(table: Mapping[str, Callable[..., Any]], **changes: Mapping[str, Any]) -> dict:
    """:func:`defaults` by name, for all of a table that have settings."""
    found = {name: defaults(table[name], **changes.get(name, {})) for name in table}
    return {name: plain for name, plain in found.items() if plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int | str | tuple)
