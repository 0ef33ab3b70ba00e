"""Error bars are estimates: of 200 or more repetitions as many cover the truth as they say."""

import dataclasses
import functools
import importlib

import block_toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_clip_search import RANGES, RAW, block_apply, blocks_objective
from test_decompose import GRADIENT, LOSS, toy_rows, toy_setting
from test_efficiency import BATCH, exact_noise
from test_uniform_nelbo import exact_toy
from variants import slow_except

from mdm_jax import corruption, evaluation, likelihood, meter, objectives, variance
from mdm_jax.estimates import sketch, start
from mdm_jax.evaluation.accuracy import TaskAccuracy
from mdm_jax.evaluation.ngrams import token_entropy
from mdm_jax.evaluation.paired import paired_difference, paired_seeds
from mdm_jax.evaluation.windows import WindowedLikelihood
from mdm_jax.likelihood import subsets
from mdm_jax.meter import levels, nested
from mdm_jax.meter.clip_search import block_loss_moments
from mdm_jax.testing import toys
from mdm_jax.types import Batch

decompose = importlib.import_module("mdm_jax.meter.decompose")  # the name is a function's, too
PARTS = ("pattern", "rate", "data", "total")


def assert_honest(estimates, errors, truth, freedom=np.inf, skew=0.0, ratio=(0.85, 1.2)):
    """Root mean square error bars over the estimates' spread are within ``ratio``; one and two of
    them cover as much as Student's law of ``freedom`` says, to 4 binomial errors, and of an
    estimate with a skewed law (a variance, from few rows) ``skew`` less."""
    estimates, errors = np.asarray(estimates, float), np.asarray(errors, float)
    count = len(estimates)
    assert count >= 200 and np.all(errors > 0)
    assert abs(estimates.mean() - np.mean(truth)) < 4 * np.std(estimates - truth) / count**0.5
    found = np.sqrt(np.mean(errors**2) / np.var(estimates - truth))
    assert ratio[0] < found < ratio[1], found
    for sigmas in (1, 2):
        expected = 1 - 2 * stats.t.sf(sigmas, freedom)
        covered = np.mean(np.abs(estimates - truth) < sigmas * errors)
        slack = 4 * np.sqrt(expected * (1 - expected) / count)
        assert expected - slack - skew < covered < expected + slack, (sigmas, covered)


def assert_all_honest(results, truths, **options):
    """The same of every part of decompositions."""
    for name, truth in zip(PARTS, (*truths, sum(truths))):
        parts = [getattr(result, name) for result in results]
        assert_honest(*zip(*parts), truth, **options)


# The meter.


@functools.cache
def measured_cells(designs, rows, masks=2):
    """Losses of the toy's rows and draws, [designs, rows, 3 levels, masks]."""
    setting = toy_setting(variance.identity())
    values = nested.evaluate_cells(
        lambda batch, draw: setting.estimator.losses(setting.params, batch, draw),
        nested.nested_draw(jax.random.key(1), setting),
        toy_rows(designs * rows, seed=11),
        (3, masks),
        designs * rows * 3 * masks,
        None,
    )
    return setting, values.reshape(designs, rows, 3, masks)


@pytest.mark.parametrize("rows, skew", [(8, 0.13), pytest.param(32, 0.05, marks=pytest.mark.slow)])
def test_components_of_the_loss(rows, skew):
    """Squares of normal variables give 0.06 and 0.13 less than 0.68 and 0.95 with 8 rows."""
    setting, values = measured_cells(400, rows)
    results = [decompose._of_values(design, setting, 0, 1) for design in values]
    assert_all_honest(results, LOSS, skew=skew)


FOUR = np.array([[0, 0, 0, 1], [1, 1, 1, 2], [2, 2, 2, 0], [0, 0, 0, 2]], np.int32)


def four_rows(count):
    """Rows drawn at random from four, whose gradients are orthogonal, and what measures them."""
    objective = objectives.masked_nelbo(corruption.fixed_count(toys.MASK_ID))
    estimator = meter.make_estimator(
        lambda params, inputs, logsnr, row: jnp.take(params["logits"], row, axis=0), objective
    )
    transform, spec = variance.identity(), objective.spec(4, 4)
    params = {"logits": jnp.zeros((4, 3))}
    subject = meter.Subject(estimator, params, transform, transform.init(spec), spec)
    pick = np.random.default_rng(12).integers(4, size=count)
    documents = np.repeat(pick[:, None], 4, axis=1).astype(np.int32)
    rows = Batch(FOUR[pick], np.ones((count, 4), bool), documents, np.full(count, 4, np.int32))
    by_row = 4 / 3 - np.array([np.bincount(row, minlength=3) for row in FOUR])
    return subject, rows, 3 / 16 * np.sum(by_row**2)


