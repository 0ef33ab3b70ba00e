"""The Gaussian schedules of the literature, by name.

A schedule here *is* a law of the logSNR, that of a uniform time, and can be trained on, truncated
or turned into a grid as it is; :mod:`~mdm_jax.schedules.gaussian_time` reads it as a function of
time. Many named curves are one law: ``sd3_cosmap`` is ``cosine``, ``sd3_logit_normal`` is EDM's
``lognormal``.

No name is shared with a masked schedule unless the law is the same. Two spellings to know:
``flow`` is the curve alpha = 1 - sigma that some call "sub-VP", and "cosine" alone is the curve
without offset.
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
    shifted,
    speed,
    truncated,
    two_rates,
    zero_terminal,
)
from mdm_jax.gaussian.schedules.tables import (
    ddpm_discrete,
    iddpm_discrete,
    wavegrad,
)
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.schedules.masked import MASKED_SCHEDULES
from mdm_jax.types import ArrayLike

GAUSSIAN_SCHEDULES: dict[str, Callable[..., TwoSidedLaw]] = {
    factory.__name__: factory
    for factory in (
        amplitude_linear,
        chen_sigmoid,
        cosine,
        cosine_iddpm,
        cosine_interpolated,
        cosine_offset,
        cosine_power,
        cosine_shifted,
        ddpm_discrete,
        ddpm_linear,
        edm2_lognormal,
        edm_lognormal,
        edm_rho,
        edm_sigma,
        flow,
        flow_shifted,
        iddpm_discrete,
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
        wavegrad,
    )
}
"""Name -> factory of a law, for configurations."""

MODIFIERS: dict[str, Callable[..., TwoSidedLaw]] = {
    factory.__name__: factory
    for factory in (beta_time, interpolated, shifted, speed, truncated, two_rates, zero_terminal)
}
"""Name -> ``modify(base, **parameters)``, laws made of laws."""


def by_name(name: str, **parameters: ArrayLike) -> TwoSidedLaw:
    """The schedule of that name; ``parameters`` are those of its factory.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or the place of the masked
            schedule that has it.
        TypeError: for a parameter the factory does not have.
    """
    if name not in GAUSSIAN_SCHEDULES:
        masked = {key: f"a masked schedule, schedules.masked.{key}" for key in MASKED_SCHEDULES}
        raise unknown_name(name, GAUSSIAN_SCHEDULES, "Gaussian schedule", masked)
    return GAUSSIAN_SCHEDULES[name](**parameters)
