"""Attention out of plain products, whole or a few rows at a time.

Probabilities are float32 (float64 for float64 operands); products are those of
:mod:`mdm_jax.models.products`. Queries, keys and values are put head first, [N, H, L, D], which on
CPUs is faster than letting every product transpose them.

Attention by the functions of ``jax.nn``: XLA's and, on NVIDIA GPUs, cuDNN's fused kernel.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mdm_jax.models.masks import AnyRule, BlockCausal, BlockTraining, CachedRule, Rule
from mdm_jax.models.products import product
from mdm_jax.sharding import num_parts
from mdm_jax.types import Array

SCORES_AT_ONCE = 2**19
"""Scores that :func:`recompute_attention` holds at a time; 2 MiB of float32 stay in a cache."""

_KEPT = "attention"  # arrays of a number of each query, or of D: what a backward pass may keep


def einsum_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """All rows at once. Block training runs in halves, without the [2L, 2L] product.

    Args and result as :func:`mdm_jax.models.attention.attention`.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if isinstance(rule, Rule) and isinstance(rule.pattern, BlockTraining):
        y = _block_training(q, k, v, rule)
    else:
        y = _attend(q, k, v, _mask(rule))
    return jnp.swapaxes(y, 1, 2)


def recompute_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """A few rows at a time, with the probabilities computed anew in the backward pass.

    So no array of all scores [N, H, Q, M] ever exists. Where all of them are few, and for cached
    decoding, which nobody differentiates, this is :func:`einsum_attention`. On a mesh every step
    takes rows from every device, so that no row moves.

    Args and result as :func:`mdm_jax.models.attention.attention`.
    """
    rows, heads = q.shape[0], q.shape[2]
    parts = num_parts(rows, "batch")
    scores = heads * q.shape[1] * k.shape[1] // num_parts(heads, "heads")
    own = rows // parts
    fitting = max(1, min(own, SCORES_AT_ONCE // scores))
    at_once = max(n for n in range(1, fitting + 1) if own % n == 0)
    if at_once == own or isinstance(rule, CachedRule):
        return einsum_attention(q, k, v, rule)

    def cut(x: Array) -> Array:  # [steps, parts * at_once, ...], every part from its own rows
        x = x if x.shape[0] == rows else jnp.broadcast_to(x, (rows, *x.shape[1:]))
        x = x.reshape(parts, own // at_once, at_once, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, parts * at_once, *x.shape[3:])

    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    some = jax.checkpoint(einsum_attention, prevent_cse=False, policy=policy)
    y = jax.lax.map(lambda each: some(*each), jax.tree.map(cut, (q, k, v, rule)))
    y = y.reshape(own // at_once, parts, at_once, *q.shape[1:])
    return jnp.swapaxes(y, 0, 1).reshape(q.shape)


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """[N, H, Q, D] from keys and values [N, H, M, D] and a mask [N or 1, 1 or H, Q, M]."""
    (powers,), total = _powers([_scores("nhqd,nhkd->nhqk", q, k, mask)])
    return _normalised(product("nhqk,nhkd->nhqd", powers.astype(v.dtype), v), total).astype(q.dtype)


def _block_training(q: Array, k: Array, v: Array, rule: Rule) -> Array:
    length, size = rule.pattern.length, rule.pattern.block_size
    places, clean_places = jnp.arange(length), length + jnp.arange(length)
    (q, q_clean), (k, k_clean), (v, v_clean) = (jnp.split(x, 2, axis=2) for x in (q, k, v))
    clean = _attend(q_clean, k_clean, v_clean, rule.between(clean_places, clean_places)[:, None])

    earlier = rule.between(places, clean_places)[:, None]
    before = _scores("nhqd,nhkd->nhqk", q, k_clean, earlier)
    blocks = (*q.shape[:2], length // size, size, q.shape[-1])
    same = None
    numbers = rule.segments()
    if numbers is not None:
        numbers = numbers[:, None, :length].reshape(-1, 1, length // size, size)
        same = numbers[..., :, None] == numbers[..., None, :]
    own = _scores("nhbqd,nhbkd->nhbqk", q.reshape(blocks), k.reshape(blocks), same)
    own = own.reshape(*q.shape[:2], length, size)
    (before, own), total = _powers([before, own])
    y = product("nhqk,nhkd->nhqd", before.astype(v.dtype), v_clean)
    own = own.astype(v.dtype).reshape(*blocks[:3], size, size)
    y = y + product("nhbqk,nhbkd->nhbqd", own, v.reshape(blocks)).reshape(y.shape)
    noised = _normalised(y, total)
    return jnp.concatenate([noised.astype(clean.dtype), clean], axis=2)


def _scores(spec: str, q: Array, k: Array, mask: Array | None) -> Array:
    scores = product(spec, q, k) * q.shape[-1] ** -0.5
    # Far below all scores, but finite: rows of a user's mask may be empty.
    return scores if mask is None else jnp.where(mask, scores, -1e30)


def _powers(scores: list[Array]) -> tuple[list[Array], Array]:
    """One softmax over the last axes of several arrays, not yet divided by its total."""
    # The result does not depend on what is subtracted.
    top = [jnp.max(jax.lax.stop_gradient(s), axis=-1, keepdims=True) for s in scores]
    top = checkpoint_name(functools.reduce(jnp.maximum, top), _KEPT)
    powers = [jnp.exp(s - top) for s in scores]
    return powers, checkpoint_name(sum(jnp.sum(p, axis=-1, keepdims=True) for p in powers), _KEPT)


def _normalised(y: Array, total: Array) -> Array:
    # After the product with the values there are D numbers of a query to divide instead of M.
    return checkpoint_name(y, _KEPT) / total


def _mask(rule: AnyRule) -> Array | None:
    return None if isinstance(rule, Rule) and rule.is_everything() else rule.dense()


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
