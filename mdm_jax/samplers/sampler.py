"""Telling the host how far a compiled loop has come.

What a sampler is, and the one loop that runs all of them.

A sampler fills the masked places of a *canvas*: an array of tokens in which the mask token marks
what is to be generated. Free sampling is an all-mask canvas; a prompt is a canvas that starts with
tokens, infilling one with gaps. Given tokens never change.

Rows are independent: everything random about a row is keyed by its own number, so row 5 of a batch
of 8 is what a batch of one with ``row_offset=5`` returns.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.corruption.masked import exclude_token
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.rng import stream
from mdm_jax.samplers.canvas import check_canvas
from mdm_jax.schedules import grids
from mdm_jax.types import Array, ArrayLike, ModelFn, PyTree

Progress = Callable[[int, int], None]
"""``progress(steps_done, num_steps)``, for display: called on the host after each step."""


def reporter(progress: Progress | None, num_steps: int) -> Callable[[Array], None]:
    """``report(steps_done)`` for a traced loop: calls ``progress`` on the host, if there is any."""
    if progress is None:
        return lambda steps_done: None  # noqa: ARG005

    def tell(steps_done: Array) -> None:
        progress(int(steps_done), num_steps)

    return lambda steps_done: jax.debug.callback(tell, steps_done)


LOGSNR_LIMIT = math.log(2.0**24 - 1)
"""Largest |logSNR| shown to a network: that of the outermost quantiles met in training."""

Denoise = Callable[..., Array]
"""``denoise(tokens [N, L], logsnr [] or [N] or [N, S], rows=None) -> float32 logits [N, L, K]``:
the network with its documents bound, the mask token excluded and infinite noise levels made finite.
``rows`` [N] int32 names the rows of the canvas that the tokens belong to, where these are not all
of them in order. Further keyword arguments, such as ``estimate``, are handed to the network."""

SAMPLER_LABELS = ("exact", "discretised", "biased")
"""What is known of the law of the samples, against the law in which the places are filled one at a
time in uniformly random order, each token drawn from the (filtered) network: that of the reverse
process in continuous time, whose likelihood the objective bounds.

