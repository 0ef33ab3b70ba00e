"""Attention by name: matrix products, XLA, cuDNN and the splash kernel for TPUs.

All take queries q [N, Q, H, D], keys and values k, v [N, M, H, D] and a mask rule, and agree up to
rounding.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mdm_jax.distributed import compute_capability, platform
from mdm_jax.models.masks import (
    AnyRule,
    BlockCausal,
    BlockTraining,
    CachedRule,
    Pattern,
    Rule,
    as_rule,
)
from mdm_jax.models.products import product
from mdm_jax.sharding import map_shards, num_shards
from mdm_jax.types import Array

SCORES_AT_ONCE = 2**18
"""Scores that :func:`recompute_attention` holds at a time; 1 MiB of float32 fits into a cache."""

SPLASH_LANES = 128
"""The splash kernel takes queries and keys in multiples of this."""

_KEPT = "attention"  # arrays [N, H, Q, 1 or D], which a backward pass may keep


def einsum_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """Attention by matrix products over all rows at once.

    Probabilities are float32 (float64 for float64 operands), products those of ``models.products``.
    Block training runs in halves, without the [2L, 2L] product.
    """
    # Heads first, which on CPUs is faster than a transpose inside every product.
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if isinstance(rule, Rule) and isinstance(rule.pattern, BlockTraining):
        y = _block_training(q, k, v, rule)
    else:
        y = _attend(q, k, v, _dense_mask(rule))
    return jnp.swapaxes(y, 1, 2)


def recompute_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """Attention by matrix products over a few rows at a time; the backward pass recomputes.

    No array of all scores [N, H, Q, M] exists. With few scores, or for cached decoding, this is
    :func:`einsum_attention`. On a mesh a step takes rows of every device, so that no row moves.
    """
    rows, heads = q.shape[0], q.shape[2]
    shards = num_shards(rows, "batch")
    scores = heads * q.shape[1] * k.shape[1] // num_shards(heads, "heads")
    shard_rows = rows // shards
    at_most = max(1, min(shard_rows, SCORES_AT_ONCE // scores))
    at_once = max(n for n in range(1, at_most + 1) if shard_rows % n == 0)
    if at_once == shard_rows or isinstance(rule, CachedRule):
        return einsum_attention(q, k, v, rule)

    def split(x: Array) -> Array:  # [steps, shards * at_once, ...], each shard from its own rows
        x = x if x.shape[0] == rows else jnp.broadcast_to(x, (rows, *x.shape[1:]))
        x = x.reshape(shards, shard_rows // at_once, at_once, *x.shape[1:])
        return jnp.swapaxes(x, 0, 1).reshape(-1, shards * at_once, *x.shape[3:])

    policy = jax.checkpoint_policies.save_only_these_names(_KEPT)
    attend = jax.checkpoint(einsum_attention, prevent_cse=False, policy=policy)
    y = jax.lax.map(lambda operands: attend(*operands), jax.tree.map(split, (q, k, v, rule)))
    y = y.reshape(shard_rows // at_once, shards, at_once, *q.shape[1:])
    return jnp.swapaxes(y, 0, 1).reshape(q.shape)


def _attend(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """[N, H, Q, D] from keys and values [N, H, M, D] and a mask [N or 1, 1 or H, Q, M]."""
    (weights,), total = _softmax([_scores("nhqd,nhkd->nhqk", q, k, mask)])
    y = product("nhqk,nhkd->nhqd", weights.astype(v.dtype), v)
    return _normalise(y, total).astype(q.dtype)


def _block_training(q: Array, k: Array, v: Array, rule: Rule) -> Array:
    length, size = rule.pattern.length, rule.pattern.block_size
    noised, clean = jnp.arange(length), length + jnp.arange(length)
    (q, q_clean), (k, k_clean), (v, v_clean) = (jnp.split(x, 2, axis=2) for x in (q, k, v))
    clean_y = _attend(q_clean, k_clean, v_clean, rule.between(clean, clean)[:, None])

    earlier = _scores("nhqd,nhkd->nhqk", q, k_clean, rule.between(noised, clean)[:, None])
    blocks = (*q.shape[:2], length // size, size, q.shape[-1])
    same_document, segments = None, rule.segments()
    if segments is not None:
        segments = segments[:, None, :length].reshape(-1, 1, length // size, size)
        same_document = segments[..., :, None] == segments[..., None, :]
    own = _scores("nhbqd,nhbkd->nhbqk", q.reshape(blocks), k.reshape(blocks), same_document)
    own = own.reshape(*q.shape[:2], length, size)
    (earlier, own), total = _softmax([earlier, own])
    y = product("nhqk,nhkd->nhqd", earlier.astype(v.dtype), v_clean)
    own = own.astype(v.dtype).reshape(*blocks[:3], size, size)
    y = y + product("nhbqk,nhbkd->nhbqd", own, v.reshape(blocks)).reshape(y.shape)
    noised_y = _normalise(y, total)
    return jnp.concatenate([noised_y.astype(clean_y.dtype), clean_y], axis=2)


def _scores(spec: str, q: Array, k: Array, mask: Array | None) -> Array:
    scores = product(spec, q, k) * q.shape[-1] ** -0.5
    # Far below all scores, but finite: a user's mask may have empty rows.
    return scores if mask is None else jnp.where(mask, scores, -1e30)


def _softmax(scores: list[Array]) -> tuple[list[Array], Array]:
    """One softmax over the last axes of several arrays, not yet divided by its total."""
    # The result does not depend on what is subtracted.
    top = [_largest(jax.lax.stop_gradient(s)) for s in scores]
    top = checkpoint_name(functools.reduce(jnp.maximum, top), _KEPT)
    weights = [jnp.exp(s - top) for s in scores]
    total = sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    return weights, checkpoint_name(total, _KEPT)


def _largest(scores: Array) -> Array:
    """Maxima over the last axis, which is kept."""
    # The CPU's compiler compares numbers of a row one by one, those of two arrays many at a time.
    while platform() == "cpu" and scores.shape[-1] >= 128 and scores.shape[-1] % 2 == 0:
        scores = jnp.maximum(*jnp.split(scores, 2, axis=-1))
    return jnp.max(scores, axis=-1, keepdims=True)


def _normalise(y: Array, total: Array) -> Array:
    # After the product with the values there are D numbers per query to divide instead of M.
    return checkpoint_name(y, _KEPT) / total


def _dense_mask(rule: AnyRule) -> Array | None:
    return None if isinstance(rule, Rule) and rule.is_full() else rule.dense()


def xla_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """``jax.nn.dot_product_attention`` by XLA, with the dense mask."""
    return jax.nn.dot_product_attention(q, k, v, mask=_dense_mask(rule), implementation="xla")


def cudnn_attention(q: Array, k: Array, v: Array, rule: AnyRule) -> Array:
    """cuDNN's fused kernel, which never stores the probabilities.

    Causal rules without documents use the kernel's causal mask; others a dense one
    [N or 1, 1, Q, M]. ValueError where :func:`cudnn_obstacle` gives a reason.
    """
    _check("cudnn", cudnn_obstacle(q, k, rule))
    pattern = rule.pattern if isinstance(rule, Rule) and rule.documents is None else None
    if isinstance(pattern, BlockCausal) and pattern.block_size == 1:
        window = None if pattern.window is None else (pattern.window - 1, 0)
        masking = {"is_causal": True, "local_window_size": window}
    else:
        masking = {"mask": _dense_mask(rule)}
    return jax.nn.dot_product_attention(q, k, v, **masking, implementation="cudnn")


def cudnn_obstacle(q: Array, k: Array, rule: AnyRule) -> str | None:
    """Why cuDNN's kernel cannot be used for these operands, or None."""
    if platform() != "gpu":
        return f"needs an NVIDIA GPU, and this is for a {platform()}"
    capability = compute_capability()  # "8.0" on CUDA; names such as "gfx90a" on other GPUs
    major = capability.partition(".")[0]
    if not major.isdigit() or int(major) < 8:
        return f"needs an NVIDIA GPU of compute capability 8.0 or more, got {capability or 'none'}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs operands in bfloat16 or float16 (TransformerConfig.dtype), got {q.dtype}"
    size, largest = q.shape[-1], 256 if int(major) >= 9 else 128
    if size % 8 or size > largest:
        return f"needs a head size that is a multiple of 8 up to {largest}, got {size}"
    masked = not (isinstance(rule, Rule) and rule.is_full())
    if masked and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"needs even numbers of queries and keys, got {q.shape[1]} and {k.shape[1]}"
    return None


