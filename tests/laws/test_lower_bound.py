"""The least variance of one mask a row, on the enumerated toy."""

import functools
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.study import lower_bound
from experiments.tried.mirror_plus import toy_gradients
from mdm_jax import corruption, objectives, variance
from mdm_jax.objectives.objective import summed_loss
from mdm_jax.schedules import law_of
from mdm_jax.schedules.masked import clipped
from mdm_jax.testing import toys
from mdm_jax.testing.enumeration import mask_bits
from mdm_jax.variance import densities, warps
from mdm_jax.variance.transform import draw_batch

N = toys.LENGTH
SIZES = mask_bits(N).sum(1)
COUNTS = np.arange(1, N + 1)
SHARES = np.array(toys.ROW_PROBABILITIES)


PARAMS = toys.toy_params()


@functools.cache
def moments():
    """By size, of the gradient of S / k: second moments, V, second moments at the logits, means."""
    gradients, squares = toy_gradients(), squares_at_logits()
    second, within, logits, means = [], [], [], []
    for k in COUNTS:
        own = gradients[:, k == SIZES] / k
        second.append(SHARES @ np.sum(own**2, -1).mean(1))
        means.append(SHARES @ own.mean(1))
        within.append(second[-1] - np.sum(means[-1] ** 2))
        logits.append(SHARES @ squares[:, k == SIZES].mean(1) / k**2)
    return np.array(second), np.array(within), np.array(logits), np.array(means)


def squares_at_logits():
    """[rows, masks] sums over masked tokens of (1 - p)^2, p the right token's probability."""
    masks, rows = mask_bits(N), np.array(toys.ROWS)[:, None]
    inputs = np.where(masks[None], toys.MASK_ID, rows)
    logits = toys.Toy().apply(PARAMS, jnp.asarray(inputs.reshape(-1, N)))
    right = np.take_along_axis(
        np.asarray(jax.nn.softmax(logits)).reshape(*inputs.shape, -1),
        np.broadcast_to(rows, inputs.shape)[..., None],
        -1,
    )[..., 0]
    return np.sum(np.where(masks[None], (1 - right) ** 2, 0.0), -1)


def exact(lowest=lower_bound.LOWEST):
    second, within, logits, means = moments()
    shares = np.full(N, 1 / N), lower_bound.bernoulli_mean(N, lowest)
    signals = [np.sum((share @ means) ** 2) for share in shares]
    return lower_bound.of_moments(second, within, logits, signals, COUNTS, N, lowest)


def sampled(corrupt, transform, rows, batches, law=None, steps=0):
    """(variance of the batch gradient times passes, standard error) of the package's estimator,
    whose state has learned for so many ``steps``."""
    masked = objectives.masked_nelbo(corrupt, law) if law else objectives.masked_nelbo(corrupt)
    loss = summed_loss(toys.Toy().apply, masked)
    spec = masked.spec(rows, N)
    table = toys.toy_batch()

    def gradient(state, key):
        own, other = jax.random.split(key)
        index = jax.random.choice(own, len(SHARES), (rows,), p=jnp.asarray(SHARES))
        batch = jax.tree.map(lambda field: jnp.asarray(field)[index], table)
        draw = draw_batch(other, transform, state, spec)
        tree, (_, stats) = jax.grad(loss, has_aux=True)(PARAMS, batch, draw)
        (leaf,) = jax.tree.leaves(tree)
        return transform.update(state, draw, stats), leaf / (rows * N)

    keys = jax.random.split(jax.random.key(0), steps)
    state, _ = jax.lax.scan(gradient, transform.init(spec), keys)
    keys = jax.random.split(jax.random.key(1), batches)
    each = jax.jit(jax.vmap(lambda key: gradient(state, key)[1]))(keys)
    each = np.asarray(each, np.float64)
    squares = rows * np.sum((each - each.mean(0)) ** 2, -1)
    return squares.mean(), squares.std() / np.sqrt(batches)


def density(moment):
    """Of quantiles, in proportion to the root of a moment by size; rates fall with them."""
    return densities.piecewise_density(np.linspace(0, 1, N + 1), np.sqrt(moment)[::-1])


FIXED = corruption.fixed_count(toys.MASK_ID)
BERNOULLI = corruption.bernoulli(toys.MASK_ID)


def test_moments_make_the_variances_of_the_packages_chains():
    second, within, _, _ = moments()
    # All masked the toy has no gradient, and a density must be positive.
    second, within = (np.maximum(each, 1e-4 * each.max()) for each in (second, within))
    stratified, importance = variance.stratified(), warps.importance
    whole, part = exact(), exact(0.1)
    for name, wanted, found in (
        ("best_density", whole, sampled(FIXED, importance(density(second)), 4, 10_000)),
        ("stratified", whole, sampled(FIXED, stratified, 16, 5_000)),
        (
            "bound",
            whole,
            sampled(FIXED, variance.chain(stratified, importance(density(within))), 64, 4_000),
        ),
        (
            "standard",
            part,
            sampled(BERNOULLI, variance.identity(), 1, 100_000, law_of(clipped(0.1, 1.0))),
        ),
    ):
        value, error = found
        assert error < 0.02 * value and value == pytest.approx(wanted[name], abs=3 * error), name
    assert whole["bound"] < min(whole["stratified"], whole["best_density"])


