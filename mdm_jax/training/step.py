"""Train state, one training step as a pure function, and its compilation ahead of time."""

import importlib.metadata
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mdm_jax import rng
from mdm_jax.checks import Real, Whole, checked
from mdm_jax.draws import Draw, DrawSpec, by_example, row_words
from mdm_jax.objectives.objective import Objective, accumulate_gradient, summed_loss, token_mean
from mdm_jax.training.ema import new_average, update_average
from mdm_jax.training.monitors import Monitor
from mdm_jax.types import Array, ArrayLike, Batch, PyTree
from mdm_jax.variance.transform import VarianceTransform, draw_batch


@flax.struct.dataclass
class TrainState:
    """State of a run. No key is kept: randomness is a function of (seed, step, stream name).

    Attributes:
        step: [] int32, number of steps begun, skipped ones included.
        ema: read with :func:`~mdm_jax.training.averaged`, since it may be an offset.
        monitors: states of the monitors by name.
        skipped, skipped_in_a_row: [] int32 steps with a non-finite loss, gradient or update.
    """

    step: Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    variance: PyTree
    monitors: dict[str, PyTree]
    skipped: Array
    skipped_in_a_row: Array


def new_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    transform: VarianceTransform,
    spec: DrawSpec,
    monitors: Iterable[Monitor] = (),
    ema_dtype: jnp.dtype = jnp.float32,
) -> TrainState:
    """The state at step 0; ``ema_dtype`` as of :func:`~mdm_jax.training.new_average`."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=new_average(params, ema_dtype),
        opt_state=optimizer.init(params),
        variance=transform.init(spec),
        monitors={monitor.name: monitor.init(params) for monitor in monitors},
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_a_row=jnp.zeros((), jnp.int32),
    )


def num_params(params: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def linen_init(
    model: nn.Module, length: int, dtype: jnp.dtype = jnp.int32
) -> Callable[[Array], PyTree]:
    """``init(key) -> variables`` of a linen model for rows of ``length``, logical axes named."""

    def init(key: Array) -> PyTree:
        documents = jnp.ones((1, length), jnp.int32)
        return model.init(key, jnp.zeros((1, length), dtype), jnp.zeros((1, 1)), documents)

    return init


ApplyFn = Callable[..., Array]
"""``apply_fn(params, inputs, logsnr, documents) -> logits``."""


class StepMetrics(NamedTuple):
    """Scalars of one step, on the device.

    Attributes:
        loss: the training objective, nats per eligible token: unbiased and noisy.
        bits_per_unit: the loss in bits per unit of the data (character, dimension).
        cross_entropy: nats per masked token, unweighted: biased towards high rates and smooth.
        gradient_norm: global norm before clipping.
        skipped: 1.0 for a skipped (non-finite) step; ``skipped_in_a_row`` counts the latest ones.
    """

    loss: Array
    bits_per_unit: Array
    cross_entropy: Array
    gradient_norm: Array
    skipped: Array
    skipped_in_a_row: Array


def step_draw(
    seed: ArrayLike,
    step: Array,
    transform: VarianceTransform,
    state: PyTree,
    spec: DrawSpec,
    example_keys: Array | None = None,
) -> Draw:
    """The draw of a training step: a function of (seed, step) and the transform's state.

    With the ``example_keys`` of a ``KeyedBatch`` it starts from numbers that are functions of the
    seed and the examples; what the transform draws anew, such as strata, is still that of the step.
    """
    key = rng.stream(rng.step_key(seed, step), "draw")
    if example_keys is None:
        return draw_batch(key, transform, state, spec)
    start = by_example(rng.stream(rng.step_key(seed, 0), "examples"), example_keys, spec)
    return transform.draw(key, state, start, spec)


@checked
def make_train_step(
    apply_fn: ApplyFn,
    objective: Objective,
    transform: VarianceTransform,
    optimizer: optax.GradientTransformation,
    spec: DrawSpec,
    *,
    seed: ArrayLike,
    ema_decay: Annotated[float, Real("[0, 1)", "per step", "of the parameters' average")] = 0.999,
    num_microbatches: Annotated[int, Whole("[1, 1e6]", "", "equal parts of the batch")] = 1,
    monitors: Sequence[Monitor] = (),
    variables: Callable[[PyTree, Array, Array], PyTree] | None = None,
    tokens_per_batch: float | None = None,
    place: Callable[[PyTree], PyTree] | None = None,
    recompute_update: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Build ``step(state, batch) -> (state, metrics)``, to be jitted with the state donated.

    The draw is made once for the global batch and cut into microbatches, so gradients under k
    microbatches equal those of the full batch. A step whose loss, gradient or update is not finite
    leaves parameters, EMA, optimiser and variance state as they were and counts itself. ``spec`` is
    ``objective.spec(batch_size, length)`` of the global batch; ``ema_decay`` is less during
    the first steps. The noise of a ``KeyedBatch`` goes with its examples (:func:`step_draw`).
    ``variables(params, key, rows)``, if given, makes what ``apply_fn`` gets of the state's
    parameters, a key and what it is folded with for each row: the step's key and numbers [N] of
    rows in the batch, or under a ``KeyedBatch`` that of the run and words [N, 2] of the examples.
    So come adapters beside frozen parameters, with their dropout (``models.lora.join``).

    The gradient is the sum over the batch divided by its eligible tokens. Where batches differ in
    length by design (``data.bucketed``), that would favour tokens of short rows; divided by the
    ``tokens_per_batch`` expected of all batches, its mean is that of the mixture of all rows. The
    metrics stay means over the tokens of their batch.

    ``place``, if given, shards gradients and updates as the parameters are
    (``sharding.constrain_like``): so that devices add them up by reduce-scatter, where a compiler
    may choose to send each of them all.

    Whether an update is finite is known only when all of it is. With ``recompute_update`` it is
    computed for that and once more to be applied, so that none is held in between: memory of four
    bytes a parameter, and with moments in 8 bits of eight, for a second pass of the optimiser.
    ValueError unless ``num_microbatches`` divides the batch size and monitors have distinct names.
    """
    if spec.batch_size % num_microbatches:
        raise ValueError(
            f"num_microbatches must be a divisor of the batch size {spec.batch_size}, "
            f"got {num_microbatches}"
        )

    names = [monitor.name for monitor in monitors]
    if len(set(names)) < len(names):
        raise ValueError(f"monitors need names of their own, got {', '.join(names)}")

    loss_fn = summed_loss(apply_fn, objective)
    place = place or (lambda tree: tree)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = getattr(batch, "example_keys", None)
        with jax.named_scope("draw"):
            draw = step_draw(seed, state.step, transform, state.variance, spec, keys)

        def loss_of_rows(params: PyTree, numbered: tuple[Batch, Array], draw: Draw) -> tuple:
            rows, numbers = numbered
            if variables is not None:
                number = state.step if keys is None else 0
                params = variables(params, rng.step_key(seed, number), numbers)
            return loss_fn(params, rows, draw)

        numbered = batch, jnp.arange(spec.batch_size) if keys is None else row_words(keys)
        gradients, sums, stats = accumulate_gradient(
            loss_of_rows, state.params, numbered, draw, num_microbatches
        )
        count = sums.eligible if tokens_per_batch is None else jnp.float32(tokens_per_batch)
        total = place(gradients)

        def updated(total: PyTree, opt_state: PyTree, params: PyTree) -> tuple:
            gradients = jax.tree.map(lambda g: token_mean(g, count), total)
            updates, opt_state = optimizer.update(gradients, opt_state, params)
            return gradients, place(updates), opt_state

        before = total, state.opt_state, state.params
        gradients, updates, opt_state = updated(*before)
        loss = token_mean(sums.loss, sums.eligible)
        norm = optax.tree.norm(gradients)
        # Of the updates too: an optimiser can overflow on gradients that are finite.
        finite = jnp.isfinite(loss) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        if recompute_update:  # a barrier, lest the compiler computes it once
            before, finite = jax.lax.optimization_barrier((before, finite))
            _, updates, opt_state = updated(*before)
        params = optax.apply_updates(state.params, updates)
        done = state.step - state.skipped
        decay = jnp.minimum(ema_decay, (1.0 + done) / (10.0 + done))
        ema = update_average(state.ema, state.params, params, decay)
        # On a skipped step transforms and monitors get NaN, which they reject and count.
        stats = stats._replace(raw=jnp.where(finite, stats.raw, jnp.nan))
        variance = transform.update(state.variance, draw, stats)
        monitor_states = {
            m.name: m.update(state.monitors[m.name], draw, stats, gradients) for m in monitors
        }

        def keep(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        skipped_in_a_row = jnp.where(finite, 0, state.skipped_in_a_row + 1)
        new_state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(ema, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            variance=_keep_counters(finite, variance, state.variance),
            monitors=_keep_counters(finite, monitor_states, state.monitors),
            skipped=state.skipped + jnp.where(finite, 0, 1),
            skipped_in_a_row=skipped_in_a_row,
        )
        metrics = StepMetrics(
            loss=loss,
            bits_per_unit=token_mean(sums.loss, jnp.sum(batch.units)) / math.log(2),
            cross_entropy=token_mean(sums.cross_entropy, sums.targets),
            gradient_norm=norm,
            skipped=jnp.where(finite, 0.0, 1.0),
            skipped_in_a_row=skipped_in_a_row,
        )
        return new_state, metrics

    return step


def _keep_counters(finite: Array, new: PyTree, old: PyTree) -> PyTree:
    """``new``, but on a skipped step only its integers, whatever a transform does with NaN."""

    def choose(n: Array, o: Array) -> Array:
        return n if jnp.issubdtype(n.dtype, jnp.integer) else jnp.where(finite, n, o)

    return jax.tree.map(choose, new, old)


_COMPILER_OPTIONS = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "tpu": {"xla_tpu_decompose_einsum_reduce_scatter": "true"},
}


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """The best measured compiler settings for a training step on this platform (None: here).

    On CPUs, kernel-library products and reductions fused with the functions before them: up to 3%
    less time, a quarter less memory, another order of sums. On TPUs, sums of gradients of which
    each device keeps a part are scattered, where the compiler would send them to all of 64 chips.
    Empty for other platforms and unmeasured jaxlib versions, where an unknown setting is an error.
    """
    if not importlib.metadata.version("jaxlib").startswith("0.10."):
        return {}
    return dict(_COMPILER_OPTIONS.get(platform or jax.default_backend(), ()))


