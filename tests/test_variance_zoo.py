"""Properties that every transform of the zoo has, whatever it does."""

import functools
import itertools
import random

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import zoo

from mdm_jax import corruption, draws, evaluation, objectives, streams, variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.models import toy
from mdm_jax.training import batch_sharding, make_mesh

SPEC = DrawSpec(batch_size=7, num_levels=2, event_shape=(5,))
TEST_FUNCTIONS = {
    "one": (lambda u: jnp.ones_like(u), 1.0),
    "u": (lambda u: u, 0.5),
    "square": (lambda u: u * u, 1 / 3),
    "wave": (lambda u: jnp.sin(7 * u), (1 - np.cos(7.0)) / 7),
}
NUM_DRAWS = 20_000


def many_draws(transform, spec, count, seed=0):
    keys = jax.random.split(jax.random.key(seed), count)
    state = transform.init(spec)
    return jax.jit(
        jax.vmap(
            functools.partial(variance.draw_batch, transform=transform, state=state, spec=spec)
        )
    )(keys)


@functools.cache
def cached_draws(name):
    return jax.tree.map(np.asarray, many_draws(zoo.ALL[name](), SPEC, NUM_DRAWS))


def assert_unit_interval_contract(draw, context=""):
    """E[weight f(u)] = int f within 5 standard errors, for every view, row and level alone."""
    assert np.all((draw.u > 0) & (draw.u < 1)), context
    assert np.all((draw.noise > 0) & (draw.noise < 1)), context
    weight = np.exp(draw.log_weight.astype(np.float64))
    for name, (f, integral) in TEST_FUNCTIONS.items():
        values = weight * np.asarray(f(draw.u), np.float64)
        mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
        assert np.all(np.abs(mean - integral) <= 5 * error + 1e-6), (context, name, mean, error)


def test_zoo_lists_every_public_factory():
    found = set()
    for name in dir(variance):
        factory = getattr(variance, name)
        if callable(factory) and getattr(factory, "__annotations__", {}).get("return") in (
            variance.VarianceTransform,
            "VarianceTransform",
        ):
            found.add(name)
    assert found - {"chain", "stateless"} == set(zoo.SINGLES)


@pytest.mark.parametrize("name", zoo.ALL)
def test_unit_interval_contract(name):
    assert_unit_interval_contract(cached_draws(name), name)


@pytest.mark.parametrize("name", zoo.ALL)
def test_views_shapes_and_label(name):
    transform, draw = zoo.ALL[name](), cached_draws(name)
    assert draw.u.shape == (NUM_DRAWS, transform.views, 7, 2) == draw.log_weight.shape
    assert draw.noise.shape == (NUM_DRAWS, transform.views, 7, 5)
    assert draw.u.dtype == draw.noise.dtype == draw.log_weight.dtype == np.float32
    assert transform.bias in variance.BIAS_LABELS


