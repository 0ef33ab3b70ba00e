"""Forward processes: deterministic functions of clean data, logSNR and base noise."""

from mdm_jax.corruption.masked import (
    bernoulli,
    bernoulli_shifted_logit,
    bernoulli_shifted_rate,
    count_at_rate,
    expected_inverse_rate,
    fixed_count,
    noise_ranks,
    rao_blackwell,
    rao_blackwell_clipped,
    rounded_count,
)
from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.corruption.uniform import leave_one_out, token_estimate, uniform_tokens
