"""Gaussian samplers against closed forms: single steps, linear recursions, the probability flow."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import optimize, stats

from mdm_jax import samplers
from mdm_jax.models import toy_gaussian
from mdm_jax.samplers.gaussian import step_noise
from mdm_jax.samplers.gaussian_ddim import ancestral_std, log_posterior_std, transition_mean
from mdm_jax.schedules import parameterisations, paths, spacings

M2 = toy_gaussian.skewed_pair()


class Squash:
    """No law's denoiser, but a cheap nonlinear one."""

    def denoise(self, z, logsnr):
        return 0.9 * jax.nn.sigmoid(logsnr) * z + 0.1 * jnp.tanh(z)


LAWS = {
    "squash": Squash(),
    "mixture": M2,
    "narrow": toy_gaussian.normal(0.0, 0.5),
    "standard": toy_gaussian.standard_normal(),
}
X0 = parameterisations.x0()


@functools.cache
def oracle(name, path, output=X0):
    """The ideal network for a law of independent elements."""

    def model_fn(x, logsnr, documents):
        x0 = LAWS[name].denoise(x * jnp.exp(-path.log_alpha(logsnr)), logsnr)
        return parameterisations.convert(x0, x, path, logsnr, X0, output)

    return model_fn


@functools.cache
def constant(value):
    return lambda x, logsnr, documents: jnp.full_like(x, value)


@functools.cache
def compiled(model_fn, sampler, shape, path, output, started, data_std):
    """``sample_gaussian`` for one kind of run; grids of one length share the program."""

    def run(key, grid, start, row_offset):
        return samplers.sample_gaussian_with_trace(
            *(key, model_fn, sampler, grid, shape, lambda state: state.x0),
            output=output,
            path=path,
            start=start if started else None,
            data_std=data_std,
            row_offset=row_offset,
        )

    return tiny.jit(run)


def draw_with_estimates(
    model_fn, sampler, grid, shape, path, output=X0, start=None, data_std=1.0, row_offset=0
):
    """Samples, and the estimates of the data that each step was made with."""
    run = compiled(model_fn, sampler, shape, path, output, start is not None, data_std)
    return jax.tree.map(np.asarray, run(jax.random.key(0), jnp.asarray(grid), start, row_offset))


def refused(model_fn, sampler, grid, shape, path, output=X0, start=None):
    return samplers.sample_gaussian(
        *(jax.random.key(0), model_fn, sampler, grid, shape),
        output=output,
        path=path,
        start=start,
    )


def draw(*args, **kwargs):
    return draw_with_estimates(*args, **kwargs)[0]


def draw_from(z, model_fn, sampler, grid, path, **kwargs):
    """:func:`draw` from a given first state, in units of x / alpha."""
    start = np.asarray(path.alpha(grid[0])) * np.asarray(z, np.float64)
    return draw(model_fn, sampler, grid, start.shape, path, start=start, **kwargs)


def context(path, logsnr=-1.0, next_logsnr=0.5, previous=-1.9, rows=1, index=1, num_steps=3):
    level = functools.partial(jnp.asarray, dtype=float)
    keys = jax.random.split(jax.random.key(3), rows)
    return samplers.GaussianContext(
        *(keys, jnp.int32(index), num_steps, level(previous), level(logsnr), level(next_logsnr)),
        path,
    )


