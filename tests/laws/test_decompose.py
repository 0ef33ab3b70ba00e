"""A, B, C: the estimators' arithmetic, and the toy's components by enumeration and Monte Carlo."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from test_corruption import PROBABILITIES, rank_draws
from toy_oracle import gradient_table, loss_table

from mdm_jax import corruption, meter, objectives, schedules, testing, variance
from mdm_jax import rng as mdm_jax_rng
from mdm_jax.meter import nested
from mdm_jax.schedules import masked
from mdm_jax.testing import toys
from mdm_jax.types import Batch
from mdm_jax.variance.learned.curves import PiecewiseLinear
from mdm_jax.variance.transform import Phase, stateless

LOSS = (1.71159384, 0.23342413, 0.63706842)
MIRRORED_LOSS = (0.55390665, 0.23342413, 0.63706842)
GRADIENT = (2.53973735, 0.08969936, 0.15486251)
PARTS = ("pattern", "rate", "data")


def apply_fn(params, *inputs):
    return toys.Toy().apply(params, *inputs)


def toy_rows(count, seed=0):
    """Rows drawn from the toy's data."""
    pick = np.random.default_rng(seed).choice(3, count, p=PROBABILITIES)
    return Batch(*(np.asarray(field)[pick] for field in toys.toy_batch()))


def toy_objective(process="fixed_count", law=None):
    return objectives.masked_nelbo(getattr(corruption, process)(toys.MASK_ID), law)


@functools.cache
def toy_estimator(process="fixed_count"):
    """Compiled once for all tests."""
    return meter.make_estimator(apply_fn, toy_objective(process))


def toy_setting(transform, batch_size=4, process="fixed_count"):
    """The toy under a transform, as the meter measures it."""
    estimator = toy_estimator(process)
    spec = estimator.objective.spec(batch_size, toys.LENGTH)
    state = transform.init(spec)
    return meter.Subject(estimator, toys.toy_params(), transform, state, spec)


def spoilt(setting):
    """The subject with parameters that are no numbers."""
    params = jax.tree.map(lambda leaf: leaf * jnp.nan, setting.params)
    return dataclasses.replace(setting, params=params)


@functools.cache
def enumerated_gradients(name):
    """Gradient of every toy row for every fixed-count draw, [3, counts, orders, 3]."""
    transform = getattr(variance, name)()
    objective = toy_objective()

    @jax.jit
    @jax.jacrev
    def losses(params, batch):
        draw, _ = rank_draws(transform)
        stats = objective.loss(lambda *a: apply_fn(params, *a), batch, draw)
        return jnp.mean(stats.weight * stats.raw, axis=(0, 2))

    found = []
    for i in range(3):
        batch = jax.tree.map(lambda a, i=i: np.asarray(a)[[i] * 96], toys.toy_batch())
        found.append(np.asarray(losses(toys.toy_params(), batch)["params"]["theta"], np.float64))
    return np.stack(found).reshape(3, 4, 24, 3)


def exact_components(values):
    """A, B, C of equally likely [rows, levels, patterns, parameters]; traces over the last axis."""
    row = values.mean((1, 2))
    pattern = PROBABILITIES @ values.var(2).sum(-1).mean(1)
    rate = PROBABILITIES @ values.mean(2).var(1).sum(-1)
    return pattern, rate, np.sum(PROBABILITIES @ row**2 - (PROBABILITIES @ row) ** 2)


def assert_close(result, expected, sigmas=4.0):
    """Every part within ``sigmas`` of its own standard errors, and these are not useless."""
    for name, value in zip(PARTS, expected):
        part = getattr(result, name)
        assert abs(part.value - value) < sigmas * part.standard_error, (name, part, value)
        assert part.standard_error < 0.25 * sum(expected), (name, part)


def components(values):
    return nested.Components(*(part.mean(-1) for part in nested.row_terms(values)))


def test_toy_components_by_enumeration_of_the_implementation():
    gradients = enumerated_gradients("identity")
    found = exact_components(gradients)
    np.testing.assert_allclose(found, GRADIENT, rtol=2e-5)
    np.testing.assert_allclose(sum(found), 2.78429922, rtol=2e-5)


