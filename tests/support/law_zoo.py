"""Every law over the logSNR, by name: basic ones, masked schedules, Gaussian schedules."""

import functools

import jax
import numpy as np
import pytest

from mdm_jax import schedules
from mdm_jax.gaussian import schedules as gaussian
from mdm_jax.schedules import masked

SIZE = 4096  # of every array, so that interpreted operations compile once for all laws
MASSES = np.array([0.02, 0.05, 0.1, 0.22, 0.61])
MASKED = {  # settings of every masked schedule
    "linear": {},
    "loglinear": {"eps": 1e-3},
    "clipped": {"low": 0.3, "high": 0.8},
    "cosine_md4": {},
    "cosine_mdlm": {},
    "cosine_squared": {},
    "power": {"exponent": 2.0},
    "sqrt": {},
    "log": {},
    "geometric": {"sigma_min": 1e-3, "sigma_max": 20.0},
    "linear_sigma": {"sigma_min": 1e-3, "sigma_max": 7.0},
    "log_uniform": {"low": 1e-3, "high": 1.0},
    "uniform_logsnr": {"low": -5.0, "high": 5.0},
    "logit_normal": {"center": 0.6, "width": 0.8},
    "beta": {"center": 0.6, "width": 0.2},
}
GAUSSIAN = dict.fromkeys(gaussian.GAUSSIAN_SCHEDULES, {}) | {  # those without defaults
    "cosine_interpolated": {"size": 512},
    "cosine_power": {"start": 0.2, "power": 2.0},
    "cosine_shifted": {"size": 128},
    "ddpm_discrete": {"num_steps": 7, "beta_start": 0.01, "beta_end": 0.5},
    "flow_shifted": {"ratio": 3.0},
    "iddpm_discrete": {"num_steps": 7},
    "lognormal": {"mean": 0.3, "std": 0.7},
    "wavegrad": {"num_steps": 6, "beta_start": 0.01, "beta_end": 0.5},
}
truncated = gaussian.truncated
# Factories, so that a law is built in the precision of the test.
LAWS = {
    "logistic": schedules.logistic,
    "logistic_shifted": lambda: schedules.logistic(-1.5, 0.7),
    "uniform": lambda: schedules.uniform(-6.0, 4.0),
    "piecewise": lambda: schedules.piecewise(MASSES, (-5.0, 5.0)),
    "piecewise_edges": lambda: schedules.piecewise([1.0, 0.0, 3.0, 1e-6], [-7.0, -2, 0, 0.5, 9]),
    "tabulated": lambda: schedules.tabulated(lambda t: np.sin(np.pi / 2 * t) ** 2),
    "tabulated_bounded": lambda: schedules.tabulated(lambda t: 0.1 + 0.7 * t**1.5),
    "truncated_logistic": lambda: truncated(schedules.logistic(), -8.0, 6.9),
    "truncated_one_side": lambda: truncated(schedules.logistic(), high=6.9),
    "truncated_tail": lambda: truncated(schedules.logistic(), 10.0, 14.0),
    "truncated_twice": lambda: truncated(truncated(schedules.logistic(), -8.0, 6.0), -3.0, 9.0),
    "truncated_schedule": lambda: truncated(masked.cosine_mdlm(), -15.0, 15.0),
    "truncated_piecewise": lambda: truncated(LAWS["piecewise"](), -4.0, 4.5),
    "masked_power_steep": lambda: masked.power(8.0),
    "masked_linear_sigma_from_zero": lambda: masked.linear_sigma(0.0, 7.0),
    "cosine_power_flat": lambda: gaussian.cosine_power(0.0, 0.5),
    "sd3_mode_negative": lambda: gaussian.sd3_mode(-1.0),
    "shifted": lambda: gaussian.shifted(gaussian.flow(), 1.0),
    "interpolated_truncated": lambda: gaussian.interpolated(
        truncated(gaussian.cosine(), -15.0, 15.0), -1.4, -5.5
    ),
    "zero_terminal": lambda: gaussian.zero_terminal(gaussian.ddpm_linear()),
    "beta_time": lambda: gaussian.beta_time(gaussian.cosine(), 0.8, 1.0),
    "two_rates": lambda: gaussian.two_rates(gaussian.ddpm_linear(), 0.7),
}
LAWS |= {f"masked_{n}": functools.partial(masked.by_name, n, **s) for n, s in MASKED.items()}
LAWS |= {n: functools.partial(gaussian.by_name, n, **s) for n, s in GAUSSIAN.items()}
# The same code as another law, with other numbers.
SIBLINGS = {
    *("logistic_shifted", "masked_linear", "masked_linear_sigma_from_zero", "masked_sqrt"),
    *("masked_loglinear", "masked_power_steep", "tabulated_bounded", "truncated_one_side"),
    *("piecewise_edges", "truncated_logistic", "cosine_iddpm", "cosine_power_flat"),
    *("edm2_lognormal", "edm_lognormal", "edm_sigma", "flow_shifted", "iddpm_discrete", "indi"),
    *("interpolated_truncated", "ou_time", "santos_lin_fisher", "sd3_cosmap", "sd3_logit_normal"),
    *("sd3_mode_negative", "truncated_piecewise", "truncated_schedule", "variance_linear"),
    *("ve_geometric",),
}


def laws(select):
    """Parametrises over all laws; those not selected are slow tests."""
    marks = {name: () if select(name) else pytest.mark.slow for name in sorted(LAWS)}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


# Inverting the incomplete beta function takes long to compile; it has a test against scipy.
every_law = laws(lambda name: name not in SIBLINGS | {"beta_time", "masked_beta"})


@functools.cache
def law_in(name, bits):
    with jax.enable_x64(bits == 64):
        return LAWS[name]()
