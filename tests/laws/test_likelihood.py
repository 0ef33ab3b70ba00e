"""The fixed estimator of the bound: exact uniformity, unbiasedness, and an honest error bar."""

import collections
import fractions
import functools
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy import stats

from mdm_jax import likelihood, testing
from mdm_jax.likelihood import subsets
from mdm_jax.testing import enumeration, toys
from mdm_jax.types import Batch

NELBO = np.array([4.37020885, 4.52536593, 2.44006023])


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


TRACES = collections.defaultdict(list)
"""By number of passes, the shapes for which an evaluation's forward pass was traced."""


@functools.cache
def evaluation(passes, replicates):
    def apply_fn(params, inputs, logsnr, documents):
        TRACES[passes].append(inputs.shape)
        return apply_toy(params, inputs, logsnr, documents)

    return likelihood.make_likelihood(apply_fn, 3, passes=passes, replicates=replicates)


@functools.cache
def toy_losses(i: int) -> np.ndarray:
    row = Batch(*(np.asarray(field)[i] for field in toys.toy_batch()))
    model = lambda *args: apply_toy(toys.toy_params(), *args)  # noqa: E731
    return testing.mask_losses(model, row, toys.MASK_ID)


def repeat_row(i: int, times: int) -> Batch:
    return jax.tree.map(
        lambda field: np.repeat(np.asarray(field)[i : i + 1], times, 0), toys.toy_batch()
    )


view_lap = jax.jit(subsets.view_lap)


@functools.partial(jax.jit, static_argnums=4)
def view_mask(first_count, ranks, eligible, view, passes):
    n = jnp.sum(eligible, axis=-1)
    count = subsets.lattice_count(first_count, n, view, passes)
    return eligible & (subsets.rotate(ranks, n, view, passes) < count[:, None]), count


def every_design(n: int, passes: int) -> tuple[np.ndarray, np.ndarray]:
    """The implementation's masks under all k_0 and permutations: masks [D, F, n], counts [D, F]."""
    cases = list(itertools.product(range(1, n + 1), itertools.permutations(range(n))))
    first = np.array([k for k, _ in cases], np.int32)
    ranks = np.array([r for _, r in cases], np.int32)
    eligible = np.ones(ranks.shape, bool)
    views = [view_mask(first, ranks, eligible, j, passes) for j in range(passes)]
    return np.stack([m for m, _ in views], 1), np.stack([k for _, k in views], 1)


def design_values(losses: np.ndarray, passes: int) -> np.ndarray:
    """Row estimate under every design of F <= n views, [D]."""
    n = len(losses).bit_length() - 1
    masks, counts = every_design(n, passes)
    number = masks.astype(int) @ (1 << np.arange(n))
    return (n / counts * losses[number]).mean(1)


@pytest.mark.parametrize(
    "n, passes",
    [
        (4, 8),
        (7, 3),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((3, 2), (4, 3), (1, 5), (5, 5))),
    ],
)
def test_every_view_has_a_uniform_count(n, passes):
    first = np.arange(1, n + 1)
    ranks, eligible = np.tile(np.arange(n), (n, 1)), np.ones((n, n), bool)
    for j in range(passes):
        mask, count = view_mask(first, ranks, eligible, j, passes)
        assert sorted(np.asarray(count)) == list(range(1, n + 1))
        assert (np.asarray(mask).sum(1) == np.asarray(count)).all()


def test_counts_spread_evenly():
    """Whatever k_0, F views of a row with n = c F hit each of F cells of c counts exactly once."""
    n, passes = 12, 4
    first = np.arange(1, n + 1)
    ranks, eligible = np.tile(np.arange(n), (n, 1)), np.ones((n, n), bool)
    counts = np.stack([view_mask(first, ranks, eligible, j, passes)[1] for j in range(passes)], 1)
    assert (np.sort((counts - counts[:, :1]) % n, axis=1) == [0, 3, 6, 9]).all()


