"""The sampler interface and the sampling loop.

A sampler fills the masked positions of a *canvas* (all masks, a prompt followed by masks, or text
with gaps); given tokens never change. Rows are independent and keyed by their own number: row 5 of
a batch of 8 equals a batch of one with ``row_offset=5``.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.cross_entropy import Deferred, Readout, as_logits, exclude_token
from mdm_jax.rng import stream
from mdm_jax.samplers.canvas import check_canvas, check_mask_id
from mdm_jax.schedules import grids
from mdm_jax.types import Array, ArrayLike, ModelFn, PyTree

Progress = Callable[[int, int], None]
"""``progress(steps_done, num_steps)``, called on the host after each step until an early stop."""

Show = Callable[[np.ndarray], None]
"""``show(tokens [B, L])``, called on the host after each step, to watch the decoding."""

LOGSNR_LIMIT = math.log(2.0**24 - 1)
"""Largest |logSNR| passed to a network: that of the outermost quantiles in training."""

Denoise = Callable[..., Array]
"""``denoise(tokens [N, L], logsnr [] or [N] or [N, S], rows=None) -> float32 logits [N, L, K]``:
the network with its documents bound, the mask token excluded and infinite noise levels clipped.
``rows`` [N] int32 are the tokens' canvas rows, where not all of them in order. Further keyword
arguments, such as ``estimate``, go to the network."""

SAMPLER_LABELS = ("exact", "discretised", "biased")
"""The samples' law against the reverse process in continuous time, whose likelihood the objective
bounds: positions filled one at a time in uniformly random order, tokens drawn from the (filtered)
network. ``exact``: the same law; ``discretised``: approaches it with more steps; ``biased``:
another."""


class SamplerState(NamedTuple):
    """What changes from step to step; shapes and dtypes stay the same.

    ``tokens`` [B, L] int32; ``memory`` is whatever else the sampler carries, every leaf [B, ...].
    ``store`` may hold results of earlier passes; that of a finished row is not read any more.
    """

    tokens: Array
    memory: PyTree
    store: PyTree = ()


class StepContext(NamedTuple):
    """Inputs of one step besides the state.

    Attributes:
        keys: [B] typed keys, one per row, for this step only.
        index, num_steps: [] int32 number of the step, and the maximum number of steps.
        logsnr, next_logsnr: [] float32 levels before and after the step; NaN without a grid.
        free: [B, L] bool, the positions to generate.
        before: [B, P] int32, the rows' tokens before a block (the mask token where there are none);
            None outside blocks. In blocks the network also takes ``without_prompt=True``.
        start: [] int32 position of a block's first token in the row; None outside blocks.
    """

    keys: Array
    index: Array
    num_steps: int
    logsnr: Array
    next_logsnr: Array
    free: Array
    mask_id: int
    before: Array | None = None
    start: Array | None = None


class Blocks(NamedTuple):
    """Which positions a sampler fills together.

    ``size``: most positions of a block. ``of(context, tokens) -> (block [B, L] bool, fills [B]
    bool)``: the block of a step, and whether the step fills any position of a row.
    """

    size: int
    of: Callable[[StepContext, Array], tuple[Array, Array]]


class Sampler(NamedTuple):
    """A reverse process as pure functions; the loop restores given tokens and finished rows.

    Attributes:
        init: ``init(keys [B], canvas [B, L], mask_id) -> SamplerState``.
        step: ``step(context, denoise, state) -> state``. May call ``denoise`` any number of times.
        finished: ``finished(state, mask_id) -> [B] bool``, rows that no later step would change.
        num_steps: ``num_steps(length) -> int``, the maximum, without a grid; None with one.
        bias: of :data:`SAMPLER_LABELS`.
        excludes_mask: False where the network may predict the mask token, as some published loops
            let it: it counts in the softmax, and a position filled with it stays masked.
        blocks: where positions are filled block by block; None: anywhere, in every step.
    """

    name: str
    init: Callable[[Array, Array, int], SamplerState]
    step: Callable[[StepContext, Denoise, SamplerState], SamplerState]
    finished: Callable[[SamplerState, int], Array]
    num_steps: Callable[[int], int] | None = None
    bias: str = "biased"
    excludes_mask: bool = True
    blocks: Blocks | None = None


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
    """Fill the masked positions of a canvas; tokens [B, L] int32 without any mask token.

    Pure and jit-able (see :func:`make_generator`). Stops early once every row is finished.

    Args:
        key: typed key. Row i draws from ``fold_in(key, row_offset + i)`` alone.
        model_fn: ``model_fn(inputs, logsnr [B, 1], documents) -> logits [B, L, K]``, or a
            ``models.Readout``.
        grid: [N + 1] logSNR levels, strictly increasing to +inf (nothing masked), from -inf or
            above; None for samplers that set their own levels.
        canvas, mask_id: [B, L] integers; the mask token where a token is to be generated.
        documents: [B, L] numbers, None for one document per row; 0 on padding, which holds any
            token but the mask.
        row_offset: number of the first row, for sampling a large batch in parts; or [B] numbers of
            all rows, where these are known by something else than their order.

    Raises ValueError for a canvas that is not a non-empty integer matrix, documents of another
    shape, a negative mask_id, or a grid that is missing, superfluous, not increasing or does not
    end at +inf (values are checked where concrete).
    """
    tokens, _ = sample_with_trace(
        key,
        model_fn,
        sampler,
        grid,
        canvas,
        trace=lambda _: None,
        mask_id=mask_id,
        documents=documents,
        row_offset=row_offset,
        progress=progress,
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
    """:func:`sample` and ``trace(state)`` of every step, repeating the last when it stops."""
    check_mask_id(mask_id)
    canvas, documents = check_canvas(canvas, documents)
    levels = _check_grid(sampler, grid)
    num_steps = len(levels) - 1 if levels is not None else sampler.num_steps(canvas.shape[1])
    free = canvas == mask_id
    denoise = Network(model_fn, documents, mask_id if sampler.excludes_mask else None)
    keys = row_keys(key, row_offset, canvas.shape[0])
    step_keys = row_streams(keys, "steps")
    report = reporter(progress, num_steps)

    def advance(index, state):
        if levels is None:
            logsnr = next_logsnr = jnp.float32(jnp.nan)
        else:
            logsnr, next_logsnr = levels[index], levels[index + 1]
        own_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(step_keys)
        context = StepContext(own_keys, index, num_steps, logsnr, next_logsnr, free, mask_id)
        new = sampler.step(context, denoise, state)
        new = new._replace(tokens=jnp.where(free, new.tokens, canvas))
        return keep_rows(sampler.finished(state, mask_id), state, new)

    def unfinished(carry):
        index, state, _ = carry
        return (index < num_steps) & ~jnp.all(sampler.finished(state, mask_id))

    def body(carry):
        index, state, record = carry
        state = advance(index, state)
        record = jax.tree.map(lambda r, now: r.at[index].set(now), record, trace(state))
        report(index + 1)
        return index + 1, state, record

    state = sampler.init(row_streams(keys, "init"), canvas, mask_id)
    record = jax.tree.map(
        lambda leaf: jnp.zeros((num_steps, *leaf.shape), leaf.dtype),
        jax.eval_shape(trace, state),
    )
    steps, state, record = jax.lax.while_loop(unfinished, body, (jnp.int32(0), state, record))
    record = jax.tree.map(lambda r, last: _fill_after(steps, r, last), record, trace(state))
    return state.tokens, record


def make_generator(
    apply_fn: Callable[..., Array],
    sampler: Sampler,
    grid: ArrayLike | None,
    *,
    mask_id: int,
    progress: Progress | None = None,
) -> Callable[..., Array]:
    """:func:`sample` compiled once per canvas shape; grid (concrete) and mask_id are checked here.

    ``apply_fn(params, inputs, logsnr, documents)`` returns logits, or a ``models.Readout``, which
    saves samplers that reveal few positions per step the logits of all others. Behind
    ``models.without_tokens`` it does not write padding. Returns ``generate(params, key, canvas,
    documents=None, row_offset=0) -> tokens [B, L]``.
    """
    levels = _check_grid(sampler, grid)
    check_mask_id(mask_id)

    @jax.jit
    def generate(params, key, canvas, documents=None, row_offset=0):
        def model_fn(inputs, logsnr, docs, **further):
            return apply_fn(params, inputs, logsnr, docs, **further)

        given = {"documents": documents, "row_offset": row_offset}
        options = {"mask_id": mask_id, "progress": progress}
        return sample(key, model_fn, sampler, levels, canvas, **given, **options)

    return generate


def read_positions(
    denoise: Denoise, tokens: Array, logsnr: Array, rows: Array | None = None
) -> Callable[[Array | None], Array]:
    """One forward pass whose logits are needed at some positions only.

    Returns ``read(positions [N, C] integers) -> float32 logits [N, C, K]`` of ``denoise(tokens,
    logsnr, rows)``, for any number of calls; ``read(None)`` are those of all positions. A
    ``models.Readout`` is projected to the vocabulary at these positions alone; a wrapped network
    computes all logits at once.
    """
    if isinstance(denoise, Network):
        return denoise.reader(tokens, logsnr, rows)
    logits = denoise(tokens, logsnr, rows)
    return lambda positions: _at_positions(logits, positions)


def evaluate_positions(
    where: Array, size: int, evaluate: Callable[[Array], PyTree], initial: PyTree
) -> PyTree:
    """``initial`` [B, L] with ``evaluate(positions [B, C])`` written in ``where`` [B, L] bool.

    C = ``size`` positions at a time, or L if fewer: the cost follows the row with the most of them.
    """
    num_rows, length = where.shape
    size = min(size, length)
    # Those in `where` come first; `length`, which is not written, pads the end.
    order = jnp.argsort(~where, axis=-1, stable=True)
    order = jnp.where(jnp.arange(length)[None] < jnp.sum(where, -1, keepdims=True), order, length)
    order = jnp.pad(order, ((0, 0), (0, -length % size)), constant_values=length)
    rows = jnp.arange(num_rows)[:, None]

    def run(index: Array, values: PyTree) -> PyTree:
        targets = jax.lax.dynamic_slice_in_dim(order, index * size, size, axis=1)
        new = evaluate(jnp.minimum(targets, length - 1))
        return jax.tree.map(lambda a, b: a.at[rows, targets].set(b, mode="drop"), values, new)

    return repeat(-(-jnp.max(jnp.sum(where, axis=-1)) // size), run, initial)


def repeat(times: Array, run: Callable[[Array, PyTree], PyTree], initial: PyTree) -> PyTree:
    """``fori_loop(0, times, run, initial)`` for passes of a network inside a step."""

    def run_next(index: Array, values: PyTree) -> PyTree:
        # Always true. From a loop alone compilers move out the transpose of a tied embedding, which
        # is then copied in every step; from a branch they do not.
        return jax.lax.cond(index < times, run, lambda _, values: values, index, values)

    return jax.lax.fori_loop(0, times, run_next, initial)


def reporter(progress: Progress | None, num_steps: int) -> Callable[[Array], None]:
    """``report(steps_done)`` for a traced loop: calls ``progress`` on the host, if there is any."""
    if progress is None:
        return lambda steps_done: None  # noqa: ARG005

    def on_host(steps_done: Array) -> None:
        progress(int(steps_done), num_steps)

    return lambda steps_done: jax.debug.callback(on_host, steps_done)


def row_keys(key: Array, row_offset: ArrayLike, num_rows: int) -> Array:
    """[B] typed keys ``fold_in(key, row_offset + i)``, or of the numbers ``row_offset`` [B]."""
    rows = jnp.asarray(row_offset, jnp.int32)
    rows = rows if rows.ndim else rows + jnp.arange(num_rows)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def row_streams(keys: Array, name: str) -> Array:
    """One named stream per row: keys [B] -> keys [B]."""
    return jax.vmap(lambda key: stream(key, name))(keys)


def canvas_only(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
    """``init`` of samplers without memory."""
    del keys, mask_id
    return SamplerState(canvas, ())


def is_last(context: StepContext) -> Array:
    """Whether this is the last step, [] bool."""
    return context.index == context.num_steps - 1


def no_mask_left(state: SamplerState, mask_id: int) -> Array:
    """[B] bool; ``finished`` for samplers that never put a mask back."""
    return ~jnp.any(state.tokens == mask_id, axis=-1)


def never_finished(state: SamplerState, mask_id: int) -> Array:
    """[B] bool; ``finished`` for samplers that may change any position until the last step."""
    del mask_id
    return jnp.zeros(state.tokens.shape[0], bool)


class Network:
    """The network as a :data:`Denoise`, with its documents bound."""

    def __init__(self, model_fn: ModelFn, documents: Array | None, excluded: int | None):
        self._model_fn, self._documents, self.excluded = model_fn, documents, excluded

    def __call__(
        self, tokens: Array, logsnr: Array, rows: Array | None = None, **further: Array
    ) -> Array:
        return exclude_token(as_logits(self._run(tokens, logsnr, rows, **further)), self.excluded)

    def reader(
        self, tokens: Array, logsnr: Array, rows: Array | None
    ) -> Callable[[Array | None], Array]:
        """:func:`read_positions` of the network itself."""
        output = self._run(tokens, logsnr, rows)
        if isinstance(output, Deferred):
            return lambda at: exclude_token(output.read(at).logits(), self.excluded)
        if not isinstance(output, Readout):
            return lambda positions: exclude_token(_at_positions(output, positions), self.excluded)

        def read(positions: Array | None) -> Array:
            picked = dataclasses.replace(output, features=_at_positions(output.features, positions))
            return exclude_token(picked.logits(), self.excluded)

        return read

    def _run(self, tokens, logsnr, rows, **further) -> Array | Readout | Deferred:
        level = jnp.clip(jnp.asarray(logsnr, jnp.float32), -LOGSNR_LIMIT, LOGSNR_LIMIT)
        if level.ndim < 2:
            level = jnp.broadcast_to(level.reshape(-1, 1), (tokens.shape[0], 1))
        documents = self._documents
        picked = documents if documents is None or rows is None else documents[rows]
        return self._model_fn(tokens, level, picked, **further)


def _at_positions(values: Array, positions: Array | None) -> Array:
    if positions is None:
        return values
    return jnp.take_along_axis(values, positions[..., None], axis=1)


def keep_rows(keep: Array, old: SamplerState, new: SamplerState) -> SamplerState:
    """The old state of the rows ``keep`` [B] bool, the new one of others; the new store of all."""

    def select(a: Array, b: Array) -> Array:
        return jnp.where(keep.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    kept = jax.tree.map(select, old._replace(store=()), new._replace(store=()))
    return kept._replace(store=new.store)


def _fill_after(steps: Array, record: Array, last: Array) -> Array:
    done = jnp.arange(record.shape[0]) < steps
    return jnp.where(done.reshape(-1, *(1,) * last.ndim), record, last[None])


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
