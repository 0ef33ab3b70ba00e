"""What variance chains cost in a training step, and how much variance they remove.

    python -m experiments.benchmarks.variance_probe [--shapes=S,M] [--variants=default|all|NAME,...]
        [--seconds=20] [--rounds=3] [--out=FILE.json]

At fixed random parameters and a fixed batch, per chain: seconds of draw and update by themselves
and their share of the gradient without a chain (the overhead); seconds of a gradient; the variance
of the gradient over redraws of the noise as a share of its squared mean, relative to independent
noise; and that ratio times the ratio of seconds, the compute for one and the same precision. The
variance of random parameters says that chains work, not how well: that is measured on trained ones
(``mdm variance``).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks import command, setting
from experiments.benchmarks.setting import CHOSEN, Shape, Variant
from mdm_jax import rng, variance
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.types import Array, PyTree

INDEPENDENT = "independent"
CHAINS: Mapping[str, Variant] = {
    INDEPENDENT: CHOSEN._replace(summary="independent noise", chain=()),
    "stratified": CHOSEN._replace(summary="one level per cell", chain=("stratified",)),
    "stratified, ppots": CHOSEN._replace(
        summary="and learned level density", chain=("stratified", "ppots")
    ),
    "stratified, mirror": CHOSEN._replace(
        summary="and the complementary mask", chain=("stratified", "mirror")
    ),
    "stratified, ppots, mirror": CHOSEN._replace(
        summary="all three", chain=("stratified", "ppots", "mirror")
    ),
}
SETS = {"default": (INDEPENDENT, "stratified", "stratified, mirror"), "all": tuple(CHAINS)}
_CALLS_ALONE = 100


def measure(shape: Shape, options: command.Options) -> dict[str, Any]:
    """Measure the chosen chains at a shape; independent noise always is among them."""
    probes, records = command.build_each(
        command.choose(CHAINS, (INDEPENDENT, *options.variants), SETS),
        lambda _, variant: _Probe(shape, variant),
    )
    alone = {name: probe.draw_and_update for name, probe in probes.items()}
    drawing = command.interleaved(alone, rounds=_CALLS_ALONE, seconds=0.0)
    times = command.interleaved(probes, rounds=max(options.rounds, 3), seconds=options.seconds)
    plain = command.summary(times[INDEPENDENT])["median"]
    nothing = command.summary(drawing[INDEPENDENT])["median"]
    noise = {name: probe.relative_variance() for name, probe in probes.items()}
    for name in probes:
        seconds = command.summary(times[name])
        ratio = noise[name] / noise[INDEPENDENT]
        records[name] |= {
            "seconds": seconds,
            "overhead": (command.summary(drawing[name])["median"] - nothing) / plain,
            "relative_variance": noise[name],
            "variance_over_independent": ratio,
            "compute_over_independent": ratio * seconds["median"] / plain,
        }
    return {"redraws": len(times[INDEPENDENT]), "chains": records}


def table(record: dict[str, Any]) -> list[str]:
    """The record in Markdown."""

    def row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
        return (
            name,
            command.spread(figures["seconds"], 3),
            f"{figures['overhead']:.3%}",
            f"{figures['relative_variance']:.3g}",
            f"{figures['variance_over_independent']:.2f}",
            f"{figures['compute_over_independent']:.2f}",
        )

    header = ("chain", "gradient, s", "overhead", "noise / signal", "variance ratio", "compute")
    title = f"Variance from {record['redraws']} redraws, biased by none of the chains"
    return [title, "", *command.record_table(header, record["chains"], row)]


class _Probe:
    """Gradients of one chain at fixed parameters: a call adds one of newly drawn noise."""

    def __init__(self, shape: Shape, variant: Variant):
        network, chain = setting.model(shape, variant), setting.chain(variant)
        apply_fn, task = setting.apply_fn(network, variant), setting.objective(shape)
        spec, batch = task.spec(shape.batch_size, shape.length), setting.batch(shape)
        params, state = setting.random_params(network, shape.length), chain.init(spec)

        def loss(params: PyTree, draw: Any) -> Array:
            stats = task.loss(lambda *inputs: apply_fn(params, *inputs), batch, draw)
            sums = sum_losses(draw, stats)
            return token_mean(sums.loss, sums.eligible)

        @jax.jit
        def add(params: PyTree, index: Array, total: PyTree) -> tuple[PyTree, Array]:
            draw = variance.draw_batch(rng.step_key(1, index), chain, state, spec)
            gradient = jax.grad(loss)(params, draw)
            squares = sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))
            return jax.tree.map(jnp.add, total, gradient), squares

        self._add, self._params = add, params
        self._total = jax.tree.map(jnp.zeros_like, params)
        self._squares: list[float] = []
        self.draw_and_update = setting.draw_and_update(chain, spec)
        self()
        self.draw_and_update()  # compiles

    def __call__(self) -> None:
        total, square = self._add(self._params, jnp.int32(len(self._squares)), self._total)
        self._total = jax.block_until_ready(total)
        self._squares.append(float(square))

    def relative_variance(self) -> float:
        """Trace of the gradient's covariance over the squared norm of its mean, both unbiased."""
        count, squares = len(self._squares), sum(self._squares)
        of_total = float(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(self._total)))
        variance_trace = (squares - of_total / count) / (count - 1)
        return variance_trace / (of_total / count**2 - variance_trace / count)


PART = command.Part("variance_probe", measure, table)

if __name__ == "__main__":
    command.main(PART)