``exact``: the same law. ``discretised``: approaches it as steps are added. ``biased``: another law.
"""


class SamplerState(NamedTuple):
    """What moves from step to step; shapes and dtypes stay the same.

    Attributes:
        tokens: [B, L] int32, the canvas so far.
        memory: whatever else the sampler carries (clocks, cached logits); every leaf [B, ...].
    """

    tokens: Array
    memory: PyTree


class StepContext(NamedTuple):
    """What a step is told.

    Attributes:
        keys: [B] typed keys, one per row, used for nothing but this step.
        index: [] int32, number of the step.
        num_steps: number of steps at most.
        logsnr: [] float32 level of the current state; NaN for a sampler that needs no grid.
        next_logsnr: [] float32 level after the step; NaN likewise.
        free: [B, L] bool, the places to generate.
        mask_id: the mask token.
        before: [B, P] int32, what stands in the rows right before the canvas, with the mask token
            where nothing does, if the canvas is a block of longer rows; None if it is all there is.
            With blocks the network takes ``without_prompt=True``, too (see ``sample_blocks``).
    """

    keys: Array
    index: Array
    num_steps: int
    logsnr: Array
    next_logsnr: Array
    free: Array
    mask_id: int
    before: Array | None = None


class Sampler(NamedTuple):
    """A reverse process as pure functions.

    The loop puts given tokens back after every step and leaves finished rows as they are, so a step
    need not care about either.

    Attributes:
        name: for logs and error messages.
        init: ``init(keys [B], canvas [B, L], mask_id) -> SamplerState``.
        step: ``step(context, denoise, state) -> state``. May call ``denoise`` any number of times.
        finished: ``finished(state, mask_id) -> [B] bool``, rows that no later step would change;
            sampling stops when all are.
        num_steps: ``num_steps(length) -> int`` where the sampler knows itself how many steps it
            needs at most; None where the grid says so.
        bias: one of :data:`SAMPLER_LABELS`; the worst unless claimed otherwise.
    """

    name: str
    init: Callable[[Array, Array, int], SamplerState]
    step: Callable[[StepContext, Denoise, SamplerState], SamplerState]
    finished: Callable[[SamplerState, int], Array]
    num_steps: Callable[[int], int] | None = None
    bias: str = "biased"


def sample(
    key: Array,
    model_fn: ModelFn,
    sampler: Sampler,
    grid: ArrayLike | None,
    canvas: ArrayLike,
    *,
    mask_id: int,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
    progress: Progress | None = None,
) -> Array:
    """Fills the masked places of a canvas; returns tokens [B, L] int32 without any mask token.

    Pure and jit-able (see :func:`make_generator`). Stops early once every row is finished.

    Args:
        key: typed key. Row i draws from ``fold_in(key, row_offset + i)`` alone.
        model_fn: ``model_fn(inputs, logsnr [B, 1], documents) -> logits [B, L, K]``, or a
            ``models.Readout`` in their place.
        sampler: e.g. ``ancestral()`` or ``first_hitting()``.
        grid: [N + 1] logSNR levels, strictly increasing to +inf (nothing masked), for samplers
            that step along one; -inf is a legal first level. None for the others.
        canvas: [B, L] integers; ``mask_id`` where a token is to be generated.
        mask_id: the mask token.
        documents: [B, L] document numbers handed to the network, 0 on padding. Padding should hold
            some token that is not the mask: it is then a given place like any other.
        row_offset: number of the first row, for sampling a large batch in parts.
        progress: called after each step with the number of steps done and that of all; an early
            stop ends the calls before the two meet.

    Raises:
        ValueError: for a canvas that is not a non-empty integer matrix, documents of another shape,
            a negative mask_id, or a grid that is missing, superfluous, not increasing or does not
            end at +inf (values are checked where they are concrete).
    """
    tokens, _ = _run(
        *(key, model_fn, sampler, grid, canvas, mask_id),
        *(documents, row_offset, lambda _: None, progress),
    )
    return tokens


def sample_with_trace(
    key: Array,
    model_fn: ModelFn,
    sampler: Sampler,
    grid: ArrayLike | None,
    canvas: ArrayLike,
    trace: Callable[[SamplerState], PyTree],
    *,
    mask_id: int,
    documents: ArrayLike | None = None,
    row_offset: ArrayLike = 0,
    progress: Progress | None = None,
) -> tuple[Array, PyTree]:
    """:func:`sample`, with ``trace(state)`` of every step stacked on a leading axis.

    Returns:
        tokens as :func:`sample` returns them, and the traces of the states after each step
        [num_steps, ...]; steps that an early stop left out repeat the last.
    """
    return _run(
        *(key, model_fn, sampler, grid, canvas, mask_id), *(documents, row_offset, trace, progress)
    )


def make_generator(
    apply_fn: Callable[..., Array],
    sampler: Sampler,
    grid: ArrayLike | None,
    *,
    mask_id: int,
    progress: Progress | None = None,
) -> Callable[..., Array]:
    """:func:`sample` compiled once per canvas shape.

    Args:
        apply_fn: ``apply_fn(params, inputs, logsnr, documents) -> logits``, or a
            ``models.Readout`` in their place, which spares samplers that reveal few places per step
            the logits of all others.
        sampler: as in :func:`sample`.
        grid: concrete values, as in :func:`sample`.
        mask_id: the mask token.
        progress: as in :func:`sample`.

    Returns:
        ``generate(params, key, canvas, documents=None, row_offset=0) -> tokens [B, L]``.

    Raises:
        ValueError: as :func:`sample`; those about grid and mask_id right here.
    """
    levels = _check_grid(sampler, grid)
    _check_mask_id(mask_id)

    @jax.jit
    def generate(params, key, canvas, documents=None, row_offset=0):
        def model_fn(inputs, logsnr, docs, **further):
            return apply_fn(params, inputs, logsnr, docs, **further)

        return sample(
            key,
            model_fn,
            sampler,
            levels,
            canvas,
            mask_id=mask_id,
            documents=documents,
            row_offset=row_offset,
            progress=progress,
        )

    return generate


def read_places(
    denoise: Denoise, tokens: Array, logsnr: Array, rows: Array | None = None
) -> Callable[[Array], Array]:
    """One pass of the network, whose logits are wanted at some places only.

    Returns ``read(places [N, C] integers) -> float32 logits [N, C, K]``, what ``denoise`` says at
    these places. The pass is made once, however often it is read from. Where the network returns a
    ``models.Readout``, nothing is projected to the vocabulary but the places read.

    Args:
        denoise: the network; one that goes through wrappers says everything at once.
        tokens: [N, L].
        logsnr: as for ``denoise``.
        rows: likewise.
    """
    if isinstance(denoise, _Network):
        return denoise.reader(tokens, logsnr, rows)
    logits = denoise(tokens, logsnr, rows)
    return lambda places: _at_places(logits, places)


def row_streams(keys: Array, name: str) -> Array:
    """One named stream per row: keys [B] -> keys [B]."""
    return jax.vmap(lambda key: stream(key, name))(keys)


def no_mask_left(state: SamplerState, mask_id: int) -> Array:
    """[B] bool; ``finished`` for samplers that never put a mask back."""
    return ~jnp.any(state.tokens == mask_id, axis=-1)


def never_finished(state: SamplerState, mask_id: int) -> Array:
    """[B] bool; ``finished`` for samplers that may change any place until the last step."""
    del mask_id
    return jnp.zeros(state.tokens.shape[0], bool)


def _run(key, model_fn, sampler, grid, canvas, mask_id, documents, row_offset, observe, progress):
    _check_mask_id(mask_id)
    canvas, documents = check_canvas(canvas, documents)
    levels = _check_grid(sampler, grid)
    num_steps = len(levels) - 1 if levels is not None else sampler.num_steps(canvas.shape[1])
    free = canvas == mask_id
    denoise = _Network(model_fn, documents, mask_id)
    rows = jnp.asarray(row_offset, jnp.int32) + jnp.arange(canvas.shape[0])
    row_keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
    step_keys = row_streams(row_keys, "steps")

    def advance(index, state):
        if levels is None:
            logsnr = next_logsnr = jnp.float32(jnp.nan)
        else:
            logsnr, next_logsnr = levels[index], levels[index + 1]
        keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(step_keys)
        context = StepContext(keys, index, num_steps, logsnr, next_logsnr, free, mask_id)
        new = sampler.step(context, denoise, state)
        new = new._replace(tokens=jnp.where(free, new.tokens, canvas))
        return _keep_rows(sampler.finished(state, mask_id), state, new)

    def unfinished(carry):
        index, state, _ = carry
        return (index < num_steps) & ~jnp.all(sampler.finished(state, mask_id))

    def body(carry):
        index, state, record = carry
        state = advance(index, state)
        record = jax.tree.map(lambda r, now: r.at[index].set(now), record, observe(state))
        report(index + 1)
        return index + 1, state, record

    report = reporter(progress, num_steps)
    state = sampler.init(row_streams(row_keys, "init"), canvas, mask_id)
    record = jax.tree.map(
        lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype),
        jax.eval_shape(observe, state),
    )
    steps, state, record = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, record))
    record = jax.tree.map(lambda r, last: _fill_after(steps, r, last), record, observe(state))
    return state.tokens, record


class _Network:
    """The network as a :data:`Denoise`, with its documents bound."""

    def __init__(self, model_fn: ModelFn, documents: Array | None, mask_id: int):
        self._model_fn, self._documents, self._mask_id = model_fn, documents, mask_id

    def __call__(
        self, tokens: Array, logsnr: Array, rows: Array | None = None, **further: Array
    ) -> Array:
        output = self._run(tokens, logsnr, rows, **further)
        logits = output.logits() if isinstance(output, Readout) else output
        return exclude_token(logits, self._mask_id)

    def reader(self, tokens: Array, logsnr: Array, rows: Array | None) -> Callable[[Array], Array]:
        """:func:`read_places` of the network itself."""
        output = self._run(tokens, logsnr, rows)
        if not isinstance(output, Readout):
            return lambda places: exclude_token(_at_places(output, places), self._mask_id)

        def read(places: Array) -> Array:
            there = dataclasses.replace(output, features=_at_places(output.features, places))
            return exclude_token(there.logits(), self._mask_id)

        return read

    def _run(self, tokens, logsnr, rows, **further) -> Array | Readout:
        level = jnp.clip(jnp.asarray(logsnr, jnp.float32), -LOGSNR_LIMIT, LOGSNR_LIMIT)
        if level.ndim < 2:
            level = jnp.broadcast_to(level.reshape(-1, 1), (tokens.shape[0], 1))
        documents = self._documents
        picked = documents if documents is None or rows is None else documents[rows]
        return self._model_fn(tokens, level, picked, **further)


def _at_places(values: Array, places: Array) -> Array:
    return jnp.take_along_axis(values, places[..., None], axis=1)


def _keep_rows(keep: Array, old: SamplerState, new: SamplerState) -> SamplerState:
    def select(a: Array, b: Array) -> Array:
        return jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(select, old, new)


def _fill_after(steps: Array, record: Array, last: Array) -> Array:
    done = jnp.arange(record.shape[0]) < steps
    return jnp.where(done.reshape(-1, *(1,) * last.ndim), record, last[None])


def _check_mask_id(mask_id: int) -> None:
    if mask_id < 0:
        raise ValueError(f"mask_id must be a token id, got {mask_id}")


def _check_grid(sampler: Sampler, grid: ArrayLike | None) -> Array | None:
    if sampler.num_steps is not None:
        if grid is not None:
            raise ValueError(f"{sampler.name} sets its own noise levels: pass grid=None")
        return None
    if grid is None:
        raise ValueError(f"{sampler.name} needs a grid of logSNR levels that ends at +inf")
    if isinstance(grid, jax.core.Tracer):
        return grid.astype(jnp.float32)
    levels, last = grids.check_grid(grid), np.asarray(grid)[-1]
    if last != np.inf:
        raise ValueError(
            "the grid must end at logSNR +inf (masking rate 0) so that no mask is left, got "
            f"{last}; see schedules.grids.open_ends"
        )
    return levels
