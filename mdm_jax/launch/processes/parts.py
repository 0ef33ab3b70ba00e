"""Parts of the families of tokens: network, corruption, weighting, grids, samplers by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from mdm_jax import corruption, data, hub, likelihood, models, objectives, samplers, schedules
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup, settings
from mdm_jax.models import masks
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import grids
from mdm_jax.types import Array

Generate = Callable[..., Array]
Watch = tuple[samplers.Show, bool] | None


def coupling(config: ConfigDict) -> dict[str, str]:
    """``evaluate.levels`` and ``evaluate.masks``, where they are not the process's own."""
    return {name: config.evaluate[name] for name in ("levels", "masks") if config.evaluate[name]}


def design(config: ConfigDict, passes: int) -> likelihood.SubsetDesign:
    return likelihood.counts(passes, **coupling(config))


def evaluation_by(
    estimator: Callable[[int, int], likelihood.Estimator],
) -> Callable[[int, int], Callable[..., likelihood.Likelihood]]:
    return lambda passes, replicates: likelihood.make_evaluate(
        estimator(passes, replicates), replicates
    )


def body(config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None) -> nn.Module:
    """The network of a run: that of its source, or the configured transformer."""
    if source is not None:
        return source.model
    return models.Transformer(network(dataset.vocab_size, **config.model))


def network(
    vocab_size: int,
    *,
    source: str,
    patch_size: int,
    logits_at: str,
    dtype: str,
    param_dtype: str,
    **shape: Any,
) -> models.TransformerConfig:
    del source, patch_size, logits_at
    return models.TransformerConfig(
        vocab_size=vocab_size,
        dtype=lookup(names.DTYPES, dtype, "model.dtype"),
        param_dtype=lookup(names.DTYPES, param_dtype, "model.param_dtype"),
        **shape,
    )


def annealed(
    steps: int, with_mask: Callable[[models.MaskChange], Callable[..., Array | models.Readout]]
) -> Callable[[Array, Array], Callable[..., Array | models.Readout]] | None:
    """``Family.annealed``: of the later tokens the share step / steps is visible; None without."""
    if not steps:
        return None
    return lambda key, step: with_mask(
        lambda rule, positions: masks.annealed(rule, positions, step / steps, key)
    )


def placed(config: ConfigDict, mesh: jax.sharding.Mesh) -> ConfigDict:
    """A copy with the axes of ``mesh`` as numbers, as families read them; -1 stays in the run's."""
    config = config.copy_and_resolve_references()
    config.mesh.update(mesh.shape)
    return config


def make_chunking(logits_at: str, mesh: ConfigDict) -> models.Chunking | None:
    """Chunking of losses at target positions; None for logits of all positions.

    ``mesh`` in numbers (:func:`placed`): devices along its tensor axis hold the same rows.
    """
    if not lookup({"targets": True, "all": False}, logits_at, "model.logits_at"):
        return None
    return models.Chunking(mesh.data * mesh.fsdp)


def block_decoder(
    config: ConfigDict, dataset: data.Dataset, model: nn.Module
) -> models.BlockDecoder:
    """The cached decoder of a block model, which writes no absent tokens."""
    decoder = models.cached_block_decoder(model, config.block.size, config.block.window or None)
    return decoder._replace(logits=models.without_tokens(decoder.logits, dataset.absent_ids))


def make_corruption(
    name: str, section: Mapping[str, Any], dataset: data.Dataset
) -> corruption.Corruption:
    """A corruption by name; one with ``rare`` gets the rare tokens of the training rows."""
    factory = lookup(names.CORRUPTIONS, name, "corruption.name")
    own = settings(section, name)
    if "rare" in inspect.signature(factory).parameters:
        share = own.pop("rare_share")
        own["rare"] = data.rare_tokens(dataset.train, dataset.vocab_size, share)
    return factory(dataset.mask_id, **own)


def ids_before_mask(dataset: data.Dataset, reader: str) -> int:
    """How many real ids there are; ValueError if the mask token is not the last id."""
    if dataset.mask_id != dataset.vocab_size - 1:
        raise ValueError(
            f"{reader} needs a tokenizer whose mask token is the last of its {dataset.vocab_size} "
            f"ids, this one has id {dataset.mask_id}; choose process=masked or block without "
            "model.self_conditioning, or data.tokenizer=bpe"
        )
    return dataset.vocab_size - 1


def labelled(config: ConfigDict, objective: Objective) -> Objective:
    """The objective, "biased" where tokens of prompts are trained on too."""
    if not config.data.structural_prompt_tokens:
        return objective
    name = f"{objective.name}, structural prompt tokens"
    return objective._replace(name=name, bias="biased")


