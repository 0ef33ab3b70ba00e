"""What a KV cache saves in generation, block by block and token by token.

    python -m experiments.benchmarks.cached_generation [--cached_length=192] [--out=FILE.json]

A transformer with random parameters fills an all-mask canvas: as a block model by first hitting
(one pass per token, and one per block to fill the cache), and as an autoregressive model. With a
cache a pass runs the block (or the token); without one it runs the whole row under the block-causal
mask, which gives the same tokens. Medians of interleaved runs, compilation left out. The defaults
take about two minutes on two CPU cores.
"""

from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks.command import interleaved, summary, write
from experiments.benchmarks.setting import random_params, whole_row_decoder
from mdm_jax import models, samplers
from mdm_jax.models.decoders import (
    cached_block_decoder,
    cached_causal_decoder,
    causal_apply,
    recomputing_causal_decoder,
)
from mdm_jax.samplers.blocks import make_block_generator
from mdm_jax.samplers.next_token import make_next_token_generator
from mdm_jax.types import Array

_BATCH = flags.DEFINE_integer("batch", 4, "Rows.")
_LENGTH = flags.DEFINE_integer("cached_length", 192, "Tokens of a row.")
_BLOCKS = flags.DEFINE_multi_integer("block_size", [4, 16], "Tokens of a block; may be repeated.")
_WINDOW = flags.DEFINE_integer("window", None, "Blocks (tokens, if causal) seen; all by default.")
_WIDTH = flags.DEFINE_integer("width", 128, "Residual width.")
_DEPTH = flags.DEFINE_integer("depth", 4, "Layers.")
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.")
_VOCAB = flags.DEFINE_integer("vocab", 256, "Tokens without the mask token.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each generator.")

Generate = Callable[..., Array]


def main(_: list[str]) -> None:
    """Time every pair of generators and print the table."""
    mask_id, window = _VOCAB.value, _WINDOW.value
    shape = (_VOCAB.value + 1, _WIDTH.value, _DEPTH.value, _HEADS.value)
    model = models.Transformer(models.TransformerConfig(*shape))
    params = random_params(model, 8)
    canvas = samplers.blank_canvas(_BATCH.value, _LENGTH.value, mask_id)

    def compare(cached: Generate, uncached: Generate) -> dict[str, float]:
        calls = {
            "cached": lambda: np.asarray(cached(params, jax.random.key(2), canvas)),
            "uncached": lambda: np.asarray(uncached(params, jax.random.key(2), canvas)),
        }
        tokens = [call() for call in calls.values()]  # compiles
        times = interleaved(calls, rounds=_REPEATS.value, seconds=0.0)
        medians = {name: summary(seconds)["median"] for name, seconds in times.items()}
        return medians | {
            "speed_up": medians["uncached"] / medians["cached"],
            "same_tokens": float(np.mean(tokens[0] == tokens[1])),
        }

    def block_generator(decoder: models.BlockDecoder) -> Generate:
        return make_block_generator(decoder, samplers.first_hitting(), None, mask_id=mask_id)

    generators = {
        f"blocks of {size}": compare(
            block_generator(cached_block_decoder(model, size, window)),
            block_generator(whole_row_decoder(model, size, window)),
        )
        for size in _BLOCKS.value
    }
    uncached = recomputing_causal_decoder(causal_apply(model, mask_id, window))
    generators["causal"] = compare(
        make_next_token_generator(cached_causal_decoder(model, mask_id, window), mask_id=mask_id),
        make_next_token_generator(uncached, mask_id=mask_id),
    )
    record = {
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "settings": {
            "batch": _BATCH.value,
            "length": _LENGTH.value,
            "window": window,
            **dict(zip(("vocab_size", "width", "depth", "heads"), shape)),
            "repeats": _REPEATS.value,
        },
        "generators": generators,
    }
    print(f"{_BATCH.value} rows of {_LENGTH.value} on {record['device']}, jax {jax.__version__}")
    print(f"{'':16}{'cached':>10}{'uncached':>11}{'speed-up':>10}{'same tokens':>13}")
    for name, figures in generators.items():
        seconds = f"{figures['cached']:>8.2f} s{figures['uncached']:>9.2f} s"
        print(f"{name:16}{seconds}{figures['speed_up']:>9.1f}x{figures['same_tokens']:>13.2%}")
    write(record)


if __name__ == "__main__":
    app.run(main)
