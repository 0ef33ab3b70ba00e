"""What a variance chain costs inside the training step, at the M shape.

    python -m experiments.benchmarks.chain_overhead [--repeats=15] [--out=FILE.json]

M: rows of 128 tokens, vocabulary 32000, width 256, 6 layers, 8 heads, batch 16. Two figures per
single-view chain, from one run:

* ``step``: median time of the whole training step over that without a chain, steps interleaved;
* ``alone``: median time of drawing and updating by itself, less that of independent draws, over the
  median step. It resolves what the first figure's spread hides.
"""

import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import build
from experiments.configs import base
from mdm_jax import corruption, models, objectives, streams, training, variance
from mdm_jax.batches import Batch
from mdm_jax.draws import DrawSpec, LossStats

_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed steps per chain.")
_OUT = flags.DEFINE_string("out", None, "Where to write the figures as JSON.")

LENGTH, BATCH, VOCAB = 128, 16, 32_000


def main(_: list[str]) -> None:
    """Measures every single-view transform of the build table, each as a chain of its own."""
    chains, defaults = {"none": variance.chain()}, base.get_config().variance
    for name, factory in build.VARIANCE.items():
        transform = factory(**build.settings(defaults, name))
        if transform.views == 1 and name != "identity":
            chains[name] = variance.chain(transform)
    model = models.Transformer(models.TransformerConfig(VOCAB, 256, 6, 8))
    objective = objectives.masked_nelbo(corruption.fixed_count(VOCAB - 1))
    spec = objective.spec(BATCH, LENGTH)
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH), 0, VOCAB - 1)
    whole = jnp.ones_like(tokens, bool)
    batch = Batch(tokens, whole, whole.astype(jnp.int32), jnp.full((BATCH,), LENGTH, jnp.int32))
    params = nn.meta.unbox(training.linen_init(model, LENGTH)(jax.random.key(1)))
    optimizer = training.adamw(lambda _: 1e-3)

    steps, states, alone = {}, {}, {}
    for name, chain in chains.items():
        step = training.make_train_step(model.apply, objective, chain, optimizer, spec, seed=0)
        steps[name] = jax.jit(step)
        states[name] = training.new_state(params, optimizer, chain, spec)
        alone[name] = _draw_and_update(chain, spec)
    times = _interleaved(
        {n: functools.partial(_run, steps[n], states[n], batch) for n in chains}, _REPEATS.value
    )
    bare = _interleaved(alone, 40 * _REPEATS.value)
    median = statistics.median(times["none"])
    record = {
        "device": str(jax.devices()[0]),
        "jax": jax.__version__,
        "step_seconds": median,
        "chains": {
            name: {
                "step": statistics.median(times[name]) / median,
                "alone": (statistics.median(bare[name]) - statistics.median(bare["none"])) / median,
            }
            for name in chains
        },
    }
    print(f"step without a chain: {median:.3f} s on {record['device']}, jax {jax.__version__}")
    print(f"{'chain':24}{'step / step without':>22}{'alone / step':>16}")
    for name, figures in record["chains"].items():
        print(f"{name:24}{figures['step']:>22.4f}{figures['alone']:>15.3%}")
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _draw_and_update(chain: variance.VarianceTransform, spec: DrawSpec) -> Callable[[], None]:
    state = chain.init(spec)

    @jax.jit
    def run(i):
        draw = variance.draw_batch(streams.step_key(0, i), chain, state, spec)
        ones = jnp.ones_like(draw.u)
        # Sums keep the compiler from removing what is not used.
        total = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(draw))
        return total, chain.update(state, draw, LossStats(ones, ones, ones, ones))

    return lambda: jax.block_until_ready(run(3))


def _run(step: Callable, state: training.TrainState, batch: Batch) -> None:
    jax.block_until_ready(step(state, batch))


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
