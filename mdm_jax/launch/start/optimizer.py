"""The optimiser and learning rate of a run, from the section ``optimizer`` of its config."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from mdm_jax import training
from mdm_jax.distributed import platform
from mdm_jax.launch import names
from mdm_jax.launch.names import lookup


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of a filled config; ValueError for unknown names and what cannot be stored."""
    rate, updates = learning_rate(config), config.alignment.inner_steps
    return _optimizer(lambda count: rate(count // updates), **config.optimizer)


def learning_rate(config: ConfigDict) -> optax.Schedule:
    """The learning rate of a run by the number of steps before; all updates of a step share it."""
    c = config.optimizer
    return training.warmup_cosine(c.peak, c.warmup_steps, config.train.steps, c.final_fraction)


def recomputes_update(config: ConfigDict, mesh: jax.sharding.Mesh) -> bool:
    """Whether a step computes updates twice and holds none: AdamW's, which are elementwise, where
    moments in int8 would be held in float32 until their scales are known, and memory is dearer than
    a pass over them. Muon's updates are products."""
    c = config.optimizer
    moments = c.first_moment_dtype, c.second_moment_dtype
    return c.name == "adamw" and "int8" in moments and platform(mesh.abstract_mesh) != "cpu"


def _optimizer(
    schedule: optax.Schedule,
    *,
    name: str,
    clip_norm: float,
    b1: float,
    b2: float,
    weight_decay: float,
    first_moment_dtype: str,
    second_moment_dtype: str,
    ema_dtype: str,
    **own: Any,  # sections of optimizers; what the schedule and the step read
) -> optax.GradientTransformation:
    lookup(names.DTYPES, ema_dtype, "optimizer.ema_dtype")
    optimizer = lookup(names.OPTIMIZERS, name, "optimizer.name")(
        schedule,
        clip_norm=clip_norm or None,
        b1=b1,
        b2=b2,
        weight_decay=weight_decay,
        **own.get(name, {}),
    )
    first = lookup(names.MOMENT_DTYPES, first_moment_dtype, "optimizer.first_moment_dtype")
    second = lookup(names.MOMENT_DTYPES, second_moment_dtype, "optimizer.second_moment_dtype")
    return training.store_moments(optimizer, first, second, b2)
