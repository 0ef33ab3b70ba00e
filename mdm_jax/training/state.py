"""The state of a training run, as one pytree of arrays."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mdm_jax.draws import DrawSpec
from mdm_jax.training.ema import new_average
from mdm_jax.training.monitors import Monitor
from mdm_jax.types import Array, PyTree
from mdm_jax.variance.transform import VarianceTransform


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
