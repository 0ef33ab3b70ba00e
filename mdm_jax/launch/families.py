"""What depends on the process: masked, block, uniform, autoregressive or gaussian."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import (
    corruption,
    data,
    distributed,
    gaussian,
    likelihood,
    models,
    objectives,
    samplers,
    schedules,
)
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.recipes import Recipe
from mdm_jax.gaussian.samplers import spacings
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup, settings
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import grids
from mdm_jax.types import Array

Record = dict[str, Any]


def token_record(result: likelihood.Likelihood) -> Record:
    """A likelihood of tokens as JSON values, under the names that all processes share."""
    record = result.to_dict()
    return record | {"nats_per_element": record["nats_per_token"]}


def token_details(record: Record) -> list[str]:
    """Report lines: perplexity, and accuracy where it was measured."""
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


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """The objects of a run that depend on its process.

    Attributes:
        apply_fn: ``apply_fn(params, inputs, logsnr, documents)``, as objectives call it.
        likelihood: ``likelihood(passes, replicates)``, the fixed estimator of the bound,
            independent of the training chain; exact for autoregressive models.
        generator: ``generator(num_steps)`` makes ``generate(params, key, canvas, documents)``;
            ``num_steps`` is ignored unless the sampler ``takes_steps``.
        levels_from: the law or recipe of the noise levels, for display.
        noise_axis: label of the noise axis of plots; "" without noise.
        unread: sections of the config whose ``name`` this process does not read.
        with_corruption: the objective under another corruption by name, where there are several.
        record, details: a likelihood as JSON values; report lines about these.
    """

    objective: Objective
    model: nn.Module
    apply_fn: Callable[..., Array | models.Readout]
    likelihood: Callable[[int, int], Callable[..., Any]]
    generator: Callable[[int], Callable[..., Any]]
    takes_steps: bool
    levels_from: str
    noise_axis: str
    unread: tuple[str, ...] = ()
    with_corruption: Callable[[str], Objective] | None = None
    input_dtype: Any = jnp.int32
    record: Callable[[Any], Record] = token_record
    details: Callable[[Record], list[str]] = token_details


def masked(config: ConfigDict, dataset: data.Dataset) -> Family:
    """Masked diffusion with the configured corruption, law and weighting."""
    law = schedules.law_of(masked_schedule(config.law.name, config.law, "law.name"))

    def with_corruption(name: str) -> Objective:
        process = _corruption(name, config.corruption, dataset)
        return _finished(config, dataset, objectives.masked_nelbo(process, law))

    model = models.Transformer(_network(dataset.vocab_size, **config.model))
    chunking = _chunking(config.model.logits_at, config.mesh.tensor)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    sampler, levels_of = _masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int) -> Callable[..., Array]:
        levels = levels_of(num_steps) if takes_steps else None
        network = models.without_tokens(apply_fn, dataset.absent_ids)
        return samplers.make_generator(network, sampler, levels, mask_id=dataset.mask_id)

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=lambda passes, replicates: likelihood.make_likelihood(
            apply_fn, dataset.mask_id, passes=passes, replicates=replicates
        ),
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        with_corruption=with_corruption,
    )


def block(config: ConfigDict, dataset: data.Dataset) -> Family:
    """Block diffusion, from a masked run if ``train.init_from`` names one; size divides the row."""
    size, length, window = config.block.size, dataset.length, config.block.window or None
    if size < 1 or length % size:
        raise ValueError(
            f"block.size must divide a row of {length} tokens, got {size}; choose a divisor, or "
            "another data.length"
        )
    data.check_document_blocks(dataset, size)
    law = schedules.law_of(masked_schedule(config.law.name, config.law, "law.name"))

    def with_corruption(name: str) -> Objective:
        process = _corruption(name, config.corruption, dataset)
        return _finished(config, dataset, objectives.block_nelbo(process, size, law))

    model = models.Transformer(_network(dataset.vocab_size, **config.model))
    chunking = _chunking(config.model.logits_at, config.mesh.tensor)
    apply_fn = models.block_apply(model, size, window, chunking)
    sampler, levels_of = _masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int) -> Callable[..., Array]:
        levels = levels_of(num_steps) if takes_steps else None
        decoder = models.cached_block_decoder(model, size, window)
        logits = models.without_tokens(decoder.logits, dataset.absent_ids)
        return samplers.make_block_generator(
            decoder._replace(logits=logits),
            sampler,
            levels,
            mask_id=dataset.mask_id,
            guided=bool(config.sample.guidance),
        )

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=lambda passes, replicates: likelihood.make_block_likelihood(
            apply_fn, dataset.mask_id, size, passes=passes, replicates=replicates
        ),
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        with_corruption=with_corruption,
    )


def uniform(config: ConfigDict, dataset: data.Dataset) -> Family:
    """Uniform-token diffusion over all ids but the mask token, which is the last one."""
    num_tokens, c = dataset.vocab_size - 1, config.sample
    law = schedules.law_of(masked_schedule(config.law.name, config.law, "law.name"))
    model = models.Transformer(_network(dataset.vocab_size, **config.model))
    chunking = _chunking(config.model.logits_at, config.mesh.tensor)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    sampler = lookup(names.UNIFORM_SAMPLERS, c.sampler, "sample.sampler")(
        num_tokens,
        token_filter=_token_filter(c.temperature, c.top_k, c.top_p),
        **settings(c, c.sampler),
    )
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, num_tokens, dataset.vocab_size)

    levels_of = masked_grid(c.grid, config.law)

    def generator(num_steps: int) -> Callable[..., Array]:
        levels = levels_of(num_steps)
        network = models.without_tokens(model.apply, dataset.absent_ids)
        return samplers.make_generator(network, sampler, levels, mask_id=dataset.mask_id)

    return Family(
        objective=_finished(config, dataset, objectives.uniform_nelbo(num_tokens, law)),
        model=model,
        apply_fn=apply_fn,
        likelihood=lambda passes, replicates: likelihood.make_uniform_likelihood(
            apply_fn, num_tokens, passes=passes, replicates=replicates
        ),
        generator=generator,
        takes_steps=True,
        levels_from=f"law {config.law.name}",
        noise_axis="replacement rate",
        unread=("corruption",),
    )


def autoregressive(config: ConfigDict, dataset: data.Dataset) -> Family:
    """Baseline: the same network under a causal mask; ValueError for settings about noise."""
    if config.variance.order:
        raise ValueError(
            "process=autoregressive has no noise to couple or warp: "
            f'--config.variance.order="()" instead of {config.variance.order}'
        )
    if config.model.self_conditioning:
        raise ValueError("process=autoregressive does not take model.self_conditioning")
    c, mask_id = config.sample, dataset.mask_id
    model = models.Transformer(_network(dataset.vocab_size, **config.model))
    chunking = _chunking(config.model.logits_at, config.mesh.tensor)
    apply_fn = models.causal_apply(model, mask_id, chunking=chunking)
    decoder = models.cached_causal_decoder(model, mask_id)
    token_filter = samplers.compose(
        lambda logits: models.exclude_token(logits, *dataset.absent_ids),
        _token_filter(c.temperature, c.top_k, c.top_p),
    )
    return Family(
        objective=objectives.next_token(mask_id),
        model=model,
        apply_fn=apply_fn,
        likelihood=lambda _passes, _replicates: likelihood.make_next_token_likelihood(
            apply_fn, mask_id
        ),
        generator=lambda _num_steps: samplers.make_next_token_generator(
            decoder, mask_id=mask_id, token_filter=token_filter
        ),
        takes_steps=False,
        levels_from="no noise",
        noise_axis="",
        unread=("corruption", "law", "weighting"),
    )


def gaussian_family(config: ConfigDict, dataset: data.Dataset) -> Family:
    """Gaussian diffusion of pictures by recipe; ValueError for text or self-conditioning."""
    if dataset.event_shape is None:
        raise ValueError(
            'process="gaussian" needs pictures (data.source=digits, or tfds with kind=image); for '
            'text use process="masked"'
        )
    if config.model.self_conditioning:
        raise ValueError("process=gaussian does not take model.self_conditioning")
    c, g = config.sample, config.gaussian
    recipe = gaussian_recipe(g)
    num_values = dataset.vocab_size - 1  # without the mask
    values = gaussian.scaled_integers(num_values)
    model = gaussian.PictureTransformer(
        _network(1, **config.model), dataset.event_shape, config.model.patch_size
    )
    sampler = lookup(names.GAUSSIAN_SAMPLERS, c.sampler, "sample.sampler")(**settings(c, c.sampler))

    def apply_fn(params, inputs, logsnr, documents=None):
        """The recipe's output, from inputs scaled to unit variance."""
        scaled = gaussian.precondition(
            lambda x, level, _documents: model.apply(params, x, level), recipe.path, g.sigma_data
        )
        return scaled(inputs, logsnr, documents)

    def likelihood_of(passes: int, replicates: int) -> Callable[..., gaussian.GaussianLikelihood]:
        return gaussian.make_gaussian_likelihood(
            apply_fn,
            output=recipe.output,
            path=recipe.path,
            decoder=gaussian.grey_value_decoder(num_values),
            low=g.low,
            high=g.high,
            passes=passes,
            replicates=replicates,
            values=values,
        )

    def generator(num_steps: int) -> Callable[..., np.ndarray]:
        draw = gaussian_samplers.make_gaussian_generator(
            apply_fn,
            sampler,
            _gaussian_levels(c.grid, num_steps, g),
            (dataset.length,),
            output=recipe.output,
            path=recipe.path,
            data_std=g.sigma_data,
        )
        top = num_values - 1

        def generate(params, key, canvas, documents=None):
            """Grey values, of the canvas's shape."""
            del documents
            pictures = distributed.to_host(draw(params, key, len(canvas)))
            return np.clip(np.round((pictures + 1) * top / 2), 0, top).astype(np.int32)

        return generate

    return Family(
        objective=gaussian.gaussian_loss(recipe, values),
        model=model,
        apply_fn=apply_fn,
        likelihood=likelihood_of,
        generator=generator,
        takes_steps=True,
        levels_from=f"recipe {g.recipe}" + (f", law {g.law}" if g.law else ""),
        noise_axis="sigmoid(-logSNR)",
        unread=("corruption", "law", "weighting"),
        input_dtype=jnp.float32,
        record=_gaussian_record,
        details=_gaussian_details,
    )


