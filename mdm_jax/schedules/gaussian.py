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

from mdm_jax.schedules.gaussian_cosine import cosine as cosine
from mdm_jax.schedules.gaussian_cosine import cosine_iddpm as cosine_iddpm
from mdm_jax.schedules.gaussian_cosine import cosine_offset as cosine_offset
from mdm_jax.schedules.gaussian_cosine import cosine_power as cosine_power
from mdm_jax.schedules.gaussian_cosine import santos_lin_fisher as santos_lin_fisher
from mdm_jax.schedules.gaussian_diffusion import amplitude_linear as amplitude_linear
from mdm_jax.schedules.gaussian_diffusion import chen_sigmoid as chen_sigmoid
from mdm_jax.schedules.gaussian_diffusion import ddpm_linear as ddpm_linear
from mdm_jax.schedules.gaussian_diffusion import ou_time as ou_time
from mdm_jax.schedules.gaussian_diffusion import variance_linear as variance_linear
from mdm_jax.schedules.gaussian_flow import flow as flow
from mdm_jax.schedules.gaussian_flow import flow_shifted as flow_shifted
from mdm_jax.schedules.gaussian_flow import indi as indi
from mdm_jax.schedules.gaussian_flow import sd3_cosmap as sd3_cosmap
from mdm_jax.schedules.gaussian_flow import sd3_logit_normal as sd3_logit_normal
from mdm_jax.schedules.gaussian_flow import sd3_mode as sd3_mode
from mdm_jax.schedules.gaussian_sigma import edm2_lognormal as edm2_lognormal
from mdm_jax.schedules.gaussian_sigma import edm_lognormal as edm_lognormal
from mdm_jax.schedules.gaussian_sigma import edm_rho as edm_rho
from mdm_jax.schedules.gaussian_sigma import edm_sigma as edm_sigma
from mdm_jax.schedules.gaussian_sigma import lognormal as lognormal
from mdm_jax.schedules.gaussian_sigma import uniform_logsnr as uniform_logsnr
from mdm_jax.schedules.gaussian_sigma import ve_geometric as ve_geometric
from mdm_jax.schedules.gaussian_tables import ddpm_discrete as ddpm_discrete
from mdm_jax.schedules.gaussian_tables import ddpm_table as ddpm_table
from mdm_jax.schedules.gaussian_tables import iddpm_cosine_table as iddpm_cosine_table
from mdm_jax.schedules.gaussian_tables import iddpm_discrete as iddpm_discrete
from mdm_jax.schedules.gaussian_tables import interpolated_table as interpolated_table
from mdm_jax.schedules.gaussian_tables import table_from_betas as table_from_betas
from mdm_jax.schedules.gaussian_tables import wavegrad as wavegrad
from mdm_jax.schedules.gaussian_tables import zero_terminal_table as zero_terminal_table
from mdm_jax.schedules.laws import TwoSidedLaw
from mdm_jax.schedules.names import unknown_schedule
from mdm_jax.schedules.shifted import cosine_interpolated as cosine_interpolated
from mdm_jax.schedules.shifted import cosine_shifted as cosine_shifted
from mdm_jax.schedules.shifted import interpolated as interpolated
from mdm_jax.schedules.shifted import resolution_shift as resolution_shift
from mdm_jax.schedules.shifted import shifted as shifted
from mdm_jax.schedules.truncated import truncated as truncated
from mdm_jax.schedules.warped_time import beta_time as beta_time
from mdm_jax.schedules.warped_time import speed as speed
from mdm_jax.schedules.warped_time import two_rates as two_rates
from mdm_jax.schedules.zero_terminal import zero_terminal as zero_terminal
from mdm_jax.typing import ArrayLike

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
        raise unknown_schedule(name, "Gaussian")
    return GAUSSIAN_SCHEDULES[name](**parameters)
