"""Which places of a row see which, by their index alone: the static part of an attention rule.

A pattern is hashable and compares by its numbers; jit sees it as part of the structure of a rule.
``sees(queries, keys)`` takes integer arrays of numpy or of JAX that broadcast against each other.

Who may attend to whom, as rules that become arrays only where an implementation needs them.

A rule knows its queries and keys by index. ``rule.dense()`` is the boolean array [N or 1, 1,
queries, keys], True where a query may look; ``rule.between(queries, keys)`` is a part of it.
Whatever else it demands, a place always sees itself, so that no softmax runs over an empty set.
Document numbers are combined by "and": attention stays within one document, and padding (document
0) sees itself alone and is seen by nobody else.

A window counts blocks: block b sees blocks b - window + 1 to b. It bounds what a generator has to
remember, and rows of any length are treated alike (Child et al. 2019, banded attention).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.pytrees import pytree_dataclass
from mdm_jax.types import Array


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Everything:
    """Every query sees every key.

    Attributes:
        shape: numbers of queries and keys.
    """

    shape: tuple[int, int]

    def sees(self, queries: Array, keys: Array) -> np.ndarray:
        """True everywhere."""
        return np.ones(np.broadcast_shapes(queries.shape, keys.shape), bool)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockCausal:
    """A place sees its own block and the blocks before it.

    Attributes:
        length: L.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys, [L, L]."""
        return self.length, self.length

    def sees(self, queries: Array, keys: Array) -> Array:
        """Bool, whether a query sees a key."""
        distance = queries // self.block_size - keys // self.block_size
        seen = distance >= 0
        return seen if self.window is None else seen & (distance < self.window)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class BlockTraining:
    """Noised blocks see themselves and earlier clean ones, clean blocks the clean ones up to them.

    Attributes:
        length: L; the first L of 2L places are the noised row, the other L the clean one.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """

    length: int
    block_size: int
    window: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys, [2L, 2L]."""
        return 2 * self.length, 2 * self.length

    def sees(self, queries: Array, keys: Array) -> Array:
        """Bool, whether a query sees a key."""
        from_clean, to_clean = queries >= self.length, keys >= self.length
        row, size = self.length, self.block_size
        distance = queries % row // size - keys % row // size
        near = distance < (row if self.window is None else self.window)
        itself = ~from_clean & ~to_clean & (distance == 0)
        earlier = ~from_clean & to_clean & (distance > 0) & near
        history = from_clean & to_clean & (distance >= 0) & near
        return itself | earlier | history


Pattern = Everything | BlockCausal | BlockTraining


def check_blocks(length: int, block_size: int, window: int | None = None) -> int:
    """The number of blocks in a row.

    Raises:
        ValueError: if the block size does not divide the length or the window is below 1.
    """
    if block_size < 1 or length < 1 or length % block_size:
        raise ValueError(
            f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
            "divisor of the length, or pad the row to a multiple of the block size"
        )
    if window is not None and window < 1:
        raise ValueError(f"a window must hold at least 1 block (its own), got {window}")
    return length // block_size


@pytree_dataclass
class Rule:
    """A pattern of places, within documents.

    Attributes:
        pattern: which places see which by their index alone; static.
        documents: [N, L] int32 numbers of the queries, which are the keys too, 0 for padding; None
            for one whole document.
    """

    pattern: Pattern
    documents: Array | None

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.pattern.shape

    def is_everything(self) -> bool:
        """Whether nothing is hidden."""
        return isinstance(self.pattern, Everything) and self.documents is None

    def segments(self) -> Array | None:
        """[N, L] int32: who has the same number may see each other, padding its own place alone."""
        if self.documents is None:
            return None
        return _segments(self.documents, jnp.arange(self.documents.shape[-1]))

    def between(self, queries: Array, keys: Array) -> Array:
        """[N or 1, Q, M] bool, for the queries [Q] and keys [M] of these indices."""
        seen = jnp.asarray(self.pattern.sees(queries[:, None], keys[None]))[None]
        numbers = self.segments()
        if numbers is None:
            return seen
        return seen & (numbers[:, queries, None] == numbers[:, None, keys])

    def dense(self) -> Array:
        """[N or 1, 1, Q, M] bool, all of it."""
        return self.between(*map(jnp.arange, self.shape))[:, None]


