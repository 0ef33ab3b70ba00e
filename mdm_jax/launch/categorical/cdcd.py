"""The process ``cdcd``: Gaussian diffusion of token embeddings, by cross-entropy."""

import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, likelihood
from mdm_jax.checks import check_interval
from mdm_jax.gaussian import categorical, paths
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import names
from mdm_jax.launch.families import Family, Record, number, token_details, token_record
from mdm_jax.launch.gaussian_family import gaussian_levels, truncated_to
from mdm_jax.launch.names import lookup, settings
from mdm_jax.launch.processes.parts import (
    Generate,
    Watch,
    evaluation_by,
    make_chunking,
    network,
    refuse_guidance,
    token_filters,
)
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array

UNREAD = ("recipe", "weighting", "output", "modifiers")
"""Settings of ``gaussian`` that CDCD and CDTD have fixed: the estimate is of the clean data."""


def cdcd(config: ConfigDict, dataset: data.Dataset, _source: None = None) -> Family:
    """CDCD (Dieleman et al. 2022); ValueError for pictures, or settings of other processes."""
    if dataset.tokenizer is None:
        raise ValueError("process=cdcd is of tokens of text; for pictures use process=gaussian")
    if not config.model.condition_on_logsnr:
        raise ValueError("process=cdcd needs --config.model.condition_on_logsnr=True")
    c, g = config.sample, config.gaussian
    law, path = law_and_path(g, "cdcd")
    refuse_unread(config, "cdcd")
    refuse_guidance(config)
    model = categorical.EmbeddingTransformer(
        network(dataset.vocab_size, **config.model), config.cdcd.size, dataset.mask_id, path
    )
    chunking = make_chunking(config.model.logits_at, config.mesh)
    apply_fn = categorical.embedding_apply(model, chunking)
    sampler = lookup(names.GAUSSIAN_SAMPLERS, c.sampler, "sample.sampler")(**settings(c, c.sampler))

    def named_levels(grid: str, num_steps: int) -> Array:
        return gaussian_levels(grid or "edm", num_steps, g, law)

    def generator(num_steps: int, levels: Array | None = None, watch: Watch = None) -> Generate:
        shown = dict(zip(("show", "ordered"), watch or ()))
        return categorical.make_embedding_generator(
            model,
            apply_fn,
            sampler,
            named_levels(c.grid, num_steps) if levels is None else levels,
            token_filter=token_filters(c),
            excluded=dataset.absent_ids,
            **shown,
        )

    def estimator(passes: int, _replicates: int) -> likelihood.Estimator:
        return categorical.embedding_estimator(
            model, apply_fn, low=g.low, high=g.high, passes=passes
        )

    return Family(
        objective=categorical.cdcd_loss(
            law,
            path,
            config.cdcd.size,
            dataset.mask_id,
            given=config.cdcd.given,
            self_conditioning=config.model.self_conditioning,
        ),
        model=model,
        apply_fn=apply_fn,
        likelihood=evaluation_by(estimator),
        estimator=estimator,
        generator=generator,
        takes_steps=True,
        levels_from=f"law {g.law or 'uniform_logsnr'}",
        noise_axis="share of the logSNR range, clean to noisy",
        levels=named_levels,
        rules=("edm_rho", "law", "uniform_logsnr", "cosine"),
        follows_warp=True,
        unread=("corruption", "law", "weighting"),
        record=_record,
        details=_details,
    )


def law_and_path(section: ConfigDict, process: str) -> tuple[Law, paths.Path]:
    """Law and path of the section ``gaussian``; "": uniform logSNR, and path ve."""
    low, high = section.low, section.high
    check_interval(f"process={process}: gaussian", low, high)
    path = lookup(names.PATHS, section.path or "ve", "gaussian.path")()
    if not section.law:
        return gaussian_schedules.uniform_logsnr(low, high), path
    named = lookup(names.GAUSSIAN_LAWS, section.law, "gaussian.law")
    return truncated_to(named(**settings(section, section.law)), low, high), path


def refuse_unread(config: ConfigDict, process: str) -> None:
    """Raise ValueError where a setting of ``gaussian`` that is not read was changed."""
    section, defaults = config.gaussian, launch_config.get_config().gaussian
    changed = [
        f"gaussian.{name}={section[name]!r} (leave it at {defaults[name]!r})"
        for name in UNREAD
        if section[name] != defaults[name]
    ]
    if changed:
        raise ValueError(f"process={process} does not read {', '.join(changed)}")


def _record(result: likelihood.Likelihood) -> Record:
    """As :func:`token_record`, with the mean cross-entropy over a uniform logSNR, no bound."""
    nats, targets = result.levels.nats, result.levels.targets
    seen = targets > 0
    mean = float(np.mean(nats[seen])) if np.any(seen) else None
    return token_record(result) | {"cross_entropy_over_uniform_logsnr": mean}


def _details(record: Record) -> list[str]:
    mean = number(record["cross_entropy_over_uniform_logsnr"])
    return [
        "  bound of Gaussian diffusion on embeddings, two passes with self-conditioning",
        f"  cross-entropy averaged over a uniform logSNR {mean} nats per token (no bound)",
        *token_details(record),
    ]
