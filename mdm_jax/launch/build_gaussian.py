"""Turns the config of a Gaussian run into objects; ``config.process = "gaussian"``.

A recipe names law, weighting, output and path; ``gaussian.law`` draws the levels from another law
and leaves what is minimised alone. All recipes see inputs of unit variance and the same network.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, distributed, gaussian, objectives, schedules
from mdm_jax.gaussian import recipes
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.recipes import Recipe
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.launch.build import lookup, network, settings
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array

SAMPLERS = {
    "ddim": gaussian_samplers.ddim,
    "ddpm_ancestral": gaussian_samplers.ddpm_ancestral,
    "dpm_solver_pp_2m": gaussian_samplers.dpm_solver_pp_2m,
    "edm_heun": gaussian_samplers.edm_heun,
    "euler_flow": gaussian_samplers.euler_flow,
    "heun_flow": gaussian_samplers.heun_flow,
}
LEVEL = "sigmoid(-logSNR)"
"""Label of the noise axis of plots."""
UNREAD = ("corruption", "law", "weighting")
"""Sections whose ``name`` this process does not look at."""


def recipe(config: ConfigDict) -> Recipe:
    """The recipe between the configured ends of the logSNR, with another law if one is named."""
    c = config.gaussian
    factory = lookup(recipes.RECIPES, c.recipe, "gaussian.recipe")
    chosen = factory(**settings(c, c.recipe))
    law = _law(config, c.law, "gaussian.law") if c.law else chosen.law
    return dataclasses.replace(chosen, law=_between(law, c.low, c.high))


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The weighted squared error of the recipe."""
    _check_pictures(dataset)
    if config.model.self_conditioning:
        raise ValueError("process=gaussian does not take model.self_conditioning")
    values = gaussian.scaled_integers(_num_values(dataset))
    return gaussian.gaussian_loss(recipe(config), values)


def model(config: ConfigDict, dataset: data.Dataset) -> gaussian.PictureTransformer:
    """The network, from noisy pictures to the recipe's output."""
    shape, patch = dataset.event_shape, config.model.patch_size
    return gaussian.PictureTransformer(network(config, 1), shape, patch)


def apply_fn(
    config: ConfigDict, model: gaussian.PictureTransformer, _dataset: data.Dataset
) -> Callable[..., Array]:
    """``apply_fn(params, inputs, logsnr, documents) -> output``, inputs scaled to unit variance."""
    path, sigma_data = recipe(config).path, config.gaussian.sigma_data

    def apply(params, inputs, logsnr, documents=None):
        scaled = gaussian.precondition(
            lambda x, level, _documents: model.apply(params, x, level), path, sigma_data
        )
        return scaled(inputs, logsnr, documents)

    return apply


def likelihood(
    config: ConfigDict, dataset: data.Dataset, apply_fn: Callable, passes: int, replicates: int
) -> Callable[..., gaussian.GaussianLikelihood]:
    """The fixed estimator of the bound, whatever recipe and chain the run trains with."""
    c, chosen, num_values = config.gaussian, recipe(config), _num_values(dataset)
    return gaussian.make_gaussian_likelihood(
        apply_fn,
        output=chosen.output,
        path=chosen.path,
        decoder=gaussian.grey_value_decoder(num_values),
        low=c.low,
        high=c.high,
        passes=passes,
        replicates=replicates,
        values=gaussian.scaled_integers(num_values),
    )


def record(result: gaussian.GaussianLikelihood) -> dict[str, Any]:
    """A likelihood as JSON values, under the names that all processes share."""
    shared = {
        "nats_per_element": "nats_per_dimension",
        "bits_per_unit": "bits_per_dimension",
        "standard_error_bits_per_unit": "standard_error_bits_per_dimension",
        "data_standard_error_bits_per_unit": "data_standard_error_bits_per_dimension",
    }
    found = result.to_dict()
    return found | {name: found[theirs] for name, theirs in shared.items()}


def details(record: dict[str, Any]) -> list[str]:
    """What a report says of a likelihood beyond bits per unit."""
    parts, errors = (
        record[name]
        for name in ("parts_bits_per_dimension", "standard_error_parts_bits_per_dimension")
    )
    terms = (f"{name} {value:.3f} ± {errors[name] or 0:.3f}" for name, value in parts.items())
    return ["  of which " + ", ".join(terms)]


def generator(
    config: ConfigDict,
    dataset: data.Dataset,
    _model: gaussian.PictureTransformer,
    apply_fn: Callable,
) -> Callable:
    """``generate(params, key, canvas, documents) -> grey values``, of the canvas's shape."""
    c, chosen = config.sample, recipe(config)
    sampler = lookup(SAMPLERS, c.sampler, "sample.sampler")(**settings(c, c.sampler))
    draw = gaussian_samplers.make_gaussian_generator(
        *(apply_fn, sampler, grid(config), (dataset.length,)),
        output=chosen.output,
        path=chosen.path,
        data_std=config.gaussian.sigma_data,
    )
    top = _num_values(dataset) - 1

    def generate(params, key, canvas, documents=None):
        del documents
        values = distributed.to_host(draw(params, key, len(canvas)))
        return np.clip(np.round((values + 1) * top / 2), 0, top).astype(np.int32)

    return generate


def grid(config: ConfigDict) -> Array:
    """Levels that the sampler steps along, ending in the denoiser's estimate."""
    c, g = config.sample, config.gaussian
    if c.grid == "uniform_logsnr":
        levels = spacings.uniform_logsnr(c.num_steps, g.low, g.high)
    elif c.grid == "edm":
        return spacings.edm(c.num_steps, np.exp(-g.high / 2), np.exp(-g.low / 2))
    else:
        law = _between(
            _law(config, c.grid, "sample.grid", ("uniform_logsnr", "edm")), g.low, g.high
        )
        levels = spacings.uniform_time(law, c.num_steps)
    return np.append(np.asarray(levels)[:-1], np.inf)


def _law(config: ConfigDict, name: str, field: str, others: tuple[str, ...] = ()) -> Law:
    if name not in schedules.MASKED_SCHEDULES or name in gaussian_schedules.GAUSSIAN_SCHEDULES:
        lookup(dict.fromkeys((*gaussian_schedules.GAUSSIAN_SCHEDULES, *others)), name, field)
    try:
        return gaussian_schedules.by_name(name, **settings(config.gaussian, name))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: {error}") from error


def _between(law: Law, low: float, high: float) -> Law:
    """The law cut off outside the levels of the run, where it reaches further."""
    ends = [float(end) for end in law.support]
    if ends[0] >= low and ends[1] <= high:
        return law
    return gaussian_schedules.truncated(law, max(low, ends[0]), min(high, ends[1]))


def _num_values(dataset: data.Dataset) -> int:
    return dataset.vocab_size - 1  # without the mask


def _check_pictures(dataset: data.Dataset) -> None:
    if dataset.event_shape is None:
        raise ValueError(
            'process="gaussian" needs pictures (data.source=digits, or tfds with kind=image); for '
            'text use process="masked"'
        )