def test_masks_are_uniform_subsets():
    masks, counts = every_design(4, 3)
    for j in range(3):
        number = masks[:, j].astype(int) @ (1 << np.arange(4))
        frequency = np.bincount(number, minlength=16) / len(number)
        size = enumeration.mask_bits(4).sum(1)
        expected = np.where(size > 0, 1 / (4 * np.array([math.comb(4, k) for k in size])), 0)
        np.testing.assert_allclose(frequency, expected, atol=1e-12)


@pytest.mark.parametrize("passes", [1, 2, 3, 4, 8])
def test_expectation_over_all_designs_is_the_bound(passes):
    values = [design_values(toy_losses(i), passes).mean() for i in range(3)]
    np.testing.assert_allclose(values, NELBO, atol=2e-6)


def test_rounded_lattice_would_be_biased():
    """The floating-point lattice in use elsewhere rounds half to even; ours must not equal it."""
    by_count = testing.count_losses(toy_losses(0))

    def pooled(n, passes):
        counts = [
            1 + (round(float(fractions.Fraction(k - 1) + fractions.Fraction(j * n, passes))) % n)
            for k in range(1, n + 1)
            for j in range(passes)
        ]
        return np.bincount(counts, minlength=n + 1)[1:] / len(counts)

    assert not np.allclose(pooled(3, 2), 1 / 3)
    assert abs(np.sum(pooled(4, 8) * 4 / np.arange(1, 5) * by_count[1:]) - NELBO[0]) > 0.01


def test_rotated_views_beat_independent_ones():
    """4 passes on row x1. Rotating the other way would give nested masks, 0.51424044."""
    variance = design_values(toy_losses(0), 4).var()
    pattern, count = testing.exact_variance(toy_losses(0))
    np.testing.assert_allclose(
        [(pattern + count) / 4, pattern / 4], [0.48719781, 0.48406452], atol=1e-6
    )
    assert variance < 0.75 * pattern / 4


@pytest.mark.parametrize("n, passes", [(4, 4), (4, 9), (1, 3), (3, 8), (10, 4)])
def test_laps_number_the_views_that_share_a_count(n, passes):
    offsets = [j * n // passes for j in range(passes)]
    laps = [int(view_lap(np.array([n]), j, passes)[0]) for j in range(passes)]
    assert laps == [offsets[:j].count(offsets[j]) for j in range(passes)]


def test_design_draws():
    """k_0 uniform and each element's rank uniform, over 4000 rows (chi-square, level 1e-4)."""
    rows, length = 4000, 6
    keys = jax.random.split(jax.random.key(0), rows)
    eligible = np.tile([True, False, True, True, True, False], (rows, 1))
    draw = jax.jit(subsets.rotated_counts(8).draw)
    masks, weights = zip(*(map(np.asarray, draw(keys, eligible, view)) for view in range(8)))
    masks = np.stack(masks)
    assert not masks[:, :, [1, 5]].any() and masks.shape == (8, rows, length)
    first = masks[0].sum(1)
    np.testing.assert_allclose(np.where(masks[0], weights[0] * 8, 0).sum(1), 4, rtol=1e-6)
    assert set(np.unique(first)) == {1, 2, 3, 4}
    assert stats.chisquare(np.bincount(first)[1:]).pvalue > 1e-4
    for column in masks[0][first == 2][:, [0, 2, 3, 4]].T:  # alike, and half of the time masked
        assert stats.binomtest(int(column.sum()), len(column)).pvalue > 1e-4
    # Views 0 and 1 rotate alike and have one count, but a permutation each: 1 in 6 agrees.
    same = (masks[0] == masks[1]).all(1)[first == 2]
    assert (masks[1].sum(1) == first).all()
    assert stats.binomtest(int(same.sum()), len(same), 1 / 6).pvalue > 1e-4


def test_mean_and_standard_error_are_honest():
    """64 copies of x3, F = 4: 5 exact standard errors for the mean, chi-square for the error."""
    rows, replicates = 64, 200
    sigma2 = rows * design_values(toy_losses(2), 4).var()
    evaluate = evaluation(passes=4, replicates=replicates)
    result = evaluate(toys.toy_params(), jax.random.key(1), [repeat_row(2, rows)])
    assert abs(result.nats - rows * NELBO[2]) < 5 * math.sqrt(sigma2 / replicates)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], replicates - 1) / (replicates - 1)
    assert low < result.standard_error_nats**2 * replicates / sigma2 < high
    # Passes taken as independent would claim several times this variance.
    assert rows * sum(testing.exact_variance(toy_losses(2))) / 4 > 5 * sigma2


