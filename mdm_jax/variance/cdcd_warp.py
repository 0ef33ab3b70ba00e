"""Time warping by a fitted curve of the loss."""

from collections.abc import Callable

import numpy as np

from mdm_jax.typing import Array
from mdm_jax.variance.curve_warp import curve_warp
from mdm_jax.variance.loss_curves import piecewise_linear_curve
from mdm_jax.variance.transform import VarianceTransform


def cdcd_warp(
    num_bins: int = 100,
    learning_rate: float = 1e-2,
    decay: float = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws levels so that each share of the draws covers the same share of the rise of the loss.

    A piecewise-linear curve F(xi) over the noise ``xi = 1 - u`` is fitted to the raw loss per
    target element by least squares, uniformly in xi. Levels are drawn from its slope, most often
    where the loss changes fastest, and *no* weight is paid. That is another density than those that
    follow the loss itself. The loss has to rise with the noise, as the cross-entropy of a token
    does; F rises whatever it is fitted to, so early in training it follows the trend only.

    For Gaussian diffusion the objective's raw loss is the error of eps, which falls; the error of
    the clean data, which rises, is that times ``exp(-lambda)``: pass
    ``log_factor=lambda u: -law.icdf(u)``. On N(0, s^2) levels then become Logistic(-2 log s, 1).

    Keeps: the range of levels. Not the loss: the effective weighting is the objective's times the
    learnt density, which is not paid for and moves during training.
    Couples: nothing within a step; steps through the state. Costs: one view.
    Removes: draws at levels where nothing is decided, by changing what is estimated. Bias: biased.
    Reference: Dieleman et al. 2022 (CDCD), time warping.

    Args:
        num_bins: K, cells of the curve, free in width and height.
        learning_rate: of Adam.
        decay: per batch, of the average of the curves that levels are drawn from; 0 draws from the
            curve as fitted.
        log_factor: log of a factor on the loss, elementwise in the quantile, before it is fitted.

    Raises:
        ValueError: if a setting is out of range.
    """
    return curve_warp(
        "cdcd_warp",
        piecewise_linear_curve(num_bins),
        lambda levels: np.zeros(levels, int),
        learning_rate,
        decay,
        log_factor,
    )