@pytest.mark.slow
@pytest.mark.parametrize("rows, widest", [(32, 1.1), (8, 1.2)])
def test_data_noise_of_the_gradient(rows, widest, shape=(4, 2)):
    """As ``decompose_gradients`` computes it, 240 designs at once. Resampled as if independent, the
    recursive residuals gave errors 1.34 times too wide here, of which one covered 0.79."""
    subject, batch, expected = four_rows(240 * rows)
    visit = decompose.row_visit(subject, jax.random.key(2), *shape)
    batch = jax.tree.map(lambda a: jnp.asarray(a).reshape(240, rows, 1, *a.shape[1:]), batch)

    @jax.jit
    @jax.vmap
    def stream(batch, index):
        step = lambda grand, at: visit(subject.params, grand, *at)  # noqa: E731
        return jax.lax.scan(step, start(subject.params), (batch, index))[1]

    seen = stream(batch, jnp.arange(240 * rows).reshape(240, rows))
    parts = []
    for number in range(240):
        one = jax.tree.map(lambda a, n=number: np.asarray(a[n], np.float64), seen)
        terms, twice = decompose.gradient_terms(one, *shape)
        parts.append(decompose._result(terms, 0.0, subject, shape, 0, twice).data)
    assert_honest(*zip(*parts), expected, skew=0.02, ratio=(0.9, widest))


def test_a_sketch_keeps_sums_and_squared_norms():
    """To 4% of more parameters than it has numbers, and exactly of fewer."""
    rng = np.random.default_rng(3)
    sketched = jax.jit(lambda tree: sketch(tree, jax.random.key(0)))
    large = ((300, 256), 70, (3, 5, 100))  # the first is summed to 256 numbers: 0.088 of it
    for sizes, error in (((700, 3, 200), 1e-5), (large, 5 * 0.085)):
        one, other = (
            [jnp.asarray(rng.standard_normal(size), jnp.float32) for size in sizes] for _ in "12"
        )
        both = jax.tree.map(jnp.add, one, other)
        np.testing.assert_allclose(sketched(both), sketched(one) + sketched(other), atol=1e-3)
        square = sum(float(jnp.sum(leaf**2)) for leaf in both)
        np.testing.assert_allclose(np.sum(np.square(sketched(both))), square, rtol=error)


def test_the_error_over_rows_and_probes_is_that_of_a_crossed_design():
    """Of the mean of row + probe + interaction, with these variances: 4 / 50 + 1 / 5 + 9 / 250."""
    rng = np.random.default_rng(2)
    shape = (2000, 5, 50)
    rows, probes = 2 * rng.standard_normal((2000, 1, 50)), rng.standard_normal((2000, 5, 1))
    terms = rows + probes + 3 * rng.standard_normal(shape)
    found = np.array([nested.mean_over_rows(each, probes=True) for each in terms])
    expected = 4 / 50 + 1 / 5 + 9 / 250
    np.testing.assert_allclose(found[:, 0].var(), expected, rtol=0.1)  # 3 standard errors
    np.testing.assert_allclose(np.mean(found[:, 1] ** 2), expected, rtol=0.06)


@pytest.mark.slow
def test_components_of_the_gradient_by_probes():
    """Six random directions in the toy's three parameters, of 48 rows each."""
    setting = toy_setting(variance.identity())

    @jax.jit
    def score(batch, draw):
        losses = functools.partial(setting.estimator.losses, batch=batch, draw=draw)
        return jax.jacfwd(losses)(setting.params)["params"]["theta"].T

    draw_row = nested.nested_draw(jax.random.key(3), setting)
    rows = toy_rows(300 * 48, seed=13)
    cells = nested.evaluate_cells(score, draw_row, rows, (3, 2), 21_600, None)
    cells = cells.reshape(3, 300, 48, 3, 2)
    signs = np.random.default_rng(4).choice([-1.0, 1.0], (300, 6, 3))
    along = np.einsum("dpi,idrlm->dprlm", signs, cells)
    results = [decompose._of_values(design, setting, 0, 1) for design in along]
    assert_all_honest(results, GRADIENT, freedom=12, skew=0.06, ratio=(0.85, 1.35))