@pytest.mark.parametrize("name", zoo.ALL)
def test_marginals_are_uniform(name):
    """Kolmogorov-Smirnov at 1e-6 for each slot alone: no slot is tied to a part of the interval."""
    draw = cached_draws(name)
    flat_u = draw.u.reshape(NUM_DRAWS, -1)
    flat_noise = draw.noise.reshape(NUM_DRAWS, -1)
    for column in itertools.chain(flat_u.T, flat_noise.T[:: max(1, flat_noise.shape[1] // 20)]):
        assert scipy.stats.kstest(column, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("name", zoo.ALL)
def test_one_row_of_one_view_is_independent(name):
    """Within (view, row) all numbers are uncorrelated: the contract that keeps contexts lawful."""
    draw = cached_draws(name)
    for view, row in itertools.product(range(draw.u.shape[1]), (0, 6)):
        numbers = np.concatenate([draw.u[:, view, row], draw.noise[:, view, row]], axis=1)
        for values in (numbers, np.cos(2 * np.pi * numbers), np.abs(numbers - 0.5)):
            correlation = np.corrcoef(values.T) - np.eye(values.shape[1])
            assert np.abs(correlation).max() < 5 / NUM_DRAWS**0.5  # standard error 1 / sqrt(N)


@pytest.mark.parametrize("name", zoo.ALL)
def test_first_view_does_not_depend_on_replication(name):
    """Adding replications leaves the level and the first view's noise as they were."""
    transform = zoo.ALL[name]()
    kept = [t for t in transform.members or (transform,) if t.phase != variance.Phase.REPLICATE]
    key = jax.random.key(3)
    both = [
        variance.draw_batch(key, t, t.init(SPEC), SPEC)
        for t in (variance.chain(*(transform.members or (transform,))), variance.chain(*kept))
    ]
    chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[0], d) for d in both))


@pytest.mark.parametrize("name", zoo.ALL)
def test_state_structure_is_stable_and_draw_traces_once(name):
    transform = zoo.ALL[name]()
    state = transform.init(SPEC)
    chex.clear_trace_counter()  # it counts by name, over tests too

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(key, state):
        draw = variance.draw_batch(key, transform, state, SPEC)
        ones = jnp.ones_like(draw.u)
        return draw, transform.update(state, draw, LossStats(ones, ones, ones, ones))

    for i in range(3):
        _, new = step(jax.random.key(i), state)
        chex.assert_trees_all_equal_structs(state, new)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        state = new


@pytest.mark.parametrize("name", zoo.ALL)
def test_non_finite_losses_do_not_poison_the_next_draw(name):
    transform = zoo.ALL[name]()
    state = transform.init(SPEC)
    draw = variance.draw_batch(jax.random.key(0), transform, state, SPEC)
    bad = jnp.full_like(draw.u, jnp.nan)
    state = transform.update(state, draw, LossStats(bad, bad, bad, bad))
    after = variance.draw_batch(jax.random.key(1), transform, state, SPEC)
    chex.assert_tree_all_finite(after)


@pytest.mark.parametrize("name", zoo.ALL)
def test_same_numbers_on_eight_devices(name):
    spec = DrawSpec(batch_size=16, num_levels=2, event_shape=(5,))
    transform = zoo.ALL[name]()
    state = transform.init(spec)

    def make(key):
        return variance.draw_batch(key, transform, state, spec)

    mesh = make_mesh(data=8)
    sharding = jax.sharding.NamedSharding(
        mesh, jax.sharding.PartitionSpec(None, *batch_sharding(mesh).spec)
    )
    key = jax.random.key(11)
    sharded = jax.jit(make, out_shardings=sharding)(key)
    assert len(sharded.noise.sharding.device_set) == 8
    chex.assert_trees_all_equal(jax.jit(make)(key), jax.device_get(sharded))


@pytest.mark.parametrize("process", ["fixed_count", "rao_blackwell"])
@pytest.mark.parametrize("name", zoo.ALL)
def test_exact_transforms_keep_loss_and_gradient_of_the_enumerated_toy(name, process):
    """Mean over draws of every row's loss and gradient against enumeration, 5 standard errors.

    Standard errors come from the spread over independent batches, so couplings are in them.
    """
    transform = zoo.ALL[name]()
    assert transform.bias == "exact"
    batch = toy.toy_batch()
    objective = objectives.masked_nelbo(getattr(corruption, process)(toy.MASK_ID))
    spec = objective.spec(3, toy.LENGTH)
    state = transform.init(spec)
    model = toy.Toy()

    def row_losses(params, key):
        draw = variance.draw_batch(key, transform, state, spec)
        stats = objective.loss(lambda *a: model.apply(params, *a), batch, draw)
        return jnp.mean(jnp.exp(draw.log_weight) * stats.weight * stats.raw, axis=(0, 2))

    params = toy.toy_params()
    keys = jax.random.split(jax.random.key(5), 6_000)
    losses = np.asarray(jax.jit(jax.vmap(lambda k: row_losses(params, k)))(keys), np.float64)
    exact = evaluation.exact_nelbo(lambda *a: model.apply(params, *a), batch, toy.MASK_ID)
    assert_mean(losses, exact)

    jacobian = jax.jit(jax.vmap(lambda k: jax.jacrev(row_losses)(params, k)["params"]["theta"]))
    assert_mean(np.asarray(jacobian(keys[:3000]), np.float64), _exact_gradient())


@functools.cache
def _exact_gradient():
    """d NELBO(x) / d theta for each toy row, by central differences of the enumerated bound."""
    rows, step = [], 1e-4

    def bound(theta):
        with jax.enable_x64(True):
            params = {"params": {"theta": jnp.asarray(theta, jnp.float64)}}
            model = toy.Toy(dtype=jnp.float64)
            return evaluation.exact_nelbo(
                lambda *a: model.apply(params, *a), toy.toy_batch(), toy.MASK_ID
            )

    for i in range(3):
        shift = step * np.eye(3)[i]
        rows.append((bound(toy.THETA + shift) - bound(toy.THETA - shift)) / (2 * step))
    return np.stack(rows, axis=1)


def assert_mean(samples, expected):
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), 5 * error + 1e-5)


def test_random_chains_refuse_or_keep_the_contract():
    """30 random orders of up to four members: refused with two names, or lawful."""
    rng, spec = random.Random(0), DrawSpec(5, 1, (3,))
    outcomes = []
    for number in range(30):
        names = [rng.choice(list(zoo.SINGLES)) for _ in range(rng.randint(1, 4))]
        try:
            transform = variance.chain(*(zoo.SINGLES[name]() for name in names))
        except ValueError as error:
            assert sum(name in str(error) for name in set(names)) >= 1
            outcomes.append("refused")
            continue
        draw = jax.tree.map(np.asarray, many_draws(transform, spec, 5_000, seed=number))
        assert_unit_interval_contract(draw, names)
        outcomes.append("lawful")
    assert {"refused", "lawful"} == set(outcomes)


def test_streams_differ_by_name_step_and_seed():
    key = streams.step_key(0, 3)
    keys = [
        streams.stream(key, "a"),
        streams.stream(key, "b"),
        streams.stream(streams.step_key(0, 4), "a"),
        streams.stream(streams.step_key(1, 3), "a"),
    ]
    values = {float(draws.open_uniform(k, ())) for k in keys}
    assert len(values) == 4