def test_more_passes_than_tokens():
    """F = 8 on n = 4: unbiased, and the second lap's fresh permutations halve the variance."""
    rows, replicates = 64, 100
    evaluate = evaluation(passes=8, replicates=replicates)
    result = evaluate(toys.toy_params(), jax.random.key(2), [repeat_row(0, rows)])
    sigma2 = rows * design_values(toy_losses(0), 4).var() / 2
    assert abs(result.nats - rows * NELBO[0]) < 5 * math.sqrt(sigma2 / replicates)
    low, high = stats.chi2.ppf([1e-5, 1 - 1e-5], replicates - 1) / (replicates - 1)
    assert low < result.standard_error_nats**2 * replicates / sigma2 < high


def test_one_token_answers_are_exact():
    batch = repeat_row(0, 3)
    batch = batch._replace(eligible=np.array([[False, True, False, False]] * 3))
    evaluate = evaluation(passes=3, replicates=2)
    result = evaluate(toys.toy_params(), jax.random.key(0), [batch])
    np.testing.assert_allclose(result.per_row_nats, 0.63977235, atol=1e-6)
    assert result.standard_error_nats == 0.0


def transformer_data(rows: int, length: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, length + 1, rows)
    lengths[::5] = 0
    eligible = np.arange(length) < lengths[:, None]
    eligible[:, 0] = False  # a prompt of one token
    documents = (np.arange(length) < np.maximum(lengths, 1)[:, None]).astype(np.int32)
    tokens = rng.integers(0, 6, (rows, length)).astype(np.int32)
    return Batch(tokens, eligible, documents, (3 * eligible.sum(1)).astype(np.int32))