FAMILIES = {
    "masked": masked,
    "block": block,
    "uniform": uniform,
    "autoregressive": autoregressive,
    "gaussian": gaussian_family,
}
"""Value of ``config.process`` -> what builds its family."""


# --- parts of the families of tokens --------------------------------------------------------------


def _network(
    vocab_size: int, *, patch_size: int, logits_at: str, dtype: str, param_dtype: str, **shape: Any
) -> models.TransformerConfig:
    del patch_size, logits_at
    return models.TransformerConfig(
        vocab_size=vocab_size,
        dtype=lookup(names.DTYPES, dtype, "model.dtype"),
        param_dtype=lookup(names.DTYPES, param_dtype, "model.param_dtype"),
        **shape,
    )


def _chunking(logits_at: str, tensor: int) -> models.Chunking | None:
    """Chunking of losses at target positions; None for logits of all positions."""
    if not lookup({"targets": True, "all": False}, logits_at, "model.logits_at"):
        return None
    # All devices hold different rows, except along the tensor axis.
    return models.Chunking(jax.device_count() // tensor)


def _corruption(
    name: str, section: Mapping[str, Any], dataset: data.Dataset
) -> corruption.Corruption:
    """A corruption by name; one with ``rare`` gets the rare tokens of the training rows."""
    factory = lookup(names.CORRUPTIONS, name, "corruption.name")
    own = settings(section, name)
    if "rare" in inspect.signature(factory).parameters:
        share = own.pop("rare_share")
        own["rare"] = data.rare_tokens(dataset.train, dataset.vocab_size, share)
    return factory(dataset.mask_id, **own)


def _finished(config: ConfigDict, dataset: data.Dataset, bound: Objective) -> Objective:
    """A bound with the configured weighting and self-conditioning."""
    if config.model.self_conditioning:
        bound = objectives.self_conditioned(bound, dataset.vocab_size - 1)
    name = config.weighting.name
    if not name:
        return bound
    factor = lookup(names.WEIGHTINGS, name, "weighting.name")(**settings(config.weighting, name))
    return objectives.reweighted(bound, factor, name)


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


def _masked_sampler(
    config: ConfigDict, dataset: data.Dataset
) -> tuple[samplers.Sampler, Callable[[int], Array]]:
    """Configured sampler, with its filters and denoiser wrappers, and grid by number of steps."""
    c = config.sample
    levels = masked_grid(c.grid, config.law)  # checked even where the sampler takes no steps
    sampler = lookup(names.SAMPLERS, c.sampler, "sample.sampler")(
        token_filter=_token_filter(c.temperature, c.top_k, c.top_p), **settings(c, c.sampler)
    )
    wrappers = [samplers.prompt_guidance(c.guidance)] if c.guidance else []
    wrappers += [samplers.no_repeat_ngrams(c.no_repeat_ngrams)] if c.no_repeat_ngrams else []
    sampler = samplers.wrapped(sampler, *wrappers) if wrappers else sampler
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, dataset.vocab_size - 1, dataset.vocab_size)
    return sampler, levels


