"""A pre-norm transformer for discrete diffusion: bidirectional, in blocks, or causal."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from mdm_jax.models.attention_masks import within_documents
from mdm_jax.models.readout import Projection, Readout
from mdm_jax.models.transformer_blocks import (
    KeyValues,
    add_estimate,
    level_condition,
    run_blocks,
)
from mdm_jax.models.transformer_config import TransformerConfig as TransformerConfig
from mdm_jax.typing import Array


class Transformer(nn.Module):
    """Bidirectional transformer: ``apply(params, inputs, logsnr, documents) -> logits``.

    :meth:`attend` runs the same parameters under any attention mask and against a cache, which is
    what block diffusion and autoregressive models do (``models.block_apply``,
    ``models.causal_apply``). :meth:`readout` and :meth:`attend_readout` stop before the logits,
    for losses that want few of them (``models.readout_apply``).

    Args of the call:
        inputs: [N, L] int32 tokens, mask token included.
        logsnr: [N, S] noise levels of S contiguous segments of equal length (1 for the whole row);
            read only if the config conditions on them.
        documents: [N, L] int32 document numbers, 0 for padding; None for one whole document.
        estimate: [N, L, K] probabilities of an earlier estimate of the clean tokens, for a config
            with self_conditioning; None (or zeros) for no estimate. Parameters are the same.

    Returns:
        [N, L, K] float32 logits. Whoever takes a softmax excludes the mask token
        (``corruption.exclude_token``).

    Raises:
        ValueError: for an estimate of another shape, or one that the config does not ask for; for
            levels that are missing or do not divide the row, if the config conditions on them; for
            rows longer than the config's learned positions.
    """

    config: TransformerConfig

    def __call__(
        self,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Array:
        return self.readout(inputs, logsnr, documents, estimate).logits()

    def readout(
        self,
        inputs: Array,
        logsnr: Array | None = None,
        documents: Array | None = None,
        estimate: Array | None = None,
    ) -> Readout:
        """A call whose logits are still to be computed."""
        mask = None if documents is None else within_documents(documents)
        positions = np.arange(inputs.shape[-1])
        return self.attend_readout(inputs, logsnr, positions, mask, estimate=estimate)[0]

    def attend(self, *inputs: Array | None, **further) -> tuple[Array, KeyValues]:
        """:meth:`attend_readout` with logits [N, num_outputs, K] float32 for the readout."""
        readout, key_values = self.attend_readout(*inputs, **further)
        return readout.logits(), key_values

    @nn.compact
    def attend_readout(
        self,
        inputs: Array,
        logsnr: Array | None,
        positions: Array,
        mask: Array | None,
        cached: KeyValues | None = None,
        estimate: Array | None = None,
        num_outputs: int | None = None,
    ) -> tuple[Readout, KeyValues]:
        """Runs tokens at given positions, which may look at each other and at cached ones.

        Args:
            inputs: [N, Q] int32 tokens.
            logsnr: [N, S] noise levels of S contiguous segments of equal length, or None.
            positions: [Q] or [N, Q] integer positions in the row, for the rotary embedding.
            mask: [N or 1, 1, Q, M + Q] bool, where a query may look: at M cached tokens, then at
                the Q new ones (:mod:`mdm_jax.models.attention_masks`); None for everywhere.
            cached: keys and values [depth, N, M, H, D] of tokens that went before, or None.
            estimate: [N, Q, K], as in a call.
            num_outputs: the readout is that of the first so many of the Q places only.

        Returns:
            Readout of [N, num_outputs] places, and the keys and values of the new tokens
            [depth, N, Q, H, D]. Whichever of the two is not used costs nothing under jit.

        Raises:
            ValueError: as a call.
        """
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        table = self.param("embedding", init, (c.vocab_size, c.width), c.param_dtype)
        x = jnp.take(table, inputs, axis=0).astype(jnp.float32)
        if c.learned_positions:
            x = x + _LearnedPositions(c, name="positions")(positions)
        x = add_estimate(c, x, table, estimate)
        condition = None
        if c.condition_on_logsnr:
            condition = level_condition(c, logsnr, inputs.shape[-1])
        x, key_values = run_blocks(c, x, mask, positions, condition, cached)
        x = x[:, :num_outputs]
        if not c.tie_embeddings:
            table = _Head(c, name="head")()
        return Readout(x, table, Projection(c.tie_embeddings, c.dtype)), key_values


class _LearnedPositions(nn.Module):
    """A vector for each position of a row: [Q] or [N, Q] positions to [1 or N, Q, width]."""

    config: TransformerConfig

    @nn.compact
    def __call__(self, positions: Array) -> Array:
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "embed"))
        table = self.param("table", init, (c.learned_positions, c.width), c.param_dtype)
        if isinstance(positions, np.ndarray) and positions.max() >= c.learned_positions:
            raise ValueError(
                f"a row of {positions.max() + 1} tokens is longer than learned_positions="
                f"{c.learned_positions}; raise that, or set it to 0 for rotary positions alone"
            )
        # Traced positions beyond the table are NaN, which the loss shows at once.
        vectors = jnp.take(table, positions, axis=0).astype(jnp.float32)
        return vectors if positions.ndim == 2 else vectors[None]


class _Head(nn.Module):
    """The kernel [width, K] of the vocabulary projection."""

    config: TransformerConfig

    @nn.compact
    def __call__(self) -> Array:
        c = self.config
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed", "vocab"))
        return self.param("kernel", zeros, (c.width, c.vocab_size), c.param_dtype)
