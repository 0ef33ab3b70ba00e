"""Likelihoods and likelihood bounds with standard errors, by fixed estimators."""

from mdm_jax.likelihood.bounds import (
    make_block_likelihood,
    make_likelihood,
    make_next_token_likelihood,
    make_uniform_likelihood,
)
from mdm_jax.likelihood.estimators import LevelCurve, Likelihood
from mdm_jax.likelihood.subsets import make_subset_likelihood
