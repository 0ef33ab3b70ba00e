"""Properties that every transform of the zoo has, whatever it does."""

import functools
import importlib
import itertools
import pkgutil
import random
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import toy_oracle as oracle
import zoo
from variants import slow_except

from mdm_jax import corruption, draws, objectives, testing, types, variance
from mdm_jax import rng as mdm_jax_rng
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.sharding import batch_sharding, make_mesh
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.densities import log_spaced_edges
from mdm_jax.variance.transform import Phase, stateless

pytestmark = pytest.mark.first

SPEC = DrawSpec(batch_size=7, num_levels=2, event_shape=(4,), separate_levels=True)
NUM_DRAWS = 6_000
TEST_FUNCTIONS = {
    "one": (lambda u: np.ones_like(u), lambda u: u),
    "u": (lambda u: u, lambda u: u**2 / 2),
    "square": (lambda u: u * u, lambda u: u**3 / 3),
    "wave": (lambda u: np.sin(7 * u), lambda u: -np.cos(7 * u) / 7),
}
"""Name -> (function, an antiderivative)."""
TOY_ROWS = np.arange(SPEC.batch_size) % 3
LOADED = ("ema_steep", "history_steep", "ppots_steep", "quantile_steep")
"""One of the states of each exact learner; the others are extremes of the same code."""


def cached_draws(name):
    return zoo.all_draws(SPEC, NUM_DRAWS)[name]


def assert_unit_interval_contract(draw, context="", support=(0.0, 1.0)):
    """E[weight f(u)] = int f within 5 standard errors, for every view, row and level alone."""
    assert np.all((draw.u > 0) & (draw.u < 1)), context
    assert np.all((draw.noise > 0) & (draw.noise < 1)), context
    weight = np.exp(draw.log_weight.astype(np.float64))
    for name, (f, integral) in TEST_FUNCTIONS.items():
        values = weight * f(draw.u.astype(np.float64))
        mean, error = values.mean(0), values.std(0, ddof=1) / len(values) ** 0.5
        expected = integral(support[1]) - integral(support[0])
        assert np.all(np.abs(mean - expected) <= 5 * error + 1e-6), (context, name, mean, error)


def uniform_p_values(samples):
    """p-value of each column's Kolmogorov-Smirnov distance to the uniform law; samples [N, n]."""
    count = len(samples)
    ordered = np.sort(samples.astype(np.float64), axis=0)
    rank = np.arange(count)[:, None]
    distance = np.maximum(ordered - rank / count, (rank + 1) / count - ordered).max(0)
    return scipy.stats.kstwobign.sf(distance * count**0.5)


@functools.cache
def jitted(method):
    """A method of densities, compiled once for each of their types."""
    return zoo.quick(lambda density, u: getattr(density, method)(u))


PARTS = {"chain", "stateless", "running_bins", "learned_warp", "curve_warp", "unweighted"}
"""Functions that return a transform from other parts than settings."""


def public_factories():
    """Name -> factory, of every module of the package."""
    found = {}
    for info in pkgutil.walk_packages(variance.__path__, "mdm_jax.variance."):
        for name, value in vars(importlib.import_module(info.name)).items():
            returned = getattr(value, "__annotations__", {}).get("return")
            if returned is variance.VarianceTransform and not name.startswith("_"):
                found[name] = value
    return {name: factory for name, factory in found.items() if name not in PARTS}


def test_zoo_lists_every_public_factory():
    assert set(public_factories()) == {*zoo.SINGLES, "cdtd_warp_logistic"}  # one of LEARNERS
    exported = {n for n, v in vars(variance).items() if callable(v) and not n.startswith("_")}
    assert set(zoo.SINGLES) - exported == {"importance"} and len(exported) <= 30
    labels = {name: factory().bias for name, factory in zoo.ALL.items()}
    assert {name for name, bias in labels.items() if bias == "exact"} == set(zoo.EXACT)
    assert {name for name, bias in labels.items() if bias == "truncated"} == set(zoo.RANGES)
    assert {name for name, bias in labels.items() if bias == "biased"} == set(zoo.BIASED)


@pytest.mark.parametrize("name", zoo.SINGLES)
def test_docstring_states_what_it_does(name):
    text = public_factories()[name].__doc__
    for word in ("Keeps:", "Couples:", "Costs:", "Bias:"):
        assert word in text
    assert name == "identity" or ("Removes:" in text and "Reference:" in text)


