"""Flax networks. Everything outside sees only ``model_fn(inputs, logsnr, documents) -> logits``."""

from mdm_jax.models.cross_entropy import (
    Chunking,
    PositionLoss,
    Readout,
    as_logits,
    position_losses,
    readout_apply,
)
from mdm_jax.models.decoders import (
    BlockDecoder,
    CausalDecoder,
    block_apply,
    cached_block_decoder,
    cached_causal_decoder,
    causal_apply,
    recomputing_block_decoder,
    recomputing_causal_decoder,
)
from mdm_jax.models.kv_cache import KeyValueCache
from mdm_jax.models.transformer import Transformer, TransformerConfig