@pytest.mark.parametrize(
    "eps, loss, gradient, total",
    [
        (
            1e-3,
            (31.17245380, 0.13800469, 0.63643119),
            (11.91686388, 0.04884767, 0.15464762),
            12.12035916,
        ),
        (0.05, (11.46564139, 0.12846573, 0.60536328), None, None),
    ],
)
def test_bernoulli_components_by_quadrature(eps, loss, gradient, total):
    """Rates uniform on [eps, 1]: quadrature over rates, enumeration of patterns."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    rate = eps ** ((1 - nodes) / 2)
    law = weights / 2 * rate * np.log(1 / eps) / (1 - eps)
    size = np.array([int(m).bit_count() for m in range(16)])
    pattern = rate[:, None] ** size * (1 - rate[:, None]) ** (4 - size)

    def components(values):  # [3, 16, parameters], of S or its gradient
        cell = np.einsum("rm,xmp->xrp", pattern, values) / rate[:, None]
        second = np.einsum("rm,xmp->xr", pattern, values**2) / rate**2
        row = np.einsum("r,xrp->xp", law, cell)
        a = PROBABILITIES @ ((second - (cell**2).sum(-1)) @ law)
        b = PROBABILITIES @ ((cell**2).sum(-1) @ law - (row**2).sum(-1))
        return a, b, np.sum(PROBABILITIES @ row**2 - (PROBABILITIES @ row) ** 2)

    np.testing.assert_allclose(components(loss_table()[..., None]), loss, rtol=2e-5)
    if gradient is not None:
        found = components(gradient_table())
        np.testing.assert_allclose(found, gradient, rtol=1e-4)
        np.testing.assert_allclose(sum(found), total, rtol=2e-5)


@functools.cache
def measured(name):
    """Loss and gradient by probes, 600 rows of the toy."""
    setting = toy_setting(getattr(variance, name)())
    return meter.decompose_by_probes(
        setting,
        toy_rows(600),
        jax.random.key(1),
        probes=32,
        levels_per_row=3,
        masks_per_level=2,
        chunk=3600,
    )


@pytest.mark.parametrize(
    "name, loss",
    [
        ("identity", LOSS),
        pytest.param("mirror", MIRRORED_LOSS, marks=pytest.mark.slow),
        pytest.param("stratified", LOSS, marks=pytest.mark.slow),
    ],
)
def test_probes_find_loss_and_gradient_components(name, loss):
    """Within 4 of the reported standard errors (600 rows); stratified rows have iid's law."""
    of_loss, of_gradient = measured(name)
    assert_close(of_loss, loss)
    exact = "identity" if name == "stratified" else name
    assert_close(of_gradient, exact_components(enumerated_gradients(exact)))
    assert of_loss.passes == getattr(variance, name)().views
    # Standard error of the mean: the root of (A / 6 + B / 3 + C) / 600, at most 0.041.
    np.testing.assert_allclose(of_loss.signal**0.5, 4.03072625, atol=4 * 0.041)
    np.testing.assert_allclose(sum(of_gradient.shares), 1)


def test_streaming_gradients_agree_with_enumeration_and_with_the_nested_estimator():
    """Along the parameters' axes the nested estimator sees the same numbers as the stream."""
    setting, rows, done = toy_setting(variance.mirror()), toy_rows(400, seed=3), []
    design = {"levels_per_row": 3, "masks_per_level": 2}
    key = jax.random.key(2)
    streamed = meter.decompose_gradients(setting, rows, key, progress=done.append, **design)
    assert sum(done) == 400 * 6
    assert_close(streamed, exact_components(enumerated_gradients("mirror")))

    @jax.jit
    def score(batch, draw):
        losses = functools.partial(setting.estimator.losses, batch=batch, draw=draw)
        return jax.jacfwd(losses)(setting.params)["params"]["theta"].T

    draw_row = nested.nested_draw(key, setting)
    gradients = nested.evaluate_cells(score, draw_row, rows, (3, 2), 2400, None)
    each = components(gradients)
    np.testing.assert_allclose(streamed.pattern.value, each.pattern.sum(), rtol=1e-4)
    np.testing.assert_allclose(streamed.rate.value, each.rate.sum(), rtol=1e-3)
    np.testing.assert_allclose(streamed.data.value, each.data.sum(), rtol=1e-3)


