"""Attention by name: one interface over the implementations in ``attention_kernels``."""

from collections.abc import Callable

import jax

from mdm_jax.models.attention_kernels import (
    cudnn_attention,
    cudnn_obstacle,
    einsum_attention,
    recompute_attention,
    splash_attention,
    splash_obstacle,
    xla_attention,
)
from mdm_jax.models.masks import AnyRule, CachedRule, as_rule
from mdm_jax.types import Array

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
    """Scaled dot-product attention, ``softmax(q k / sqrt(D)) v`` under a mask.

    Args:
        q: [N, Q, H, D] queries.
        k, v: [N, M, H, D] keys and values, of the same dtype.
        mask: a rule of ``models.masks``, a boolean array [N or 1, 1 or H, Q, M], or None.
        implementation: a name of ``IMPLEMENTATIONS``, or "auto" for :func:`best`.

    Returns:
        [N, Q, H, D] in the dtype of ``q``; the softmax is float32.

    Raises:
        ValueError: for an unknown name, a mask of other sizes, or a named implementation that does
            not work here.
    """
    rule = as_rule(mask, q.shape[1], k.shape[1])
    name = best(q, k, rule) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {CHOICES}, got {implementation!r}")
    return IMPLEMENTATIONS[name](q, k, v, rule)


def best(q: Array, k: Array, rule: AnyRule) -> str:
    """Name of the implementation that "auto" selects on the backend of this process.

    "recompute" on CPUs (measured); "cudnn" on GPUs and "splash" on TPUs where they support these
    operands and this rule, else "einsum".
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "recompute"
    if backend == "gpu" and cudnn_obstacle(q, k, rule) is None:
        return "cudnn"
    if backend == "tpu" and not isinstance(rule, CachedRule) and not splash_obstacle(q, k, rule):
        return "splash"
    return "einsum"
