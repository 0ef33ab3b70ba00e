"""Turns the config of a masked run into objects; ``config.process = "masked"``."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from mdm_jax import corruption, data, models, objectives, samplers, schedules
from mdm_jax import likelihood as mdm_jax_likelihood
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.launch.build import lookup, network, settings
from mdm_jax.schedules import grids, masked
from mdm_jax.types import Array

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
LEVEL = "masking rate"
"""Label of the noise axis of plots."""
UNREAD = ()
"""Sections whose ``name`` this process does not look at."""


def model(config: ConfigDict, dataset: data.Dataset) -> models.Transformer:
    """The network, from tokens to logits."""
    return models.Transformer(network(config, dataset.vocab_size))


def apply_fn(
    config: ConfigDict, model: models.Transformer, _dataset: data.Dataset
) -> Callable[..., Array | models.Readout]:
    """``apply_fn(params, inputs, logsnr, documents) -> logits``, or a readout of them."""
    chosen = chunking(config)
    return model.apply if chosen is None else models.readout_apply(model, chosen)


def chunking(config: ConfigDict) -> models.Chunking | None:
    """How losses go through the positions that they score; None for logits of all of them."""
    options = {"targets": True, "all": False}
    if not lookup(options, config.model.logits_at, "model.logits_at"):
        return None
    # Every device but those that share a layer has rows of its own.
    return models.Chunking(jax.device_count() // config.mesh.tensor)


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The masked bound with the configured process and law."""
    process = corruption_process(config, dataset)
    law = schedules.law_of(schedule(config, config.law.name, "law.name"))
    return finished(config, dataset, objectives.masked_nelbo(process, law))


def finished(
    config: ConfigDict, dataset: data.Dataset, bound: objectives.Objective
) -> objectives.Objective:
    """A bound with the configured weighting, and self-conditioning if the network takes it."""
    if config.model.self_conditioning:
        bound = objectives.self_conditioned(bound, dataset.vocab_size - 1)
    name = config.weighting.name
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
) -> Callable[..., mdm_jax_likelihood.Likelihood]:
    """The fixed estimator of the bound, whatever chain the run trains with."""
    return mdm_jax_likelihood.make_likelihood(
        apply_fn, dataset.mask_id, passes=passes, replicates=replicates
    )


def record(result: mdm_jax_likelihood.Likelihood) -> dict[str, Any]:
    """A likelihood as JSON values, under the names that all processes share."""
    found = result.to_dict()
    return found | {"nats_per_element": found["nats_per_token"]}


def details(record: dict[str, Any]) -> list[str]:
    """What a report says beyond bits per unit: perplexity, and accuracy where it was measured."""
    error = record["standard_error_perplexity"]
    shown = "unknown" if error is None else f"{error:.3f}"
    lines = [f"  perplexity per token {record['perplexity']:.3f} ± {shown}"]
    if "accuracy" in record:
        low, high = record["accuracy_interval"]
        lines.append(
            f"  accuracy {record['accuracy']:.3f} ± {record['standard_error_accuracy']:.3f} over "
            f"{record['answers']} prompts (95 % interval {low:.3f} to {high:.3f}), answered by "
            f"{record['answered_by']}"
        )
    return lines


def generator(
    config: ConfigDict, dataset: data.Dataset, _model: models.Transformer, apply_fn: Callable
) -> Callable:
    """``generate(params, key, canvas, documents) -> tokens`` with the configured sampler."""
    chosen = sampler(config)
    if config.model.self_conditioning:
        chosen = samplers.self_conditioned(chosen, dataset.vocab_size - 1, dataset.vocab_size)
    return samplers.make_generator(
        apply_fn, chosen, grid_of(config, chosen), mask_id=dataset.mask_id
    )


def sampler(config: ConfigDict) -> samplers.Sampler:
    """The configured sampler, with its filters and whatever stands between it and the network."""
    c = config.sample
    factory = lookup(SAMPLERS, c.sampler, "sample.sampler")
    chosen = factory(token_filter=token_filter(config), **settings(c, c.sampler))
    wrappers = [samplers.prompt_guidance(c.guidance)] if c.guidance else []
    wrappers += [samplers.no_repeat_ngrams(c.no_repeat_ngrams)] if c.no_repeat_ngrams else []
    return samplers.wrapped(chosen, *wrappers) if wrappers else chosen


def grid_samplers(sample: ConfigDict) -> list[str]:
    """Names of the samplers that step along a grid of ``sample.num_steps`` levels."""
    return [
        name
        for name, factory in SAMPLERS.items()
        if factory(**settings(sample, name)).num_steps is None
    ]


def token_filter(config: ConfigDict) -> samplers.LogitFilter:
    """Temperature, top-k and nucleus, in this order."""
    c = config.sample
    filters = [samplers.temperature(c.temperature)]
    filters += [samplers.top_k(c.top_k)] if c.top_k else []
    filters += [samplers.top_p(c.top_p)] if c.top_p < 1 else []
    return samplers.compose(*filters)


def grid_of(config: ConfigDict, chosen: samplers.Sampler):
    """Levels for a sampler, None for one that sets its own."""
    return None if chosen.num_steps is not None else grid(config)


def grid(config: ConfigDict):
    """Levels of a sampler that steps along a grid."""
    c = config.sample
    if c.grid == _OWN_GRID:
        return grids.uniform_masking_rate(c.num_steps)
    chosen = schedule(config, c.grid, "sample.grid", (_OWN_GRID,))
    return grids.open_ends(grids.from_schedule(chosen, c.num_steps))


def schedule(
    config: ConfigDict, name: str, field: str, others: tuple[str, ...] = ()
) -> schedules.MaskedSchedule:
    """A masked schedule by name, with its settings; ``others`` are named in an error too."""
    if name not in gaussian_schedules.GAUSSIAN_SCHEDULES:  # those are answered with where they live
        lookup(dict.fromkeys((*schedules.MASKED_SCHEDULES, *others)), name, field)
    try:
        return masked.by_name(name, **settings(config.law, name))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
