"""Effective weights, recipes and what is said about them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import slow_except

from mdm_jax import gaussian, plots, pytrees, schedules
from mdm_jax.gaussian import parameterisations, recipes, weightings
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.weightings import MinSnr, from_recipe

pytestmark = pytest.mark.keyless

cosine = gaussian_schedules.cosine

# W at logSNR -4, -2, 0, 2, 4: table 4.2 of the specification.
TABLE = {
    "elbo": (weightings.elbo, [0.5] * 5),
    "ddpm_simple": (
        lambda: weightings.from_law(gaussian_schedules.ddpm_linear()),
        [0.0776514203, 0.0957265227, 0.0951781018, 0.0529830806, 0.0210172184],
    ),
    "iddpm_simple": (
        lambda: weightings.from_law(cosine()),
        [0.0423037386, 0.1031410410, 0.1591549431, 0.1031410410, 0.0423037386],
    ),
    "x0_mse": (
        lambda: from_recipe(cosine(), parameterisations.x0()),
        [2.3097058673, 0.7621149384, 0.1591549431, 0.0139586220, 0.0007748200],
    ),
    "v_mse": (
        lambda: recipes.v_prediction().weighting,
        [2.3520096059, 0.8652559794, 0.3183098862, 0.1170996630, 0.0430785586],
    ),
    "flow_mse": (
        lambda: recipes.flow().weighting,
        [3.6945280495, 1.3591409142, 0.5, 0.1839397206, 0.0676676416],
    ),
    "indi": (
        lambda: from_recipe(schedules.logistic(0.0, 2.0), parameterisations.x0()),
        [2.8662277642, 0.7263883022, 0.125, 0.0133042658, 0.0009615123],
    ),
    "edm": (
        lambda: recipes.edm().weighting,
        [1.0417479187, 0.9461119120, 0.5041056761, 0.2526770074, 0.1428548262],
    ),
    "edm2": (
        lambda: recipes.edm2().weighting,
        [2.4565971151, 2.2875530191, 0.9206753508, 0.2568063935, 0.0595235892],
    ),
    "sd3": (
        lambda: recipes.sd3().weighting,
        [1.8998412087, 1.6726976146, 0.7978845608, 0.2263750054, 0.0347968055],
    ),
    "sigmoid": (
        weightings.sigmoid,
        [0.9975273768, 0.9820137900, 0.8807970780, 0.5, 0.1192029220],
    ),
    "min_snr": (
        lambda: weightings.min_snr(cosine()),
        [0.0423037386, 0.1031410410, 0.1591549431, 0.0697931100, 0.0038741000],
    ),
    "soft_min_snr": (
        lambda: weightings.soft_min_snr(cosine()),
        [0.0421493402, 0.1004228890, 0.1326291192, 0.0416258673, 0.0035490815],
    ),
    "p2": (
        lambda: weightings.p2(cosine()),
        [0.0415428547, 0.0908463276, 0.0795774715, 0.0122947135, 0.0007608839],
    ),
    "truncated_snr": (
        lambda: weightings.truncated_snr(cosine()),
        [2.3097058673, 0.7621149384, 0.1591549431, 0.1031410410, 0.0423037386],
    ),
}
MONOTONE = {"elbo", "x0_mse", "v_mse", "flow_mse", "indi", "sigmoid", "truncated_snr"}
# W peaks here where it is not monotone.
PEAKS = {
    "ddpm_simple": -0.92,
    "edm": -3.30777752,
    "sd3": -3.375,
    "soft_min_snr": -0.455,
    "p2": -1.1,
}
LEVELS = np.array([-4.0, -2.0, 0.0, 2.0, 4.0])
GRID = np.linspace(-15, 15, 3001)
AT_LEVELS = np.searchsorted(GRID, LEVELS - 1e-6)
every_weighting = pytest.mark.parametrize("name", sorted(TABLE))


def values(weighting, levels=GRID):
    return np.exp(np.asarray(weighting.log_weight(levels)))


@every_weighting
def test_values_of_the_specification_and_monotone_weights(name):
    make, expected = TABLE[name]
    with jax.enable_x64():
        weighting = make()
        weight = np.asarray(weighting.log_weight(GRID))
    assert isinstance(weighting, weightings.Weighting)
    np.testing.assert_allclose(np.exp(weight[AT_LEVELS]), expected, rtol=1e-9, atol=6e-11)
    rises = np.any(np.diff(weight[np.isfinite(weight)]) > 1e-12)
    assert rises == (name not in MONOTONE)  # those that never rise are bounds
    if name in PEAKS:
        np.testing.assert_allclose(GRID[np.argmax(weight)], PEAKS[name], atol=0.011)


@every_weighting
def test_float32_agrees_and_gradients_are_finite(name):
    make, _ = TABLE[name]
    levels = np.array([-20.0, -9.0, 0.0, 9.0, 20.0])
    with jax.enable_x64():
        expected = np.asarray(make().log_weight(levels))
    weighting, levels = make(), jnp.asarray(levels, jnp.float32)
    got, gradient = jax.jvp(weighting.log_weight, (levels,), (jnp.ones(5, jnp.float32),))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    assert np.all(np.isfinite(gradient))


def test_equal_objectives_under_different_names():
    with jax.enable_x64():
        density = np.exp(cosine().log_pdf(GRID))
        v = values(recipes.v_prediction().weighting)
        np.testing.assert_allclose(v, np.exp(-GRID / 2) / np.pi, rtol=1e-11)
        np.testing.assert_allclose(v, 2 / np.pi * values(recipes.flow().weighting), rtol=1e-11)
        unit = from_recipe(cosine(), parameterisations.edm(1.0))
        np.testing.assert_allclose(v, values(unit), rtol=1e-11)
        b, law = 1.3, cosine()
        soft = values(weightings.soft_min_snr(law, np.exp(b)))
        np.testing.assert_allclose(soft, values(weightings.sigmoid(b)) * density, rtol=1e-11)
        p2 = np.exp(b) * values(weightings.p2(law, np.exp(b)))
        np.testing.assert_allclose(soft, p2, rtol=1e-11)
        # k-diffusion: "snr" weighting of the F loss is the eps loss; "soft-min-snr" has x0 factor
        # 1 / (sigma^2 + sigma_data^2), which is gamma = 1 / sigma_data^2 up to a constant.
        soft = values(weightings.soft_min_snr(law, 4.0))
        by_hand = density * np.exp(-GRID) / (np.exp(-GRID) + 0.25)
        np.testing.assert_allclose(soft, by_hand, rtol=1e-11)


def test_explicit_weight_multiplies_the_error_of_the_output():
    """min-SNR as published: factor min(SNR, gamma) / (SNR + 1) on v."""
    with jax.enable_x64():

        @pytrees.pytree_dataclass
        class VFactor:
            support = (-np.inf, np.inf)

            def log_weight(self, logsnr):
                snr = jnp.exp(logsnr)
                return jnp.log(jnp.minimum(snr, 5.0) / (snr + 1))

        recipe = from_recipe(cosine(), parameterisations.v(), explicit=VFactor())
        np.testing.assert_allclose(values(recipe)[AT_LEVELS], TABLE["min_snr"][1], rtol=1e-8)


def test_min_snr_is_a_minimum_at_both_ends():
    with jax.enable_x64():
        factor = MinSnr(np.log(5.0)).log_weight(np.array([-9.0, 9.0]))
        np.testing.assert_allclose(np.exp(factor), [1.0, 5 * np.exp(-9.0)])


def test_monotonic_edm_is_flat_below_its_peak():
    with jax.enable_x64():
        weighting, edm = weightings.edm_monotonic(), recipes.edm().weighting
        np.testing.assert_allclose(weighting.peak, -3.30777752, atol=1e-7)
        flat, base = values(weighting), values(edm)
        np.testing.assert_allclose(flat, np.maximum.accumulate(base[::-1])[::-1], rtol=1e-5)
        assert np.all(np.diff(flat) <= 1e-15)
        # Wide laws have two bumps: the higher one counts.
        wide = weightings.edm_monotonic(1.0, 3.0, 0.5)
        pieces = np.linspace(-60, 20, 9003).reshape(3, 3001)  # of the shape of the other grid
        weight = [recipes.edm(1.0, 3.0, 0.5).weighting.log_weight(piece) for piece in pieces]
        best = pieces.ravel()[np.argmax(np.concatenate(weight))]
        np.testing.assert_allclose(wide.peak, best, atol=0.011)


def test_parameters_may_be_traced():
    def weight(gamma):
        return weightings.min_snr(cosine(), gamma).log_weight(3.0)

    np.testing.assert_allclose(jax.grad(weight)(5.0), 0.2, rtol=1e-6)
    with pytest.raises(TypeError, match="build it outside jit"):
        jax.jit(lambda m: weightings.edm_monotonic(m).log_weight(0.0))(-1.2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: weightings.min_snr(cosine(), 0.0), "min_snr: gamma must be .*, got 0.0"),
        (lambda: weightings.soft_min_snr(cosine(), -1.0), "soft_min_snr: gamma must be"),
        (lambda: weightings.p2(cosine(), k=-1.0), "p2: k must be"),
        (lambda: weightings.p2(cosine(), gamma=np.inf), "p2: gamma must be"),
        (lambda: weightings.sigmoid(np.nan), "sigmoid: bias must be"),
        (lambda: recipes.by_name("emd"), "unknown recipe 'emd'; did you mean .*edm"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Recipes.


@functools.cache
def summary(name):
    return gaussian.summarise(recipes.by_name(name))


PRESETS = {
    "ddpm": "ddpm_simple",
    "iddpm": "iddpm_simple",
    "vdm": "elbo",
    "v_prediction": "v_mse",
    "edm": "edm",
    "edm2": "edm2",
    "flow": "flow_mse",
    "sd3": "sd3",
    "indi": "indi",
}


@pytest.mark.parametrize("name", sorted(recipes.RECIPES))
def test_presets_have_the_weights_of_the_specification(name):
    with jax.enable_x64():
        recipe = recipes.by_name(name)
        _, expected = TABLE[PRESETS[name]]
        weight = values(recipe.weighting)[AT_LEVELS]
        np.testing.assert_allclose(weight, expected, rtol=1e-9, atol=6e-11)
        log_importance = np.asarray(recipe.log_importance_weight(LEVELS))
        density = np.exp(np.asarray(recipe.law.log_pdf(GRID))[AT_LEVELS])
        np.testing.assert_allclose(
            np.exp(log_importance) * density, expected, rtol=1e-9, atol=6e-11
        )
        if name != "vdm":  # the others take their own output's error with unit weight
            change = recipe.output.log_eps_weight(recipe.path, LEVELS)
            np.testing.assert_allclose(log_importance, change, atol=1e-12)


def test_replacing_the_law_leaves_the_objective():
    """Section 9, item 4: equal products p w give equal losses, by quadrature over the quantile."""
    with jax.enable_x64():
        recipe = recipes.iddpm()
        other = dataclasses.replace(recipe, law=schedules.logistic(-2.0, 3.0))
        logit = np.linspace(-34.0, 34.0, 3001)  # as many as in GRID
        u, mass = jax.nn.sigmoid(logit), jax.nn.sigmoid(logit) * jax.nn.sigmoid(-logit)

        def loss(recipe, power):
            level = recipe.law.icdf(u)
            term = np.exp(recipe.log_importance_weight(level)) * jax.nn.sigmoid(level)
            return np.sum(mass * term**power) * (logit[1] - logit[0])

        # int sech(x / 2) sigmoid(x) / (2 pi) dx = 1/2 by symmetry.
        np.testing.assert_allclose(loss(recipe, 1), 0.5, rtol=1e-10)
        np.testing.assert_allclose(loss(other, 1), 0.5, rtol=1e-10)
        assert abs(loss(other, 2) / loss(recipe, 2) - 1) > 0.1


@pytest.mark.parametrize("name", slow_except({"edm", "vdm"}, sorted(recipes.RECIPES)))
def test_summaries(name):
    got = summary(name)
    assert got.monotone == (PRESETS[name] in MONOTONE)
    assert got.bound == (name == "vdm")
    recipe = recipes.by_name(name)
    mass = np.diff([float(recipe.law.cdf(end)) for end in got.drawn])
    np.testing.assert_allclose(mass, 0.9, rtol=1e-5)


def test_share_of_the_loss_by_quadrature():
    """VDM's ends cut off parts of int 1/2 sigmoid(lambda) dlambda; softplus gives them."""
    got = summary("vdm")
    total, softplus = 20.0, lambda x: np.logaddexp(0.0, x)
    below = (softplus(-5.0) - softplus(-20.0)) / total
    above = (softplus(20.0) - softplus(13.3)) / total
    np.testing.assert_allclose(got.lost, (below, above), rtol=1e-3, atol=2e-6)
    assert got.support == (-5.0, 13.3)
    np.testing.assert_allclose(got.loss, (np.log(np.expm1(1.0)), 19.0), atol=0.02)


