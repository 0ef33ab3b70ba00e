"""Attention by the functions of ``jax.nn``: XLA's and, on NVIDIA GPUs, cuDNN's fused kernel."""

import jax
import jax.numpy as jnp

from mdm_jax.models.attention_masks import AnyRule, Rule
from mdm_jax.models.attention_patterns import BlockCausal
from mdm_jax.typing import Array


def xla_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """``jax.nn.dot_product_attention`` as XLA compiles it, under the dense mask.

    Args and result as :func:`mdm_jax.models.attention.attention`.
    """
    return jax.nn.dot_product_attention(q, k, v, **_dense(rule), implementation="xla")


def cudnn_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """cuDNN's fused kernel, which never holds the probabilities.

    Causal rules without documents are told to the kernel by name; others become one array [N or 1,
    1, Q, M] that all heads share.

    Args and result as :func:`mdm_jax.models.attention.attention`.

    Raises:
        ValueError: where the kernel does not work; the message says why.
    """
    reason = cudnn_obstacle(q, k, rule)
    if reason is not None:
        raise ValueError(
            f'attention "cudnn" {reason}; choose "auto", which falls back where it must, or '
            '"einsum"'
        )
    pattern = rule.pattern if isinstance(rule, Rule) and rule.documents is None else None
    if isinstance(pattern, BlockCausal) and pattern.block_size == 1:
        window = None if pattern.window is None else (pattern.window - 1, 0)
        masking = {"is_causal": True, "local_window_size": window}
    else:
        masking = _dense(rule)
    return jax.nn.dot_product_attention(q, k, v, **masking, implementation="cudnn")


def cudnn_obstacle(q: Array, k: Array, rule: AnyRule) -> str | None:
    """Why cuDNN's kernel cannot be used for these operands, or None where it can."""
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and this process runs on {jax.default_backend()}"
    # "8.0" on CUDA; names such as "gfx90a" on other GPUs.
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, got {capability or 'none'}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs operands in bfloat16 or float16 (TransformerConfig.dtype), got {q.dtype}"
    size, largest = q.shape[-1], 256 if int(major) >= 9 else 128
    if size % 8 or size > largest:
        return f"needs a head size that is a multiple of 8 up to {largest}, got {size}"
    masked = not (isinstance(rule, Rule) and rule.is_everything())
    if masked and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"needs even numbers of queries and keys, got {q.shape[1]} and {k.shape[1]}"
    return None


def _dense(rule: AnyRule) -> dict[str, Array]:
    return {} if isinstance(rule, Rule) and rule.is_everything() else {"mask": rule.dense()}