@pytree_dataclass
class CachedRule:
    """Block-causal attention of new tokens to themselves and to cached ones, wherever those lie.

    Attributes:
        pattern: of a row, of which queries and keys are places.
        query_positions: [Q] positions in the row.
        key_positions: [M] positions in the row; a negative one is seen by nobody.
        query_documents: [N, Q] int32, 0 for padding.
        key_documents: [N, M] int32.
    """

    pattern: BlockCausal
    query_positions: Array
    key_positions: Array
    query_documents: Array
    key_documents: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.query_positions.shape[0], self.key_positions.shape[0]

    def between(self, queries: Array, keys: Array) -> Array:
        """[N, Q, M] bool, for the queries [Q] and keys [M] of these indices."""
        at, of = self.query_positions[queries], self.key_positions[keys]
        seen = self.pattern.sees(at[:, None], of[None]) & (of >= 0)[None]
        query_numbers = _segments(self.query_documents[:, queries], at)
        key_numbers = _segments(self.key_documents[:, keys], of)
        return seen[None] & (query_numbers[:, :, None] == key_numbers[:, None])

    def dense(self) -> Array:
        """[N, 1, Q, M] bool, all of it."""
        return self.between(*map(jnp.arange, self.shape))[:, None]


@pytree_dataclass
class DenseRule:
    """Any boolean array as a rule.

    Attributes:
        mask: [N or 1, 1 or H, Q, M] bool.
    """

    mask: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        return self.mask.shape[-2:]

    def dense(self) -> Array:
        """The array."""
        return self.mask


AnyRule = Rule | CachedRule | DenseRule


def as_rule(mask: AnyRule | Array | None, num_queries: int, num_keys: int) -> AnyRule:
    """A rule from what networks take as a mask: a rule, a boolean array, or None for everywhere.

    Raises:
        ValueError: if the mask is for other numbers of queries and keys.
    """
    if mask is None:
        return Rule(Everything((num_queries, num_keys)), None)
    rule = mask if isinstance(mask, AnyRule) else DenseRule(mask)
    if tuple(rule.shape) != (num_queries, num_keys):
        raise ValueError(
            f"a mask for {rule.shape[0]} queries and {rule.shape[1]} keys does not fit "
            f"{num_queries} queries and {num_keys} keys (cached and new ones)"
        )
    return rule


def within_documents(documents: Array) -> Rule:
    """Everything in the same document, in both directions.

    Args:
        documents: [N, L] int32 document numbers, 0 for padding.
    """
    length = documents.shape[-1]
    return Rule(Everything((length, length)), documents)


def causal(length: int, window: int | None = None, documents: Array | None = None) -> Rule:
    """Every place sees itself and what stands before it: :func:`block_causal` for single tokens."""
    return block_causal(length, 1, window, documents)


def block_causal(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Rule:
    """Every place sees its own block and the blocks before it.

    Args:
        length: L.
        block_size: L', which divides L.
        window: number of blocks to look at, the own one included; None for all.
        documents: [N, L] int32 document numbers, 0 for padding; None for one whole document.

    Raises:
        ValueError: if the block size does not divide the length or the window is below 1.
    """
    check_blocks(length, block_size, window)
    return Rule(BlockCausal(length, block_size, window), documents)


def block_training(
    length: int, block_size: int, window: int | None = None, documents: Array | None = None
) -> Rule:
    """All blocks of a block diffusion model in one pass, over 2L places.

    The first L places are the noised row, the other L the clean one. Noised block b sees itself and
    the clean blocks before b; clean block b sees the clean blocks up to b. So the noised outputs
    are those of a loop over blocks that feeds [clean blocks before b, noised block b].

    Arguments and errors as :func:`block_causal`; with N = L / L' blocks and no window or documents
    ``L'^2 (N + N^2)`` pairs are allowed.

    Reference: Arriola et al. 2025 (BD3-LM), vectorised training.
    """
    check_blocks(length, block_size, window)
    if documents is not None:
        documents = jnp.concatenate([documents, documents], axis=-1)
    return Rule(BlockTraining(length, block_size, window), documents)


def cached(
    query_positions: Array,
    key_positions: Array,
    query_documents: Array,
    key_documents: Array,
    block_size: int,
    window: int | None = None,
) -> CachedRule:
    """The rule of :func:`block_causal` for places anywhere in a row, a negative one being nowhere.

    Args:
        query_positions: [Q] positions in the row.
        key_positions: [M] positions in the row; a negative one is seen by nobody.
        query_documents: [N, Q] int32 document numbers, 0 for padding.
        key_documents: [N, M] int32.
        block_size: L'.
        window: number of blocks to look at, the own one included; None for all.
    """
    pattern = BlockCausal(query_positions.shape[0], block_size, window)
    return CachedRule(pattern, query_positions, key_positions, query_documents, key_documents)


def _segments(documents: Array, places: Array) -> Array:
    # Documents are numbered from 1, so a padding place gets a number that nobody else has.
    return jnp.where(documents == 0, -1 - places[None], documents)
