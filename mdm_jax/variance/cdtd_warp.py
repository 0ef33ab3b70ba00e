"""Time warping for rows of several data types."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array
from mdm_jax.variance.curve_warp import CurveState, curve_warp
from mdm_jax.variance.loss_curves import LossCurve, piecewise_linear_curve
from mdm_jax.variance.transform import VarianceTransform


def cdtd_warp(
    curve: LossCurve | None = None,
    groups: Sequence[int] | None = None,
    normalisers: Sequence[float] | None = None,
    learning_rate: float = 1e-2,
    decay: float = 0.99,
    log_factor: Callable[[Array], Array] | None = None,
) -> VarianceTransform:
    """Draws the levels of a row at one common fraction of the loss, a curve for each data type.

    As :func:`~mdm_jax.variance.cdcd_warp`, with a curve for each group of the S levels of a row and
    one base quantile for all: every type has lost the same share of what it can lose. Losses are
    divided by ``normalisers`` before they are fitted, which matters where levels share a curve. The
    loss that trains the network is not divided: put that into the objective.

    Condition the network on the logSNR, not on the common quantile, which changes its meaning
    whenever a curve moves.

    Keeps: each level's range. Not the loss: a level's effective weighting is the objective's times
    the learnt density, which is not paid for and moves during training; nor the independence of the
    levels of a row, which are tied: elements of one type see a context whose other types are at the
    same fraction.
    Couples: the levels of a row; steps through the state. Costs: one view.
    Removes: differences in difficulty between levels and types, by changing what is estimated.
    Bias: biased.
    Reference: Mueller et al. 2025 (CDTD).

    Args:
        curve: family of curves, piecewise linear if not given; ``logistic_curve()`` has three
            parameters.
        groups: for each level the number of its curve, 0 .. G - 1: ``(0, 0)`` shares one curve
            between two levels. One curve per level if not given.
        normalisers: for each level the unit of its loss, such as the entropy of a marginal; 1 if
            not given.
        learning_rate: of Adam.
        decay: per batch, of the averages of the curves that levels are drawn from; 0 draws from the
            curves as fitted.
        log_factor: log of a factor on the loss as a function of the quantile, see ``cdcd_warp``.

    Raises:
        ValueError: if a setting is out of range, or groups or normalisers do not fit S.
    """
    if groups is not None and set(groups) != set(range(len(set(groups)))):
        raise ValueError(
            f"cdtd_warp needs groups numbered from 0 without gaps, got {tuple(groups)}"
        )
    units = None if normalisers is None else np.asarray(normalisers, np.float64)
    if units is not None and not (np.all(np.isfinite(units)) and np.all(units > 0)):
        raise ValueError(f"cdtd_warp needs positive normalisers, got {tuple(normalisers)}")

    def curve_of_level(levels: int) -> np.ndarray:
        for what, given in (("groups", groups), ("normalisers", normalisers)):
            if given is not None and len(given) != levels:
                raise ValueError(
                    f"cdtd_warp: {len(given)} {what} do not fit {levels} levels per row; give one "
                    "for each level"
                )
        return np.arange(levels) if groups is None else np.asarray(groups)

    def calibrated(u: Array) -> Array:
        factor = jnp.zeros_like(u) if log_factor is None else log_factor(u)
        if units is None:
            return factor
        return factor - jnp.log(jnp.asarray(units, u.dtype)).reshape(1, 1, -1)

    family = piecewise_linear_curve() if curve is None else curve
    each = curve_warp("cdtd_warp", family, curve_of_level, learning_rate, decay, calibrated)

    def draw(key: Array, state: CurveState, current: Draw, spec: DrawSpec) -> Draw:
        common = jnp.broadcast_to(current.u[..., :1], current.u.shape)
        return each.draw(key, state, current._replace(u=common), spec)

    return each._replace(draw=draw)
