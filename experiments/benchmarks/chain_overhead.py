"""What a variance chain, and what a monitor, costs inside the training step, at the M shape.

    python -m experiments.benchmarks.chain_overhead [--steps=5] [--whole_steps=0] [--out=FILE.json]

M: rows of 128 tokens, vocabulary 32000, width 256, 6 layers, 8 heads, batch 16. From one run, over
the median of ``steps`` training steps without chain and monitors:

* ``alone``: median time of a chain's draw and update by themselves, less that of independent
  draws; of a monitor's update, given losses and gradients. A few minutes on two CPU cores.
* ``step``, with ``--whole_steps=N``: median of N whole steps with the chain, interleaved with all
  others. Its spread is far above what it should resolve, and every chain is a compilation.
"""

import functools
from collections.abc import Callable

import jax
from absl import app, flags

from experiments.benchmarks import setting
from experiments.benchmarks.command import interleaved, summary, write
from experiments.benchmarks.setting import PLAIN, SHAPES
from mdm_jax import training, variance
from mdm_jax.draws import DrawSpec
from mdm_jax.launch import config, names
from mdm_jax.types import PyTree

_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps without a chain.")
_WHOLE = flags.DEFINE_integer("whole_steps", 0, "Timed whole steps per chain, 0 for none.")
_ALONE = flags.DEFINE_integer("alone", 200, "Timed calls of drawing and updating by themselves.")

M = SHAPES["M"]


def main(_: list[str]) -> None:
    """Measure every single-view transform of the build table and every monitor."""
    spec, chains = setting.objective(M).spec(M.batch_size, M.length), {"none": variance.chain()}
    params = setting.random_params(setting.model(M, PLAIN), M.length)
    defaults = config.get_config().variance
    for name, factory in names.VARIANCE.items():
        transform = factory(**names.settings(defaults, name))
        if transform.views == 1 and name != "identity":
            chains[name] = variance.chain(transform)
    monitors = [
        training.level_monitor(setting.objective(M)),
        training.baseline_monitor(),
        training.gradient_noise_monitor(),
        training.weight_monitor(),
    ]
    step = _medians({"none": _step(chains["none"])}, _STEPS.value)["none"]
    alone = _medians(
        {name: setting.draw_and_update(chain, spec) for name, chain in chains.items()},
        _ALONE.value,
    )
    updates = _medians({m.name: _monitor(m, spec, params) for m in monitors}, _ALONE.value)
    record = {
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "step_seconds": step,
        "chains": {name: {"alone": (alone[name] - alone["none"]) / step} for name in chains},
        "monitors": {name: {"alone": seconds / step} for name, seconds in updates.items()},
    }
    if _WHOLE.value:
        whole = _medians({name: _step(chain) for name, chain in chains.items()}, _WHOLE.value)
        for name, figures in record["chains"].items():
            figures["step"] = whole[name] / whole["none"]
    print(f"step without a chain: {step:.3f} s on {record['device']}, jax {jax.__version__}")
    print(f"{'':26}{'alone / step':>14}{'step / step without':>22}")
    for name, figures in [*record["chains"].items(), *record["monitors"].items()]:
        ratio = f"{figures['step']:.4f}" if "step" in figures else "-"
        print(f"{name:26}{figures['alone']:>14.3%}{ratio:>22}")
    write(record)


def _step(chain: variance.VarianceTransform) -> Callable[[], object]:
    step, state, batch = setting.train_step(M, PLAIN, chain)
    return functools.partial(jax.jit(step), state, batch)


def _monitor(monitor: training.Monitor, spec: DrawSpec, params: PyTree) -> Callable[[], object]:
    chain = variance.chain()
    draw = variance.draw_batch(jax.random.key(0), chain, chain.init(spec), spec)
    update = jax.jit(monitor.update)
    return functools.partial(update, monitor.init(params), draw, setting.unit_stats(draw), params)


def _medians(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of interleaved calls, after one call each that compiles."""
    blocking = {
        name: functools.partial(lambda call: jax.block_until_ready(call()), call)
        for name, call in calls.items()
    }
    for call in blocking.values():
        call()
    times = interleaved(blocking, rounds=repeats, seconds=0.0)
    return {name: summary(seconds)["median"] for name, seconds in times.items()}


if __name__ == "__main__":
    app.run(main)