@pytest.mark.parametrize("name", zoo.UNBIASED)
def test_unit_interval_contract(name):
    assert_unit_interval_contract(cached_draws(name), name, zoo.RANGES.get(name, (0.0, 1.0)))


@pytest.mark.parametrize("name", zoo.ALL)
def test_views_shapes_and_label(name):
    transform, draw = zoo.ALL[name](), cached_draws(name)
    assert draw.u.shape == (NUM_DRAWS, transform.views, 7, 2) == draw.log_weight.shape
    assert draw.noise.shape == (NUM_DRAWS, transform.views, 7, 4)
    assert draw.u.dtype == draw.noise.dtype == draw.log_weight.dtype == np.float32
    assert transform.bias in types.BIAS_LABELS


@pytest.mark.parametrize(
    "name", slow_except({*zoo.UNBIASED} & {*zoo.SINGLES, *zoo.CHAINS, *LOADED}, zoo.UNBIASED)
)
def test_marginals_are_uniform(name):
    """Kolmogorov-Smirnov at 1e-6 for each slot alone: no slot is tied to a part of the interval.

    Levels of a warp are taken back by the distribution function of the density it claims.
    """
    draw, density = cached_draws(name), zoo.densities().get(name)
    u = draw.u if density is None else np.asarray(jitted("cdf")(density, draw.u))
    for values in (u, draw.noise):
        assert uniform_p_values(values.reshape(NUM_DRAWS, -1)).min() > 1e-6


@pytest.mark.parametrize("name", zoo.densities())
def test_weight_is_the_density_that_was_sampled(name):
    draw, density = cached_draws(name), zoo.densities()[name]
    # A learned map is inverted here, to the rounding of the quantile.
    atol = 1e-4 if name == "quantile_steep" else 1e-5
    found = jitted("log_pdf")(density, draw.u)
    np.testing.assert_allclose(draw.log_weight, -found, rtol=0, atol=atol)


@pytest.mark.parametrize("name", zoo.ALL)
def test_one_row_of_one_view_is_independent(name):
    """Within (view, row) all numbers are uncorrelated: the contract that keeps contexts lawful."""
    draw = cached_draws(name)
    if name in zoo.TIED_LEVELS:  # one level is as free as ever, the others of the row follow it
        assert np.abs(scipy.stats.spearmanr(*draw.u[:, 0, 0].T).statistic) > 0.99
    elif name in zoo.SEPARATE_LEVELS:  # tied, which their spec allows; each is free
        assert zoo.ALL[name]().members or np.all(np.diff(np.floor(draw.u * 14)) != 0)
    if name in zoo.TIED_LEVELS + zoo.SEPARATE_LEVELS:
        draw = draw._replace(u=draw.u[..., :1])
    for view, row in itertools.product(range(draw.u.shape[1]), (0, 6)):
        numbers = np.concatenate([draw.u[:, view, row], draw.noise[:, view, row]], axis=1)
        for values in (numbers, np.cos(2 * np.pi * numbers), np.abs(numbers - 0.5)):
            correlation = np.corrcoef(values.T) - np.eye(values.shape[1])
            assert np.abs(correlation).max() < 5 / NUM_DRAWS**0.5  # standard error 1 / sqrt(N)


def test_first_view_of_a_replication_is_what_it_was_given():
    """Against the same keys without any transform, and within a chain whose key is the member's."""
    names = [name for name in zoo.SINGLES if zoo.ALL[name]().phase == Phase.REPLICATE]
    assert {"mirror", "rotate", "rotate_ranks", "repeat"} == set(names)
    for name in names:
        given, made = cached_draws("identity"), cached_draws(name)
        pair = [jax.tree.map(lambda a: a[:, 0], d) for d in (given, made)]
        chex.assert_trees_all_close(*pair, rtol=1e-6, custom_message=name)
    chained = [cached_draws(name) for name in ("nested", "stratified_mirror")]
    chex.assert_trees_all_equal(*chained)


