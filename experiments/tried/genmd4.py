"""GenMD4, tried and left out: a learned masking schedule for every token of the vocabulary.

    python -m experiments.tried.genmd4 --workdir=RUN [--updates=300] [--rows=16] [--redraws=12]

RUN is a masked run on text. At its parameters, which stay as they are, exponents are learned; then
the bound on held-out rows and the variance of the batch gradient are measured beside MD4 (all
exponents 1) and fixed counts, at equal forward passes.

A token v is masked with probability ``t^w_v`` at the time t in (0, 1). From the mask it is revealed
at the rate ``w_v / t``, in the model as token v at ``w_v p_v / t``; the divergence of the two paths
is the bound

    NELBO = int_0^1 E_M sum_{i in M} [ w_x (-log p_x - 1) + sum_v w_v p_v ] / t  dt ,

x the token at i, p the model's law of it. Equal exponents give MD4's, after ``m = t^w``. Masks
depend on the exponents, so their gradient has a score function, with leave-one-out baselines: of
two masks of a row each gets the other's loss. Source: Shi et al. 2024 (MD4), genmd4.py; without its
floor of the survival probability, so there is neither a prior nor a reconstruction term. Held-out
rows are drawn again and again: errors of the bounds are those of masks and levels, for these rows.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mdm_jax import corruption, data, files, meter, objectives, rng
from mdm_jax.draws import Draw
from mdm_jax.estimates import Estimate, mean_estimate
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.workdir import saved_config
from mdm_jax.models.cross_entropy import as_logits, exclude_token
from mdm_jax.types import Array, Batch, PyTree

POWER = 2.0
"""Times are ``u^POWER`` of uniform u: with 1 the weight 1/t has infinite variance."""


def log_masking_rates(exponents: Array, tokens: Array, log_t: Array) -> Array:
    """log of the probability of each token [..., L] being masked at times of log [...]."""
    return exponents[tokens] * log_t[..., None]


def integrand(logits: Array, tokens: Array, mask: Array, exponents: Array, log_t: Array) -> Array:
    """The bound's integrand over t under given masks, nats [...], of logits [..., L, K]."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
    total = jnp.exp(log_p) @ exponents[: logits.shape[-1]]
    each = exponents[tokens] * (-own - 1.0) + total
    return jnp.sum(jnp.where(mask, each, 0.0), axis=-1) * jnp.exp(-log_t)


def log_mask_probability(
    mask: Array, tokens: Array, eligible: Array, exponents: Array, log_t: Array
) -> Array:
    """log of the probability of masks [..., L] of the eligible tokens."""
    log_rate = log_masking_rates(exponents, tokens, log_t)
    each = jnp.where(mask, log_rate, jnp.log(-jnp.expm1(log_rate)))
    return jnp.sum(jnp.where(eligible, each, 0.0), axis=-1)


def with_baselines(losses: Array, log_probability: Array) -> Array:
    """[V, ...] losses of V masks of a row: as they are, with leave-one-out score functions."""
    views = losses.shape[0]
    others = (jnp.sum(losses, axis=0) - losses) / (views - 1)
    score = jax.lax.stop_gradient(losses - others) * log_probability
    return losses + score - jax.lax.stop_gradient(score)


def losses(
    network: Callable[[Array, Array], Array],
    batch: Batch,
    exponents: Array,
    u: Array,
    noise: Array,
    mask_id: int,
) -> tuple[Array, Array]:
    """(estimates of the bound, log-probabilities of the masks), [V, N], of noise [V, N, L]."""
    log_t = POWER * jnp.log(u)
    tokens, eligible = jnp.asarray(batch.tokens), jnp.asarray(batch.eligible)
    rate = log_masking_rates(exponents, tokens, log_t)
    mask = eligible & (jnp.log(noise) < jax.lax.stop_gradient(rate))
    views = noise.shape[0]
    inputs = jnp.where(mask, mask_id, tokens).reshape(-1, tokens.shape[1])
    logits = network(inputs, jnp.tile(jnp.asarray(batch.documents), (views, 1)))
    logits = logits.reshape(*mask.shape, -1)
    tokens, log_t = jnp.broadcast_to(tokens, mask.shape), jnp.broadcast_to(log_t, mask.shape[:2])
    value = integrand(logits, tokens, mask, exponents, log_t)
    density = POWER * jnp.power(u, POWER - 1)
    return value * density, log_mask_probability(mask, tokens, eligible, exponents, log_t)


