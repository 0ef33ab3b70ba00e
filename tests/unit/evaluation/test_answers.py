"""Answers, likelihood ratios, multiple choice, and two checkpoints on common noise."""

import json
import math

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest
import toy_oracle as oracle

from mdm_jax import likelihood
from mdm_jax.evaluation import answers, paired
from mdm_jax.likelihood import subsets as designs
from mdm_jax.likelihood.bounds import make_subset_likelihood
from mdm_jax.testing import toys
from mdm_jax.types import Batch

KEY = jax.random.key(0)
LAW = jnp.asarray(joint_law.LAW)
LAYOUT = {"prompt_length": 2, "answer_length": 2, "pad_id": 0}


def joint_likelihood(design, **settings):
    return make_subset_likelihood(joint_law.apply_joint, 3, design, **settings)


@pytest.fixture(scope="module")
def exact():
    """Every subset of every answer: the chain rule of the joint law."""
    return joint_likelihood(designs.every_subset(), replicates=2)


@pytest.fixture(scope="module")
def noisy():
    """One harmonic subset a replicate."""
    return joint_likelihood(designs.harmonic_counts(1), replicates=20)


def apply_toy(params, inputs, logsnr, documents):
    return toys.Toy().apply(params, inputs, logsnr, documents)


@pytest.fixture(scope="module")
def toy_likelihood():
    return likelihood.make_likelihood(apply_toy, 3, passes=2, replicates=20)


