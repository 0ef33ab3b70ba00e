"""Right answers: extraction, pass@k and votes against enumeration, the bootstrap."""

import itertools

import numpy as np
import pytest

from mdm_jax import tasks
from mdm_jax.evaluation import accuracy
from mdm_jax.evaluation.paired import unlike
from mdm_jax.tasks import stored


@pytest.mark.parametrize(
    "text, marker, expected",
    [
        ("so 3+4=7\n#### 1,234.\nmore", "####", "1234"),
        ("a #### 1 b #### $5", "####", "5"),
        ("no marker 12", "####", None),
        ("it is 7, or 1,250.5.", None, "1250.5"),
        ("minus -3 apples", None, "-3"),
        ("none", None, None),
    ],
)
def test_answers_are_found_with_and_without_a_marker(text, marker, expected):
    assert accuracy.extract_answer(text, marker) == expected


def test_exact_match_takes_targets_of_both_forms():
    assert accuracy.exact_match("I say #### 1,000", "because #### 1000", "####")
    assert (
        accuracy.exact_match("it is 18", "#### 18") and accuracy.exact_match("A ", " A.") is False
    )
    assert not accuracy.exact_match("it is 18", "18", "####")  # no marker, no answer
    doc = {"answer": "2+2 = 4\n#### 4"}
    assert accuracy.judge(doc, ["so 4"]) == {"with_marker": 0.0, "last_number": 1.0}
    assert accuracy.judge(doc | {"marker": "=>"}, ["3 => 4, not 5"])["last_number"] == 0.0


def test_pass_at_k_is_the_mean_over_subsets_of_answers():
    for right, k in itertools.product(range(5), (1, 2, 3, 4)):
        answers = [True] * right + [False] * (4 - right)
        subsets = [any(each) for each in itertools.combinations(answers, k)]
        assert accuracy.pass_at_k([right], 4, k)[0] == pytest.approx(np.mean(subsets))
    with pytest.raises(ValueError, match="k=5"):
        accuracy.pass_at_k([1], 4, 5)


def test_the_most_frequent_answer_is_elected_and_tied_ones_share():
    answers = [["x", "y", "y"], ["x", "y", "z"], ["x", "x", "x"]]
    credit = [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    np.testing.assert_allclose(accuracy.majority_vote(answers, credit), [0, 1 / 3, 1])


def test_bootstrap_over_problems_is_near_the_normal_interval():
    """400 problems: half-width 1.96 sqrt(p q / n), to a twentieth at 2000 resamples."""
    values = np.arange(400) % 4 == 0
    value, low, high = accuracy.bootstrap(values)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert value == 0.25 and (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert accuracy.bootstrap(values) == (value, low, high)
    with pytest.raises(ValueError, match="finite values"):
        accuracy.bootstrap([])


def test_tasks_of_ours_are_checked_by_their_own_checker():
    (row,) = stored.rows(tasks.Countdown(numbers=2), 1)
    assert stored.check(row, [row["answer"]]) == {"exact_match": 1.0}
    left, rest = row["answer"].split("=")[0], row["answer"].split("=")[1]
    for sign in "+*":
        if sign in left:  # the other order is not the stored answer, and right
            turned = sign.join(reversed(left.split(sign)))
            assert stored.check(row, [f"{turned}={rest}"]) == {"exact_match": 1.0}
    assert stored.check(row, ["1+1=2"]) == {"exact_match": 0.0}
    with pytest.raises(ValueError, match="tasks that can be stored"):
        next(stored.rows(tasks.Noisy(tasks.Add(2), 1), 1))


def test_evaluations_on_other_data_are_named():
    one = {"split": "test", "rows": 8, "data_fingerprint": "a" * 64}
    assert unlike({"x": one, "y": dict(one), "old": {"rows": 8}}) == []
    (line,) = unlike({"x": one, "y": one | {"data_fingerprint": "b" * 64}})
    assert line.startswith("data fingerprint differs") and f"{'b' * 12}: y" in line
