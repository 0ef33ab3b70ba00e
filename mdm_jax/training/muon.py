"""Muon: updates with equal singular values, computed where whole matrices lie."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mdm_jax.sharding import map_stack
from mdm_jax.types import Array, PyTree

_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


def scale_by_muon(momentum: float) -> tuple[optax.GradientTransformation, ...]:
    """Nesterov momentum of kernels [in, out] or [layers, in, out], orthogonalised and scaled by
    shape: the first transformations of ``optax.contrib.muon``, with its state.

    Stacks of scanned layers change places inside :func:`~mdm_jax.sharding.sharded_apply`: every
    device orthogonalises whole matrices of the stack, so that the products of the iteration send
    nothing. Reference: Jordan et al. 2024, Muon.
    """
    library = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=lambda _: _MATRIX
    )

    def orthogonalise(x: Array, coefficients: Array) -> Array:
        start = optax.contrib.MuonState(jnp.zeros((), jnp.int32), jnp.zeros_like(x), coefficients)
        return library.update(x, start)[0]

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mu, momentum, 1)
        ahead = optax.tree.bias_correction(mean, momentum, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, momentum, count)
        mixed = jax.tree.map(lambda m, g: momentum * m + (1 - momentum) * g, ahead, now)

        def whole(x: Array) -> Array:
            function = lambda x: orthogonalise(x, state.ns_coeffs)  # noqa: E731
            return map_stack(function, x, "matrices") if x.ndim == 3 else function(x)

        return jax.tree.map(whole, mixed), state._replace(count=count, mu=mean)

    # Wide matrices move outputs by as much as tall ones, as by the library.
    def scaled(x: Array) -> Array:
        return jnp.sqrt(jnp.maximum(1, x.shape[-1] / x.shape[-2])) * x

    return (
        optax.GradientTransformation(library.init, update),
        optax.stateless(lambda updates, _: jax.tree.map(scaled, updates)),
    )
