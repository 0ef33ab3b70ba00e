"""Sampling: the library's samplers against plain ancestral sampling of the same model.

    python -m experiments.benchmarks.sampling [--shapes=S,M] [--variants=default|all|NAME,...]
        [--seconds=20] [--rounds=3] [--out=FILE.json]

Eight rows are generated from nothing in 64 steps (blocks: as many steps in all, an equal share for
each block), by a transformer with random parameters. Per sampler: seconds, tokens/s, the speed over
the yardstick's, round by round; medians with quartiles of rounds in which all take turns. Of the
yardstick, whose steps all do the same work, 8 steps are run and their time is multiplied. Blocks
with and without a cache follow the same law, so their ratio is what the cache saves.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import setting, yardstick
from experiments.benchmarks.command import Options, Part, choose, main, markdown, spread, why
from experiments.benchmarks.shapes import SAMPLE_ROWS, Shape
from experiments.benchmarks.timing import interleaved, ratios, summary
from experiments.benchmarks.variants import CHOSEN, PLAIN, YARDSTICK, Variant
from mdm_jax import models, samplers
from mdm_jax.samplers.blocks import make_block_generator
from mdm_jax.schedules import grids
from mdm_jax.types import Array, PyTree

STEPS = 64
YARDSTICK_STEPS = 8
BLOCK_SIZE = 16
"""Tokens of a block; longer rows get longer blocks, so that every block has a step."""

Generate = Callable[[PyTree, Array, Array], Array]


class Generator(NamedTuple):
    """A way to sample.

    Attributes:
        summary: one line for the reader.
        make: ``make(shape, network, variant, num_steps) -> generate(params, key, canvas)``.
        variant: settings of the network.
    """

    summary: str
    make: Callable[[Shape, models.Transformer, Variant, int], Generate]
    variant: Variant


def _plain(shape: Shape, _: models.Transformer, __: Variant, num_steps: int) -> Generate:
    run = min(YARDSTICK_STEPS, num_steps)
    return yardstick.make_sampler(shape.mask_id, shape.num_heads, num_steps, run)


def _ancestral(shape: Shape, network: models.Transformer, variant: Variant, num_steps: int):
    return samplers.make_generator(
        setting.apply_fn(network, variant),
        samplers.ancestral(),
        grids.uniform_masking_rate(num_steps),
        mask_id=shape.mask_id,
    )


def _cached_ancestral(shape: Shape, network: models.Transformer, variant: Variant, num_steps: int):
    return samplers.make_generator(
        setting.apply_fn(network, variant),
        samplers.cached_ancestral(rows_per_pass=SAMPLE_ROWS),
        grids.uniform_masking_rate(num_steps),
        mask_id=shape.mask_id,
    )


def _blocks(shape: Shape, network: models.Transformer, _: Variant, num_steps: int) -> Generate:
    decoder = models.cached_block_decoder(network, block_size(shape, num_steps))
    return _in_blocks(shape, decoder, num_steps)


def _uncached_blocks(shape: Shape, network: models.Transformer, _: Variant, num_steps: int):
    decoder = setting.whole_row_decoder(network, block_size(shape, num_steps))
    return _in_blocks(shape, decoder, num_steps)


def _in_blocks(shape: Shape, decoder: models.BlockDecoder, num_steps: int) -> Generate:
    num_blocks = shape.sample_length // decoder.block_size
    grid = grids.uniform_masking_rate(max(num_steps // num_blocks, 1))
    return make_block_generator(decoder, samplers.ancestral(), grid, mask_id=shape.mask_id)


def block_size(shape: Shape, num_steps: int) -> int:
    """Tokens of a block at a shape: at least a step for every block."""
    return min(shape.sample_length, max(BLOCK_SIZE, -(-shape.sample_length // num_steps)))


GENERATORS: Mapping[str, Generator] = {
    YARDSTICK: Generator("plain JAX, ancestral", _plain, PLAIN),
    "ancestral": Generator("ancestral, the network as chosen here", _ancestral, CHOSEN),
    "ancestral, all logits": Generator("with logits of all places, float32", _ancestral, PLAIN),
    "cached ancestral": Generator("no pass for rows that stay", _cached_ancestral, CHOSEN),
    "blocks, cached": Generator("block by block over a cache", _blocks, CHOSEN),
    "blocks, uncached": Generator("block by block over whole rows", _uncached_blocks, CHOSEN),
}
SETS = {
    "default": (YARDSTICK, "ancestral", "blocks, cached"),
    "all": tuple(GENERATORS),
}


def measure(shape: Shape, options: Options, num_steps: int = STEPS) -> dict[str, Any]:
    """Times the chosen generators at a shape."""
    chosen = choose(GENERATORS, options.variants, SETS)
    canvas = samplers.blank_canvas(SAMPLE_ROWS, shape.sample_length, shape.mask_id)
    records: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Array]] = {}
    for name, generator in chosen.items():
        records[name] = {"summary": generator.summary}
        try:
            network = setting.model(shape, generator.variant)
            generate = generator.make(shape, network, generator.variant, num_steps)
            call = _call(generate, setting.random_params(network, shape.length), canvas)
            start = time.perf_counter()
            tokens = call()
            records[name]["seconds_of_first_call"] = time.perf_counter() - start
            if name != YARDSTICK and bool(jnp.any(tokens == shape.mask_id)):
                raise RuntimeError("masks are left")
            calls[name] = call
        # Whatever a machine or a version lacks, out of memory included, is reported.
        except Exception as error:
            records[name]["unavailable"] = why(error)
    times = interleaved(calls, rounds=options.rounds, seconds=options.seconds)
    if YARDSTICK in times:
        share = min(YARDSTICK_STEPS, num_steps) / num_steps
        times[YARDSTICK] = [seconds / share for seconds in times[YARDSTICK]]
    for name, seconds in times.items():
        records[name] |= {
            "seconds": summary(seconds),
            "tokens_per_second": canvas.size / summary(seconds)["median"],
        }
        if YARDSTICK in times:
            records[name]["speed_over_yardstick"] = ratios(times[YARDSTICK], seconds)
    record = {"rows": SAMPLE_ROWS, "length": shape.sample_length, "steps": num_steps}
    if {"blocks, cached", "blocks, uncached"} <= set(times):
        record["speed_of_cache"] = ratios(times["blocks, uncached"], times["blocks, cached"])
    return record | {"block_size": block_size(shape, num_steps), "generators": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    rows, missing = [], []
    for name, found in record["generators"].items():
        if "unavailable" in found:
            missing.append(f"{name}: not measured, {found['unavailable']}")
            continue
        speed = found.get("speed_over_yardstick")
        cells = (name, spread(found["seconds"], 3), f"{found['tokens_per_second']:.0f}")
        rows.append((*cells, spread(speed) if speed else "-"))
    title = (
        f"{record['rows']} rows of {record['length']} tokens, {record['steps']} steps, blocks of "
        f"{record['block_size']}"
    )
    if "speed_of_cache" in record:
        missing.append(f"cache over no cache: {spread(record['speed_of_cache'])}")
    header = ("sampler", "seconds", "tokens/s", "over yardstick")
    return [title, "", *markdown(header, rows), *missing]


def _call(generate: Generate, params: PyTree, canvas: Array) -> Callable[[], Array]:
    def call() -> Array:
        return jax.block_until_ready(generate(params, jax.random.key(2), canvas))

    return call


PART = Part("sampling", measure, table)

if __name__ == "__main__":
    main(PART)
