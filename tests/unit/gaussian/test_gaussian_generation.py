"""Gaussian generation as a whole: rows, precision, first state, guidance, refusals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from gaussian_runs import (
    GRID_12,
    SAMPLERS,
    START,
    X0,
    constant,
    draw,
    draw_from,
    draw_with_estimates,
    edm_grid,
    oracle,
)

from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian.samplers import spacings

ZERO = constant(0.0)


def refused(
    model_fn=ZERO,
    sampler=SAMPLERS["ddim"],
    grid=GRID_12,
    shape=(1, 1),
    path_name="vp",
    output=X0,
    start=None,
):
    def run(key):
        return gaussian_samplers.sample_gaussian(
            key,
            model_fn,
            sampler,
            grid,
            shape,
            output=output,
            path=paths.by_name(path_name),
            start=start,
        )

    return jax.eval_shape(run, jax.random.key(0))


@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(gaussian_samplers.ddim(0.6), marks=pytest.mark.slow),
        gaussian_samplers.ddpm_ancestral(1.0),
        gaussian_samplers.edm_heun(churn=2.0),
    ],
    ids=lambda sampler: sampler.name,
)
def test_rows_are_independent_and_the_end_is_the_estimate(sampler):
    path, grid = paths.vp(), spacings.edm(4)
    model = oracle("squash", path)
    together, estimates = draw_with_estimates(model, sampler, grid, (8, 3), path)
    rows = 8 if sampler.name == "edm_heun" else 1  # eight share the program
    alone = draw(model, sampler, grid, (rows, 3), path, row_offset=5)
    np.testing.assert_allclose(alone[:3], together[5 : 5 + min(rows, 3)], rtol=1e-6)
    assert len(np.unique(together)) == together.size
    # The step to +inf adds no noise; compilers may round its product with alpha = 1 apart.
    np.testing.assert_allclose(together, estimates[-1], rtol=1e-6)


@pytest.mark.parametrize("name, path_name", [("2m", "vp"), ("edm", "ve")])
def test_float32_follows_float64(name, path_name):
    grid, start, path = edm_grid(12), 80 * START[:1], paths.by_name(path_name)
    model = oracle("mixture", path)
    with jax.enable_x64():
        expected = draw_from(start, model, SAMPLERS[name], grid, path)
    first = np.float32(path.alpha(grid[0]) * start)
    got = draw(model, SAMPLERS[name], np.float32(grid), (1, 2), path, start=first)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=2e-5, err_msg=name)


def test_trace_and_generator_agree_with_sampling():
    path, grid, sampler = paths.vp(), np.linspace(-4, 4, 6), gaussian_samplers.dpm_solver_pp_2m()
    model = oracle("squash", path)
    key = jax.random.key(1)
    kwargs = {"output": X0, "path": path}
    data, states = tiny.jit(
        lambda key: gaussian_samplers.sample_gaussian_with_trace(
            key, model, sampler, grid, (3, 2), lambda state: state, **kwargs
        )
    )(key)
    assert states.x.shape == states.x0.shape == (5, 3, 2)
    np.testing.assert_allclose(states.x[-1] / np.asarray(path.alpha(4.0)), data, rtol=1e-6)
    expected = model(states.x[-2], jnp.full((3, 1), grid[-2]), None)
    np.testing.assert_allclose(states.x0[-1], expected, atol=1e-6)

    def apply_fn(params, x, logsnr, documents):
        return params * model(x, logsnr, documents)

    generate = gaussian_samplers.make_gaussian_generator(apply_fn, sampler, grid, (2,), **kwargs)
    np.testing.assert_allclose(generate(1.0, key, 2, row_offset=1), data[1:], atol=1e-6)


def test_scale_of_the_first_state():
    for name, data_std, expected in (
        ("vp", 1.0, 1.0),
        ("flow", 0.0, 1 / (1 + math.exp(-1.0))),
        ("ve", 0.0, math.exp(1.0)),
        ("ve", 2.0, math.sqrt(math.exp(2.0) + 4)),
    ):
        got = gaussian_samplers.initial_std(paths.by_name(name), -2.0, data_std)
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    # A denoiser that returns its input in units of x / alpha stands still there.
    still = lambda x, logsnr, documents: x / paths.flow().alpha(logsnr)  # noqa: E731
    for data_std in (0.0, 2.0):
        run = functools.partial(draw, still, gaussian_samplers.ddim(), np.array([-2.0, 0.0]))
        out = run((64, 512), paths.flow(), data_std=data_std)
        std = math.sqrt(math.exp(2.0) + data_std**2)  # of x / alpha
        assert abs(out.std() - std) < 5 * std / np.sqrt(2 * out.size)


def test_guidance_within_an_interval():
    def inside_only(x, logsnr, documents):
        return jnp.where(jnp.abs(logsnr) <= 1.0, 0.5, jnp.nan) * jnp.ones_like(x)

    model = gaussian_samplers.guided(constant(2.0), inside_only, 3.0, -1.0, 1.0)
    x = jnp.zeros((3, 2))
    levels = jnp.array([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(model(x, levels), 0.5 + 3.0 * 1.5)
    mixed = model(x, jnp.array([[-1.5], [0.0], [1.5]]))
    np.testing.assert_allclose(mixed[:, 0], [2.0, 5.0, 2.0])
    np.testing.assert_allclose(model(x, levels + 9), 2.0)
    unguided = gaussian_samplers.guided(constant(2.0), constant(0.5), 1.0)
    np.testing.assert_allclose(unguided(x, levels), 2.0)


def test_rescaled_guidance_has_the_spread_of_the_unguided_output():
    """By hand: guided outputs of row 0 are 5 and -1, unguided ones 2 and 0."""
    conditional = lambda x, logsnr, documents: 1.0 + x  # noqa: E731
    x = jnp.array([[1.0, -1.0], [0.2, 0.0]])
    level = jnp.array([[0.0], [5.0]])

    def guided(rescale):
        networks = conditional, lambda x, logsnr, documents: 0.5 - 0.0 * x
        return gaussian_samplers.guided(*networks, 3.0, high=1.0, rescale=rescale)(x, level)

    plain = np.array([0.5 + 3 * 1.5, 0.5 + 3 * -0.5])  # 5, -1: standard deviation 3 in place of 1
    np.testing.assert_allclose(guided(0.0)[0], plain)
    np.testing.assert_allclose(guided(1.0)[0], plain / 3, rtol=1e-6)
    np.testing.assert_allclose(guided(0.5)[0], plain * (0.5 / 3 + 0.5), rtol=1e-6)
    np.testing.assert_allclose(guided(1.0)[1], [1.2, 1.0])  # outside the interval


def test_guidance_commutes_with_the_choice_of_output():
    path, results = paths.vp(), []
    with jax.enable_x64():
        level = jnp.asarray([[-4.0], [0.5]])

        @tiny.jit
        def guided():
            for name in ("x0", "edm"):
                output = parameterisations.by_name(name)
                networks = [oracle(law, path, output) for law in ("squash", "narrow")]
                y = gaussian_samplers.guided(*networks, 2.0, -3.0, 3.0)(START, level, None)
                results.append(output.to_x0(path, level, y, START))
            return *results, oracle("squash", path)(START, level, None)

        first, second, conditional = guided()
        np.testing.assert_allclose(second, first, atol=1e-11)
        unguided = np.isclose(first, conditional, atol=1e-11)
    np.testing.assert_array_equal(unguided, [[True, True], [False, False]])


FROM_NOISE = [-np.inf, 0.0]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaussian_samplers.ddim(1.5), "eta"),
        (lambda: gaussian_samplers.ddpm_ancestral(-0.1), "large_fraction"),
        (lambda: gaussian_samplers.edm_heun(churn=-1.0), "churn"),
        (lambda: gaussian_samplers.edm_heun(churn_min=2.0, churn_max=1.0), "churn_min"),
        (lambda: gaussian_samplers.guided(constant(0), constant(0), 2.0, 1.0, -1.0), "low < high"),
        (
            lambda: gaussian_samplers.guided(constant(0), constant(0), rescale=2.0, scale=1),
            "rescale",
        ),
        (lambda: refused(grid=GRID_12[::-1]), "increases"),
        (lambda: refused(shape=(4,)), "shape"),
        (lambda: refused(shape=(4, 1), start=START), "start"),
        (lambda: refused(grid=FROM_NOISE, path_name="ve"), "finite level"),
        (lambda: refused(grid=FROM_NOISE, output=parameterisations.eps()), "finite level"),
        (lambda: refused(grid=FROM_NOISE, sampler=SAMPLERS["edm"]), "edm_heun"),
        (
            lambda: gaussian_samplers.make_gaussian_generator(
                jnp.multiply, SAMPLERS["ddim"], [0.0, 0.0], (1,), output=X0, path=paths.vp()
            ),
            "increases",
        ),
        (
            lambda: refused(lambda x, logsnr, documents: x[:, :1], shape=(1, 2)),
            "one number per element",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