def grid_samplers(section: Mapping[str, Any]) -> list[str]:
    """Names of the masked samplers that step along a grid of ``sample.num_steps`` levels."""
    return [
        name
        for name, factory in names.SAMPLERS.items()
        if factory(**settings(section, name)).num_steps is None
    ]


def _token_filter(temperature: float, top_k: int, top_p: float) -> samplers.LogitFilter:
    filters = [samplers.temperature(temperature)]
    filters += [samplers.top_k(top_k)] if top_k else []
    filters += [samplers.top_p(top_p)] if top_p < 1 else []
    return samplers.compose(*filters)


def masked_grid(grid: str, section: Mapping[str, Any]) -> Callable[[int], Array]:
    """Levels of a grid of masking rates by number of steps; ``section`` has schedules' settings."""
    own = "uniform_masking_rate"
    if grid == own:
        return grids.uniform_masking_rate
    schedule = masked_schedule(grid, section, "sample.grid", (own,))
    return lambda num_steps: grids.open_ends(grids.from_schedule(schedule, num_steps))


# --- parts of the Gaussian family -----------------------------------------------------------------


def gaussian_recipe(section: Mapping[str, Any]) -> Recipe:
    """Configured recipe, with law ``gaussian.law`` if set, truncated to the run's logSNR range."""
    name, law = section["recipe"], section["law"]
    recipe = lookup(names.RECIPES, name, "gaussian.recipe")(**settings(section, name))
    law = _gaussian_law(law, section, "gaussian.law") if law else recipe.law
    return dataclasses.replace(recipe, law=_truncated(law, section["low"], section["high"]))


