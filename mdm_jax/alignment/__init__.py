"""Preference and reward training on the draws of masked diffusion (docs/alignment.md)."""

from mdm_jax.alignment.advantages import (
    ADVANTAGES,
    centred,
    has_signal,
    leave_one_out,
    standardised,
)
from mdm_jax.alignment.bounds import (
    Bound,
    ElboPair,
    at_temperature,
    networks,
    paired_elbo,
    replicate_means,
    replicated,
    sequence_bound,
)
from mdm_jax.alignment.held_out import PreferenceFigures, preference_figures
from mdm_jax.alignment.methods import METHODS, Constant, Method, per_answer, per_token
from mdm_jax.alignment.policy import (
    best_of_group,
    clipped,
    kl_k1,
    kl_k1_score,
    kl_k2,
    kl_k2_crossfitted,
    kl_k3,
    over_all_tokens,
    over_canvas,
    over_own_tokens,
    policy_gradient,
    rejection,
    sequence_grpo,
    spg,
    token_grpo,
    weighted_likelihood,
)
from mdm_jax.alignment.preference import crossfitted, dpo, ipo, kto, margins, plain, simpo
from mdm_jax.alignment.rollout import Written, make_rollout, without_steps
from mdm_jax.alignment.surrogates import (
    FREE_ORDERS,
    Surrogate,
    Views,
    complementary,
    coupled,
    coupled_unweighted,
    eubo,
    fixed_counts,
    iw_orders,
    left_to_right,
    mean_over_masked,
    one_step,
    quadrature,
    sampled_trace,
    surrogate_values,
    token_scores,
    trace,
    weighted_tokens,
)
from mdm_jax.alignment.training import Answers