class CompiledStep(NamedTuple):
    """A compiled step, its compile or load time, and its memory per device (None if unknown).

    ``call(state, batch) -> (state, metrics)`` raises TypeError or ValueError for other shapes,
    dtypes or shardings than compiled for.
    """

    call: Callable[..., Any]
    seconds: float
    memory_bytes: int | None

    def describe(self) -> str:
        """One line for logs."""
        known = self.memory_bytes is not None
        memory = f", {format_bytes(self.memory_bytes)} per device" if known else ""
        return f"step compiled in {self.seconds:.1f} s{memory}"


def compile_step(
    step: Callable[..., Any],
    abstract_state: PyTree,
    abstract_batch: PyTree,
    *constants: PyTree,
    options: Mapping[str, str] | None = None,
) -> CompiledStep:
    """Compile a train step for ShapeDtypeStructs with shardings, its state donated.

    ``constants`` are placed arrays, further arguments of the step such as frozen parameters; runs
    that differ in them alone, such as in the seed, share a cache entry. ``options`` replace
    :func:`compiler_options`. MemoryError if the compiler finds no plan that fits a device.
    """
    started = time.monotonic()
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state)
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    lowered = jitted.lower(abstract_state, abstract_batch, *constants)
    try:
        compiled = lowered.compile(
            compiler_options=compiler_options() if options is None else dict(options)
        )
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            "the training step does not fit in the memory of a device; try more "
            "train.num_microbatches, a smaller train.batch_size, model.remat='dots' or a larger "
            f"mesh.fsdp ({str(error).splitlines()[0]})"
        ) from error

    def call(state: PyTree, batch: PyTree) -> Any:
        return compiled(state, batch, *constants)

    seconds = time.monotonic() - started
    return CompiledStep(call if constants else compiled, seconds, _memory_bytes(compiled))


def format_bytes(size: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size:.0f} B"


def _memory_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    new_outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return analysis.argument_size_in_bytes + new_outputs + analysis.temp_size_in_bytes
