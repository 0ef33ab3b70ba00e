"""The least gradient variance that exact methods of one mask a row can have, at a run's parameters.

    python -m experiments.study.lower_bound --workdir=RUN [--rows=512] [--counts=16]

A row with n eligible tokens, k of them masked, S the sum of their cross-entropies. If masks of one
size are equally likely, and are drawn independently for every row given their sizes, then by the
law of total variance the batch gradient over N passes has, with V(k) the trace of the covariance of
the gradient of ``S / n`` over rows and masks of size k, and P(k) the probability of k,

    N variance >= sum_k E[weight^2; k] V(k) >= (sum_k sqrt(V(k)) / k)^2 ,

since exactness needs ``E[weight; k] = 1 / k`` for every k, whatever the law of the sizes and their
coupling over rows (Cauchy and Schwarz twice). Large batches with stratified rates of density
``sqrt(V(k)) / k`` reach it. Not covered: several masks of a row, masks that are coupled over rows
or drawn by content, densities that differ by row, other networks, parts of the bound.

Moments at a grid of sizes give the variance of independent rates too: with independent masks
(standard training), with fixed counts, and with the best density. The same rows at all sizes; every
estimate of V is unbiased, between sizes it is a power law, and errors are a jackknife over groups.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from mdm_jax import corruption, data, files, objectives, rng
from mdm_jax.draws import Draw, open_uniform
from mdm_jax.evaluation.seeds import markdown_table
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import measure
from mdm_jax.launch.workdir import saved_config, write_json
from mdm_jax.objectives.objective import summed_loss
from mdm_jax.progress import progress_bar
from mdm_jax.types import Array, Batch, PyTree

NAMES = {
    "standard": "standard: independent masks and rates",
    "fixed_counts": "fixed counts, independent rates",
    "best_density": "fixed counts, independent rates of the best density",
    "stratified": "fixed counts, stratified rates, large batches",
    "bound": "lower bound of one mask a row",
}


class Sums(NamedTuple):
    """Of the gradients of rows at each size, in groups of ``size`` rows.

    Attributes:
        squares: [groups, counts] sums of squared norms.
        products: [counts, groups, groups] inner products of the groups' sums.
        mean_products: [groups, groups] those of the sums of the gradient averaged over sizes.
        size: rows of a group.
    """

    squares: np.ndarray
    products: np.ndarray
    mean_products: np.ndarray
    size: int

    def without(self, group: int) -> "Sums":
        """All groups but one."""
        kept = np.arange(len(self.squares)) != group
        pairs = np.ix_(kept, kept)
        products = self.products[:, kept][:, :, kept]
        return Sums(self.squares[kept], products, self.mean_products[pairs], self.size)


def grid(length: int, number: int) -> np.ndarray:
    """At most ``number`` sizes from 1 to ``length``, denser where they are small."""
    return np.unique(np.round(1 + (length - 1) * np.linspace(0, 1, number) ** 2).astype(int))


def gradient_sums(
    apply_fn: Callable[..., Any],
    mask_id: int,
    params: PyTree,
    rows: Batch,
    counts: np.ndarray,
    key: Array,
    groups: int = 16,
) -> Sums:
    """:class:`Sums` of the gradients of ``S / k``, nats per eligible token, for k in ``counts``.

    ``rows`` [N, L] are independent samples, N a multiple of ``groups``, of equally many eligible
    tokens; each has a mask of its own for every k. ValueError otherwise.
    """
    number, length = np.asarray(rows.tokens).shape
    eligible = np.unique(np.asarray(rows.eligible).sum(-1))
    if len(eligible) != 1 or number % groups:
        raise ValueError(
            f"rows must have equally many eligible tokens and fill {groups} groups, got {number} "
            f"rows of {eligible} tokens"
        )
    n, size = int(eligible[0]), number // groups
    objective = objectives.masked_nelbo(corruption.fixed_count(mask_id))
    loss = summed_loss(apply_fn, objective)

    @jax.jit
    def sums(key: Array, batch: Batch, count: Array) -> tuple[Array, Array]:
        u = jnp.full((size, 1, 1, 1), 1.0) - (count - 0.5) / n
        noise = open_uniform(key, (size, 1, 1, length))

        def flat(row: Batch, u: Array, noise: Array) -> Array:
            one = jax.tree.map(lambda field: field[None], row)
            draw = Draw(u, jnp.zeros_like(u), noise)
            leaves = jax.tree.leaves(jax.grad(loss, has_aux=True)(params, one, draw)[0])
            return jnp.concatenate([leaf.ravel() for leaf in leaves]) / n

        each = jax.vmap(flat)(batch, u, noise)
        return each.sum(0), jnp.sum(jnp.square(each), -1).sum()

    squares, products = np.zeros((groups, len(counts))), []
    shares = mean_shares(counts, n)
    mean: Any = 0.0
    with progress_bar(len(counts) * groups, unit="groups of gradients") as bar:
        for index, count in enumerate(counts):
            total = []
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                batch = jax.tree.map(lambda field, part=part: jnp.asarray(field[part]), rows)
                own = jax.random.fold_in(jax.random.fold_in(key, int(count)), group)
                one, square = sums(own, batch, jnp.float32(count))
                total.append(np.asarray(one))
                squares[group, index] = square
                bar.update()
            whole = np.stack(total)
            products.append(_inner(whole))
            mean = mean + shares[index] * whole
    return Sums(squares, np.stack(products), _inner(mean), size)


def _inner(sums: np.ndarray) -> np.ndarray:
    sums = sums.astype(np.float64)
    return sums @ sums.T


def mean_shares(counts: np.ndarray, n: int) -> np.ndarray:
    """Weights [counts] of the mean over 1..n of what is linear between ``counts``."""
    each = [np.interp(np.arange(1, n + 1), counts, row) for row in np.eye(len(counts))]
    return np.mean(each, axis=1)


def bernoulli_weights(n: int, lowest: float) -> np.ndarray:
    """``(1 - a) int_a^1 P(k | m) (k / n / m)^2 dm`` for k = 1..n: what independent masks with the
    weight 1/m and rates uniform on [a, 1] make of the second moments of fixed counts."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    low = np.log(lowest)
    logs = low * (1 - nodes) / 2  # from log a to 0
    rates = np.exp(logs)[:, None]
    k = np.arange(1, n + 1)
    terms = binom.pmf(k, n, rates) * (k / n) ** 2 / rates  # dm = m d log m
    return (1 - lowest) * (-low / 2) * (weights @ terms)


