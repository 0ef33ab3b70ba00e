"""Gaussian schedules: identities between them, oracles from elsewhere, names and bad arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import tiny
from scipy.special import expit

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian_schedules
from mdm_jax.gaussian.schedules import names
from mdm_jax.schedules import masked

U = np.concatenate([[2.0**-24], np.linspace(0.01, 0.99, 25), [1 - 2.0**-24]])


def assert_same_law(one, other, rtol=1e-10):
    level = one.icdf(U)
    np.testing.assert_allclose(other.icdf(U), level, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.log_pdf(level), one.log_pdf(level), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.cdf(level), one.cdf(level), rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_identities():
    with jax.enable_x64(True):
        g = names
        assert_same_law(g.sd3_cosmap(), g.cosine())
        assert_same_law(g.sd3_logit_normal(0.4, 1.3), g.lognormal(0.4, 1.3))
        assert_same_law(g.ve_geometric(), g.uniform_logsnr(-2 * np.log(50.0), -2 * np.log(0.01)))
        assert_same_law(g.flow_shifted(3.0), g.shifted(g.flow(), -2 * np.log(3.0)))
        assert_same_law(g.edm_rho(0.01, 50.0, 1.0), g.edm_sigma(0.01, 50.0))
        assert_same_law(g.edm_rho(0.01, 50.0, 1e6), g.ve_geometric(), rtol=1e-4)
        assert_same_law(g.cosine_power(), g.cosine())
        assert_same_law(g.cosine_iddpm(0.0), g.cosine())
        assert_same_law(g.sd3_mode(0.0), g.flow())
        assert_same_law(g.sd3_mode(-1.0), mode_of_minus_one(), rtol=1e-9)
        assert_same_law(g.interpolated(g.cosine(), 0.7, 0.7), g.shifted(g.cosine(), 0.7))
        assert_same_law(g.beta_time(g.cosine(), 1.0, 1.0), g.cosine(), rtol=1e-9)
        assert_same_law(g.two_rates(g.cosine(), 0.3, 1.0), g.cosine())
        assert_same_law(g.ou_time(2.0), g.ddpm_linear(4.0, 4.0))
        assert_same_law(g.variance_linear(), schedules.law_of(masked.linear()))
        assert_same_law(g.cosine(), schedules.law_of(masked.cosine_squared()))
        # a narrow piece of the logistic curve is straight
        assert_same_law(g.chen_sigmoid(-1e-3, 1e-3), g.variance_linear(), rtol=1e-6)
        # without the division by the value at 0: the cosine's density, cut off
        offset = g.cosine_offset(0.008)
        assert_same_law(offset, g.truncated(g.cosine(), high=offset.support[1]))
        level = np.linspace(-20, 8, 29)
        difference = offset.log_pdf(level) - g.cosine().log_pdf(level)
        np.testing.assert_allclose(difference, np.log1p(0.008), rtol=1e-10)


def mode_of_minus_one():
    """Flow time sin^2(pi q / 2), so sigma / alpha is the squared tangent."""
    base = gaussian_schedules.cosine()

    class Doubled(schedules.TwoSidedLaw):
        support = (-np.inf, np.inf)

        def log_pdf(self, logsnr):
            return base.log_pdf(logsnr / 2) - np.log(2)

        def tails(self, logsnr):
            return base.tails(logsnr / 2)

        def quantile(self, below, above):
            return 2 * base.quantile(below, above)

    return Doubled()


def test_santos_lin_by_quadrature():
    """Uniform in the arc length of sqrt(SNR) along Ornstein-Uhlenbeck time, integrated here."""
    law = gaussian_schedules.santos_lin_fisher()

    def length(logsnr):
        """From time 0, in s = sqrt(tau), where sqrt(SNR) dtau is smooth."""
        end = np.sqrt(np.logaddexp(0, -logsnr) / 2)
        return scipy.integrate.quad(lambda s: 2 * s / np.sqrt(np.expm1(2 * s * s)), 0, end)[0]

    with jax.enable_x64(True):
        for level in (6.0, 1.0, -2.0, -7.0):
            np.testing.assert_allclose(
                length(level) / (np.pi / 2), gaussian_schedules.time_at(law, level), rtol=1e-9
            )


def test_chen_families():
    """Against the formulas for the kept power, which lose their digits at the ends."""
    with jax.enable_x64(True):
        t = np.linspace(0.05, 0.95, 19)
        sigmoid = lambda x: expit(x / 0.7)  # noqa: E731
        want = (sigmoid(2.0) - sigmoid(-1.0 + 3.0 * t)) / (sigmoid(2.0) - sigmoid(-1.0))
        got = gaussian_schedules.logsnr_at(gaussian_schedules.chen_sigmoid(-1.0, 2.0, 0.7), t)
        np.testing.assert_allclose(expit(got), want, rtol=1e-12)
        angle = np.pi / 2 * (0.2 + 0.8 * t)
        want = (np.cos(angle) / np.cos(np.pi / 2 * 0.2)) ** 4
        got = gaussian_schedules.logsnr_at(gaussian_schedules.cosine_power(0.2, 2.0), t)
        np.testing.assert_allclose(expit(got), want, rtol=1e-12)


@pytest.mark.slow
def test_wavegrad_density():
    """A mixture of uniform laws of alpha, one per segment of the table."""
    alpha = np.append(1, np.cumprod(np.sqrt(1 - np.linspace(0.01, 0.5, 6))))
    level = np.array([-0.9, 0.3, 2.0, 5.5])
    kept = expit(level)
    slope = np.sqrt(kept) * (1 - kept) / 2
    with jax.enable_x64(True):
        law = gaussian_schedules.wavegrad(6, 0.01, 0.5)
        got = np.exp(law.log_pdf(level))
        np.testing.assert_allclose(
            law.support[0], 2 * np.log(alpha[-1]) - np.log1p(-(alpha[-1] ** 2))
        )
    inside = (alpha[1:, None] < np.sqrt(kept)) & (np.sqrt(kept) <= alpha[:-1, None])
    want = np.sum(inside * slope / (alpha[:-1] - alpha[1:])[:, None], axis=0) / 6
    np.testing.assert_allclose(got, want, rtol=1e-10)


@pytest.mark.parametrize(
    ("alpha", "beta"), [pytest.param(0.8, 1.0, marks=pytest.mark.slow), (2.0, 0.5)]
)
def test_beta_time(alpha, beta):
    """The time of the base has the Beta distribution, as scipy knows it."""
    time = scipy.stats.beta(alpha, beta)
    with jax.enable_x64(True):
        base = gaussian_schedules.cosine()
        law = gaussian_schedules.beta_time(base, alpha, beta)
        level = tiny.jit(law.icdf)(U)

        @tiny.jit
        def read(level):
            log_pdf = law.log_pdf(level), base.log_pdf(level)
            return gaussian_schedules.time_at(base, level), law.cdf(level), *log_pdf

        found, below, log_pdf, of_base = (np.asarray(a) for a in read(level))
        np.testing.assert_allclose(found, time.isf(U), rtol=1e-8)
        np.testing.assert_allclose(below, U, rtol=1e-8)
        want = time.logpdf(found[1:-1]) + of_base[1:-1]
        np.testing.assert_allclose(log_pdf[1:-1], want, rtol=1e-9)
    single = gaussian_schedules.beta_time(gaussian_schedules.cosine(), alpha, beta)
    found = tiny.jit(single.icdf)(U.astype(np.float32))
    np.testing.assert_allclose(found, level, rtol=2e-5, atol=2e-5)


def test_speed():
    """The boundary is that of the public code on the table of 1000; before it 5 times the rate."""
    alpha = expit(gaussian_schedules.ddpm_table())
    boundary = np.argmax(np.gradient(np.sqrt(1 - alpha)) < 1e-4) / 1000
    with jax.enable_x64(True):
        base = gaussian_schedules.ddpm_linear()
        law = gaussian_schedules.speed(base)
        np.testing.assert_allclose(law.boundary, boundary, atol=2e-3)
        time = np.array([0.1, 0.5, 0.95])
        assert time[1] < law.boundary < time[2]

        @tiny.jit
        def log_change(time):
            level = gaussian_schedules.logsnr_at(base, time)
            return law.log_pdf(level) - base.log_pdf(level)

        change = np.exp(log_change(time))
        np.testing.assert_allclose(change[0] / change[1:], [1, 5], rtol=1e-10)
        mass = change[0] * law.boundary + change[2] * (1 - law.boundary)
        np.testing.assert_allclose(mass, 1, rtol=1e-10)
        # cosine: d sin(pi t / 2) / dt = 0.1
        got = gaussian_schedules.speed(gaussian_schedules.cosine()).boundary
        np.testing.assert_allclose(got, 2 / np.pi * np.arccos(0.2 / np.pi), rtol=1e-7)


def test_resolution_shift():
    assert gaussian_schedules.resolution_shift(128, 64) == pytest.approx(-np.log(4))
    base = gaussian_schedules.truncated(gaussian_schedules.cosine(), -15.0, 15.0)
    shifts = [gaussian_schedules.resolution_shift(512, size) for size in (256, 32)]
    law = gaussian_schedules.interpolated(base, *shifts)
    np.testing.assert_allclose(law.support, (-20.5451774445, 13.6137056389), rtol=1e-6)


def test_parameters_may_be_traced():
    def level(mean, ratio, scale):
        law = gaussian_schedules.truncated(gaussian_schedules.lognormal(mean, 1.0), -5.0, 5.0)
        return law.icdf(0.3) + gaussian_schedules.flow_shifted(ratio).icdf(0.3) + mode(scale)

    def mode(scale):
        """The time of a level, found by bisection: its gradient is that of the Newton step."""
        return gaussian_schedules.time_at(gaussian_schedules.sd3_mode(scale), 1.0)

    grads = jax.jit(jax.grad(level, argnums=(0, 1, 2)))(0.1, 2.0, 0.5)
    assert all(np.isfinite(g) for g in grads)
    np.testing.assert_allclose(grads[1], -1.0, rtol=1e-5)  # -2 / ratio
    with jax.enable_x64(True):
        run = tiny.jit(mode)
        want = (run(0.501) - run(0.499)) / 0.002
    np.testing.assert_allclose(grads[2], want, rtol=1e-3)


def test_names():
    assert gaussian_schedules.by_name("edm_rho", rho=3.0) == gaussian_schedules.edm_rho(rho=3.0)
    with pytest.raises(ValueError, match="did you mean flow or"):
        gaussian_schedules.by_name("flows")
    with pytest.raises(TypeError, match="rho"):
        gaussian_schedules.by_name("cosine", rho=1.0)


def test_a_name_of_the_other_world_is_refused():
    """And the answer says where it lives."""
    for name in set(gaussian_schedules.GAUSSIAN_SCHEDULES) - set(masked.MASKED_SCHEDULES):
        with pytest.raises(ValueError, match=rf"a Gaussian schedule, schedules\.gaussian\.{name};"):
            masked.by_name(name)
    for name in set(masked.MASKED_SCHEDULES) - set(gaussian_schedules.GAUSSIAN_SCHEDULES):
        with pytest.raises(ValueError, match=rf"a masked schedule, schedules\.masked\.{name};"):
            gaussian_schedules.by_name(name)
    assert "a masked schedule" not in str(
        pytest.raises(ValueError, gaussian_schedules.by_name, "x").value
    )


def test_a_shared_name_is_one_law():
    (name,) = set(masked.MASKED_SCHEDULES) & set(gaussian_schedules.GAUSSIAN_SCHEDULES)
    ends = {"low": -4.0, "high": 3.0}
    with jax.enable_x64(True):
        law = schedules.law_of(masked.by_name(name, **ends))
        assert_same_law(gaussian_schedules.by_name(name, **ends), law)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian_schedules.ddpm_linear(2.0, 1.0), "beta_start <= beta_end"),
        (lambda: gaussian_schedules.ou_time(0.0), "max_time > 0"),
        (lambda: gaussian_schedules.cosine_offset(0.0), "offset > 0"),
        (lambda: gaussian_schedules.cosine_iddpm(-0.1), "offset >= 0"),
        (lambda: gaussian_schedules.cosine_power(1.0), "start < 1"),
        (lambda: gaussian_schedules.cosine_power(power=0.0), "power > 0"),
        (lambda: gaussian_schedules.chen_sigmoid(3.0, -3.0), "low < high"),
        (lambda: gaussian_schedules.chen_sigmoid(temperature=0.0), "temperature > 0"),
        (lambda: gaussian_schedules.lognormal(0.0, 0.0), "std > 0"),
        (lambda: gaussian_schedules.lognormal(float("nan"), 1.0), "finite mean"),
        (lambda: gaussian_schedules.edm_sigma(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: gaussian_schedules.edm_rho(0.0, 1.0), "0 < sigma_min"),
        (lambda: gaussian_schedules.edm_rho(rho=-1.0), "rho > 0"),
        (lambda: gaussian_schedules.flow_shifted(0.0), "ratio > 0"),
        (lambda: gaussian_schedules.sd3_mode(1.76), "1.7519"),
        (
            lambda: gaussian_schedules.shifted(gaussian_schedules.flow(), float("inf")),
            "finite shift",
        ),
        (
            lambda: gaussian_schedules.interpolated(gaussian_schedules.flow(), -1.0, 1.0),
            "noisy_shift <= clean_shift",
        ),
        (lambda: gaussian_schedules.resolution_shift(0, 64), "positive"),
        (lambda: gaussian_schedules.zero_terminal(gaussian_schedules.flow()), "-inf by itself"),
        (lambda: gaussian_schedules.beta_time(gaussian_schedules.flow(), 0.0, 1.0), "alpha > 0"),
        (lambda: gaussian_schedules.two_rates(gaussian_schedules.flow(), 1.0), "boundary < 1"),
        (lambda: gaussian_schedules.speed(gaussian_schedules.cosine(), 10.0), "always below"),
        (lambda: gaussian_schedules.ddpm_table(1), "num_steps >= 2"),
        (lambda: gaussian_schedules.ddpm_table(10, 0.0), "number 1 is 0.0"),
        (lambda: gaussian_schedules.iddpm_cosine_table(offset=-1.0), "offset >= 0"),
        (lambda: gaussian_schedules.interpolated_table([1.0, 2.0]), "fall strictly"),
        (
            lambda: gaussian_schedules.interpolated_table(
                gaussian_schedules.zero_terminal_table([2.0, 1.0])
            ),
            "finite logSNR",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types_are_refused():
    for modify in (
        lambda law: gaussian_schedules.shifted(law, 1.0),
        gaussian_schedules.zero_terminal,
        gaussian_schedules.speed,
        lambda law: gaussian_schedules.beta_time(law, 1.0, 1.0),
    ):
        with pytest.raises(TypeError, match="TwoSidedLaw"):
            modify(masked.linear())
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(gaussian_schedules.interpolated_table)(jnp.array([2.0, 1.0]))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(
            lambda ratio: gaussian_schedules.speed(gaussian_schedules.flow_shifted(ratio)).icdf(0.5)
        )(2.0)