SINGLE_STEPS = {  # ddim, ancestral mean, small, large, mean and std at eta 0.6, second order
    "vp": (0.5862979414, 0.3602039713, 0.5415717486, 0.7536161894, 0.5214738982, 0.3249430492)
    + (0.6383332126,),
    "ve": (0.4361832764, 0.3115650801, 0.6864367243, 1.4531865568, 0.4004536400, 0.4118620346)
    + (0.5021374573,),
    "flow": (0.5516884374, 0.3199237904, 0.3858985957, 0.5486370245, 0.4852385383, 0.2315391574)
    + (0.5887663281,),
}


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_single_steps(name):
    path = paths.by_name(name)
    ddim, ancestral, small, large, mean, std, second_order = SINGLE_STEPS[name]
    with jax.enable_x64():
        levels = (path, *context(path)[4:6])
        noise = step_noise(context(path), jnp.zeros((1, 1)))
        expected = {
            samplers.ddim(): ddim,
            samplers.ddim(1.0): ancestral + small * noise,
            samplers.ddim(0.6): mean + std * noise,
            samplers.ddpm_ancestral(): ancestral + small * noise,
            samplers.ddpm_ancestral(1.0): ancestral + large * noise,
            samplers.ddpm_ancestral(0.3): ancestral + large**0.3 * small**0.7 * noise,
            samplers.dpm_solver_pp_2m(): second_order,
            samplers.euler_flow(): ddim,
            samplers.edm_heun(second_order=False): ddim,
        }
        state = samplers.GaussianState(jnp.full((1, 1), 0.7), jnp.full((1, 1), 0.05))
        for sampler, value in expected.items():
            new = sampler.step(context(path), lambda x, logsnr: jnp.full_like(x, 0.2), state)
            np.testing.assert_allclose(new.x, np.reshape(value, (1, 1)), atol=2e-10)
            np.testing.assert_array_equal(new.x0, 0.2)
        np.testing.assert_allclose(transition_mean(*levels, 0.7, 0.2, 0.6), mean, atol=1e-10)
        np.testing.assert_allclose(jnp.exp(log_posterior_std(*levels)), small, atol=1e-10)
        np.testing.assert_allclose(ancestral_std(*levels, 1.0), large, atol=1e-10)


def test_the_order_is_lowered_in_the_first_and_last_step_only():
    path = paths.vp()
    with jax.enable_x64():
        state = samplers.GaussianState(jnp.full((1, 1), 0.7), jnp.full((1, 1), 0.05))

        def step(sampler, **kwargs):
            now = context(path, **kwargs)
            return float(sampler.step(now, lambda x, logsnr: jnp.full_like(x, 0.2), state).x[0, 0])

        first_order, second_order = SINGLE_STEPS["vp"][0], SINGLE_STEPS["vp"][-1]
        lowered, plain = samplers.dpm_solver_pp_2m(), samplers.dpm_solver_pp_2m(False)
        for sampler in (lowered, plain):
            assert step(sampler, index=0) == pytest.approx(first_order, abs=1e-9)
            assert step(sampler, index=1) == pytest.approx(second_order, abs=1e-9)
            assert step(sampler, index=2, next_logsnr=jnp.inf) == pytest.approx(0.2, abs=1e-12)
        assert step(lowered, index=2) == pytest.approx(first_order, abs=1e-9)
        assert step(plain, index=2) == pytest.approx(second_order, abs=1e-9)


SAMPLERS = {
    "ddim": samplers.ddim(),
    "ddim_eta": samplers.ddim(0.6),
    "2m": samplers.dpm_solver_pp_2m(),
    "edm": samplers.edm_heun(),
    "edm_churn": samplers.edm_heun(churn=2.0, churn_noise=1.003, churn_max=3.0),
    "heun_flow": samplers.heun_flow(),
}
START = np.array([[1.7, -0.4], [9.0, -12.0]])
GRID_12 = np.linspace(-6, 6, 13)


@pytest.mark.parametrize("name", ["ddim_eta", "2m", "edm_churn", "heun_flow"])
def test_samples_do_not_depend_on_the_path_or_the_output(name):
    grid = np.append(GRID_12[::3], np.inf)
    kinds = [("vp", "v"), ("flow", "flow")]
    kinds += [("ve", "eps"), ("song_subvp", "x0")] if name == "ddim_eta" else []
    with jax.enable_x64():
        results = []
        for path_name, output_name in kinds:
            path, output = paths.by_name(path_name), parameterisations.by_name(output_name)
            model = oracle("squash", path, output)
            results.append(draw_from(START, model, SAMPLERS[name], grid, path, output=output))
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], atol=1e-10)


def test_euler_methods_are_one_and_known_values():
    with jax.enable_x64():
        path = paths.vp()
        run = functools.partial(draw_from, START, oracle("mixture", path), grid=GRID_12, path=path)
        ddim = run(sampler=samplers.ddim())
        np.testing.assert_allclose(ddim[0, 0], 0.365203269239, atol=1e-12)
        for other in (samplers.euler_flow(), samplers.edm_heun(second_order=False)):
            np.testing.assert_allclose(run(sampler=other), ddim, atol=1e-12)
        second = run(sampler=samplers.dpm_solver_pp_2m(lower_order_final=False))
        np.testing.assert_allclose(second[0, 0], 0.397492194534, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 10, 50])
