"""Gaussian diffusion: paths, parameterisations, weightings, recipes, objective, likelihood."""

from mdm_jax.gaussian.likelihood import (
    GaussianLikelihood,
    OdeLikelihood,
    grey_value_decoder,
    make_gaussian_likelihood,
    normal_decoder,
    ode_likelihood,
)
from mdm_jax.gaussian.network import PictureTransformer
from mdm_jax.gaussian.objective import (
    gaussian,
    gaussian_loss,
    normal_noise,
    precondition,
    scaled_integers,
)
from mdm_jax.gaussian.parameterisations import Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.recipes import Recipe, RecipeSummary, explain, summarise
from mdm_jax.gaussian.weightings import Weighting