def make_network(experiment: Experiment) -> Callable[[PyTree, Array, Array], Array]:
    """``network(params, inputs, documents) -> logits`` without those of the mask token."""
    mask_id = experiment.dataset.mask_id

    def network(params: PyTree, inputs: Array, documents: Array) -> Array:
        level = jnp.zeros((inputs.shape[0], 1))
        logits = as_logits(experiment.apply_fn(params, inputs, level, documents))
        return exclude_token(logits, mask_id)

    return network


class Measurement:
    """A run's parameters, rows, and gradients of GenMD4 and of the run's own objective."""

    def __init__(self, experiment: Experiment, params: PyTree, rows: int, seed: int):
        self.experiment, self.params, self.rows = experiment, params, rows
        self.key, self.network = jax.random.key(seed), make_network(experiment)
        self.mask_id = experiment.dataset.mask_id

    def drawn(self, number: int, rows: int, views: int) -> tuple[Batch, Array, Array]:
        """Training rows, stratified quantiles and noise; the numbers of one redraw."""
        key = jax.random.fold_in(self.key, number)
        generator = np.random.default_rng(number)
        batch = data.sample_rows(self.experiment.dataset.train, rows, generator)
        batch = jax.tree.map(jnp.asarray, batch)
        cells = jax.random.permutation(rng.stream(key, "cells"), rows)
        jitter = jax.random.uniform(rng.stream(key, "jitter"), (rows,), minval=1e-6)
        noise = jax.random.uniform(
            rng.stream(key, "noise"), (views, *batch.tokens.shape), minval=1e-7
        )
        return batch, (cells + jitter) / rows, noise

    @functools.cached_property
    def gradient(self) -> Callable[..., tuple[Array, tuple[PyTree, Array]]]:
        """``gradient(params, raw, *drawn) -> (loss, gradients)``, nats per token; two views."""

        def loss(params: PyTree, raw: Array, batch: Batch, u: Array, noise: Array) -> Array:
            network = functools.partial(self.network, params)
            given = losses(network, batch, jax.nn.softplus(raw), u, noise, self.mask_id)
            each = with_baselines(*given) if noise.shape[0] > 1 else given[0]
            return jnp.sum(each) / noise.shape[0] / jnp.sum(batch.eligible)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))

    def learn(self, updates: int) -> Array:
        """Exponents, before softplus, after Adam on them alone."""
        raw = jnp.full((self.experiment.dataset.vocab_size,), float(np.log(np.e - 1)))
        optimizer = optax.adam(optax.cosine_decay_schedule(0.03, updates))
        state = optimizer.init(raw)
        for number in range(updates):
            _, (_, gradient) = self.gradient(self.params, raw, *self.drawn(number, self.rows, 2))
            step, state = optimizer.update(gradient, state)
            raw = optax.apply_updates(raw, step)
        return raw

    def bounds(self, raws: list[Array], batches: int) -> np.ndarray:
        """[len(raws), batches] bounds on held-out rows, nats per token, on shared draws."""
        valid = self.experiment.dataset.valid
        found = np.zeros((len(raws), batches))
        for number in range(batches):
            _, u, noise = self.drawn(10**6 + number, self.rows, 1)
            index = np.arange(self.rows) + number * self.rows
            rows = data.gather(valid, index % len(valid))
            rows = jax.tree.map(jnp.asarray, rows)
            for which, raw in enumerate(raws):
                found[which, number] = self.value(raw, rows, u, noise)
        return found

    @functools.cached_property
    def value(self) -> Callable[..., Array]:
        def value(raw: Array, batch: Batch, u: Array, noise: Array) -> Array:
            network = functools.partial(self.network, self.params)
            each = losses(network, batch, jax.nn.softplus(raw), u, noise, self.mask_id)[0]
            return jnp.sum(each) / jnp.sum(batch.eligible)

        return jax.jit(value)

    def variance(self, gradient: Callable[[int], Any], groups: int, redraws: int) -> Estimate:
        """Trace of the covariance of ``gradient(number)`` over redraws, with its error."""
        each = []
        for group in range(groups):
            found = [gradient(2 * 10**6 + group * redraws + i) for i in range(redraws)]
            flat = [jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in found]
            each.append(float(jnp.sum(jnp.var(jnp.stack(flat), axis=0, ddof=1))))
        return mean_estimate(np.asarray(each))


