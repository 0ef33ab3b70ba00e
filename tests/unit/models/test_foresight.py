"""What a step foresees of its losses: right for every bound on tokens, and left alone elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import corruption, objectives
from mdm_jax.models.cross_entropy import Chunking, GivenLosses, Projection, Readout, foreseeing
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
    """Features of inputs and a kernel, and the product with the kernel still to be taken."""
    angle = inputs[..., None] * jnp.arange(1.0, WIDTH + 1).reshape(1, 1, -1)
    features = jnp.sin(angle + jnp.sum(kernel))
    return Readout(features, kernel, Projection(False, jnp.float32), Chunking(1, 5))


def sum_of(objective):
    batch, chain = jax.tree.map(jnp.asarray, tiny.batch(ROWS)), tiny.transform()
    spec = objective.spec(ROWS, tiny.LENGTH)
    draw = draw_batch(jax.random.key(1), chain, chain.init(spec), spec)
    return lambda model_fn: objectives.sum_losses(draw, objective.loss(model_fn, batch, draw)).loss


@pytest.mark.parametrize("name", slow_except({*OBJECTIVES} - {"masked, three levels"}, OBJECTIVES))
def test_every_bound_on_tokens_is_foreseen(name):
    """At zero the slopes are what they are at other losses, since bounds are linear in them."""
    loss = sum_of(OBJECTIVES[name]())
    losses = np.random.default_rng(2).exponential(size=(2 * ROWS, tiny.LENGTH))

    def slopes(losses):
        return jax.grad(
            lambda given: loss(
                lambda *inputs: GivenLosses(**vars(network(KERNEL, *inputs)), losses=given)
            )
        )(losses)

    def expected():
        seen = []

        def watched(*inputs):
            readout = foreseeing(functools.partial(network, KERNEL), loss)(*inputs)
            seen.append(readout.expected)
            return readout

        loss(watched)
        return seen[0]

    found, wanted = tiny.jit(lambda x: (expected(), slopes(x)))(jnp.asarray(losses, jnp.float32))
    assert np.any(wanted != 0)
    np.testing.assert_allclose(found, wanted, rtol=5e-7)


@pytest.mark.parametrize("power", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_gradients_are_the_same_even_if_foreseen_wrongly(power):
    """Of the sum, which is linear in the losses; of a square, whose slopes at zero are zero."""
    linear = sum_of(OBJECTIVES["masked"]())
    loss = lambda model_fn: linear(model_fn) ** power  # noqa: E731

    def run(kernel, known):
        plain = functools.partial(network, kernel)
        return loss(foreseeing(plain, loss) if known else plain)

    (value, found), (same, wanted) = (
        tiny.jit(jax.value_and_grad(functools.partial(run, known=known)))(KERNEL)
        for known in (True, False)
    )
    np.testing.assert_allclose(value, same, rtol=1e-6)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6 * float(jnp.abs(wanted).max()))


def test_losses_that_call_their_network_twice_are_left_alone():
    once = sum_of(OBJECTIVES["masked"]())
    plain = functools.partial(network, KERNEL)
    assert foreseeing(plain, lambda model_fn: once(model_fn) + once(model_fn)) is plain


def test_networks_of_logits_are_left_alone():
    logits = lambda *inputs: network(KERNEL, *inputs).logits()  # noqa: E731
    assert foreseeing(logits, sum_of(OBJECTIVES["masked"]())) is logits
