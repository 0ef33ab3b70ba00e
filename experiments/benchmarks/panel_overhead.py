"""What the noise panel costs in a run of the launcher.

    python -m experiments.benchmarks.panel_overhead [--preset=quickstart] [--panel_steps=20]

Interleaved times of a training step without monitors, of the same step compiled again (what two
equal programs differ by here), of one with the default monitors, and of one measurement of A, B and
C; from these, the steps between measurements under ``panel.cost`` and the share of the time that
the panel takes. By the clock and by the processor time of all threads, which other work on the
machine disturbs less. And the seconds that its compilation adds to the start, without a compilation
cache.
"""

import contextlib
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments.benchmarks.command import interleaved, summary, write
from mdm_jax import training
from mdm_jax.estimates import mean_estimate
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.reports.panel import NoisePanel

_CONFIG = flags.DEFINE_string("preset", "quickstart", "A built-in config.")
_STEPS = flags.DEFINE_integer("panel_steps", 20, "Timed calls of each.")


def main(_: list[str]) -> None:
    """Time the steps and a measurement, and print what follows."""
    config = presets.get_config(_CONFIG.value)
    calls, compiled = {}, {}
    default = config.train.monitors
    for name, monitors in (("plain", ()), ("again", ()), ("monitors", default)):
        config.train.monitors = monitors
        experiment = make_experiment(config)
        with contextlib.closing(experiment.train_batches()) as batches:
            batch = next(batches)
        started = time.monotonic()
        step = training.compile_step(
            experiment.step,
            experiment.abstract_state(),
            experiment.abstract_batch(),
            experiment.placed_seed(),
        )
        compiled[name] = time.monotonic() - started
        calls[name] = _stepping(step.call, experiment.initial_state(), batch)
    started = time.monotonic()
    panel = NoisePanel(experiment, training.SilentWriter(), 0)
    panel.wait()
    compiled["panel"] = time.monotonic() - started
    state = experiment.initial_state()
    calls["panel"] = lambda: jax.block_until_ready(
        panel._measure(
            *(state.params, state.variance, batch, panel._seed, state.step), experiment.frozen
        )
    )
    for call in calls.values():
        call()
    record = {"compiled": compiled, "device": str(jax.devices()[0]), "jax": jax.__version__}
    for name, clock in (("wall", time.perf_counter), ("processor", time.process_time)):
        times = interleaved(calls, rounds=_STEPS.value, seconds=0.0, clock=clock)
        record[name] = _shares(times, panel.every, config.panel.cost)
        for line in _lines(name, record[name]):
            print(line)
    print(f"compiled in {compiled['panel']:.1f} s, the step in {compiled['monitors']:.1f} s")
    write(record)


def _shares(times: Mapping[str, list[float]], every: int, cost: float) -> dict[str, Any]:
    """Medians in seconds, and what monitors and measurements add to a step, with errors."""
    seconds = {name: summary(values)["median"] for name, values in times.items()}
    every = max(every, math.ceil(seconds["panel"] / (cost * seconds["monitors"])))
    plain = np.array(times["plain"])
    added = {
        name: mean_estimate(np.array(times[name]) / plain - 1) for name in ("again", "monitors")
    }
    measurement = mean_estimate(np.array(times["panel"]) / every / plain)
    return {"seconds": seconds, "every": every, "measurement": measurement} | added


def _lines(clock: str, shares: Mapping[str, Any]) -> list[str]:
    """The same in words."""
    added = {
        name: f"{100 * shares[name].value:+.1f} ± {100 * shares[name].standard_error:.1f} %"
        for name in ("again", "monitors", "measurement")
    }
    return [
        f"{clock} time: step {shares['seconds']['plain']:.4f} s, measurement "
        f"{shares['seconds']['panel']:.4f} s every {shares['every']} steps",
        f"  monitors {added['monitors']}, measurement {added['measurement']}; the same step "
        f"compiled again {added['again']}",
    ]


def _stepping(step, state, batch):
    """A call that takes a step from where the last one ended."""
    held = [state]

    def call() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    return call


if __name__ == "__main__":
    app.run(main)
