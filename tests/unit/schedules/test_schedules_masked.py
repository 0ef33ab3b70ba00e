"""Masked schedules by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from law_zoo import MASKED, SIZE
from variants import slow_except

from mdm_jax import corruption, objectives, schedules
from mdm_jax.schedules import masked

pytestmark = pytest.mark.keyless

PI = np.pi
TIMES = np.array([0.25, 0.5, 0.75])
# The ends of the draw grid; at the first one even 1 - t rounds to 1 in float32.
EXTREMES = np.array([2.0**-30, 2.0**-24, 1 - 2.0**-23, 1 - 2.0**-24])
ALL_TIMES = np.concatenate([EXTREMES, np.linspace(0.01, 0.99, SIZE - 4)])
INNER = slice(4, None)  # where formulas that subtract from 1 keep their digits

BELLS = ["logit_normal", "beta"]
FULL_RANGE = [
    *("linear", "cosine_md4", "cosine_mdlm", "cosine_squared", "power", "sqrt", "log"),
    *BELLS,
]
# Inverting the incomplete beta function takes long to compile.
every_schedule = pytest.mark.parametrize("name", slow_except({*MASKED} - {"beta"}, sorted(MASKED)))
# Values and gradients in float32 are also those of the laws (tests/laws/test_schedules_zoo.py).
some_schedules = pytest.mark.parametrize(
    "name", slow_except({"clipped", "cosine_mdlm", "geometric", "power"}, sorted(MASKED))
)

LOC = np.log(1.5)
BETA = scipy.stats.beta(3, 2)  # of mean 0.6 and standard deviation 0.2

# m(t), m'/m, t(m), density of m: the textbook formulas, which lose their digits at the ends.
TEXTBOOK = {
    "linear": (lambda t: t, lambda t: 1 / t, lambda y: y, lambda y: 0 * y + 1),
    "loglinear": (
        lambda t: 0.999 * t,
        lambda t: 1 / t,
        lambda y: y / 0.999,
        lambda y: 0 * y + 1 / 0.999,
    ),
    "clipped": (
        lambda t: 0.3 + 0.5 * t,
        lambda t: 0.5 / (0.3 + 0.5 * t),
        lambda y: (y - 0.3) / 0.5,
        lambda y: 0 * y + 2,
    ),
    "cosine_md4": (
        lambda t: np.sin(PI * t / 2),
        lambda t: (PI / 2) / np.tan(PI * t / 2),
        lambda y: 2 / PI * np.arcsin(y),
        lambda y: 2 / (PI * np.sqrt(1 - y**2)),
    ),
    "cosine_mdlm": (
        lambda t: 1 - np.cos(PI * t / 2),
        lambda t: (PI / 2) * np.sin(PI * t / 2) / (1 - np.cos(PI * t / 2)),
        lambda y: 2 / PI * np.arccos(1 - y),
        lambda y: 2 / (PI * np.sqrt(y * (2 - y))),
    ),
    "cosine_squared": (
        lambda t: np.sin(PI * t / 2) ** 2,
        lambda t: PI / np.tan(PI * t / 2),
        lambda y: 2 / PI * np.arcsin(np.sqrt(y)),
        lambda y: 1 / (PI * np.sqrt(y * (1 - y))),
    ),
    "power": (lambda t: t**2, lambda t: 2 / t, np.sqrt, lambda y: 0.5 * y**-0.5),
    "sqrt": (np.sqrt, lambda t: 1 / (2 * t), lambda y: y**2, lambda y: 2 * y),
    "log": (
        lambda t: np.log2(1 + t),
        lambda t: 1 / ((1 + t) * np.log(1 + t)),
        lambda y: 2**y - 1,
        lambda y: np.log(2) * 2**y,
    ),
    "geometric": (
        lambda t: 1 - np.exp(-(1e-3 ** (1 - t)) * 20**t),
        lambda t: (1e-3 ** (1 - t) * 20**t) * np.log(2e4) / np.expm1(1e-3 ** (1 - t) * 20**t),
        lambda y: np.log(-np.log(1 - y) / 1e-3) / np.log(2e4),
        lambda y: 1 / ((1 - y) * -np.log(1 - y) * np.log(2e4)),
    ),
    "linear_sigma": (
        lambda t: 1 - np.exp(-(1e-3 + t * 6.999)),
        lambda t: 6.999 / np.expm1(1e-3 + t * 6.999),
        lambda y: (-np.log(1 - y) - 1e-3) / 6.999,
        lambda y: 1 / ((1 - y) * 6.999),
    ),
    "log_uniform": (
        lambda t: 1e-3 ** (1 - t),
        lambda t: 0 * t + np.log(1e3),
        lambda y: np.log(y / 1e-3) / np.log(1e3),
        lambda y: 1 / (y * np.log(1e3)),
    ),
    "logit_normal": (
        lambda t: scipy.special.expit(LOC + 0.8 * scipy.special.ndtri(t)),
        lambda t: (
            0.8
            * scipy.special.expit(-LOC - 0.8 * scipy.special.ndtri(t))
            / scipy.stats.norm.pdf(scipy.special.ndtri(t))
        ),
        lambda y: scipy.special.ndtr((scipy.special.logit(y) - LOC) / 0.8),
        lambda y: scipy.stats.norm.pdf((scipy.special.logit(y) - LOC) / 0.8) / (0.8 * y * (1 - y)),
    ),
    "beta": (
        BETA.ppf,
        lambda t: 1 / (BETA.ppf(t) * BETA.pdf(BETA.ppf(t))),
        BETA.cdf,
        BETA.pdf,
    ),
    "uniform_logsnr": (
        lambda t: 1 / (1 + np.exp(5 - 10 * t)),
        lambda t: 10 * (1 - 1 / (1 + np.exp(5 - 10 * t))),
        lambda y: (5 + np.log(y / (1 - y))) / 10,
        lambda y: 1 / (10 * y * (1 - y)),
    ),
}

# Rates and weights at t = 0.25, 0.5, 0.75.
GOLDEN = {
    "cosine_md4": ([0.38268343, 0.70710678, 0.92387953], [3.79223780, 1.57079633, 0.65064514]),
    "cosine_mdlm": ([0.07612047, 0.29289322, 0.61731657], [7.89692641, 3.79223780, 2.35086283]),
    "cosine_squared": ([0.14644661, 0.5, 0.85355339], [7.58447559, 3.14159265, 1.30129028]),
    "power": ([0.0625, 0.25, 0.5625], [8, 4, 2.66666667]),
    "sqrt": ([0.5, 0.70710678, 0.86602540], [2, 1, 0.66666667]),
    "log": ([0.32192809, 0.58496250, 0.80735492], [3.58513609, 1.64420231, 1.02110874]),
    "geometric": ([0.01182164, 0.13187655, 0.81395986], [9.84471778, 9.21970555, 3.80683735]),
    "clipped": ([0.425, 0.55, 0.675], [1.17647059, 0.90909091, 0.74074074]),
    "log_uniform": ([0.00562341, 0.03162278, 0.17782794], [6.90775528] * 3),
    "uniform_logsnr": ([0.07585818, 0.5, 0.92414182], [9.24141820, 5, 0.75858180]),
}


def elementwise_grad(function):
    return jax.grad(lambda x: jnp.sum(function(x)))


def build(name):
    return masked.by_name(name, **MASKED[name])


def test_every_public_schedule_has_a_textbook_formula():
    assert set(TEXTBOOK) == set(masked.MASKED_SCHEDULES)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_published_values(name):
    rate, weight = GOLDEN[name]
    with jax.enable_x64(True):
        schedule, t = build(name), np.arange(SIZE) / SIZE
        at = SIZE // 4 * np.arange(1, 4)
        np.testing.assert_allclose(schedule.masking_rate(t)[at], rate, rtol=0, atol=5.1e-9)
        np.testing.assert_allclose(schedule.weight(t)[at], weight, rtol=0, atol=5.1e-9)


def assert_inner_close(got, want, rtol, atol=0.0):
    np.testing.assert_allclose(np.asarray(got)[INNER], np.asarray(want)[INNER], rtol, atol)


@every_schedule
def test_textbook_formulas(name):
    rate, weight, time, density = TEXTBOOK[name]
    t = ALL_TIMES
    m = rate(t)
    with np.errstate(divide="ignore", invalid="ignore"):
        want_logsnr, want_weight, want_density = np.log((1 - m) / m), weight(t), density(m)
    with jax.enable_x64(True):
        schedule = build(name)
        tolerance = {"rtol": 1e-8, "atol": 1e-12}
        assert_inner_close(schedule.masking_rate(t), m, **tolerance)
        assert_inner_close(schedule.survival_probability(t), 1 - m, **tolerance)
        assert_inner_close(schedule.logsnr(t), want_logsnr, **tolerance)
        assert_inner_close(schedule.weight(t), want_weight, **tolerance)
        assert_inner_close(schedule.time(m), time(m), **tolerance)
        assert_inner_close(np.exp(schedule.log_pdf_rate(m)), want_density, **tolerance)


@some_schedules
def test_float32_agrees_with_float64(name):
    t = ALL_TIMES.astype(np.float32)
    exact = {}
    with jax.enable_x64(True):
        for method in ("masking_rate", "logsnr", "weight"):
            exact[method] = np.asarray(getattr(build(name), method)(t.astype(np.float64)))
    schedule = build(name)
    for method, values in exact.items():
        got = getattr(schedule, method)(t)
        assert got.dtype == jnp.float32
        # sigma of the two exponential schedules is itself rounded, at a relative cost of sigma.
        tolerance = {
            "rtol": 1e-5 if "sigma_min" in MASKED[name] else 2e-6,
            "atol": 1e-6 if method == "logsnr" else 0,  # it crosses zero
        }
        np.testing.assert_allclose(got, values, **tolerance)
    held = exact["masking_rate"].astype(np.float32)
    inner = (held > 1e-6) & (held < 0.9)
    np.testing.assert_allclose(schedule.time(held)[inner], t[inner], rtol=1e-4, atol=1e-6)


@every_schedule
def test_weight_is_one_over_rate_times_density(name):
    with jax.enable_x64(True):
        schedule = build(name)
        t = jnp.asarray(ALL_TIMES)
        rate = schedule.masking_rate(t)
        slope = elementwise_grad(schedule.masking_rate)(t)
        # The rate of the geometric schedule comes within 3e-8 of 1 here, and loses as many digits.
        weight = schedule.weight(t)
        assert_inner_close(weight, slope / rate, rtol=1e-8)
        assert_inner_close(weight * rate * np.exp(schedule.log_pdf_rate(rate)), 1 + 0 * t, 1e-8)
        assert_inner_close(schedule.time(rate), t, rtol=1e-8)
        assert np.all(slope > 0)


@every_schedule
def test_quantile_law_in_rate_and_logsnr(name):
    """cdf_lambda(l) = 1 - t(sigmoid(-l)) and its density, by change of variables."""
    u = ALL_TIMES
    with jax.enable_x64(True):
        schedule = build(name)
        law = schedules.law_of(schedule)
        level = law.icdf(u)
        rate = schedules.masking_rate(level)
        assert_inner_close(rate, schedule.masking_rate(1 - u), rtol=1e-10)
        assert_inner_close(law.cdf(level), 1 - schedule.time(rate), rtol=1e-7)
        density = np.exp(schedule.log_pdf_rate(rate)) * rate * (1 - rate)
        assert_inner_close(np.exp(law.log_pdf(level)), density, rtol=1e-7)


@some_schedules
def test_extreme_times_are_finite(name):
    schedule = build(name)
    t = jnp.asarray(ALL_TIMES, jnp.float32)
    for method in (schedule.masking_rate, schedule.logsnr, schedule.weight):
        assert np.all(np.isfinite(method(t))), method
        assert np.all(np.isfinite(elementwise_grad(method)(t))), method
    assert schedule.masking_rate(jnp.float32(EXTREMES[0])) >= 0
    assert schedule.weight(jnp.float32(EXTREMES[-1])) > 0


@every_schedule
def test_ends_and_lost_support(name):
    schedule = build(name)
    clean, noisy = schedule.lost_support
    rate, _, _, _ = TEXTBOOK[name]
    np.testing.assert_allclose(clean, rate(0.0), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(noisy, 1 - rate(1.0), rtol=1e-3, atol=1e-12)
    assert (float(clean) == 0 and float(noisy) == 0) == (name in FULL_RANGE)
    low, high = schedule.support
    assert low < high
    if name in FULL_RANGE:
        assert (low, high) == (-np.inf, np.inf)
        np.testing.assert_array_equal(schedule.masking_rate(jnp.array([0.0, 1.0])), [0, 1])
    np.testing.assert_allclose(schedule.time(jnp.array([0.0, 1.0])), [0, 1], atol=1e-5)
    assert np.all(schedule.log_pdf_rate(jnp.array([0.0, 1.0])) == -np.inf)
    assert np.all(elementwise_grad(schedule.log_pdf_rate)(jnp.array([0.0, 1.0])) == 0)


def test_lost_support_of_the_truncated_schedules():
    names = ("loglinear", "clipped", "log_uniform", "geometric", "uniform_logsnr")
    lost = {name: tuple(map(float, build(name).lost_support)) for name in names}
    np.testing.assert_allclose(lost["loglinear"], (0, 1e-3), rtol=1e-5)
    np.testing.assert_allclose(lost["clipped"], (0.3, 0.2), rtol=1e-6)
    np.testing.assert_allclose(lost["log_uniform"], (1e-3, 0), rtol=1e-5)
    np.testing.assert_allclose(lost["geometric"], (-np.expm1(-1e-3), np.exp(-20)), rtol=1e-5)
    np.testing.assert_allclose(lost["uniform_logsnr"], [1 / (1 + np.exp(5))] * 2, rtol=1e-5)


def test_rates_outside_the_range():
    schedule = masked.clipped(0.3, 0.8)
    outside = jnp.array([0.1, 0.29, 0.81, 0.95])
    assert np.all(schedule.log_pdf_rate(outside) == -np.inf)
    np.testing.assert_array_equal(schedule.time(outside), [0, 0, 1, 1])
    assert np.isfinite(schedule.log_pdf_rate(schedule.masking_rate(jnp.array([0.0, 1.0])))).all()
    assert np.all(np.isfinite(elementwise_grad(schedule.log_pdf_rate)(outside)))


def test_the_two_cosines_are_mirror_images():
    t = ALL_TIMES
    with jax.enable_x64(True):
        mirrored = -masked.cosine_md4().logsnr(1 - t, t)
        np.testing.assert_allclose(masked.cosine_mdlm().logsnr(t), mirrored, rtol=1e-13, atol=1e-15)
    t = t.astype(np.float32)
    mirrored = -masked.cosine_md4().logsnr(1 - t, t)
    np.testing.assert_array_equal(masked.cosine_mdlm().logsnr(t), mirrored)
    assert not np.allclose(masked.cosine_mdlm().logsnr(TIMES), masked.cosine_md4().logsnr(TIMES))


@every_schedule
def test_bound_does_not_depend_on_the_schedule(name):
    """int weight m gtilde dt = int_{m(0)}^{m(1)} gtilde dm, the whole bound for full ranges."""
    polynomial = np.polynomial.Polynomial([1.2, 0.3, -0.5, 0.7])
    with jax.enable_x64(True):
        schedule = build(name)
        # The trapezoid rule in the logit of t converges exponentially, singular ends included.
        v, step = np.linspace(-80, 80, SIZE, retstep=True)
        t, rest = jax.nn.sigmoid(v), jax.nn.sigmoid(-v)
        rate = schedule.masking_rate(t, rest)
        integrand = schedule.weight(t, rest) * rate * polynomial(np.asarray(rate)) * t * rest
        clean, noisy = map(float, schedule.lost_support)
        primitive = polynomial.integ()
        # Logit-normal rates below 6e-5 are drawn less often than e^-80 of the time.
        tolerance = {"rtol": 2e-4 if name == "logit_normal" else 1e-9}
        np.testing.assert_allclose(
            np.sum(integrand) * step, primitive(1 - noisy) - primitive(clean), **tolerance
        )
        if name in FULL_RANGE:
            np.testing.assert_allclose(np.sum(integrand) * step, primitive(1.0), **tolerance)


@pytest.mark.parametrize("name", ["logit_normal", "linear"])
def test_bells_are_truncated_by_the_grid_of_quantiles(name):
    """Outermost quantiles of a draw: rates from 0.021 to 0.990, whatever the support says."""
    low, high = (float(build(name).masking_rate(t)) for t in (2.0**-24, 1 - 2.0**-24))
    bell = name in BELLS
    assert (low > 0.02 and high < 0.991) == bell
    bound = objectives.masked_nelbo(corruption.fixed_count(3), build(name))
    assert bound.bias == ("truncated" if bell else "exact")


def everything(schedule, t):
    rate = schedule.masking_rate(t)
    methods = (schedule.survival_probability, schedule.logsnr, schedule.weight)
    return [rate, schedule.time(rate), schedule.log_pdf_rate(rate), *(f(t) for f in methods)]


mapped_and_compiled = jax.jit(jax.vmap(everything, in_axes=(None, 0)))


def test_jit_vmap_and_shapes():
    schedule = build("cosine_mdlm")
    t = jnp.asarray(ALL_TIMES, jnp.float32)
    cube = t[1:].reshape(5, 9, 91)
    select = (t[1:] > 0.005) & (t[1:] < 0.9)  # where a float32 rate pins down its time
    for got, want in zip(mapped_and_compiled(schedule, cube), everything(schedule, t)):
        assert got.shape == cube.shape
        np.testing.assert_allclose(got.ravel()[select], want[1:][select], rtol=1e-4, atol=1e-5)


def test_parameters_may_be_mapped_and_differentiated():
    lows, highs = jnp.array([0.0, 0.1]), jnp.array([0.5, 0.9])
    rates = jax.vmap(lambda a, b: masked.clipped(a, b).masking_rate(0.5))(lows, highs)
    np.testing.assert_allclose(rates, [0.25, 0.5])
    slope = jax.grad(lambda e: masked.power(e).logsnr(0.3))(2.0)
    np.testing.assert_allclose(slope, -np.log(0.3) / (1 - 0.09), rtol=1e-5)


def test_small_gap_at_the_noisy_end_keeps_its_digits():
    """1 - (1 - eps) would leave two digits of eps = 1e-6 in float32."""
    schedule = masked.loglinear(1e-6)
    compiled = jax.jit(lambda s: s.logsnr(1.0))(schedule)
    np.testing.assert_allclose(compiled, np.log(1e-6) - np.log1p(-1e-6), rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: masked.clipped(0.8, 0.3), "low < high"),
        (lambda: masked.linear_sigma(2.0, 1.0), "sigma_min < sigma_max"),
        (lambda: masked.uniform_logsnr(5.0, -5.0), "low < high"),
        (lambda: masked.power(jnp.ones(3)), "scalar"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_by_name():
    assert masked.by_name("power", exponent=3.0) == masked.Power(3.0)
    with pytest.raises(ValueError, match="cosine_md4") as error:
        masked.by_name("cosine")
    assert "cosine_mdlm" in str(error.value)
    with pytest.raises(ValueError, match="known: beta, clipped"):
        masked.by_name("zzz")
    with pytest.raises(TypeError, match="eps"):
        masked.by_name("linear", eps=1e-3)
    with pytest.raises(TypeError, match="number"):
        masked.by_name("power", exponent="2")
