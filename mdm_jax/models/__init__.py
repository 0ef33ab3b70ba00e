"""Flax networks. Everything outside sees only ``model_fn(inputs, logsnr, documents) -> logits``."""

from mdm_jax.models.activations import sharded_apply as sharded_apply
from mdm_jax.models.block import BlockDecoder as BlockDecoder
from mdm_jax.models.block import block_apply as block_apply
from mdm_jax.models.block import cached_block_decoder as cached_block_decoder
from mdm_jax.models.block import recomputing_block_decoder as recomputing_block_decoder
from mdm_jax.models.cache import KeyValueCache as KeyValueCache
from mdm_jax.models.causal import CausalDecoder as CausalDecoder
from mdm_jax.models.causal import cached_causal_decoder as cached_causal_decoder
from mdm_jax.models.causal import causal_apply as causal_apply
from mdm_jax.models.causal import recomputing_causal_decoder as recomputing_causal_decoder
from mdm_jax.models.picture_transformer import PictureTransformer as PictureTransformer
from mdm_jax.models.position_losses import PositionLoss as PositionLoss
from mdm_jax.models.position_losses import position_losses as position_losses
from mdm_jax.models.readout import Chunking as Chunking
from mdm_jax.models.readout import Readout as Readout
from mdm_jax.models.readout import as_logits as as_logits
from mdm_jax.models.readout import readout_apply as readout_apply
from mdm_jax.models.transformer import Transformer as Transformer
from mdm_jax.models.transformer import TransformerConfig as TransformerConfig
