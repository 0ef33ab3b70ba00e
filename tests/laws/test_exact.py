"""Enumeration against the toy's published digits."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import testing
from mdm_jax.testing import toys
from mdm_jax.types import Batch

# S(x, M) of the three rows, mask integers 0..15.
LOSSES = np.array(
    [
        [0, 0, 0],
        [0.48123646, 0.72609040, 0.33511394],
        [0.63977235, 0.57398479, 0.19928967],
        [1.80753745, 2.07776155, 0.93007164],
        [2.19773063, 0.55308713, 0.23943688],
        [2.30469471, 1.77308366, 0.82780229],
        [2.28943925, 1.87830510, 0.75900756],
        [3.09331642, 4.17219537, 1.97321610],
        [0.94916515, 2.33808774, 0.45418408],
        [1.80901191, 2.72924485, 1.02167290],
        [2.15103446, 2.44975395, 0.91723668],
        [3.87595226, 3.58717999, 2.03131807],
        [2.48589117, 2.19431215, 1.13585353],
        [2.99835539, 3.07139064, 2.10416844],
        [3.17755784, 3.01772904, 2.13855489],
        [4.54866716, 4.92656156, 3.91924897],
    ]
)
NELBO = np.array([4.37020885, 4.52536593, 2.44006023])
WEIGHTS = np.array(toys.ROW_PROBABILITIES)


def toy_model(dtype=jnp.float32):
    return functools.partial(toys.Toy(dtype).apply, toys.toy_params(dtype))


def row_of(batch: Batch, i: int) -> Batch:
    return Batch(*(np.asarray(field)[i] for field in batch))


@functools.cache
def losses64() -> np.ndarray:
    with jax.enable_x64(True):
        model = toy_model(jnp.float64)
        rows = [testing.mask_losses(model, row_of(toys.toy_batch(), i), 3) for i in range(3)]
    return np.stack(rows)


def test_mask_losses_float32():
    for i in range(3):
        losses = testing.mask_losses(toy_model(), row_of(toys.toy_batch(), i), toys.MASK_ID)
        np.testing.assert_allclose(losses, LOSSES[:, i], atol=1e-6)


def test_mask_losses_float64():
    np.testing.assert_allclose(losses64().T, LOSSES, atol=6e-9)


def test_exact_nelbo():
    with jax.enable_x64(True):
        nelbo = testing.exact_nelbo(toy_model(jnp.float64), toys.toy_batch(), toys.MASK_ID)
    np.testing.assert_allclose(nelbo, NELBO, atol=6e-9)
    mean = WEIGHTS @ nelbo
    per_token = mean / 4
    np.testing.assert_allclose(
        [mean, per_token, per_token / math.log(2), math.exp(per_token)],
        [4.03072625, 1.00768156, 1.45377719, 2.73924288],
        atol=6e-9,
    )
    single = testing.exact_nelbo(toy_model(), toys.toy_batch(), toys.MASK_ID)
    np.testing.assert_allclose(single, NELBO, atol=2e-6)


def test_four_routes_to_the_bound_agree():
    nodes, weights = np.polynomial.legendre.leggauss(40)
    rate, weights = (nodes + 1) / 2, weights / 2
    logsnr = np.linspace(-40, 40, 4001)
    cross_entropies = []
    with jax.enable_x64(True):
        for i in range(3):
            row = row_of(toys.toy_batch(), i)
            cross_entropies.append(testing.mask_cross_entropies(toy_model(jnp.float64), row, 3))
    for i, losses in enumerate(losses64()):
        by_rate = np.sum(weights * testing.rate_losses(losses, rate) / rate)
        by_logsnr = np.trapezoid(
            testing.rate_losses(losses, 1 / (1 + np.exp(logsnr))) / (1 + np.exp(-logsnr)), logsnr
        )
        paths = []
        for order in itertools.permutations(range(4)):
            masked, total = 15, 0.0
            for place in order:
                total += cross_entropies[i][masked, place]
                masked -= 1 << place
            paths.append(total)
        np.testing.assert_allclose([by_rate, by_logsnr, np.mean(paths)], NELBO[i], atol=1e-7)


def test_loss_by_count():
    g = [4 / k * (WEIGHTS @ losses64())[_sizes() == k].mean() for k in range(1, 5)]
    np.testing.assert_allclose(g, [3.63693223, 3.82429059, 4.12553032, 4.53615184], atol=6e-9)
    by_count = np.stack([testing.count_losses(row) for row in losses64()])
    np.testing.assert_allclose(WEIGHTS @ by_count[:, 1:] * 4 / np.arange(1, 5), g, atol=1e-12)


@pytest.mark.parametrize(
    "steps, expected",
    [
        (1, 4.53615184),
        (2, 4.26948510),
        (4, 4.14661719),
        (8, 4.08779960),
        (16, 4.05904489),
        (1000, 4.03117591),
    ],
)
def test_bound_in_discrete_time(steps, expected):
    rate = np.arange(steps + 1) / steps
    weight = (rate[1:] - rate[:-1]) / rate[1:]
    value = sum(
        p * np.sum(weight * testing.rate_losses(losses, rate[1:]))
        for p, losses in zip(WEIGHTS, losses64())
    )
    assert abs(value - expected) < 6e-9


def test_gap_to_the_one_by_one_law():
    with jax.enable_x64(True):
        log_law = testing.any_order_log_likelihood(toy_model(jnp.float64), toys.toy_batch(), 3)
    np.testing.assert_allclose(NELBO + log_law, [0.05641065, 0.05121676, 0.00429155], atol=1e-8)
    np.testing.assert_allclose(np.exp(log_law), [0.01338262, 0.01139992, 0.08753044], atol=6e-9)


def test_exact_variance():
    pattern, count = testing.exact_variance(losses64()[0])
    np.testing.assert_allclose(
        [(pattern + count) / 4, pattern / 4], [0.48719781, 0.48406452], atol=6e-9
    )
    parts = np.array([testing.exact_variance(row) for row in losses64()])
    np.testing.assert_allclose(WEIGHTS @ parts, [1.71159384, 0.23342413], atol=6e-9)


def test_one_path_estimators():
    """Nested prefixes and the any-order path are evaluation by n passes along one permutation."""
    with jax.enable_x64(True):
        ce = testing.mask_cross_entropies(toy_model(jnp.float64), row_of(toys.toy_batch(), 0), 3)
    losses, nested, path = ce.sum(1), [], []
    for order in itertools.permutations(range(4)):
        masks = [sum(1 << p for p in order[:k]) for k in range(1, 5)]
        nested.append(sum(losses[m] / k for k, m in enumerate(masks, start=1)))
        path.append(sum(ce[m, order[k]] for k, m in enumerate(masks)))
    np.testing.assert_allclose([np.mean(nested), np.mean(path)], NELBO[0], atol=6e-9)
    np.testing.assert_allclose([np.var(nested), np.var(path)], [0.51424044, 0.11880705], atol=6e-9)


def test_ineligible_positions_stay_visible():
    batch = toys.toy_batch()
    row = Batch(*(np.array(field) for field in row_of(batch, 1)))
    row.eligible[2] = False
    ce = testing.mask_cross_entropies(toy_model(), row, toys.MASK_ID)
    assert ce.shape == (8, 3)
    whole = [m for m in range(16) if not m & 4]  # position 2 never masked
    np.testing.assert_allclose(ce.sum(1), LOSSES[whole, 1], atol=1e-6)
    none = row._replace(eligible=np.zeros(4, bool))
    assert testing.mask_losses(toy_model(), none, toys.MASK_ID).tolist() == [0.0]
    both = Batch(*(np.stack([a, b]) for a, b in zip(row, none)))
    nelbo = testing.exact_nelbo(toy_model(), both, toys.MASK_ID)
    assert nelbo[1] == 0.0 and nelbo[0] > 0


def test_mask_logit_is_excluded_and_levels_are_shown():
    levels = []

    def model(inputs, logsnr, documents):
        jax.debug.callback(
            lambda z, s: levels.append((np.asarray(z), np.asarray(s))), inputs, logsnr
        )
        logits = toy_model()(inputs, logsnr, documents)
        return jnp.concatenate([logits, jnp.full((*logits.shape[:-1], 1), 9.0)], -1)

    losses = testing.mask_losses(model, row_of(toys.toy_batch(), 0), toys.MASK_ID)
    np.testing.assert_allclose(losses, LOSSES[:, 0], atol=1e-6)
    ((inputs, logsnr),) = levels
    masked = np.maximum((inputs == toys.MASK_ID).sum(1), 1)
    np.testing.assert_allclose(1 / (1 + np.exp(logsnr[:, 0])), (masked - 0.5) / 4, atol=1e-6)


def test_errors():
    batch = toys.toy_batch()
    with pytest.raises(ValueError, match="one row at a time"):
        testing.mask_losses(toy_model(), batch, 3)
    with pytest.raises(ValueError, match="batch of rows"):
        testing.exact_nelbo(toy_model(), row_of(batch, 0), 3)
    long = Batch(np.zeros((1, 16), int), np.ones((1, 16), bool), np.ones((1, 16), int), np.ones(1))
    with pytest.raises(ValueError, match=r"16 eligible positions mean 2\*\*16 masks"):
        testing.exact_nelbo(toy_model(), long, 3)
    with pytest.raises(ValueError, match="all 2"):
        testing.count_losses(np.zeros(5))


def test_many_masks_run_in_chunks():
    """Eleven positions need two chunks; a network that ignores its input gives S = |M| log 5."""

    def model(inputs, logsnr, documents):
        return jnp.zeros((*inputs.shape, 5)) + 0.0 * documents[..., None]

    row = Batch(np.zeros(13, int), np.arange(13) < 11, np.ones(13, int), np.int32(13))
    losses = testing.mask_losses(model, row, 5)
    np.testing.assert_allclose(testing.count_losses(losses), np.arange(12) * np.log(5), rtol=1e-6)


def _sizes() -> np.ndarray:
    return np.array([bin(m).count("1") for m in range(16)])
