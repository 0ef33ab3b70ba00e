"""What depends on the process; processes of tokens: masked, block, uniform, autoregressive."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import corruption, data, hub, likelihood, models, objectives, samplers, schedules
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup, settings
from mdm_jax.likelihood.stopping import narrow
from mdm_jax.models import masks
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import grids
from mdm_jax.types import Array

Record = dict[str, Any]
Generate = Callable[..., Array]
Watch = tuple[samplers.Show, bool] | None


def token_record(result: likelihood.Likelihood) -> Record:
    """A likelihood of tokens as JSON values, under the names that all processes share."""
    record = result.to_dict()
    shared = ("nats_per_{}", "standard_error_nats_per_{}")
    return record | {n.format("element"): record[n.format("token")] for n in shared}


def token_details(record: Record) -> list[str]:
    """Report lines: perplexity, and accuracy where it was measured."""
    error = record["standard_error_perplexity"]
    shown = "" if error == 0 else " ± unknown" if error is None else f" ± {error:.3f}"
    lines = [f"  perplexity per token {record['perplexity']:.3f}{shown}"]
    if "audit" in record:
        lines.insert(0, f"  {likelihood.audit_line(record['audit'])}")
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
        likelihood: ``likelihood(passes, replicates)``, by a fixed estimator: bound, or exact value.
        estimator: ``estimator(passes, replicates)``, that estimator; None for Gaussian diffusion.
        generator: ``generator(num_steps, levels=None, watch=None)`` makes ``generate(params, key,
            canvas, documents=None, row_offset=0)``; the first two are ignored unless the sampler
            ``takes_steps``. ``watch``: (show, ordered) of ``samplers.shown``.
        levels: ``levels(grid, num_steps)``, a sampling grid by name, "" for the process's own; None
            without noise.
        rules: names of grids that ``mdm spacing`` compares.
        follows_warp: whether, by default, samplers take the levels that training learned.
        levels_from, noise_axis: the law, for display; label of plots, "" without noise.
        unread: sections of the config whose ``name`` this process does not read.
        annealed: ``annealed(key, step) -> apply_fn`` of a training step, where it is another.
        degraded: ``degraded(key, canvas)``, what ``generate`` restores; None where it samples.
        with_corruption: the objective under another corruption by name, where there are several.
        record, details: a likelihood as JSON values; report lines about these.
    """

    objective: Objective
    model: nn.Module
    apply_fn: Callable[..., Array | models.Readout]
    likelihood: Callable[[int, int], Callable[..., Any]]
    generator: Callable[..., Callable[..., Any]]
    takes_steps: bool
    levels_from: str
    noise_axis: str
    estimator: Callable[[int, int], likelihood.Estimator] | None = None
    levels: Callable[[str, int], Array] | None = None
    rules: tuple[str, ...] = ()
    follows_warp: bool = False
    unread: tuple[str, ...] = ()
    annealed: Callable[[Array, Array], Callable[..., Array | models.Readout]] | None = None
    degraded: Callable[..., np.ndarray] | None = None
    with_corruption: Callable[[str], Objective] | None = None
    input_dtype: Any = jnp.int32
    record: Callable[[Any], Record] = token_record
    details: Callable[[Record], list[str]] = token_details


def masked(config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None) -> Family:
    """Masked diffusion with the configured corruption, law and weighting."""
    law = schedules.law_of(masked_schedule(config.law.name, config.law, "law.name"))

    def with_corruption(name: str) -> Objective:
        process = _corruption(name, config.corruption, dataset)
        return _finished(config, dataset, objectives.masked_nelbo(process, law))

    model = body(config, dataset, source)
    chunking = make_chunking(config.model.logits_at, **config.mesh)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    shifted = source is not None and source.traits.shift
    if shifted:
        apply_fn = models.shifted_apply(apply_fn)

    def with_mask(change: models.MaskChange) -> Callable[..., Array | models.Readout]:
        changed = models.masked_apply(model, change, chunking)
        return models.shifted_apply(changed) if shifted else changed

    sampler, named_levels = masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if not takes_steps:
            levels = None
        elif levels is None:
            levels = named_levels(config.sample.grid, num_steps)
        watched = _watched(sampler, watch)
        if kind := config.sample.approximate_cache:
            decoder = models.partial_decoder(model, shift=shifted)
            readout = models.without_tokens(decoder.readout, dataset.absent_ids)
            cache = samplers.ApproximateCache(kind, config.sample.cache_refresh or None)
            return samplers.make_cached_generator(
                decoder._replace(readout=readout), watched, cache, levels, mask_id=dataset.mask_id
            )
        network = models.without_tokens(apply_fn, dataset.absent_ids)
        return samplers.make_generator(network, watched, levels, mask_id=dataset.mask_id)

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        return likelihood.masked_estimator(apply_fn, dataset.mask_id, _design(config, passes))

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        levels=named_levels,
        rules=_token_rules(config),
        annealed=_annealed(config.convert.anneal_steps, with_mask),
        with_corruption=with_corruption,
    )