@pytest.mark.slow
def test_importance_weights_belong_to_the_loss():
    """u = v^2 with weight 2 sqrt(u): components against enumeration over cells of the law."""

    def warp(_key, draw, _spec):
        return draw._replace(
            u=draw.u**2, log_weight=draw.log_weight + jnp.log(2.0) + jnp.log(draw.u)
        )

    transform = stateless("square", Phase.WARP, warp)
    result = meter.decompose(
        toy_setting(transform),
        toy_rows(3000, seed=6),
        jax.random.key(3),
        levels_per_row=4,
        masks_per_level=2,
        chunk=6000,
    )
    losses = loss_table()
    size = np.array([int(m).bit_count() for m in range(16)])
    v = (np.arange(4000) + 0.5) / 4000
    count = 1 + np.floor(4 * (1 - v**2)).astype(int)
    mean = np.stack([4 / k * losses[:, size == k].mean(1) for k in range(1, 5)], 1)
    var = np.stack([(4 / k) ** 2 * losses[:, size == k].var(1) for k in range(1, 5)], 1)
    cell, noise = 2 * v * mean[:, count - 1], 4 * v**2 * var[:, count - 1]
    row = cell.mean(1)
    expected = (
        PROBABILITIES @ noise.mean(1),
        PROBABILITIES @ cell.var(1),
        PROBABILITIES @ row**2 - (PROBABILITIES @ row) ** 2,
    )
    assert expected[1] > 4  # the warp hurts; without its weight B would be 0.2
    assert_close(result, expected)


def test_chunks_progress_and_empty_rows():
    """The result does not depend on the chunk; rows without targets are left out and counted."""
    setting = toy_setting(variance.mirror())
    rows = toy_rows(6)
    rows = rows._replace(eligible=rows.eligible & (np.arange(6) != 2)[:, None])
    results, done = [], []
    for chunk in (7, 1000):
        results.append(
            meter.decompose(
                setting,
                rows,
                jax.random.key(0),
                levels_per_row=2,
                masks_per_level=3,
                chunk=chunk,
                progress=done.append,
            )
        )
    assert sum(done) == 2 * 5 * 6
    assert results[0].rows_left_out == 1
    assert results[0].rows == 5
    a, b = (result.to_dict() for result in results)
    assert a.pop("within") is None and b.pop("within") is None  # rows are in no groups
    assert a == pytest.approx(b, rel=1e-5)
    with pytest.raises(ValueError, match="none of 2 rows has an eligible token"):
        empty = rows._replace(eligible=np.zeros_like(rows.eligible))
        empty = jax.tree.map(lambda field: field[:2], empty)
        meter.decompose(setting, empty, jax.random.key(0))


def test_losses_that_are_not_finite_are_refused():
    setting, design = spoilt(toy_setting(variance.mirror())), {"levels_per_row": 2, "chunk": 7}
    with pytest.raises(ValueError, match="12 of 12 losses are not finite"):
        meter.decompose(setting, toy_rows(3), jax.random.key(0), masks_per_level=2, **design)


def test_level_table_against_enumeration():
    """v, g, c, s of Bernoulli masks at given rates, and the optimal density, 4 standard errors."""
    rates = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    result = meter.measure_levels(
        toy_setting(variance.identity(), process="bernoulli"),
        toy_rows(1500, seed=7),
        jax.random.key(4),
        masking_rates=rates,
        masks_per_level=2,
        probes=4,
        chunk=15_000,
    )
    value, error = result.loss
    expected = {
        "mean": [3.69655168, 3.83618124, 4.00281835, 4.19624705, 4.41625134],
        "pattern": [46.44006675, 12.22110700, 5.71662007, 2.84920031, 0.89900367],
        "data": [1.28866592, 0.96867146, 0.66850215, 0.40467238, 0.19720688],
    }
    expected["mean_square"] = np.square(expected["mean"])
    for name, numbers in expected.items():
        error_of = np.asarray(getattr(error, name))
        assert np.all(np.abs(getattr(value, name) - numbers) < 4 * error_of), name
    np.testing.assert_allclose(value.second, value.pattern + value.mean_square + value.data)
    traces = [17.57212464, 3.85914632, 1.49398742, 0.64991055, 0.19852794]
    value, error = result.gradient
    assert np.all(np.abs(value.pattern - traces) < 4 * error.pattern)
    np.testing.assert_allclose(result.quantiles, 1 - rates, rtol=1e-5)
    np.testing.assert_allclose(result.base_density, 1, rtol=1e-5)
    np.testing.assert_allclose(result.nats_per_token, result.loss.value.mean / 4)


