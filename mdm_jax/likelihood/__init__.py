"""Likelihoods and likelihood bounds with standard errors, by fixed estimators."""

from mdm_jax.likelihood.block import make_block_likelihood
from mdm_jax.likelihood.masked import make_likelihood
from mdm_jax.likelihood.next_token import make_next_token_likelihood
from mdm_jax.likelihood.result import LevelCurve, Likelihood
from mdm_jax.likelihood.subsets import make_subset_likelihood
from mdm_jax.likelihood.uniform import make_uniform_likelihood