def _gaussian_levels(grid: str, num_steps: int, section: Mapping[str, Any]) -> np.ndarray | Array:
    """Levels of the sampler, ending in the denoiser's estimate."""
    low, high = section["low"], section["high"]
    if grid == "edm":
        return spacings.edm(num_steps, np.exp(-high / 2), np.exp(-low / 2))
    if grid == "uniform_logsnr":
        levels = spacings.uniform_logsnr(num_steps, low, high)
    else:
        law = _gaussian_law(grid, section, "sample.grid", ("uniform_logsnr", "edm"))
        levels = spacings.uniform_time(_truncated(law, low, high), num_steps)
    return np.append(np.asarray(levels)[:-1], np.inf)


def _gaussian_law(
    name: str, section: Mapping[str, Any], field: str, others: tuple[str, ...] = ()
) -> schedules.Law:
    if name not in names.LAWS or name in names.GAUSSIAN_LAWS:
        lookup(dict.fromkeys((*names.GAUSSIAN_LAWS, *others)), name, field)
    try:
        return gaussian_schedules.by_name(name, **settings(section, name))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{field}: {error}") from error


def _truncated(law: schedules.Law, low: float, high: float) -> schedules.Law:
    """The law, truncated to [low, high] where it reaches further."""
    first, last = (float(end) for end in law.support)
    if first >= low and last <= high:
        return law
    return gaussian_schedules.truncated(law, max(low, first), min(high, last))


def _gaussian_record(result: gaussian.GaussianLikelihood) -> Record:
    """As :func:`token_record`, for pictures."""
    shared = {
        "nats_per_element": "nats_per_dimension",
        "bits_per_unit": "bits_per_dimension",
        "standard_error_bits_per_unit": "standard_error_bits_per_dimension",
        "data_standard_error_bits_per_unit": "data_standard_error_bits_per_dimension",
    }
    record = result.to_dict()
    return record | {name: record[own] for name, own in shared.items()}


def _gaussian_details(record: Record) -> list[str]:
    parts = record["parts_bits_per_dimension"]
    errors = record["standard_error_parts_bits_per_dimension"]
    terms = (f"{name} {value:.3f} ± {errors[name] or 0:.3f}" for name, value in parts.items())
    return ["  of which " + ", ".join(terms)]