@pytest.mark.slow
def test_moments_by_level():
    """v, g, c and s of 300 crossed designs of 40 rows, each part about its mean over designs."""
    setting = toy_setting(variance.identity(), process="bernoulli")
    quantiles = jnp.array([0.1, 0.5, 0.8])
    values = nested.evaluate_cells(
        lambda batch, draw: setting.estimator.losses(setting.params, batch, draw),
        nested.crossed_draw(jax.random.key(4), setting, quantiles),
        toy_rows(300 * 40, seed=14),
        (3, 3),
        300 * 40 * 9,
        None,
    ).reshape(300, 40, 3, 3)
    found = [levels._moments(design) for design in values]
    for part in range(5):
        estimates, errors = (np.array([moments[i][part] for moments in found]) for i in (0, 1))
        for level in range(3):
            truth = estimates[:, level].mean()
            assert_honest(estimates[:, level], errors[:, level], truth, skew=0.06)


def efficiency_of(name, with_data=False, groups=10, repetitions=200):
    """Efficiencies of ``groups`` groups each, measured at once."""
    setting = toy_setting(getattr(variance, name)())
    options = {"groups": groups * repetitions, "redraws": 4}
    if with_data:
        pool = Batch(*(np.repeat(np.asarray(f), (5, 3, 2), axis=0) for f in toys.toy_batch()))
        whole = meter.efficiency_with_data(setting, pool, jax.random.key(5), **options)
    else:
        whole = meter.efficiency(setting, (BATCH,), jax.random.key(5), **options)
    each = whole.group_variances.reshape(repetitions, groups)
    return [dataclasses.replace(whole, group_variances=part, unsettled="") for part in each]


@pytest.mark.slow
def test_gradient_noise_and_its_comparison():
    first, second = efficiency_of("mirror"), efficiency_of("identity")
    exact = [exact_noise(name) for name in ("mirror", "identity")]
    for results, truth in zip((first, second), exact):
        assert_honest(*zip(*(r.variance for r in results)), truth, freedom=9, skew=0.02)
    differences = [meter.compare(a, b).difference for a, b in zip(first, second)]
    assert_honest(*zip(*differences), 2 * exact[0] - exact[1], freedom=9, skew=0.02)


@pytest.mark.slow
def test_gradient_noise_with_fresh_data():
    results = efficiency_of("identity", with_data=True)
    expected = sum(GRADIENT) * 4 / 16**2
    assert_honest(*zip(*(r.variance for r in results)), expected, freedom=9, skew=0.02)


@pytest.mark.slow
def test_block_loss_moments():
    """The error is that of the variance of block losses, from the spread over 12 batches."""
    objective = blocks_objective()
    measure = block_loss_moments(
        functools.partial(block_apply, 2), objective, objective.spec(64, 4)
    )
    rows = toy_rows(240 * 12 * 64, seed=16)
    rows = rows._replace(documents=rows.tokens)  # see block_apply
    rows = jax.tree.map(lambda a: a.reshape(240, 12, 64, *a.shape[1:]), rows)
    found = []
    for number, key in enumerate(jax.random.split(jax.random.key(7), 240)):
        given = [jax.tree.map(lambda a, at=(number, i): a[at], rows) for i in range(12)]
        found.append(measure(toys.toy_params(), given, key, RANGES[1:]))
    for i, truth in enumerate(RAW[1:]):
        pairs = [(one.variance[i], one.standard_error[i]) for one in found]
        assert_honest(*zip(*pairs), truth, freedom=11, skew=0.03)


# Likelihoods.


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


LIKELIHOODS = {
    "masked": (
        lambda: likelihood.make_likelihood(apply_toy, toys.MASK_ID, passes=2),
        lambda: np.array([4.37020885, 4.52536593, 2.44006023]),
    ),
    "block": (
        lambda: likelihood.make_evaluate(
            likelihood.masked_estimator(
                block_toy.block_apply(2), toys.MASK_ID, likelihood.counts(1), 2
            ),
            8,
        ),
        lambda: np.array(block_toy.BLOCK_NELBO[2]),
    ),
    "uniform": (
        lambda: likelihood.make_uniform_likelihood(apply_toy, 3, passes=4),
        lambda: np.asarray(exact_toy()[0]),
    ),
    "subset": (
        lambda: likelihood.make_subset_likelihood(
            apply_toy, toys.MASK_ID, subsets.harmonic_counts(2)
        ),
        lambda: np.array([4.37020885, 4.52536593, 2.44006023]),
    ),
}


def pieces(result, rows=32):
    """The likelihood of every ``rows`` rows."""
    names = ("replicate_row_nats", "row_tokens", "row_units", "row_index")
    for first in range(0, result.rows, rows):
        cut = {name: getattr(result, name)[..., first : first + rows] for name in names}
        yield dataclasses.replace(result, **cut)


