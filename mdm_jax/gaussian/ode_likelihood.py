"""Log density of continuous data under the probability flow of a Gaussian diffusion model.

In variance-preserving coordinates, with D the denoiser as a function of ``z = x / alpha``,

    dx / dlambda = -1/2 sigmoid(lambda) x + 1/2 alpha D(z, lambda) ,
    dlog p / dlambda = 1/2 sum_i [sigmoid(lambda) - dD_i / dz_i] ,

whatever the path of the network. Data at the cleanest level are carried to the noisiest, where they
are N(0, 1), by the classical Runge-Kutta method of order 4 with one step per interval of a grid.
Song et al. 2021 (arXiv 2011.13456), appendix D.2; FFJORD (Grathwohl et al. 2019) for the estimate
of the divergence.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.checks import is_concrete
from mdm_jax.gaussian import paths
from mdm_jax.gaussian.parameterisations import Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.samplers.sampler import bind_denoiser
from mdm_jax.gaussian.samplers.step_search import check_levels
from mdm_jax.samplers.sampler import row_streams
from mdm_jax.types import Array, ArrayLike, ModelFn

_VP = paths.vp()


class OdeLikelihood(NamedTuple):
    """Log densities and where they come from.

    Attributes:
        log_density: [B] log p of each row at the cleanest level of the grid, nats.
        standard_error: [B] of the estimated divergence over its probes; 0 for the exact one, NaN
            for a single probe. The error of the integration is not in it: refine the grid.
        latent: [B, ...] the row carried to the noisiest level, variance-preserving.
    """

    log_density: Array
    standard_error: Array
    latent: Array


def ode_likelihood(
    key: Array,
    model_fn: ModelFn,
    data: ArrayLike,
    grid: ArrayLike,
    *,
    output: Output,
    path: Path,
    probes: int | None = None,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
) -> OdeLikelihood:
    """Log density of each row by the probability flow; jit-able.

    The density is that of data plus noise of variance exp(-grid[-1]), taken at the clean rows: for
    a smooth law of the data the difference vanishes with the noise. Discrete data have no density;
    spread them out first (dequantisation), and what is found bounds their probability.

    Args:
        key: typed key; row i draws from ``fold_in(key, row_offset + i)`` alone. Not used for the
            exact divergence.
        model_fn: ``model_fn(x [B, ...], logsnr [B, 1], documents) -> y [B, ...]``; rows must not
            influence each other.
        data: [B, ...] clean rows.
        grid: [N + 1] finite logSNR levels, increasing.
        output: what the network predicts.
        path: of the network's inputs.
        probes: number of Rademacher vectors for Hutchinson's estimate of the divergence; None for
            the exact one, which costs a derivative per element.
        documents: handed to the network as they are.
        row_offset: number of the first row.

    Raises:
        ValueError: for probes below 1, data without rows, or a bad grid where it is concrete.
    """
    data = jnp.asarray(data)
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, or None for the exact trace, got {probes}")
    if data.ndim < 2 or data.size == 0 or not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"ode_likelihood needs float data [rows, elements, ...], got {data.dtype} {data.shape}"
        )
    if is_concrete(grid):
        check_levels(grid)
    levels = jnp.asarray(grid, data.dtype)
    denoise = bind_denoiser(model_fn, output, path, documents)
    elements = math.prod(data.shape[1:])
    directions = _directions(key, data, probes, row_offset)

    def speed(x: Array, logsnr: Array) -> tuple[Array, Array]:
        """dx / dlambda [B, ...] and dlog p / dlambda [P, B]."""

        def clean(z: Array) -> Array:
            return denoise(path.alpha(logsnr) * z, logsnr)

        z = x * jnp.exp(-_VP.log_alpha(logsnr))
        x0, slopes = _quadratic_forms(clean, z, directions, probes is None)
        kept = jax.nn.sigmoid(logsnr)
        return 0.5 * (_VP.alpha(logsnr) * x0 - kept * x), 0.5 * (elements * kept - slopes)

    def step(carry: tuple[Array, Array], ends: tuple[Array, Array]):
        (x, total), (clean, noisy) = carry, ends
        size = noisy - clean
        middle = clean + 0.5 * size
        first = speed(x, clean)
        second = speed(x + 0.5 * size * first[0], middle)
        third = speed(x + 0.5 * size * second[0], middle)
        fourth = speed(x + size * third[0], noisy)
        move, gain = (
            size / 6 * (a + 2 * b + 2 * c + d) for a, b, c, d in zip(first, second, third, fourth)
        )
        return (x + move, total - gain), None

    start = data * _VP.alpha(levels[-1])
    total = jnp.zeros((1 if probes is None else probes, data.shape[0]), data.dtype)
    (latent, total), _ = jax.lax.scan(step, (start, total), (levels[:0:-1], levels[-2::-1]))
    flat = latent.reshape(data.shape[0], -1)
    prior = -0.5 * jnp.sum(jnp.square(flat) + math.log(2 * math.pi), axis=-1)
    log_density = prior + jnp.mean(total, axis=0) + elements * _VP.log_alpha(levels[-1])
    return OdeLikelihood(log_density, _standard_error(total, probes), latent)


def _directions(key: Array, data: Array, probes: int | None, row_offset: ArrayLike) -> Array:
    """[P, B, ...] probes, the same along the whole trajectory; [elements, 1, ...] unit vectors."""
    event = data.shape[1:]
    if probes is None:
        return jnp.eye(math.prod(event), dtype=data.dtype).reshape(-1, 1, *event)
    rows = jnp.asarray(row_offset, jnp.int32) + jnp.arange(data.shape[0])
    keys = row_streams(jax.vmap(lambda row: jax.random.fold_in(key, row))(rows), "probes")
    signs = jax.vmap(lambda k: jax.random.rademacher(k, (probes, *event), data.dtype))(keys)
    return jnp.swapaxes(signs, 0, 1)


def _quadratic_forms(
    function: Callable[[Array], Array], z: Array, directions: Array, exact: bool
) -> tuple[Array, Array]:
    """The function, and ``v . J v`` of its Jacobian per direction [P, B]; their sum if exact."""
    value, push = jax.linearize(function, z)

    def form(direction: Array) -> Array:
        direction = jnp.broadcast_to(direction, z.shape)
        return jnp.sum((direction * push(direction)).reshape(z.shape[0], -1), axis=-1)

    forms = jax.lax.map(form, directions)
    return value, jnp.sum(forms, axis=0, keepdims=True) if exact else forms


def _standard_error(total: Array, probes: int | None) -> Array:
    if probes is None:
        return jnp.zeros_like(total[0])
    if probes == 1:
        return jnp.full_like(total[0], jnp.nan)
    return jnp.std(total, axis=0, ddof=1) / math.sqrt(probes)
