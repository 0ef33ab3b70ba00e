"""A Gaussian diffusion network as samplers see it: an estimate of the clean data."""

from collections.abc import Callable

import jax.numpy as jnp

from mdm_jax.samplers.sampler import LOGSNR_LIMIT
from mdm_jax.schedules import Output, Path
from mdm_jax.typing import Array, ArrayLike, ModelFn

NETWORK_LOGSNR_LIMIT = 2 * LOGSNR_LIMIT
"""Largest |logSNR| shown to a network: that of the outermost float32 quantiles of the flow and
cosine schedules."""

Denoise = Callable[[Array, ArrayLike], Array]
"""``denoise(x [B, ...], logsnr [] or [B]) -> estimate of x0 [B, ...]``, x on the network's path."""


def bind_denoiser(
    model_fn: ModelFn, output: Output, path: Path, documents: ArrayLike | None = None
) -> Denoise:
    """The network as an estimate of the clean data, in the dtype of its input.

    The network is shown levels within :data:`NETWORK_LOGSNR_LIMIT`; the conversion uses the level
    as it is.

    Args:
        model_fn: ``model_fn(x [B, ...], logsnr [B, 1], documents) -> y [B, ...]``.
        output: what y is.
        path: of the network's inputs.
        documents: handed to the network as they are.
    """

    def denoise(x: Array, logsnr: ArrayLike) -> Array:
        logsnr = jnp.asarray(logsnr, x.dtype)
        shown = jnp.clip(logsnr, -NETWORK_LOGSNR_LIMIT, NETWORK_LOGSNR_LIMIT)
        shown = jnp.broadcast_to(shown.reshape(-1, 1), (x.shape[0], 1))
        y = model_fn(x, shown, documents)
        if y.shape != x.shape:
            raise ValueError(
                f"the network must output one number per element, {x.shape}, got {y.shape}"
            )
        if logsnr.ndim:
            logsnr = logsnr.reshape(-1, *(1,) * (x.ndim - 1))
        return output.to_x0(path, logsnr, y.astype(x.dtype), x)

    return denoise


def initial_std(path: Path, logsnr: ArrayLike, data_std: ArrayLike = 1.0) -> Array:
    """``sqrt(sigma^2 + alpha^2 data_std^2)``, the scale of noisy data of mean zero at a level.

    For data_std = 1 it is 1 at every level of the variance-preserving path. With data_std = 0 it is
    sigma, as EDM starts.
    """
    spread = 1.0 + jnp.square(data_std) * jnp.exp(logsnr)
    return jnp.exp(path.log_sigma(logsnr)) * jnp.sqrt(spread)
