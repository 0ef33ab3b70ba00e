"""Gaussian schedules: known values, identities between them, names and bad arguments.

What each must satisfy as a law is in tests/laws/test_schedules_zoo.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
import tiny
from gaussian_values import LOGSNR, RATES, TIMES
from law_zoo import LAWS, SIZE, law_in, laws
from scipy.special import expit

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian
from mdm_jax.schedules import masked

pytestmark = pytest.mark.keyless

U = np.concatenate([[2.0**-24], np.linspace(0.01, 0.99, 25), [1 - 2.0**-24]])
OTHERS = {
    "ddpm_discrete": gaussian.ddpm_discrete,
    "edm_sigma_unit": lambda: gaussian.edm_sigma(0.0, 1.0),
    "cosine_truncated": lambda: gaussian.truncated(gaussian.cosine(), -15.0, 15.0),
}


@pytest.mark.parametrize("name", sorted(set(LOGSNR) - {"zero_terminal", "zero_terminal_table"}))
def test_known_levels_rates_and_densities(name):
    with jax.enable_x64(True):
        law = (OTHERS.get(name) or LAWS[name])()
        times = np.append(TIMES, np.full(SIZE - len(TIMES), 0.5))
        level = np.asarray(gaussian.logsnr_at(law, times))
        log_pdf = law.log_pdf(np.array([-4.0, 0.0, 4.0, *level[2:-1]]))
        level = level[: len(TIMES)]
    np.testing.assert_allclose(level, LOGSNR[name], rtol=0, atol=1e-10)
    if name in RATES:
        rate, *density = RATES[name]
        np.testing.assert_allclose(-np.exp(-log_pdf[3]), rate, rtol=0, atol=1e-10)
        np.testing.assert_allclose(np.exp(log_pdf[:3]), density, rtol=0, atol=1e-12)


def test_rate_of_a_schedule():
    rate = gaussian.logsnr_rate(gaussian.flow(), gaussian.logsnr_at(gaussian.flow(), 0.25))
    np.testing.assert_allclose(-rate, RATES["flow"][0], rtol=1e-5)
    assert set(RATES) <= set(LOGSNR)


def test_zero_terminal_levels():
    """The continuous one keeps the level of t = 1e-3; its own time begins there."""
    with jax.enable_x64(True):
        base = gaussian.ddpm_linear()
        late = gaussian.truncated(base, high=float(gaussian.logsnr_at(base, 1e-3)))
        time = (np.array(TIMES) - 1e-3) / (1 - 1e-3)
        got = gaussian.logsnr_at(gaussian.zero_terminal(late), time)
        np.testing.assert_allclose(got, LOGSNR["zero_terminal"], rtol=0, atol=1e-10)
        # with 1 at the clean end, alpha' = (alpha - alpha_T) / (1 - alpha_T)
        law, level = gaussian.zero_terminal(base), gaussian.logsnr_at(base, 0.5)
        alpha = np.sqrt(scipy.special.expit(np.array([level, base.support[0]])))
        square = ((alpha[0] - alpha[1]) / (1 - alpha[1])) ** 2
        got = gaussian.logsnr_at(law, 0.5)
        np.testing.assert_allclose(got, scipy.special.logit(square), rtol=1e-12)
    table = gaussian.zero_terminal_table(gaussian.ddpm_table())
    steps = np.round(1000 * np.array(TIMES)).astype(int) - 1
    np.testing.assert_allclose(table[steps], LOGSNR["zero_terminal_table"], rtol=0, atol=1e-10)
    np.testing.assert_allclose(table[[0, 998]], [9.2102403670, -19.2850285528], atol=1e-10)
    assert table[-1] == -np.inf


@pytest.mark.parametrize(
    ("law", "low", "high"),
    [
        (gaussian.ddpm_linear, -10.04995681, np.inf),
        (gaussian.cosine_offset, -np.inf, 8.7692947882),
        (gaussian.edm_rho, -8.7640532694, 12.4292161969),
        (LAWS["interpolated_truncated"], -20.5, 13.6),
        (
            lambda: gaussian.shifted(gaussian.uniform_logsnr(-1.0, 2.0), -3.0),
            -4.0,
            -1.0,
        ),
    ],
)
def test_supports(law, low, high):
    with jax.enable_x64(True):
        np.testing.assert_allclose(law().support, (low, high), rtol=0, atol=1e-8)


def test_tables():
    np.testing.assert_allclose(
        gaussian.ddpm_table()[[0, -1]], [9.2102403670, -10.1176731833], atol=1e-10
    )
    cosine = gaussian.iddpm_cosine_table()
    np.testing.assert_allclose(
        cosine[[0, 998, 999]], [10.0949888115, -12.9281244463, -19.8358821516], atol=1e-10
    )
    # The clip is active in the last step only: the others are the continuous curve.
    with jax.enable_x64(True):
        exact = gaussian.logsnr_at(gaussian.cosine_iddpm(), np.arange(1, 1000) / 1000)
    np.testing.assert_allclose(cosine[:-1], exact, rtol=1e-9)
    np.testing.assert_allclose(
        gaussian.ddpm_table(3, 0.1, 0.3)[-1],
        scipy.special.logit(0.9 * 0.8 * 0.7),
        rtol=1e-12,
    )


@pytest.mark.slow
def test_a_table_is_met_at_its_steps():
    with jax.enable_x64(True):
        for law, table in (
            (gaussian.ddpm_discrete(), gaussian.ddpm_table()),
            (gaussian.iddpm_discrete(), gaussian.iddpm_cosine_table()),
            (gaussian.wavegrad(), gaussian.ddpm_table(1000, 1e-6, 0.01)),
        ):
            steps = np.arange(1, 1001)
            got = gaussian.logsnr_at(law, steps / 1000, (1000 - steps) / 1000)
            np.testing.assert_allclose(got, table, rtol=1e-9)


def test_noisy_end_in_time():
    """With 1 - t given, float32 keeps the level; from t alone it cannot."""
    law, rest = gaussian.cosine(), np.float32(2.0**-22)
    exact = 2 * np.log(np.tan(np.pi / 2 * 2.0**-22))
    np.testing.assert_allclose(gaussian.logsnr_at(law, 1 - rest, rest), exact, rtol=1e-6)
    rest = np.float32(0.3 * 2.0**-22)
    held = gaussian.logsnr_at(law, np.float32(1) - rest, rest)
    assert abs(held - gaussian.logsnr_at(law, np.float32(1) - rest)) > 0.1


@laws(("cosine", "uniform_logsnr").__contains__)
def test_truncation(name):
    """Between the 20 % and the 90 % quantile of any schedule."""
    with jax.enable_x64(True):
        law = law_in(name, 64)
        low, high = law.icdf(np.array([0.2, 0.9]))
        cut, u = gaussian.truncated(law, float(low), float(high)), np.linspace(0.05, 0.95, 7)
        level = cut.icdf(u)
        np.testing.assert_allclose(level, law.icdf(0.2 + 0.7 * u), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(cut.log_pdf(level), law.log_pdf(level) - np.log(0.7), atol=1e-9)
        np.testing.assert_allclose(cut.cdf(level), u, rtol=1e-9)
        ends = cut.log_pdf(np.array([low - 0.01, high + 0.01]))
        np.testing.assert_array_equal(ends, -np.inf)


def assert_same_law(one, other, rtol=1e-10):
    level = one.icdf(U)
    np.testing.assert_allclose(other.icdf(U), level, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.log_pdf(level), one.log_pdf(level), rtol=rtol, atol=rtol)
    np.testing.assert_allclose(other.cdf(level), one.cdf(level), rtol=rtol, atol=rtol)


@pytest.mark.slow
def test_identities():
    with jax.enable_x64(True):
        g = gaussian
        assert_same_law(g.sd3_cosmap(), g.cosine())
        assert_same_law(g.sd3_logit_normal(0.4, 1.3), g.lognormal(0.4, 1.3))
        assert_same_law(g.ve_geometric(), g.uniform_logsnr(-2 * np.log(50.0), -2 * np.log(0.01)))
        assert_same_law(g.flow_shifted(3.0), g.shifted(g.flow(), -2 * np.log(3.0)))
        assert_same_law(g.edm_rho(0.01, 50.0, 1.0), g.edm_sigma(0.01, 50.0))
        assert_same_law(g.edm_rho(0.01, 50.0, 1e3), g.ve_geometric(), rtol=2e-2)
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
    base = gaussian.cosine()

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
    law = gaussian.santos_lin_fisher()

    def length(logsnr):
        """From time 0, in s = sqrt(tau), where sqrt(SNR) dtau is smooth."""
        end = np.sqrt(np.logaddexp(0, -logsnr) / 2)
        return scipy.integrate.quad(lambda s: 2 * s / np.sqrt(np.expm1(2 * s * s)), 0, end)[0]

    with jax.enable_x64(True):
        for level in (6.0, 1.0, -2.0, -7.0):
            np.testing.assert_allclose(
                length(level) / (np.pi / 2), gaussian.time_at(law, level), rtol=1e-9
            )


def test_chen_families():
    """Against the formulas for the kept power, which lose their digits at the ends."""
    with jax.enable_x64(True):
        t = np.linspace(0.05, 0.95, 19)
        sigmoid = lambda x: expit(x / 0.7)  # noqa: E731
        want = (sigmoid(2.0) - sigmoid(-1.0 + 3.0 * t)) / (sigmoid(2.0) - sigmoid(-1.0))
        got = gaussian.logsnr_at(gaussian.chen_sigmoid(-1.0, 2.0, 0.7), t)
        np.testing.assert_allclose(expit(got), want, rtol=1e-12)
        angle = np.pi / 2 * (0.2 + 0.8 * t)
        want = (np.cos(angle) / np.cos(np.pi / 2 * 0.2)) ** 4
        got = gaussian.logsnr_at(gaussian.cosine_power(0.2, 2.0), t)
        np.testing.assert_allclose(expit(got), want, rtol=1e-12)


@pytest.mark.slow
def test_wavegrad_density():
    """A mixture of uniform laws of alpha, one per segment of the table."""
    alpha = np.append(1, np.cumprod(np.sqrt(1 - np.linspace(0.01, 0.5, 6))))
    level = np.array([-0.9, 0.3, 2.0, 5.5])
    kept = expit(level)
    slope = np.sqrt(kept) * (1 - kept) / 2
    with jax.enable_x64(True):
        law = gaussian.wavegrad(6, 0.01, 0.5)
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
        base = gaussian.cosine()
        law = gaussian.beta_time(base, alpha, beta)
        level = tiny.jit(law.icdf)(U)

        @tiny.jit
        def read(level):
            log_pdf = law.log_pdf(level), base.log_pdf(level)
            return gaussian.time_at(base, level), law.cdf(level), *log_pdf

        found, below, log_pdf, of_base = (np.asarray(a) for a in read(level))
        np.testing.assert_allclose(found, time.isf(U), rtol=1e-8)
        np.testing.assert_allclose(below, U, rtol=1e-8)
        want = time.logpdf(found[1:-1]) + of_base[1:-1]
        np.testing.assert_allclose(log_pdf[1:-1], want, rtol=1e-9)
    single = gaussian.beta_time(gaussian.cosine(), alpha, beta)
    found = tiny.jit(single.icdf)(U.astype(np.float32))
    np.testing.assert_allclose(found, level, rtol=2e-5, atol=2e-5)


def test_speed():
    """The boundary is that of the public code on the table of 1000; before it 5 times the rate."""
    alpha = expit(gaussian.ddpm_table())
    boundary = np.argmax(np.gradient(np.sqrt(1 - alpha)) < 1e-4) / 1000
    with jax.enable_x64(True):
        base = gaussian.ddpm_linear()
        law = gaussian.speed(base)
        np.testing.assert_allclose(law.boundary, boundary, atol=2e-3)
        time = np.array([0.1, 0.5, 0.95])
        assert time[1] < law.boundary < time[2]

        @tiny.jit
        def log_change(time):
            level = gaussian.logsnr_at(base, time)
            return law.log_pdf(level) - base.log_pdf(level)

        change = np.exp(log_change(time))
        np.testing.assert_allclose(change[0] / change[1:], [1, 5], rtol=1e-10)
        mass = change[0] * law.boundary + change[2] * (1 - law.boundary)
        np.testing.assert_allclose(mass, 1, rtol=1e-10)
        # cosine: d sin(pi t / 2) / dt = 0.1
        got = gaussian.speed(gaussian.cosine()).boundary
        np.testing.assert_allclose(got, 2 / np.pi * np.arccos(0.2 / np.pi), rtol=1e-7)


def test_resolution_shift():
    assert gaussian.resolution_shift(128, 64) == pytest.approx(-np.log(4))
    base = gaussian.truncated(gaussian.cosine(), -15.0, 15.0)
    shifts = [gaussian.resolution_shift(512, size) for size in (256, 32)]
    law = gaussian.interpolated(base, *shifts)
    np.testing.assert_allclose(law.support, (-20.5451774445, 13.6137056389), rtol=1e-6)


def test_parameters_may_be_traced():
    def level(mean, ratio, scale):
        law = gaussian.truncated(gaussian.lognormal(mean, 1.0), -5.0, 5.0)
        return law.icdf(0.3) + gaussian.flow_shifted(ratio).icdf(0.3) + mode(scale)

    def mode(scale):
        """The time of a level, found by bisection: its gradient is that of the Newton step."""
        return gaussian.time_at(gaussian.sd3_mode(scale), 1.0)

    grads = jax.jit(jax.grad(level, argnums=(0, 1, 2)))(0.1, 2.0, 0.5)
    assert all(np.isfinite(g) for g in grads)
    np.testing.assert_allclose(grads[1], -1.0, rtol=1e-5)  # -2 / ratio
    with jax.enable_x64(True):
        run = tiny.jit(mode)
        want = (run(0.501) - run(0.499)) / 0.002
    np.testing.assert_allclose(grads[2], want, rtol=1e-3)


def test_names():
    assert gaussian.by_name("edm_rho", rho=3.0) == gaussian.edm_rho(rho=3.0)
    with pytest.raises(ValueError, match="did you mean 'flow' or"):
        gaussian.by_name("flows")
    with pytest.raises(TypeError, match="rho"):
        gaussian.by_name("cosine", rho=1.0)


def test_a_name_of_the_other_world_is_refused():
    """And the answer says where it lives."""
    for name in set(masked.MASKED_SCHEDULES) - set(gaussian.GAUSSIAN_SCHEDULES):
        with pytest.raises(ValueError, match=rf"a masked schedule, schedules\.masked\.{name};"):
            gaussian.by_name(name)
    assert "a masked schedule" not in str(pytest.raises(ValueError, gaussian.by_name, "x").value)


def test_a_shared_name_is_one_law():
    (name,) = set(masked.MASKED_SCHEDULES) & set(gaussian.GAUSSIAN_SCHEDULES)
    ends = {"low": -4.0, "high": 3.0}
    with jax.enable_x64(True):
        law = schedules.law_of(masked.by_name(name, **ends))
        assert_same_law(gaussian.by_name(name, **ends), law)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian.ddpm_linear(2.0, 1.0), "beta_start <= beta_end"),
        (lambda: gaussian.chen_sigmoid(3.0, -3.0), "start < end"),
        (lambda: gaussian.edm_sigma(2.0, 1.0), "sigma_min < sigma_max"),
        (
            lambda: gaussian.shifted(gaussian.flow(), float("inf")),
            "shift must be",
        ),
        (
            lambda: gaussian.interpolated(gaussian.flow(), -1.0, 1.0),
            "noisy_shift <= clean_shift",
        ),
        (lambda: gaussian.zero_terminal(gaussian.flow()), "-inf by itself"),
        (lambda: gaussian.beta_time(gaussian.flow(), 0.0, 1.0), "alpha must be"),
        (lambda: gaussian.two_rates(gaussian.flow(), 1.0), "boundary must be"),
        (lambda: gaussian.speed(gaussian.cosine(), 10.0), "always below"),
        (lambda: gaussian.interpolated_table([1.0, 2.0]), "fall strictly"),
        (
            lambda: gaussian.interpolated_table(gaussian.zero_terminal_table([2.0, 1.0])),
            "finite logSNR",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types_are_refused():
    for modify in (
        lambda law: gaussian.shifted(law, 1.0),
        gaussian.zero_terminal,
        gaussian.speed,
        lambda law: gaussian.beta_time(law, 1.0, 1.0),
    ):
        with pytest.raises(TypeError, match="TwoSidedLaw"):
            modify(lambda t: t)
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(gaussian.interpolated_table)(jnp.array([2.0, 1.0]))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda ratio: gaussian.speed(gaussian.flow_shifted(ratio)).icdf(0.5))(2.0)
