"""Forward processes: deterministic functions of clean data, logSNR and base noise."""

from mdm_jax.corruption.gaussian import gaussian as gaussian
from mdm_jax.corruption.gaussian import normal_noise as normal_noise
from mdm_jax.corruption.inverse_rate import expected_inverse_rate as expected_inverse_rate
from mdm_jax.corruption.leave_one_out import leave_one_out as leave_one_out
from mdm_jax.corruption.masked import bernoulli as bernoulli
from mdm_jax.corruption.masked import count_at_rate as count_at_rate
from mdm_jax.corruption.masked import cross_entropy as cross_entropy
from mdm_jax.corruption.masked import exclude_token as exclude_token
from mdm_jax.corruption.masked import fixed_count as fixed_count
from mdm_jax.corruption.masked import noise_ranks as noise_ranks
from mdm_jax.corruption.masked import rao_blackwell as rao_blackwell
from mdm_jax.corruption.masked import rao_blackwell_clipped as rao_blackwell_clipped
from mdm_jax.corruption.preconditioned import precondition as precondition
from mdm_jax.corruption.process import Corrupted as Corrupted
from mdm_jax.corruption.process import Corruption as Corruption
from mdm_jax.corruption.process import spread_levels as spread_levels
from mdm_jax.corruption.process import sum_levels as sum_levels
from mdm_jax.corruption.token_dependent import bernoulli_shifted_logit as bernoulli_shifted_logit
from mdm_jax.corruption.token_dependent import bernoulli_shifted_rate as bernoulli_shifted_rate
from mdm_jax.corruption.uniform_tokens import uniform_tokens as uniform_tokens
