"""Turns the config of a masked run into objects; ``config.process = "masked"``."""

import inspect
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from experiments.build import lookup, network, settings
from mdm_jax import corruption, data, evaluation, models, objectives, samplers, schedules
from mdm_jax.typing import Array

CORRUPTIONS = {
    "fixed_count": corruption.fixed_count,
    "bernoulli": corruption.bernoulli,
    "rao_blackwell": corruption.rao_blackwell,
    "rao_blackwell_clipped": corruption.rao_blackwell_clipped,
    "bernoulli_shifted_rate": corruption.bernoulli_shifted_rate,
    "bernoulli_shifted_logit": corruption.bernoulli_shifted_logit,
}
WEIGHTINGS = {"min_snr": objectives.min_snr_factor, "p2": objectives.p2_factor}
_OWN_GRID = "uniform_masking_rate"
SAMPLERS = {"ancestral": samplers.ancestral, "first_hitting": samplers.first_hitting}
LEVEL = "masking rate"
"""Label of the noise axis of plots."""


def model(config: ConfigDict, dataset: data.Dataset) -> models.Transformer:
    """The network, from tokens to logits."""
    return models.Transformer(network(config, dataset.vocab_size))


def apply_fn(_config: ConfigDict, model: models.Transformer) -> Callable[..., Array]:
    """``apply_fn(params, inputs, logsnr, documents) -> logits``."""
    return model.apply


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The masked bound with the configured process and law."""
    process = corruption_process(config, dataset)
    law = schedules.law_of(schedule(config, config.law.name, "law.name"))
    bound, name = objectives.masked_nelbo(process, law), config.weighting.name
    if not name:
        return bound
    factor = lookup(WEIGHTINGS, name, "weighting.name")(**settings(config.weighting, name))
    return objectives.reweighted(bound, factor, name)


def corruption_process(config: ConfigDict, dataset: data.Dataset) -> corruption.Corruption:
    """The configured process; one that masks rare tokens more often learns which are rare."""
    name = config.corruption.name
    factory = lookup(CORRUPTIONS, name, "corruption.name")
    chosen = settings(config.corruption, name)
    if "rare" in inspect.signature(factory).parameters:
        share = chosen.pop("rare_share")
        chosen["rare"] = data.rare_tokens(dataset.train, dataset.vocab_size, share)
    return factory(dataset.mask_id, **chosen)


def likelihood(
    _config: ConfigDict, dataset: data.Dataset, apply_fn: Callable, passes: int, replicates: int
) -> Callable[..., evaluation.Likelihood]:
    """The fixed estimator of the bound, whatever chain the run trains with."""
    return evaluation.make_likelihood(
        apply_fn, dataset.mask_id, passes=passes, replicates=replicates
    )


def record(result: evaluation.Likelihood) -> dict[str, Any]:
    """A likelihood as JSON values, under the names that all processes share."""
    found = result.to_dict()
    return found | {"nats_per_element": found["nats_per_token"]}


def details(record: dict[str, Any]) -> list[str]:
    """What a report says of a likelihood beyond bits per unit."""
    error = record["standard_error_perplexity"]
    shown = "unknown" if error is None else f"{error:.3f}"
    return [f"  perplexity per token {record['perplexity']:.3f} ± {shown}"]


def generator(config: ConfigDict, dataset: data.Dataset, apply_fn: Callable) -> Callable:
    """``generate(params, key, canvas, documents) -> tokens`` with the configured sampler."""
    c = config.sample
    filters = [samplers.temperature(c.temperature)]
    filters += [samplers.top_k(c.top_k)] if c.top_k else []
    filters += [samplers.top_p(c.top_p)] if c.top_p < 1 else []
    sampler = lookup(SAMPLERS, c.sampler, "sample.sampler")(samplers.compose(*filters))
    levels = None if c.sampler == "first_hitting" else grid(config)
    return samplers.make_generator(apply_fn, sampler, levels, mask_id=dataset.mask_id)


def grid(config: ConfigDict):
    """Levels of a sampler that steps along a grid."""
    c = config.sample
    if c.grid == _OWN_GRID:
        return schedules.grids.uniform_masking_rate(c.num_steps)
    chosen = schedule(config, c.grid, "sample.grid", (_OWN_GRID,))
    return schedules.grids.open_ends(schedules.grids.from_schedule(chosen, c.num_steps))


def schedule(
    config: ConfigDict, name: str, field: str, others: tuple[str, ...] = ()
) -> schedules.MaskedSchedule:
    """A masked schedule by name, with its settings; ``others`` are named in an error too."""
    if name not in schedules.GAUSSIAN_SCHEDULES:  # those are answered with where they live
        lookup(dict.fromkeys((*schedules.MASKED_SCHEDULES, *others)), name, field)
    try:
        return schedules.masked.by_name(name, **settings(config.law, name))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
