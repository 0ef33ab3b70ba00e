"""Optimisers and learning-rate schedule."""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mdm_jax.checks import Real, Whole, checked
from mdm_jax.pytrees import TRAINED
from mdm_jax.sharding import map_stack
from mdm_jax.types import Array, PyTree

_B1 = Annotated[float, Real("[0, 1)", "per step", "decay of Adam's first moments")]
_B2 = Annotated[float, Real("[0, 1)", "per step", "decay of Adam's second moments")]
_WeightDecay = Annotated[
    float, Real("[0, 10]", "per step and learning rate", "of kernels, embeddings, adapters")
]
_ClipNorm = Annotated[float, Real("(0, 1e6]", "global norm", "of gradients; None: no clipping")]


_MATRIX = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


@checked
def warmup_cosine(
    peak: Annotated[
        float, Real("(0, 10]", "learning rate", "after the warm-up; for adamw a tenth of muon's")
    ],
    warmup_steps: Annotated[int, Whole("[0, 2e9]", "steps", "of rising learning rate")],
    total_steps: Annotated[int, Whole("[1, 2e9]", "steps")],
    final_fraction: Annotated[float, Real("[0, 1]", "of the peak", "at the end")] = 0.1,
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then a cosine to ``final_fraction * peak`` at ``total_steps``.

    ValueError unless the warm-up ends before the run does.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps), got {warmup_steps} of {total_steps} steps;"
            " lower optimizer.warmup_steps"
        )
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, total_steps, peak * final_fraction
    )


@checked
def adamw(
    schedule: optax.Schedule,
    *,
    b1: _B1 = 0.9,
    b2: _B2 = 0.99,
    weight_decay: _WeightDecay = 0.0,
    clip_norm: _ClipNorm | None = 1.0,
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW decaying kernels and embeddings only."""
    return optax.chain(
        _clip(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


@checked
def muon(
    schedule: optax.Schedule,
    *,
    momentum: Annotated[float, Real("[0, 1)", "per step", "decay of Muon's momentum")] = 0.95,
    b1: _B1 = 0.9,
    b2: _B2 = 0.99,
    weight_decay: _WeightDecay = 0.0,
    clip_norm: _ClipNorm | None = 1.0,
) -> optax.GradientTransformation:
    """Global-norm clipping, then Muon for the network's inner kernels and Adam for the rest.

    Factors of adapters count as kernels, each by itself. Embeddings, output head, norms and biases
    take Adam steps at the same learning rate; good values are about ten times those of AdamW.
    ``momentum`` and ``weight_decay`` are Muon's, ``b1`` and ``b2`` Adam's. Reference: Jordan et al.
    2024, Muon (:func:`scale_by_muon`).
    """
    kernels = optax.chain(
        *scale_by_muon(momentum),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    rest = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=0.0, nesterov=True)
    return optax.chain(
        _clip(clip_norm),
        optax.partition({"muon": kernels, "adam": rest}, _inner_kernels),
    )


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


def decayed(params: PyTree) -> PyTree:
    """True for parameters under weight decay, by name: stacked norm scales look like matrices."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool({"kernel", "embedding", TRAINED} & _names(path)), params
    )


def _inner_kernels(params: PyTree) -> PyTree:
    """ "muon" for kernels of the network but its head, "adam" for the rest."""

    def one(path: tuple, _: Any) -> str:
        names = _names(path)
        return "muon" if {"kernel", TRAINED} & names and "head" not in names else "adam"

    return jax.tree_util.tree_map_with_path(one, params)


def _names(path: tuple) -> set[str]:
    return {getattr(entry, "key", getattr(entry, "name", None)) for entry in path}


def _clip(norm: float | None) -> optax.GradientTransformation:
    return optax.identity() if norm is None else optax.clip_by_global_norm(norm)
