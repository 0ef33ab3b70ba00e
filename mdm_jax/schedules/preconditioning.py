"""EDM's preconditioning coefficients in terms of the logSNR."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.schedules.coordinates import as_float
from mdm_jax.schedules.parameters import as_parameter, check_finite, is_concrete
from mdm_jax.typing import Array, ArrayLike


class Preconditioning(NamedTuple):
    """EDM's coefficients at one level; ``D = skip x / alpha + out F(input x / alpha, noise)``.

    Attributes:
        skip: c_skip.
        out: c_out.
        input: c_in, which gives the input unit variance. It acts on x / alpha.
        noise: c_noise, EDM's noise label ``log(sigma) / 4``.
    """

    skip: Array
    out: Array
    input: Array
    noise: Array


def edm_preconditioning(logsnr: ArrayLike, sigma_data: ArrayLike = 0.5) -> Preconditioning:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1, from the logSNR.

    Raises:
        ValueError: unless sigma_data is positive and finite.
    """
    sigma_data = check_sigma_data("edm_preconditioning", sigma_data)
    shifted = standardised_logsnr(logsnr, sigma_data)
    return Preconditioning(
        skip=jax.nn.sigmoid(shifted),
        out=sigma_data * jnp.exp(0.5 * jax.nn.log_sigmoid(-shifted)),
        input=jnp.exp(0.5 * jax.nn.log_sigmoid(shifted)) / sigma_data,
        noise=-as_float(logsnr) / 8,
    )


def check_sigma_data(name: str, sigma_data: ArrayLike) -> ArrayLike:
    """The standard deviation as a parameter; ValueError unless it is positive and finite."""
    sigma_data = as_parameter(sigma_data, "sigma_data")
    check_finite(name, sigma_data=sigma_data)
    if is_concrete(sigma_data) and not sigma_data > 0:
        raise ValueError(f"{name} needs sigma_data > 0, got {sigma_data}")
    return sigma_data


def standardised_logsnr(logsnr: ArrayLike, sigma_data: ArrayLike) -> Array:
    """The logSNR of data divided by its standard deviation."""
    if is_concrete(sigma_data):
        return as_float(logsnr) + 2.0 * math.log(sigma_data)
    return as_float(logsnr) + 2.0 * jnp.log(sigma_data)