@pytest.mark.parametrize("name", slow_except({"masked", "subset"}, LIKELIHOODS))
def test_likelihoods(name):
    """240 data sets of 32 rows, 8 replicates: Monte Carlo errors about the bound of these rows, and
    errors over rows about that of all data."""
    make, bounds = LIKELIHOODS[name]
    rows, exact = toy_rows(240 * 32, seed=15), bounds()
    result = make()(toys.toy_params(), jax.random.key(6), [rows])
    own = exact[np.argmax(np.all(rows.tokens[:, None] == np.array(toys.ROWS), axis=-1), axis=1)]
    parts = list(pieces(result))
    nats = [part.nats for part in parts]
    monte_carlo = [part.standard_error_nats for part in parts]
    assert_honest(nats, monte_carlo, own.reshape(240, 32).sum(1), freedom=7)
    per_token = np.array([part.nats_per_token for part in parts])
    over_rows = [part.data_standard_error_nats_per_token for part in parts]
    assert_honest(per_token, over_rows, np.dot(toys.ROW_PROBABILITIES, exact) / 4, skew=0.02)


def test_paired_likelihoods():
    """Two networks on common masks: errors of their difference, and of the share of rows won."""
    rows, other = toy_rows(240 * 32, seed=17), jax.tree.map(lambda a: 0.5 * a, toys.toy_params())
    evaluate = likelihood.make_likelihood(apply_toy, toys.MASK_ID, passes=2)
    both = [evaluate(params, jax.random.key(8), [rows]) for params in (other, toys.toy_params())]
    whole = paired_difference(*both)
    kind = np.argmax(np.all(rows.tokens[:, None] == np.array(toys.ROWS), axis=-1), axis=1)
    exact = np.array([whole.per_row_nats[kind == row].mean() for row in range(3)])
    parts = [paired_difference(*pair) for pair in zip(*map(pieces, both))]
    nats, errors = zip(*((part.nats, part.standard_error_nats) for part in parts))
    assert_honest(nats, errors, exact[kind].reshape(240, 32).sum(1), freedom=7)
    per_token = [part.nats_per_token for part in parts]
    over_rows = [part.data_standard_error_nats_per_token for part in parts]
    assert_honest(per_token, over_rows, np.dot(toys.ROW_PROBABILITIES, exact) / 4, skew=0.02)
    won = [part.rows_won_by_second for part in parts]
    assert_honest(*zip(*won), np.mean([part.value for part in won]), skew=0.05)
    single = parts[0].per_row_standard_error
    np.testing.assert_allclose(single, parts[0].replicate_row_nats.std(0, ddof=1) / 8**0.5)


def test_errors_over_texts_questions_answers_and_seeds():
    """What is computed from arrays alone, of numbers with known laws: 200 repetitions."""
    rng, found = np.random.default_rng(9), {}
    for _ in range(200):
        # Windows of one text are alike: as independent they would give half the error.
        tokens, text = rng.integers(5, 15, (30, 4)), rng.normal(2.0, 0.5, (30, 1))
        nats = (tokens * text + rng.normal(0, 1, (30, 4))).ravel()
        windows = likelihood.Likelihood(
            nats[None], tokens.ravel(), tokens.ravel(), np.arange(120), 120, 1, None
        )
        long = WindowedLikelihood(windows, np.repeat(np.arange(30), 4), 8, 4)
        pair = windows.nats_per_token, long.data_standard_error_nats_per_token
        found.setdefault("windows", []).append(pair)
        task = TaskAccuracy(("",) * 50, ("",) * 50, rng.random(50) < 0.7)
        found.setdefault("task", []).append((task.accuracy, task.standard_error))
        seeds = paired_seeds(rng.normal(1.0, 1.0, 8), rng.normal(0.5, 1.0, 8), resamples=2)
        found.setdefault("seeds", []).append((seeds.mean, seeds.standard_error))
        # Texts of one of two words, or of both alike: entropies 0 and log 2.
        texts = np.stack([np.zeros(40, int), rng.integers(2, size=40)], axis=1)
        found.setdefault("entropy", []).append(token_entropy(texts).per_text)
        lengths = rng.integers(5, 40, 60)
        valid = np.arange(40) < lengths[:, None]
        scored = evaluation.generative_perplexity(
            lambda tokens, documents: documents.sum(1) * tokens[:, 0] / 100,
            np.repeat(rng.integers(100, 300, (60, 1)), 40, axis=1),
            valid,
            batch_size=60,
        )
        found.setdefault("perplexity", []).append((scored.perplexity, scored.standard_error))
    truths = {"windows": 2.0, "task": 0.7, "seeds": 0.5, "entropy": np.log(2) / 2}
    for name, pairs in found.items():
        values, errors = zip(*pairs)
        truth = truths.get(name, np.mean(values))  # a perplexity is high by half its variance
        freedom = {"seeds": 7}.get(name, np.inf)
        assert_honest(values, errors, truth, freedom=freedom, skew=0.03)
