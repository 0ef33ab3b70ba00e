"""Answers, likelihood ratios, multiple choice, and two checkpoints on common noise."""

import json
import math

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest

from mdm_jax import likelihood
from mdm_jax.evaluation import choices, paired
from mdm_jax.likelihood import subsets as designs
from mdm_jax.likelihood.stopping import Stop, differences, each_row, replicate_until
from mdm_jax.testing import toys
from mdm_jax.types import Batch

KEY = jax.random.key(0)
LAW = jnp.asarray(joint_law.LAW)


def draws(rows, design, keys=None):
    """Replicates of rows (tokens [n], eligible [n]) under the joint law, filled up with zeros."""
    keys = jnp.zeros(len(rows), int) if keys is None else jnp.asarray(keys)
    return likelihood.RowDraws(
        likelihood.masked_estimator(joint_law.apply_joint, 3, design),
        LAW,
        rows,
        jax.vmap(lambda key: jax.random.fold_in(KEY, key))(keys),
        batch_size=2,
        pad_id=0,
        lengths=(4,),
    )


EXACT, NOISY = designs.every_subset(), designs.harmonic_counts(1)


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


@pytest.fixture(scope="module")
def toy_likelihood():
    return likelihood.make_likelihood(apply_toy, 3, passes=2, replicates=20)