def batches_of(data: Batch, size: int):
    rows = len(data.tokens)
    padded = jax.tree.map(lambda a: np.pad(a, [(0, -rows % size)] + [(0, 0)] * (a.ndim - 1)), data)
    parts = [np.split(field, -(-rows // size)) for field in padded]
    return (Batch(*fields) for fields in zip(*parts))


@pytest.fixture(scope="module")
def transformer():
    """An evaluation of 3 passes and 2 replicates, and parameters."""
    model = tiny.transformer()
    evaluate = likelihood.make_likelihood(model.apply, tiny.MASK_ID, passes=3, replicates=2)
    return evaluate, tiny.parameters(model, 8)


def test_result_does_not_depend_on_the_batch_size(transformer):
    evaluate, params = transformer
    data = transformer_data(13, 8)
    results = [evaluate(params, jax.random.key(3), batches_of(data, size)) for size in (4, 13)]
    scored = np.flatnonzero(data.eligible.any(1))
    for result in results:
        assert (result.row_index == scored).all() and result.rows == len(scored)
        assert result.tokens == data.eligible.sum() and result.units == 3 * data.eligible.sum()
        np.testing.assert_allclose(
            result.replicate_row_nats, results[0].replicate_row_nats, rtol=2e-6
        )
    assert results[0].rows_seen == 16  # 13 rows in batches of 4
    other = evaluate(params, jax.random.key(4), batches_of(data, 4))
    assert (np.abs(other.per_row_nats - results[0].per_row_nats) > 1e-4).any()


def test_empty_and_padded_rows_change_nothing(transformer):
    evaluate, params = transformer
    data = transformer_data(13, 8)
    result = evaluate(params, jax.random.key(0), batches_of(data, 13))
    # Scramble what must not matter: padding tokens, and all of the empty rows.
    visible = (data.documents > 0) & data.eligible.any(1)[:, None]
    scrambled = data._replace(
        tokens=np.where(visible, data.tokens, 5 - data.tokens),
        units=np.where(data.eligible.any(1), data.units, 99),
    )
    again = evaluate(params, jax.random.key(0), batches_of(scrambled, 13))
    np.testing.assert_array_equal(result.replicate_row_nats, again.replicate_row_nats)
    assert result.units == again.units
    assert np.isfinite(result.replicate_row_nats).all()


def test_matches_enumeration_with_prompt_and_padding(transformer):
    """Each row's mean over 150 replicates within 5 standard errors of the enumerated bound."""
    apply_fn, params = tiny.transformer().apply, transformer[1]
    data = transformer_data(6, 6, seed=5)
    exact = testing.exact_nelbo(functools.partial(apply_fn, params), data, 6)
    evaluate = likelihood.make_likelihood(apply_fn, 6, passes=2, replicates=150)
    result = evaluate(params, jax.random.key(0), [data])
    error = result.replicate_row_nats.std(0, ddof=1) / math.sqrt(150)
    assert (np.abs(result.per_row_nats - exact[result.row_index]) < 5 * error + 1e-5).all()
    assert (exact[~data.eligible.any(1)] == 0).all()


def test_compiles_once_and_reports_progress():
    evaluate, done = evaluation(passes=3, replicates=2), []
    batches = [toys.toy_batch(), repeat_row(1, 3), repeat_row(2, 3)]
    evaluate(toys.toy_params(), jax.random.key(0), batches)
    evaluate(toys.toy_params(), jax.random.key(1), iter(batches), progress=done.append)
    assert TRACES[3] == [(3, 4)] and done == [3, 3, 3]


def test_a_batch_without_eligible_tokens_takes_no_pass():
    calls = []

    def apply_fn(*inputs):
        jax.debug.callback(lambda: calls.append(1))
        return apply_toy(*inputs)

    evaluate = likelihood.make_likelihood(apply_fn, 3, passes=2, replicates=3)
    full, empty = repeat_row(1, 3), repeat_row(0, 3)._replace(eligible=np.zeros((3, 4), bool))
    result = evaluate(toys.toy_params(), jax.random.key(0), [empty, full, empty])
    jax.effects_barrier()
    assert len(calls) == 2 * 3 and result.row_index.tolist() == [3, 4, 5]
    assert result.rows_seen == 9


def test_levels_shown_and_loss_curve():
    """A network that predicts from the level alone: the curve and the levels are then known."""
    length, bins = 8, 4

    def apply_fn(params, inputs, logsnr, documents):
        rate = jax.nn.sigmoid(-logsnr)[:, :, None]  # (k - 1/2) / n
        masked = jnp.sum(inputs == 2, -1)[:, None, None]
        wrong = jnp.where(jnp.abs(rate - (masked - 0.5) / length) < 1e-6, 0.0, jnp.nan)
        odds = jnp.log(rate) + wrong + jnp.zeros((*inputs.shape, 1))
        return jnp.concatenate([odds, jnp.zeros_like(odds)], -1)

    rows = 5
    whole = np.ones((rows, length), bool)
    batch = Batch(np.zeros((rows, length), np.int32), whole, whole * 1, np.full(rows, 2))
    evaluate = likelihood.make_likelihood(apply_fn, 2, passes=length, replicates=1, level_bins=bins)
    result = evaluate({}, jax.random.key(0), [batch])
    rate = (np.arange(1, length + 1) - 0.5) / length
    loss = -np.log(rate / (1 + rate))  # per masked token, with k = 1..8 of 8 masked
    k = np.arange(1, length + 1)
    expected = [(k * loss)[k > 2 * b][:2].sum() / k[k > 2 * b][:2].sum() for b in range(bins)]
    np.testing.assert_allclose(result.levels.nats, expected, rtol=1e-5)
    np.testing.assert_allclose(result.levels.edges, [0, 0.25, 0.5, 0.75, 1])
    assert result.levels.targets.tolist() == [rows * (1 + 2), rows * 7, rows * 11, rows * 15]
    # With every count met once the estimate is the plain mean of the per-count losses.
    np.testing.assert_allclose(result.nats_per_token, loss.mean(), rtol=1e-6)
    assert math.isnan(result.standard_error_nats)
    assert result.to_dict()["standard_error_nats"] is None


def test_units_and_pooling():
    """Totals are pooled over rows before dividing; errors follow the textbook ratio estimator."""
    row_nats = np.array([[2.0, 9.0, 1.0], [4.0, 11.0, 1.0]])
    levels = likelihood.LevelCurve(np.array([0, 1.0]), np.array([np.nan]), np.array([0]))
    tokens, units = np.array([2, 5, 1]), np.array([10, 15, 3])
    result = likelihood.Likelihood(row_nats, tokens, units, np.arange(3), 4, 2, levels)
    assert result.nats == 14.0 and result.tokens == 8 and result.units == 28
    assert result.nats_per_token == 14 / 8
    assert result.bits_per_token == pytest.approx(14 / 8 / math.log(2))
    assert result.bits_per_unit == pytest.approx(14 / 28 / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(14 / 8))
    # Rows are independent: variances of 2, 2 and 0 over two replicates.
    assert result.standard_error_nats == pytest.approx(2**0.5)
    low, high = result.interval()  # degrees of freedom (R + 1) (sum v)^2 / sum v^2 - 2
    reach = stats.t.ppf(0.975, 4) * 2**0.5
    np.testing.assert_allclose([low, high], [(14 - reach) / 8, (14 + reach) / 8])
    low, high = result.interval(data=True)
    reach = stats.t.ppf(0.975, 2) * result.data_standard_error_nats_per_token
    np.testing.assert_allclose([low, high], [14 / 8 - reach, 14 / 8 + reach])
    assert result.standard_error_bits_per_unit == pytest.approx(2**0.5 / 28 / math.log(2))
    assert result.standard_error_perplexity == pytest.approx(math.exp(14 / 8) * 2**0.5 / 8)
    residual = np.array([3.0, 10.0, 1.0]) - 14 / 8 * tokens
    expected = math.sqrt(1.5 * np.sum(residual**2)) / 8
    assert result.data_standard_error_nats_per_token == pytest.approx(expected)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["rows"] == 3 and stored["levels"]["nats_per_masked_token"] == [None]
    text = result.summary()
    assert f"{result.bits_per_unit:.4f}" in text and "2 replicates of 2 passes" in text


def test_errors():
    make = likelihood.make_likelihood
    for bad in ({"passes": 0}, {"passes": 1, "replicates": 0}, {"passes": 1, "level_bins": 0}):
        with pytest.raises(ValueError, match="at least 1, got 0"):
            make(apply_toy, 3, **bad)
    evaluate = evaluation(passes=3, replicates=2)
    params, key, batch = toys.toy_params(), jax.random.key(0), toys.toy_batch()
    with pytest.raises(ValueError, match=r"shape of the first, \(3, 4\), got \(2, 4\)"):
        evaluate(params, key, [batch, repeat_row(0, 2)])
    empty = batch._replace(eligible=np.zeros((3, 4), bool))
    with pytest.raises(ValueError, match="none of 6 rows"):
        evaluate(params, key, [empty, empty])
    with pytest.raises(ValueError, match="none of 0 rows"):
        evaluate(params, key, [])
    with pytest.raises(ValueError, match=r"\[B, L\]"):
        evaluate(params, key, [jax.tree.map(lambda a: np.asarray(a)[0], batch)])
