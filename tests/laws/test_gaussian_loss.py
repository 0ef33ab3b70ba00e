"""Gaussian corruption and loss against ideal denoisers whose errors are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from variants import slow_except

from mdm_jax import gaussian, objectives, schedules, variance
from mdm_jax.corruption.process import spread_levels
from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.gaussian import parameterisations, paths, recipes, weightings
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.objective import gaussian_loss
from mdm_jax.objectives import objective as objectives_objective
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.testing import toys
from mdm_jax.types import Batch

G0, G1 = toys.standard_normal(), toys.narrow_normal()
M1, M2 = toys.symmetric_pair(), toys.skewed_pair()


def oracle(mixture, recipe):
    """The ideal network of a recipe."""

    def model_fn(inputs, logsnr, documents):
        level = spread_levels(logsnr, inputs.shape[-1])
        z = inputs * jnp.exp(-recipe.path.log_alpha(level))
        clean, noise = mixture.denoise(z, level), mixture.predict_noise(z, level)
        return recipe.output.target(recipe.path, level, clean, noise)

    return model_fn


def batch_of(data, eligible=None):
    data = jnp.asarray(data)
    eligible = jnp.ones(data.shape, bool) if eligible is None else jnp.asarray(eligible)
    return Batch(data, eligible, eligible.astype(jnp.int32), eligible.sum(-1))


def some_draw(shape, levels=1, seed=0, bounds=(0.0, 1.0)):
    rng = np.random.default_rng(seed)
    u = rng.uniform(*bounds, (*shape[:2], levels))
    return Draw(jnp.asarray(u), jnp.zeros(u.shape), jnp.asarray(rng.uniform(0.01, 0.99, shape)))


def test_mirror_reflects_the_noise_of_the_example():
    recipe, inputs = recipes.v_prediction(), []
    objective, transform = gaussian_loss(recipe), variance.mirror()
    spec = objective.spec(3, 4)
    data = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)

    def spy(noisy, logsnr, documents):
        inputs.append(noisy)
        return noisy

    @jax.jit
    def views_and_alpha(key):
        draw = variance.draw_batch(key, transform, transform.init(spec), spec)
        objective.loss(spy, batch_of(data), draw)
        views = objectives_objective.unflatten_views(inputs.pop(), 2)
        return views, recipe.path.alpha(recipe.law.icdf(draw.u))

    views, alpha = views_and_alpha(jax.random.key(0))
    np.testing.assert_allclose(views.mean(0), alpha[0] * data, rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(views[0] - views[1]) > 1e-4)


@pytest.mark.parametrize("path_name", slow_except({"ve"}, ["ve", "flow"]))
def test_raw_is_the_noise_error_whatever_the_network_predicts(path_name):
    with jax.enable_x64():
        data = np.random.default_rng(1).normal(size=(3, 4))
        draw, law = some_draw((2, 3, 4), levels=2), schedules.uniform(-7.0, 7.0)

        @jax.jit
        def all_stats(draw):
            found = []
            for make in parameterisations.OUTPUTS.values():
                recipe = gaussian.Recipe(law, weightings.elbo(), make(), paths.by_name(path_name))
                objective = gaussian_loss(recipe, num_levels=2)
                found.append(objective.loss(oracle(M1, recipe), batch_of(data), draw))
            return found

        level = np.repeat(law.icdf(draw.u), 2, axis=-1)
        eps = scipy.stats.norm.ppf(draw.noise)
        error = eps - M1.predict_noise(data + np.exp(-level / 2) * eps, level)
        expected = np.sum((error**2).reshape(2, 3, 2, 2), axis=-1)
        for stats in all_stats(draw):
            np.testing.assert_allclose(stats.raw, expected, rtol=1e-8)
            np.testing.assert_allclose(stats.weight, np.full((2, 3, 2), 7.0), rtol=1e-12)
            np.testing.assert_array_equal(stats.eligible, np.full((2, 3, 2), 2.0))
            np.testing.assert_array_equal(stats.targets, np.full((2, 3, 2), 2))


PROPOSALS = {
    "cosine": gaussian_schedules.cosine,
    "flow": gaussian_schedules.flow,
    "uniform": lambda: schedules.uniform(-10.0, 10.0),
    "edm": gaussian_schedules.edm_lognormal,
}
WEIGHTS = {"elbo": weightings.elbo, "eps": lambda: weightings.from_law(gaussian_schedules.cosine())}
VARIANCES = {  # loss, and variance of one draw by proposal: table 8.6
    ("G0", "elbo"): (5.0, 661.0734041681, 436.2891215190, 110.0013619361, 577.9727889363),
    ("G0", "eps"): (0.495710554628, 0.8568622400, 0.8526044115, 1.7804187455, 0.5964206818),
    ("G1", "elbo"): (4.306937936097, 654.8698221802, 430.6203547398, 95.6613174465, 575.349111975),
    ("G1", "eps"): (0.329044131356, 0.5399209700, 0.4760270884, 0.7717426244, 0.2456858727),
    ("M1", "elbo"): (4.419564428622, 645.6991798063, 425.3295454767, 99.1344965966, 574.9422455844),
    ("M1", "eps"): (0.397835856393, 0.7696354843, 0.7872619089, 1.6543611643, 0.6017368639),
}


def bounded_recipe(weight, proposal, name="v", path_name="vp"):
    law = PROPOSALS[proposal]()
    if proposal != "uniform":
        law = gaussian_schedules.truncated(law, -10.0, 10.0)
    output, path = parameterisations.by_name(name), paths.by_name(path_name)
    return gaussian.Recipe(law, WEIGHTS[weight](), output, path)


@pytest.mark.parametrize(
    "proposal, name",
    [
        pytest.param(*case, marks=() if case[0] == "cosine" else pytest.mark.slow)
        for case in zip(PROPOSALS, ("v", "x0", "edm", "score"), strict=True)
    ],
)
def test_mean_and_variance_by_quadrature_through_the_objective(proposal, name):
    """Every (level, x0, eps) node is a row; the integrand is a polynomial in x0 and eps."""
    with jax.enable_x64():
        node, mass = np.polynomial.hermite_e.hermegauss(5)
        mass = mass / mass.sum()
        level, level_mass = np.polynomial.legendre.leggauss(70)
        level, x0, eps = (a.ravel() for a in np.meshgrid(10 * level, node, node, indexing="ij"))
        mass = np.einsum("i,j,k->ijk", 10 * level_mass, mass, mass).ravel()
        noise = jnp.asarray(scipy.stats.norm.cdf(eps))
        chosen = {weight: bounded_recipe(weight, proposal, name) for weight in WEIGHTS}
        losses = {weight: gaussian_loss(chosen[weight]) for weight in WEIGHTS}
        assert losses["elbo"].bias == "truncated"
        assert losses["eps"].bias == "biased"
        law = chosen["elbo"].law
        u = law.cdf(level)
        draw = Draw(u[None, :, None], jnp.zeros((1, len(u), 1)), noise[None, :, None])
        probability = mass * np.exp(law.log_pdf(level))

        @jax.jit
        def terms(mixture):
            batch, values = batch_of((mixture.means[0] + mixture.std * x0)[:, None]), {}
            for weight, objective in losses.items():
                stats = objective.loss(oracle(mixture, chosen[weight]), batch, draw)
                values[weight] = (stats.weight * stats.raw)[0, :, 0]
            return values

        for data, mixture in (("G0", G0), ("G1", G1)):
            for weight, values in terms(mixture).items():
                loss, *variances = VARIANCES[data, weight]
                values = np.asarray(values)
                mean = np.sum(probability * values)
                np.testing.assert_allclose(mean, loss, rtol=1e-8)
                spread = np.sum(probability * values**2) - mean**2
                expected = variances[list(PROPOSALS).index(proposal)]
                np.testing.assert_allclose(spread, expected, rtol=1e-7)


@pytest.mark.slow
def test_mean_and_variance_of_the_mixture():
    """M1 of table 8.6 from its moments: int W E[l] and int W^2 / p E[l^2]."""
    with jax.enable_x64():
        node, mass = np.polynomial.legendre.leggauss(90)
        level, mass = 10 * node, 10 * mass
        moments = jax.jit(lambda x: (M1.eps_mse(x), jnp.exp(2 * x) * M1.fourth_moment(x)))
        first, second = moments(level)
        for weight in WEIGHTS:
            loss, *variances = VARIANCES["M1", weight]
            for proposal, expected in zip(PROPOSALS, variances):
                recipe = bounded_recipe(weight, proposal)
                weighting = np.exp(recipe.weighting.log_weight(level))
                mean = np.sum(mass * weighting * first)
                np.testing.assert_allclose(mean, loss, rtol=1e-10)
                ratio = weighting / np.exp(recipe.law.log_pdf(level))
                spread = np.sum(mass * weighting * ratio * second) - mean**2
                np.testing.assert_allclose(spread, expected, rtol=1e-8)


ADAPTED = {  # variance of one draw under p ~ W E[l] and p ~ W sqrt(E[l^2]): table 8.6
    ("G0", "elbo"): (50.0, 50.0),
    ("G0", "eps"): (0.4914579079, 0.4914579079),
    ("G1", "elbo"): (37.0994287708, 37.0994287708),
    ("G1", "eps"): (0.2165400808, 0.2165400808),
    ("M1", "elbo"): (46.7144789172, 45.3842223096),
    ("M1", "eps"): (0.4829944905, 0.4605738411),
}


@pytest.mark.slow
@pytest.mark.parametrize("data, mixture", [("G0", G0), ("G1", G1), ("M1", M1)])
def test_variance_under_the_laws_that_adaptive_methods_end_at(data, mixture):
    """2000 cells of constant density, with the moments at their middles: off by a part in 1e4.

    With the weighting of the bound the cosine law has 13.2 times the least variance on G0.
    """
    with jax.enable_x64():
        edges = np.linspace(-10.0, 10.0, 2001)
        level, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
        first, second = (
            np.asarray(moment)
            for moment in jax.jit(lambda x: (mixture.eps_mse(x), _second_moment(mixture, x)))(level)
        )
        for weight in WEIGHTS:
            loss, *variances = VARIANCES[data, weight]
            weighting = np.exp(WEIGHTS[weight]().log_weight(level))
            found = []
            for target in (first, np.sqrt(second)):
                mass = weighting * target * width
                law = schedules.piecewise(mass, edges)
                ratio = weighting / np.exp(law.log_pdf(level))
                found.append(np.sum(width * weighting * ratio * second) - loss**2)
            np.testing.assert_allclose(found, ADAPTED[data, weight], rtol=1e-4)
            # No law has less than the optimal one.
            assert all(found[1] < other for other in variances)
    if data == "G0":
        assert VARIANCES["G0", "elbo"][1] / ADAPTED["G0", "elbo"][1] == pytest.approx(13.2214680834)


def _second_moment(mixture, level):
    return jnp.exp(2 * level) * mixture.fourth_moment(level)


@pytest.mark.slow
def test_couplings_keep_the_expected_loss():
    """100 batches of 64 rows of two elements: within 5 standard errors of quadrature."""
    recipe = recipes.flow()
    transform = variance.chain(variance.stratified(), variance.mirror())
    with jax.enable_x64():
        grid = np.linspace(-40.0, 40.0, 161)
        integrand = np.exp(recipe.weighting.log_weight(grid)) * jax.jit(M2.eps_mse)(grid)
        expected = float(np.sum(integrand))  # two elements, steps of 0.5
    objective = gaussian_loss(recipe)
    spec = objective.spec(64, 2)

    @jax.jit
    @jax.vmap
    def means(key):
        data_key, draw_key = jax.random.split(key)
        draw = variance.draw_batch(draw_key, transform, transform.init(spec), spec)
        batch = batch_of(M2.sample(data_key, (64, 2)))
        return sum_losses(draw, objective.loss(oracle(M2, recipe), batch, draw)).loss / 64

    values = np.asarray(means(jax.random.split(jax.random.key(5), 100)), np.float64)
    error = values.std(ddof=1) / 10
    assert error < 0.03 * expected
    assert abs(values.mean() - expected) < 5 * error


# Numerics, gradients, bookkeeping.


def _wrong_by(recipe, params):
    """A network whose own output is a small linear function of its input."""

    def model_fn(inputs, logsnr, documents):
        level = spread_levels(logsnr, inputs.shape[-1])
        z = inputs * jnp.exp(-recipe.path.log_alpha(level)) * jax.nn.sigmoid(level)
        return params[0] + params[1] * z

    return model_fn


@pytest.mark.parametrize("path_name", slow_except({"vp"}, ["vp", "ve"]))
def test_loss_and_gradient_in_float32_at_extreme_levels(path_name):
    """At logSNR -20 and 20 all digits but the last few agree with float64, and none is NaN."""

    def measured(bits):
        with jax.enable_x64(bits == 64):
            u = jnp.asarray([[[2.0**-24], [1 - 2.0**-24], [0.5]]])
            draw = Draw(u, jnp.zeros_like(u), jnp.asarray([[[0.3, 0.9]] * 3]))
            batch, path = batch_of([[0.5, -1.0]] * 3), paths.by_name(path_name)

            def rows(params):
                found = []
                for make in parameterisations.OUTPUTS.values():
                    law = schedules.uniform(-20.0, 20.0)
                    recipe = gaussian.Recipe(law, weightings.elbo(), make(), path)
                    model_fn = _wrong_by(recipe, params)
                    stats = gaussian_loss(recipe).loss(model_fn, batch, draw)
                    found.append((stats.weight * stats.raw)[0, :, 0])
                return jnp.stack(found)

            params = jnp.asarray([0.1, 0.4])
            return jax.jit(lambda p: _value_and_pull_back(rows, p))(params)

    single, double = measured(32), measured(64)
    assert single[0].dtype == jnp.float32 and single[0].shape == (6, 3)
    for got, expected in zip(single, double):
        assert np.all(np.isfinite(got))
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def _value_and_pull_back(rows, params):
    """Rows and the gradient of the sum of their logs, in which no row drowns the others.

    Reverse mode multiplies what a where() discards by 0, and is the stricter test for NaN.
    """
    value, pull_back = jax.vjp(rows, params)
    return value, pull_back(1 / value)[0]


def test_gradient_is_that_of_the_formula():
    """Against central differences, float64."""
    with jax.enable_x64():
        recipe = recipes.edm()
        objective = gaussian_loss(recipe)
        draw = some_draw((1, 5, 2), bounds=(0.05, 0.95))
        batch = batch_of(np.random.default_rng(2).normal(size=(5, 2)))

        def loss(params):
            return sum_losses(draw, objective.loss(_wrong_by(recipe, params), batch, draw)).loss

        loss, params, step = jax.jit(loss), jnp.asarray([0.1, 0.4]), 1e-5
        by_hand = [(loss(params + e) - loss(params - e)) / (2 * step) for e in step * np.eye(2)]
        np.testing.assert_allclose(jax.grad(loss)(params), by_hand, rtol=1e-8)


def test_elements_that_are_not_eligible_carry_nothing():
    objective = gaussian_loss(recipes.flow())
    eligible = np.array([[1, 0, 1], [0, 0, 0]], bool)
    batch = batch_of(np.full((2, 3), 0.7, np.float32), eligible)
    draw = some_draw((1, 2, 3))

    def loss(outputs):
        stats = objective.loss(lambda *_: outputs, batch, draw)
        sums = sum_losses(draw, stats)
        return token_mean(sums.loss, sums.eligible), stats

    differentiate = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, stats), gradient = differentiate(jnp.zeros((2, 3)))
    assert np.isfinite(value) and value > 0
    np.testing.assert_array_equal(np.asarray(gradient) != 0, eligible)
    np.testing.assert_array_equal(stats.eligible[0, :, 0], [2, 0])
    np.testing.assert_array_equal(stats.targets[0, :, 0], [2, 0])
    assert stats.raw[0, 1, 0] == 0


def test_bias_is_named():
    bound = dataclasses.replace(recipes.vdm(), law=gaussian_schedules.cosine())
    assert gaussian_loss(bound).bias == "exact"
    assert gaussian_loss(recipes.vdm()).bias == "truncated"
    assert gaussian_loss(recipes.flow()).bias == "biased"
    assert objectives.describe(gaussian_loss(bound)) == "gaussian_loss over gaussian_vp [exact]"


def test_pictures_are_scaled_integers():
    values = gaussian.scaled_integers(256)
    np.testing.assert_allclose(values(np.array([0, 255, 51])), [-1.0, 1.0, -0.6], atol=1e-6)
    objective = gaussian_loss(recipes.ddpm(), values=values)
    assert objective.spec(4, 6) == DrawSpec(4, 1, (6,))
    batch = batch_of(jnp.array([[0, 255]], jnp.int32))
    draw = Draw(jnp.full((1, 1, 1), 0.9), jnp.zeros((1, 1, 1)), jnp.full((1, 1, 2), 0.5))

    @jax.jit
    def seen(draw):
        inputs = []
        objective.loss(lambda x, *_: inputs.append(x) or x, batch, draw)
        return inputs[0], paths.vp().alpha(objective.law.icdf(draw.u[0, 0, 0]))

    inputs, alpha = seen(draw)  # the noise quantile is 1/2: eps = 0
    np.testing.assert_allclose(inputs, [[-alpha, alpha]], rtol=1e-5)
    with pytest.raises(ValueError, match="num_values >= 2"):
        gaussian.scaled_integers(1)
    with pytest.raises(ValueError, match="needs float data, got int32"):
        jax.eval_shape(lambda: gaussian_loss(recipes.ddpm()).loss(lambda x, *_: x, batch, draw))


def test_wrong_shapes_are_refused():
    objective = gaussian_loss(recipes.flow(), num_levels=3)
    with pytest.raises(ValueError, match="3 noise levels do not divide"):
        objective.spec(2, 4)
    draw = some_draw((1, 2, 3))
    batch, objective = batch_of(np.zeros((2, 3), np.float32)), gaussian_loss(recipes.flow())
    with pytest.raises(ValueError, match="one number per element"):
        jax.eval_shape(lambda: objective.loss(lambda x, *_: x[..., None], batch, draw))