def block(config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None) -> Family:
    """Block diffusion, from a masked run if ``train.init_from`` names one; size divides the row."""
    size, length, window = config.block.size, dataset.length, config.block.window or None
    _refuse_approximate_cache(config)
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

    model = body(config, dataset, source)
    chunking = make_chunking(config.model.logits_at, **config.mesh)
    apply_fn = models.block_apply(model, size, window, chunking)
    with_mask = functools.partial(models.block_apply, model, size, window, chunking)
    sampler, named_levels = masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if not takes_steps:
            levels = None
        elif levels is None:
            levels = named_levels(config.sample.grid, num_steps)
        decoder = models.cached_block_decoder(model, size, window)
        logits = models.without_tokens(decoder.logits, dataset.absent_ids)
        return samplers.make_block_generator(
            decoder._replace(logits=logits),
            _watched(sampler, watch),
            levels,
            mask_id=dataset.mask_id,
            guided=bool(config.sample.guidance),
        )

    def estimator(passes: int, replicates: int) -> likelihood.Estimator:
        design = likelihood.block_design(_design(config, passes), size, replicates)
        return likelihood.masked_estimator(apply_fn, dataset.mask_id, design, size)

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        levels=named_levels,
        rules=_token_rules(config),
        annealed=_annealed(config.convert.anneal_steps, with_mask),
        with_corruption=with_corruption,
    )


def uniform(
    config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None
) -> Family:
    """Uniform-token diffusion over all ids but the mask token, which must be the last one."""
    num_tokens, c = _ids_before_mask(dataset, "process=uniform"), config.sample
    _refuse_approximate_cache(config)
    law = schedules.law_of(masked_schedule(config.law.name, config.law, "law.name"))
    model = body(config, dataset, source)
    chunking = make_chunking(config.model.logits_at, **config.mesh)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    sampler = lookup(names.UNIFORM_SAMPLERS, c.sampler, "sample.sampler")(
        num_tokens, token_filter=token_filters(c), **settings(c, c.sampler)
    )
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, num_tokens, dataset.vocab_size)

    named_levels = _levels_by_name(config)

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        levels = named_levels(c.grid, num_steps) if levels is None else levels
        network = models.without_tokens(model.apply, dataset.absent_ids)
        watched = _watched(sampler, watch)
        return samplers.make_generator(network, watched, levels, mask_id=dataset.mask_id)

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        return likelihood.uniform_estimator(apply_fn, num_tokens, passes, **_coupling(config))

    return Family(
        objective=_finished(config, dataset, objectives.uniform_nelbo(num_tokens, law)),
        model=model,
        apply_fn=apply_fn,
        likelihood=evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=True,
        levels_from=f"law {config.law.name}",
        noise_axis="replacement rate",
        levels=named_levels,
        rules=_token_rules(config),
        unread=("corruption",),
    )


def autoregressive(
    config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None
) -> Family:
    """Baseline: the same network under a causal mask; ValueError for settings about noise."""
    if config.variance.order:
        raise ValueError(
            "process=autoregressive has no noise to couple or warp: "
            f'--config.variance.order="()" instead of {config.variance.order}'
        )
    if config.model.self_conditioning:
        raise ValueError("process=autoregressive does not take model.self_conditioning")
    _refuse_approximate_cache(config)
    c, mask_id = config.sample, dataset.mask_id
    model = body(config, dataset, source)
    chunking = make_chunking(config.model.logits_at, **config.mesh)
    start = mask_id if source is None or source.tokenizer is None else source.tokenizer.bos_id
    apply_fn = models.causal_apply(model, start, chunking=chunking)
    decoder = models.cached_causal_decoder(model, start)
    token_filter = samplers.compose(
        lambda logits: models.exclude_token(logits, *dataset.absent_ids), token_filters(c)
    )

    def generator(_num_steps: int, _levels: Any = None, watch: Watch = None) -> Generate:
        shown = dict(zip(("show", "ordered"), watch or ()))
        options = {"mask_id": mask_id, "token_filter": token_filter, **shown}
        return samplers.make_next_token_generator(decoder, **options)

    return Family(
        objective=objectives.next_token(mask_id),
        model=model,
        apply_fn=apply_fn,
        likelihood=lambda _passes, _replicates: likelihood.make_next_token_likelihood(
            apply_fn, mask_id
        ),
        estimator=lambda _passes, _replicates: likelihood.next_token_estimator(apply_fn, mask_id),
        generator=generator,
        takes_steps=False,
        levels_from="no noise",
        noise_axis="",
        unread=("corruption", "law", "weighting"),
    )


TOKEN_FAMILIES = {
    "masked": masked,
    "block": block,
    "uniform": uniform,
    "autoregressive": autoregressive,
}
"""Value of ``config.process`` -> what builds its family, for processes of tokens."""