def test_ddim_on_normal_data_over_the_whole_cosine_schedule(n):
    # On the variance-preserving path the ideal v for N(0, 1) is zero, also at logSNR -inf.
    time = np.arange(n, -1, -1) / n
    with np.errstate(divide="ignore"):
        grid = -2 * np.log(np.tan(np.pi / 2 * time))
    grid[0] = -np.inf
    with jax.enable_x64():
        ratio = draw(
            *(constant(0.0), samplers.ddim(), grid, (1, 1), paths.vp()),
            output=parameterisations.v(),
            start=np.ones((1, 1)),
        )
        np.testing.assert_allclose(ratio, math.cos(math.pi / 2 / n) ** n, atol=1e-12)


@pytest.mark.parametrize("name", ["2m", "heun_flow", "ddim_eta"])
def test_zero_terminal_snr(name):
    # The flow's ideal velocity for N(0, 1), finite where there is no signal at all.
    def model_fn(x, logsnr, documents):
        tau = jax.nn.sigmoid(-0.5 * logsnr)
        return (2 * tau - 1) / (tau**2 + (1 - tau) ** 2) * x

    grid = np.array([-np.inf, -2.0, -1.0, 0.0, 1.0, 2.0, np.inf])
    run = functools.partial(draw, model_fn, SAMPLERS[name], shape=(2, 2), path=paths.flow())
    run = functools.partial(run, output=parameterisations.flow())
    found = run(grid)
    assert np.all(np.isfinite(found))
    grid[0] = -16.0  # nearly the same
    np.testing.assert_allclose(run(grid), found, rtol=0.01)


def between(function, inverse, n=10, low=-8.0, high=8.0):
    """Levels between which a quantity changes in equal steps, float64."""
    levels = inverse(np.linspace(function(low), function(high), n + 1))
    levels[0], levels[-1] = low, high
    return levels


def softplus(x):
    return np.logaddexp(0, x)


def softplus_inverse(y):
    return y + np.log(-np.expm1(-y))


def uniform_logsnr(n=10):
    return np.linspace(-8.0, 8.0, n + 1)


def cosine(n=10):
    return between(lambda x: np.arctan(np.exp(-x / 2)), lambda y: -2 * np.log(np.tan(y)), n)


def edm(n=10):
    return between(lambda x: np.exp(-x / 14), lambda y: -14 * np.log(y), n)


def uniform_softplus(n=10, std=1.0):
    shift = 2 * np.log(std)
    return between(lambda x: softplus(x + shift), lambda y: softplus_inverse(y) - shift, n)


def flow_time(n=10):
    return between(lambda x: 1 / (1 + np.exp(x / 2)), lambda y: 2 * np.log(1 / y - 1), n)


def uniform_sigma(n=10):
    return between(lambda x: np.exp(-x / 2), lambda y: -2 * np.log(y), n)


@pytest.mark.parametrize(
    "grid, ratio",
    [
        (cosine(), 0.888564255099),
        (flow_time(), 0.884686108036),
        (uniform_logsnr(), 0.818849450506),
        (edm(), 0.808434751412),
        (uniform_softplus(), 0.644700441902),
        (uniform_sigma(), 0.196701131802),
    ],
)
def test_standard_deviation_of_ddim_by_spacing(grid, ratio):
    angles = np.arctan(np.exp(-grid / 2))
    np.testing.assert_allclose(np.prod(np.cos(np.diff(angles))), ratio, atol=1e-12)
    path = paths.flow()
    with jax.enable_x64():
        model = oracle("standard", path)
        start = np.full((1, 1), np.sqrt(1 + np.exp(8.0)))
        out = draw_from(start, model, samplers.ddim(), grid, path)
        np.testing.assert_allclose(out, ratio * np.sqrt(1 + np.exp(-8.0)), atol=1e-12)


def test_ddim_ratio_of_narrow_data():
    path = paths.vp()
    with jax.enable_x64():
        start = np.full((1, 1), np.sqrt(0.25 + np.exp(6.0)))
        out = draw_from(start, oracle("narrow", path), samplers.ddim(), GRID_12, path)
        np.testing.assert_allclose(out / np.sqrt(0.25 + np.exp(-6.0)), 0.883626130044, atol=1e-11)


