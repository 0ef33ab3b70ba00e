"""The least gradient variance that exact methods of one mask a row can have, at a run's parameters.

    python -m experiments.study.lower_bound --workdir=RUN [--rows=512] [--counts=16]

A row with n eligible tokens, k of them masked, S the sum of their cross-entropies. Assumed are

* rows: independent samples, one mask of each;
* masks: all of one size equally likely, and independent over rows once their sizes are given;
* the estimator of a row: a weight, which its content does not change, times S;
* exactness for every network, which is when ``E[weight; k] = 1 / k`` must hold for every k.

Then by the law of total variance the batch gradient over N passes has, with V(k) the trace of the
covariance of the gradient of ``S / n`` over rows and masks of size k,

    N variance >= sum_k E[weight^2; k] V(k) >= (sum_k sqrt(V(k)) / k)^2 ,

whatever the law of the sizes and their coupling over rows (Cauchy and Schwarz twice). Large batches
with stratified rates of density ``sqrt(V(k)) / k`` reach it. The default chain's density follows
the second moment at the logits instead, here of the same rows and masks, in its bins and with its
floor. Not covered: masks of a size that are not equally likely (weights by position, spans, rare
tokens first), several masks of a row, masks that are coupled over rows or drawn by content,
densities that differ by row, control variates, rows drawn by importance or in strata, other
networks, parts of the bound, which leave out sizes.

Moments at a grid of sizes give the variance of independent rates too: with independent masks on
[0.001, 1] (standard training as published, whatever the run's own law), with fixed counts, and with
densities of the rate. The same rows at all sizes. Estimates of V at these sizes are unbiased; what
lies between is taken as a power law, which moves results for smooth curves by -0.6 to +1 %
(``tests/laws/test_lower_bound.py``). Errors are a jackknife over groups of rows, without that.
"""

import argparse
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import binom

from mdm_jax import corruption, data, files, objectives, rng, variance
from mdm_jax.draws import Draw, open_uniform
from mdm_jax.evaluation.seeds import markdown_table
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import measure
from mdm_jax.launch.workdir import saved_config, write_json
from mdm_jax.objectives.objective import summed_loss
from mdm_jax.progress import progress_bar
from mdm_jax.types import Array, Batch, PyTree
from mdm_jax.variance import densities

NAMES = {
    "standard": "standard: independent masks and rates",
    "fixed_counts": "fixed counts, independent rates",
    "bins_8": "the same, the best density that is constant in 8 equal bins of the rate",
    "bins_32": "the same, in 32 bins",
    "root": "the same, density in proportion to 1 / sqrt(rate)",
    "best_density": "the same, the best density",
    "stratified": "fixed counts, stratified rates, large batches",
    "slopes": "the same, the density that the default chain would learn from exact moments",
    "bound": "lower bound of one mask a row, uniform among masks of its size, independent rows",
}
LOWEST = 1e-3
"""Lowest rate of standard training, as published."""


class Sums(NamedTuple):
    """Of the gradients of rows at each size, in groups of ``size`` rows.

    Attributes:
        squares: [groups, counts] sums of squared norms.
        at_logits: [groups, counts] those of ``ppots_slopes``, at the logits.
        products: [counts, groups, groups] inner products of the groups' sums.
        mean_products: [2, groups, groups] those of the sums of the gradient averaged over sizes:
            of the whole bound, and of standard training's part of it.
        size: rows of a group.
    """

    squares: np.ndarray
    at_logits: np.ndarray
    products: np.ndarray
    mean_products: np.ndarray
    size: int

    def without(self, group: int) -> "Sums":
        """All groups but one."""
        kept = np.arange(len(self.squares)) != group
        products, means = (
            each[:, kept][:, :, kept] for each in (self.products, self.mean_products)
        )
        return Sums(self.squares[kept], self.at_logits[kept], products, means, self.size)


