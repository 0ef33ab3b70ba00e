"""Single steps of Gaussian samplers against closed forms, on any path and with any output."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_runs import GRID_12, SAMPLERS, START, context, draw, draw_from, oracle
from scipy import integrate
from variants import slow_except

from mdm_jax.gaussian import parameterisations, paths
from mdm_jax.gaussian import samplers as gaussian_samplers
from mdm_jax.gaussian.samplers.methods import ancestral_std, log_posterior_std, transition_mean
from mdm_jax.gaussian.samplers.sampler import step_noise

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
            gaussian_samplers.ddim(): ddim,
            gaussian_samplers.ddim(1.0): ancestral + small * noise,
            gaussian_samplers.ddim(0.6): mean + std * noise,
            gaussian_samplers.ddpm_ancestral(): ancestral + small * noise,
            gaussian_samplers.ddpm_ancestral(1.0): ancestral + large * noise,
            gaussian_samplers.ddpm_ancestral(0.3): ancestral + large**0.3 * small**0.7 * noise,
            gaussian_samplers.dpm_solver_pp_2m(): second_order,
            gaussian_samplers.dpm_solver_pp_2s(): ddim,  # the estimate is the same in the middle
            gaussian_samplers.euler_flow(): ddim,
            gaussian_samplers.indi(): ddim,
            gaussian_samplers.edm_heun(second_order=False): ddim,
        }
        state = gaussian_samplers.GaussianState(jnp.full((1, 1), 0.7), jnp.full((1, 1), 0.05))
        for sampler, value in expected.items():
            new = sampler.step(context(path), lambda x, logsnr: jnp.full_like(x, 0.2), state)
            np.testing.assert_allclose(new.x, np.reshape(value, (1, 1)), atol=2e-10)
            np.testing.assert_array_equal(new.x0, 0.2)
        np.testing.assert_allclose(transition_mean(*levels, 0.7, 0.2, 0.6), mean, atol=1e-10)
        np.testing.assert_allclose(jnp.exp(log_posterior_std(*levels)), small, atol=1e-10)
        np.testing.assert_allclose(ancestral_std(*levels, 1.0), large, atol=1e-10)


def test_methods_of_two_calls_make_one_in_the_step_to_clean_data():
    path, calls = paths.vp(), []

    def denoise(x, logsnr):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.full_like(x, 0.2)

    with jax.enable_x64():
        state = gaussian_samplers.GaussianState(jnp.full((1, 1), 0.7), jnp.full((1, 1), 0.05))
        two_calls = ("heun_flow", "edm_heun", "dpm_solver_pp_2s")
        for sampler in (getattr(gaussian_samplers, name)() for name in two_calls):
            for levels, times in (({}, 2), ({"next_logsnr": jnp.inf}, 1)):
                calls.clear()
                sampler.step(context(path, **levels), denoise, state)
                jax.effects_barrier()
                assert len(calls) == times


def test_the_order_is_lowered_in_the_first_and_last_step_only():
    path = paths.vp()
    with jax.enable_x64():
        state = gaussian_samplers.GaussianState(jnp.full((1, 1), 0.7), jnp.full((1, 1), 0.05))

        def step(sampler, **kwargs):
            now = context(path, **kwargs)
            return float(sampler.step(now, lambda x, logsnr: jnp.full_like(x, 0.2), state).x[0, 0])

        first_order, second_order = SINGLE_STEPS["vp"][0], SINGLE_STEPS["vp"][-1]
        lowered, plain = (
            gaussian_samplers.dpm_solver_pp_2m(),
            gaussian_samplers.dpm_solver_pp_2m(False),
        )
        for sampler in (lowered, plain):
            assert step(sampler, index=0) == pytest.approx(first_order, abs=1e-9)
            assert step(sampler, index=1) == pytest.approx(second_order, abs=1e-9)
            assert step(sampler, index=2, next_logsnr=jnp.inf) == pytest.approx(0.2, abs=1e-12)
        assert step(lowered, index=2) == pytest.approx(first_order, abs=1e-9)
        assert step(plain, index=2) == pytest.approx(second_order, abs=1e-9)


@pytest.mark.parametrize("name", slow_except({"vp"}, paths.PATHS))
def test_an_estimate_that_is_a_parabola_is_integrated_exactly(name):
    """By 3M, on uneven steps; a line by 2S, whose middle is that of the step, to second order."""
    path, levels = paths.by_name(name), np.array([-2.1, -1.6, -0.7, 0.4])

    def estimate(level):
        return 0.3 - 0.2 * level + 0.11 * level**2

    # x_s / sigma_s = x_t / sigma_t + int exp(lambda / 2) x0 dlambda / 2.
    area, _ = integrate.quad(lambda e: 0.5 * np.exp(0.5 * e) * estimate(e), *levels[-2:])
    with jax.enable_x64():
        sigma = np.asarray(path.sigma(levels))
        expected = sigma[3] * (0.7 / sigma[2] + area)

        def full(value):
            return jnp.full((2, 1), value)

        memory = full(estimate(levels[0])), jnp.full((2,), 0.5 * (levels[1] - levels[0]))
        state = gaussian_samplers.GaussianState(full(0.7), full(estimate(levels[1])), memory)
        known = {"logsnr": levels[2], "next_logsnr": levels[3], "previous": levels[1]}
        now, last = (context(path, **known, index=2, num_steps=n) for n in (9, 3))

        def run(sampler, now):
            return sampler.step(now, lambda x, level: full(estimate(level)), state).x[:, 0]

        third, lowered = gaussian_samplers.dpm_solver_pp_3m, gaussian_samplers.dpm_solver_pp_2m()
        np.testing.assert_allclose(run(third(), now), expected, rtol=1e-12)
        np.testing.assert_allclose(run(third(False), last), expected, rtol=1e-12)
        second_last = context(path, **known, index=7, num_steps=9)
        for at in (last, second_last, context(path, **known, index=1, num_steps=9)):
            np.testing.assert_allclose(run(third(), at), run(lowered, at), rtol=1e-12)
        middle = run(gaussian_samplers.dpm_solver_pp_2s(), now)
        constant = transition_mean(path, levels[2], levels[3], 0.7, estimate(-0.15))
        np.testing.assert_allclose(middle, constant, rtol=1e-12)


@pytest.mark.parametrize(
    "name", slow_except({"edm_churn"}, ["ddim_eta", "2m", "2s", "3m", "edm_churn", "heun_flow"])
)
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


@pytest.mark.parametrize(
    "name", slow_except({"2m", "heun_flow"}, ["2m", "2s", "3m", "heun_flow", "ddim_eta"])
)
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
