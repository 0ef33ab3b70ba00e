"""The parts that benchmarks are put together from: batch, parameters, training step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import stand_ins  # noqa: F401  must come before mdm_jax.training
from experiments.benchmarks.shapes import Shape
from experiments.benchmarks.variants import CHAINS, Variant
from mdm_jax import corruption, models, objectives, training, variance
from mdm_jax.batches import Batch
from mdm_jax.typing import PyTree


def objective(shape: Shape) -> objectives.Objective:
    """The masked bound over fixed counts."""
    return objectives.masked_nelbo(corruption.fixed_count(shape.mask_id))


def batch(shape: Shape) -> Batch:
    """Random tokens, every row a whole document."""
    size = (shape.batch_size, shape.length)
    tokens = jax.random.randint(jax.random.key(0), size, 0, shape.mask_id)
    whole = jnp.ones_like(tokens, bool)
    units = jnp.full((shape.batch_size,), shape.length, jnp.int32)
    return Batch(tokens, whole, whole.astype(jnp.int32), units)


def random_params(model: models.Transformer, length: int) -> PyTree:
    """Fresh parameters with a head that is not zero, so that outputs depend on what is seen."""
    params = nn.meta.unbox(training.linen_init(model, length)(jax.random.key(0)))
    head = params["params"]["head"]["kernel"]
    noise = jax.random.normal(jax.random.key(1), head.shape) * head.shape[0] ** -0.5
    return {"params": {**params["params"], "head": {"kernel": noise.astype(head.dtype)}}}


def model(shape: Shape, variant: Variant) -> models.Transformer:
    """The network of a variant."""
    return models.Transformer(shape.config(**variant.config))


def apply_fn(network: models.Transformer, variant: Variant) -> Callable[..., Any]:
    """The network as the training step wants it: with logits, or a readout in their place."""
    return models.readout_apply(network) if variant.readout else network.apply


def chain(variant: Variant) -> variance.VarianceTransform:
    """The variance chain of a variant."""
    return variance.chain(*(CHAINS[name]() for name in variant.chain))


def train_step(
    shape: Shape, variant: Variant
) -> tuple[Callable[..., Any], training.TrainState, Batch]:
    """Step (to be jitted with its state donated), state and batch of a variant."""
    network, transform, optimizer = model(shape, variant), chain(variant), training.adamw(_rate)
    task = objective(shape)
    spec = task.spec(shape.batch_size, shape.length)
    step = training.make_train_step(
        *(apply_fn(network, variant), task, transform, optimizer, spec),
        seed=0,
        num_microbatches=variant.num_microbatches,
    )
    params = random_params(network, shape.length)
    return step, training.new_state(params, optimizer, transform, spec), batch(shape)


def _rate(_: jax.Array) -> float:
    return 1e-3
