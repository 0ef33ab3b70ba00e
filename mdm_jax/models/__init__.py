"""Flax networks ``(inputs, logsnr, documents) -> logits``, loaded on first use of a name."""

import importlib

_NAMES = {
    "transformer": "Transformer TransformerConfig",
    "dit": "DiT DiTConfig",
    "cross_entropy": "Chunking Deferred PositionLoss Readout as_logits exclude_token"
    " position_losses readout_apply shifted_apply without_tokens",
    "decoders": "BlockDecoder CausalDecoder MaskChange block_apply cached_block_decoder"
    " cached_causal_decoder causal_apply masked_apply partial_decoder recomputing_block_decoder"
    " recomputing_causal_decoder",
    "kv_cache": "KeyValueCache",
    "partition": "Partition pair_apply revealed_apply",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_MODULES]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
