"""EDM's input scaling as a wrapper of the network."""

import jax.numpy as jnp

from mdm_jax.corruption.process import spread_levels
from mdm_jax.schedules.paths import Path
from mdm_jax.schedules.preconditioning import check_sigma_data, edm_preconditioning
from mdm_jax.typing import Array, ArrayLike, ModelFn


def precondition(model_fn: ModelFn, path: Path, sigma_data: ArrayLike = 0.5) -> ModelFn:
    """The network fed with inputs of unit variance at every level (Karras et al. 2022, c_in).

    On any path the input becomes ``c_in x / alpha``, the variance-preserving input of data scaled
    by ``1 / sigma_data``. Together with the output ``schedules.parameterisations.edm(sigma_data)``
    this is EDM's preconditioning; the noise label stays the logSNR, which is -8 c_noise.

    Every element is scaled as if it were noisy, also those that are not eligible.

    Args:
        model_fn: network to wrap; inputs [N, L], logsnr [N, S].
        path: of the noisy inputs.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: unless sigma_data is positive and finite.
    """
    sigma_data = check_sigma_data("precondition", sigma_data)

    def preconditioned(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        scale = edm_preconditioning(logsnr, sigma_data).input * jnp.exp(-path.log_alpha(logsnr))
        return model_fn(spread_levels(scale, inputs.shape[-1]) * inputs, logsnr, documents)

    return preconditioned
