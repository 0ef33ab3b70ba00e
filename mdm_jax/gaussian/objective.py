"""Gaussian corruption on any path, and the weighted squared error of any recipe."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import is_concrete
from mdm_jax.corruption.process import Corrupted, Corruption, spread_levels, sum_levels
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.gaussian.parameterisations import check_sigma_data, standardised_logsnr
from mdm_jax.gaussian.paths import Path
from mdm_jax.gaussian.recipes import Recipe
from mdm_jax.gaussian.weightings import Elbo
from mdm_jax.objectives.objective import (
    Objective,
    bias_of_levels,
    call_model,
    flatten_views,
)
from mdm_jax.types import Array, ArrayLike, Batch, ModelFn, worst_bias


def gaussian(path: Path) -> Corruption:
    """Corruption ``alpha x + sigma eps`` of floats, eps the normal quantiles of the base noise.

    Reflected base noise gives -eps exactly. Ineligible elements stay clean and carry no loss.
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

    On the grid of ``draws.open_uniform`` within 5.3, and exactly ``f(1 - v) == -f(v)``.
    """
    return jax.scipy.special.ndtri(noise)


def precondition(model_fn: ModelFn, path: Path, sigma_data: ArrayLike = 0.5) -> ModelFn:
    """Scale a network's inputs to unit variance at every level (Karras et al. 2022, c_in).

    All inputs of ``model_fn(inputs [N, L], logsnr [N, S])``, eligible or not, become ``c_in x /
    alpha``, for data of standard deviation ``sigma_data`` (ValueError unless positive and finite).
    With ``parameterisations.edm(sigma_data)`` as output this is EDM's preconditioning; the noise
    label stays the logSNR, -8 c_noise.
    """
    sigma_data = check_sigma_data("precondition", sigma_data)

    def preconditioned(inputs: Array, logsnr: Array, documents: Array | None = None) -> Array:
        shifted = standardised_logsnr(logsnr, sigma_data)
        c_in = jnp.exp(0.5 * jax.nn.log_sigmoid(shifted)) / sigma_data
        scale = c_in * jnp.exp(-path.log_alpha(logsnr))
        return model_fn(spread_levels(scale, inputs.shape[-1]) * inputs, logsnr, documents)

    return preconditioned


def gaussian_loss(
    recipe: Recipe,
    values: Callable[[Array], Array] | None = None,
    num_levels: int = 1,
    class_dropout: float = 0.0,
) -> Objective:
    """Gaussian diffusion loss ``E_{lambda ~ p} [W / p l]``, l the squared error of eps, in nats.

    The error is that of the network's own output y, ``|dy|^2 = c |deps|^2``: stats [V, B, S] have
    ``raw = |y - y_hat|^2 / c``, summed over eligible elements, and ``weight = W / p``. ValueError
    for num_levels < 1; from ``spec`` if it does not divide L; from ``loss`` for data that are no
    floats or outputs of another shape.

    Bias: for W = 1/2 the expectation is the diffusion term ``1/2 int E|eps - eps_hat|^2 dlambda``
    over the law's support: "exact" if that is known to be all levels, else "truncated", as under a
    traced law. Other weightings and several levels per row are "biased": no likelihood.
    Reference: Kingma et al. 2021 (VDM), equation 18; Kingma and Gao 2023 for general weights.

    Args:
        recipe: of ``model_fn(inputs [N, L] float, logsnr [N, S], documents) -> y [N, L]``.
        values: elementwise map from ``batch.tokens`` to data, such as ``scaled_integers(256)``; by
            default the tokens are float data.
        num_levels: S, independent noise levels per row, for contiguous segments of equal length.
        class_dropout: share of the views of rows whose class the network does not get
            (``documents`` 1), so that it learns :func:`~mdm_jax.gaussian.samplers.guided`'s two
            networks (Ho and Salimans 2022). Positive, the draw has one uniform more per row.
    """
    if not 0 <= class_dropout < 1:
        raise ValueError(f"gaussian_loss needs class_dropout in [0, 1), got {class_dropout}")
    corruption, output, path = gaussian(recipe.path), recipe.output, recipe.path
    bias = worst_bias(_bias(recipe), bias_of_levels("gaussian_loss", num_levels))

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels = draw.u.shape[-1]
        data = jnp.asarray(batch.tokens if values is None else values(batch.tokens))[None]
        eligible = jnp.asarray(batch.eligible)[None]
        logsnr = recipe.law.icdf(draw.u)
        length = data.shape[-1]
        noise, network = draw.noise[..., :length], model_fn
        if class_dropout:
            hidden = flatten_views(draw.noise[..., length:] < class_dropout)

            def network(inputs: Array, level: Array, documents: Array) -> Array:
                """``model_fn`` without some of the classes."""
                known = jnp.where(hidden, jnp.minimum(documents, 1), documents)
                return model_fn(inputs, level, known)

        corrupted = corruption.corrupt(data, logsnr, noise, eligible)
        predicted = call_model(network, corrupted.inputs, logsnr, batch.documents)
        each_logsnr = spread_levels(logsnr, length)
        target = output.target(path, each_logsnr, data, normal_noise(noise))
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
            eligible=jnp.broadcast_to(scored, draw.u.shape),
            targets=sum_levels(corrupted.target_mask.astype(jnp.int32), levels),
        )

    def spec(batch_size: int, length: int) -> DrawSpec:
        spread_levels(jnp.zeros((num_levels,)), length)  # raises where S does not divide L
        return DrawSpec(batch_size, num_levels, (length + bool(class_dropout),))

    return Objective(
        "gaussian_loss",
        recipe.law,
        corruption,
        spec,
        loss,
        bias,
        log_level_weight=recipe.log_importance_weight,
    )


def scaled_integers(num_values: int) -> Callable[[ArrayLike], Array]:
    """Map integers 0 .. num_values - 1 evenly onto [-1, 1]; ValueError unless num_values >= 2."""
    if num_values < 2:
        raise ValueError(f"scaled_integers needs num_values >= 2, got {num_values}")
    middle = (num_values - 1) / 2

    def values(tokens: ArrayLike) -> Array:
        return (jnp.asarray(tokens).astype(float) - middle) / middle

    return values


def _bias(recipe: Recipe) -> str:
    if not isinstance(recipe.weighting, Elbo):
        return "biased"
    ends = recipe.law.support
    return "exact" if is_concrete(*ends) and ends == (-np.inf, np.inf) else "truncated"