@pytest.mark.slow
def test_first_view_does_not_depend_on_replication():
    """Adding replications leaves the level and the first view's noise as they were."""
    without = {}
    for name, factory in zoo.ALL.items():
        members = factory().members or (factory(),)
        kept = [t for t in members if t.phase != Phase.REPLICATE]
        if len(kept) < len(members):
            without[name] = variance.chain(*kept)
    assert {"mirror", "rotate", "rotate_ranks", "repeat", "nested"} <= set(without)
    alone = {chain.name: chain for chain in without.values()}

    def draw(key):
        start = draws.iid(key, SPEC)
        return {n: t.draw(key, t.init(SPEC), start, SPEC) for n, t in alone.items()}

    few = 20
    alone = zoo.quick(jax.vmap(draw))(zoo.draw_keys(NUM_DRAWS)[:few])
    for name, chain in without.items():
        both = (alone[chain.name], cached_draws(name))
        pair = [jax.tree.map(lambda a: a[:few, 0], d) for d in both]
        # Up to the rounding of two programs.
        chex.assert_trees_all_close(*pair, rtol=1e-6, custom_message=name)


def some_stats(draw, value=1.0):
    """Statistics of a loss that depends on level and noise."""
    shape = draw.u.shape
    raw = value * (1.0 + draw.u + draw.noise[..., :1])
    counts = jnp.full(shape, 4.0), jnp.full(shape, 2)
    return LossStats(raw, jnp.ones(shape), *counts, gradient_norms=jnp.square(raw))


LEARNING = [
    name
    for name in zoo.ALL
    if jax.tree.leaves(jax.eval_shape(functools.partial(zoo.state, name, SPEC)))
]
"""What has a state that a loss could spoil."""


@functools.cache
def learning_step():
    """Jitted (states, number, offset, everything) -> new states after a cached draw, by name.

    The loss of one slot is off by ``offset``; ``everything`` is added to all that is measured.
    """
    chex.clear_trace_counter()  # it counts by name, over tests too

    @chex.assert_max_traces(n=1)
    def step_of_the_zoo(states, drawn, offset, everything):
        def learn(transform, state, draw):
            stats = some_stats(draw)
            raw = stats.raw.at[0, 3, 1].add(offset)
            stats = stats._replace(raw=raw, gradient_norms=jnp.square(raw))
            stats = LossStats(*(f if f.dtype == jnp.int32 else f + everything for f in stats))
            return transform.update(state, draw, stats)

        return zoo.for_each(learn, states, drawn)

    step = zoo.quick(step_of_the_zoo)

    def run(states, number, offset=0.0, everything=0.0):
        drawn = {n: jax.tree.map(lambda a: a[number], cached_draws(n)) for n in LEARNING}
        return step(states, drawn, jnp.float32(offset), jnp.float32(everything))

    return run


def initial_states():
    return {name: zoo.state(name, SPEC) for name in LEARNING}


def test_state_structure_is_stable_and_a_step_traces_once():
    states = initial_states()
    for number in range(3):
        new = learning_step()(states, number)
        chex.assert_trees_all_equal_structs(states, new)
        chex.assert_trees_all_equal_shapes_and_dtypes(states, new)
        states = new


BAD = ({"everything": jnp.nan}, *({"offset": x} for x in (jnp.nan, jnp.inf, -jnp.inf, 1e30)))
"""Nothing is a number, or one loss is none or so large that its square is none."""


@functools.cache
def after_bad_losses():
    """States before, and after each kind of bad losses, by name."""
    before = initial_states()
    return before, [learning_step()(before, 0, **bad) for bad in BAD]


@pytest.mark.parametrize("name", LEARNING)
def test_non_finite_losses_do_not_poison_the_state(name):
    """One bad loss leaves the moments as they were, and is counted; draws are as finite as ever."""
    before, states = after_bad_losses()
    before = before[name]
    chex.assert_tree_all_finite(cached_draws(name))
    for after in (states_after[name] for states_after in states):
        if hasattr(before, "rejected"):
            assert after.rejected == before.rejected + 1
            after = after._replace(rejected=before.rejected)
        chex.assert_trees_all_equal(before, after)


def test_draws_do_not_read_the_number_of_bad_batches():
    """So a state that has refused a batch draws as before."""
    for name in set(LEARNING) & set(zoo.MEMBERS):
        transform, state = zoo.ALL[name](), zoo.state(name, SPEC)
        if hasattr(state, "rejected"):
            state = state._replace(rejected=None)  # reading it would raise
            draw = functools.partial(variance.draw_batch, transform=transform, spec=SPEC)
            jax.eval_shape(lambda key: draw(key, state=state), zoo.draw_keys(1)[0])  # noqa: B023


MESH_FEW = ("stratified", "rotate_ranks", "levels_ppots_rotate", "ppots_steep")
"""One of each phase: a coupling of rows, views, a chain, and a warp with a learnt state."""


