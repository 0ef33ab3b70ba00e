"""Gaussian generation as a whole: rows, precision, first state, guidance, refusals."""

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


def refused(model_fn, sampler, grid, shape, path, output=X0, start=None):
    return gaussian_samplers.sample_gaussian(
        *(jax.random.key(0), model_fn, sampler, grid, shape),
        output=output,
        path=path,
        start=start,
    )


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
    alone = draw(model, sampler, grid, (1, 3), path, row_offset=5)
    np.testing.assert_allclose(alone[0], together[5], rtol=1e-6)
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
    found = draw(model, SAMPLERS[name], np.float32(grid), (1, 2), path, start=first)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=name)


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


@pytest.mark.parametrize("name, data_std, expected", [
    ("vp", 1.0, 1.0), ("ve", 0.0, math.exp(1.0)), ("flow", 0.0, 1 / (1 + math.exp(-1.0))),
    ("ve", 2.0, math.sqrt(math.exp(2.0) + 4)),
])  # fmt: skip
def test_scale_of_the_first_state(name, data_std, expected):
    path = paths.by_name(name)
    np.testing.assert_allclose(
        gaussian_samplers.initial_std(path, -2.0, data_std), expected, rtol=1e-6
    )
    # A denoiser that returns its input in units of x / alpha stands still there.
    out = draw(
        lambda x, logsnr, documents: x / path.alpha(logsnr),
        *(gaussian_samplers.ddim(), np.array([-2.0, 0.0]), (64, 512), path),
        data_std=data_std,
    )
    std = expected / float(path.alpha(-2.0))
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


def test_guidance_commutes_with_the_choice_of_output():
    path, pair = paths.vp(), ("squash", "narrow")
    outputs = [parameterisations.by_name(name) for name in ("x0", "edm")]
    with jax.enable_x64():
        results = []
        for output in outputs:
            networks = [oracle(name, path, output) for name in pair]
            model = gaussian_samplers.guided(*networks, 2.0, -3.0, 3.0)
            args = (START, model, gaussian_samplers.ddim(), GRID_12[::3], path)
            results.append(draw_from(*args, output=output))
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], atol=1e-11)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: gaussian_samplers.ddim(1.5), "eta"),
        (lambda: gaussian_samplers.ddpm_ancestral(-0.1), "large_fraction"),
        (lambda: gaussian_samplers.edm_heun(churn=-1.0), "churn"),
        (lambda: gaussian_samplers.edm_heun(churn_min=2.0, churn_max=1.0), "churn_min"),
        (lambda: gaussian_samplers.guided(constant(0), constant(0), 2.0, 1.0, -1.0), "low < high"),
        (
            lambda: refused(
                constant(0), gaussian_samplers.ddim(), GRID_12[::-1], (1, 1), paths.vp()
            ),
            "increases",
        ),
        (
            lambda: refused(constant(0), gaussian_samplers.ddim(), GRID_12, (4,), paths.vp()),
            "shape",
        ),
        (
            lambda: refused(
                constant(0), gaussian_samplers.ddim(), GRID_12, (4, 1), paths.vp(), start=START
            ),
            "start",
        ),
        (
            lambda: refused(
                constant(0), gaussian_samplers.ddim(), [-np.inf, 0.0], (1, 1), paths.ve()
            ),
            "finite level",
        ),
        (
            lambda: refused(
                *(constant(0), gaussian_samplers.ddim(), [-np.inf, 0.0], (1, 1), paths.vp()),
                output=parameterisations.eps(),
            ),
            "finite level",
        ),
        (
            lambda: refused(
                constant(0), gaussian_samplers.edm_heun(), [-np.inf, 0.0], (1, 1), paths.vp()
            ),
            "edm_heun",
        ),
        (
            lambda: gaussian_samplers.make_gaussian_generator(
                *(jnp.multiply, gaussian_samplers.ddim(), [0.0, 0.0], (1,)),
                output=X0,
                path=paths.vp(),
            ),
            "increases",
        ),
        (
            lambda: refused(
                *(lambda x, logsnr, documents: x[:, :1], gaussian_samplers.ddim()),
                *(GRID_12, (1, 2), paths.vp()),
            ),
            "one number per element",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
