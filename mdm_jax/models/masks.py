"""Attention masks as rules, made into boolean arrays only where an implementation needs them.

A pattern is the static part: ``allows(queries, keys)`` for broadcasting integer indices (NumPy or
JAX), and ``shape`` (their numbers). A rule adds documents: attention stays within one; padding
(document 0) attends to itself alone. Every position attends to itself, so no softmax is empty. A
window counts blocks: block b attends to b - window + 1 .. b (banded attention, Child et al. 2019).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import is_concrete
from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array, ArrayLike


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Full:
    """Every query attends to every key."""

    shape: tuple[int, int]

    def allows(self, queries: Array, keys: Array) -> np.ndarray:
        return np.ones(np.broadcast_shapes(queries.shape, keys.shape), bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """A position attends to its own block of ``block_size`` tokens and those before it."""

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def allows(self, queries: Array, keys: Array) -> Array:
        distance = queries // self.block_size - keys // self.block_size
        return (distance >= 0) & _within(distance, self.window)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockTraining:
    """Noised blocks attend to themselves and earlier clean ones, clean blocks to clean ones.

    The first ``length`` of 2L positions are the noised row, the other L the clean one.
    """

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return 2 * self.length, 2 * self.length

    def allows(self, queries: Array, keys: Array) -> Array:
        from_clean, to_clean = queries >= self.length, keys >= self.length
        length, size = self.length, self.block_size
        distance = queries % length // size - keys % length // size
        own = ~from_clean & ~to_clean & (distance == 0)
        earlier = ~from_clean & to_clean & (distance > 0)
        clean = from_clean & to_clean & (distance >= 0)
        return own | ((earlier | clean) & _within(distance, self.window))


Pattern = Full | BlockCausal | BlockTraining


def check_blocks(length: int, block_size: int, window: int | None = None) -> int:
    """The number of blocks in a row; ValueError if they do not divide it or the window is empty."""
    if block_size < 1 or length < 1 or length % block_size:
        raise ValueError(
            f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
            "divisor of the length, or pad the row to a multiple of the block size"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least 1 block (its own), got {window}")
    return length // block_size


def check_document_blocks(documents: Array | None, block_size: int) -> None:
    """Raise ValueError if documents [N, L], where known here, share a row and begin inside blocks.

    Such blocks differ from those of the document in a row of its own. The first document of a row
    may begin anywhere.
    """
    if documents is None or not is_concrete(documents):
        return
    if not getattr(documents, "is_fully_addressable", True):  # spread over processes
        return
    documents = np.asarray(documents)
    before = np.pad(documents[:, :-1], ((0, 0), (1, 0)))
    begins = (documents > 0) & (documents != before) & (np.maximum.accumulate(before, 1) > 0)
    inside = np.argwhere(begins & (np.arange(documents.shape[1]) % block_size > 0))
    if len(inside):
        row, column = inside[0].tolist()
        raise ValueError(
            f"document {documents[row, column]} of row {row} begins at position {column}, inside a "
            f"block of {block_size} tokens; pack documents with align={block_size} (data.align), "
            "or give each a row of its own"
        )


@pytree_dataclass
class Rule:
    """A static pattern within documents [N, L] int32, 0 for padding; None for a single one."""

    pattern: Pattern
    documents: Array | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.pattern.shape

    def is_full(self) -> bool:
        """Whether nothing is masked."""
        return isinstance(self.pattern, Full) and self.documents is None

    def segments(self) -> Array | None:
        """[N, L] int32: attention stays within equal numbers; each padding has one of its own."""
        if self.documents is None:
            return None
        return _segments(self.documents, jnp.arange(self.documents.shape[-1]))

    def between(self, queries: Array, keys: Array) -> Array:
        """[N or 1, Q, M] bool, for the queries [Q] and keys [M] of these indices."""
        allowed = jnp.asarray(self.pattern.allows(queries[:, None], keys[None]))[None]
        segments = self.segments()
        if segments is None:
            return allowed
        return allowed & (segments[:, queries, None] == segments[:, None, keys])

    def dense(self) -> Array:
        """The boolean mask [N or 1, 1, Q, M], True where a query may attend to a key."""
        return self.between(*map(jnp.arange, self.shape))[:, None]


@pytree_dataclass
class CachedRule:
    """Block-causal attention of new tokens to cached ones, in any order, and to each other.

    Positions in the row are [Q] and [M], negative for an empty slot; documents [N, Q] and [N, M]
    int32, 0 for padding.
    """

    pattern: BlockCausal
    query_positions: Array
    key_positions: Array
    query_documents: Array
    key_documents: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.query_positions.shape[0], self.key_positions.shape[0]

    def dense(self) -> Array:
        """The boolean mask [N, 1, Q, M]."""
        queries, keys = self.query_positions, self.key_positions
        allowed = self.pattern.allows(queries[:, None], keys[None]) & (keys >= 0)[None]
        query_segments = _segments(self.query_documents, queries)
        key_segments = _segments(self.key_documents, keys)
        return (allowed[None] & (query_segments[:, :, None] == key_segments[:, None]))[:, None]


@pytree_dataclass
class DenseRule:
    """A boolean array ``mask`` [N or 1, 1 or H, Q, M] as a rule."""

    mask: Array

    @property
    def shape(self) -> tuple[int, int]:
        return self.mask.shape[-2:]

    def dense(self) -> Array:
        return self.mask


AnyRule = Rule | CachedRule | DenseRule


def as_rule(mask: AnyRule | Array | None, num_queries: int, num_keys: int) -> AnyRule:
    """A rule from a rule, a boolean array, or None for no mask; ValueError if sizes differ."""
    if mask is None:
        return Rule(Full((num_queries, num_keys)), None)
    rule = mask if isinstance(mask, AnyRule) else DenseRule(mask)
    if tuple(rule.shape) != (num_queries, num_keys):
        raise ValueError(
            f"a mask for {rule.shape[0]} queries and {rule.shape[1]} keys does not fit "
            f"{num_queries} queries and {num_keys} keys (cached and new ones)"
        )
    return rule


def within_documents(documents: Array) -> Rule:
    """Bidirectional attention within documents [N, L] int32, 0 for padding."""
    length = documents.shape[-1]
    return Rule(Full((length, length)), documents)


def causal(length: int, window: int | None = None, documents: Array | None = None) -> Rule:
    """Attention to a position itself and those before it: blocks of one token."""
    return block_causal(length, 1, window, documents)


def block_causal(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Rule:
    """Attention to a position's own block and those before it, ``window`` of them at most.

    ValueError unless ``block_size`` L' divides ``length`` L and ``window`` >= 1; documents [N, L].
    """
    check_blocks(length, block_size, window)
    return Rule(BlockCausal(length, block_size, window), documents)


def block_training(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Rule:
    """All blocks of a block diffusion model in one pass, over 2L positions: noised row, clean row.

    Noised block b attends to itself and the clean blocks before b, clean block b to the clean
    blocks up to b: the noised outputs are those of a loop over [clean blocks before b, noised block
    b]. Arguments and errors as :func:`block_causal`. With N = L / L' blocks, no window or
    documents, ``L'^2 (N + N^2)`` pairs are allowed. Reference: Arriola et al. 2025 (BD3-LM).
    """
    check_blocks(length, block_size, window)
    if documents is not None:
        documents = jnp.concatenate([documents, documents], axis=-1)
    return Rule(BlockTraining(length, block_size, window), documents)


def annealed(rule: Rule, positions: np.ndarray, share: ArrayLike, key: Array) -> DenseRule:
    """A rule whose later tokens become visible at random, on the way from causal to bidirectional.

    Of the pairs that the rule allows, those of a query and a key of a later position are kept with
    probability ``share``, drawn once for all rows, heads and layers: at share 0 the rule is causal,
    at 1 unchanged, and for one key what is visible stays so as the share grows. The positions [M]
    are those of queries and keys in the row. Reference: Gong et al. 2024 (DiffuLLaMA), attention
    mask annealing.
    """
    later = positions[None] > positions[:, None]
    drawn = jax.random.uniform(key, later.shape) < share
    return DenseRule(rule.dense() & (drawn | ~later)[None, None])


def _within(distance: Array, window: int | None) -> Array | bool:
    return True if window is None else distance < window


def _segments(documents: Array, positions: Array) -> Array:
    # Documents are numbered from 1; a padding position gets a number that no other position has.
    return jnp.where(documents == 0, -1 - positions[None], documents)
