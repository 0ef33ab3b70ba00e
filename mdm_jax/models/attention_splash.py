"""Attention by the splash kernel of JAX for TPUs, which skips blocks that a rule hides.

It has not run on a TPU yet: tests compare it with the dense mask in Pallas' interpret mode.
"""

import functools

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from mdm_jax.models.attention_kernels import einsum_attention
from mdm_jax.models.masks import AnyRule, CachedRule, Pattern, Rule
from mdm_jax.sharding import on_each_part
from mdm_jax.types import Array

LANES = 128
"""Queries and keys come in multiples of this."""


class PatternMask(splash.Mask):
    """A pattern as the kernel reads it when it is built, block by block and never whole."""

    def __init__(self, pattern: Pattern):
        self.pattern = pattern

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.pattern.shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (np.arange(size)[part] for size, part in zip(self.shape, index))
        return np.asarray(self.pattern.sees(queries[:, None], keys[None]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatternMask) and self.pattern == other.pattern

    def __hash__(self) -> int:
        return hash((type(self), self.pattern))


def splash_attention(q: Array, k: Array, v: Array, rule: AnyRule, interpret: bool = False) -> Array:
    """The kernel, row by row of the batch and device by device; documents are its segments.

    Cached decoding, which has few queries at places known only when it runs, is left to
    :func:`~mdm_jax.models.attention_einsum.einsum_attention`.

    Args and result as :func:`mdm_jax.models.attention.attention`.

    Raises:
        ValueError: where the kernel does not work; the message says why.
    """
    if isinstance(rule, CachedRule):
        return einsum_attention(q, k, v, rule)
    reason = splash_obstacle(q, k, rule, interpret)
    if reason is not None:
        raise ValueError(
            f'attention "splash" {reason}; choose "auto", which falls back where it must, or '
            '"einsum"'
        )

    def run(q: Array, k: Array, v: Array, *numbers: Array) -> Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([PatternMask(rule.pattern)] * q.shape[1]),
            block_sizes=_block_sizes(*rule.shape),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        return jax.vmap(kernel)(q, k, v, *(splash.SegmentIds(ids, ids) for ids in numbers))

    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    numbers = () if rule.documents is None else (rule.segments(),)
    names = (("batch", "heads", None, None),) * 3 + (("batch", None),)
    return on_each_part(run, names, q, k, v, *numbers).swapaxes(1, 2).astype(q.dtype)


def splash_obstacle(q: Array, k: Array, rule: AnyRule, interpret: bool = False) -> str | None:
    """Why the kernel cannot be used for these operands, or None where it can."""
    if not interpret and jax.default_backend() != "tpu":
        return f"needs a TPU, and this process runs on {jax.default_backend()}"
    if not isinstance(rule, Rule):
        return "needs a rule of models.attention_masks, not a boolean array"
    if q.shape[1] % LANES or k.shape[1] % LANES:
        return (
            f"needs numbers of queries and keys in multiples of {LANES}, got {q.shape[1]} and "
            f"{k.shape[1]}"
        )
    return None


@functools.cache
def _block_sizes(num_queries: int, num_keys: int) -> splash.BlockSizes:
    queries, keys = (
        max(n for n in (128, 256, 512) if size % n == 0) for size in (num_queries, num_keys)
    )
    return splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=keys,
        block_q_dq=queries,
        block_kv_dq=keys,
    )
