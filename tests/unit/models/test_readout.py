"""Networks with a readout: the same losses and gradients as from logits, and no array of logits."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import corruption, likelihood, models, objectives
from mdm_jax import meter as mdm_jax_meter
from mdm_jax.models.cross_entropy import Chunking, Projection
from mdm_jax.training.step import linen_init
from mdm_jax.variance.transform import draw_batch

ROWS = 8
CHUNKING = Chunking(groups=2, positions=5)


def network(**settings):
    model = tiny.transformer(**settings)
    params = jax.eval_shape(linen_init(model, tiny.LENGTH), jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nn.meta.unbox(params))
    return model, tiny.perturbed(zeros)


def drawn(chain, spec):
    return tiny.jit(lambda key: draw_batch(key, chain, chain.init(spec), spec))(jax.random.key(1))


PROCESS = corruption.fixed_count(tiny.MASK_ID)
CASES = {
    "masked": (
        lambda: objectives.masked_nelbo(PROCESS),
        lambda model, c: model.apply if c is None else models.readout_apply(model, c),
    ),
    "block": (
        lambda: objectives.block_nelbo(PROCESS, 3),
        lambda model, c: models.block_apply(model, 3, None, c),
    ),
    "next_token": (
        lambda: objectives.next_token(tiny.MASK_ID),
        lambda model, c: models.causal_apply(model, tiny.MASK_ID, None, c),
    ),
    "uniform": (
        lambda: objectives.uniform_nelbo(tiny.MASK_ID),
        lambda model, c: model.apply if c is None else models.readout_apply(model, c),
    ),
    "self-conditioned": (
        lambda: objectives.self_conditioned(objectives.masked_nelbo(PROCESS), tiny.MASK_ID),
        lambda model, c: model.apply if c is None else models.readout_apply(model, c),
    ),
}


@pytest.mark.parametrize("name", slow_except({"block"}, CASES))
def test_a_training_loss_is_the_same(name):
    """Through the whole network, with two views of every row."""
    make, apply = CASES[name]
    objective = make()
    model, params = network(
        self_conditioning=name == "self-conditioned", tie_embeddings=name == "block"
    )
    batch = jax.tree.map(jnp.asarray, tiny.batch(ROWS))
    chain = tiny.transform()
    spec = objective.spec(ROWS, tiny.LENGTH)
    draw = drawn(chain, spec)
    assert draw.u.shape[0] == 2

    def loss(params, apply_fn):
        stats = objective.loss(lambda *a, **k: apply_fn(params, *a, **k), batch, draw)
        return objectives.sum_losses(draw, stats).loss, stats

    def both(params):
        fns = apply(model, None), apply(model, CHUNKING)
        return [
            jax.value_and_grad(functools.partial(loss, apply_fn=f), has_aux=True)(params)
            for f in fns
        ]

    dense, found = tiny.jit(both)(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-7)


@pytest.mark.slow  # the notebook "variance" measures one
def test_the_variance_meter_measures_networks_with_a_readout():
    model, params = network()
    objective = objectives.masked_nelbo(PROCESS)
    batch, chain = jax.tree.map(jnp.asarray, tiny.batch(ROWS)), tiny.transform()
    spec = objective.spec(ROWS, tiny.LENGTH)
    draw, found = drawn(chain, spec), []
    for apply_fn in (model.apply, models.readout_apply(model, CHUNKING)):
        meter = mdm_jax_meter.make_estimator(apply_fn, objective)

        @tiny.jit
        def measure(params, key, meter=meter):
            along = meter.directional(params, batch, draw, key, 2)
            return along, meter.gradient(params, batch, draw, 2)

        found.append(measure(params, jax.random.key(2)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-6)


@pytest.mark.parametrize("name", slow_except({"masked"}, ["masked", "block", "next_token"]))
def test_likelihoods_are_the_same(name):
    _, apply = CASES[name]
    model, params = network()
    settings = {"passes": 2, "replicates": 2}
    make = {
        "masked": lambda f: likelihood.make_likelihood(f, tiny.MASK_ID, **settings),
        "block": lambda f: likelihood.make_block_likelihood(f, tiny.MASK_ID, 3, **settings),
        "next_token": lambda f: likelihood.make_next_token_likelihood(f, tiny.MASK_ID),
    }[name]
    dense, found = (
        make(apply(model, c))(params, jax.random.key(0), [tiny.batch(ROWS)])
        for c in (None, CHUNKING)
    )
    np.testing.assert_allclose(found.replicate_row_nats, dense.replicate_row_nats, rtol=1e-5)


def test_a_readout_crosses_the_boundaries_of_transformations():
    """What says how its logits are computed is no array: jit and checkpoint leave it as it is."""
    model, params = network(dtype=jnp.bfloat16)
    tokens = jnp.zeros((2, tiny.LENGTH), jnp.int32)
    apply = jax.checkpoint(models.readout_apply(model, CHUNKING))
    readout = tiny.jit(apply)(params, tokens)
    assert readout.chunking == CHUNKING and readout.projection == Projection(False, jnp.bfloat16)
    assert readout.num_tokens == tiny.VOCAB
    np.testing.assert_allclose(
        models.as_logits(readout), tiny.jit(model.apply)(params, tokens), atol=1e-5
    )


@pytest.mark.parametrize("settings", [{"groups": 0}, {"positions": 0}])
def test_impossible_chunks(settings):
    with pytest.raises(ValueError, match="at least 1"):
        Chunking(**settings)


# The M shape of the benchmark, narrower and shorter, with as large a share of logits.
WIDE, LONG, VOCAB = 4, 64, 2048


def head_gradient(held_back: bool, dtype=jnp.float32):
    def loss(features, weights, targets, where):
        readout = models.Readout(features, weights, Projection(False, dtype), Chunking())
        outputs = readout if held_back else readout.logits()
        return jnp.sum(objectives.token_nats(outputs, targets, where, VOCAB - 1))

    shapes = [
        jax.ShapeDtypeStruct((WIDE, LONG, 32), jnp.float32),
        jax.ShapeDtypeStruct((32, VOCAB), jnp.float32),
        jax.ShapeDtypeStruct((WIDE, LONG), jnp.int32),
        jax.ShapeDtypeStruct((WIDE, LONG), jnp.bool_),
    ]
    return jax.value_and_grad(loss, (0, 1)), shapes


def sizes(jaxpr):
    """Numbers of elements of everything that is computed, in loops and calls too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.size for v in equation.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_array_is_as_large_as_the_logits():
    largest = {}
    for held_back in (False, True):
        function, shapes = head_gradient(held_back)
        largest[held_back] = max(sizes(jax.make_jaxpr(function)(*shapes).jaxpr))
    assert largest[False] == WIDE * LONG * VOCAB  # what the walk would find
    assert largest[True] <= WIDE * LONG * VOCAB // 8


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_peak_memory_of_the_step_is_at_most_half(dtype):
    peak = {}
    for held_back in (False, True):
        function, shapes = head_gradient(held_back, dtype)
        compiled = tiny.jit(function).lower(*shapes).compile()
        peak[held_back] = compiled.memory_analysis().temp_size_in_bytes
    assert peak[True] <= peak[False] / 2
