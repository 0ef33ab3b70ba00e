"""The bound of block diffusion."""

import jax.numpy as jnp

from mdm_jax.corruption.process import Corruption
from mdm_jax.draws import Draw, DrawSpec, LossStats
from mdm_jax.objectives.masked import masked_nelbo
from mdm_jax.objectives.objective import Objective, repeat_views
from mdm_jax.schedules.laws import Law
from mdm_jax.types import Array, Batch, ModelFn


def block_nelbo(corruption: Corruption, block_size: int, law: Law | None = None) -> Objective:
    """Negative evidence lower bound of a block diffusion model, nats.

    With S_b the sum of the cross-entropies of the masked tokens of block b, given the rest of the
    block and the *clean* blocks before it,

        NELBO = sum_b int_0^1 (1/m) E[S_b | m] dm ,

    estimated with an independent level per block and one pass over the noised row and the clean row
    side by side. With one block it is :func:`masked_nelbo`; with blocks of one token the
    autoregressive log-likelihood, which fixed counts estimate without noise.

    Stats have shape [V, B, S] with S = L / L' blocks; a block counts as a row of its eligible
    tokens. The network is ``model_fn(inputs [N, 2L], logsnr [N, S], documents [N, L]) -> logits
    [N, L, K]``, such as ``models.block_apply(model, block_size)``.

    Args:
        corruption: a masked process such as ``corruption.fixed_count(mask_id)``.
        block_size: L'.
        law: as of :func:`masked_nelbo`.

    Raises:
        ValueError: as :func:`masked_nelbo`, and if the block size is below 1; from ``spec`` and
            ``loss``, if L' does not divide L or the draw has another number of levels.

    Reference: Arriola et al. 2025 (BD3-LM).
    """
    if block_size < 1:
        raise ValueError(f"block_nelbo needs a block_size of at least 1, got {block_size}")
    segments = masked_nelbo(corruption, law)

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        levels, blocks = draw.u.shape[-1], num_blocks(batch.tokens.shape[-1])
        if levels != blocks:
            raise ValueError(
                f"{blocks} blocks of {block_size} tokens need a noise level each; the draw has "
                f"{levels}: make it with this objective's spec"
            )

        def with_clean_row(inputs: Array, logsnr: Array, documents: Array) -> Array:
            clean = repeat_views(jnp.asarray(batch.tokens), draw.u.shape[0])
            return model_fn(jnp.concatenate([inputs, clean], axis=-1), logsnr, documents)

        return segments.loss(with_clean_row, batch, draw)

    def spec(batch_size: int, length: int) -> DrawSpec:
        shape = corruption.event_shape(length)
        return DrawSpec(batch_size, num_blocks(length), shape, separate_levels=True)

    def num_blocks(length: int) -> int:
        if length % block_size:
            raise ValueError(
                f"blocks of {block_size} tokens do not divide a row of {length} evenly; choose a "
                "divisor of the length"
            )
        return length // block_size

    return segments._replace(name="block_nelbo", spec=spec, loss=loss)
