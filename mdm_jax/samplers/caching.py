"""Approximate KV caches of bidirectional models: a step runs some positions of a row, not all.

A token of a bidirectional model depends on all others, so keys and values from an earlier step are
out of date, and tokens drawn from them follow another law. What is gained and lost is measured in
``docs/decoding.md``. Block and autoregressive models have exact caches (``samplers.blocks``).
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mdm_jax.checks import Whole, checked
from mdm_jax.models.cross_entropy import Readout
from mdm_jax.samplers.by_score import counted_logsnr
from mdm_jax.samplers.sampler import (
    LOGSNR_LIMIT,
    Denoise,
    Network,
    Progress,
    Sampler,
    SamplerState,
    StepContext,
    make_generator,
    repeat,
    sample,
)
from mdm_jax.types import Array, ArrayLike, PyTree

if TYPE_CHECKING:  # they need Flax
    from mdm_jax.models.decoders import PartialDecoder, RowStore


ONE_PASS = (
    "an approximate cache serves samplers that run the network once a step, on all rows: not "
    "guidance, self-conditioning, cached_ancestral or predictor_corrector"
)


@checked
@dataclasses.dataclass(frozen=True)
class ApproximateCache:
    """Which positions of a row a step runs; keys, values and outputs of the others are stored.

    All positions are run at the first step of a row and of each of its blocks, and every
    ``refresh`` steps (None: not otherwise; 1: always, which is exact).

    Attributes:
        positions: ``prefix``: the block's and all behind it; ``dual``: the block's alone (Wu et al.
            2025, Fast-dLLM); ``delayed``: those that are masked, or were at the step before, so
            that a token is stored one step after it was written (Ma et al. 2025, dKV-Cache). The
            block is the sampler's; for samplers without, all positions to fill.
        refresh: steps.
    """

    positions: Literal["prefix", "dual", "delayed"] = "dual"
    refresh: Annotated[int, Whole("[1, 1e6]", "steps", "between passes over all")] | None = None

    def choose(self, block: Array, masked: Array, changed: Array) -> Array:
        """[B, L] bool, the positions to run, from those of the block, masked, and changed ones."""
        if self.positions == "delayed":
            return masked | changed
        if self.positions == "prefix":
            block = jnp.cumsum(block, axis=-1) > 0
        return block | changed


class Store(NamedTuple):
    """Results of earlier passes, and of which state.

    ``tokens`` [B, L]: input of each position's last pass. Of the last pass over a whole row:
    ``block`` [B, L] bool, then the sampler's, and ``age`` [B], steps since.
    """

    network: "RowStore"
    tokens: Array
    block: Array
    age: Array

    def forget(self, rows: Array) -> "Store":
        """The store whose rows [B] bool are run whole at their next step."""
        return self._replace(block=self.block & ~rows[:, None])


def approximately_cached(
    sampler: Sampler,
    cache: ApproximateCache,
    decoder: "PartialDecoder",
    params: PyTree,
    documents: Array | None = None,
    *,
    rows_per_pass: int | None = None,
    level: Callable[[StepContext, Array], Array] | None = None,
) -> Sampler:
    """The sampler over an approximate cache. Bias: biased, unless ``refresh`` is 1.

    The network is the decoder's: ``sample``'s own is not called. ``state.store`` is a
    :class:`Store`. Rows are independent: whether a row is run whole depends on it alone.

    Args:
        decoder: e.g. ``models.partial_decoder(model)``.
        documents: [B, L] as given to ``sample``.
        rows_per_pass: rows that a pass over all positions runs at a time, where rows of a batch
            need it at different steps; None: all.
        level: ``level(context, tokens) -> [] or [B]`` logSNR; None: the grid's, or where there is
            none that of the number of masks.

    A sampler must run the network at most once a step, on all rows: ValueError for
    ``predictor_corrector``, and when traced for guidance, self-conditioning and
    ``cached_ancestral``.
    """
    if sampler.name == "predictor_corrector":  # a loop inside its step: not seen when traced
        raise ValueError(ONE_PASS)
    documents = None if documents is None else jnp.asarray(documents)

    def init(keys: Array, canvas: Array, mask_id: int) -> SamplerState:
        network = decoder.init(*canvas.shape)
        nothing = jnp.zeros(canvas.shape, bool)
        store = Store(network, canvas, nothing, jnp.zeros(len(canvas), jnp.int32))
        return sampler.init(keys, canvas, mask_id)._replace(store=store)

    def step(context: StepContext, denoise: Denoise, state: SamplerState) -> SamplerState:
        tokens, store = state.tokens, state.store
        num_rows, length = tokens.shape
        masked = tokens == context.mask_id
        if sampler.blocks is None:
            block, fills = context.free, jnp.any(masked, axis=-1)
            most = length
        else:
            block, fills = sampler.blocks.of(context, tokens)
            most = min(sampler.blocks.size, length)
        chosen = cache.choose(block, masked, tokens != store.tokens)
        if decoder.shift:  # the output for a position is that of the one before it
            chosen |= jnp.roll(chosen, -1, axis=-1).at[:, -1].set(False)
            most = min(most + 1, length)
        if documents is not None:
            chosen &= documents > 0
        if cache.positions == "dual":
            sizes = [most]
        else:  # as many as are left: few programs, of which a step runs the smallest that fits
            sizes = sorted({-(-length * part // 4) for part in (1, 2, 3, 4)})
        due = jnp.any(block != store.block, axis=-1)
        due |= jnp.sum(chosen, axis=-1) > sizes[-1]
        if cache.refresh is not None:
            due |= store.age + 1 >= cache.refresh
        due &= fills
        chosen &= (fills & ~due)[:, None]

        noise = jnp.asarray((level or _level)(context, tokens), jnp.float32)
        inputs = (tokens, jnp.broadcast_to(noise.reshape(-1, 1), (num_rows, 1)), documents)
        network = _run_rows(decoder, params, store.network, inputs, due, rows_per_pass)
        network = _run_positions(decoder, params, network, inputs, chosen, sizes)
        store = Store(
            network,
            jnp.where(due[:, None] | chosen, tokens, store.tokens),
            jnp.where(due[:, None], block, store.block),
            jnp.where(due, 0, store.age + fills),
        )
        output = decoder.readout(params, network.features, documents)
        new = sampler.step(context, _Computed(output, denoise), state._replace(store=()))
        return new._replace(store=store)

    name = f"{sampler.name}, approximate {cache.positions} cache"
    return sampler._replace(name=name, init=init, step=step, bias="biased")


def make_cached_generator(
    decoder: "PartialDecoder",
    sampler: Sampler,
    cache: ApproximateCache,
    grid: ArrayLike | None,
    *,
    mask_id: int,
    progress: Progress | None = None,
) -> Callable[..., Array]:
    """As ``make_generator``, over an approximate cache (:func:`approximately_cached`)."""
    make_generator(_unused, sampler, grid, mask_id=mask_id)  # checks them

    @jax.jit
    def generate(params, key, canvas, documents=None, row_offset=0):
        over = approximately_cached(sampler, cache, decoder, params, documents)
        given = {"documents": documents, "row_offset": row_offset}
        options = {"mask_id": mask_id, "progress": progress}
        return sample(key, _unused, over, grid, canvas, **given, **options)

    return generate


def _level(context: StepContext, tokens: Array) -> Array:
    counted = counted_logsnr(tokens, context.free, context.mask_id)
    level = jnp.where(jnp.isnan(context.logsnr), counted, context.logsnr)
    return jnp.clip(level, -LOGSNR_LIMIT, LOGSNR_LIMIT)


def _run_rows(
    decoder: "PartialDecoder",
    params: PyTree,
    network: "RowStore",
    inputs: tuple[Array, Array, Array | None],
    rows: Array,
    at_once: int | None,
) -> "RowStore":
    """All positions of ``rows`` [B] bool, some rows at a time."""
    num_rows = len(rows)
    size = min(at_once or num_rows, num_rows)
    # Rows to run come first; `num_rows`, which is not written, is in the place of all others.
    order = jnp.argsort(~rows, stable=True)
    order = jnp.where(jnp.arange(num_rows) < jnp.sum(rows), order, num_rows)
    order = jnp.pad(order, (0, -num_rows % size), constant_values=num_rows)

    def run(index: Array, network: "RowStore") -> "RowStore":
        targets = jax.lax.dynamic_slice_in_dim(order, index * size, size)
        picked = jax.tree.map(lambda x: x[jnp.minimum(targets, num_rows - 1)], inputs)
        return decoder.run(params, network, *picked, targets)

    return repeat(-(-jnp.sum(rows) // size), run, network)


def _run_positions(
    decoder: "PartialDecoder",
    params: PyTree,
    network: "RowStore",
    inputs: tuple[Array, Array, Array | None],
    chosen: Array,
    sizes: list[int],
) -> "RowStore":
    """The positions ``chosen`` [B, L] bool, by the program of the smallest size that they fit."""
    length = chosen.shape[1]
    count = jnp.sum(chosen, axis=-1, keepdims=True)
    order = jnp.argsort(~chosen, axis=-1, stable=True)
    order = jnp.where(jnp.arange(length)[None] < count, order, length)

    def of_size(size: int) -> Callable[["RowStore"], "RowStore"]:
        return lambda network: decoder.update(params, network, *inputs, order[:, :size])

    branches = [lambda network: network, *map(of_size, sizes)]
    which = jnp.searchsorted(jnp.asarray([0, *sizes[:-1]]), jnp.max(count))
    return jax.lax.switch(which, branches, network)


def _unused(*_: Array) -> Array:
    raise AssertionError("the network of an approximate cache is its decoder's")


class _Computed(Network):
    """A network whose outputs at the state's tokens are known, for one call in a step."""

    def __init__(self, output: Readout, network: Network):
        super().__init__(_unused, None, network.excluded)
        self._output = output

    def _run(self, tokens: Array, logsnr: Array, rows: Array | None, **further: Array) -> Readout:
        del logsnr
        output, self._output = self._output, None
        other = output is None or tokens.shape != output.features.shape[:2]
        if other or rows is not None or further:
            raise ValueError(ONE_PASS)
        return output
