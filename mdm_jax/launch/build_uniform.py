"""Turns the config of a uniform-token run into objects; ``config.process = "uniform"``."""

from collections.abc import Callable

from ml_collections import ConfigDict

from mdm_jax import data, models, objectives, samplers, schedules
from mdm_jax import likelihood as mdm_jax_likelihood
from mdm_jax.launch import build_masked
from mdm_jax.launch.build import lookup, settings
from mdm_jax.launch.build_masked import apply_fn as apply_fn
from mdm_jax.launch.build_masked import details as details
from mdm_jax.launch.build_masked import model as model
from mdm_jax.launch.build_masked import record as record

SAMPLERS = {
    "uniform_ancestral": samplers.uniform_ancestral,
    "uniform_corrected": samplers.uniform_corrected,
}
LEVEL = "replacement rate"
"""Label of the noise axis of plots."""
UNREAD = ("corruption",)
"""Sections whose ``name`` this process does not look at."""


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The bound over all ids but the mask token, with the configured law."""
    law = schedules.law_of(build_masked.schedule(config, config.law.name, "law.name"))
    bound = objectives.uniform_nelbo(num_tokens(dataset), law)
    return build_masked.finished(config, dataset, bound)


def likelihood(
    _config: ConfigDict, dataset: data.Dataset, apply_fn: Callable, passes: int, replicates: int
) -> Callable[..., mdm_jax_likelihood.Likelihood]:
    """The fixed estimator of the bound, whatever chain the run trains with."""
    return mdm_jax_likelihood.make_uniform_likelihood(
        apply_fn, num_tokens(dataset), passes=passes, replicates=replicates
    )


def generator(
    config: ConfigDict, dataset: data.Dataset, model: models.Transformer, _apply_fn: Callable
) -> Callable:
    """``generate(params, key, canvas, documents) -> tokens``; the mask token marks free places."""
    c, count = config.sample, num_tokens(dataset)
    factory = lookup(SAMPLERS, c.sampler, "sample.sampler")
    chosen = factory(
        count, token_filter=build_masked.token_filter(config), **settings(c, c.sampler)
    )
    if config.model.self_conditioning:
        chosen = samplers.self_conditioned(chosen, count, dataset.vocab_size)
    grid = build_masked.grid(config)
    return samplers.make_generator(model.apply, chosen, grid, mask_id=dataset.mask_id)


def num_tokens(dataset: data.Dataset) -> int:
    """K: every id but the mask token, which is the last one."""
    return dataset.vocab_size - 1