def test_answers_are_scored_given_their_prompts():
    """Batches of 2 of 5 rows; one has no answer."""
    states = joint_law.STATES[[3, 30, 44, 61, 79]]
    eligible = np.array(
        [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool
    )
    rows = draws([*zip(states, eligible)], EXACT)
    found = replicate_until(rows, 5, each_row(5), Stop(2))
    expected = joint_law.conditional_nats(states, eligible)
    expected[2] = 0
    np.testing.assert_allclose(found.row_value, expected, rtol=3e-6)
    assert found.standard_error.tolist() == [0] * 5
    assert rows.passes == 3 + 1 + 0 + 3 + 15


FIRST, SECOND = joint_law.STATES[[0, 17, 40]], joint_law.STATES[[1, 26, 41]]
WHOLE = np.ones((3, 4), bool)


def ratios(first, second, design, replicates):
    """log p(second) - log p(first), rows of a pair under one key."""
    rows = [*zip(first, WHOLE), *zip(second, WHOLE)]
    pairs = differences(np.arange(3), 3 + np.arange(3))
    return replicate_until(draws(rows, design, [0, 1, 2] * 2), 6, pairs, Stop(replicates))


def test_likelihood_ratios_are_exact_for_one_joint_law():
    found = ratios(FIRST, SECOND, EXACT, 2)
    truth = np.subtract(*(joint_law.conditional_nats(states, WHOLE) for states in (FIRST, SECOND)))
    np.testing.assert_allclose(found.value, truth, atol=2e-5)
    assert (found.standard_error == 0).all()


def test_random_ratios_share_their_subsets():
    """The identical row cancels exactly in every replicate, others within 5 standard errors."""
    second = np.array([FIRST[0], *SECOND[1:]])
    found = ratios(FIRST, second, NOISY, 20)
    assert (found.row_values[:, 0] == found.row_values[:, 3]).all()
    assert np.ptp(found.row_values[:, 0]) > 0.01
    truth = np.subtract(*(joint_law.conditional_nats(states, WHOLE) for states in (FIRST, second)))
    error = found.standard_error
    assert (np.abs(found.value - truth)[1:] < 5 * error[1:]).all() and error[0] == 0


PROMPTS = [[0, 1], [2, 2], [1, 0]]
CANDIDATES = [[[0, 0], [1, 2]], [[0], [2, 1], [1]], [[2], [0, 2]]]
NUMBER = np.array([[0, 1, -1], [2, 3, 4], [5, 6, -1]])


def candidate_nats():
    """[3, 3] by summation over the joint law; an answer of one token leaves a padding 0 behind."""
    nats = np.full((3, 3), np.nan)
    for question, (prompt, options) in enumerate(zip(PROMPTS, CANDIDATES)):
        for place, answer in enumerate(options):
            state = np.array([[*prompt, *answer, 0][:4]])
            free = np.array([[False, False, True, len(answer) == 2]])
            nats[question, place] = joint_law.conditional_nats(state, free)[0]
    return nats


def candidates():
    rows = [
        (np.array([*prompt, *answer]), np.arange(2 + len(answer)) >= 2)
        for prompt, options in zip(PROMPTS, CANDIDATES)
        for answer in options
    ]
    return draws(rows, EXACT, np.argwhere(NUMBER >= 0)[:, 0])


def test_candidates_of_different_number_and_length():
    """By nats, nats per token, nats per character."""
    rows, characters = candidates(), np.array([[2, 3, 1], [5, 4, 1], [1, 2, 1]])
    for size in (1.0, np.array([[2, 2, 1], [1, 2, 1], [1, 2, 1]]), characters):
        figures = np.where(NUMBER >= 0, candidate_nats() / size, np.inf)
        best = figures.argmin(1)
        result = choices.choose_until(rows, NUMBER, best, Stop(2), size)
        assert result.chosen.tolist() == best.tolist() and result.accuracy == 1.0
        assert result.tied_questions == 0 and result.certain.all()
        gaps = np.sort(figures, axis=1)
        np.testing.assert_allclose(result.margin, gaps[:, 1] - gaps[:, 0], rtol=1e-4)
        wrong = choices.choose_until(rows, NUMBER, (best + 1) % [2, 3, 2], Stop(2), size)
        assert wrong.accuracy == 0.0


def test_ties_credit_and_errors():
    nats = np.array([[1.0, 1.0, 5.0], [2.0, 1.0, np.nan], [4.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    offset = np.array([[0.0, 0.0, 0.5], [0.0, 0.6, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    values = np.stack([nats + offset, nats - offset]).reshape(2, -1)
    number = np.where(np.isnan(nats), -1, np.arange(12).reshape(4, 3))

    def draw(rows, first, count):
        return values[first : first + count][:, rows]

    result = choices.choose_until(draw, number, [1, 1, 0, 0], Stop(2))
    assert result.chosen.tolist() == [0, 1, 1, 0] and result.ties.tolist() == [2, 1, 2, 1]
    assert result.credit.tolist() == [0.5, 1.0, 0.0, 1.0]
    assert result.accuracy == 2.5 / 4
    expected = np.std([0.5, 1, 0, 1], ddof=1) / 2
    assert result.standard_error == pytest.approx(expected)
    assert result.chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3 + 1 / 3) / 4)
    # Replicates of the second margin: 0.4 and 1.6, mean 1 and standard error 0.6.
    np.testing.assert_allclose(result.margin, [0, 1, 0, 1])
    np.testing.assert_allclose(result.margin_standard_error, [0, 0.6, 0, 0], atol=1e-12)
    assert result.tied_questions == 2 and result.unsure_questions == 1
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["questions"] == 4 and stored["unsure_questions"] == 1
    assert "accuracy 0.6250" in result.summary()
    for wrong in ([2, 2, 0, 0], [-1, 0, 0, 0], [3, 0, 0, 0]):
        with pytest.raises(ValueError, match="correct must name one of the candidates"):
            choices.choose_until(draw, number, wrong, Stop(2))


def many_rows():
    """64 rows of the toy in two batches."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (64, 4)).astype(np.int32)
    whole = np.ones((32, 4), bool)
    return [Batch(part, whole, whole * 1, np.full(32, 4)) for part in np.split(tokens, 2)]


def test_checkpoints_are_compared_on_common_noise(toy_likelihood):
    """A small change of the parameters: paired errors are far below unpaired ones."""
    first = toys.toy_params()
    second = jax.tree.map(lambda p: p + jnp.array([0.02, 0.0, -0.02]), first)
    batches = many_rows()
    result = paired.compare_parameters(toy_likelihood, first, second, KEY, batches)
    alone = [toy_likelihood(p, KEY, batches) for p in (first, second)]
    assert result.nats == pytest.approx(alone[0].nats - alone[1].nats)
    assert result.standard_error_nats_per_token < (
        0.1 * result.unpaired_standard_error_nats_per_token
    )
    assert result.data_standard_error_nats_per_token < (
        0.1 * result.unpaired_data_standard_error_nats_per_token
    )
    same = paired.compare_parameters(toy_likelihood, first, first, KEY, batches)
    assert same.nats == 0 and same.standard_error_nats == 0 and same.rows_won_by_second.value == 0.5


def made_up(nats, tokens=(2, 3), passes=2, targets=(4, 1), index=(0, 1)):
    levels = likelihood.LevelCurve(np.array([0, 0.5, 1]), np.zeros(2), np.array(targets))
    tokens = np.array(tokens)
    return likelihood.Likelihood(np.array(nats), tokens, tokens, np.array(index), 2, passes, levels)


def test_arithmetic_of_pairs():
    first, second = made_up([[5.0, 9.0], [7.0, 9.0]]), made_up([[4.0, 9.0], [5.0, 8.0]])
    result = paired.paired_difference(first, second)
    np.testing.assert_allclose(result.replicate_row_nats, [[1, 0], [2, 1]])
    np.testing.assert_allclose(result.per_row_nats, [1.5, 0.5])
    np.testing.assert_allclose(result.per_row_standard_error, [0.5, 0.5])
    assert result.nats == 2.0 and result.nats_per_token == pytest.approx(0.4)
    assert result.standard_error_nats == pytest.approx(0.5**0.5)  # rows of variances 0.5, 0.5
    residual = np.array([1.5, 0.5]) - 0.4 * np.array([2, 3])
    error = math.sqrt(2 * np.sum(residual**2)) / 5
    assert result.data_standard_error_nats_per_token == pytest.approx(error)
    # Rows of variances 2, 0 and 0.5, 0.5 over two replicates.
    assert result.unpaired_standard_error_nats_per_token == pytest.approx(1.5**0.5 / 5)
    assert result.rows_won_by_second.value == 1.0
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["rows"] == 2 and stored["standard_error_nats"] == pytest.approx(0.5**0.5)
    assert "+0.40000 ± 0.14142" in result.summary()


@pytest.mark.parametrize(
    "other, what",
    [
        ({"index": (0, 2)}, "the rows"),
        ({"tokens": (2, 4)}, "the eligible tokens of each row"),
        ({"passes": 3}, "the number of passes"),
        ({"nats": [[1.0, 1.0]]}, "the number of replicates"),
        ({"targets": (3, 2)}, "the masked tokens by level"),
    ],
)
def test_results_that_cannot_be_paired(other, what):
    nats = [[5.0, 9.0], [7.0, 9.0]]
    with pytest.raises(ValueError, match=f"cannot be paired, {what} differ"):
        paired.paired_difference(made_up(nats), made_up(**{"nats": nats} | other))


def test_a_result_without_noise_can_be_paired_with_another_estimator():
    exact = made_up([[4.0, 9.0], [4.0, 9.0]], passes=1, targets=(0, 5))
    result = paired.paired_difference(exact, made_up([[5.0, 9.0], [7.0, 9.0]]))
    assert result.nats == -2.0 and result.standard_error_nats == pytest.approx(1.0)
    assert result.to_dict()["passes"] == [1, 2]
    with pytest.raises(ValueError, match="the eligible tokens of each row differ"):
        paired.paired_difference(exact, made_up([[5.0, 9.0], [7.0, 9.0]], tokens=(2, 4)))


def test_results_of_other_keys_are_refused(toy_likelihood):
    batches = many_rows()
    results = [toy_likelihood(toys.toy_params(), jax.random.key(k), batches) for k in (0, 1)]
    with pytest.raises(ValueError, match="masked tokens by level"):
        paired.paired_difference(*results)


def test_iterators_are_refused(toy_likelihood):
    params = toys.toy_params()
    with pytest.raises(ValueError, match="give a list of batches"):
        paired.compare_parameters(toy_likelihood, params, params, KEY, iter(many_rows()))