@pytest.mark.parametrize(
    "names",
    [
        MESH_FEW,
        pytest.param((*zoo.SINGLES, "levels_ppots_rotate", "ppots_steep"), marks=pytest.mark.slow),
    ],
    ids=["few", "all"],
)
def test_same_numbers_on_eight_devices(names):
    """Draws bit for bit; learnt states up to the order of summation."""
    spec = DrawSpec(batch_size=16, num_levels=2, event_shape=(5,), separate_levels=True)
    transforms = {name: zoo.ALL[name]() for name in names}
    states = {name: zoo.state(name, spec) for name in transforms}

    def make(key):
        start = draws.iid(key, spec)
        drawn = {n: t.draw(key, states[n], start, spec) for n, t in transforms.items()}
        steep = drawn["ppots_steep"]
        learnt = transforms["ppots_steep"].update(states["ppots_steep"], steep, some_stats(steep))
        return drawn, learnt

    mesh = make_mesh(data=8)
    by_rows, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        for axes in ((None, *batch_sharding(mesh).spec), ())
    )
    key = jax.random.key(11)
    sharded, learnt_sharded = zoo.quick(make, out_shardings=(by_rows, whole))(key)
    assert all(len(leaf.sharding.device_set) == 8 for leaf in jax.tree.leaves(sharded))
    single, learnt = zoo.quick(make)(key)
    for name, draw in single.items():
        chex.assert_trees_all_equal(draw, jax.device_get(sharded[name]), custom_message=name)
    chex.assert_trees_all_close(learnt, jax.device_get(learnt_sharded), rtol=1e-6)


@functools.cache
def row_loss_and_gradient(process):
    """Jitted (row [N], u [N, 1], noise [N, 4]) -> weighted loss [N], gradient in theta [N, 3]."""
    objective = objectives.masked_nelbo(getattr(corruption, process)(toys.MASK_ID))
    model, rows = toys.Toy(), jnp.asarray(toys.ROWS)
    whole = jnp.ones((1, toys.LENGTH), bool)

    def loss(params, row, u, noise):
        batch = Batch(rows[row][None], whole, whole.astype(int), jnp.full(1, toys.LENGTH))
        draw = Draw(u[None, None], jnp.zeros((1, 1, 1)), noise[None, None])
        stats = objective.loss(lambda *a: model.apply(params, *a), batch, draw)
        return jnp.sum(stats.weight * stats.raw)

    def both(row, u, noise):
        value, gradient = jax.value_and_grad(loss)(toys.toy_params(), row, u, noise)
        return value, gradient["params"]["theta"]

    return jax.jit(jax.vmap(both))


def toy_estimates(draw, process):
    """Loss and gradient of every toy row in every draw, views averaged: [N, B], [N, B, 3]."""
    run, count, views = row_loss_and_gradient(process), *draw.u.shape[:2]
    rows = jnp.asarray(np.tile(TOY_ROWS, (count, 1)).ravel())
    losses, gradients = 0.0, 0.0
    for view in range(views):
        u = draw.u[:, view, :, :1].reshape(-1, 1)
        loss, gradient = run(rows, u, draw.noise[:, view].reshape(-1, 4))
        weight = np.exp(draw.log_weight[:, view, :, 0].astype(np.float64)) / views
        losses += weight * np.asarray(loss, np.float64).reshape(count, -1)
        gradients += weight[..., None] * np.asarray(gradient).reshape(count, -1, 3)
    return losses, gradients


def assert_mean(samples, expected):
    error = samples.std(0, ddof=1) / len(samples) ** 0.5
    np.testing.assert_array_less(np.abs(samples.mean(0) - expected), 5 * error + 1e-5)


@functools.cache
def exact_toy():
    """NELBO [3] and d NELBO / d theta [3, 3] of the toy's rows, by enumeration.

    The gradient by central differences of the enumerated bound: no path through our autodiff.
    """

    def bound(theta):
        with jax.enable_x64(True):
            params = {"params": {"theta": jnp.asarray(theta, jnp.float64)}}
            model = toys.Toy(dtype=jnp.float64)
            return testing.exact_nelbo(
                lambda *a: model.apply(params, *a), toys.toy_batch(), toys.MASK_ID
            )

    columns, step = [], 1e-4
    for shift in step * np.eye(3):
        columns.append((bound(toys.THETA + shift) - bound(toys.THETA - shift)) / (2 * step))
    return bound(toys.THETA), np.stack(columns, axis=1)


