"""The autoregressive model with the same transformer: token i from the tokens before it.

The input at place i is token i - 1; at the first place, and at the first of every document, it is
the start token, for which the mask token serves. So the parameters are those of a masked diffusion
model, and what place i sees is what a block model with blocks of one token sees.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.attention_masks import causal, check_blocks
from mdm_jax.models.block import WrittenRow
from mdm_jax.models.cache import KeyValueCache, append, attend_with_cache, new_cache
from mdm_jax.models.readout import Chunking, Readout, finish
from mdm_jax.models.transformer import Transformer
from mdm_jax.typing import Array, PyTree


class CausalDecoder(NamedTuple):
    """An autoregressive model as a generator uses it.

    Attributes:
        init: ``init(num_rows, length) -> memory`` of rows of which nothing is written yet.
        append: ``append(params, memory, tokens [N, P], documents [N, P]) -> memory``: the first P
            tokens of every row, in one pass. Only at the beginning.
        step: ``step(params, memory, previous [N], documents [N]) -> (logits [N, K], memory)`` for
            the next place; ``previous`` is the token before it, of no importance at place 0.

    Documents are int32 numbers, 0 for padding.
    """

    init: Callable[[int, int], PyTree]
    append: Callable[..., PyTree]
    step: Callable[..., tuple[Array, PyTree]]


def causal_apply(
    model: Transformer,
    start_token: int,
    window: int | None = None,
    chunking: Chunking | None = None,
) -> Callable[..., Array | Readout]:
    """The network as ``objectives.next_token`` wants it.

    Args:
        model: the network; parameters of masked diffusion fit.
        start_token: what stands before the first token of a document, the mask token as a rule.
        window: tokens that a place sees, its own input included; None for all.
        chunking: of losses; if given, what is returned is a readout in place of the logits.

    Returns:
        ``apply_fn(params, tokens [N, L], logsnr, documents) -> logits [N, L, K]``. Logits at place
        i depend on the *clean* tokens before i alone. A network that is conditioned on the level is
        shown +inf; ``logsnr`` is not read.
    """

    def apply_fn(
        params: PyTree,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
    ) -> Array | Readout:
        del logsnr
        length = inputs.shape[-1]
        mask = causal(length, window, documents)
        shifted = shift_right(inputs, start_token, documents)
        readout, _ = model.apply(
            params, shifted, _clean(inputs), np.arange(length), mask, method="attend_readout"
        )
        return finish(readout, chunking)

    return apply_fn


def shift_right(tokens: Array, start_token: int, documents: Array | None = None) -> Array:
    """[N, L] int32: each place's predecessor, the start token where a document begins.

    Args:
        tokens: [N, L] int32.
        start_token: see above.
        documents: [N, L] int32 document numbers; None for one whole document.
    """
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=start_token)
    if documents is None:
        return before
    begins = documents != jnp.pad(documents[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    return jnp.where(begins, start_token, before)


class CausalMemory(NamedTuple):
    """What :func:`cached_causal_decoder` remembers.

    Attributes:
        cache: keys and values of the places run so far.
        document: [N] int32, document of the last place; -1 before the first.
    """

    cache: KeyValueCache
    document: Array


def cached_causal_decoder(
    model: Transformer, start_token: int, window: int | None = None
) -> CausalDecoder:
    """Decoding with a cache: a step runs one token. Equals :func:`causal_apply`.

    With a window the cache holds ``window - 1`` tokens, however long the row.

    Args:
        model: the network.
        start_token: what stands before the first token of a document.
        window: tokens that a place sees, its own input included; None for all.

    Raises:
        ValueError: from ``init``, if the window is below 1.
    """

    def init(num_rows: int, length: int) -> CausalMemory:
        check_blocks(length, 1, window)
        remembered = length if window is None else min(window, length)
        cache = new_cache(model.config, num_rows, max(remembered - 1, 1))
        return CausalMemory(cache, jnp.full((num_rows,), -1, jnp.int32))

    def run(params, memory, inputs, documents) -> tuple[Array, CausalMemory]:
        logits, new = attend_with_cache(
            model, params, memory.cache, inputs, _clean(inputs), documents, 1, window
        )
        return logits, CausalMemory(append(memory.cache, new, documents), documents[:, -1])

    def append_tokens(params, memory, tokens, documents) -> CausalMemory:
        return run(params, memory, shift_right(tokens, start_token, documents), documents)[1]

    def step(params, memory, previous, documents) -> tuple[Array, CausalMemory]:
        inputs = jnp.where(documents == memory.document, previous, start_token)
        logits, memory = run(params, memory, inputs[:, None], documents[:, None])
        return logits[:, 0], memory

    return CausalDecoder(init, append_tokens, step)


def recomputing_causal_decoder(apply_fn: Callable[..., Array]) -> CausalDecoder:
    """Decoding with any autoregressive network, without a cache: every step runs the whole row.

    Args:
        apply_fn: as :func:`causal_apply` returns it, such as a network of one's own.
    """

    def init(num_rows: int, length: int) -> WrittenRow:
        row = jnp.zeros((num_rows, length), jnp.int32)
        return WrittenRow(row, row, jnp.zeros((), jnp.int32))

    def append_tokens(params, row, tokens, documents) -> WrittenRow:
        del params
        width = tokens.shape[-1]
        return WrittenRow(
            row.tokens.at[:, :width].set(tokens),
            row.documents.at[:, :width].set(documents),
            jnp.asarray(width, jnp.int32),
        )

    def step(params, row, previous, documents) -> tuple[Array, WrittenRow]:
        place = row.written
        known = row.tokens.at[:, jnp.maximum(place - 1, 0)].set(previous)
        row = WrittenRow(known, row.documents.at[:, place].set(documents), place + 1)
        every = apply_fn(params, row.tokens, None, row.documents)
        return jax.lax.dynamic_index_in_dim(every, place, axis=1, keepdims=False), row

    return CausalDecoder(init, append_tokens, step)


def _clean(tokens: Array) -> Array:
    return jnp.full((tokens.shape[0], 1), jnp.inf)
