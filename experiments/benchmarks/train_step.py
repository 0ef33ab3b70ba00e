"""The training step: variants of the library against a plain JAX step of the same model.

    python -m experiments.benchmarks.train_step [--shapes=S,M] [--variants=default|all|NAME,...]
        [--seconds=20] [--rounds=3] [--batch_size=B] [--processor_seconds] [--out=FILE.json]

Steps of all variants are interleaved with each other and with a large matrix product in each dtype
in use. Per variant: seconds of a step, tokens/s, model FLOP/s (``setting.train_flops``, which
charges every variant with all logits), their share of the best rate of the matrix product in the
same dtype (MFU), the speed over the yardstick's (round by round), compile time, planned memory.
Medians with quartiles.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import command, machine, setting, yardstick
from experiments.benchmarks.setting import PLAIN, TRAIN, TRAIN_SETS, YARDSTICK, Shape, Variant
from mdm_jax import training


class Runner:
    """A compiled step that keeps its state; its parameters, and what compiling it took."""

    def __init__(self, shape: Shape, name: str, variant: Variant):
        if name == YARDSTICK:
            init, step = yardstick.make_step(shape.mask_id, shape.num_heads)
            params = setting.random_params(setting.model(shape, PLAIN), shape.length)
            state, batch = init(params), setting.batch(shape).tokens
        else:
            step, state, batch = setting.train_step(shape, variant)
        self.dtype = jnp.dtype(setting.model(shape, variant).config.dtype).name
        self._state, self._batch = jax.block_until_ready((state, batch))
        self.num_params = training.num_params(state.params)
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        traced = time.perf_counter()
        # The yardstick is compiled as jax.jit does it.
        options = None if name == YARDSTICK else training.compiler_options()
        self._compiled = lowered.compile(compiler_options=options)
        self.seconds_to_trace = traced - start
        self.seconds_to_compile = time.perf_counter() - traced
        self.memory = machine.peak_bytes(self._compiled)
        self.first_loss = float(self())

    def __call__(self) -> jax.Array:
        self._state, metrics = jax.block_until_ready(self._compiled(self._state, self._batch))
        return getattr(metrics, "loss", metrics)


def measure(shape: Shape, options: command.Options) -> dict[str, Any]:
    """Time the chosen variants at a shape."""
    runners, records = command.build_each(
        command.choose(TRAIN, options.variants, TRAIN_SETS),
        lambda name, variant: Runner(shape, name, variant),
    )
    dtypes = sorted({runner.dtype for runner in runners.values()})
    products = {dtype: machine.product(jnp.dtype(dtype)) for dtype in dtypes}
    calls = dict(runners) | {f"product {dtype}": call for dtype, (call, _) in products.items()}
    clock = time.process_time if options.processor else time.perf_counter
    times = command.interleaved(calls, rounds=options.rounds, seconds=options.seconds, clock=clock)

    # The best of all rounds: a ceiling is what the machine can do when nothing disturbs it.
    ceilings = {
        dtype: operations / min(times[f"product {dtype}"])
        for dtype, (_, operations) in products.items()
    }
    flops, tokens = setting.train_flops(shape), shape.batch_size * shape.length
    for name, runner in runners.items():
        seconds = times[name]
        records[name] |= {
            "dtype": runner.dtype,
            "seconds": command.summary(seconds),
            "tokens_per_second": tokens / command.summary(seconds)["median"],
            "model_flops_per_second": flops / command.summary(seconds)["median"],
            "mfu": command.summary([flops / taken / ceilings[runner.dtype] for taken in seconds]),
            "seconds_to_trace": runner.seconds_to_trace,
            "seconds_to_compile": runner.seconds_to_compile,
            "memory_bytes": runner.memory,
            "first_loss": runner.first_loss,
        }
        if YARDSTICK in runners:
            records[name]["speed_over_yardstick"] = command.ratios(times[YARDSTICK], seconds)
    return {"model_flops": flops, "ceilings": ceilings, "variants": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        memory = figures["memory_bytes"]
        return (
            f"{name} ({figures['dtype']})",
            command.spread(figures["seconds"], 3),
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['model_flops_per_second'] / 1e9:.1f}",
            f"{figures['mfu']['median']:.0%}",
            command.spread(figures.get("speed_over_yardstick")),
            f"{figures['seconds_to_trace'] + figures['seconds_to_compile']:.1f}",
            f"{memory['peak'] / 2**20:.0f}" if memory else "-",
            f"{figures['first_loss']:.4f}",
        )

    header = ("variant", "step, s", "tokens/s", "GFLOP/s", "MFU", "over yardstick")
    header += ("compile, s", "peak MiB", "first loss")
    rates = ", ".join(f"{dtype} {rate / 1e9:.1f}" for dtype, rate in record["ceilings"].items())
    lines = command.record_table(header, record["variants"], row)
    return [*lines, f"Best rate of the matrix product, GFLOP/s: {rates}"]


PART = command.Part("train_step", measure, table)

if __name__ == "__main__":
    command.main(PART)
