"""Gaussian sampling loop, from noise at the first level of a grid to data.

The state is ``x = alpha x0 + sigma eps`` on the network's path; samplers use the network as a
*denoiser*, whatever its output. A step to +inf, clean data, ends in the denoiser's last estimate.
Rows have their own keys: row 5 of a batch of 8 equals a batch of one with ``row_offset=5``.
"""

import math
from collections.abc import Callable
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax.checks import Real, check_interval, checked, is_concrete
from mdm_jax.gaussian.parameterisations import Output
from mdm_jax.gaussian.paths import Path
from mdm_jax.samplers.sampler import (
    LOGSNR_LIMIT,
    Progress,
    Show,
    reporter,
    row_keys,
    row_streams,
)
from mdm_jax.schedules import grids
from mdm_jax.types import Array, ArrayLike, ModelFn, PyTree

NETWORK_LOGSNR_LIMIT = 2 * LOGSNR_LIMIT
"""Largest |logSNR| that a network receives: that of the outermost float32 quantiles of the flow and
cosine schedules."""

Denoise = Callable[[Array, ArrayLike], Array]
"""``denoise(x [B, ...], logsnr [] or [B]) -> estimate of x0 [B, ...]``, x on the network's path."""


def bind_denoiser(
    model_fn: ModelFn, output: Output, path: Path, documents: ArrayLike | None = None
) -> Denoise:
    """A network as an estimate of the clean data, in the dtype of its input.

    ``model_fn(x [B, ...], logsnr [B, 1], documents) -> y [B, ...]`` receives levels clipped to
    :data:`NETWORK_LOGSNR_LIMIT`; the conversion from ``output`` uses the exact level. Options of a
    call, such as an earlier estimate, go to the network.
    """

    def denoise(x: Array, logsnr: ArrayLike, **options: Array) -> Array:
        logsnr = jnp.asarray(logsnr, x.dtype)
        clipped = jnp.clip(logsnr, -NETWORK_LOGSNR_LIMIT, NETWORK_LOGSNR_LIMIT)
        levels = jnp.broadcast_to(clipped.reshape(-1, 1), (x.shape[0], 1))
        y = model_fn(x, levels, documents, **options)
        if y.shape != x.shape:
            raise ValueError(
                f"the network must output one number per element, {x.shape}, got {y.shape}"
            )
        if logsnr.ndim:
            logsnr = logsnr.reshape(-1, *(1,) * (x.ndim - 1))
        return output.to_x0(path, logsnr, y.astype(x.dtype), x)

    return denoise


def initial_std(path: Path, logsnr: ArrayLike, data_std: ArrayLike = 1.0) -> Array:
    """``sqrt(sigma^2 + alpha^2 data_std^2)``, scale of noisy mean-zero data; EDM has std 0."""
    spread = 1.0 + jnp.square(data_std) * jnp.exp(logsnr)
    return jnp.exp(path.log_sigma(logsnr)) * jnp.sqrt(spread)


class GaussianState(NamedTuple):
    """State of the sampling loop; shapes and dtypes stay the same.

    ``x`` [B, ...] is on the network's path, ``x0`` [B, ...] the first estimate of the data in the
    last step, at first zero, ``memory`` further state of the sampler, leaves [B, ...].
    """

    x: Array
    x0: Array
    memory: PyTree = ()


class GaussianContext(NamedTuple):
    """Inputs of one step.

    ``keys`` [B] are for this step only, one per row. The levels [] are those before the last step
    (in the first step ``logsnr``), of the current state, and after the step (+inf for clean data).
    """

    keys: Array
    index: Array
    num_steps: int
    previous_logsnr: Array
    logsnr: Array
    next_logsnr: Array
    path: Path


class GaussianSampler(NamedTuple):
    """A reverse process as pure functions.

    ``step(context, denoise, state) -> state`` may call ``denoise`` any number of times;
    ``init(x) -> memory`` is for the first state; ``finite_start`` demands a finite first level.
    """

    name: str
    step: Callable[[GaussianContext, Denoise, GaussianState], GaussianState]
    init: Callable[[Array], PyTree] = lambda x: ()  # noqa: ARG005
    finite_start: bool = False


