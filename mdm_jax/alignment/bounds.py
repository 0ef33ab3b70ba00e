"""Likelihood bounds of answers given prompts, one per view and row, of several networks at once.

A bound is an objective's loss before it is summed over rows: ``Bd = -sum_S exp(log_weight) weight
raw`` (nats per answer, at most log p(answer | prompt) on average), for any process and under any
variance chain. The draw is an argument and the row is corrupted once: policy, old policy and
reference read the same arrays, so the noise of their differences cancels where they agree. Scores
of answers under other draws have *independent* noise: the caller decides by what it passes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec, by_example, iid
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.objectives.objective import Objective, weighted_losses
from mdm_jax.rng import stream
from mdm_jax.types import Array, Batch, ModelFn, PyTree, worst_bias
from mdm_jax.variance.transform import VarianceTransform


class ElboPair(NamedTuple):
    """Bounds of the same answers under the same draw, nats per answer.

    Attributes:
        policy, reference: [V, B]; the reference has no gradient.
        count: [B] eligible tokens, by which values per token are divided.
    """

    policy: Array
    reference: Array
    count: Array


class Bound(NamedTuple):
    """A bound under a variance chain; see :func:`sequence_bound`.

    Attributes:
        draw: ``draw(key, state, spec, example_keys=None) -> Draw``, of ``replicates`` independent
            blocks of views; with keys as of ``draws.by_example``.
        values: ``values(model_fn, batch, draw) -> [V, B]`` nats per answer, [M, V, B] for the M
            networks of :func:`networks`.
        bias: the weaker label of objective and chain.
        replicates: R; views are [R, V / R] blocks, each a draw of the whole chain.
    """

    draw: Callable[..., Draw]
    values: Callable[[ModelFn, Batch, Draw], Array]
    bias: str
    replicates: int


def networks(apply_fn: Callable[..., Any], params: PyTree, *fixed: PyTree) -> ModelFn:
    """One ``model_fn`` of several parameters on the same inputs; those ``fixed`` get no gradient.

    ``apply_fn(params, inputs, logsnr, documents)`` as training calls it. Parameters may be
    variables with adapters, and the reference the same without them (``models.lora``): the frozen
    ones are then there once. All are applied alike, so no dropout and no precision differs.
    """

    def model_fn(*inputs: Array, **options: Array) -> tuple[Any, ...]:
        others = (jax.lax.stop_gradient(apply_fn(each, *inputs, **options)) for each in fixed)
        return (apply_fn(params, *inputs, **options), *others)

    return model_fn


def at_temperature(apply_fn: Callable[..., Any], temperature: float) -> Callable[..., Any]:
    """``apply_fn`` with logits over the ``temperature`` > 0, as a sampler draws from them.

    Gradients are otherwise those of a policy that did not write the answers. ValueError if it is
    not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to have a likelihood, got {temperature}")

    def apply(*inputs: Any, **options: Any) -> Array | Readout:
        outputs = apply_fn(*inputs, **options)
        if not isinstance(outputs, Readout):
            return outputs / temperature
        bias = None if outputs.bias is None else outputs.bias / temperature
        return dataclasses.replace(outputs, features=outputs.features / temperature, bias=bias)

    return apply_fn if temperature == 1 else apply


def sequence_bound(
    objective: Objective,
    transform: VarianceTransform,
    *,
    replicates: int = 1,
    allow_biased: bool = False,
) -> Bound:
    """Bounds of answers by an objective under a variance chain, R = ``replicates`` times over.

    Views of a chain are dependent (strata, MIRROR), so what needs independent estimates, such as a
    cross-fitted coefficient, takes whole replicates of it. ValueError unless R is positive, and for
    an objective or chain that is not "exact" (a clipped range of levels, a weighting): its values
    are no bounds. Training may have them with ``allow_biased``; the label stays.
    """
    bias = worst_bias(objective.bias, transform.bias)
    if bias != "exact" and not allow_biased:
        raise ValueError(
            f"{objective.name} under {transform.name} is labelled {bias!r}: its values are no "
            "bounds of the likelihood. Take an exact objective and chain, or allow_biased=True "
            "(in configs alignment.allow_biased) to train on it as it is"
        )
    chain = replicated(transform, replicates)

    def draw(key: Array, state: PyTree, spec: DrawSpec, example_keys: Array | None = None) -> Draw:
        start = iid(key, spec) if example_keys is None else by_example(key, example_keys, spec)
        return chain.draw(key, state, start, spec)

    def values(model_fn: ModelFn, batch: Batch, draw: Draw) -> Array:
        return -jnp.sum(weighted_losses(draw, objective.loss(model_fn, batch, draw)), axis=-1)

    return Bound(draw, values, bias, replicates)


def replicated(transform: VarianceTransform, replicates: int) -> VarianceTransform:
    """R = ``replicates`` independent draws of a whole chain, as views; one is the chain itself.

    Keeps: the law of each view. Couples: what the chain does, within a replicate. Costs: R times
    the chain's passes. Removes: all variance by the factor R. Bias: the chain's. Replicates after
    the first start from noise by slot, as views of ``variance.repeat`` do. ValueError below 1.
    """
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, got {replicates}")
    if replicates == 1:
        return transform

    def draw(key: Array, state: PyTree, current: Draw, spec: DrawSpec) -> Draw:
        blocks = [transform.draw(key, state, current, spec)]
        for number in range(1, replicates):
            own = stream(key, f"replicate {number}")
            blocks.append(transform.draw(own, state, iid(own, spec), spec))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *blocks)

    name = f"{replicates} x {transform.name}"
    views = replicates * transform.views
    return transform._replace(name=name, draw=draw, views=views, members=())


def paired_elbo(
    bound: Bound,
    apply_fn: Callable[..., Any],
    params: PyTree,
    reference: PyTree,
    batch: Batch,
    draw: Draw,
) -> ElboPair:
    """Bounds of answers under a policy and a frozen reference, from one draw and one corruption.

    Passes: 1 of each network per view; gradient through the policy alone, by the path of training.
    With the same parameters the two are equal: bit for bit as they are, to the last bits where the
    program also has the policy's gradient, with which XLA fuses its pass otherwise. Source: VRPO
    (arXiv 2505.19223), which shares the masks; code of others shares seeds, so that masks differ
    with the shape of the batch.
    """
    policy, fixed = bound.values(networks(apply_fn, params, reference), batch, draw)
    return ElboPair(policy, fixed, jnp.sum(jnp.asarray(batch.eligible), axis=-1))


def replicate_means(values: Array, replicates: int) -> Array:
    """Values [..., V, B] averaged within independent replicates, [..., R, B]."""
    views, rows = values.shape[-2:]
    if views % replicates:
        raise ValueError(f"{views} views are no {replicates} replicates of a chain")
    blocks = (*values.shape[:-2], replicates, views // replicates, rows)
    return jnp.mean(values.reshape(blocks), axis=-2)