# Relative errors for N(0, 0.5^2) and absolute ones for M2 from z = 9, for N steps on [-6, 6].
ERRORS = {
    "ddim": (
        {64: -2.2926165940e-02, 128: -1.1529483698e-02},
        {64: -5.14378749e-03, 128: -2.56356598e-03},
    ),
    "2m": (
        {64: 5.0987590861e-04, 128: 1.2834651825e-04},
        {64: 2.31307102e-04, 128: 5.64427073e-05},
    ),
    "edm": (
        {64: 1.1234611157e-03, 128: 2.7754037914e-04},
        {64: 2.95799672e-04, 128: 7.21102147e-05},
    ),
    "heun_flow": (
        {64: 3.1368903498e-04, 128: 7.9067605599e-05},
        {64: 5.19095320e-05, 128: 1.26593937e-05},
    ),
}


@functools.cache
def flow_end(z=9.0):
    """Where the probability flow of M2 takes z from logSNR -6 to 6: to the same quantile."""

    def cdf(z, logsnr):
        return float(np.sum(M2.weights * stats.norm.cdf(z, M2.means, scale(logsnr))))

    def scale(logsnr):
        return np.sqrt(M2.std**2 + np.exp(-logsnr))

    return optimize.brentq(lambda end: cdf(end, 6.0) - cdf(z, -6.0), -10, 10, xtol=1e-14)


@pytest.mark.parametrize("name", ERRORS)
def test_errors_and_orders_of_convergence(name):
    path = paths.vp()
    order = 1 if name == "ddim" else 2
    assert flow_end() == pytest.approx(0.520053494000, abs=1e-11)

    def both(x, logsnr, documents):
        z = x * jnp.exp(-path.log_alpha(logsnr))
        return jax.vmap(lambda law, z, level: law.denoise(z, level))(laws, z, logsnr)

    laws = toy_gaussian.GaussianMixture(
        np.array([[0.5, 0.5], M2.weights]), np.array([[0.0, 0.0], M2.means]), np.array([0.5, 0.25])
    )
    exact = math.sqrt((0.25 + math.exp(-6)) / (0.25 + math.exp(6)))
    sampler = samplers.dpm_solver_pp_2m(False) if name == "2m" else SAMPLERS[name]
    with jax.enable_x64():
        found = {}
        for n in ERRORS[name][0]:
            grid = np.linspace(-6, 6, n + 1)
            end = draw_from(np.array([[1.0], [9.0]]), both, sampler, grid, path)[:, 0]
            found[n] = end[0] / exact - 1, end[1] - flow_end()
    for kind, tolerance in ((0, 2e-10), (1, 2e-10)):
        for n, expected in ERRORS[name][kind].items():
            np.testing.assert_allclose(found[n][kind], expected, atol=tolerance, err_msg=str(n))
        slope = math.log2(found[64][kind] / found[128][kind])
        assert slope == pytest.approx(order, abs=0.1)


@functools.cache
def step_gains(sampler, std, num_steps):
    """``gains(level, next_level) -> A, B``: a step takes x to A x + B noise on normal data."""
    path = paths.ve()
    model = oracle({1.0: "standard", 0.5: "narrow"}[std], path)
    denoise = samplers.bind_denoiser(model, X0, path)

    def gains(level, next_level):
        def now():  # the same keys each time
            return context(path, level, next_level, num_steps=num_steps)

        def step(x):
            state = samplers.GaussianState(jnp.full((1, 1), x), jnp.zeros((1, 1)))
            return sampler.step(now(), denoise, state).x[0, 0]

        noise = step_noise(now(), jnp.zeros((1, 1)))[0, 0]
        return step(1.0) - step(0.0), step(0.0) / noise

    return tiny.jit(gains)


def variance_out(sampler, grid, std, num_steps=None):
    """Variance of x / alpha after the last step, started from the exact law."""
    variance = std**2 + np.exp(-grid[0])
    for level, next_level in zip(grid[:-1], grid[1:]):
        gain, noise = map(float, step_gains(sampler, std, num_steps)(level, next_level))
        variance = gain**2 * variance + noise**2
    return variance


ANCESTRAL = {  # (std, N): variance out for uniform logSNR, cosine, EDM, softplus
    (1.0, 5): (0.2845130074, 0.5055149242, 0.2843876932, 0.2022320704),
    (1.0, 10): (0.4991897544, 0.6845801355, 0.4720684463, 0.4496644887),
    (1.0, 20): (0.6886499374, 0.8149523187, 0.6621692134, 0.6706555458),
    (1.0, 50): (0.8561148500, 0.9162931960, 0.8396655901, 0.8524792682),
    (0.5, 5): (0.0786850910, 0.1088386227, 0.0597653114, 0.0666890390),
    (0.5, 20): (0.1723958209, 0.1882860679, 0.1595795987, 0.1798434319),
}
ANCESTRAL_SAMPLER = samplers.ddpm_ancestral()