@pytest.mark.parametrize("process", slow_except({"fixed_count"}, ["fixed_count", "rao_blackwell"]))
@pytest.mark.parametrize(
    "name", slow_except({*zoo.EXACT} & {*zoo.SINGLES, *zoo.CHAINS, *LOADED}, zoo.EXACT)
)
def test_exact_transforms_keep_loss_and_gradient_of_the_enumerated_toy(name, process):
    """Mean over draws of every row's loss and gradient against enumeration, 5 standard errors.

    Standard errors come from the spread over independent batches, so couplings are in them.
    """
    losses, gradients = toy_estimates(cached_draws(name), process)
    bound, slope = exact_toy()
    assert_mean(losses, bound[TOY_ROWS])
    assert_mean(gradients, slope[TOY_ROWS])


def rao_blackwell_factor(rates):
    """P(M | m) times the weight of mask M, [N, 16]."""
    return np.array([5 / k if k else 0.0 for k in oracle.SIZE]) * oracle.bernoulli_law(rates)


@pytest.mark.parametrize("name", zoo.DRIFTING)
def test_biased_transforms_estimate_what_their_profile_says(name):
    """int g exp(log_density + log_weight) du, which is not the enumerated bound."""
    losses, gradients = toy_estimates(cached_draws(name), "rao_blackwell")
    u, du = level_nodes()
    change = du * np.exp(sum(part[:, 0] for part in profiles_at_nodes()[name]))
    factor = change @ rao_blackwell_factor(1 - u)
    assert_mean(losses, (oracle.loss_table() @ factor)[TOY_ROWS])
    assert_mean(gradients, np.einsum("rmp,m->rp", oracle.gradient_table(), factor)[TOY_ROWS])
    error = losses.std(0, ddof=1) / NUM_DRAWS**0.5
    assert np.all(np.abs(exact_toy()[0][TOY_ROWS] - losses.mean(0)) > 5 * error)


def test_clipped_is_off_by_what_it_leaves_out():
    """Rates in [0.3, 0.8] only: the bound's part there, which is far from the bound."""
    transform = zoo.ALL["clipped"]()
    assert transform.bias == "truncated"
    losses, gradients = toy_estimates(cached_draws("clipped"), "rao_blackwell")
    rates, weights = oracle.gauss([0.3, 0.8], 6)
    factor = rao_blackwell_factor(rates)
    part = np.einsum("rm,nm,n->r", oracle.loss_table(), factor, weights)
    slope = np.einsum("rmp,nm,n->rp", oracle.gradient_table(), factor, weights)
    assert_mean(losses, part[TOY_ROWS])
    assert_mean(gradients, slope[TOY_ROWS])
    error = losses.std(0, ddof=1) / NUM_DRAWS**0.5
    assert np.all(exact_toy()[0][TOY_ROWS] - losses.mean(0) > 50 * error)


PROFILED = [name for name in zoo.ALL if zoo.ALL[name]().profile is not None]


@functools.cache
def profile_function():
    def run(places):
        states = {name: zoo.state(name, SPEC) for name in places}
        return zoo.for_each(lambda transform, *at: transform.profile(*at), states, places)

    return zoo.quick(run)


def profiles(places):
    """Name -> profile of each member of PROFILED at the quantiles [N, 2] given for it."""
    return jax.tree.map(lambda a: np.asarray(a, np.float64), profile_function()(places))


@functools.cache
def profiles_at_nodes():
    """Those at the nodes of :func:`level_nodes`."""
    u, _ = level_nodes()
    return profiles(dict.fromkeys(PROFILED, np.stack([u, u], 1).astype(np.float32)))


def test_profile_is_that_of_the_draws():
    """The factor that was put on each loss, for every warp; what has none leaves it alone."""
    names = {name for name in zoo.ALL if "cdtd" not in name}
    warps = names & set(PROFILED)
    assert set(zoo.densities()) | set(zoo.CHAINS) | {"ppots", "cdcd_loaded"} <= warps
    count = len(level_nodes()[0])  # as many as elsewhere, so that one program serves

    def first(field):
        return {n: getattr(cached_draws(n), field)[:, 0].reshape(-1, 2)[:count] for n in PROFILED}

    found, paid = profiles(first("u")), first("log_weight")
    for name in warps:
        np.testing.assert_allclose(
            found[name].log_weight, paid[name], rtol=0, atol=2e-4, err_msg=name
        )
    for name in names - warps:
        np.testing.assert_array_equal(cached_draws(name).log_weight, 0)


