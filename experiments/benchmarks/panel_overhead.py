"""What the noise panel costs in a run of the launcher.

    python -m experiments.benchmarks.panel_overhead [--preset=quickstart] [--panel_steps=20]

Interleaved medians of a training step without monitors, of one with the default ones, and of one
measurement of A, B and C; from these, the steps between measurements under ``panel.cost`` and the
share of the time that the panel takes. And the seconds that its compilation adds to the start,
without a compilation cache.
"""

import contextlib
import math
import time

import jax
from absl import app, flags

from experiments.benchmarks.command import interleaved, summary, write
from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.reports.panel import NoisePanel

_CONFIG = flags.DEFINE_string("preset", "quickstart", "A built-in config.")
_STEPS = flags.DEFINE_integer("panel_steps", 20, "Timed calls of each.")


def main(_: list[str]) -> None:
    """Time the steps and a measurement, and print what follows."""
    config = presets.get_config(_CONFIG.value)
    calls, compiled = {}, {}
    for name, monitors in (("plain", ()), ("monitors", config.train.monitors)):
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
    times = interleaved(calls, rounds=_STEPS.value, seconds=0.0)
    median = {name: summary(seconds)["median"] for name, seconds in times.items()}
    cost = config.panel.cost
    every = max(panel.every, math.ceil(median["panel"] / (cost * median["monitors"])))
    monitors = median["monitors"] / median["plain"] - 1
    share = median["panel"] / (every * median["monitors"])
    record = {"seconds": median, "compiled": compiled, "every": every, "monitors": monitors}
    print(
        f"step {median['plain']:.4f} s, with monitors {median['monitors']:.4f} s ({monitors:+.1%})"
    )
    print(
        f"measurement {median['panel']:.4f} s every {every} steps: {share:.1%} (panel.cost {cost})"
    )
    print(f"compiled in {compiled['panel']:.1f} s, the step in {compiled['monitors']:.1f} s")
    write(record | {"share": share, "device": str(jax.devices()[0]), "jax": jax.__version__})


def _stepping(step, state, batch):
    """A call that takes a step from where the last one ended."""
    held = [state]

    def call() -> None:
        held[0], metrics = step(held[0], batch)
        jax.block_until_ready(metrics)

    return call


if __name__ == "__main__":
    app.run(main)
