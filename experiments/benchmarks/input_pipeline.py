"""The input pipeline: batches per second, and how long a training step waits for one.

    python -m experiments.benchmarks.input_pipeline [--shapes=S,M] [--seconds=20] [--rounds=3]
        [--out=FILE.json]

Documents of random tokens, about a third of a row each, packed first fit, shuffled by Grain, placed
on the devices. ``alone``: rows/s of reading and placing batches with nothing else to do. Then
training steps with prefetched batches, with batches read by the step itself, and with one fixed
batch are interleaved: the seconds in which a step waits for its batch, as a share of the step, and
the speed over the step that never waits.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import command, setting
from experiments.benchmarks.setting import CHOSEN, Shape
from mdm_jax import data, sharding, training
from mdm_jax.data.rows import PackedSpans
from mdm_jax.types import Batch

_ROWS = 4096
_PULLS = 200
_DEPTH = 2


def measure(shape: Shape, options: command.Options) -> dict[str, Any]:
    """Measure the pipeline at a shape; the variants of the options are not read."""
    try:
        import grain  # noqa: F401  which the data layer imports when it first needs it

    except ImportError as error:
        return {"unavailable": command.why(error)}
    source, fill = _source(shape)
    placement = sharding.batch_sharding(sharding.make_mesh())

    def place(batch: Batch) -> Batch:
        return jax.block_until_ready(sharding.place_batch(batch, placement))

    def stream(prefetch: int) -> Any:
        return data.train_iterator(source, shape.batch_size, 0, prefetch=prefetch, place=place)

    plain = stream(0)
    next(plain)
    pulls = command.interleaved({"alone": lambda: next(plain)}, rounds=_PULLS, seconds=0.0)
    seconds = command.summary(pulls["alone"])
    step, state, batch = setting.train_step(shape, CHOSEN)
    batch, state = place(batch), sharding.replicate(state, placement.mesh)
    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower(state, batch)
        .compile(compiler_options=training.compiler_options())
    )
    with contextlib.closing(stream(_DEPTH)) as prefetched:
        sources: dict[str, Callable[[], Batch]] = {
            "no pipeline": lambda: batch,
            "prefetched": lambda: next(prefetched),
            "pulled by the step": lambda: next(plain),
        }
        runners = {name: _Runner(compiled, state, take) for name, take in sources.items()}
        for runner in runners.values():
            runner()
            runner.waits.clear()
        times = command.interleaved(runners, rounds=max(options.rounds, 3), seconds=options.seconds)
    return {
        "fill": fill,
        "rows_per_second_alone": shape.batch_size / seconds["median"],
        "batch_seconds_alone": seconds,
        "steps": {
            name: {
                "seconds": command.summary(times[name]),
                "wait_seconds": command.summary(runners[name].waits),
                "wait_share": sum(runners[name].waits) / sum(times[name]),
                "speed_over_no_pipeline": command.ratios(times["no pipeline"], times[name]),
            }
            for name in runners
        },
    }


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""
    if "unavailable" in record:
        return [f"not measured, {record['unavailable']}"]
    rows = [
        (
            name,
            command.spread(figures["seconds"], 4),
            f"{1e3 * figures['wait_seconds']['median']:.3f}",
            f"{figures['wait_share']:.3%}",
            command.spread(figures["speed_over_no_pipeline"]),
        )
        for name, figures in record["steps"].items()
    ]
    alone = record["batch_seconds_alone"]["median"]
    title = (
        f"Alone: {record['rows_per_second_alone']:.0f} rows/s ({1e3 * alone:.3f} ms a batch), rows "
        f"filled to {record['fill']:.1%}"
    )
    header = ("batches", "step, s", "wait, ms", "wait / step", "speed over no pipeline")
    return [title, "", *command.markdown(header, rows)]


class _Runner:
    """A training step that gets its batch from ``take`` and records how long that took."""

    def __init__(self, step: Callable[..., Any], state: Any, take: Callable[[], Batch]):
        # A copy of its own, since the step donates its state.
        self._step, self._state, self._take = step, jax.tree.map(jnp.copy, state), take
        self.waits: list[float] = []

    def __call__(self) -> None:
        start = time.perf_counter()
        batch = self._take()
        self.waits.append(time.perf_counter() - start)
        self._state, _ = jax.block_until_ready(self._step(self._state, batch))


def _source(shape: Shape) -> tuple[PackedSpans, float]:
    """Packed rows of random documents, and the share of their positions that hold tokens."""
    stream = np.random.default_rng(0)
    sizes = stream.integers(1, 2 * shape.length // 3, _ROWS)
    ends = np.cumsum(sizes)
    tokens = stream.integers(0, shape.mask_id, ends[-1]).astype(np.int32)
    characters = np.ones(shape.vocab_size, np.int32)
    rows = data.first_fit(sizes, shape.length)
    source = PackedSpans(tokens, ends - sizes, ends, rows, shape.length, 0, characters)
    return source, len(tokens) / (len(source) * shape.length)


PART = command.Part("input_pipeline", measure, table)

if __name__ == "__main__":
    command.main(PART)
