"""Which laws and chains give weights 1/m a finite variance, by the exponents of their densities."""

import numpy as np
import pytest
import toy_oracle as oracle

from mdm_jax import corruption, objectives, schedules, variance
from mdm_jax.meter.efficiency import inverse_rates_diverge
from mdm_jax.schedules import masked
from mdm_jax.testing import toys

pytestmark = pytest.mark.keyless

LINEAR, POWER = masked.linear(), masked.power(2.0)
CASES = {  # schedule, chain, whether int q w^2 / (m p) dm is infinite
    "uniform rates": (LINEAR, variance.identity(), True),
    "cosine of MD4, linear at 0": (masked.cosine_md4(), variance.identity(), True),
    "density m": (masked.sqrt(), variance.identity(), True),
    "density m^-1/2": (POWER, variance.identity(), False),
    "density m^-1/11": (masked.power(1.1), variance.identity(), False),
    "squared cosine": (masked.cosine_squared(), variance.identity(), False),
    "cosine of MDLM": (masked.cosine_mdlm(), variance.identity(), False),
    "bounded law": (masked.clipped(1e-3, 1.0), variance.identity(), False),
    "bounded chain": (LINEAR, variance.clipped(0.3, 0.8), False),
    "chain bounded above alone": (LINEAR, variance.clipped(0.0, 0.8), True),
    "mixture": (LINEAR, variance.clipped_mixture(0.3, 0.8), True),
    "flat foot": (LINEAR, variance.log_uniform(), True),
    "bins": (LINEAR, variance.chain(variance.stratified(), variance.ppots()), True),
    "bins over a density m^-1/2": (POWER, variance.ppots(), False),
    "unpaid": (LINEAR, variance.cdcd_warp(8), True),
}


@pytest.mark.parametrize("name", CASES)
def test_divergence_is_told_by_law_and_chain(name):
    schedule, chain, expected = CASES[name]
    process = corruption.bernoulli(toys.MASK_ID)
    objective = objectives.masked_nelbo(process, schedules.law_of(schedule))
    spec = objective.spec(2, 4)
    assert inverse_rates_diverge(objective, chain, chain.init(spec), spec) == expected
    other = objective._replace(bias="biased")  # of a weighting that is not known here
    assert not inverse_rates_diverge(other, chain, chain.init(spec), spec)


def test_the_second_moment_grows_by_a_constant_per_decade_or_not_at_all():
    """The toy's ``int s / p`` over decades of the rate, exact s, with p = 1 and p = m^-1/2 / 2."""

    def decade(end, density):
        m, dm = oracle.gauss(np.geomspace(end / 10, end, 9), 6)
        return dm @ (oracle.s(m) / density(m))

    flat = [decade(10.0**-d, lambda m: np.ones_like(m)) for d in (4, 5, 6)]
    steep = [decade(10.0**-d, lambda m: 0.5 / np.sqrt(m)) for d in (4, 5, 6)]
    np.testing.assert_allclose(np.divide(flat[1:], flat[:-1]), 1.0, rtol=1e-2)
    np.testing.assert_allclose(np.divide(steep[1:], steep[:-1]), 10**-0.5, rtol=1e-2)