@functools.cache
def level_nodes():
    """Nodes and weights over the quantile, cut at the edges of every density of the zoo."""
    edges = [log_spaced_edges(bins, 1e-3) for bins in (6, 8)]
    edges += [zoo.BINS, np.linspace(0, 1, 97), [0.05, 0.2, 0.3, 0.7, 0.8, 0.95]]
    return oracle.gauss(np.unique(np.concatenate(edges).astype(np.float32)), 3)


def test_profile_says_what_is_estimated():
    """Density and factor cancel for exact members; a truncated one draws nothing outside."""
    u, du = level_nodes()
    for name, (log_density, log_weight) in profiles_at_nodes().items():
        mass = du @ np.exp(log_density)
        np.testing.assert_allclose(mass, [1, 1], rtol=2e-2, err_msg=name)
        change = log_density + log_weight
        if name in zoo.RANGES:
            low, high = zoo.RANGES[name]
            inside = (u > low - 1e-7) & (u < high + 1e-7)
            assert np.all(change[~inside] == -np.inf)
            np.testing.assert_allclose(change[inside], 0, atol=1e-5, err_msg=name)
        elif name in zoo.DRIFTING:
            assert np.ptp(change) > 1
        elif name not in zoo.TIED_LEVELS:
            np.testing.assert_allclose(change, 0, atol=1e-5, err_msg=name)


def test_profile_of_a_warp_that_tells_none_is_not_known():
    silent = stateless("silent", Phase.WARP, lambda _key, draw, _spec: draw)
    assert variance.chain(variance.stratified(), silent).profile is None


def random_chain(rng):
    """Names of up to four members, half of the time in a lawful order of phases."""
    names = [rng.choice(list(zoo.SINGLES)) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.5:
        names.sort(key=lambda name: zoo.SINGLES[name]().phase)
    return names


def refusal(names):
    """The message with which a chain is refused, or None."""
    try:
        variance.chain(*(zoo.SINGLES[name]() for name in names))
    except ValueError as error:
        return str(error)
    return None


def check_random_chains(rng, count, per_compilation):
    """Builds random chains; refused ones name the two that clash, lawful ones are unbiased."""
    built = []
    for _ in range(count):
        names = random_chain(rng)
        message = refusal(names)
        if message is None:
            built.append(names)
        else:
            named = set(re.findall(r"'(\w+)'", message)) & set(names)
            assert len(named) == 2 or ("twice" in message and len(named) == 1), (names, message)
    assert count // 5 < len(built) < count - count // 5
    bound, slope = exact_toy()
    for start in range(0, len(built), per_compilation):
        part = built[start : start + per_compilation]
        chains = [variance.chain(*(zoo.SINGLES[name]() for name in names)) for names in part]
        states = [chain.init(SPEC) for chain in chains]

        def draw(key, chains=chains, states=states):
            start = draws.iid(key, SPEC)
            return [chain.draw(key, own, start, SPEC) for chain, own in zip(chains, states)]

        keys = jax.random.split(jax.random.key(start), 2_000)
        found = jax.tree.map(np.asarray, zoo.quick(jax.vmap(draw))(keys))
        for names, chain, drawn in zip(part, chains, found):
            truncated = [zoo.RANGES[name] for name in names if name in zoo.RANGES]
            if set(names) & set(zoo.BIASED):
                assert chain.bias == "biased"
                continue
            assert chain.bias == ("truncated" if truncated else "exact")
            assert_unit_interval_contract(drawn, names, *truncated)
            if not truncated:
                losses, gradients = toy_estimates(drawn, "fixed_count")
                assert_mean(losses, bound[TOY_ROWS])
                assert_mean(gradients, slope[TOY_ROWS])


@pytest.mark.slow
def test_random_chains_refuse_or_keep_the_contract():
    """Random orders of up to four members: refused with two names, or lawful.

    By default test_variance_couplings has refusals, and CHAINS are lawful.
    """
    check_random_chains(random.Random(1), 500, 20)


def test_streams_differ_by_name_step_and_seed():
    key = mdm_jax_rng.step_key(0, 3)
    keys = [
        mdm_jax_rng.stream(key, "a"),
        mdm_jax_rng.stream(key, "b"),
        mdm_jax_rng.stream(mdm_jax_rng.step_key(0, 4), "a"),
        mdm_jax_rng.stream(mdm_jax_rng.step_key(1, 3), "a"),
    ]
    values = {float(draws.open_uniform(k, ())) for k in keys}
    assert len(values) == 4
