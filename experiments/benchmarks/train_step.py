"""The training step: variants of the library against a plain JAX step of the same model.

    python -m experiments.benchmarks.train_step [--shapes=S,M] [--variants=default|all|NAME,...]
        [--seconds=20] [--rounds=3] [--batch_size=B] [--out=FILE.json]

Steps of all variants take turns, and with them a large matrix product in each dtype in use. Per
variant: seconds of a step, tokens/s, model FLOP/s (``shapes.train_flops``, which charges every
variant with all logits), their share of the best rate of the matrix product in the same dtype
(MFU), the speed over the yardstick's (round by round), compile time, planned memory. Medians with
quartiles.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import machine, setting, yardstick
from experiments.benchmarks.command import Options, Part, choose, main, markdown, spread, why
from experiments.benchmarks.shapes import Shape, train_flops
from experiments.benchmarks.timing import interleaved, ratios, summary
from experiments.benchmarks.variants import PLAIN, TRAIN, TRAIN_SETS, YARDSTICK, Variant
from mdm_jax import training


class _Runner:
    """A compiled step that keeps its state, and what compiling it took."""

    def __init__(
        self, step: Callable[..., Any], state: Any, batch: Any, tuned: dict[str, str] | None
    ):
        self._state, self._batch = jax.block_until_ready((state, batch))
        start = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch)
        traced = time.perf_counter()
        self._compiled = lowered.compile(compiler_options=tuned)
        self.seconds_to_trace = traced - start
        self.seconds_to_compile = time.perf_counter() - traced
        self.memory = machine.peak_bytes(self._compiled)
        self.first_loss = float(self())

    def __call__(self) -> jax.Array:
        self._state, said = jax.block_until_ready(self._compiled(self._state, self._batch))
        return getattr(said, "loss", said)


def measure(shape: Shape, options: Options) -> dict[str, Any]:
    """Times the chosen variants at a shape."""
    chosen = choose(TRAIN, options.variants, TRAIN_SETS)
    runners: dict[str, _Runner] = {}
    records: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, str] = {}
    for name, variant in chosen.items():
        records[name] = {"summary": "plain JAX" if variant is None else variant.summary}
        try:
            step, state, batch = _plain(shape) if variant is None else _library(shape, variant)
            dtypes[name] = _dtype(shape, variant)
            # The yardstick is compiled as jax.jit does it.
            tuned = None if variant is None else training.compiler_options()
            runners[name] = _Runner(step, state, batch, tuned)
        # Whatever a machine or a version lacks, out of memory included, is reported.
        except Exception as error:
            records[name]["unavailable"] = why(error)
    products = {dtype: machine.product(jnp.dtype(dtype)) for dtype in sorted(set(dtypes.values()))}
    calls = dict(runners) | {f"product {dtype}": call for dtype, (call, _) in products.items()}
    times = interleaved(calls, rounds=options.rounds, seconds=options.seconds)

    # The best of all rounds: a ceiling is what the machine can do when nothing disturbs it.
    ceilings = {
        dtype: operations / min(times[f"product {dtype}"])
        for dtype, (_, operations) in products.items()
    }
    flops, tokens = train_flops(shape), shape.batch_size * shape.length
    for name, runner in runners.items():
        dtype, seconds = dtypes[name], times[name]
        records[name] |= {
            "dtype": dtype,
            "seconds": summary(seconds),
            "tokens_per_second": tokens / summary(seconds)["median"],
            "model_flops_per_second": flops / summary(seconds)["median"],
            "mfu": summary([flops / taken / ceilings[dtype] for taken in seconds]),
            "seconds_to_trace": runner.seconds_to_trace,
            "seconds_to_compile": runner.seconds_to_compile,
            "memory_bytes": runner.memory,
            "first_loss": runner.first_loss,
        }
        if YARDSTICK in runners:
            records[name]["speed_over_yardstick"] = ratios(times[YARDSTICK], seconds)
    return {"model_flops": flops, "ceilings": ceilings, "variants": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    header = ("variant", "step, s", "tokens/s", "GFLOP/s", "MFU", "over yardstick")
    header += ("compile, s", "peak MiB", "first loss")
    rows, missing = [], []
    for name, found in record["variants"].items():
        if "unavailable" in found:
            missing.append(f"{name}: not measured, {found['unavailable']}")
            continue
        memory, speed = found["memory_bytes"], found.get("speed_over_yardstick")
        rows.append(
            (
                f"{name} ({found['dtype']})",
                spread(found["seconds"], 3),
                f"{found['tokens_per_second']:.0f}",
                f"{found['model_flops_per_second'] / 1e9:.1f}",
                f"{found['mfu']['median']:.0%}",
                spread(speed) if speed else "-",
                f"{found['seconds_to_trace'] + found['seconds_to_compile']:.1f}",
                f"{memory['peak'] / 2**20:.0f}" if memory else "-",
                f"{found['first_loss']:.4f}",
            )
        )
    rates = ", ".join(f"{dtype} {rate / 1e9:.1f}" for dtype, rate in record["ceilings"].items())
    return [*markdown(header, rows), *missing, f"Best rate of the matrix product, GFLOP/s: {rates}"]


def _library(shape: Shape, variant: Variant) -> tuple[Callable[..., Any], Any, Any]:
    return setting.train_step(shape, variant)


def _plain(shape: Shape) -> tuple[Callable[..., Any], Any, Any]:
    init, step = yardstick.make_step(shape.mask_id, shape.num_heads)
    params = setting.random_params(setting.model(shape, PLAIN), shape.length)
    return step, init(params), setting.batch(shape).tokens


def _dtype(shape: Shape, variant: Variant | None) -> str:
    if variant is None:
        return "float32"
    return jnp.dtype(setting.model(shape, variant).config.dtype).name


PART = Part("train_step", measure, table)

if __name__ == "__main__":
    main(PART)
