"""The optax chain after the backward pass."""

import jax
import optax
import optax.contrib

from mdm_jax.typing import PyTree


def warmup_cosine(
    peak: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1
) -> optax.Schedule:
    """Linear warm-up to ``peak``, then a cosine to ``final_fraction * peak`` at ``total_steps``.

    Raises:
        ValueError: if the warm-up does not end before the run does.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps must lie in [0, total_steps), got {warmup_steps} of {total_steps} steps"
        )
    return optax.warmup_cosine_decay_schedule(
        0.0 if warmup_steps else peak, peak, warmup_steps, total_steps, peak * final_fraction
    )


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW that decays matrices only.

    Args:
        schedule: learning rate by step.
        b1, b2: decay of the moments.
        weight_decay: applied to kernels and embeddings, not to norms and biases.
        clip_norm: largest allowed global norm of the gradient, or None.

    Raises:
        ValueError: if ``clip_norm`` is not positive.
    """
    return optax.chain(
        _clip(clip_norm),
        optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed),
    )


def muon(
    schedule: optax.Schedule,
    *,
    momentum: float = 0.95,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """Global-norm clipping, then Muon for the kernels inside the network and Adam for the rest.

    Muon orthogonalises the momentum of each kernel; embeddings, the output head, norms and biases
    take Adam steps at the same learning rate.

    Args:
        schedule: learning rate by step; good values are about ten times those of AdamW.
        momentum: decay of Muon's momentum.
        b1, b2: decay of Adam's moments.
        weight_decay: of the kernels that Muon updates.
        clip_norm: largest allowed global norm of the gradient, or None.

    Raises:
        ValueError: if ``clip_norm`` is not positive.

    Reference: Jordan et al. 2024, Muon; implemented by ``optax.contrib.muon``.
    """
    return optax.chain(
        _clip(clip_norm),
        optax.contrib.muon(
            schedule,
            beta=momentum,
            adam_b1=b1,
            adam_b2=b2,
            weight_decay=weight_decay,
            muon_weight_dimension_numbers=_inner_kernels,
        ),
    )


def decayed(params: PyTree) -> PyTree:
    """True for the parameters that weight decay applies to, by name.

    Dimensions would not tell: scanned layers stack norm scales into matrices.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool({"kernel", "embedding"} & _names(path)), params
    )


def _inner_kernels(params: PyTree) -> PyTree:
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: matrix if "kernel" in _names(path) and "head" not in _names(path) else None,
        params,
    )


def _names(path: tuple) -> set[str]:
    return {getattr(entry, "key", getattr(entry, "name", None)) for entry in path}


def _clip(norm: float | None) -> optax.GradientTransformation:
    if norm is None:
        return optax.identity()
    if norm <= 0:
        raise ValueError(f"clip_norm must be positive or None, got {norm}")
    return optax.clip_by_global_norm(norm)
