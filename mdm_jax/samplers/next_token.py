"""Generation from an autoregressive model, token by token."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.cross_entropy import exclude_token
from mdm_jax.models.decoders import CausalDecoder
from mdm_jax.samplers.canvas import check_canvas, check_mask_id, check_prefix, checked_generator
from mdm_jax.samplers.filters import LogitFilter, compose, draw_filtered
from mdm_jax.samplers.sampler import Show, row_keys
from mdm_jax.types import Array, ArrayLike, PyTree


def sample_next_tokens(
    key: Array,
    decoder: CausalDecoder,
    params: PyTree,
    canvas: ArrayLike,
    *,
    mask_id: int,
    token_filter: LogitFilter | None = None,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
    prefix: int = 0,
    show: Show | None = None,
    ordered: bool = True,
) -> Array:
    """Fill the masked positions of a canvas from left to right; tokens [B, L] without masks.

    Exact sampling from the (filtered) model, one pass per position. Given tokens never change; a
    gap does not see tokens after it. Key, canvas, ``documents``, ``row_offset`` and their errors
    are as in ``sample``. ``decoder`` is e.g. ``models.cached_causal_decoder(model, mask_id)``,
    ``token_filter`` e.g. ``compose(temperature(0.8), top_p(0.9))``.

    ``prefix`` leading positions, given in every row, run in one pass; ValueError if it is longer
    than the canvas or not all given (not checked where the canvas is traced). ``show`` and
    ``ordered`` are as in ``samplers.shown``.
    """
    check_mask_id(mask_id)
    canvas, documents = check_canvas(canvas, documents)
    check_prefix(canvas, prefix, mask_id)
    num_rows, length = canvas.shape
    if documents is None:
        documents = jnp.ones_like(canvas)
    token_filter = token_filter or compose()
    keys = row_keys(key, row_offset, num_rows)
    if prefix == length:
        return canvas

    def step(carry: tuple[PyTree, Array, Array], column: tuple[Array, Array, Array]):
        memory, previous, tokens = carry
        index, canvas_token, document = column
        logits, memory = decoder.step(params, memory, previous, document)
        own_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(keys)
        drawn = draw_filtered(own_keys, exclude_token(logits, mask_id), token_filter)
        token = jnp.where(canvas_token == mask_id, drawn, canvas_token)
        tokens = tokens.at[:, index].set(token)
        if show is not None:
            jax.debug.callback(lambda now: show(np.array(now)), tokens, ordered=ordered)
        return (memory, token, tokens), None

    memory, previous = decoder.init(num_rows, length), jnp.full((num_rows,), mask_id, jnp.int32)
    if prefix:
        memory = decoder.append(params, memory, canvas[:, :prefix], documents[:, :prefix])
        previous = canvas[:, prefix - 1]
    columns = (jnp.arange(prefix, length), canvas[:, prefix:].T, documents[:, prefix:].T)
    (*_, tokens), _ = jax.lax.scan(step, (memory, previous, canvas), columns)
    return tokens


def make_next_token_generator(
    decoder: CausalDecoder,
    *,
    mask_id: int,
    token_filter: LogitFilter | None = None,
    prefix: int = 0,
    show: Show | None = None,
    ordered: bool = True,
) -> Callable[..., Array]:
    """Compiled :func:`sample_next_tokens`, as ``make_generator``; checks the prefix."""

    options = {"mask_id": mask_id, "token_filter": token_filter, "prefix": prefix}
    options |= {"show": show, "ordered": ordered}

    @jax.jit
    def run(params, key, canvas, documents, row_offset):
        given = {"documents": documents, "row_offset": row_offset}
        return sample_next_tokens(key, decoder, params, canvas, **given, **options)

    return checked_generator(run, mask_id, prefix)