def eligible_tokens(rows: Batch, groups: int) -> int:
    """Of every row; ValueError if they differ or the rows do not fill the groups."""
    each = np.unique(np.asarray(rows.eligible).sum(-1))
    number = len(rows.tokens)
    if len(each) != 1 or number % groups:
        raise ValueError(
            f"rows must have equally many eligible tokens and fill {groups} groups, got {number} "
            f"rows of {', '.join(map(str, each))} tokens"
        )
    return int(each[0])


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
    lowest: float = LOWEST,
) -> Sums:
    """:class:`Sums` of the gradients of ``S / k``, nats per eligible token, for k in ``counts``.

    ``rows`` [N, L] are independent samples, N a multiple of ``groups``, of equally many eligible
    tokens; each has a mask of its own for every k. ValueError otherwise.
    """
    number, length = np.asarray(rows.tokens).shape
    n, size = eligible_tokens(rows, groups), number // groups
    objective = objectives.masked_nelbo(corruption.fixed_count(mask_id))
    loss = summed_loss(apply_fn, objective)

    @jax.jit
    def sums(key: Array, batch: Batch, count: Array) -> tuple[Array, Array, Array]:
        u = jnp.full((size, 1, 1, 1), 1.0) - (count - 0.5) / n
        noise = open_uniform(key, (size, 1, 1, length))

        def flat(row: Batch, u: Array, noise: Array) -> tuple[Array, Array]:
            one = jax.tree.map(lambda field: field[None], row)
            draw = Draw(u, jnp.zeros_like(u), noise)
            gradient, (_, stats) = jax.grad(loss, has_aux=True)(params, one, draw)
            at_logits = jnp.sum(stats.gradient_norms * jnp.square(stats.weight)) / n**2
            leaves = jax.tree.leaves(gradient)
            return jnp.concatenate([leaf.ravel() for leaf in leaves]) / n, at_logits

        each, at_logits = jax.vmap(flat)(batch, u, noise)
        return each.sum(0), jnp.sum(jnp.square(each)), at_logits.sum()

    squares, logits, products = *np.zeros((2, groups, len(counts))), []
    shares = [mean_shares(counts, own) for own in (np.full(n, 1 / n), bernoulli_mean(n, lowest))]
    means: list[Any] = [0.0, 0.0]
    with progress_bar(len(counts) * groups, unit="groups of gradients") as bar:
        for index, count in enumerate(counts):
            total = []
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                batch = jax.tree.map(lambda field, part=part: jnp.asarray(field[part]), rows)
                own = jax.random.fold_in(jax.random.fold_in(key, int(count)), group)
                one, squares[group, index], logits[group, index] = sums(
                    own, batch, jnp.float32(count)
                )
                total.append(np.asarray(one))
                bar.update()
            whole = np.stack(total)
            products.append(_inner(whole))
            means = [mean + share[index] * whole for mean, share in zip(means, shares)]
    inner = np.stack([_inner(mean) for mean in means])
    return Sums(squares, logits, np.stack(products), inner, size)


def _inner(sums: np.ndarray) -> np.ndarray:
    sums = sums.astype(np.float64)
    return sums @ sums.T


def mean_shares(counts: np.ndarray, of_size: np.ndarray) -> np.ndarray:
    """Weights [counts] of the sum over k with weights ``of_size`` [n] of what is linear between."""
    sizes = np.arange(1, len(of_size) + 1)
    return np.array([np.interp(sizes, counts, row) @ of_size for row in np.eye(len(counts))])


def _over_rates(n: int, lowest: float, power: int) -> np.ndarray:
    """``int_a^1 P(k | m) (k / n / m)^power dm`` for k = 1..n, P that of independent masks."""
    nodes, weights = np.polynomial.legendre.leggauss(400)
    low = np.log(lowest)
    rates = np.exp(low * (1 - nodes) / 2)[:, None]  # their logarithms from log a to 0
    k = np.arange(1, n + 1)
    terms = binom.pmf(k, n, rates) * (k / n / rates) ** power * rates  # dm = m d log m
    return -low / 2 * (weights @ terms)


def bernoulli_mean(n: int, lowest: float) -> np.ndarray:
    """Weights [n] by size of the means of the gradient of ``S / k`` in standard training's mean:
    1/n but for the part of the bound below the lowest rate a."""
    return _over_rates(n, lowest, 1)


def bernoulli_weights(n: int, lowest: float) -> np.ndarray:
    """Weights [n] of the second moments in standard training's: independent masks, rates uniform on
    [a, 1], the weight ``(1 - a) / m``, whose mean is the bound's integral over [a, 1]."""
    return (1 - lowest) * _over_rates(n, lowest, 2)


