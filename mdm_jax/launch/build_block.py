"""Turns the config of a block diffusion run into objects; ``config.process = "block"``.

The network and its parameters are those of a masked run, so a run can start from one
(``train.init_from``).
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from mdm_jax import data, models, objectives, samplers, schedules
from mdm_jax import likelihood as mdm_jax_likelihood
from mdm_jax.launch import build_masked
from mdm_jax.launch.build_masked import LEVEL as LEVEL
from mdm_jax.launch.build_masked import UNREAD as UNREAD
from mdm_jax.launch.build_masked import details as details
from mdm_jax.launch.build_masked import model as model
from mdm_jax.launch.build_masked import record as record
from mdm_jax.types import Array


def apply_fn(
    config: ConfigDict, model: models.Transformer, _dataset: data.Dataset
) -> Callable[..., Array | models.Readout]:
    """``apply_fn(params, [noised row, clean row], logsnr, documents) -> logits`` or readout."""
    window = config.block.window or None
    return models.block_apply(model, config.block.size, window, build_masked.chunking(config))


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The block bound with the configured process and law.

    Raises:
        ValueError: if the block size does not divide the row.
    """
    size, length = config.block.size, dataset.length
    if size < 1 or length % size:
        raise ValueError(
            f"block.size must divide a row of {length} tokens, got {size}; choose a divisor, or "
            "another data.length"
        )
    process = build_masked.corruption_process(config, dataset)
    law = schedules.law_of(build_masked.schedule(config, config.law.name, "law.name"))
    return build_masked.finished(config, dataset, objectives.block_nelbo(process, size, law))


def likelihood(
    config: ConfigDict, dataset: data.Dataset, apply_fn: Callable, passes: int, replicates: int
) -> Callable[..., mdm_jax_likelihood.Likelihood]:
    """The fixed estimator of the block bound; exact for blocks of one token."""
    return mdm_jax_likelihood.make_block_likelihood(
        apply_fn, dataset.mask_id, config.block.size, passes=passes, replicates=replicates
    )


def generator(
    config: ConfigDict, dataset: data.Dataset, model: models.Transformer, _apply_fn: Callable
) -> Callable:
    """Generation block by block with cached keys and values."""
    chosen = build_masked.sampler(config)
    if config.model.self_conditioning:
        chosen = samplers.self_conditioned(chosen, dataset.vocab_size - 1, dataset.vocab_size)
    decoder = models.cached_block_decoder(model, config.block.size, config.block.window or None)
    levels = build_masked.grid_of(config, chosen)
    return samplers.make_block_generator(
        decoder, chosen, levels, mask_id=dataset.mask_id, guided=bool(config.sample.guidance)
    )
