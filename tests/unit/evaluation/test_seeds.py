"""Paired seeds against enumeration and closed forms."""

import itertools
import math

import numpy as np
import pytest

from mdm_jax.evaluation.paired import holm, paired_seeds


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.95])
def test_the_bootstrap_is_that_of_all_ordered_resamples(coverage):
    values = np.array([0.3, -1.0, 2.5, 0.7])
    means = np.sort([np.mean(c) for c in itertools.product(values, repeat=4)])  # 256 equally likely
    tail = (1 - coverage) / 2
    ends = [means[math.ceil(p * 256 - 1e-9) - 1] for p in (tail, 1 - tail)]
    got = paired_seeds(values, np.zeros(4), coverage).bootstrap
    # 100,000 resamples: an end may fall on a neighbour of the exact mean, 0.02 away at most here.
    assert got == pytest.approx(ends, abs=0.03)


def test_pairing_removes_what_seeds_share():
    shared = np.array([0.1, 0.9, 0.4, 0.7, 0.2])
    paired = paired_seeds(shared + [0.02, 0.03, 0.02, 0.04, 0.03], shared)
    assert paired.mean == pytest.approx(0.028)
    assert paired.standard_error == pytest.approx(np.std([2, 3, 2, 4, 3], ddof=1) / 100 / 5**0.5)
    reach = 2.7764451051977987 * paired.standard_error  # Student's 0.975 quantile, 4 degrees
    assert paired.student == pytest.approx((0.028 - reach, 0.028 + reach))
    assert paired.bootstrap == pytest.approx((0.022, 0.034), abs=1e-9)
    assert paired.sign_flips == 2 / 32 and paired.significant


def test_no_difference_is_not_significant():
    paired = paired_seeds([1.0, 2.0], [1.0, 2.0])
    assert paired.mean == 0 and paired.sign_flips == 1 and not paired.significant
    one = paired_seeds([1.0], [0.5])
    assert one.to_dict()["standard_error"] is None and not one.significant
    assert paired_seeds([1.0, -0.5, 0.1], [0.0] * 3).sign_flips == pytest.approx(6 / 8)


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (([], []), "per seed"),
        (([1.0, math.nan], [0.0, 0.0]), "finite"),
        (([1.0, 2.0], [1.0]), "per seed"),
        (([1.0], [1.0], 1.0), "coverage"),
    ],
)
def test_what_cannot_be_paired_is_refused(arguments, hint):
    with pytest.raises(ValueError, match=hint):
        paired_seeds(*arguments)


def test_p_values_are_corrected_for_the_comparisons_of_a_table():
    assert holm([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        holm([0.5, 1.5])
