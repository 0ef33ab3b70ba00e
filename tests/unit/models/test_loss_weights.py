"""Per-token loss weights computed before the forward pass, for every bound on tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import corruption, objectives
from mdm_jax.models.cross_entropy import Chunking, Projection, Readout, with_loss_weights
from mdm_jax.variance.transform import draw_batch

ROWS, WIDTH = 4, 3
PROCESS = corruption.fixed_count(tiny.MASK_ID)
OBJECTIVES = {
    "masked": lambda: objectives.masked_nelbo(PROCESS),
    "masked, three levels": lambda: objectives.masked_nelbo(PROCESS, num_levels=3),
    "next token": lambda: objectives.next_token(tiny.MASK_ID),
    "uniform": lambda: objectives.uniform_nelbo(tiny.MASK_ID),
}
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(WIDTH, tiny.MASK_ID + 1)), jnp.float32)


def network(kernel, inputs, *_):
    angle = inputs[..., None] * jnp.arange(1.0, WIDTH + 1).reshape(1, 1, -1)
    features = jnp.sin(angle + jnp.sum(kernel))
    return Readout(features, kernel, Projection(False, jnp.float32), Chunking(1, 5))


def sum_of(objective):
    batch, chain = jax.tree.map(jnp.asarray, tiny.batch(ROWS)), tiny.transform()
    spec = objective.spec(ROWS, tiny.LENGTH)
    draw = draw_batch(jax.random.key(1), chain, chain.init(spec), spec)
    return lambda model_fn: objectives.sum_losses(draw, objective.loss(model_fn, batch, draw)).loss


@pytest.mark.parametrize("name", slow_except({"masked, three levels"}, OBJECTIVES))
def test_bounds_are_linear_so_weights_hold_at_all_losses(name):
    loss = sum_of(OBJECTIVES[name]())
    losses = np.random.default_rng(2).exponential(size=(2 * ROWS, tiny.LENGTH))

    def weights_at(losses):
        fixed = lambda *inputs: dataclasses.replace(network(KERNEL, *inputs), losses=losses)  # noqa: E731
        return jax.grad(
            lambda losses: loss(lambda *i: dataclasses.replace(fixed(*i), losses=losses))
        )(losses)

    def before_the_forward_pass():
        readouts = []

        def recorded(*inputs):
            readouts.append(with_loss_weights(functools.partial(network, KERNEL), loss)(*inputs))
            return readouts[0]

        loss(recorded)
        return readouts[0].loss_weights

    both = tiny.jit(lambda x: (before_the_forward_pass(), weights_at(x)))
    found, wanted = both(jnp.asarray(losses, jnp.float32))
    assert np.any(wanted != 0)
    np.testing.assert_allclose(found, wanted, rtol=5e-7)


@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_are_right_even_if_the_weights_are_wrong(power):
    """Of the sum, which is linear in the losses; of a square, whose derivative at zero is zero."""
    linear = sum_of(OBJECTIVES["masked"]())
    loss = lambda model_fn: linear(model_fn) ** power  # noqa: E731

    def run(kernel):
        plain = functools.partial(network, kernel)
        return loss(with_loss_weights(plain, loss)), loss(plain)

    gradients = tiny.jit(
        lambda k: [jax.value_and_grad(lambda k, i=i: run(k)[i])(k) for i in (0, 1)]
    )
    (value, found), (same, wanted) = gradients(KERNEL)
    np.testing.assert_allclose(value, same, rtol=1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(jnp.abs(wanted).max()))


def test_other_networks_and_losses_are_left_alone():
    once = sum_of(OBJECTIVES["masked"]())
    plain = functools.partial(network, KERNEL)
    assert with_loss_weights(plain, lambda model_fn: once(model_fn) + once(model_fn)) is plain
    logits = lambda *inputs: network(KERNEL, *inputs).logits()  # noqa: E731
    assert with_loss_weights(logits, once) is logits