def splash_attention(q: Array, k: Array, v: Array, rule: AnyRule, interpret: bool = False) -> Array:
    """JAX's splash kernel for TPUs, which skips masked blocks; documents are its segments.

    Runs device by device, row by row. Cached decoding (few queries at traced positions) uses
    :func:`einsum_attention`. Not yet run on a TPU, only in Pallas' interpret mode. ValueError where
    :func:`splash_obstacle` gives a reason.
    """
    if isinstance(rule, CachedRule):
        return einsum_attention(q, k, v, rule)
    _check("splash", splash_obstacle(q, k, rule, interpret))
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block_q, block_kv = (max(n for n in (128, 256, 512) if size % n == 0) for size in rule.shape)
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )

    def run(q: Array, k: Array, v: Array, *segments: Array) -> Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([pattern_mask(rule.pattern)] * q.shape[1]),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, *(splash.SegmentIds(ids, ids) for ids in segments))

    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    segments = () if rule.documents is None else (rule.segments(),)
    names = (("batch", "heads", None, None),) * 3 + (("batch", None),)
    return map_shards(run, names, q, k, v, *segments).swapaxes(1, 2).astype(q.dtype)


def splash_obstacle(q: Array, k: Array, rule: AnyRule, interpret: bool = False) -> str | None:
    """Why the splash kernel cannot be used for these operands, or None."""
    if not interpret and platform() != "tpu":
        return f"needs a TPU, and this is for a {platform()}"
    if not isinstance(rule, Rule):
        return "needs a rule of models.masks, not a boolean array"
    if q.shape[1] % SPLASH_LANES or k.shape[1] % SPLASH_LANES:
        return (
            f"needs numbers of queries and keys in multiples of {SPLASH_LANES}, got {q.shape[1]} "
            f"and {k.shape[1]}"
        )
    return None