# --- parts of the families of tokens --------------------------------------------------------------


def final_likelihood(
    family: Family, *, final_passes: int, final_replicates: int, width: float, **_rest: Any
) -> Callable[..., Any]:
    """The evaluation that ends a run; ValueError for a width that this process cannot have."""
    if not width:
        return family.likelihood(final_passes, final_replicates)
    if family.estimator is None or final_replicates < 2:
        raise ValueError(
            f"evaluate.width={width} takes a process of tokens and two or more "
            f"evaluate.final_replicates, got {final_replicates}; leave it at 0"
        )
    stop = narrow(final_replicates, width)
    return likelihood.evaluate_until(family.estimator(final_passes, final_replicates), stop)


def _coupling(config: ConfigDict) -> dict[str, str]:
    """``evaluate.levels`` and ``evaluate.masks``, where they are not the process's own."""
    return {name: config.evaluate[name] for name in ("levels", "masks") if config.evaluate[name]}


def _design(config: ConfigDict, passes: int) -> likelihood.SubsetDesign:
    return likelihood.counts(passes, **_coupling(config))


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


def _annealed(
    steps: int, with_mask: Callable[[models.MaskChange], Callable[..., Array | models.Readout]]
) -> Callable[[Array, Array], Callable[..., Array | models.Readout]] | None:
    """``Family.annealed``: of the later tokens the share step / steps is visible; None without."""
    if not steps:
        return None
    return lambda key, step: with_mask(
        lambda rule, positions: masks.annealed(rule, positions, step / steps, key)
    )


def make_chunking(logits_at: str, data: int, fsdp: int, tensor: int) -> models.Chunking | None:
    """Chunking of losses at target positions; None for logits of all positions."""
    if not lookup({"targets": True, "all": False}, logits_at, "model.logits_at"):
        return None
    # All devices hold different rows, except along the tensor axis.
    return models.Chunking(data * fsdp if data > 0 else jax.device_count() // tensor)


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


def _ids_before_mask(dataset: data.Dataset, reader: str) -> int:
    """How many real ids there are; ValueError if the mask token is not the last id."""
    if dataset.mask_id != dataset.vocab_size - 1:
        raise ValueError(
            f"{reader} needs a tokenizer whose mask token is the last of its {dataset.vocab_size} "
            f"ids, this one has id {dataset.mask_id}; choose process=masked or block without "
            "model.self_conditioning, or data.tokenizer=bpe"
        )
    return dataset.vocab_size - 1


def _finished(config: ConfigDict, dataset: data.Dataset, bound: Objective) -> Objective:
    """A bound with the configured weighting and self-conditioning."""
    if config.model.self_conditioning:
        ids = _ids_before_mask(dataset, "model.self_conditioning")
        bound = objectives.self_conditioned(bound, ids)
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


def masked_sampler(
    config: ConfigDict, dataset: data.Dataset
) -> tuple[samplers.Sampler, Callable[[str, int], Array]]:
    """Configured sampler, with its filters and denoiser wrappers, and levels of grids by name."""
    c = config.sample
    levels = _levels_by_name(config)  # checks the grid even where the sampler takes no steps
    sampler = lookup(names.SAMPLERS, c.sampler, "sample.sampler")(
        token_filter=token_filters(c), **settings(c, c.sampler)
    )
    wrappers = [samplers.prompt_guidance(c.guidance)] if c.guidance else []
    wrappers += [samplers.no_repeat_ngrams(c.no_repeat_ngrams)] if c.no_repeat_ngrams else []
    sampler = samplers.wrapped(sampler, *wrappers) if wrappers else sampler
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, dataset.vocab_size - 1, dataset.vocab_size)
    return sampler, levels


def _watched(sampler: samplers.Sampler, watch: Watch) -> samplers.Sampler:
    return sampler if watch is None else samplers.shown(sampler, *watch)


def _refuse_approximate_cache(config: ConfigDict) -> None:
    if config.sample.approximate_cache:
        raise ValueError(
            f"sample.approximate_cache={config.sample.approximate_cache} is for process=masked: "
            "block and autoregressive models have an exact cache, uniform ones none"
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


def _levels_by_name(config: ConfigDict) -> Callable[[str, int], Array]:
    """``levels(grid, num_steps)`` of a grid of masking rates; ValueError for ``sample.grid``."""
    own = "uniform_masking_rate"

    def levels(grid: str, num_steps: int) -> Array:
        if grid in ("", own):
            return grids.uniform_masking_rate(num_steps)
        schedule = masked_schedule(grid, config.law, "sample.grid", (own,))
        return grids.open_ends(grids.from_schedule(schedule, num_steps))

    levels(config.sample.grid, 1)
    return levels


def _token_rules(config: ConfigDict) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("uniform_masking_rate", config.law.name, "cosine_md4", "log")))
