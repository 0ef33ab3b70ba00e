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
import time
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import build
from experiments.configs import base
from mdm_jax import corruption, models, objectives, streams, training, variance
from mdm_jax.batches import Batch
from mdm_jax.draws import DrawSpec, LossStats
from mdm_jax.objectives import Objective
from mdm_jax.typing import PyTree

_STEPS = flags.DEFINE_integer("steps", 5, "Timed steps without a chain.")
_WHOLE = flags.DEFINE_integer("whole_steps", 0, "Timed whole steps per chain, 0 for none.")
_ALONE = flags.DEFINE_integer("alone", 200, "Timed calls of drawing and updating by themselves.")
_OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")

LENGTH, BATCH, VOCAB = 128, 16, 32_000


class Setting(NamedTuple):
    """The M shape: everything that a step needs but the chain."""

    model: models.Transformer
    objective: Objective
    spec: DrawSpec
    params: PyTree
    batch: Batch


def main(_: list[str]) -> None:
    """Measures every single-view transform of the build table and every monitor."""
    setting, chains = _setting(), {"none": variance.chain()}
    defaults = base.get_config().variance
    for name, factory in build.VARIANCE.items():
        transform = factory(**build.settings(defaults, name))
        if transform.views == 1 and name != "identity":
            chains[name] = variance.chain(transform)
    step = statistics.median(
        _interleaved({"none": _step(setting, chains["none"])}, _STEPS.value)["none"]
    )
    alone = _medians({n: _draw_and_update(c, setting.spec) for n, c in chains.items()})
    watched = _medians({m.name: _monitor(m, setting) for m in _monitors(setting)})
    record = {
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "step_seconds": step,
        "chains": {name: {"alone": (alone[name] - alone["none"]) / step} for name in chains},
        "monitors": {name: {"alone": seconds / step} for name, seconds in watched.items()},
    }
    if _WHOLE.value:
        steps = {name: _step(setting, chain) for name, chain in chains.items()}
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


def _setting() -> Setting:
    model = models.Transformer(models.TransformerConfig(VOCAB, 256, 6, 8))
    objective = objectives.masked_nelbo(corruption.fixed_count(VOCAB - 1))
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCAB - 1)
    whole = jnp.ones_like(tokens, bool)
    batch = Batch(tokens, whole, whole.astype(jnp.int32), jnp.full((BATCH,), LENGTH, jnp.int32))
    params = nn.meta.unbox(training.linen_init(model, LENGTH)(jax.random.key(1)))
    return Setting(model, objective, objective.spec(BATCH, LENGTH), params, batch)


def _step(setting: Setting, chain: variance.VarianceTransform) -> Callable[[], None]:
    optimizer = training.adamw(lambda _: 1e-3)
    model, objective, spec, params, batch = setting
    step = jax.jit(training.make_train_step(model.apply, objective, chain, optimizer, spec, seed=0))
    state = training.new_state(params, optimizer, chain, spec)
    return lambda: jax.block_until_ready(step(state, batch))


def _draw_and_update(chain: variance.VarianceTransform, spec: DrawSpec) -> Callable[[], None]:
    state = chain.init(spec)

    @jax.jit
    def run(i):
        draw = variance.draw_batch(streams.step_key(0, i), chain, state, spec)
        # Sums keep the compiler from removing what is not used.
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draw))
        return total, chain.update(state, draw, _stats(draw.u))

    return lambda: jax.block_until_ready(run(3))


def _monitors(setting: Setting) -> list[training.Monitor]:
    return [
        training.level_monitor(setting.objective),
        training.baseline_monitor(),
        training.gradient_noise_monitor(),
    ]


def _monitor(monitor: training.Monitor, setting: Setting) -> Callable[[], None]:
    chain = variance.chain()
    draw = variance.draw_batch(jax.random.key(0), chain, chain.init(setting.spec), setting.spec)
    stats = _stats(draw.u)
    update = jax.jit(monitor.update)
    call = functools.partial(update, monitor.init(setting.params), draw, stats, setting.params)
    return lambda: jax.block_until_ready(call())


def _stats(like: jax.Array) -> LossStats:
    ones = jnp.ones_like(like)
    return LossStats(ones, ones, ones, ones)


def _medians(calls: dict[str, Callable[[], None]]) -> dict[str, float]:
    return {name: statistics.median(t) for name, t in _interleaved(calls, _ALONE.value).items()}


def _interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    for call in calls.values():
        call()  # compiles
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    app.run(main)
