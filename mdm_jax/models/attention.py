"""Attention: one interface, an implementation for every machine."""

from collections.abc import Callable

import jax

from mdm_jax.models.attention_kernels import (
    cudnn_attention,
    cudnn_obstacle,
    einsum_attention,
    recompute_attention,
    xla_attention,
)
from mdm_jax.models.masks import AnyRule, CachedRule, as_rule
from mdm_jax.types import Array


def splash_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """:func:`mdm_jax.models.attention_splash.splash_attention`, imported when it is wanted."""
    from mdm_jax.models import attention_splash  # Pallas takes 0.2 s that only TPUs need

    return attention_splash.splash_attention(q, k, v, rule)


IMPLEMENTATIONS: dict[str, Callable[[Array, Array, Array, AnyRule], Array]] = {
    "einsum": einsum_attention,
    "recompute": recompute_attention,
    "xla": xla_attention,
    "cudnn": cudnn_attention,
    "splash": splash_attention,
}
"""By name. All give the same result, up to rounding, for every rule that they accept."""

CHOICES = ("auto", *IMPLEMENTATIONS)
"""Values of ``TransformerConfig.attention``."""


def attention(
    q: Array, k: Array, v: Array, mask: AnyRule | Array | None = None, implementation: str = "auto"
) -> Array:
    """``softmax(q k / sqrt(D)) v`` over the keys that a query may see.

    Args:
        q: [N, Q, H, D] queries.
        k, v: [N, M, H, D] keys and values, of the same dtype.
        mask: a rule (:mod:`mdm_jax.models.attention_masks`), a boolean array [N or 1, 1 or H, Q,
            M], or None for everywhere.
        implementation: a name of ``IMPLEMENTATIONS``; "auto" for the best that works here, see
            :func:`best`.

    Returns:
        [N, Q, H, D] in the dtype of ``q``; the softmax is float32.

    Raises:
        ValueError: for an unknown name, a mask of other sizes, or an implementation asked for by
            name that cannot do it here.
    """
    rule = as_rule(mask, q.shape[1], k.shape[1])
    name = best(q, k, rule) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {CHOICES}, got {implementation!r}")
    return IMPLEMENTATIONS[name](q, k, v, rule)


def best(q: Array, k: Array, rule: AnyRule) -> str:
    """Name of the implementation that "auto" stands for, on the backend of this process.

    On CPUs "recompute", which was measured; on GPUs "cudnn" and on TPUs "splash" where they work,
    for these operands and this rule, and "einsum" otherwise.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "recompute"
    if backend == "gpu" and cudnn_obstacle(q, k, rule) is None:
        return "cudnn"
    if backend == "tpu" and not isinstance(rule, CachedRule):
        from mdm_jax.models.attention_splash import splash_obstacle

        return "einsum" if splash_obstacle(q, k, rule) else "splash"
    return "einsum"
