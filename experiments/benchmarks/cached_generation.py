"""What a KV cache saves in generation, block by block and token by token.

    python -m experiments.benchmarks.cached_generation [--cached_length=192] [--out=FILE.json]

A transformer with random parameters fills an all-mask canvas: as a block model by first hitting
(one pass per token, and one per block to fill the cache), and as an autoregressive model. With a
cache a pass runs the block (or the token); without one it runs the whole row under the block-causal
mask, which gives the same tokens. Medians of interleaved runs, compilation left out. The defaults
take about two minutes on two CPU cores.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks import machine
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


class Sizes(NamedTuple):
    """Rows and tokens that are generated, tokens of blocks, and the network's shape; ``vocab``
    without the mask token, ``window`` in blocks (tokens, if causal), None for all."""

    rows: int
    length: int
    blocks: tuple[int, ...]
    width: int
    depth: int
    heads: int
    vocab: int
    window: int | None = None


def measure(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Time every pair of generators: medians, and the share of equal tokens."""
    mask_id, window = sizes.vocab, sizes.window
    shape = (sizes.vocab + 1, sizes.width, sizes.depth, sizes.heads)
    dtype = machine.product_dtype()
    model = models.Transformer(models.TransformerConfig(*shape, dtype=dtype))
    params = random_params(model, 8)
    canvas = samplers.blank_canvas(sizes.rows, sizes.length, mask_id)

    def compare(cached: Generate, uncached: Generate) -> dict[str, float]:
        calls = {
            "cached": lambda: np.asarray(cached(params, jax.random.key(2), canvas)),
            "uncached": lambda: np.asarray(uncached(params, jax.random.key(2), canvas)),
        }
        tokens = [call() for call in calls.values()]  # compiles
        times = interleaved(calls, rounds=repeats, seconds=0.0)
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
        for size in sizes.blocks
    }
    uncached = recomputing_causal_decoder(causal_apply(model, mask_id, window))
    generators["causal"] = compare(
        make_next_token_generator(cached_causal_decoder(model, mask_id, window), mask_id=mask_id),
        make_next_token_generator(uncached, mask_id=mask_id),
    )
    return {"settings": sizes._asdict() | {"repeats": repeats}, "generators": generators}


def main(_: list[str]) -> None:
    """Measure at the sizes of the command line, and print the table."""
    sizes = Sizes(
        rows=_BATCH.value,
        length=_LENGTH.value,
        blocks=tuple(_BLOCKS.value),
        width=_WIDTH.value,
        depth=_DEPTH.value,
        heads=_HEADS.value,
        vocab=_VOCAB.value,
        window=_WINDOW.value,
    )
    record = measure(sizes, _REPEATS.value)
    record = {"device": str(jax.devices()[0]), "jax": jax.__version__} | record
    print(f"{sizes.rows} rows of {sizes.length} on {record['device']}, jax {jax.__version__}")
    print(f"{'':16}{'cached':>10}{'uncached':>11}{'speed-up':>10}{'same tokens':>13}")
    for name, figures in record["generators"].items():
        seconds = f"{figures['cached']:>8.2f} s{figures['uncached']:>9.2f} s"
        print(f"{name:16}{seconds}{figures['speed_up']:>9.1f}x{figures['same_tokens']:>13.2%}")
    write(record)


if __name__ == "__main__":
    app.run(main)
