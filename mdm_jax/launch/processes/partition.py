"""The family of partition models: two groups of tokens that predict each other in one pass."""

from ml_collections import ConfigDict

from mdm_jax import data, hub, likelihood, models, objectives, samplers, schedules
from mdm_jax.launch.families import Family
from mdm_jax.launch.processes import parts
from mdm_jax.launch.processes.parts import Generate, Watch
from mdm_jax.types import Array


def partition(
    config: ConfigDict, dataset: data.Dataset, source: hub.HubModel | None = None
) -> Family:
    """A partition model; samplers run its encoder on revealed tokens alone.

    ValueError for settings that ``models.Partition`` does not have.
    """
    del source  # none has this process (launch/source.py)
    parts.refuse_approximate_cache(config)
    shape = parts.network(dataset.vocab_size, **config.model)
    model = models.Partition(shape, dataset.mask_id, config.partition.decoder_depth)
    chunking = parts.make_chunking(config.model.logits_at, config.mesh)
    law = schedules.law_of(parts.masked_schedule(config.law.name, config.law, "law.name"))
    bound = objectives.partition_nelbo(dataset.mask_id, law)
    sampler, named_levels = parts.masked_sampler(config, dataset)
    takes_steps = sampler.num_steps is None

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        if not takes_steps:
            levels = None
        elif levels is None:
            levels = named_levels(config.sample.grid, num_steps)
        network = models.without_tokens(models.revealed_apply(model), dataset.absent_ids)
        watched = parts.watched(sampler, watch)
        return samplers.make_generator(network, watched, levels, mask_id=dataset.mask_id)

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        apply_fn = model.apply if chunking is None else models.readout_apply(model, chunking)
        return likelihood.masked_estimator(apply_fn, dataset.mask_id, parts.design(config, passes))

    return Family(
        objective=parts.finished(config, dataset, bound),
        model=model,
        apply_fn=models.pair_apply(model, chunking, _prompt_length(dataset)),
        likelihood=parts.evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=takes_steps,
        levels_from=f"law {config.law.name}",
        noise_axis="masking rate",
        levels=named_levels,
        rules=parts.token_rules(config),
        unread=("corruption",),
    )


def _prompt_length(dataset: data.Dataset) -> int:
    """Positions from the first on that may hold tokens that are always visible: of conversations
    all, so that their rows cost the encoder twice the tokens."""
    if dataset.layout is None:
        return 0
    pairs = isinstance(dataset.layout, data.PairLayout)
    return dataset.layout.prompt_length if pairs else dataset.length
