"""Continuous batching: finished rows leave the batch at once, and waiting ones take their places.

One compiled program of fixed shapes runs all rows. What a row becomes depends on its canvas, its
key number and the key alone: neither on the rows beside it nor on when it came.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.samplers.caching import Store
from mdm_jax.samplers.canvas import check_mask_id
from mdm_jax.samplers.sampler import (
    Network,
    Sampler,
    SamplerState,
    StepContext,
    keep_rows,
    row_streams,
)
from mdm_jax.types import Array, ArrayLike, PyTree


class Row(NamedTuple):
    """A row to fill: its number, canvas [L] and documents [L] (None for one document).

    Its noise is keyed by ``key_number``; None: by its number.
    """

    number: int
    canvas: ArrayLike
    documents: ArrayLike | None = None
    key_number: int | None = None


class FinishedRow(NamedTuple):
    """A row's number, tokens [L] int32, and the steps that filled any of them."""

    number: int
    tokens: np.ndarray
    steps: int


class _Batch(NamedTuple):
    state: SamplerState
    index: Array  # [B] the next step of each row
    steps: Array  # [B] those that filled a position


Stream = Callable[[PyTree, Array, Iterable[Row]], Iterator[FinishedRow]]


def make_stream(
    apply_fn: Callable[..., Array],
    sampler: Sampler,
    *,
    mask_id: int,
    batch_size: int,
    over: Callable[[Sampler, PyTree, Array | None], Sampler] | None = None,
) -> Stream:
    """``stream(params, key, rows)``: fills rows of one length, each given out when it is finished.

    A row is that of ``sample`` with its key number as ``row_offset``. Any number of rows may wait
    in an iterator, which is read as places become free. On one device. Compiled once per length.

    Args:
        apply_fn, mask_id: as of ``make_generator``.
        sampler: one without a grid. Behind ``stopping_at`` rows end early.
        batch_size: rows at a time.
        over: ``over(sampler, params, documents) -> sampler``, to put it over an approximate cache,
            ``approximately_cached(sampler, cache, decoder, params, documents, rows_per_pass=1)``.

    ValueError for a sampler with a grid; when read, for rows of different lengths or of which only
    some have documents.
    """
    check_mask_id(mask_id)
    if sampler.num_steps is None:
        raise ValueError(
            f"{sampler.name} steps along a grid, which rows that begin at different times do not "
            "share; choose a sampler that sets its own levels, such as confidence_parallel"
        )
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one row, got batch_size={batch_size}")

    def bound(params: PyTree, documents: Array | None) -> Sampler:
        return sampler if over is None else over(sampler, params, documents)

    @jax.jit
    def turn(params, key, batch, canvas, documents, numbers, arriving, occupied):
        """Steps until a row is finished, of which those ``arriving`` [B] bool are new."""
        own, free = bound(params, documents), canvas == mask_id
        num_steps = sampler.num_steps(canvas.shape[1])
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
        step_keys = row_streams(keys, "steps")

        def model_fn(*inputs, **further):
            return apply_fn(params, *inputs, **further)

        denoise = Network(model_fn, documents, mask_id if sampler.excludes_mask else None)

        def context(index: Array) -> StepContext:
            now, nowhere = jax.vmap(jax.random.fold_in)(step_keys, index), jnp.float32(jnp.nan)
            return StepContext(now, index, num_steps, nowhere, nowhere, free, mask_id)

        def done(state: SamplerState, index: Array) -> Array:
            return own.finished(state, mask_id) | (index >= num_steps)

        def idle(state: SamplerState, index: Array) -> Array:
            """Rows whose step would fill nothing."""
            if own.blocks is None:
                return jnp.zeros(index.shape, bool)
            return ~own.blocks.of(context(index), state.tokens)[1] & ~done(state, index)

        def step(carry: _Batch) -> _Batch:
            state = carry.state
            index = jax.lax.while_loop(
                lambda index: jnp.any(idle(state, index)),
                lambda index: index + idle(state, index),
                carry.index,
            )
            new = own.step(context(index), denoise, state)
            new = new._replace(tokens=jnp.where(free, new.tokens, canvas))
            runs = occupied & ~done(state, index)
            return _Batch(keep_rows(~runs, state, new), index + runs, carry.steps + runs)

        def none_done(carry: _Batch) -> Array:
            return jnp.any(occupied) & ~jnp.any(occupied & done(carry.state, carry.index))

        new = own.init(row_streams(keys, "init"), canvas, mask_id)
        state = keep_rows(arriving, new, batch.state)
        if isinstance(state.store, Store):
            state = state._replace(store=state.store.forget(arriving))
        counts = (jnp.where(arriving, 0, count) for count in (batch.index, batch.steps))
        batch = jax.lax.while_loop(none_done, step, _Batch(state, *counts))
        return batch, occupied & done(batch.state, batch.index)

    @jax.jit
    def empty(params, key, canvas, documents):
        keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(len(canvas)))
        init = bound(params, documents).init
        shapes = jax.eval_shape(lambda: init(keys, canvas, mask_id))
        state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        count = jnp.zeros(len(canvas), jnp.int32)
        return _Batch(state, count, count)

    def stream(params: PyTree, key: Array, rows: Iterable[Row]) -> Iterator[FinishedRow]:
        rows, batch, canvas, documents = iter(rows), None, None, None
        numbers, occupied = np.zeros(batch_size, np.int32), np.zeros(batch_size, bool)
        names = np.zeros(batch_size, np.int64)
        arriving = np.ones(batch_size, bool)
        while True:
            for slot in np.flatnonzero(~occupied):
                row = next(rows, None)
                if row is None:
                    break
                if canvas is None:
                    length, has_documents = len(row.canvas), row.documents is not None
                    canvas = np.full((batch_size, length), int(mask_id == 0), np.int32)
                    documents = np.ones(canvas.shape, np.int32) if has_documents else None
                if len(row.canvas) != length or (row.documents is not None) != has_documents:
                    raise ValueError(
                        f"rows of a stream have one length, {length}, and all or none documents; "
                        f"row {row.number} has {len(row.canvas)} tokens"
                    )
                names[slot], canvas[slot] = row.number, row.canvas
                numbers[slot] = row.number if row.key_number is None else row.key_number
                if has_documents:
                    documents[slot] = row.documents
                occupied[slot] = arriving[slot] = True
            if not occupied.any():
                return
            if batch is None:
                batch = empty(params, key, canvas, documents)
            # Copies: the program may still read them when the next rows are written.
            inputs = jax.tree.map(np.copy, (canvas, documents, numbers, arriving, occupied))
            batch, done = turn(params, key, batch, *inputs)
            tokens, steps, done = jax.device_get((batch.state.tokens, batch.steps, done))
            arriving[:] = False
            for slot in np.flatnonzero(done):
                occupied[slot] = False
                yield FinishedRow(int(names[slot]), tokens[slot], int(steps[slot]))

    return stream
