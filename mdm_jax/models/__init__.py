"""Flax networks. Everything outside sees only ``model_fn(inputs, logsnr, documents) -> logits``."""

from mdm_jax.models.picture_transformer import PictureTransformer as PictureTransformer
from mdm_jax.models.transformer import Transformer as Transformer
from mdm_jax.models.transformer import TransformerConfig as TransformerConfig
