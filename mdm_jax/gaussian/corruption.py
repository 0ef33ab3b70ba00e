"""Gaussian corruption: data plus noise, on any path; and EDM's input scaling of a network."""

import jax
import jax.numpy as jnp

from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels
from mdm_jax.gaussian.parameterisations import check_sigma_data, standardised_logsnr
from mdm_jax.gaussian.paths import Path
from mdm_jax.types import Array, ArrayLike, ModelFn


def gaussian(path: Path) -> Corruption:
    """``alpha x + sigma eps`` with ``eps`` the normal quantiles of the uniform base noise.

    Every coupling of draws works as for masks: reflected base noise gives -eps exactly. ``corrupt``
    takes float data; elements that are not eligible stay clean and carry no loss. There is no mask
    token and no weight.
    """

    def corrupt(
        x: Array,
        logsnr: Array,
        noise: Array,
        eligible: Array,
        level_ids: Array | None = None,
    ) -> Corrupted:
        check_float(x)
        length = x.shape[-1]
        alpha = spread_levels(path.alpha(logsnr), length, level_ids)
        sigma = spread_levels(path.sigma(logsnr), length, level_ids)
        noisy = alpha * x + sigma * normal_noise(noise)
        mask = jnp.broadcast_to(eligible, noisy.shape)
        return Corrupted(jnp.where(mask, noisy, x), mask, jnp.zeros_like(logsnr))

    return Corruption(f"gaussian_{path.name}", corrupt, lambda length: (length,), None)


def check_float(data: Array) -> None:
    """ValueError unless the data are floats."""
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"Gaussian diffusion needs float data, got {data.dtype}; map tokens to numbers with "
            "values=, for example gaussian.scaled_integers(num_values)"
        )


def normal_noise(noise: ArrayLike) -> Array:
    """Standard normal numbers with the quantiles ``noise`` in (0, 1).

    On the grid of ``draws.open_uniform`` they are finite, within 5.3, and exactly antisymmetric:
    ``normal_noise(1 - v) == -normal_noise(v)``.
    """
    return jax.scipy.special.ndtri(noise)


def precondition(model_fn: ModelFn, path: Path, sigma_data: ArrayLike = 0.5) -> ModelFn:
    """A network whose inputs are scaled to unit variance at every level (Karras et al. 2022, c_in).

    On any path the input becomes ``c_in x / alpha``, eligible or not. With the output
    ``parameterisations.edm(sigma_data)`` this is EDM's preconditioning; the noise label stays the
    logSNR, which is -8 c_noise.

    Args:
        model_fn: inputs [N, L], logsnr [N, S].
        path: of the noisy inputs.
        sigma_data: standard deviation of the data.

    Raises:
        ValueError: unless sigma_data is positive and finite.
    """
    sigma_data = check_sigma_data("precondition", sigma_data)

    def preconditioned(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        shifted = standardised_logsnr(logsnr, sigma_data)
        c_in = jnp.exp(0.5 * jax.nn.log_sigmoid(shifted)) / sigma_data
        scale = c_in * jnp.exp(-path.log_alpha(logsnr))
        return model_fn(spread_levels(scale, inputs.shape[-1]) * inputs, logsnr, documents)

    return preconditioned
