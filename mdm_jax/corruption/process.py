"""Corruption processes: deterministic functions of (clean row, logSNR, base noise)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.types import Array


class Corrupted(NamedTuple):
    """A corrupted batch.

    Attributes:
        inputs: [..., L] network inputs.
        target_mask: [..., L] bool, elements that carry a loss.
        log_weight: [..., S] log factor on the sum of the targets' losses that makes it an unbiased
            estimate of the level's loss under a uniform masking rate.
        element_log_weight: [..., L] log factor on each element's own loss, or None.
    """

    inputs: Array
    target_mask: Array
    log_weight: Array
    element_log_weight: Array | None = None


class Corruption(NamedTuple):
    """A forward process as pure functions.

    Attributes:
        corrupt: ``corrupt(x [..., L], logsnr [..., S], noise [..., *event_shape(L)], eligible [...,
            L] bool, level_ids=None) -> Corrupted``; ``level_ids`` [..., L] int32 is each element's
            level, by default S contiguous segments of equal length.
        event_shape: ``event_shape(L)`` of the base noise of one row.
        mask_id: the mask token, or None.
        bias: label (``types.BIAS_LABELS``) of the bound estimated with the process's own weights.
        rates: (low, high) masking rates that a law must cover exactly; None: any law.
    """

    name: str
    corrupt: Callable[..., Corrupted]
    event_shape: Callable[[int], tuple[int, ...]]
    mask_id: int | None
    bias: str = "exact"
    rates: tuple[float, float] | None = None


def spread_levels(values: Array, length: int, level_ids: Array | None = None) -> Array:
    """Per-level values [..., S] as [..., L]; ValueError if S does not divide L (no level_ids)."""
    if level_ids is None:
        return jnp.repeat(values, _segment_length(length, values.shape[-1]), axis=-1)
    shape = jnp.broadcast_shapes(values.shape[:-1], level_ids.shape[:-1])
    ids = jnp.broadcast_to(level_ids, (*shape, length))
    return jnp.take_along_axis(jnp.broadcast_to(values, (*shape, values.shape[-1])), ids, axis=-1)


def sum_levels(values: Array, num_levels: int, level_ids: Array | None = None) -> Array:
    """Per-element values [..., L] summed per level, [..., S]; the adjoint of ``spread_levels``."""
    if level_ids is None:
        size = _segment_length(values.shape[-1], num_levels)
        return values.reshape(*values.shape[:-1], num_levels, size).sum(-1)
    values, level_ids = jnp.broadcast_arrays(values, level_ids)
    one_hot = jax.nn.one_hot(level_ids, num_levels, dtype=values.dtype)
    return jnp.einsum("...l,...ls->...s", values, one_hot)


def _segment_length(length: int, num_levels: int) -> int:
    if length % num_levels:
        raise ValueError(
            f"{num_levels} noise levels do not divide a row of {length} elements evenly; "
            "choose a divisor or pass level_ids"
        )
    return length // num_levels
