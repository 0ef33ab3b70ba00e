"""Sampling: the library's samplers against plain ancestral sampling of the same model.

    python -m experiments.benchmarks.sampling [--shapes=S,M] [--variants=default|all|NAME,...]
        [--seconds=20] [--rounds=3] [--out=FILE.json]

A transformer with random parameters generates eight rows in 64 steps (blocks: as many steps in all,
an equal share for each block). Per sampler: seconds, tokens/s, the speed over the yardstick's,
round by round; medians with quartiles of interleaved rounds. Of the yardstick, whose steps all do
the same work, 8 steps are run and their time is multiplied. Blocks with and without a cache follow
the same law, so their ratio is what the cache saves.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.benchmarks import command, setting, yardstick
from experiments.benchmarks.setting import CHOSEN, PLAIN, SAMPLE_ROWS, YARDSTICK, Shape, Variant
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
    """A way to sample: one line for the reader, its factory, and settings of the network.

    ``make(shape, network, variant, num_steps) -> generate(params, key, canvas)``.
    """

    summary: str
    make: Callable[[Shape, models.Transformer, Variant, int], Generate]
    variant: Variant


def _plain(shape: Shape, _: models.Transformer, __: Variant, num_steps: int) -> Generate:
    run = min(YARDSTICK_STEPS, num_steps)
    return yardstick.make_sampler(shape.mask_id, shape.num_heads, num_steps, run)


def _on_grid(make_sampler: Callable[[], Any]) -> Callable[..., Generate]:
    def make(
        shape: Shape, network: models.Transformer, variant: Variant, num_steps: int
    ) -> Generate:
        return samplers.make_generator(
            setting.apply_fn(network, variant),
            make_sampler(),
            grids.uniform_masking_rate(num_steps),
            mask_id=shape.mask_id,
        )

    return make


def _in_blocks(make_decoder: Callable[..., models.BlockDecoder]) -> Callable[..., Generate]:
    def make(shape: Shape, network: models.Transformer, _: Variant, num_steps: int) -> Generate:
        decoder = make_decoder(network, block_size(shape, num_steps))
        num_blocks = shape.sample_length // decoder.block_size
        grid = grids.uniform_masking_rate(max(num_steps // num_blocks, 1))
        return make_block_generator(decoder, samplers.ancestral(), grid, mask_id=shape.mask_id)

    return make


def block_size(shape: Shape, num_steps: int) -> int:
    """Tokens of a block at a shape: at least a step for every block."""
    return min(shape.sample_length, max(BLOCK_SIZE, -(-shape.sample_length // num_steps)))


def _cached() -> Any:
    return samplers.cached_ancestral(rows_per_pass=SAMPLE_ROWS)


_ancestral = _on_grid(samplers.ancestral)
_blocks, _uncached = _in_blocks(models.cached_block_decoder), _in_blocks(setting.whole_row_decoder)
GENERATORS: Mapping[str, Generator] = {
    YARDSTICK: Generator("plain JAX, ancestral", _plain, PLAIN),
    "ancestral": Generator("ancestral, the network as chosen here", _ancestral, CHOSEN),
    "ancestral, all logits": Generator("logits of all positions, float32", _ancestral, PLAIN),
    "cached ancestral": Generator("no pass for unchanged rows", _on_grid(_cached), CHOSEN),
    "blocks, cached": Generator("block by block over a cache", _blocks, CHOSEN),
    "blocks, uncached": Generator("block by block over whole rows", _uncached, CHOSEN),
}
SETS = {"default": (YARDSTICK, "ancestral", "blocks, cached"), "all": tuple(GENERATORS)}


def measure(shape: Shape, options: command.Options, num_steps: int = STEPS) -> dict[str, Any]:
    """Time the chosen generators at a shape."""
    canvas = samplers.blank_canvas(SAMPLE_ROWS, shape.sample_length, shape.mask_id)
    first_seconds: dict[str, float] = {}

    def build(name: str, generator: Generator) -> Callable[[], Array]:
        network = setting.model(shape, generator.variant)
        generate = generator.make(shape, network, generator.variant, num_steps)
        params = setting.random_params(network, shape.length)

        def call() -> Array:
            return jax.block_until_ready(generate(params, jax.random.key(2), canvas))

        start = time.perf_counter()
        tokens = call()
        first_seconds[name] = time.perf_counter() - start
        if name != YARDSTICK and bool(jnp.any(tokens == shape.mask_id)):
            raise RuntimeError("masks are left")
        return call

    calls, records = command.build_each(command.choose(GENERATORS, options.variants, SETS), build)
    times = command.interleaved(calls, rounds=options.rounds, seconds=options.seconds)
    if YARDSTICK in times:
        share = min(YARDSTICK_STEPS, num_steps) / num_steps
        times[YARDSTICK] = [seconds / share for seconds in times[YARDSTICK]]
    for name, seconds in times.items():
        records[name] |= {
            "seconds_of_first_call": first_seconds[name],
            "seconds": command.summary(seconds),
            "tokens_per_second": canvas.size / command.summary(seconds)["median"],
        }
        if YARDSTICK in times:
            records[name]["speed_over_yardstick"] = command.ratios(times[YARDSTICK], seconds)
    record = {"rows": SAMPLE_ROWS, "length": shape.sample_length, "steps": num_steps}
    if {"blocks, cached", "blocks, uncached"} <= set(times):
        record["speed_of_cache"] = command.ratios(
            times["blocks, uncached"], times["blocks, cached"]
        )
    return record | {"block_size": block_size(shape, num_steps), "generators": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        speed = command.spread(figures.get("speed_over_yardstick"))
        return (
            name,
            command.spread(figures["seconds"], 3),
            f"{figures['tokens_per_second']:.0f}",
            speed,
        )

    title = (
        f"{record['rows']} rows of {record['length']} tokens, {record['steps']} steps, blocks of "
        f"{record['block_size']}"
    )
    header = ("sampler", "seconds", "tokens/s", "over yardstick")
    lines = [title, "", *command.record_table(header, record["generators"], row)]
    if "speed_of_cache" in record:
        lines.append(f"cache over no cache: {command.spread(record['speed_of_cache'])}")
    return lines


PART = command.Part("sampling", measure, table)

if __name__ == "__main__":
    command.main(PART)
