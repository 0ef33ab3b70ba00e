"""Training objectives: noise law, weighting and per-example loss."""

from mdm_jax.models.cross_entropy import token_nats
from mdm_jax.objectives.losses import (
    block_nelbo,
    masked_nelbo,
    next_token,
    partition_nelbo,
    uniform_nelbo,
)
from mdm_jax.objectives.objective import (
    LossSums,
    Objective,
    describe,
    stop_gradient_stats,
    sum_losses,
    token_mean,
)
from mdm_jax.objectives.wrappers import (
    clamped,
    entropy_rise_factor,
    law_factor,
    min_snr_factor,
    p2_factor,
    reweighted,
    self_conditioned,
    two_pass,
)