def in_bins(second: np.ndarray, number: int) -> np.ndarray:
    """The best law of the size [n] that is constant in ``number`` bins of equal width."""
    n = len(second)
    bins = np.arange(n) * min(number, n) // n
    mean = np.bincount(bins, second) / np.bincount(bins)
    law = np.sqrt(mean)[bins]
    return law / law.sum()


def under(second: np.ndarray, law: np.ndarray) -> float:
    """Second moment of independent rates, whose sizes have a ``law`` [n], under fixed counts."""
    return float(np.sum(second[law > 0] / law[law > 0]) / len(law) ** 2)


def under_slopes(within: np.ndarray, at_logits: np.ndarray) -> float:
    """Of stratified rates in large batches, by the default density of ``variance.ppots_slopes``.

    It follows the second moments [n] at the logits, up to a factor; ``within`` [n] is V.
    """
    floor = inspect.signature(variance.ppots_slopes).parameters["floor"].default
    n, edges = len(within), np.float64(densities.log_spaced_edges())
    cuts = np.union1d(edges, 1 - np.arange(n + 1) / n)
    widths, middle = np.diff(cuts), (cuts[1:] + cuts[:-1]) / 2
    size = np.ceil(n * (1 - middle)).astype(int) - 1
    bins = np.searchsorted(edges, middle) - 1
    moments = np.bincount(bins, widths * at_logits[size]) / np.bincount(bins, widths)
    density = densities.moment_density(edges, moments, floor)
    return float(np.sum(widths * within[size] / np.exp(np.float64(density.log_pdf(middle)))))


def variances(sums: Sums, counts: np.ndarray, n: int, lowest: float = LOWEST) -> dict[str, float]:
    """Variance of the batch gradient times forward passes, nats per eligible token, by name."""
    groups = len(sums.squares)
    rows = groups * sums.size
    squares = sums.squares.sum(0)
    within = (squares - sums.products.sum((1, 2)) / rows) / (rows - 1)
    pairs = sums.mean_products.sum((1, 2)) - np.trace(sums.mean_products, axis1=1, axis2=2)
    signals = pairs / (groups * (groups - 1) * sums.size**2)
    at_logits = sums.at_logits.sum(0) / rows
    return of_moments(squares / rows, within, at_logits, signals, counts, n, lowest)


def of_moments(
    second: np.ndarray,
    within: np.ndarray,
    at_logits: np.ndarray,
    signals: np.ndarray,
    counts: np.ndarray,
    n: int,
    lowest: float = LOWEST,
) -> dict[str, float]:
    """As :func:`variances`, from second moments and V of the gradient of ``S / k``, its second
    moments at the logits, [counts], and the squared means [2] of the bound's gradient and of
    standard training's."""

    def at_all(values: np.ndarray) -> np.ndarray:
        logs = np.log(np.maximum(values, 1e-300))
        return np.exp(np.interp(np.log(np.arange(1, n + 1)), np.log(counts), logs))

    second, within, at_logits = map(at_all, (second, within, at_logits))
    signal, standard = signals
    root = np.arange(1, n + 1) ** -0.5
    return {
        "standard": float(bernoulli_weights(n, lowest) @ second) - standard,
        "fixed_counts": under(second, np.full(n, 1 / n)) - signal,
        "bins_8": under(second, in_bins(second, 8)) - signal,
        "bins_32": under(second, in_bins(second, 32)) - signal,
        "root": under(second, root / root.sum()) - signal,
        "best_density": under(second, np.sqrt(second) / np.sqrt(second).sum()) - signal,
        "stratified": float(within.mean()),
        "slopes": under_slopes(within, at_logits),
        "bound": float(np.sqrt(within).mean() ** 2),
    }


def with_errors(sums: Sums, counts: np.ndarray, n: int, lowest: float = LOWEST) -> dict[str, Any]:
    """By name: ``(value, standard error)``, and of the ratio to standard training's variance."""
    value = variances(sums, counts, n, lowest)
    groups = len(sums.squares)
    each = [variances(sums.without(group), counts, n, lowest) for group in range(groups)]

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
    try:
        n = eligible_tokens(rows, given.groups)
    except ValueError as error:
        parser.error(str(error))
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
    write_json(workdir / "variance" / "lower_bound.json", record | {"variances": found})


if __name__ == "__main__":
    main()