def figures(sums: Sums, counts: np.ndarray, n: int, lowest: float = 1e-3) -> dict[str, float]:
    """Variance of the batch gradient times forward passes, nats per eligible token, by name."""
    groups = len(sums.squares)
    rows = groups * sums.size
    squares = sums.squares.sum(0)
    within = (squares - sums.products.sum((1, 2)) / rows) / (rows - 1)
    pairs = sums.mean_products.sum() - np.trace(sums.mean_products)
    signal = pairs / (groups * (groups - 1) * sums.size**2)
    return of_moments(squares / rows, within, signal, counts, n, lowest)


def of_moments(
    second: np.ndarray, within: np.ndarray, signal: float, counts: np.ndarray, n: int, lowest: float
) -> dict[str, float]:
    """As :func:`figures`, from second moments and V of the gradient of ``S / k``, [counts]."""

    def at_all(values: np.ndarray) -> np.ndarray:
        logs = np.log(np.maximum(values, 1e-300))
        return np.exp(np.interp(np.log(np.arange(1, n + 1)), np.log(counts), logs))

    second, within = at_all(second), at_all(within)
    return {
        "standard": float(bernoulli_weights(n, lowest) @ second) - signal,
        "fixed_counts": float(second.mean()) - signal,
        "best_density": float(np.sqrt(second).mean() ** 2) - signal,
        "stratified": float(within.mean()),
        "bound": float(np.sqrt(within).mean() ** 2),
    }


def with_errors(sums: Sums, counts: np.ndarray, n: int, lowest: float = 1e-3) -> dict[str, Any]:
    """By name: ``(value, standard error)``, and of the ratio to standard training's variance."""
    value = figures(sums, counts, n, lowest)
    groups = len(sums.squares)
    each = [figures(sums.without(group), counts, n, lowest) for group in range(groups)]

    def jackknife(values: list[float]) -> float:
        return float(np.sqrt((groups - 1) * np.var(values)))

    return {
        name: {
            "variance": (value[name], jackknife([other[name] for other in each])),
            "ratio": (
                value[name] / value["standard"],
                jackknife([other[name] / other["standard"] for other in each]),
            ),
        }
        for name in value
    }


def table(found: dict[str, Any]) -> str:
    """A row for each method."""
    rows = [
        [label, *("{:.3g} ± {:.2g}".format(*found[name][what]) for what in ("variance", "ratio"))]
        for name, label in NAMES.items()
    ]
    return markdown_table(["method", "variance × passes", "÷ standard's"], rows)


def main() -> None:
    """Measure, print the table, write ``variance/lower_bound.json`` into the run."""
    parser = argparse.ArgumentParser("experiments.study.lower_bound", allow_abbrev=False)
    parser.add_argument("--workdir", required=True, help="of a run of masked diffusion")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--counts", type=int, default=16, help="sizes of masks")
    parser.add_argument("--groups", type=int, default=16, help="of rows, for the errors")
    given = parser.parse_args()
    workdir = files.as_path(given.workdir)
    experiment = make_experiment(saved_config(given.workdir), workdir)
    if experiment.config.process != "masked" or experiment.config.model.condition_on_logsnr:
        parser.error("--workdir: only masked diffusion, of networks that do not see the level")
    experiment, step, params, _ = measure.parameters(experiment, workdir)
    dataset = experiment.dataset
    rows = data.sample_rows(dataset.train, given.rows, np.random.default_rng(0))
    n = int(np.asarray(rows.eligible)[0].sum())
    counts = grid(n, given.counts)
    key = rng.stream(jax.random.key(0), "lower bound")
    fixed = experiment.apply_fn, dataset.mask_id, params, rows, counts, key
    sums = gradient_sums(*fixed, groups=given.groups)
    found = with_errors(sums, counts, n)
    print(
        f"{given.workdir}, {measure.origin(experiment, step)}, {given.rows} rows, masks of "
        f"{', '.join(map(str, counts))} of {n} tokens:\n\n{table(found)}"
    )
    record = {"step": step, "rows": given.rows, "eligible": n, "counts": counts.tolist()}
    (workdir / "variance").mkdir(parents=True, exist_ok=True)
    write_json(workdir / "variance" / "lower_bound.json", record | {"figures": found})


if __name__ == "__main__":
    main()
