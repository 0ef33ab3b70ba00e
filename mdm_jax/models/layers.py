"""Network layers: linear, norms, rotary embedding, level features, rematerialisation.

Every parameter carries logical axis names, which ``mdm_jax.sharding`` maps to mesh axes: ``vocab``,
``embed`` (the residual width), ``heads`` (heads times head size), ``mlp``, ``layers``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from mdm_jax.models import lora
from mdm_jax.models.products import product, product_p
from mdm_jax.sharding import constrain
from mdm_jax.types import Array

Initializer = Callable[..., Array]
KERNEL_INIT: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
"""Gives a kernel whose outputs have the variance of its inputs."""


class Linear(nn.Module):
    """``x W (+ b)`` with operands in ``dtype`` and float32 accumulation in both passes.

    The result is float32, or of ``dtype`` if ``rounded``.
    """

    features: int
    axes: tuple[str, str]
    use_bias: bool = False
    rounded: bool = False
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = KERNEL_INIT

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (x.shape[-1], self.features), self.param_dtype)
        # The backward pass keeps x in the operands' dtype, and no copy of the kernel.
        out_dtype = self.dtype if self.rounded else None
        y = product("...i,io->...o", x.astype(self.dtype), kernel, self.dtype, out_dtype)
        y = lora.add(self, x, y, self.dtype)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,), self.param_dtype)
            y = y + _last_axis(bias, y)
        return y.astype(self.dtype) if self.rounded else y


class Kernel(nn.Module):
    """The kernel of a :class:`Linear`, for products taken elsewhere."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    param_dtype: jnp.dtype = jnp.float32
    kernel_init: Initializer = KERNEL_INIT

    @nn.compact
    def __call__(self) -> Array:
        init = nn.with_logical_partitioning(self.kernel_init, self.axes)
        return self.param("kernel", init, self.shape, self.param_dtype)

    def adapted(self, x: Array, y: Array, dtype: jnp.dtype) -> Array:
        """The product ``y`` of ``x`` and the kernel, with that of its adapter (``lora.add``)."""
        return lora.add(self, x, y, dtype)


class Bias(nn.Module):
    """``x + b`` over the last axis, which is that of attention heads."""

    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        return x + _last_axis(self.param("bias", zeros, x.shape[-1:], self.param_dtype), x)


def look_up(table: Array, indices: Array) -> Array:
    """Rows of ``table`` [K, D], axes ("vocab" or None, "embed"), at ``indices`` [N, Q]: float32.

    Each device of a replica takes its columns for all rows of the replica; then rows and columns
    change places, both ways, which moves the rows' vectors alone and not the table.
    """
    indices = constrain(indices, "replica", None)
    vectors = constrain(jnp.take(table, indices, axis=0), "replica", None, "embed")
    return constrain(vectors.astype(jnp.float32), "batch", None, None)


def recomputed(function: Callable[..., Array]) -> Callable[..., Array]:
    """``function``, of whose values the backward pass keeps the arguments alone.

    For elementwise functions and norms, whose intermediate results are wider than their arguments:
    a scan over layers would store all of them.
    """
    return jax.checkpoint(function, prevent_cse=False)


class Norm(nn.Module):
    """RMSNorm or LayerNorm in float32, ``kind`` "rms" or "layer", with a scale if ``learned``.

    The normalised input is ``rounded`` to a dtype before it is scaled in it.
    """

    kind: str = "rms"
    learned: bool = True
    axes: tuple[str | None, ...] = ("embed",)
    param_dtype: jnp.dtype = jnp.float32
    eps: float = 1e-6
    rounded: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = None
        if self.learned:
            ones = nn.with_logical_partitioning(nn.initializers.ones, self.axes)
            scale = self.param("scale", ones, (x.shape[-1],), self.param_dtype)
        return recomputed(self._normalise)(x, scale)

    def _normalise(self, x: Array, scale: Array | None) -> Array:
        x = x.astype(jnp.float32)
        if self.kind == "layer":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        if scale is None:
            return x
        x = x.astype(self.rounded) * _last_axis(scale, x).astype(self.rounded)
        return x.astype(jnp.float32)


def _last_axis(vector: Array, like: Array) -> Array:
    return vector.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + (-1,))


class Rotary(NamedTuple):
    """Sines and cosines of a rotary embedding, [1 or N, L, 1, D/2] for heads of size D."""

    sin: Array
    cos: Array


class Llama3Scaling(NamedTuple):
    """Frequencies of Llama 3.1: ``factor`` times lower where a row of ``original`` positions has
    fewer than ``low`` periods, as they were above ``high``, interpolated between."""

    factor: float
    low: float
    high: float
    original: int

    def __call__(self, frequency: Array | np.ndarray) -> Array | np.ndarray:
        xp = np if isinstance(frequency, np.ndarray) else jnp
        periods = self.original * frequency / xp.float32(2 * math.pi)
        kept = xp.clip((periods - self.low) / (self.high - self.low), 0.0, 1.0)
        return (kept * frequency + (1 - kept) * frequency / self.factor).astype(xp.float32)


