"""Turns the config of the baseline, ``config.process = "autoregressive"``, into objects.

The same network under a causal mask. There is no noise: variance chains and noise laws play no
part.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from mdm_jax import data, models, objectives, samplers
from mdm_jax import likelihood as mdm_jax_likelihood
from mdm_jax.launch import build_masked
from mdm_jax.launch.build_masked import LEVEL as LEVEL
from mdm_jax.launch.build_masked import details as details
from mdm_jax.launch.build_masked import model as model
from mdm_jax.launch.build_masked import record as record
from mdm_jax.types import Array

UNREAD = ("corruption", "law", "weighting")
"""Sections whose ``name`` this process does not look at."""


def apply_fn(
    config: ConfigDict, model: models.Transformer, dataset: data.Dataset
) -> Callable[..., Array | models.Readout]:
    """``apply_fn(params, tokens, ...) -> logits`` or readout, each from the tokens before."""
    return models.causal_apply(model, dataset.mask_id, chunking=build_masked.chunking(config))


def objective(config: ConfigDict, dataset: data.Dataset) -> objectives.Objective:
    """The next-token loss.

    Raises:
        ValueError: for settings that are about noise.
    """
    if config.variance.order:
        raise ValueError(
            "process=autoregressive has no noise to couple or warp: "
            f'--config.variance.order="()" instead of {config.variance.order}'
        )
    if config.model.self_conditioning:
        raise ValueError("process=autoregressive does not take model.self_conditioning")
    return objectives.next_token(dataset.mask_id)


def likelihood(
    _config: ConfigDict, dataset: data.Dataset, apply_fn: Callable, _passes: int, _replicates: int
) -> Callable[..., mdm_jax_likelihood.Likelihood]:
    """The exact likelihood; passes and replicates have no part in it."""
    return mdm_jax_likelihood.make_next_token_likelihood(apply_fn, dataset.mask_id)


def generator(
    config: ConfigDict, dataset: data.Dataset, model: models.Transformer, _apply_fn: Callable
) -> Callable:
    """Generation token by token with cached keys and values, from left to right."""
    return samplers.make_next_token_generator(
        models.cached_causal_decoder(model, dataset.mask_id),
        mask_id=dataset.mask_id,
        token_filter=build_masked.token_filter(config),
    )
