"""Shapes, variants of the training step, and the parts that benchmarks are put together from.

To add a variant, add a line to ``TRAIN``. One that needs something which this machine or this
version does not have is reported as unavailable, with the reason.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.benchmarks import machine
from mdm_jax import corruption, models, objectives, rng, training, variance
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.launch.start import scaled
from mdm_jax.models.decoders import WrittenRow
from mdm_jax.models.masks import block_causal
from mdm_jax.models.transformer import TransformerConfig
from mdm_jax.types import Array, Batch, PyTree

SAMPLE_ROWS = 8
"""Rows that are generated at a time."""


class Shape(NamedTuple):
    """Size of a model and of its batch.

    Attributes:
        name: S, Q (the quickstart's), V and W (between S and M: vocabulary, width), M or L.
        length: tokens of a training row.
        vocab_size: K, mask token included, which is the last.
        width: residual width; the feed-forward layer is four times as wide.
        depth: number of blocks.
        num_heads: attention heads.
        batch_size: training rows.
        sample_length: tokens of a generated row.
        needs_accelerator: too large for a CPU.
    """

    name: str
    length: int
    vocab_size: int
    width: int
    depth: int
    num_heads: int
    batch_size: int
    sample_length: int
    needs_accelerator: bool

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("S", 256, 28, 128, 4, 4, 32, 256, False),
        Shape("Q", 128, 2048, 128, 3, 4, 16, 256, False),
        Shape("V", 256, 8192, 128, 4, 4, 16, 256, False),
        Shape("W", 256, 256, 256, 4, 8, 16, 256, False),
        Shape("M", 128, 32_000, 256, 6, 8, 16, 256, False),
        Shape("L", 1024, 50_257, 768, 12, 12, 32, 1024, True),
    )
}


def matmul_params(shape: Shape) -> int:
    """Parameters that every token is multiplied with: blocks and head, not the embedding table."""
    block = 4 * shape.width**2 + 2 * shape.width * (4 * shape.width)
    return shape.depth * block + shape.width * shape.vocab_size


def forward_flops(shape: Shape, num_rows: int, length: int) -> float:
    """Floating-point operations of the matrix products of one dense forward pass.

    Two per parameter and token, and ``4 L width`` per token and block for the two products of
    attention over L keys. Norms, activations and the softmaxes are not counted.
    """
    attention = 4 * length * shape.width * shape.depth
    return float(num_rows * length * (2 * matmul_params(shape) + attention))


def train_flops(shape: Shape) -> float:
    """Model FLOP of one training step by the dense definition: three forward passes.

    All variants are charged this, whether they compute less (logits of masked positions only) or
    more (rematerialisation), so model FLOP/s compare like tokens/s; a variant that skips half of
    the head can exceed what it multiplies.
    """
    return 3 * forward_flops(shape, shape.batch_size, shape.length)


class Variant(NamedTuple):
    """Settings of a training step.

    Attributes:
        summary: one line for the reader.
        config: fields of ``TransformerConfig`` that are not at their default.
        readout: losses through a ``models.Readout``, at masked positions only, instead of logits.
        chain: names of variance transforms, from ``CHAINS``.
        num_microbatches: microbatches whose gradients are accumulated; None for as many as
            :func:`microbatches` finds best on this machine.
    """

    summary: str
    config: Mapping[str, Any] = {}
    readout: bool = False
    chain: tuple[str, ...] = ("stratified",)
    num_microbatches: int | None = 1


YARDSTICK = "yardstick"
"""The plain code of ``experiments.benchmarks.yardstick``, which has no settings."""

_FLOAT32 = {"dtype": jnp.float32}
_BFLOAT16 = {"dtype": jnp.bfloat16}
PLAIN = Variant("logits of all positions, float32, einsum", _FLOAT32 | {"attention": "einsum"})
"""The library without any of its means of being fast."""

CHOSEN = Variant(
    "logits at masked positions; attention, dtype and microbatches as chosen for this machine",
    {"dtype": machine.product_dtype()},
    readout=True,
    num_microbatches=None,
)
"""The library as one would use it here."""


def _chosen(summary: str, config: Mapping[str, Any] = {}, **fields: Any) -> Variant:
    return CHOSEN._replace(summary=summary, config={**CHOSEN.config, **config}, **fields)


TRAIN: Mapping[str, Variant] = {
    YARDSTICK: Variant("plain JAX", _FLOAT32),
    "library": CHOSEN,
    "dense": PLAIN,
    "dense, recomputed attention": PLAIN._replace(
        summary="dense, probabilities computed anew in the backward pass",
        config=_FLOAT32 | {"attention": "recompute"},
    ),
    "readout": PLAIN._replace(summary="dense, but logits at masked positions", readout=True),
    "library float32": _chosen("library in float32", _FLOAT32),
    "library bfloat16": _chosen("library with bfloat16 operands", _BFLOAT16),
    "library, all logits": _chosen("library, logits of all positions", readout=False),
    "attention einsum": _chosen("library, all rows at once", {"attention": "einsum"}),
    "attention recompute": _chosen("library, a few rows at a time", {"attention": "recompute"}),
    "attention xla": _chosen("library, jax.nn.dot_product_attention", {"attention": "xla"}),
    "attention cudnn": _chosen("library, cuDNN's kernel", {"attention": "cudnn"}),
    "attention splash": _chosen("library, TPU kernel", {"attention": "splash"}),
    "scan over layers": _chosen("library, one compiled block", {"scan_layers": True}),
    "remat dots": _chosen("library, keeps products alone", {"remat": "dots"}),
    "remat full": _chosen("library, keeps the inputs of blocks alone", {"remat": "full"}),
    "no chain": _chosen("library, independent noise", chain=()),
    "chain with ppots": _chosen("library, learned level density", chain=("stratified", "ppots")),
    **{
        f"microbatches {n}": _chosen("library, gradients accumulated", num_microbatches=n)
        for n in (1, 2, 4, 8, 16)
    },
}
TRAIN_SETS = {
    "default": (YARDSTICK, "library", "dense", "library bfloat16", "no chain"),
    "attention": tuple(name for name in TRAIN if name.startswith("attention")),
    "microbatches": tuple(name for name in TRAIN if name.startswith("microbatches")),
    "all": tuple(TRAIN),
}
CHAINS: Mapping[str, Callable[[], variance.VarianceTransform]] = {
    "stratified": variance.stratified,
    "systematic": variance.systematic,
    "antithetic_pairs": variance.antithetic_pairs,
    "ppots": variance.ppots,
    "mirror": variance.mirror,
}


def objective(shape: Shape) -> objectives.Objective:
    """The masked bound over fixed counts."""
    return objectives.masked_nelbo(corruption.fixed_count(shape.mask_id))


def batch(shape: Shape) -> Batch:
    """Random tokens, every row one document."""
    size = (shape.batch_size, shape.length)
    tokens = jax.random.randint(jax.random.key(0), size, 0, shape.mask_id)
    eligible = jnp.ones_like(tokens, bool)
    units = jnp.full((shape.batch_size,), shape.length, jnp.int32)
    return Batch(tokens, eligible, eligible.astype(jnp.int32), units)


def model(shape: Shape, variant: Variant) -> models.Transformer:
    """The network of a variant."""
    sizes = (shape.vocab_size, shape.width, shape.depth, shape.num_heads)
    return models.Transformer(TransformerConfig(*sizes, **variant.config))


def random_params(network: models.Transformer, length: int) -> PyTree:
    """Fresh parameters with a head that is not zero, so that outputs depend on inputs."""
    params = nn.meta.unbox(training.linen_init(network, length)(jax.random.key(0)))
    head = params["params"]["head"]["kernel"]
    noise = jax.random.normal(jax.random.key(1), head.shape) * head.shape[0] ** -0.5
    return {"params": {**params["params"], "head": {"kernel": noise.astype(head.dtype)}}}


def apply_fn(network: models.Transformer, variant: Variant) -> Callable[..., Any]:
    """The network's apply function for training: with logits, or with a readout instead."""
    return models.readout_apply(network) if variant.readout else network.apply


def chain(variant: Variant) -> variance.VarianceTransform:
    """The variance chain of a variant."""
    return variance.chain(*(CHAINS[name]() for name in variant.chain))


def microbatches(shape: Shape) -> int:
    """The launcher's number of microbatches for a shape on this machine."""
    parameters = scaled.parameters(shape.width, shape.depth, shape.vocab_size)
    return scaled.num_microbatches(
        shape.batch_size, shape.length, parameters, jax.default_backend()
    )


def train_step(
    shape: Shape, variant: Variant, transform: variance.VarianceTransform | None = None
) -> tuple[Callable[..., Any], training.TrainState, Batch]:
    """Step (to be jitted), state and batch of a variant, with its own chain or another."""
    network, optimizer = model(shape, variant), training.adamw(lambda _: 1e-3)
    transform = chain(variant) if transform is None else transform
    task = objective(shape)
    spec = task.spec(shape.batch_size, shape.length)
    step = training.make_train_step(
        apply_fn(network, variant),
        task,
        transform,
        optimizer,
        spec,
        seed=0,
        num_microbatches=variant.num_microbatches or microbatches(shape),
    )
    params = random_params(network, shape.length)
    return step, training.new_state(params, optimizer, transform, spec), batch(shape)


def whole_row_decoder(
    network: models.Transformer, block_size: int, window: int | None = None
) -> models.BlockDecoder:
    """Block decoder without a cache: every pass runs the row under the block-causal mask.

    Half the work of ``models.recomputing_block_decoder``, which has the training function alone.
    """

    def logits(params: PyTree, row: WrittenRow, tokens: Array, logsnr: Array, _: Array) -> Array:
        noised = jax.lax.dynamic_update_slice_in_dim(row.tokens, tokens, row.written, axis=1)
        length = noised.shape[-1]
        mask = block_causal(length, block_size, window)
        every, _ = network.apply(params, noised, logsnr, jnp.arange(length), mask, method="attend")
        return jax.lax.dynamic_slice_in_dim(every, row.written, block_size, axis=1)

    plain = models.recomputing_block_decoder(lambda *_: None, block_size)
    return plain._replace(logits=logits)


def unit_stats(draw: Draw) -> LossStats:
    """Statistics of a draw, all of them 1, for what learns from losses."""
    return LossStats(*[jnp.ones_like(draw.u)] * len(LossStats._fields))


def draw_and_update(chain: variance.VarianceTransform, spec: DrawSpec) -> Callable[[], object]:
    """A call that makes a chain's draw and its update, and nothing else."""
    state = chain.init(spec)

    @jax.jit
    def run(i: Array) -> tuple[Array, PyTree]:
        draw = variance.draw_batch(rng.step_key(0, i), chain, state, spec)
        # Sums keep the compiler from removing what is not used.
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draw))
        return total, chain.update(state, draw, unit_stats(draw))

    return lambda: jax.block_until_ready(run(3))
