"""Windows over long texts: every token once, with the promised context."""

import json
import math

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax.evaluation.windows import score_windows, sliding_windows
from mdm_jax.likelihood import subsets as designs
from mdm_jax.likelihood.bounds import make_subset_likelihood

PAD = 99


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_every_token_once_and_with_context(data):
    window = data.draw(st.integers(1, 7))
    stride = data.draw(st.integers(1, window))
    lengths = data.draw(st.lists(st.integers(0, 23), min_size=1, max_size=3))
    texts = [100 * number + np.arange(length) for number, length in enumerate(lengths)]
    masks = [
        np.array(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)), bool) for n in lengths
    ]
    if not any(mask.any() for mask in masks):
        return
    found = sliding_windows(texts, window, stride, pad_id=PAD, eligible=masks)
    rows = found.rows
    assert (found.window, found.stride) == (window, stride)
    scored = sorted(rows.tokens[rows.eligible].tolist())
    assert scored == sorted(np.concatenate([t[m] for t, m in zip(texts, masks)]).tolist())
    assert rows.eligible.any(1).all()
    np.testing.assert_array_equal(rows.units, rows.eligible.sum(1))
    for tokens, eligible, documents, number, start in zip(*rows[:3], found.text, found.start):
        size = documents.sum()
        np.testing.assert_array_equal(tokens[:size], texts[number][start : start + size])
        assert (tokens[size:] == PAD).all() and (documents[:size] == 1).all()
        assert size == min(window, lengths[number]) and not eligible[size:].any()
        if start:  # all but the first window
            assert np.flatnonzero(eligible)[0] >= window - stride


def test_windows_of_a_text():
    found = sliding_windows([np.arange(9), np.arange(3)], 4, 2, pad_id=PAD)
    expected = [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [5, 6, 7, 8], [0, 1, 2, PAD]]
    np.testing.assert_array_equal(found.rows.tokens, expected)
    new = [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 0]]
    np.testing.assert_array_equal(found.rows.eligible, new)
    assert found.text.tolist() == [0, 0, 0, 0, 1] and found.start.tolist() == [0, 2, 4, 5, 0]


def test_windows_without_overlap_cut_the_text():
    found = sliding_windows([np.arange(8)], 4, 4, pad_id=PAD)
    np.testing.assert_array_equal(found.rows.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert found.rows.eligible.all()


def test_units_are_characters_of_the_scored_tokens():
    found = sliding_windows([np.arange(6)], 4, 2, pad_id=0, character_counts=[1, 2, 4, 8, 16, 32])
    assert found.rows.units.tolist() == [1 + 2 + 4 + 8, 16 + 32]


TEXTS = [np.random.default_rng(0).integers(0, 3, n) for n in (10, 4, 7)]


def chain(text, stride):
    """-log p of a text whose windows of four see no further back, by summation."""
    total, start, scored = 0.0, 0, 0
    while scored < len(text):
        end = min(scored + (stride if scored else 4), len(text))
        start = end - 4
        free = np.arange(start, end) >= scored
        total += joint_law.conditional_nats([text[start:end]], [free])[0]
        scored = end
    return total


@pytest.mark.parametrize("stride", [1, 3])
def test_the_sum_is_the_chain_rule(stride):
    evaluate = make_subset_likelihood(
        joint_law.apply_joint, joint_law.MASK_ID, designs.every_subset(), replicates=2
    )
    windows = sliding_windows(TEXTS, 4, stride, pad_id=0)
    result = score_windows(evaluate, jnp.asarray(joint_law.LAW), jax.random.key(0), windows, 4)
    nats = np.array([chain(text, stride) for text in TEXTS])
    np.testing.assert_allclose(result.text_nats, nats, rtol=3e-6)
    assert result.text_tokens.tolist() == [10, 4, 7] and result.likelihood.tokens == 21
    residual = nats - nats.sum() / 21 * result.text_tokens
    error = math.sqrt(1.5 * np.sum(residual**2)) / 21
    assert result.data_standard_error_nats_per_token == pytest.approx(error, rel=1e-4)
    stored = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert stored["window"] == 4 and stored["stride"] == stride and stored["texts"] == 3
    assert stored["data_standard_error_bits_per_unit"] == pytest.approx(
        error / math.log(2), rel=1e-4
    )
    assert f"windows of 4 tokens, stride {stride}" in result.summary()
    assert f"at least {4 - stride} tokens of left context" in result.summary()


def test_texts_that_score_nothing_are_not_counted():
    windows = sliding_windows(
        [np.arange(3), np.arange(3)], 4, 2, pad_id=0, eligible=[np.zeros(3), np.ones(3)]
    )
    assert windows.text.tolist() == [1]
    evaluate = make_subset_likelihood(joint_law.apply_joint, 3, designs.one_path(), replicates=1)
    result = score_windows(evaluate, jnp.asarray(joint_law.LAW), jax.random.key(0), windows, 1)
    assert result.texts == 1 and math.isnan(result.data_standard_error_nats_per_token)
    assert result.to_dict()["data_standard_error_nats_per_token"] is None


@pytest.mark.parametrize("stride", [0, 5, -1])
def test_strides_that_leave_tokens_out(stride):
    with pytest.raises(
        ValueError, match=rf"must lie in \[1, window\].*stride {stride} and window 4"
    ):
        sliding_windows([np.arange(9)], 4, stride, pad_id=0)


def test_other_errors():
    with pytest.raises(ValueError, match="none of 1 texts has an eligible token"):
        sliding_windows([[]], 4, 2, pad_id=0)
    with pytest.raises(ValueError, match="masks of the same lengths"):
        sliding_windows([np.arange(3)], 4, 2, pad_id=0, eligible=[np.ones(2)])
    with pytest.raises(ValueError, match="token ids"):
        sliding_windows([np.zeros((2, 3))], 4, 2, pad_id=0)
