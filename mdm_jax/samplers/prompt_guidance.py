"""Classifier-free guidance by the given tokens."""

import jax.numpy as jnp

from mdm_jax.samplers.sampler import Denoise, StepContext
from mdm_jax.samplers.wrappers import DenoiseWrapper, all_rows
from mdm_jax.typing import Array


def prompt_guidance(scale: float) -> DenoiseWrapper:
    """Pushes logits away from those that the network has without the prompt; see ``wrapped``.

    ``y = y_u + scale (y_c - y_u)``, where the network for y_u sees every given token of the canvas
    masked. Both come from one pass over a doubled batch, so the network needs no training for it
    beyond rows that are masked throughout. Tokens ruled out in either pass keep the conditional
    logit.

    In ``sample_blocks``, which needs ``guided=True`` for it, what is given in the blocks before is
    not masked but left out, as padding is: a block model never met a mask token there. This takes
    two passes, each over a memory of its own.

    Args:
        scale: guidance scale, 1 for none; LLaDA's ``w + 1``.

    Raises:
        ValueError: if the scale is not a positive, finite number.

    References: Ho and Salimans 2022; Nie et al. 2024 (arXiv 2410.18514), unsupervised guidance of
    masked models. For two networks, and for a part of the levels: ``samplers.guided``.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"prompt_guidance needs a finite scale > 0 (1 for none), got {scale}")

    def wrapper(context: StepContext, denoise: Denoise) -> Denoise:
        def guided(tokens: Array, logsnr: Array, rows: Array | None = None) -> Array:
            each = all_rows(tokens, rows)
            blind = jnp.where(context.free[each], tokens, context.mask_id)
            if context.before is not None:
                target = denoise(tokens, logsnr, rows)
                base = denoise(blind, logsnr, rows, without_prompt=True)
            else:
                level = jnp.asarray(logsnr)
                level = level if level.ndim == 0 else jnp.concatenate([level, level])
                twice = jnp.concatenate([each, each])
                both = denoise(jnp.concatenate([tokens, blind]), level, twice)
                target, base = jnp.split(both, 2)
            possible = jnp.isfinite(target) & jnp.isfinite(base)
            return jnp.where(possible, base + scale * (target - base), target)

        return guided

    return wrapper