def test_the_default_chain_has_the_variance_of_the_density_that_it_learns():
    chain = variance.chain(variance.stratified(), variance.ppots_slopes())
    value, error = sampled(FIXED, chain, 64, 6_000, steps=3_000)
    wanted = exact()
    assert error < 0.02 * value and value == pytest.approx(wanted["slopes"], abs=3 * error)
    assert wanted["stratified"] - wanted["slopes"] > 5 * error  # it is another density


def test_standard_training_is_the_mixture_of_sizes_that_it_is():
    """By an integral over rates of the enumerated masks."""
    gradients, low = toy_gradients() / N, 0.1
    nodes, share = np.polynomial.legendre.leggauss(50)
    rates = (low + (1 - low) * (1 + nodes) / 2)[:, None]
    law = share[:, None] / 2 * rates**SIZES * (1 - rates) ** (N - SIZES)  # [rates, masks]
    weights = (1 - low) / rates
    squares = SHARES @ np.sum(gradients**2, -1)
    mean = np.einsum("r,rmi,m->i", SHARES, gradients, np.sum(law * weights, 0))
    wanted = np.sum(law * weights**2, 0) @ squares - np.sum(mean**2)
    assert exact(low)["standard"] == pytest.approx(wanted, rel=1e-6)


def test_densities_in_bins():
    second = 1 / np.arange(1, 129) + np.linspace(0, 1, 128) ** 8
    found = [
        lower_bound.under(second, lower_bound.in_bins(second, bins)) for bins in (1, 8, 32, 200)
    ]
    assert found[0] == pytest.approx(second.mean()) and np.all(np.diff(found) < 0)
    assert found[-1] == pytest.approx(np.sqrt(second).mean() ** 2)


@pytest.mark.parametrize(
    "curve", [lambda k: 5 / k + 0.1, lambda k: 1 / k + (k / 128) ** 8, lambda k: np.exp(-k / 30)]
)
def test_between_the_sizes_of_the_grid_little_is_added(curve):
    """What the errors leave out, as the docstring says."""
    every, counts = np.arange(1, 129), lower_bound.grid(128, 16)
    fine, coarse = (
        lower_bound.of_moments(*[curve(k)] * 3, (0, 0), k, 128) for k in (every, counts)
    )
    for name, value in fine.items():
        assert -0.006 < coarse[name] / value - 1 < 0.01, name


def test_sums_are_those_of_the_toy():
    rows = np.random.default_rng(1).choice(len(SHARES), 1024, p=SHARES)
    batch = jax.tree.map(lambda field: np.asarray(field)[rows], toys.toy_batch())
    sums = lower_bound.gradient_sums(
        toys.Toy().apply, toys.MASK_ID, PARAMS, batch, COUNTS, jax.random.key(0)
    )
    found = lower_bound.with_errors(sums, COUNTS, N)
    for name, value in exact().items():
        estimate, error = found[name]["variance"]
        assert abs(estimate - value) < 3 * error < 0.3 * value, name
    batch = batch._replace(eligible=batch.eligible & (np.arange(N) < 1 + rows[:, None]))
    with pytest.raises(ValueError, match="equally many eligible"):
        lower_bound.gradient_sums(
            toys.Toy().apply, toys.MASK_ID, PARAMS, batch, COUNTS, jax.random.key(0)
        )


def test_means_over_sizes_of_a_grid():
    counts = lower_bound.grid(128, 16)
    assert counts[0] == 1 and counts[-1] == 128 and len(counts) == 16
    np.testing.assert_allclose(
        lower_bound.mean_shares(counts, np.full(128, 1 / 128)) @ counts, 64.5
    )
    assert lower_bound.grid(4, 16).tolist() == [1, 2, 3, 4]


def test_rows_of_unequal_lengths_are_an_error_of_the_command(monkeypatch, capsys):
    config = types.SimpleNamespace(
        process="masked", model=types.SimpleNamespace(condition_on_logsnr=False)
    )
    run = types.SimpleNamespace(config=config, dataset=types.SimpleNamespace(train=None))
    rows = toys.toy_batch()
    rows = rows._replace(eligible=np.arange(N) < np.array([[2], [3], [4]]))
    monkeypatch.setattr(sys, "argv", ["lower_bound", "--workdir=runs/x", "--groups=3"])
    monkeypatch.setattr(lower_bound, "saved_config", lambda _: config)
    monkeypatch.setattr(lower_bound, "make_experiment", lambda *_: run)
    monkeypatch.setattr(lower_bound.measure, "parameters", lambda *_: (run, 0, None, None))
    monkeypatch.setattr(lower_bound.data, "sample_rows", lambda *_: rows)
    with pytest.raises(SystemExit):
        lower_bound.main()
    assert "3 rows of 2, 3, 4 tokens" in capsys.readouterr().err
