"""Gaussian corruption on any path, and the weighted squared error of any recipe."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.gaussian.parameterisations import check_sigma_data, standardised_logsnr
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.recipes import Recipe
from mdm_jax.gaussian.weightings import Elbo
from mdm_jax.objectives.objective import Objective, bias_of_levels, call_model
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn, worst_bias


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


def gaussian_loss(
    recipe: Recipe, values: Callable[[Array], Array] | None = None, num_levels: int = 1
) -> Objective:
    """``E_{lambda ~ p} [ W(lambda) / p(lambda) l ]`` with l the squared error of eps, nats per row.

    The error is taken in the network's own output: with ``|dy|^2 = c |deps|^2``, the stats
    [V, B, S] have ``raw = |y - y_hat|^2 / c``, summed over eligible elements, and
    ``weight = W / p``: the same l for every output, and no conversion that loses digits.

    Bias: for W = 1/2 the expectation is the diffusion term ``1/2 int E|eps - eps_hat|^2 dlambda``
    over the law's support: "exact" if that is all levels, else "truncated". Every other weighting,
    and several levels per row, are "biased": no likelihood.
    Reference: Kingma et al. 2021 (VDM), equation 18; Kingma and Gao 2023 for general weights.

    Args:
        recipe: law, weighting, output and path. The network is
            ``model_fn(inputs [N, L] float, logsnr [N, S], documents) -> y [N, L]``.
        values: data from ``batch.tokens``, elementwise, such as ``scaled_integers(256)``. If not
            given the tokens must be floats and are the data.
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.

    Raises:
        ValueError: if ``num_levels`` is not positive; from ``spec``, if it does not divide L; from
            ``loss``, for data that are no floats or a network with another shape of output.
    """
    corruption, output, path = gaussian(recipe.path), recipe.output, recipe.path
    bias = worst_bias(_bias(recipe), bias_of_levels("gaussian_loss", num_levels))

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        data = jnp.asarray(batch.tokens if values is None else values(batch.tokens))[None]
        eligible = jnp.asarray(batch.eligible)[None]
        logsnr = recipe.law.icdf(draw.u)
        corrupted = corruption.corrupt(data, logsnr, draw.noise, eligible)
        predicted = call_model(model_fn, corrupted.inputs, logsnr, batch.documents)
        each_logsnr = spread_levels(logsnr, data.shape[-1])
        target = output.target(path, each_logsnr, data, normal_noise(draw.noise))
        if predicted.shape != target.shape:
            raise ValueError(
                f"the network must output one number per element, {target.shape}, "
                f"got {predicted.shape}"
            )
        error = jnp.where(corrupted.target_mask, predicted.astype(target.dtype) - target, 0.0)
        change = output.log_eps_weight(path, logsnr)
        scored = sum_levels(eligible.astype(jnp.float32), levels)
        return LossStats(
            raw=sum_levels(jnp.square(error), levels) * jnp.exp(-change),
            weight=jnp.exp(recipe.log_importance_weight(logsnr)),
            scored=jnp.broadcast_to(scored, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, corruption.event_shape(length))

    return Objective("gaussian_loss", recipe.law, corruption, spec, loss, bias)


def scaled_integers(num_values: int) -> Callable[[ArrayLike], Array]:
    """A map from integers 0 .. num_values - 1 to equally spaced numbers from -1 to 1.

    Raises:
        ValueError: unless num_values >= 2.
    """
    if num_values < 2:
        raise ValueError(f"scaled_integers needs num_values >= 2, got {num_values}")
    middle = (num_values - 1) / 2

    def values(tokens: ArrayLike) -> Array:
        return (jnp.asarray(tokens).astype(float) - middle) / middle

    return values


def _bias(recipe: Recipe) -> str:
    if not isinstance(recipe.weighting, Elbo):
        return "biased"
    low, high = (np.asarray(end) for end in recipe.law.support)
    return "exact" if low == -np.inf and high == np.inf else "truncated"