def measure(
    workdir: str, updates: int, rows: int, redraws: int, groups: int = 8, batches: int = 64
) -> dict[str, Any]:
    """Bounds, and gradient variances at equal passes (2 ``rows`` of one mask, or half with two)."""
    experiment = make_experiment(saved_config(workdir), files.as_path(workdir))
    _, params = load_parameters(experiment, files.as_path(workdir))
    own = Measurement(experiment, params, rows, seed=0)
    equal = jnp.full((experiment.dataset.vocab_size,), float(np.log(np.e - 1)))
    learned = own.learn(updates)
    bounds = own.bounds([equal, learned], batches) / np.log(2)

    def of(raw: Array, count: int, views: int) -> Callable[[int], PyTree]:
        return lambda number: own.gradient(params, raw, *own.drawn(number, count, views))[1][0]

    methods = {
        "MD4, one mask": of(equal, 2 * rows, 1),
        "GenMD4, one mask": of(learned, 2 * rows, 1),
        "MD4, two masks": of(equal, rows, 2),
        "GenMD4, two masks, as it is trained": of(learned, rows, 2),
        "fixed counts": fixed_counts(own, 2 * rows),
    }
    exponents = np.asarray(jax.nn.softplus(learned))
    return {
        "bound": mean_estimate(bounds[0]),
        "learned": mean_estimate(bounds[1]),
        "difference": mean_estimate(bounds[1] - bounds[0]),
        "exponents": np.quantile(exponents, (0.0, 0.1, 0.5, 0.9, 1.0)).tolist(),
        "variance": {n: own.variance(g, groups, redraws) for n, g in methods.items()},
    }


def fixed_counts(own: Measurement, rows: int) -> Callable[[int], PyTree]:
    """Gradients of the run's objective over the same rows and quantiles of the rate."""
    objective = objectives.masked_nelbo(corruption.fixed_count(own.mask_id))
    estimator = meter.make_estimator(own.experiment.apply_fn, objective)

    def gradient(number: int) -> PyTree:
        batch, u, noise = own.drawn(number, rows, 1)
        levels = u[None, :, None]
        draw = Draw(levels, jnp.zeros_like(levels), noise)
        return estimator.gradient(own.params, batch, draw, 1)

    return gradient


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser("experiments.tried.genmd4", allow_abbrev=False)
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--redraws", type=int, default=12)
    given = parser.parse_args()
    found = measure(given.workdir, given.updates, given.rows, given.redraws)
    for name in ("bound", "learned", "difference"):
        value, error = found[name]
        print(f"{name}: {value:.4f} ± {error:.4f} bits per token")
    print("exponents (0, 10, 50, 90, 100 %):", " ".join(f"{e:.3f}" for e in found["exponents"]))
    reference = found["variance"]["fixed counts"].value
    for name, (value, error) in found["variance"].items():
        print(f"{name:38}{value:.4f} ± {error:.4f}{value / reference:8.2f}")


if __name__ == "__main__":
    main()
