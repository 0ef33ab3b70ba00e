"""Sampling tokens and rows of tables by Gaussian samplers on their vectors."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.gaussian.categorical.embedding import (
    EmbeddingTransformer,
    NoisyTokens,
    nearest_tokens,
    posterior_mean,
)
from mdm_jax.gaussian.categorical.mixed import NoisyCells, TableTransformer
from mdm_jax.gaussian.parameterisations import CleanData
from mdm_jax.gaussian.samplers.sampler import (
    Denoise,
    GaussianContext,
    GaussianSampler,
    GaussianState,
    initial_std,
    sample_gaussian,
    step_noise,
)
from mdm_jax.models.cross_entropy import exclude_token
from mdm_jax.samplers.canvas import check_canvas
from mdm_jax.samplers.sampler import Show, row_keys, row_streams
from mdm_jax.types import Array, ArrayLike


def self_conditioned(sampler: GaussianSampler) -> GaussianSampler:
    """The sampler, whose denoiser also gets the estimate of the data of the step before.

    ``denoise(x, logsnr, estimate=x0)``, zeros in the first step; all calls of a step get the same.
    Chen et al. 2022 (Analog Bits).
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        return sampler.step(context, functools.partial(denoise, estimate=state.x0), state)

    return sampler._replace(step=step)


def make_embedding_generator(
    model: EmbeddingTransformer,
    apply_fn: Callable[..., Any],
    sampler: GaussianSampler,
    grid: ArrayLike,
    *,
    token_filter: Callable[[Array], Array] = lambda logits: logits,
    excluded: tuple[int, ...] = (),
    show: Show | None = None,
    ordered: bool = True,
) -> Callable[..., Array]:
    """``generate(params, key, canvas [B, L], documents=None, row_offset=0) -> tokens``, compiled.

    A Gaussian sampler on embeddings, whose denoiser is the mean embedding under the network's
    probabilities (score interpolation) after ``token_filter``; the result is the token of the
    embedding nearest to the last estimate. Given tokens of the canvas are clean inputs and stay.
    Models with self-conditioning get the estimate of the step before.

    Args:
        grid: [N + 1] increasing logSNR; the last should be +inf, where the estimate is the data.
        excluded: ids besides the mask that are not written.
        show: called on the host after every step with the tokens [B, L] of its estimate, in order
            if ``ordered``.
    """
    mask_id = model.mask_id
    ids = (mask_id, *excluded)
    if model.config.self_conditioning:
        sampler = self_conditioned(sampler)

    def generate(params, key, canvas, documents=None, row_offset=0):
        canvas, documents = check_canvas(canvas, documents)
        given, table = canvas != mask_id, model.apply(params, method="embeddings")
        known = table[canvas]

        def model_fn(x: Array, logsnr: Array, documents: Array, estimate=None) -> Array:
            outputs = apply_fn(params, NoisyTokens(canvas, x, given, estimate), logsnr, documents)
            mean = posterior_mean(
                outputs, table, lambda logits: token_filter(exclude_token(logits, *ids))
            )
            return jnp.where(given[..., None], known, mean)

        def tokens_of(estimate: Array) -> Array:
            return jnp.where(given, canvas, nearest_tokens(estimate, table, ids))

        def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
            state = sampler.step(context, denoise, state)
            if show is not None:
                jax.debug.callback(
                    lambda tokens: show(np.array(tokens)), tokens_of(state.x0), ordered=ordered
                )
            return state

        estimate = sample_gaussian(
            key,
            model_fn,
            sampler._replace(step=step),
            grid,
            known.shape,
            output=CleanData(),
            path=model.noising,
            documents=documents,
            row_offset=row_offset,
        )
        return tokens_of(estimate)

    return jax.jit(generate)


ELEMENTWISE = ("ddim", "ddpm_ancestral", "dpm_solver_pp_2m")
"""Samplers whose steps are of each element by itself, which may have a level of its own."""


def make_table_generator(
    model: TableTransformer, sampler: GaussianSampler, grid: ArrayLike
) -> Callable[..., Array]:
    """``generate(params, key, canvas [B, L], documents=None, row_offset=0) -> codes``, compiled.

    All cells are drawn; of the canvas the shape alone is read. ``grid`` [N + 1] are increasing
    logSNR, or [N + 1, L] those of each column, as columns with warps of their own have; the last
    is +inf. ValueError for a sampler that is not in :data:`ELEMENTWISE`, or a grid of another
    shape or that does not increase.
    """
    cells, size, path = model.cells, model.size, model.noising
    length = len(cells.sizes)
    if sampler.name not in ELEMENTWISE:
        raise ValueError(
            f"{sampler.name} takes one noise level for all columns; choose {', '.join(ELEMENTWISE)}"
        )
    levels = np.asarray(grid, np.float32)
    levels = np.broadcast_to(levels.reshape(len(levels), -1), (len(levels), length))
    if len(levels) < 2 or not np.all(levels[1:] > levels[:-1]):
        raise ValueError(f"a grid of a table increases in each column, got {levels.tolist()}")
    levels = levels[:, None, :, None]

    def generate(params, key, canvas, documents=None, row_offset=0):
        del documents
        rows, active = canvas.shape[0], cells.active(size)[None]
        blank = jnp.full((rows, length), -1, jnp.int32)
        keys = row_keys(key, row_offset, rows)

        def denoise(x: Array, logsnr: Array) -> Array:
            each = jnp.broadcast_to(logsnr[..., 0], (rows, length))
            return model.apply(params, NoisyCells(blank, x), each).mean

        def at(index: Array) -> Array:
            return jnp.take(jnp.asarray(levels), index, axis=0)

        def advance(state: GaussianState, index: Array) -> tuple[GaussianState, None]:
            step_keys = jax.vmap(lambda k: jax.random.fold_in(k, index))(row_streams(keys, "steps"))
            context = GaussianContext(
                keys=step_keys,
                index=index,
                num_steps=len(levels) - 1,
                previous_logsnr=at(jnp.maximum(index - 1, 0)),
                logsnr=at(index),
                next_logsnr=at(index + 1),
                path=path,
            )
            state = sampler.step(context, denoise, state)
            return state._replace(x=state.x * active), None

        first = GaussianContext(row_streams(keys, "init"), 0, 1, *(levels[0],) * 3, path)
        x = jnp.zeros((rows, length, size), jnp.float32)
        x = initial_std(path, jnp.asarray(levels[0])) * step_noise(first, x) * active
        state = GaussianState(x, jnp.zeros_like(x), sampler.init(x))
        state, _ = jax.lax.scan(advance, state, jnp.arange(len(levels) - 1))
        return codes_of(model, params, state.x)

    return jax.jit(generate)


def codes_of(model: TableTransformer, params: Any, vectors: Array) -> Array:
    """[N, L] int32 codes of cells [N, L, D]: the nearest number, the nearest category."""
    cells = model.cells
    offset, scale = (np.array([a], np.float32) for a in (cells.offsets, cells.scales))
    numbers = jnp.round((vectors[..., 0] - offset) / scale)
    numbers = jnp.clip(numbers, 0, cells.num_values - 1).astype(jnp.int32)
    if not sum(cells.sizes):
        return numbers
    products = vectors @ model.apply(params, method="embeddings").T
    products = jnp.where(cells.own()[None], products, -jnp.inf)
    category = jnp.argmax(products, axis=-1).astype(jnp.int32) - cells.first[None]
    return jnp.where(cells.is_numeric[None], numbers, category)