@pytest.mark.parametrize(
    "law, between",
    [
        (lambda: gaussian_schedules.truncated(cosine(), -10.0, 10.0), 8.14764539),
        pytest.param(
            lambda: gaussian_schedules.truncated(gaussian_schedules.flow(), -10.0, 10.0),
            5.15052162,
            marks=pytest.mark.slow,
        ),
        (lambda: schedules.uniform(-10.0, 10.0), 0.80001816),
    ],
)
def test_worth_of_a_draw_is_the_variance_between_levels(law, between):
    """1 / (1 + between / loss^2) of table 8.6, N(0, 1) data and the bound on [-10, 10]."""
    recipe = dataclasses.replace(recipes.vdm(), law=law())
    np.testing.assert_allclose(
        gaussian.summarise(recipe).effective_draws, 1 / (1 + between), rtol=5e-3
    )


def test_matched_draws_are_worth_one():
    """v under the cosine law draws in proportion to its loss on N(0, 1) data."""
    np.testing.assert_allclose(summary("v_prediction").effective_draws, 1.0, rtol=1e-3)


def test_explanation_says_what_differs():
    text = gaussian.explain({name: recipes.by_name(name) for name in ("ddpm", "vdm", "flow")})
    assert "not monotone, largest at -0.92: no bound" in text
    assert "constant: the evidence lower bound" in text
    assert "never rises with logSNR: a bound with noise augmentation" in text
    assert "33.49% of the loss lies above 13.3 and is never drawn" in text
    row = next(line for line in text.splitlines() if line.startswith("     0.0 "))
    cells = [float(cell) for cell in row.split()[1:]]
    expected = [0.0952, 0.0952, 1, 1, 0.0546, 0.5, 9.15, 9.15, 0.125, 0.5, 4, 1]
    np.testing.assert_allclose(cells, expected, rtol=1e-2)
    assert gaussian.explain(recipes.edm()).startswith("recipe\n  law p           Normal(2.4, 2.4)")


