"""Unigram and bigram entropies against closed forms."""

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data.rows import TokenSpans


def test_alternating_stream_has_one_bit_and_no_surprise():
    found = data.ngram_entropies(np.arange(1000) % 2, 2)
    assert found.unigram == pytest.approx(1.0)
    assert found.bigram == pytest.approx(0.0, abs=1e-9)
    assert (found.tokens, found.pairs, found.units) == (1000, 999, 1000)


def test_all_pairs_equally_often_gives_the_full_entropy_twice():
    rows = np.stack(np.meshgrid(np.arange(8), np.arange(8)), -1).reshape(-1, 2)
    found = data.ngram_entropies(rows, 8)
    assert found.unigram == pytest.approx(3.0)
    assert found.bigram == pytest.approx(3.0)


def test_chain_with_known_transitions():
    # pairs 00, 01, 10 with counts 2, 1, 1: H(pair) = 1.5, H(first) = h(3/4)
    rows = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    first = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    found = data.ngram_entropies(rows, 2)
    assert found.bigram == pytest.approx(1.5 - first)
    assert found.unigram == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))


def test_pairs_do_not_cross_rows_or_ineligible_positions():
    rows = np.array([[0, 1, 2], [3, 4, 5]])
    eligible = np.array([[True, True, False], [True, False, True]])
    found = data.ngram_entropies(rows, 6, eligible=eligible)
    assert (found.tokens, found.pairs) == (4, 1)
    assert found.unigram == pytest.approx(2.0)
    assert data.ngram_entropies(rows, 6).pairs == 4


def test_entropies_of_a_markov_chain_converge():
    # Flip with probability 0.1: H = 1 bit, conditional h(0.1). N = 2e5, so the standard error of
    # the plug-in estimate is about sqrt(0.9 * 0.1) * log2(9) / sqrt(N) = 0.0021.
    flips = np.random.default_rng(0).random(200_000) < 0.1
    found = data.ngram_entropies(np.cumsum(flips) % 2, 2)
    h = -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9))
    assert found.bigram == pytest.approx(h, abs=4 * 0.0021)
    assert found.unigram == pytest.approx(1.0, abs=0.01)


def test_split_entropies_leave_padding_out_and_convert_to_units():
    tokens = np.arange(20, dtype=np.int32) % 2
    counts = np.array([1, 0, 0, 0, 0])  # only token 0 stands for a character
    source = TokenSpans(tokens, range(0, 20, 4), 4, pad_id=2, character_counts=counts)
    found = data.split_entropies(source, 5)
    assert (found.tokens, found.pairs, found.units) == (20, 15, 10)
    assert found.unigram == pytest.approx(1.0)
    assert found.unigram_per_unit == pytest.approx(2.0)
    assert found.bigram_per_unit == pytest.approx(2 * found.bigram)
    fewer = data.split_entropies(source, 5, max_rows=2)
    assert (fewer.tokens, fewer.pairs, fewer.kinds) == (8, 6, 2)
    assert fewer.bigram_per_unit is None  # of fewer than five pairs of a kind


def test_rows_of_one_scored_token_have_no_bigram_entropy():
    """As answers of one token after a prompt."""
    for rows, eligible in (([[0], [1]], None), ([[0, 2, 1], [1, 2, 0]], [[1, 0, 0], [1, 0, 1]])):
        found = data.ngram_entropies(rows, 3, eligible=eligible)
        assert found.bigram is None and found.bigram_per_unit is None and found.pairs == 0
    assert found.unigram == pytest.approx(-(np.log2(1 / 3) + 2 * np.log2(2 / 3)) / 3)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        data.ngram_entropies([0, 3], 3)
    with pytest.raises(ValueError, match="at least one eligible token"):
        data.ngram_entropies([[0, 1]], 3, eligible=[[False, False]])
    with pytest.raises(ValueError, match="eligible alike"):
        data.ngram_entropies([[0, 1]], 3, eligible=[True])
    with pytest.raises(ValueError, match="eligible alike"):
        data.ngram_entropies(np.zeros((2, 2, 2), int), 3)


def test_rare_tokens_are_the_least_frequent_up_to_a_share():
    """Counts 0, 1, 2, 5, 12 of 20: up to a fifth of the tokens that is 0, 1 and 2."""
    stream = np.repeat([1, 2, 3, 4], [1, 2, 5, 12]).astype(np.int32)
    source = TokenSpans(stream, range(0, 20, 10), 10, pad_id=0, character_counts=np.ones(5, int))
    np.testing.assert_array_equal(data.rare_tokens(source, 5, 0.2), [1, 1, 1, 0, 0])
    np.testing.assert_array_equal(data.rare_tokens(source, 5, 0.4), [1, 1, 1, 1, 0])
    with pytest.raises(ValueError, match="0 < share < 1"):
        data.rare_tokens(source, 5, 1.0)
