"""Running Gaussian samplers on laws with closed forms: networks, samplers, grids of levels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mdm_jax.gaussian import parameterisations
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.testing import toys

M2 = toys.skewed_pair()


class Squash:
    """No law's denoiser, but a cheap nonlinear one."""

    def denoise(self, z, logsnr):
        return 0.9 * jax.nn.sigmoid(logsnr) * z + 0.1 * jnp.tanh(z)


LAWS = {
    "squash": Squash(),
    "mixture": M2,
    "narrow": toys.normal(0.0, 0.5),
    "standard": toys.standard_normal(),
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
def compiled(model_fn, sampler, shape, path, output, started):
    """``sample_gaussian`` for one kind of run; grids of one length share the program."""

    def run(key, grid, start, data_std, row_offset):
        return gaussian_samplers.sample_gaussian_with_trace(
            key,
            model_fn,
            sampler,
            grid,
            shape,
            lambda state: state.x0,
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
    run = compiled(model_fn, sampler, shape, path, output, start is not None)
    key, grid = jax.random.key(0), jnp.asarray(grid)
    return jax.tree.map(np.asarray, run(key, grid, start, data_std, row_offset))


def draw(*args, **kwargs):
    return draw_with_estimates(*args, **kwargs)[0]


def draw_from(z, model_fn, sampler, grid, path, **kwargs):
    """:func:`draw` from a given first state, in units of x / alpha."""
    start = np.asarray(path.alpha(grid[0])) * np.asarray(z, np.float64)
    return draw(model_fn, sampler, grid, start.shape, path, start=start, **kwargs)


@functools.cache
def compiled_step(model_fn, sampler, path, output):
    denoise = gaussian_samplers.bind_denoiser(model_fn, output, path)

    def step(state, levels, index, num_steps):
        previous, level, following = levels
        now = gaussian_samplers.GaussianContext(
            keys=None,
            index=index,
            num_steps=num_steps,
            previous_logsnr=previous,
            logsnr=level,
            next_logsnr=following,
            path=path,
        )
        return sampler.step(now, denoise, state)

    return tiny.jit(step)


def walk(x, model_fn, sampler, grid, path, output=X0):
    """Samples from the state x, without noise; grids of all lengths share one program."""
    step, x = compiled_step(model_fn, sampler, path, output), jnp.asarray(x)
    state = gaussian_samplers.GaussianState(x, jnp.zeros_like(x), sampler.init(x))
    for i in range(len(grid) - 1):
        levels = grid[[max(i - 1, 0), i, i + 1]]
        state = step(state, levels, jnp.int32(i), jnp.int32(len(grid) - 1))
    return np.asarray(state.x) / np.asarray(path.alpha(grid[-1]))


def context(path, logsnr=-1.0, next_logsnr=0.5, previous=-1.9, rows=1, index=1, num_steps=3):
    level = functools.partial(jnp.asarray, dtype=float)
    keys = jax.random.split(jax.random.key(3), rows)
    return gaussian_samplers.GaussianContext(
        keys=keys,
        index=jnp.int32(index),
        num_steps=num_steps,
        previous_logsnr=level(previous),
        logsnr=level(logsnr),
        next_logsnr=level(next_logsnr),
        path=path,
    )


SAMPLERS = {
    "ddim": gaussian_samplers.ddim(),
    "ddim_eta": gaussian_samplers.ddim(0.6),
    "2m": gaussian_samplers.dpm_solver_pp_2m(),
    "2s": gaussian_samplers.dpm_solver_pp_2s(),
    "3m": gaussian_samplers.dpm_solver_pp_3m(),
    "edm": gaussian_samplers.edm_heun(),
    "edm_churn": gaussian_samplers.edm_heun(churn=2.0, churn_noise=1.003, churn_max=3.0),
    "heun_flow": gaussian_samplers.heun_flow(),
}
START = np.array([[1.7, -0.4], [9.0, -12.0]])
GRID_12 = np.linspace(-6, 6, 13)


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


def edm_grid(n):
    """Published levels of EDM, down to no noise."""
    done = np.arange(n) / (n - 1)
    sigma = (80 ** (1 / 7) + done * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    return np.append(-2 * np.log(sigma), np.inf)