def test_recipes_pass_through_jit_and_stay_apart():
    weight = jax.jit(lambda recipe, level: recipe.log_importance_weight(level))
    for name in recipes.RECIPES:
        with jax.enable_x64():
            expected = recipes.by_name(name).log_importance_weight(LEVELS)[3]
        got = weight(recipes.by_name(name), LEVELS[3])
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="summarised outside of jit"):
        jax.jit(lambda r: gaussian.summarise(r).peak)(recipes.edm())


def test_figure_lays_recipes_over_each_other():
    chosen = {"vdm": recipes.vdm(), "edm": recipes.edm()}
    left, right = plots.compare_recipes(chosen).axes
    assert [line.get_label() for line in left.lines] == ["vdm", "edm"]
    drawn = left.lines[0].get_ydata()
    np.testing.assert_allclose(drawn[drawn > 0], 1 / 18.3, rtol=1e-5)
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["vdm", "edm"]
    lost = right.lines[1].get_ydata()  # dotted: weighted, never drawn
    np.testing.assert_array_equal(np.isfinite(lost), drawn == 0)
    edm = right.lines[2].get_ydata()
    at_zero = np.argmin(np.abs(plots.LEVELS))
    np.testing.assert_allclose(edm[at_zero], 1.0, rtol=1e-6)