def rotary_embedding(
    positions: Array | np.ndarray,
    size: int,
    base: float = 10_000.0,
    scaling: Llama3Scaling | None = None,
) -> Rotary:
    """Rotary embedding (Su et al. 2021) of positions [L] or [N, L] for ``size`` D of a head, even.

    NumPy positions give NumPy tables, constants of the program; a CPU would otherwise recompute
    them for every element of every layer.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    half = size // 2
    frequency = xp.float32(base) ** (-xp.arange(half, dtype=xp.float32) / half)
    frequency = frequency if scaling is None else scaling(frequency)
    frequency = frequency.reshape((1,) * positions.ndim + (-1,))
    angle = positions[..., None].astype(xp.float32) * frequency
    angle = angle.reshape((-1, angle.shape[-2], 1, half))
    return Rotary(xp.sin(angle), xp.cos(angle))


def apply_rotary(x: Array, rotary: Rotary) -> Array:
    """Queries or keys [N, L, H, D] rotated by :func:`rotary_embedding`, or their first numbers.

    In float32, if not wider.
    """
    x, half = _wide(x), rotary.sin.shape[-1]
    sin, cos = (jnp.asarray(table, x.dtype) for table in rotary)
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned + [rest] * (rest.shape[-1] > 0), axis=-1)


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _gelu_argument(x: Array) -> Array:
    return _GELU_SCALE * (x + _GELU_CUBIC * x**3)


@jax.custom_jvp
def _gelu(x: Array) -> Array:
    # A logistic function here and a tanh in the derivative: a compiler that found one expression
    # in both passes would keep its result.
    return x * jax.nn.sigmoid(2 * _gelu_argument(x))


@_gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    tanh = jnp.tanh(_gelu_argument(x))
    inner = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * jnp.square(x))
    derivative = 0.5 * (1 + tanh) + 0.5 * x * (1 - jnp.square(tanh)) * inner
    return _gelu(x), tangent * derivative


@recomputed
def gelu(x: Array) -> Array:
    """``x Phi(x)`` by the tanh approximation (Hendrycks & Gimpel 2016), as ``jax.nn.gelu``.

    Computed in float32, returned in the dtype of ``x``, which the backward pass keeps alone.
    """
    return _gelu(_wide(x)).astype(x.dtype)


@recomputed
def swiglu(gate: Array, x: Array) -> Array:
    """``silu(gate) x`` (Shazeer 2020), dtypes and memory as of :func:`gelu`."""
    return (jax.nn.silu(_wide(gate)) * _wide(x)).astype(x.dtype)


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def logsnr_features(logsnr: Array, width: int) -> Array:
    """Sinusoidal features [..., width] of log signal-to-noise ratios [...].

    Inputs are clipped to [-20, 20], where both rates are within 2e-9 of 0 and 1; infinite levels
    (ends of a sampling grid) are valid.
    """
    frequency = jnp.exp(jnp.linspace(jnp.log(0.05), jnp.log(8.0), width // 2))
    level = jnp.clip(logsnr.astype(jnp.float32), -20.0, 20.0)[..., None]
    angle = level * frequency.reshape((1,) * logsnr.ndim + (-1,))
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def _is_product(primitive, *_, **__) -> bool:
    return primitive in (jax.lax.dot_general_p, product_p)


def _is_product_without_batch(primitive, *_, **params) -> bool:
    dimensions = params.get("dimension_numbers", params.get("dimensions"))
    return _is_product(primitive) and dimensions[1] == ((), ())


_INPUT, _HEADS = "block_input", "heads"


def named_input(x: Array) -> Array:
    """``x``, which a block begins from, under a name that policies keep."""
    return checkpoint_name(x, _INPUT)


def named_heads(x: Array) -> Array:
    """Queries, keys, values or attention's output [N, L, H, D], sharded and named alike."""
    return checkpoint_name(constrain(x, "batch", None, "heads", None), _HEADS)


_HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


def _to_host_without_batch(primitive, *_, **params):
    dimensions = params.get("dimension_numbers", params.get("dimensions"))
    choose = jax.checkpoint_policies.offload_dot_with_no_batch_dims(**_HOST)
    primitive = jax.lax.dot_general_p if primitive is product_p else primitive
    return choose(primitive, dimension_numbers=dimensions)


POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(_HEADS),
    "dots": _is_product,
    "dots_without_batch": _is_product_without_batch,
    "offload_inputs": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_INPUT], **_HOST
    ),
    "offload_dots": _to_host_without_batch,
}
"""Rematerialisation: what a block keeps for its backward pass. "none": everything needed; "full":
its input alone; "attention": also queries, keys, values and attention's output; "dots": the results
of all products; "dots_without_batch": of those with weights, so attention and elementwise functions
are recomputed. "offload_inputs" and "offload_dots" keep as "full" and "dots_without_batch" do, in
the host's memory."""


def check_policy(device: jax.Device, name: str) -> None:
    """Raise ValueError for a policy that needs the host's memory, where ``device`` has none."""
    kinds = {memory.kind for memory in device.addressable_memories()}
    # Of GPUs that are not there none is known.
    if name.startswith("offload") and kinds and _HOST["offload_dst"] not in kinds:
        raise ValueError(
            f"model.remat={name} keeps activations in the host's memory, which {device.device_kind}"
            " cannot reach; take model.remat=full"
        )


def rematerialised(module: type[nn.Module], name: str, scanned: bool = False) -> type[nn.Module]:
    """The module class under a policy of ``POLICIES``; ``scanned`` as the body of a scan."""
    if name == "none":
        return module
    return nn.remat(module, prevent_cse=not scanned, policy=POLICIES[name])
