"""What depends on the process; processes of tokens: masked, block, uniform, autoregressive."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, hub, likelihood, models, objectives, samplers, schedules
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup, settings
from mdm_jax.launch.processes import parts
from mdm_jax.launch.processes.parts import Generate, Watch
from mdm_jax.likelihood.stopping import narrow
from mdm_jax.objectives.objective import Objective
from mdm_jax.types import Array, PyTree

Record = dict[str, Any]


def token_record(result: likelihood.Likelihood) -> Record:
    """A likelihood of tokens as JSON values, under the names that all processes share."""
    record = result.to_dict()
    shared = ("nats_per_{}", "standard_error_nats_per_{}")
    return record | {n.format("element"): record[n.format("token")] for n in shared}


def number(value: float | None) -> str:
    """A figure of a report to three decimals; None is "unknown"."""
    return "unknown" if value is None else f"{value:.3f}"


def token_details(record: Record) -> list[str]:
    """Report lines: perplexity, and accuracy where it was measured."""
    error = record["standard_error_perplexity"]
    shown = "" if error == 0 else f" ± {number(error)}"
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
    return lines + alignment_details(record)


def alignment_details(record: Record) -> list[str]:
    """Report lines about held-out preferences and rewards, where these were measured."""
    lines = []
    if "preference_accuracy" in record:
        accuracy, margin, loss = (
            f"{record[name]:.3f} ± {number(record[f'{name}_standard_error'])}"
            + (
                ""
                if (noise := record[f"{name}_monte_carlo_error"]) is None
                else f" (masks ± {noise:.3f})"
            )
            for name in ("preference_accuracy", "preference_margin", "preference_loss")
        )
        lines.append(f"  held-out pairs: accuracy {accuracy}, margin {margin}, loss {loss}")
    if record.get("reward") is not None:
        lines.append(
            f"  held-out reward {record['reward']:.3f} ± "
            f"{number(record['reward_standard_error'])} over {record['rewarded_answers']:.0f} "
            f"prompts, one answer each; solved {record['solved']:.1%}"
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
        recipe, objective_of: numbers of the objective that compiled steps take as arguments, and
            the objective of such; None where they are constants of the program.
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
    recipe: PyTree = None
    objective_of: Callable[[PyTree], Objective] | None = None
    input_dtype: Any = jnp.int32
    record: Callable[[Any], Record] = token_record
    details: Callable[[Record], list[str]] = token_details


def masked(config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None) -> Family:
    """Masked diffusion with the configured corruption, law and weighting."""
    law = schedules.law_of(parts.masked_schedule(config.law.name, config.law, "law.name"))

    def with_corruption(name: str) -> Objective:
        process = parts.make_corruption(name, config.corruption, dataset)
        return parts.finished(config, dataset, objectives.masked_nelbo(process, law))

    model = parts.body(config, dataset, source)
    chunking = parts.make_chunking(config.model.logits_at, config.mesh)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    shifted = source is not None and source.traits.shift
    if shifted:
        apply_fn = models.shifted_apply(apply_fn)

    def with_mask(change: models.MaskChange) -> Callable[..., Array | models.Readout]:
        changed = models.masked_apply(model, change, chunking)
        return models.shifted_apply(changed) if shifted else changed

    sampler, named_levels = parts.masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if not takes_steps:
            levels = None
        elif levels is None:
            levels = named_levels(config.sample.grid, num_steps)
        watched = parts.watched(sampler, watch)
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
        return likelihood.masked_estimator(apply_fn, dataset.mask_id, parts.design(config, passes))

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=parts.evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        levels=named_levels,
        rules=parts.token_rules(config),
        annealed=parts.annealed(config.convert.anneal_steps, with_mask),
        with_corruption=with_corruption,
    )


def block(config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None) -> Family:
    """Block diffusion, from a masked run if ``train.init_from`` names one; size divides the row."""
    size, length, window = config.block.size, dataset.length, config.block.window or None
    parts.refuse_approximate_cache(config)
    if size < 1 or length % size:
        raise ValueError(
            f"block.size must divide a row of {length} tokens, got {size}; choose a divisor, or "
            "another data.length"
        )
    data.check_document_blocks(dataset, size)
    law = schedules.law_of(parts.masked_schedule(config.law.name, config.law, "law.name"))

    def with_corruption(name: str) -> Objective:
        process = parts.make_corruption(name, config.corruption, dataset)
        return parts.finished(config, dataset, objectives.block_nelbo(process, size, law))

    model = parts.body(config, dataset, source)
    chunking = parts.make_chunking(config.model.logits_at, config.mesh)
    apply_fn = models.block_apply(model, size, window, chunking)
    with_mask = functools.partial(models.block_apply, model, size, window, chunking)
    sampler, named_levels = parts.masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if not takes_steps:
            levels = None
        elif levels is None:
            levels = named_levels(config.sample.grid, num_steps)
        return samplers.make_block_generator(
            parts.block_decoder(config, dataset, model),
            parts.watched(sampler, watch),
            levels,
            mask_id=dataset.mask_id,
            guided=bool(config.sample.guidance),
        )

    def estimator(passes: int, replicates: int) -> likelihood.Estimator:
        design = likelihood.block_design(parts.design(config, passes), size, replicates)
        return likelihood.masked_estimator(apply_fn, dataset.mask_id, design, size)

    return Family(
        objective=with_corruption(config.corruption.name),
        model=model,
        apply_fn=apply_fn,
        likelihood=parts.evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        levels=named_levels,
        rules=parts.token_rules(config),
        annealed=parts.annealed(config.convert.anneal_steps, with_mask),
        with_corruption=with_corruption,
    )


def uniform(
    config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None
) -> Family:
    """Uniform-token diffusion over all ids but the mask token, which must be the last one."""
    num_tokens, c = parts.ids_before_mask(dataset, "process=uniform"), config.sample
    parts.refuse_approximate_cache(config)
    parts.refuse_guidance(config)
    law = schedules.law_of(parts.masked_schedule(config.law.name, config.law, "law.name"))
    model = parts.body(config, dataset, source)
    chunking = parts.make_chunking(config.model.logits_at, config.mesh)
    apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
    sampler = lookup(names.UNIFORM_SAMPLERS, c.sampler, "sample.sampler")(
        num_tokens, token_filter=parts.token_filters(c), **settings(c, c.sampler)
    )
    if config.model.self_conditioning:
        sampler = samplers.self_conditioned(sampler, num_tokens, dataset.vocab_size)

    named_levels = parts.levels_by_name(config)

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        levels = named_levels(c.grid, num_steps) if levels is None else levels
        network = models.without_tokens(model.apply, dataset.absent_ids)
        watched = parts.watched(sampler, watch)
        return samplers.make_generator(network, watched, levels, mask_id=dataset.mask_id)

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        return likelihood.uniform_estimator(apply_fn, num_tokens, passes, **parts.coupling(config))

    return Family(
        objective=parts.finished(config, dataset, objectives.uniform_nelbo(num_tokens, law)),
        model=model,
        apply_fn=apply_fn,
        likelihood=parts.evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=True,
        levels_from=f"law {config.law.name}",
        noise_axis="replacement rate",
        levels=named_levels,
        rules=parts.token_rules(config),
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
    parts.refuse_approximate_cache(config)
    parts.refuse_guidance(config)
    c, mask_id = config.sample, dataset.mask_id
    model = parts.body(config, dataset, source)
    chunking = parts.make_chunking(config.model.logits_at, config.mesh)
    start = mask_id if source is None or source.tokenizer is None else source.tokenizer.bos_id
    apply_fn = models.causal_apply(model, start, chunking=chunking)
    decoder = models.cached_causal_decoder(model, start)
    token_filter = samplers.compose(
        lambda logits: models.exclude_token(logits, *dataset.absent_ids), parts.token_filters(c)
    )

    def generator(_num_steps: int, _levels: Any = None, watch: Watch = None) -> Generate:
        shown = dict(zip(("show", "ordered"), watch or ()))
        options = {"mask_id": mask_id, "token_filter": token_filter, **shown}
        return samplers.make_next_token_generator(decoder, **options)

    return Family(
        objective=parts.labelled(config, objectives.next_token(mask_id)),
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