def test_main_effect_and_interaction_of_the_rate():
    """Toy under rates uniform on [1e-3, 1]: V_m, V_xm from exact g."""
    losses = loss_table()
    rates = 1e-3 + (1 - 1e-3) * (np.arange(400) + 0.5) / 400
    g = np.stack([testing.rate_losses(row, rates) / rates for row in losses])
    main = (PROBABILITIES @ g).var()
    interaction = PROBABILITIES @ g.var(1) - main
    np.testing.assert_allclose([main, interaction], [0.06798651, 0.07001818], rtol=2e-3)


def test_density_of_a_warp_is_read_off_its_weights():
    def warp(_key, draw, _spec):
        return draw._replace(u=draw.u**2, log_weight=jnp.log(2.0) + jnp.log(draw.u))

    transform = stateless("square", Phase.WARP, warp)
    objective = toy_objective()
    spec = objective.spec(8, 4)
    rates, density = meter.warp_density(
        jax.random.key(0), transform, transform.init(spec), spec, objective
    )
    middle = (rates > 0.05) & (rates < 0.95)
    np.testing.assert_allclose(density[middle], 0.5 / np.sqrt(1 - rates[middle]), rtol=1e-4)
    assert len(rates) == 64 * 8


def test_density_of_a_warp_that_pays_something_else_is_that_of_its_profile():
    """Time warping pays nothing, a learned weighting more than its density; under a law p ~ m^-1/2
    of the rate the one draws from its curve's slope times p, the other from p."""
    objective = toy_objective(law=schedules.law_of(masked.power(2.0)))
    spec = objective.spec(8, 4)
    warp = variance.cdcd_warp(2)
    curve = PiecewiseLinear(jnp.log(jnp.ones((1, 2))), jnp.log(jnp.array([[1.0, 3.0]])))
    steep = warp.init(spec)._replace(averages=curve)  # density 1/2 and 3/2 over 1 - u = sqrt(m)
    weigh = variance.uncertainty_weighting(num_features=4)
    heavy = weigh.init(spec)._replace(coefficients=jnp.arange(4.0))
    for transform, state, expected in (
        (warp, steep, lambda m: np.where(m < 0.25, 0.5, 1.5) * 0.5 / np.sqrt(m)),
        (weigh, heavy, lambda m: 0.5 / np.sqrt(m)),
    ):
        rates, density = meter.warp_density(
            jax.random.key(0), transform, state, spec, objective, draws=16
        )
        kept = (rates > 1e-4) & (np.abs(rates - 0.25) > 1e-3) & (rates < 1 - 1e-3)
        np.testing.assert_allclose(density[kept], expected(rates[kept]), rtol=2e-3)
        assert kept.mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.ALL)
def test_parts_add_up_to_the_variance_of_one_row_of_a_batch(name):
    """A + B + C against the plain spread of row 0 of whole batches, for every transform.

    This is what splitting a draw into its level and its noise has to respect.
    """
    transform = zoo.ALL[name]()
    setting = toy_setting(transform, batch_size=4)
    estimator, params, state, spec = (
        getattr(setting, name) for name in ("estimator", "params", "state", "spec")
    )
    pool = jax.tree.map(jnp.asarray, toy_rows(4096, seed=8))

    @jax.jit
    @jax.vmap
    def row_loss(key):
        draw = variance.draw_batch(mdm_jax_rng.stream(key, "draw"), transform, state, spec)
        index = jax.random.randint(mdm_jax_rng.stream(key, "rows"), (4,), 0, 4096)
        return estimator.losses(params, jax.tree.map(lambda f: f[index], pool), draw)[0]

    losses = np.asarray(row_loss(jax.random.split(jax.random.key(9), 40_000)), np.float64)
    squares = (losses - losses.mean()) ** 2
    spread, spread_error = squares.mean(), squares.std() / len(squares) ** 0.5
    result = meter.decompose(
        setting,
        toy_rows(4096, seed=8),
        jax.random.key(10),
        levels_per_row=2,
        masks_per_level=2,
        chunk=16_384,
    )
    error = np.hypot(spread_error, result.total.standard_error)
    assert abs(result.total.value - spread) < 5 * error
    assert error < 0.1 * spread


def test_groups_are_not_taken_apart():
    rows = toy_rows(6)
    rows = rows._replace(eligible=rows.eligible & (np.arange(6) != 2)[:, None])
    with pytest.raises(ValueError, match="1 rows have no eligible token, and groups of 3"):
        meter.decompose(
            toy_setting(variance.identity()), rows, jax.random.key(0),
            levels_per_row=2, masks_per_level=2, group=3,
        )  # fmt: skip
