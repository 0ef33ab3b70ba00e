"""Levels from a part of the interval that is chosen anew during training."""

from typing import NamedTuple

import jax.numpy as jnp

from mdm_jax.draws import Draw, DrawSpec
from mdm_jax.typing import Array, PyTree
from mdm_jax.variance.clipped import ClippedDensity, check_range
from mdm_jax.variance.quantile_density import density_profile, warp
from mdm_jax.variance.transform import Phase, VarianceTransform

_NAME = "clipped_adaptive"


class ClipRange(NamedTuple):
    """The range in use, [] float32 masking rates."""

    low: Array
    high: Array


def clipped_adaptive(low: float = 1e-3, high: float = 1.0) -> VarianceTransform:
    """:func:`~mdm_jax.variance.clipped` with its range in the state instead of in the code.

    Whoever chooses a range, ``evaluation.search_clipping`` on held-out data for instance, writes it
    with :func:`set_clip_range`; the step is not compiled again and the range is in the checkpoint.

    Keeps: ``int_low^high g(m) dm``, the bound's part in the range in use; the objective moves with
    it. Couples: nothing. Costs: one view.
    Removes: what the rates outside contribute, to the variance *and* to the bound.
    Bias: truncated.
    Reference: Arriola et al. 2025 (BD3-LM), data-driven clipping.

    Args:
        low: smallest masking rate until a range is chosen.
        high: largest masking rate until then.

    Raises:
        ValueError: unless 0 <= low < high <= 1.
    """
    check_range(_NAME, low, high)

    def init(_spec: DrawSpec) -> ClipRange:
        return ClipRange(jnp.float32(low), jnp.float32(high))

    def draw(_key: Array, state: ClipRange, current: Draw, _spec: DrawSpec) -> Draw:
        return warp(current, ClippedDensity(*state))

    return VarianceTransform(
        name=_NAME,
        phase=Phase.WARP,
        init=init,
        draw=draw,
        update=lambda state, _draw, _stats: state,
        bias="truncated",
        profile=lambda state, u: density_profile(ClippedDensity(*state), u),
    )


def set_clip_range(state: PyTree, low: float, high: float) -> PyTree:
    """The state of :func:`clipped_adaptive`, or of a chain with it, with another range.

    Raises:
        ValueError: unless 0 <= low < high <= 1, or if the chain has no such member.
    """
    check_range("set_clip_range", low, high)
    if isinstance(state, ClipRange):
        return ClipRange(jnp.float32(low), jnp.float32(high))
    if not isinstance(state, dict) or _NAME not in state:
        raise ValueError(
            f"set_clip_range needs the state of clipped_adaptive() or of a chain that holds it, "
            f"got {type(state).__name__}"
            + (f" with {', '.join(state)}" if isinstance(state, dict) else "")
        )
    return state | {_NAME: set_clip_range(state[_NAME], low, high)}
