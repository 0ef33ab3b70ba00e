"""Laws of the clean data given the cleanest noisy version: the last term of a Gaussian bound.

A decoder is ``decoder(x0 [..., L], z [..., L], logsnr) -> log p [..., L]``, nats per element, with
``z = x0 + exp(-logsnr / 2) eps``. Any normalised law makes a valid bound; these need no network.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mdm_jax.objectives import scaled_integers
from mdm_jax.typing import Array, ArrayLike

Decoder = Callable[[Array, Array, ArrayLike], Array]
"""``decoder(x0, z, logsnr) -> log probability`` (or density) of each element, nats."""


def grey_value_decoder(num_values: int) -> Decoder:
    """Over K equally spaced values from -1 to 1, in proportion to N(z; value, exp(-logsnr)).

    This is the exact posterior for values that are uniform a priori and independent; the bound on
    pictures is tight where exp(-logsnr / 2) is small against their distance 2 / (K - 1).
    Kingma et al. 2021 (VDM), equation 13 and appendix.

    Args:
        num_values: K, as for ``objectives.scaled_integers(K)``, which makes x0.

    Raises:
        ValueError: unless num_values >= 2.
    """
    to_values = scaled_integers(num_values)

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        values = to_values(jnp.arange(num_values)).astype(z.dtype)
        precision = jnp.exp(jnp.asarray(logsnr, z.dtype))

        def log_odds(value: Array) -> Array:
            # log N(z; value) - log N(z; x0), as a product: no difference of large squares.
            return 0.5 * precision * (value - x0) * (2 * z - value - x0)

        def add(total: Array, value: Array) -> tuple[Array, None]:
            return jnp.logaddexp(total, log_odds(value)), None

        # One value at a time: K numbers per element would not fit for pictures.
        total, _ = jax.lax.scan(add, jnp.full_like(z, -jnp.inf), values)
        return -total

    return decoder


def normal_decoder() -> Decoder:
    """N(x0; z, exp(-logsnr)): for continuous data that are smooth at the scale of the noise."""

    def decoder(x0: Array, z: Array, logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr, z.dtype)
        square = jnp.square(x0 - z) * jnp.exp(logsnr)
        return 0.5 * (logsnr - math.log(2 * math.pi) - square)

    return decoder
