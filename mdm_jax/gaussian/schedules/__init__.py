"""Gaussian schedules of the literature by name; each is a law over the logSNR.

Many are one law: ``sd3_cosmap`` is ``cosine``, ``sd3_logit_normal`` is ``lognormal``. A name is
shared with a masked schedule only if the law is the same.
"""

from collections.abc import Callable

from mdm_jax.checks import unknown_name
from mdm_jax.gaussian.schedules.laws import (
    amplitude_linear,
    chen_sigmoid,
    cosine,
    cosine_iddpm,
    cosine_offset,
    cosine_power,
    ddpm_linear,
    edm2_lognormal,
    edm_lognormal,
    edm_rho,
    edm_sigma,
    flow,
    flow_shifted,
    indi,
    lognormal,
    ou_time,
    santos_lin_fisher,
    sd3_cosmap,
    sd3_logit_normal,
    sd3_mode,
    uniform_logsnr,
    variance_linear,
    ve_geometric,
)
from mdm_jax.gaussian.schedules.modifiers import (
    beta_time,
    cosine_interpolated,
    cosine_shifted,
    interpolated,
    resolution_shift,
    shifted,
    speed,
    truncated,
    two_rates,
    zero_terminal,
)
from mdm_jax.gaussian.schedules.tables import (
    ddpm_discrete,
    ddpm_table,
    iddpm_cosine_table,
    iddpm_discrete,
    interpolated_table,
    table_from_betas,
    wavegrad,
    zero_terminal_table,
)
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.schedules.masked import MASKED_SCHEDULES
from mdm_jax.schedules.times import logsnr_at, logsnr_rate, time_at
from mdm_jax.types import ArrayLike

GAUSSIAN_SCHEDULES: dict[str, Callable[..., TwoSidedLaw]] = {
    factory.__name__: factory
    for factory in (
        *(amplitude_linear, chen_sigmoid, cosine, cosine_iddpm, cosine_interpolated),
        *(cosine_offset, cosine_power, cosine_shifted, ddpm_discrete, ddpm_linear),
        *(edm2_lognormal, edm_lognormal, edm_rho, edm_sigma, flow, flow_shifted, iddpm_discrete),
        *(indi, lognormal, ou_time, santos_lin_fisher, sd3_cosmap, sd3_logit_normal, sd3_mode),
        *(uniform_logsnr, variance_linear, ve_geometric, wavegrad),
    )
}
"""Name -> factory of a law, for configurations."""

MODIFIERS: dict[str, Callable[..., TwoSidedLaw]] = {
    factory.__name__: factory
    for factory in (beta_time, interpolated, shifted, speed, truncated, two_rates, zero_terminal)
}
"""Name -> ``modify(base, **parameters)``, laws derived from a base law."""


def by_name(name: str, **settings: ArrayLike) -> TwoSidedLaw:
    """The named schedule; ValueError for unknown names, TypeError for unknown parameters."""
    if name not in GAUSSIAN_SCHEDULES:
        masked = {key: f"a masked schedule, schedules.masked.{key}" for key in MASKED_SCHEDULES}
        raise unknown_name(name, GAUSSIAN_SCHEDULES, "Gaussian schedule", masked)
    return GAUSSIAN_SCHEDULES[name](**settings)