def finished(config: ConfigDict, dataset: data.Dataset, bound: Objective) -> Objective:
    """A bound with the configured weighting, clamp and self-conditioning."""
    bound = labelled(config, bound)
    if config.model.self_conditioning:
        ids = ids_before_mask(dataset, "model.self_conditioning")
        bound = objectives.self_conditioned(bound, ids)
    name, clamp = config.weighting.name, config.weighting.clamp
    if name:
        factory = lookup(names.WEIGHTINGS, name, "weighting.name")
        own = settings(config.weighting, name)
        if "law" in inspect.signature(factory).parameters:
            own["law"] = bound.law
        factor = factory(**own)
        bound = objectives.reweighted(bound, factor, name)
    return objectives.clamped(bound, clamp) if clamp else bound


def masked_schedule(
    name: str, section: Mapping[str, Any], field: str, others: tuple[str, ...] = ()
) -> schedules.MaskedSchedule:
    """A masked schedule by name, with its settings; ``others`` are named in an error too."""
    if name in names.GAUSSIAN_LAWS and name not in names.LAWS:
        raise ValueError(
            f"{field}: {name!r} is a Gaussian schedule, gaussian.schedules.{name}; masked ones are "
            f"{', '.join(sorted(names.LAWS))}"
        )
    factory = lookup({**names.LAWS, **dict.fromkeys(others)}, name, field)
    try:
        return factory(**settings(section, name))
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def masked_sampler(
    config: ConfigDict, dataset: data.Dataset
) -> tuple[samplers.Sampler, Callable[[str, int], Array]]:
    """Configured sampler, with its filters and denoiser wrappers, and levels of grids by name."""
    c = config.sample
    levels = levels_by_name(config)  # checks the grid even where the sampler takes no steps
    sampler = lookup(names.SAMPLERS, c.sampler, "sample.sampler")(
        token_filter=token_filters(c), **settings(c, c.sampler)
    )
    wrappers = [samplers.prompt_guidance(c.guidance)] if c.guidance else []
    wrappers += [samplers.no_repeat_ngrams(c.no_repeat_ngrams)] if c.no_repeat_ngrams else []
    sampler = samplers.wrapped(sampler, *wrappers) if wrappers else sampler
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, dataset.vocab_size - 1, dataset.vocab_size)
    return sampler, levels


def watched(sampler: samplers.Sampler, watch: Watch) -> samplers.Sampler:
    return sampler if watch is None else samplers.shown(sampler, *watch)


def refuse_approximate_cache(config: ConfigDict) -> None:
    if config.sample.approximate_cache:
        raise ValueError(
            f"sample.approximate_cache={config.sample.approximate_cache} is for process=masked: "
            "block and autoregressive models have an exact cache, others none"
        )


def refuse_guidance(config: ConfigDict) -> None:
    """Raise ValueError for ``sample.guidance`` in a process whose sampler does not read it."""
    if config.sample.guidance not in (0.0, 1.0):
        raise ValueError(
            f"process={config.process} does not read sample.guidance, got "
            f"{config.sample.guidance:g}; leave it at 0: masked, block and "
            "partition runs guide by given tokens, process=gaussian by class"
        )


def grid_samplers(section: Mapping[str, Any]) -> list[str]:
    """Names of the masked samplers that step along a grid of ``sample.num_steps`` levels."""
    return [
        name
        for name, factory in names.SAMPLERS.items()
        if factory(**settings(section, name)).num_steps is None
    ]


def token_filters(section: ConfigDict) -> samplers.LogitFilter:
    filters = [samplers.temperature(section.temperature)]
    filters += [samplers.top_k(section.top_k)] if section.top_k else []
    filters += [samplers.top_p(section.top_p)] if section.top_p < 1 else []
    return samplers.compose(*filters)


def levels_by_name(config: ConfigDict) -> Callable[[str, int], Array]:
    """``levels(grid, num_steps)`` of a grid of masking rates; ValueError for ``sample.grid``."""
    own = "uniform_masking_rate"

    def levels(grid: str, num_steps: int) -> Array:
        if grid in ("", own):
            return grids.uniform_masking_rate(num_steps)
        schedule = masked_schedule(grid, config.law, "sample.grid", (own,))
        return grids.open_ends(grids.from_schedule(schedule, num_steps))

    levels(config.sample.grid, 1)
    return levels


def token_rules(config: ConfigDict) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("uniform_masking_rate", config.law.name, "cosine_md4", "log")))