def sample_gaussian(
    key: Array,
    model_fn: ModelFn,
    sampler: GaussianSampler,
    grid: ArrayLike,
    shape: tuple[int, ...],
    *,
    output: Output,
    path: Path,
    documents: ArrayLike | None = None,
    start: ArrayLike | None = None,
    data_std: ArrayLike = 1.0,
    row_offset: ArrayLike = 0,
    progress: Progress | None = None,
) -> Array:
    """Sample data [B, ...]: the state at the last level of the grid, divided by alpha.

    At a last level of +inf that is the denoiser's estimate; at a finite one it has noise of
    variance ``exp(-lambda)``. Jit-able. ValueError for an empty shape, a start of another shape, or
    a grid that does not increase or starts where the network is undefined (checked where concrete).

    Args:
        key, row_offset: row i draws from ``fold_in(key, row_offset + i)`` alone.
        model_fn: ``model_fn(x [B, ...], logsnr [B, 1], documents) -> y [B, ...]``.
        grid: [N + 1] strictly increasing logSNR; the last may be +inf. The first may be -inf (zero
            terminal SNR) where path and output are defined there, such as v on path ``vp``.
        shape: of the result; the rows come first.
        output, path: what the network predicts, and the path of its inputs.
        start: [B, ...] the state at the first level, on the path, in place of noise.
        data_std: standard deviation of the data, for the first state (:func:`initial_std`).
        progress: called after each step with the number of steps done and that of all.
    """
    data, _ = sample_gaussian_with_trace(
        key,
        model_fn,
        sampler,
        grid,
        shape,
        lambda _: None,
        output=output,
        path=path,
        documents=documents,
        start=start,
        data_std=data_std,
        row_offset=row_offset,
        progress=progress,
    )
    return data


def sample_gaussian_with_trace(
    key: Array,
    model_fn: ModelFn,
    sampler: GaussianSampler,
    grid: ArrayLike,
    shape: tuple[int, ...],
    trace: Callable[[GaussianState], PyTree],
    *,
    output: Output,
    path: Path,
    documents: ArrayLike | None = None,
    start: ArrayLike | None = None,
    data_std: ArrayLike = 1.0,
    row_offset: ArrayLike = 0,
    progress: Progress | None = None,
) -> tuple[Array, PyTree]:
    """:func:`sample_gaussian`, with ``trace(state)`` after each step, stacked [num_steps, ...]."""
    _check_grid(sampler, grid, output, path)
    if len(shape) < 2 or min(shape) < 1:
        raise ValueError(f"shape must be [rows, elements, ...], none of them 0, got {shape}")
    if start is not None and jnp.shape(start) != tuple(shape):
        raise ValueError(f"start must have the shape {tuple(shape)}, got {jnp.shape(start)}")
    dtype = jnp.result_type(float) if start is None else jnp.result_type(start, jnp.float32)
    levels = jnp.asarray(grid, dtype)
    num_steps = levels.shape[0] - 1
    denoise = bind_denoiser(model_fn, output, path, documents)
    keys = row_keys(key, row_offset, shape[0])
    step_keys = row_streams(keys, "steps")
    if start is None:
        noise = _row_noise(row_streams(keys, "init"), shape, dtype)
        x = initial_std(path, levels[0], jnp.asarray(data_std, dtype)) * noise
    else:
        x = jnp.asarray(start, dtype)
    report = reporter(progress, num_steps)

    def advance(state, index):
        context = GaussianContext(
            keys=jax.vmap(lambda k: jax.random.fold_in(k, index))(step_keys),
            index=index,
            num_steps=num_steps,
            previous_logsnr=levels[jnp.maximum(index - 1, 0)],
            logsnr=levels[index],
            next_logsnr=levels[index + 1],
            path=path,
        )
        state = sampler.step(context, denoise, state)
        report(index + 1)
        return state, trace(state)

    state = GaussianState(x, jnp.zeros_like(x), sampler.init(x))
    state, record = jax.lax.scan(advance, state, jnp.arange(num_steps))
    return state.x * jnp.exp(-path.log_alpha(levels[-1])), record


def make_gaussian_generator(
    apply_fn: Callable[..., Array],
    sampler: GaussianSampler,
    grid: ArrayLike,
    event_shape: tuple[int, ...],
    *,
    output: Output,
    path: Path,
    data_std: ArrayLike = 1.0,
    progress: Progress | None = None,
) -> Callable[..., Array]:
    """Compile :func:`sample_gaussian` once per batch size; the grid is concrete and checked here.

    Takes ``apply_fn(params, x, logsnr [B, 1], documents) -> y``; ``event_shape`` is that of a row.
    ``generate(params, key, batch_size, documents=None, start=None, row_offset=0)`` returns data
    ``[batch_size, *event_shape]``. Other arguments and errors are those of sample_gaussian.
    """
    _check_grid(sampler, grid, output, path)

    def generate(params, key, batch_size, documents=None, start=None, row_offset=0):
        return sample_gaussian(
            key,
            lambda x, logsnr, docs: apply_fn(params, x, logsnr, docs),
            sampler,
            grid,
            (batch_size, *event_shape),
            output=output,
            path=path,
            documents=documents,
            start=start,
            data_std=data_std,
            row_offset=row_offset,
            progress=progress,
        )

    return jax.jit(generate, static_argnames="batch_size")


