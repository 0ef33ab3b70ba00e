"""The parts that benchmarks are put together from: batch, parameters, training step."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks.shapes import Shape, matmul_params
from experiments.benchmarks.variants import CHAINS, Variant
from mdm_jax import corruption, models, objectives, rng, training, variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.models.decoders import WrittenRow
from mdm_jax.models.masks import block_causal
from mdm_jax.types import Array, Batch, PyTree


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


def microbatches(shape: Shape) -> int:
    """Parts of a batch whose gradients are accumulated: as many as pay on this machine.

    On CPUs the activations of about 1024 tokens stay in a cache and use the same memory again,
    which is worth a pass over the gradients per part as long as the parameters are few: 8 parts on
    S (1.3 times the speed), 1 on M (2 parts are 5% slower). Between the two nothing was measured.
    """
    tokens = shape.batch_size * shape.length
    few = matmul_params(shape) + shape.vocab_size * shape.width < 2048 * 1024
    if jax.default_backend() != "cpu" or not few:
        return 1
    return math.gcd(shape.batch_size, max(1, tokens // 1024))


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
        num_microbatches=variant.num_microbatches or microbatches(shape),
    )
    params = random_params(network, shape.length)
    return step, training.new_state(params, optimizer, transform, spec), batch(shape)


def whole_row_decoder(
    network: models.Transformer, block_size: int, window: int | None = None
) -> models.BlockDecoder:
    """Without a cache: the row, its next block noised, under the block-causal mask, in every pass.

    Half the work of ``models.recomputing_block_decoder``, which knows nothing of the network but
    the function for training.
    """

    def logits(params: PyTree, row: WrittenRow, tokens: Array, logsnr: Array, _: Array) -> Array:
        noised = jax.lax.dynamic_update_slice_in_dim(row.tokens, tokens, row.written, axis=1)
        length = noised.shape[-1]
        mask = block_causal(length, block_size, window)
        every, _ = network.apply(params, noised, logsnr, jnp.arange(length), mask, method="attend")
        return jax.lax.dynamic_slice_in_dim(every, row.written, block_size, axis=1)

    plain = models.recomputing_block_decoder(lambda *_: None, block_size)
    return plain._replace(logits=logits)


def draw_and_update(chain: variance.VarianceTransform, spec: DrawSpec) -> Callable[[], object]:
    """A call that makes a chain's draw and its update, and nothing else."""
    state = chain.init(spec)

    @jax.jit
    def run(i: Array) -> tuple[Array, PyTree]:
        draw = variance.draw_batch(rng.step_key(0, i), chain, state, spec)
        ones = jnp.ones_like(draw.u)
        # Sums keep the compiler from removing what is not used.
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draw))
        return total, chain.update(state, draw, LossStats(ones, ones, ones, ones))

    return lambda: jax.block_until_ready(run(3))


def _rate(_: jax.Array) -> float:
    return 1e-3
