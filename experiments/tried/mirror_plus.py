"""mirror_plus, left out of the package: a second, opposite mask for rows with low rates alone.

    python -m experiments.tried.mirror_plus [--workdir=RUN] [--groups=16] [--redraws=24]

Below a rate of 1/2 the two masks of MIRROR are disjoint. The published code gives a second view to
those rows only: 1.5 passes per row under a uniform rate. Here the half of a batch with the lower
rates gets one, whatever those are, so shapes are static; and since only the rates decide which
rows these are, both views of a row count 1/2 and the estimate is exact. But which half a row is in
depends on the other rows of its (micro)batch, and the package promises that gradients are the same
under any number of microbatches and devices; a mean over views that some rows do not have is no
``LossStats`` [V, B, S] either. Measured: trace of the covariance of the batch gradient at equal
forward passes over that of stratified rates with one mask, rows drawn anew: of the toy, whose
gradients under all masks are enumerated, and, with ``--workdir``, at the parameters of a run.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import corruption, data, files, meter, objectives, variance
from mdm_jax.draws import Draw, LossStats
from mdm_jax.estimates import standard_error_of_ratio
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.workdir import saved_config
from mdm_jax.objectives.objective import Objective
from mdm_jax.schedules import law_of
from mdm_jax.schedules.masked import clipped
from mdm_jax.testing import toys
from mdm_jax.testing.enumeration import mask_bits
from mdm_jax.types import Array, Batch, ModelFn, PyTree
from mdm_jax.variance.transform import VarianceTransform, draw_batch

PASSES = 24
"""Forward passes of a batch: 24 rows of one mask, 12 of two, 16 under mirror_plus."""


def mirror_plus(objective: Objective) -> Objective:
    """``objective`` with the mean over two views of the half of the rows with the lower rates.

    For draws [1, B, 1]; stats are of as many, their losses means over the views of a row.
    """

    def loss(model_fn: ModelFn, batch: Batch, draw: Draw) -> LossStats:
        rows = draw.u.shape[1]
        low = jnp.argsort(-draw.u[0, :, 0])[: rows // 2]  # the logSNR rises with u
        again = Draw(draw.u[:, low], draw.log_weight[:, low], 1.0 - draw.noise[:, low])
        both = jax.tree.map(lambda one, two: jnp.concatenate([one, two], axis=1), draw, again)
        index = jnp.concatenate([jnp.arange(rows), low])
        stats = objective.loss(model_fn, jax.tree.map(lambda a: jnp.asarray(a)[index], batch), both)
        scale = stats.weight[:, rows:] / stats.weight[:, low]
        raw = stats.raw[:, :rows].at[:, low].multiply(0.5)
        raw = raw.at[:, low].add(0.5 * scale * stats.raw[:, rows:])
        first = jax.tree.map(lambda leaf: leaf[:, :rows], stats)
        return first._replace(raw=raw)

    return objective._replace(name=f"{objective.name}, mirror_plus", loss=loss)


def methods(objective: Objective) -> dict[str, tuple[Objective, VarianceTransform, int]]:
    """Objective, chain and rows of a batch of ``PASSES`` passes, by name."""
    stratified, mirror = variance.stratified, variance.mirror
    return {
        "stratified": (objective, variance.chain(stratified()), PASSES),
        "MIRROR": (objective, variance.chain(stratified(), mirror()), PASSES // 2),
        "mirror_plus": (mirror_plus(objective), variance.chain(stratified()), 2 * PASSES // 3),
    }


def traces(
    apply_fn: Callable[..., Any],
    objective: Objective,
    params: PyTree,
    rows: Callable[[int, int], Batch],
    length: int,
    groups: int,
    redraws: int,
) -> dict[str, np.ndarray]:
    """[groups] traces of the covariance by method; ``rows(number, count)`` of each redraw."""
    found = {}
    for name, (own, transform, count) in methods(objective).items():
        estimator = meter.make_estimator(apply_fn, own)
        spec = own.spec(count, length)
        state = transform.init(spec)

        @jax.jit
        def draw(number: Array, transform=transform, state=state, spec=spec) -> Draw:
            return draw_batch(jax.random.fold_in(jax.random.key(0), number), transform, state, spec)

        def flat(number: int, estimator=estimator, count=count, draw=draw) -> Array:
            batch = jax.tree.map(jnp.asarray, rows(number, count))
            leaves = jax.tree.leaves(estimator.gradient(params, batch, draw(number), 1))
            return jnp.concatenate([leaf.ravel() for leaf in leaves])

        each = [
            jnp.stack([flat(group * redraws + i) for i in range(redraws)])
            for group in range(groups)
        ]
        found[name] = np.array([float(jnp.sum(jnp.var(part, axis=0, ddof=1))) for part in each])
    return found


PER_ROW = {"stratified": 1.0, "MIRROR": 2.0, "mirror_plus": 1.5}
"""Forward passes of a row by method."""


def toy_gradients() -> np.ndarray:
    """[rows, masks, parameters] gradients of S(M) of the toy; bit j of a mask masks position j."""
    model, masks = toys.Toy(), mask_bits(toys.LENGTH)

    def losses(theta: Array) -> Array:
        parameters = {"params": {"theta": theta}}
        rows = jnp.asarray(toys.ROWS)[:, None]
        inputs = jnp.where(masks[None], toys.MASK_ID, rows)
        logits = model.apply(parameters, inputs.reshape(-1, toys.LENGTH))
        nats = -jax.nn.log_softmax(logits).reshape(*inputs.shape, -1)
        own = jnp.take_along_axis(nats, jnp.broadcast_to(rows, inputs.shape)[..., None], -1)
        return jnp.sum(jnp.where(masks[None], own[..., 0], 0.0), axis=-1)

    return np.asarray(jax.jacobian(losses)(jnp.asarray(toys.THETA)), np.float64)


def toy_traces(
    gradients: np.ndarray, method: str, masks: str, groups: int = 20, batches: int = 2000
) -> np.ndarray:
    """[groups] traces of the covariance of a batch's gradient under stratified rates."""
    generator = np.random.default_rng(0)
    count = round(PASSES / PER_ROW[method])
    shape = (groups, batches, count)
    cells = generator.permuted(np.broadcast_to(np.arange(count), shape), axis=-1)
    rate = (cells + generator.random(shape)) / count
    row = generator.choice(3, shape, p=toys.ROW_PROBABILITIES)
    noise = generator.random((*shape, toys.LENGTH))

    def of_mask(noise: np.ndarray) -> np.ndarray:
        if masks == "fixed counts":
            size = 1 + np.floor(rate * toys.LENGTH)
            mask = noise.argsort(-1).argsort(-1) < size[..., None]
            weight = toys.LENGTH / size
        else:
            own = 1e-3 + (1 - 1e-3) * rate
            mask, weight = noise < own[..., None], (1 - 1e-3) / own
        number = mask @ (1 << np.arange(toys.LENGTH))
        return weight[..., None] * gradients[row, number]

    each = of_mask(noise)
    if method != "stratified":
        both = (each + of_mask(1 - noise)) / 2
        low = rate < np.sort(rate, axis=-1)[..., count // 2, None]  # the half with the lower rates
        each = both if method == "MIRROR" else np.where(low[..., None], both, each)
    return each.mean(2).var(1, ddof=1).sum(-1)


def table(title: str, found: dict[str, np.ndarray]) -> str:
    """Lines for the terminal: variance at equal passes over that of one mask."""
    lines = [title]
    reference = found["stratified"]
    for name, values in found.items():
        error = standard_error_of_ratio(values, reference)
        lines.append(f"  {name:14}{values.mean() / reference.mean():8.3f} ± {error:.3f}")
    return "\n".join(lines)


def corruptions(mask_id: int) -> dict[str, Objective]:
    """Fixed counts, and independent masks at rates from 0.001 on as the published code has them."""
    law = law_of(clipped(1e-3, 1.0))
    return {
        "fixed counts": objectives.masked_nelbo(corruption.fixed_count(mask_id)),
        "independent masks": objectives.masked_nelbo(corruption.bernoulli(mask_id), law),
    }


def main() -> None:
    """Measure, and print a table for each corruption."""
    parser = argparse.ArgumentParser("experiments.tried.mirror_plus", allow_abbrev=False)
    parser.add_argument("--workdir", default="")
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--redraws", type=int, default=24)
    given = parser.parse_args()
    sizes = given.groups, given.redraws

    gradients = toy_gradients()
    for name in ("fixed counts", "independent masks"):
        found = {method: toy_traces(gradients, method, name) for method in PER_ROW}
        print(table(f"toy, {name}", found), flush=True)
    if not given.workdir:
        return
    experiment = make_experiment(saved_config(given.workdir), files.as_path(given.workdir))
    _, params = load_parameters(experiment, files.as_path(given.workdir))
    dataset = experiment.dataset

    def rows(number: int, count: int) -> Batch:
        return data.sample_rows(dataset.train, count, np.random.default_rng(number))

    for name, objective in corruptions(dataset.mask_id).items():
        found = traces(experiment.apply_fn, objective, params, rows, dataset.length, *sizes)
        print(table(f"{given.workdir}, {name}", found), flush=True)


if __name__ == "__main__":
    main()
