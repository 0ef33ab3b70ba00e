"""Gaussian noise schedules by name, as laws over the logSNR."""

from mdm_jax.gaussian.schedules.curve_law import CurveLaw, logsnr_at, logsnr_rate, time_at
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
from mdm_jax.gaussian.schedules.names import GAUSSIAN_SCHEDULES, MODIFIERS, by_name
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
