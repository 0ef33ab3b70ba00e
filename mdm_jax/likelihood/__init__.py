"""Likelihoods and likelihood bounds with standard errors, by fixed estimators."""

from mdm_jax.likelihood.audit import audit_line, scored_tokens
from mdm_jax.likelihood.bounds import (
    block_design,
    make_block_likelihood,
    make_likelihood,
    make_next_token_likelihood,
    make_subset_likelihood,
    make_uniform_likelihood,
    masked_estimator,
    next_token_estimator,
    uniform_estimator,
)
from mdm_jax.likelihood.estimators import (
    Estimator,
    LevelCurve,
    Likelihood,
    evaluate_until,
    make_evaluate,
)
from mdm_jax.likelihood.rows import RowDraws, loglikelihoods
from mdm_jax.likelihood.stopping import Stop, replicate_until
from mdm_jax.likelihood.subsets import SubsetDesign, counts
