"""What a cache of keys and values saves in generation, block by block and token by token.

    python -m experiments.benchmarks.cached_generation [--length=192] [--out=FILE.json]

A transformer with random parameters fills an all-mask canvas: as a block model by first hitting
(one pass per token, and one per block to remember it), and as an autoregressive model. With a cache
a pass runs the block (or the token) over what is remembered; without one it runs the whole row
under the block-causal mask, which gives the same tokens. Medians of interleaved runs, compilation
left out. The defaults take about two minutes on two CPU cores.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

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
from mdm_jax.types import Array, PyTree

_BATCH = flags.DEFINE_integer("batch", 4, "Rows.")
_LENGTH = flags.DEFINE_integer("length", 192, "Tokens of a row.")
_BLOCKS = flags.DEFINE_multi_integer("block_size", [4, 16], "Tokens of a block; may be repeated.")
_WINDOW = flags.DEFINE_integer("window", None, "Blocks (tokens, if causal) seen; all by default.")
_WIDTH = flags.DEFINE_integer("width", 128, "Residual width.")
_DEPTH = flags.DEFINE_integer("depth", 4, "Layers.")
_HEADS = flags.DEFINE_integer("heads", 4, "Attention heads.")
_VOCAB = flags.DEFINE_integer("vocab", 256, "Tokens without the mask token.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Timed runs of each generator.")
_OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")


def main(_: list[str]) -> None:
    """Times every pair of generators and prints the table."""
    mask_id, window = _VOCAB.value, _WINDOW.value
    shape = (_VOCAB.value + 1, _WIDTH.value, _DEPTH.value, _HEADS.value)
    model = models.Transformer(models.TransformerConfig(*shape))
    params = random_params(model, 8)
    pairs = {}
    for size in _BLOCKS.value:
        pairs[f"blocks of {size}"] = tuple(
            make_block_generator(decoder, samplers.first_hitting(), None, mask_id=mask_id)
            for decoder in (
                cached_block_decoder(model, size, window),
                whole_row_decoder(model, size, window),
            )
        )
    pairs["causal"] = tuple(
        make_next_token_generator(decoder, mask_id=mask_id)
        for decoder in (
            cached_causal_decoder(model, mask_id, window),
            recomputing_causal_decoder(causal_apply(model, mask_id, window)),
        )
    )
    canvas = samplers.blank_canvas(_BATCH.value, _LENGTH.value, mask_id)
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
        "generators": {
            name: _compare([_call(g, params, canvas) for g in pair]) for name, pair in pairs.items()
        },
    }
    print(f"{_BATCH.value} rows of {_LENGTH.value} on {record['device']}, jax {jax.__version__}")
    print(f"{'':16}{'cached':>10}{'uncached':>11}{'speed-up':>10}{'same tokens':>13}")
    for name, figures in record["generators"].items():
        seconds = f"{figures['cached']:>8.2f} s{figures['uncached']:>9.2f} s"
        print(f"{name:16}{seconds}{figures['speed_up']:>9.1f}x{figures['same_tokens']:>13.2%}")
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _call(
    generate: Callable[..., Array], params: PyTree, canvas: Array
) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(generate(params, jax.random.key(2), canvas))


def _compare(calls: list[Callable[[], np.ndarray]]) -> dict[str, float]:
    """Medians of interleaved runs of a cached and an uncached generator, after one run each."""
    first, second = (call() for call in calls)
    times: list[list[float]] = [[], []]
    for _ in range(_REPEATS.value):
        for call, seconds in zip(calls, times):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    cached, uncached = map(statistics.median, times)
    return {
        "cached": cached,
        "uncached": uncached,
        "speed_up": uncached / cached,
        "same_tokens": float(np.mean(first == second)),
    }


if __name__ == "__main__":
    app.run(main)
