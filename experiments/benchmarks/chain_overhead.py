"""What a variance chain, and what a monitor, costs inside the training step, at the M shape.

    python -m experiments.benchmarks.chain_overhead [--steps=5] [--whole_steps=0] [--out=FILE.json]

M: rows of 128 tokens, vocabulary 32000, width 256, 6 layers, 8 heads, batch 16. From one run, over
the median of ``steps`` training steps without chain and monitors:

* ``alone``: median time of a chain's drawing and updating by itself, less that of independent
  draws; of a monitor's update, given losses and gradients. A few minutes on two CPU cores.
* ``step``, with ``--whole_steps=N``: median of N whole steps with the chain, interleaved with all
  others. Its spread is far above what it should resolve, and every chain is a compilation.
"""

import functools
import json
import pathlib
import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments.benchmarks import setting
from experiments.benchmarks.shapes import SHAPES
from experiments.benchmarks.timing import interleaved
from experiments.benchmarks.variants import PLAIN
from mdm_jax import training, variance
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.launch import build, config
from mdm_jax.types import PyTree

_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps without a chain.")
_WHOLE = flags.DEFINE_integer("whole_steps", 0, "Timed whole steps per chain, 0 for none.")
_ALONE = flags.DEFINE_integer("alone", 200, "Timed calls of drawing and updating by themselves.")
_OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")

M = SHAPES["M"]


def main(_: list[str]) -> None:
    """Measures every single-view transform of the build table and every monitor."""
    spec, chains = setting.objective(M).spec(M.batch_size, M.length), {"none": variance.chain()}
    params = setting.random_params(setting.model(M, PLAIN), M.length)
    defaults = config.get_config().variance
    for name, factory in build.VARIANCE.items():
        transform = factory(**build.settings(defaults, name))
        if transform.views == 1 and name != "identity":
            chains[name] = variance.chain(transform)
    step = statistics.median(_interleaved({"none": _step(chains["none"])}, _STEPS.value)["none"])
    alone = _medians({n: setting.draw_and_update(c, spec) for n, c in chains.items()})
    watched = _medians({m.name: _monitor(m, spec, params) for m in _monitors()})
    record = {
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "step_seconds": step,
        "chains": {name: {"alone": (alone[name] - alone["none"]) / step} for name in chains},
        "monitors": {name: {"alone": seconds / step} for name, seconds in watched.items()},
    }
    if _WHOLE.value:
        steps = {name: _step(chain) for name, chain in chains.items()}
        whole = {n: statistics.median(t) for n, t in _interleaved(steps, _WHOLE.value).items()}
        for name, figures in record["chains"].items():
            figures["step"] = whole[name] / whole["none"]
    print(f"step without a chain: {step:.3f} s on {record['device']}, jax {jax.__version__}")
    print(f"{'':26}{'alone / step':>14}{'step / step without':>22}")
    for name, figures in [*record["chains"].items(), *record["monitors"].items()]:
        shown = f"{figures['step']:.4f}" if "step" in figures else "-"
        print(f"{name:26}{figures['alone']:>14.3%}{shown:>22}")
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _step(chain: variance.VarianceTransform) -> Callable[[], None]:
    task, optimizer = setting.objective(M), training.adamw(lambda _: 1e-3)
    spec, batch, model = (
        task.spec(M.batch_size, M.length),
        setting.batch(M),
        setting.model(M, PLAIN),
    )
    step = jax.jit(training.make_train_step(model.apply, task, chain, optimizer, spec, seed=0))
    state = training.new_state(setting.random_params(model, M.length), optimizer, chain, spec)
    return lambda: jax.block_until_ready(step(state, batch))


def _monitors() -> list[training.Monitor]:
    return [
        training.level_monitor(setting.objective(M)),
        training.baseline_monitor(),
        training.gradient_noise_monitor(),
    ]


def _monitor(monitor: training.Monitor, spec: DrawSpec, params: PyTree) -> Callable[[], None]:
    chain = variance.chain()
    draw = variance.draw_batch(jax.random.key(0), chain, chain.init(spec), spec)
    ones = jnp.ones_like(draw.u)
    stats = LossStats(ones, ones, ones, ones)
    update = jax.jit(monitor.update)
    call = functools.partial(update, monitor.init(params), draw, stats, params)
    return lambda: jax.block_until_ready(call())


def _medians(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in _interleaved(calls, _ALONE.value).items()}


def _interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()  # compiles
    return interleaved(calls, rounds=repeats, seconds=0.0)


if __name__ == "__main__":
    app.run(main)