def pattern_mask(pattern: Pattern):
    """A pattern as a lazily read mask of the splash kernel."""
    return _pattern_mask_class()(pattern)


@functools.cache
def _pattern_mask_class() -> type:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    class PatternMask(splash.Mask):
        def __init__(self, pattern: Pattern):
            self.pattern = pattern

        @property
        def shape(self) -> tuple[int, int]:
            return self.pattern.shape

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            queries, keys = (np.arange(size)[part] for size, part in zip(self.shape, index))
            return np.asarray(self.pattern.allows(queries[:, None], keys[None]))

        def __eq__(self, other: object) -> bool:
            return isinstance(other, PatternMask) and self.pattern == other.pattern

        def __hash__(self) -> int:
            return hash((type(self), self.pattern))

    return PatternMask


def _check(name: str, obstacle: str | None) -> None:
    if obstacle is not None:
        raise ValueError(
            f'attention "{name}" {obstacle}; choose "auto", which falls back where it must, or '
            '"einsum"'
        )


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
    """Scaled dot-product attention, ``softmax(q k / sqrt(D)) v`` under a mask, [N, Q, H, D].

    ``q`` [N, Q, H, D], ``k`` and ``v`` [N, M, H, D] have one dtype, also that of the result; the
    softmax is float32. The mask is a rule of ``models.masks``, a boolean array
    [N or 1, 1 or H, Q, M] or None, the implementation a name of ``IMPLEMENTATIONS`` or "auto"
    (:func:`best`). ValueError for another name, a mask of other sizes, or an implementation that
    does not work here.
    """
    rule = as_rule(mask, q.shape[1], k.shape[1])
    name = best(q, k, rule) if implementation == "auto" else implementation
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be one of {CHOICES}, got {implementation!r}")
    return IMPLEMENTATIONS[name](q, k, v, rule)


def best(q: Array, k: Array, rule: AnyRule) -> str:
    """Name of the implementation that "auto" selects for :func:`~mdm_jax.distributed.platform`.

    "recompute" on CPUs (measured); "cudnn" on GPUs, "splash" on TPUs where they work; else
    "einsum".
    """
    backend = platform()
    if backend == "cpu":
        return "recompute"
    if backend == "gpu" and cudnn_obstacle(q, k, rule) is None:
        return "cudnn"
    if backend == "tpu" and not isinstance(rule, CachedRule) and not splash_obstacle(q, k, rule):
        return "splash"
    return "einsum"
