"""P-POTS with its parametric family."""

from collections.abc import Sequence

import numpy as np

from mdm_jax.variance.epr import EprParameters, epr_curve
from mdm_jax.variance.importance import importance
from mdm_jax.variance.moments import check_floor
from mdm_jax.variance.quantile_density import PiecewiseDensity, piecewise_density
from mdm_jax.variance.transform import VarianceTransform

_NUM_CELLS = 256
_NODES = 8


def ppots_parametric(
    parameters: EprParameters | Sequence[float], floor: float = 0.1
) -> VarianceTransform:
    """Levels from the seven-parameter curve of P-POTS, fitted by :func:`~mdm_jax.variance.fit_epr`.

    The curve is integrated over 256 equal cells of the masking rate m = 1 - u, and those cells are
    both sampled and paid for. The published engine samples uniformly inside the cells of a grid,
    pays for a density interpolated between the grid's points, and never draws the rates beyond its
    first and last point: three faults that this form cannot have.

    Keeps: E[weight f(u)] = int f. Couples: nothing. Costs: one view.
    Removes: what the curve captures of the optimal density. Bias: exact.
    Reference: P-POTS, arXiv 2511.18159, and the "EPR" family of its code.

    Args:
        parameters: of the curve; seven numbers in the order of ``EprParameters``.
        floor: share of uniform levels, in (0, 1]; bounds the weights by ``1 / floor``.

    Raises:
        ValueError: if the number or the range of the parameters or the floor is wrong.
    """
    density = epr_density(parameters, floor)
    return importance(density)._replace(name="ppots_parametric")


def epr_density(parameters: EprParameters | Sequence[float], floor: float) -> PiecewiseDensity:
    """The density of :func:`ppots_parametric`; arguments and errors as there."""
    check_floor("ppots_parametric", floor)
    parameters = tuple(parameters)
    if len(parameters) != len(EprParameters._fields):
        raise ValueError(
            f"ppots_parametric needs the numbers {', '.join(EprParameters._fields)}, "
            f"got {len(parameters)} of them"
        )
    p = EprParameters(*map(float, parameters))
    if not (
        np.all(np.isfinite(p)) and min(p) >= 0 and min(p.high_power, p.low_power, p.mean_power) >= 1
    ):
        raise ValueError(f"ppots_parametric: scales and growth are positive, powers >= 1; got {p}")
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    edges = np.linspace(0.0, 1.0, _NUM_CELLS + 1)
    places = edges[:-1, None] + (nodes + 1) / 2 / _NUM_CELLS
    shares = epr_curve(p, 1.0 - places) @ weights
    shares = shares / shares.sum()
    return piecewise_density(edges, (1.0 - floor) * shares + floor / _NUM_CELLS)
