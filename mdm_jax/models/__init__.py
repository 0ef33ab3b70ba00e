"""Flax networks: the rest of the package uses ``model_fn(inputs, logsnr, documents) -> logits``.

Names are loaded when they are first used, so that losses and samplers do not load Flax.
"""

import importlib

_MODULES = {
    "transformer": ("Transformer", "TransformerConfig"),
    "cross_entropy": (
        "Chunking",
        "PositionLoss",
        "Readout",
        "as_logits",
        "exclude_token",
        "position_losses",
        "readout_apply",
    ),
    "decoders": (
        "BlockDecoder",
        "CausalDecoder",
        "block_apply",
        "cached_block_decoder",
        "cached_causal_decoder",
        "causal_apply",
        "recomputing_block_decoder",
        "recomputing_causal_decoder",
    ),
    "kv_cache": ("KeyValueCache",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [*_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
