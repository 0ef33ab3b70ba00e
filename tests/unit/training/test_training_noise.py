"""Noise is a function of (seed, step, global row), whatever the devices and microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import zoo

from mdm_jax import sharding, training, variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.objectives.objective import Objective
from mdm_jax.training.step import step_draw
from mdm_jax.variance.transform import Phase

SPEC = DrawSpec(16, 1, (tiny.LENGTH,))


def _draw(chain, seed, step, spec=SPEC):
    run = tiny.jit(lambda step: step_draw(seed, step, chain, chain.init(spec), spec))
    return run(np.int32(step))


def _equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(first), jax.device_get(second))


@pytest.mark.slow  # test_variance_zoo compares the single members on eight devices
@pytest.mark.parametrize("name", zoo.ALL)
def test_draw_is_bit_identical_on_one_and_eight_devices(name):
    chain = zoo.ALL[name]()
    state = chain.init(SPEC)
    mesh = sharding.make_mesh(data=4, fsdp=2)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp")))
    sharded = tiny.jit(lambda step: step_draw(5, step, chain, state, SPEC), out_shardings=rows)(
        jnp.int32(9)
    )
    assert len(sharded.noise.sharding.device_set) == 8
    assert sharded.noise.addressable_shards[0].data.shape[1] == SPEC.batch_size // 8
    alone = _draw(chain, 5, 9)
    assert len(alone.noise.sharding.device_set) == 1
    _equal(sharded, alone)


def test_noise_is_pairwise_distinct_across_rows_steps_and_seeds():
    chain = variance.chain(variance.stratified())
    state = chain.init(SPEC)
    by_step = [
        tiny.jit(jax.vmap(lambda step, seed=seed: step_draw(seed, step, chain, state, SPEC)))
        for seed in (0, 1, 2)
    ]
    found = [jax.tree.map(np.asarray, draw(np.arange(4, dtype=np.int32))) for draw in by_step]
    rows = np.concatenate([draw.noise[:, 0].reshape(-1, tiny.LENGTH) for draw in found])
    assert len(np.unique(rows, axis=0)) == len(rows) == 12 * SPEC.batch_size
    levels = np.concatenate([draw.u.ravel() for draw in found])
    assert len(levels) == len(rows)
    assert len(np.unique(levels)) == len(levels)


@pytest.mark.parametrize(
    "first", [pytest.param(variance.identity, marks=pytest.mark.slow), variance.stratified]
)
def test_mirror_leaves_the_first_view_unchanged(first):
    plain = _draw(variance.chain(first()), 1, 2)
    mirrored = jax.device_get(_draw(variance.chain(first(), variance.mirror()), 1, 2))
    assert mirrored.noise.shape[0] == 2
    _equal(jax.tree.map(lambda leaf: leaf[:1], mirrored), plain)


def test_a_longer_batch_begins_with_the_same_noise():
    longer = jax.device_get(_draw(variance.identity(), 1, 2, SPEC._replace(batch_size=24)))
    _equal(longer.noise[:, :16], _draw(variance.identity(), 1, 2).noise)


def _recorder(rows):
    """An objective whose loss is the noise it was given, and a transform that writes it down."""

    def loss(model_fn, batch, draw):
        zero = 0.0 * jnp.sum(model_fn(batch.tokens, draw.u[0], batch.documents))
        tokens = jnp.broadcast_to(jnp.asarray(batch.tokens)[None, :, :1], draw.u.shape)
        return LossStats(
            raw=draw.noise[..., :1] + zero,
            weight=draw.u,
            eligible=jnp.ones_like(draw.u),
            targets=tokens,
        )

    base = tiny.objective()
    objective = Objective("probe", base.law, base.corruption, base.spec, loss, "exact")
    empty = jnp.zeros((2, rows, 1))
    names = ("raw", "weight", "targets")
    watch = variance.VarianceTransform(
        name="watch",
        phase=Phase.REPLICATE,
        init=lambda spec: dict.fromkeys(names, empty),
        draw=lambda key, state, draw, spec: draw,
        update=lambda state, draw, stats: {
            name: getattr(stats, name).astype(jnp.float32) for name in names
        },
    )
    return objective, variance.chain(variance.stratified(), variance.mirror(), watch)


@pytest.mark.parametrize(
    "parts, devices",
    [
        (4, 8),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1, 1), (2, 1), (4, 1), (1, 8))),
    ],
)
def test_the_step_uses_the_same_noise_for_the_same_row(parts, devices):
    """What the loss inside the jitted step is given, row by row, under any split."""
    rows = 32
    objective, chain = _recorder(rows)
    spec = objective.spec(rows, tiny.LENGTH)
    optimizer = training.adamw(lambda _: 0.0)
    step = training.make_train_step(
        tiny.apply_fn, objective, chain, optimizer, spec, seed=11, num_microbatches=parts
    )
    batch = tiny.batch(rows)
    state = training.new_state(tiny.params(), optimizer, chain, spec)
    state = state.replace(step=jnp.int32(6))
    if devices == 8:
        mesh = sharding.make_mesh()
        sharding.check_batch_size(mesh, rows, parts)
        batch = sharding.place_batch(batch, sharding.batch_sharding(mesh))
        state = sharding.replicate(state, mesh)
    after, _ = tiny.jit(step)(state, batch)
    seen = jax.device_get(after.variance["watch"])
    expected = _draw(chain, 11, 6, spec)
    np.testing.assert_array_equal(seen["raw"], np.asarray(expected.noise)[..., :1])
    np.testing.assert_array_equal(seen["weight"], np.asarray(expected.u))
    tokens = np.asarray(batch.tokens)[None, :, :1].astype(np.float32)
    np.testing.assert_array_equal(seen["targets"], np.broadcast_to(tokens, (2, rows, 1)))
