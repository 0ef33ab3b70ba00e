"""Training objectives: noise law, weighting and per-example loss."""

from mdm_jax.objectives import baseline as baseline
from mdm_jax.objectives.block_nelbo import block_nelbo as block_nelbo
from mdm_jax.objectives.gaussian_loss import gaussian_loss as gaussian_loss
from mdm_jax.objectives.gaussian_loss import scaled_integers as scaled_integers
from mdm_jax.objectives.masked_nelbo import masked_nelbo as masked_nelbo
from mdm_jax.objectives.next_token import next_token as next_token
from mdm_jax.objectives.objective import LossSums as LossSums
from mdm_jax.objectives.objective import Objective as Objective
from mdm_jax.objectives.objective import describe as describe
from mdm_jax.objectives.objective import stop_gradient_stats as stop_gradient_stats
from mdm_jax.objectives.objective import sum_losses as sum_losses
from mdm_jax.objectives.objective import token_mean as token_mean
from mdm_jax.objectives.reweighted import min_snr_factor as min_snr_factor
from mdm_jax.objectives.reweighted import p2_factor as p2_factor
from mdm_jax.objectives.reweighted import reweighted as reweighted
from mdm_jax.objectives.self_conditioning import self_conditioned as self_conditioned
from mdm_jax.objectives.self_conditioning import two_pass as two_pass
from mdm_jax.objectives.token_loss import token_nats as token_nats
from mdm_jax.objectives.uniform_nelbo import uniform_nelbo as uniform_nelbo