def test_layout_of_answers():
    rows = answers.answer_rows(
        [[5], [6, 7], []], [[1, 2], [3], []], units=[4, 9, 0], **LAYOUT | {"pad_id": 8}
    )
    np.testing.assert_array_equal(rows.tokens, [[8, 5, 1, 2], [6, 7, 3, 8], [8, 8, 8, 8]])
    np.testing.assert_array_equal(rows.eligible, [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(rows.documents, [[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    assert rows.units.tolist() == [4, 9, 0] and rows.tokens.dtype == np.int32
    plain = answers.answer_rows([[5], [6]], [[1, 2], [3]], **LAYOUT)
    assert plain.units.tolist() == [2, 1]


def test_answers_are_scored_given_their_prompts(exact):
    """Batches of 2 of 5 rows; one has no answer, and its place stays empty."""
    states = joint_law.STATES[[3, 30, 44, 61, 79]]
    eligible = np.array(
        [[0, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [1, 1, 1, 1]], bool
    )
    rows = joint_law.rows_of(states, eligible)
    scores = answers.score_answers(exact, LAW, KEY, rows, batch_size=2)
    expected = joint_law.conditional_nats(states, eligible)
    expected[2] = np.nan
    np.testing.assert_allclose(scores.nats, expected, rtol=3e-6)
    assert scores.tokens.tolist() == scores.units.tolist() == [2, 1, 0, 2, 4]
    np.testing.assert_array_equal(scores.standard_error, [0, 0, np.nan, 0, 0])


def test_error_of_an_answer_is_over_replicates():
    scores = answers.AnswerScores(np.array([[1.0, 4.0], [3.0, 4.0]]), np.ones(2), np.ones(2))
    np.testing.assert_allclose(scores.nats, [2, 4])
    np.testing.assert_allclose(scores.standard_error, [1, 0])


FIRST, SECOND = joint_law.STATES[[0, 17, 40]], joint_law.STATES[[1, 26, 41]]


def test_likelihood_ratios_are_exact_for_one_joint_law(exact):
    rows = [joint_law.rows_of(states) for states in (FIRST, SECOND)]
    ratios = answers.log_likelihood_ratios(exact, LAW, KEY, *rows, batch_size=3)
    whole = np.ones((3, 4), bool)
    first, second = (joint_law.conditional_nats(s, whole) for s in (FIRST, SECOND))
    np.testing.assert_allclose(ratios.per_row_nats, first - second, atol=2e-5)
    assert (ratios.per_row_standard_error == 0).all()


def test_random_ratios_share_their_subsets(noisy):
    """The identical row cancels exactly in every replicate, others within 5 standard errors."""
    rows = [joint_law.rows_of(states) for states in (FIRST, np.array([FIRST[0], *SECOND[1:]]))]
    ratios = answers.log_likelihood_ratios(noisy, LAW, KEY, *rows, batch_size=2)
    assert (ratios.replicate_row_nats[:, 0] == 0).all()
    whole = np.ones((3, 4), bool)
    truth = joint_law.conditional_nats(rows[0].tokens, whole) - joint_law.conditional_nats(
        rows[1].tokens, whole
    )
    error = ratios.per_row_standard_error
    assert (np.abs(ratios.per_row_nats - truth)[1:] < 5 * error[1:]).all() and error[0] == 0


@pytest.mark.parametrize(
    "rows, harmonic, rotated",
    [
        (((0, 0, 1, 0), (0, 0, 2, 0)), (0.233, 3.536), (0.165, 0.477)),
        (((0, 0, 1, 0), (1, 1, 1, 2)), (0.747, 4.148), (0.905, 0.794)),
    ],
)
def test_variances_of_coupled_ratios(rows, harmonic, rotated):
    """The table of ``log_likelihood_ratios``, four passes, from the enumerated losses."""
    first, second = oracle.loss_table(rows)
    k = np.arange(1, 5)

    def moment(losses, power):
        return np.array([np.mean(losses[size == oracle.SIZE] ** power) for size in k])

    def harmonic_variance(losses):
        mean = np.sum(moment(losses, 1) / k)
        return (np.sum(1 / k) * np.sum(moment(losses, 2) / k) - mean**2) / 4

    def rotated_variance(losses):
        ranks = np.array([p for p in np.ndindex(4, 4, 4, 4) if len(set(p)) == 4])
        views = (ranks[:, None] - np.arange(4)[:, None]) % 4
        counts = 1 + (np.arange(4)[:, None] + np.arange(4)) % 4
        number = (views[None] < counts[:, None, :, None]).astype(int) @ (1 << np.arange(4))
        return (losses[number] / counts[:, None]).sum(-1).var()

    for variance, expected in ((harmonic_variance, harmonic), (rotated_variance, rotated)):
        shared, apart = variance(first - second), variance(first) + variance(second)
        np.testing.assert_allclose([shared, apart], expected, atol=5e-4)


def test_ratios_need_common_positions(exact):
    rows = joint_law.rows_of(FIRST)
    shorter = rows._replace(eligible=np.tile([True, True, False, True], (3, 1)))
    with pytest.raises(ValueError, match="same eligible positions"):
        answers.log_likelihood_ratios(exact, LAW, KEY, rows, shorter, batch_size=3)


PROMPTS = [[0, 1], [2, 2], [1, 0]]
CANDIDATES = [[[0, 0], [1, 2]], [[0], [2, 1], [1]], [[2], [0, 2]]]


def candidate_nats():
    """[3, 3] by summation over the joint law; an answer of one token leaves a padding 0 behind."""
    nats = np.full((3, 3), np.nan)
    for question, (prompt, options) in enumerate(zip(PROMPTS, CANDIDATES)):
        for place, answer in enumerate(options):
            state = np.array([[*prompt, *answer, 0][:4]])
            free = np.array([[False, False, True, len(answer) == 2]])
            nats[question, place] = joint_law.conditional_nats(state, free)[0]
    return nats


def score(evaluate, **settings):
    return answers.score_candidates(evaluate, LAW, KEY, PROMPTS, CANDIDATES, 2, **LAYOUT | settings)


def test_candidates_of_different_number_and_length(exact):
    scores = score(exact, characters=[[2, 3], [5, 4, 1], [1, 2]])
    np.testing.assert_allclose(scores.nats, candidate_nats(), rtol=3e-6)
    assert scores.tokens.tolist() == [[2, 2, 0], [1, 2, 1], [1, 2, 0]]
    assert scores.units.tolist() == [[2, 3, 0], [5, 4, 1], [1, 2, 0]]
    for rule, size in (
        (answers.total_nats, 1),
        (answers.nats_per_token, np.maximum(scores.tokens, 1)),
        (answers.nats_per_character, np.maximum(scores.units, 1)),
    ):
        figures = np.where(scores.tokens > 0, candidate_nats() / size, np.inf)
        best = figures.argmin(1)
        result = answers.choose(scores, best, rule)
        assert result.chosen.tolist() == best.tolist() and result.accuracy == 1.0
        assert result.rule == rule.__name__ and result.tied_questions == 0
        gaps = np.sort(figures, axis=1)
        np.testing.assert_allclose(result.margin, gaps[:, 1] - gaps[:, 0], rtol=1e-4)
        wrong = answers.choose(scores, (best + 1) % [2, 3, 2], rule)
        assert wrong.accuracy == 0.0


def test_candidates_of_one_length_see_the_same_masks(noisy):
    """Equal candidates tie in every replicate, wherever they stand in the list."""
    twins = [[[0, 2], [0, 2], [1, 1]]] * 3
    scores = answers.score_candidates(noisy, LAW, KEY, PROMPTS, twins, 2, **LAYOUT)
    figures = scores.replicate_nats
    np.testing.assert_array_equal(figures[..., 0], figures[..., 1])
    assert np.ptp(figures[:, 0, 0]) > 0.01


def test_ties_credit_and_errors():
    nats = np.array([[1.0, 1.0, 5.0], [2.0, 1.0, np.nan], [4.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    offset = np.array([[0.0, 0.0, 0.5], [0.0, 0.6, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    noise = np.stack([offset, -offset])
    tokens = np.where(np.isnan(nats), 0, 1)
    scores = answers.AnswerScores(nats + noise, tokens, tokens)
    result = answers.choose(scores, [1, 1, 0, 0])
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
    assert stored["questions"] == 4 and stored["rule"] == "total_nats"
    assert "accuracy 0.6250" in result.summary()


def test_errors_of_multiple_choice(exact):
    def ask(prompts, candidates, **settings):
        return answers.score_candidates(
            exact, LAW, KEY, prompts, candidates, 2, **LAYOUT | settings
        )

    with pytest.raises(ValueError, match="2 prompts and 1 lists"):
        ask(PROMPTS[:2], CANDIDATES[:1])
    with pytest.raises(ValueError, match="question 0 needs at least two candidates"):
        ask(PROMPTS[:1], [[[1]]])
    with pytest.raises(ValueError, match=r"none of them empty, got lengths \[1, 0\]"):
        ask(PROMPTS[:1], [[[1], []]])
    with pytest.raises(ValueError, match="pair 0: too long, the prompt has 2 tokens"):
        ask(PROMPTS[:1], [[[1], [2]]], prompt_length=1)
    with pytest.raises(ValueError, match="as many answers and units"):
        answers.answer_rows([[1]], [[1]], units=[1, 2], **LAYOUT)
    one = answers.AnswerScores(np.ones((1, 1, 2)), np.ones((1, 2), int), np.zeros((1, 2), int))
    with pytest.raises(ValueError, match="correct must name one of the candidates"):
        answers.choose(one, [2])
    with pytest.raises(ValueError, match="no characters"):
        answers.choose(one, [0], answers.nats_per_character)
    assert answers.choose(one, [0]).unsure_questions == 0


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