def shown(
    sampler: GaussianSampler, show: Show, data_std: ArrayLike = 1.0, ordered: bool = True
) -> GaussianSampler:
    """The sampler, calling ``show(x [B, ...])`` on the host after every step.

    The noisy data are scaled to the standard deviation of data at all levels, so that the last are
    the samples. ``ordered``: calls come in the order of the steps; for one device only.
    """

    def step(context: GaussianContext, denoise: Denoise, state: GaussianState) -> GaussianState:
        state, level = sampler.step(context, denoise, state), context.next_logsnr
        noisy = initial_std(context.path, level, data_std) / data_std
        scale = jnp.where(jnp.isposinf(level), context.path.alpha(level), noisy)
        jax.debug.callback(lambda x: show(np.array(x)), state.x / scale, ordered=ordered)
        return state

    return sampler._replace(step=step)


def step_noise(context: GaussianContext, x: Array) -> Array:
    """Standard normal numbers like x, each row from its own key of this step."""
    return _row_noise(context.keys, x.shape, x.dtype)


def _row_noise(keys: Array, shape: tuple[int, ...], dtype) -> Array:
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(keys)


def _check_grid(sampler: GaussianSampler, grid: ArrayLike, output: Output, path: Path) -> None:
    if not is_concrete(grid):
        return
    grids.check_grid(grid)
    if np.asarray(grid)[0] != -np.inf:
        return
    if sampler.finite_start:
        raise ValueError(f"{sampler.name} needs a grid that starts at a finite logSNR, got -inf")
    with jax.ensure_compile_time_eval():
        defined = bool(jnp.isfinite(output.log_determinant(path, -jnp.inf)))
    if not defined:
        raise ValueError(
            f"output {output.name} on path {path.name} does not determine the data at logSNR -inf: "
            "start the grid at a finite level, or use x0, v or flow on vp or flow"
        )


@checked
def guided(
    conditional: ModelFn,
    unconditional: ModelFn,
    scale: ArrayLike,
    low: ArrayLike = -math.inf,
    high: ArrayLike = math.inf,
    rescale: Annotated[
        ArrayLike, Real("[0, 1]", "", "of guided outputs to the spread of unguided ones")
    ] = 0.0,
) -> ModelFn:
    """Classifier-free guidance at logSNR within [low, high]: ``y = y_u + scale (y_c - y_u)``.

    ``y_c`` outside the interval; scale 1 is no guidance. Both networks are
    ``(x [B, ...], logsnr [B, 1], documents) -> y`` with the same output of any kind (all are affine
    in each other). Where no row is inside, the unconditional one is not run. ``rescale`` in [0, 1]
    moves the standard deviation of each row's y that far back to that of y_c; the kind of output
    matters for it (v in Lin et al.). ValueError unless low < high. Ho and Salimans 2022; interval:
    Kynkäänniemi et al. 2024 (arXiv 2404.07724); rescale: Lin et al. 2024 (arXiv 2305.08891), 3.4.
    """
    check_interval("guided", low, high)

    def model_fn(x: Array, logsnr: Array, documents: Array | None = None) -> Array:
        target = conditional(x, logsnr, documents)
        inside = (low <= logsnr[:, 0]) & (logsnr[:, 0] <= high)

        def push() -> Array:
            base = unconditional(x, logsnr, documents)
            where = inside.reshape(-1, *(1,) * (target.ndim - 1))
            pushed = base + jnp.asarray(scale, base.dtype) * (target - base)
            if not (is_concrete(rescale) and float(rescale) == 0.0):
                axes = tuple(range(1, target.ndim))
                wanted, got = (jnp.std(y, axes, keepdims=True) for y in (target, pushed))
                ratio = wanted / jnp.maximum(got, jnp.finfo(got.dtype).tiny)
                pushed = pushed * (1 + jnp.asarray(rescale, base.dtype) * (ratio - 1))
            return jnp.where(where, pushed, target)

        return jax.lax.cond(jnp.any(inside), push, lambda: target)

    return model_fn