@pytest.mark.parametrize("std, n", ANCESTRAL)
def test_variance_of_ancestral_samples(std, n):
    grids = [uniform_logsnr(n), cosine(n), edm(n), uniform_softplus(n, std)]
    with jax.enable_x64():
        for grid, expected in zip(grids, ANCESTRAL[std, n]):
            found = variance_out(ANCESTRAL_SAMPLER, grid, std)
            np.testing.assert_allclose(found, expected, atol=2e-10)


def edm_grid(n):
    done = np.arange(n) / (n - 1)
    sigma = (80 ** (1 / 7) + done * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return np.append(-2 * np.log(sigma), np.inf)


@pytest.mark.parametrize(
    "settings, n, variance",
    [
        ({"second_order": False}, 18, 0.178962586642),
        ({"churn": 40.0, "second_order": False}, 18, 0.150770843925),
        ({}, 18, 0.278398632092),
        ({"churn": 4.0}, 18, 0.298780274086),
        ({"churn": 40.0}, 18, 0.316095314990),
        ({"churn": 4.0, "churn_min": 100.0}, 18, 0.278398632092),
        ({}, 36, 0.256144271642),
        ({}, 72, 0.251437480044),
    ],
)
def test_edm_sampler_on_narrow_data(settings, n, variance):
    with jax.enable_x64():
        sampler = SAMPLERS["edm"] if not settings else samplers.edm_heun(**settings)
        steps = n if settings else None  # without churn nothing depends on it
        found = variance_out(sampler, edm_grid(n), 0.5, steps)
        np.testing.assert_allclose(found, variance, atol=1e-11)


def test_the_sampled_variance_is_that_of_the_recursion():
    path, grid = paths.vp(), uniform_logsnr(10)
    start = np.sqrt(1 + np.exp(8.0)) * np.random.default_rng(0).normal(size=(64, 1024))
    model = oracle("standard", path)
    out = draw_from(start, model, samplers.ddpm_ancestral(), grid, path)
    expected = ANCESTRAL[1.0, 10][0]
    error = expected * np.sqrt(2 / out.size)
    assert abs(np.mean(out.astype(np.float64) ** 2) - expected) < 5 * error


@pytest.mark.parametrize(
    "sampler",
    [samplers.ddim(0.6), samplers.ddpm_ancestral(1.0), samplers.edm_heun(churn=2.0)],
    ids=lambda sampler: sampler.name,
)
def test_rows_are_independent_and_the_end_is_the_estimate(sampler):
    path, grid = paths.vp(), spacings.edm(4)
    model = oracle("squash", path)
    together, estimates = draw_with_estimates(model, sampler, grid, (8, 3), path)
    alone = draw(model, sampler, grid, (1, 3), path, row_offset=5)
    np.testing.assert_allclose(alone[0], together[5], rtol=1e-6)
    assert len(np.unique(together)) == together.size
    # The step to +inf adds no noise.
    np.testing.assert_array_equal(together, estimates[-1])


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
    path, grid, sampler = paths.vp(), np.linspace(-4, 4, 6), samplers.dpm_solver_pp_2m()
    model = oracle("squash", path)
    key = jax.random.key(1)
    kwargs = {"output": X0, "path": path}
    data, states = tiny.jit(
        lambda key: samplers.sample_gaussian_with_trace(
            key, model, sampler, grid, (3, 2), lambda state: state, **kwargs
        )
    )(key)
    assert states.x.shape == states.x0.shape == (5, 3, 2)
    np.testing.assert_allclose(states.x[-1] / np.asarray(path.alpha(4.0)), data, rtol=1e-6)
    expected = model(states.x[-2], jnp.full((3, 1), grid[-2]), None)
    np.testing.assert_allclose(states.x0[-1], expected, atol=1e-6)

    def apply_fn(params, x, logsnr, documents):
        return params * model(x, logsnr, documents)

    generate = samplers.make_gaussian_generator(apply_fn, sampler, grid, (2,), **kwargs)
    np.testing.assert_allclose(generate(1.0, key, 2, row_offset=1), data[1:], atol=1e-6)


@pytest.mark.parametrize("name, data_std, expected", [
    ("vp", 1.0, 1.0), ("ve", 0.0, math.exp(1.0)), ("flow", 0.0, 1 / (1 + math.exp(-1.0))),
    ("ve", 2.0, math.sqrt(math.exp(2.0) + 4)),
])  # fmt: skip
def test_scale_of_the_first_state(name, data_std, expected):
    path = paths.by_name(name)
    np.testing.assert_allclose(samplers.initial_std(path, -2.0, data_std), expected, rtol=1e-6)
    # A denoiser that returns its input in units of x / alpha stands still there.
    out = draw(
        lambda x, logsnr, documents: x / path.alpha(logsnr),
        *(samplers.ddim(), np.array([-2.0, 0.0]), (64, 512), path),
        data_std=data_std,
    )
    std = expected / float(path.alpha(-2.0))
    assert abs(out.std() - std) < 5 * std / np.sqrt(2 * out.size)


def test_guidance_within_an_interval():
    def inside_only(x, logsnr, documents):
        return jnp.where(jnp.abs(logsnr) <= 1.0, 0.5, jnp.nan) * jnp.ones_like(x)

    model = samplers.guided(constant(2.0), inside_only, 3.0, -1.0, 1.0)
    x = jnp.zeros((3, 2))
    levels = jnp.array([[-1.0], [0.0], [1.0]])
    np.testing.assert_allclose(model(x, levels), 0.5 + 3.0 * 1.5)
    mixed = model(x, jnp.array([[-1.5], [0.0], [1.5]]))
    np.testing.assert_allclose(mixed[:, 0], [2.0, 5.0, 2.0])
    np.testing.assert_allclose(model(x, levels + 9), 2.0)
    unguided = samplers.guided(constant(2.0), constant(0.5), 1.0)
    np.testing.assert_allclose(unguided(x, levels), 2.0)


def test_guidance_commutes_with_the_choice_of_output():
    path, pair = paths.vp(), ("squash", "narrow")
    outputs = [parameterisations.by_name(name) for name in ("x0", "edm")]
    with jax.enable_x64():
        results = []
        for output in outputs:
            networks = [oracle(name, path, output) for name in pair]
            model = samplers.guided(*networks, 2.0, -3.0, 3.0)
            args = (START, model, samplers.ddim(), GRID_12[::3], path)
            results.append(draw_from(*args, output=output))
        for other in results[1:]:
            np.testing.assert_allclose(other, results[0], atol=1e-11)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: samplers.ddim(1.5), "eta"),
        (lambda: samplers.ddpm_ancestral(-0.1), "large_fraction"),
        (lambda: samplers.edm_heun(churn=-1.0), "churn"),
        (lambda: samplers.edm_heun(churn_min=2.0, churn_max=1.0), "churn_min"),
        (lambda: samplers.guided(constant(0), constant(0), 2.0, 1.0, -1.0), "low < high"),
        (
            lambda: refused(constant(0), samplers.ddim(), GRID_12[::-1], (1, 1), paths.vp()),
            "increases",
        ),
        (lambda: refused(constant(0), samplers.ddim(), GRID_12, (4,), paths.vp()), "shape"),
        (
            lambda: refused(constant(0), samplers.ddim(), GRID_12, (4, 1), paths.vp(), start=START),
            "start",
        ),
        (
            lambda: refused(constant(0), samplers.ddim(), [-np.inf, 0.0], (1, 1), paths.ve()),
            "finite level",
        ),
        (
            lambda: refused(
                *(constant(0), samplers.ddim(), [-np.inf, 0.0], (1, 1), paths.vp()),
                output=parameterisations.eps(),
            ),
            "finite level",
        ),
        (
            lambda: refused(constant(0), samplers.edm_heun(), [-np.inf, 0.0], (1, 1), paths.vp()),
            "edm_heun",
        ),
        (
            lambda: samplers.make_gaussian_generator(
                *(jnp.multiply, samplers.ddim(), [0.0, 0.0], (1,)), output=X0, path=paths.vp()
            ),
            "increases",
        ),
        (
            lambda: refused(
                *(lambda x, logsnr, documents: x[:, :1], samplers.ddim()),
                *(GRID_12, (1, 2), paths.vp()),
            ),
            "one number per element",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(ValueError, match=words):
        call()
