"""A network, data and train steps small enough to compile in a moment, for the training tests."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax import corruption, models, objectives, training, variance
from mdm_jax.types import Batch

VOCAB, LENGTH, WIDTH = 7, 6, 8
MASK_ID = VOCAB - 1
ELIGIBLE = (6, 1, 0, 3, 2, 6, 1, 4)
"""Eligible tokens of row i (mod 8), so unequal that a mean over rows is not one over tokens."""

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time; these tests run each program a few times."""


def params(seed: int = 0) -> dict:
    """Parameters of :func:`apply_fn`."""
    rng = np.random.default_rng(seed)
    return {
        "embedding": jnp.asarray(rng.normal(size=(VOCAB, WIDTH)), jnp.float32),
        "kernel": jnp.asarray(rng.normal(size=(WIDTH, VOCAB)), jnp.float32),
    }


def apply_fn(params, inputs, logsnr, documents):
    """Each token sees itself and the mean of its row's visible tokens."""
    x = params["embedding"][inputs]
    visible = (documents > 0).astype(jnp.float32)[..., None]
    mean = jnp.sum(x * visible, 1, keepdims=True) / jnp.maximum(jnp.sum(visible, 1)[:, None], 1.0)
    return jnp.einsum("nlw,wk->nlk", x + mean, params["kernel"])


def batch(rows: int, seed: int = 0, counts: tuple[int, ...] = ELIGIBLE) -> Batch:
    """Rows [prompt][answer][padding] with ``counts[i % 8]`` eligible tokens each."""
    rng = np.random.default_rng(seed)
    eligible, documents = np.zeros((rows, LENGTH), bool), np.zeros((rows, LENGTH), np.int32)
    for row in range(rows):
        count = counts[row % len(counts)]
        prompt = (LENGTH - count) // 2
        eligible[row, prompt : prompt + count] = True
        documents[row, : prompt + count] = 1 if count else 0
    return Batch(
        tokens=rng.integers(0, MASK_ID, (rows, LENGTH), dtype=np.int32),
        eligible=eligible,
        documents=documents,
        units=2 * eligible.sum(1, dtype=np.int32),
    )


def objective() -> objectives.Objective:
    """The masked bound over fixed counts."""
    return objectives.masked_nelbo(corruption.fixed_count(MASK_ID))


def transform() -> variance.VarianceTransform:
    """The quickstart's chain."""
    return variance.chain(variance.stratified(), variance.mirror())


def step_fn(rows: int, optimizer=None, apply=apply_fn, chain=None, seed: int = 3, **settings):
    """(spec, pure train step) of the tiny network."""
    spec = objective().spec(rows, LENGTH)
    step = training.make_train_step(
        apply,
        objective(),
        transform() if chain is None else chain,
        optax.sgd(1.0) if optimizer is None else optimizer,
        spec,
        seed=seed,
        **settings,
    )
    return spec, step


def new_state(spec, optimizer=None, chain=None, seed: int = 0, monitors=()) -> training.TrainState:
    """State at step 0."""
    optimizer = optax.sgd(1.0) if optimizer is None else optimizer
    chain = transform() if chain is None else chain
    return training.new_state(params(seed), optimizer, chain, spec, monitors)


def transformer(**settings) -> models.Transformer:
    """A small transformer over the same vocabulary."""
    chosen = {"vocab_size": VOCAB, "width": 16, "depth": 1, "num_heads": 2, **settings}
    return models.Transformer(models.TransformerConfig(**chosen))


def parameters(model, length: int):
    """Random parameters of a network for rows of ``length``; nothing is compiled for them."""
    shapes = nn.meta.unbox(jax.eval_shape(training.linen_init(model, length), jax.random.key(0)))
    return perturbed(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))


def perturbed(tree, seed: int = 0, scale: float = 0.3):
    """``tree`` plus noise, so that zero-initialised parts take part."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noise = [(scale * rng.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in leaves]
    noisy = [jax.device_put(np.asarray(leaf) + e) for leaf, e in zip(leaves, noise)]
    return jax.tree.unflatten(structure, noisy)


class Small(nn.Module):
    """Sees each token and the mean of its row."""

    vocab_size: int

    @nn.compact
    def __call__(self, inputs, _logsnr, _documents):
        x = nn.Embed(self.vocab_size, 8)(inputs)
        return nn.Dense(self.vocab_size)(x + jnp.mean(x, 1, keepdims=True))


def with_small_network(experiment):
    """The experiment with :class:`Small`, which compiles quickly."""
    small = Small(experiment.dataset.vocab_size)
    family = dataclasses.replace(experiment.family, model=small, apply_fn=small.apply)
    return dataclasses.replace(experiment, family=family)
