"""Figures of generated text against hand-counted cases."""

import collections
import json
import math

import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.evaluation import ngrams
from mdm_jax.evaluation.ngrams import as_texts, jensen_shannon, ngram_divergence
from mdm_jax.evaluation.quality import (
    generative_perplexity,
    likelihood_score,
    measure_text_quality,
    texts_of_rows,
    word_share,
    words_of,
)
from mdm_jax.likelihood import subsets as designs
from mdm_jax.likelihood.bounds import make_subset_likelihood
from mdm_jax.plots import quality_by_steps, quality_curve

SAME = np.tile([0, 1, 2, 3, 4], (4, 1))
DISJOINT = np.arange(20).reshape(4, 5)


def random_texts(seed=0, rows=7, length=9, kinds=3):
    rng = np.random.default_rng(seed)
    valid = np.arange(length) < rng.integers(1, length + 1, rows)[:, None]
    return rng.integers(0, kinds, (rows, length)), valid


def grams(row, order):
    return [tuple(row[i : i + order]) for i in range(len(row) - order + 1)]


@pytest.mark.parametrize("order", [1, 2, 3, 9, 10])
def test_ngrams_against_tuples(order):
    """Two sets of different widths share their numbers; none crosses a gap."""
    tokens, valid = random_texts()
    other, other_valid = random_texts(1, rows=4, length=6)
    other_valid[0] = [True, True, False, True, True, True]
    found = ngrams.ngrams([as_texts(tokens, valid), as_texts(other, other_valid)], order)
    names = {}
    for part, rows, masks in zip(found, (tokens, other), (valid, other_valid)):
        expected = []
        for number, (row, mask) in enumerate(zip(rows, masks)):
            pieces = np.split(np.arange(len(row)), np.flatnonzero(~mask))
            runs = [[int(row[i]) for i in piece if mask[i]] for piece in pieces]
            expected += [(number, gram) for run in runs for gram in grams(run, order)]
        assert sorted(part.row) == sorted(number for number, _ in expected)
        mine = collections.Counter(zip(part.row, part.number))
        theirs = collections.Counter(expected)
        assert sorted(mine.values()) == sorted(theirs.values())
        for row, number in mine:
            options = {gram for r, gram in theirs if r == row}
            names.setdefault(number, options)
            names[number] = names[number] & options
            assert names[number]


def test_token_entropy():
    tokens = np.array([[0, 0, 1, 1], [2, 2, 2, 9]])
    valid = np.array([[True] * 4, [True, True, True, False]])
    result = ngrams.token_entropy(tokens, valid)
    assert result.per_text.value == pytest.approx(math.log(2) / 2)  # log 2 and 0
    assert result.per_text.standard_error == pytest.approx(math.log(2) / 2)
    shares = np.array([2, 2, 3]) / 7
    assert result.corpus == pytest.approx(-np.sum(shares * np.log(shares)))
    constant = ngrams.token_entropy(np.zeros((3, 5), int))
    assert constant.per_text.value == 0.0 and constant.corpus == 0.0
    uniform = ngrams.token_entropy(DISJOINT)
    assert uniform.per_text.value == pytest.approx(math.log(5))
    assert uniform.corpus == pytest.approx(math.log(20))


def test_distinct_ngrams():
    tokens = [[1, 2, 1, 2], [1, 2, 3, 0]]
    valid = [[True] * 4, [True, True, True, False]]
    # Bigrams 12 21 12, 12 23; trigrams 121 212, 123.
    assert ngrams.distinct_ngrams(tokens, 1, valid) == 3 / 7
    assert ngrams.distinct_ngrams(tokens, 2, valid) == 3 / 5
    assert ngrams.distinct_ngrams(tokens, 3, valid) == 1.0
    assert ngrams.distinct_ngrams(SAME, 5) == 1 / 4
    assert ngrams.distinct_ngrams(DISJOINT, 2) == 1.0
    assert math.isnan(ngrams.distinct_ngrams(SAME, 6))


def test_self_bleu_of_identical_and_disjoint_texts():
    assert ngrams.self_bleu(SAME) == (pytest.approx(1.0), 4, 4)
    assert ngrams.self_bleu(SAME[:, :2]).value == pytest.approx(1.0)  # too short for 3 and 4
    # 0.1 of 5, 4, 3 and 2 n-grams match.
    expected = np.prod(0.1 / np.array([5, 4, 3, 2])) ** 0.25
    assert ngrams.self_bleu(DISJOINT).value == pytest.approx(expected)


def test_self_bleu_by_hand():
    """[1 1 1 2] with [1 1 3] and [1 4 5 6 7 8]: unigrams (2 + 0)/4, bigrams 1/3."""
    tokens = [[1, 1, 1, 2, 0, 0], [1, 1, 3, 0, 0, 0], [1, 4, 5, 6, 7, 8]]
    valid = np.arange(6) < np.array([4, 3, 6])[:, None]
    first = math.sqrt(2 / 4 * 1 / 3)  # closest length 3, shorter: no penalty
    second = math.sqrt(2 / 3 * 1 / 2) * math.exp(1 - 4 / 3)
    third = math.sqrt(1 / 6 * 0.1 / 5)
    result = ngrams.self_bleu(tokens, valid, order=2)
    assert result.value == pytest.approx((first + second + third) / 3)
    pair = ngrams.self_bleu(tokens, valid, order=2, max_texts=2)
    assert pair == (pytest.approx((first + second) / 2), 2, 2)


def slow_self_bleu(tokens, valid, order):
    """The definition, all pairs."""
    texts = [[int(t) for t in row[mask]] for row, mask in zip(tokens, valid)]
    values = []
    for i, text in enumerate(texts):
        others = texts[:i] + texts[i + 1 :]
        logs = []
        for n in range(1, min(order, len(text)) + 1):
            counts = collections.Counter(grams(text, n))
            best = collections.Counter()
            for other in others:
                best |= collections.Counter(grams(other, n))
            matches = sum((counts & best).values())
            logs.append(math.log((matches or 0.1) / sum(counts.values())))
        closest = min((abs(len(o) - len(text)), len(o)) for o in others)[1]
        values.append(math.exp(np.mean(logs) + min(0, 1 - closest / len(text))))
    return np.mean(values)


@pytest.mark.parametrize("seed", range(4))
def test_self_bleu_against_its_definition(seed):
    tokens, valid = random_texts(seed, rows=8)
    result = ngrams.self_bleu(tokens, valid, order=3)
    assert result.value == pytest.approx(slow_self_bleu(tokens, valid, 3))


def test_texts_without_tokens_are_left_out():
    tokens, valid = random_texts()
    more = np.vstack([tokens[:3], tokens[:1], tokens[3:]])
    fewer = np.vstack([valid[:3], np.zeros((1, 9), bool), valid[3:]])
    assert ngrams.self_bleu(more, fewer) == ngrams.self_bleu(tokens, valid)
    assert ngrams.token_entropy(more, fewer) == ngrams.token_entropy(tokens, valid)


def test_jensen_shannon_closed_forms():
    first, second = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    assert jensen_shannon(first, first) == 0.0
    assert jensen_shannon(first, second) == pytest.approx(0.5 * math.log(2))
    apart = jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    assert apart == pytest.approx(math.log(2))


def test_divergence_and_its_reference():
    """Even held-out rows are compared with, odd ones are the reference, cut to one number."""
    even, odd = [[0, 0, 1, 1], [1, 1, 0, 0]], [[0, 0, 0, 1], [0, 1, 0, 0]]
    held_out = [even[0], odd[0], even[1], odd[1], [7, 7, 7, 7]]
    found = ngram_divergence([[0, 1, 0, 1], [2, 2, 2, 2]], held_out, 1)
    half = np.array([0.5, 0.5, 0.0])
    value = jensen_shannon(np.array([0.25, 0.25, 0.5]), half)
    reference = jensen_shannon(np.array([0.75, 0.25, 0.0]), half)
    assert found == (pytest.approx(value), pytest.approx(reference), 1, 2, (8, 8, 8))
    # One generated text: the others are cut to their first.
    single = ngram_divergence([[1, 0, 1, 0, 1]], held_out, 2)
    assert single.texts == 1 and single.ngrams == (4, 3, 3)
    # 10 01 10 01 against 00 01 11; 00 00 01 against 00 01 11.
    laws = np.array([[0, 2, 0, 2], [1, 1, 1, 0], [2, 1, 0, 0]]) / np.array([[4], [3], [3]])
    assert single.value == pytest.approx(jensen_shannon(laws[0], laws[1]))
    assert single.reference == pytest.approx(jensen_shannon(laws[2], laws[1]))


def test_divergence_extremes():
    tokens = np.tile([[0, 1, 2, 3]], (4, 1))
    same = ngram_divergence(tokens[:2], tokens, 2)
    assert same.value == 0.0 and same.reference == 0.0
    apart = ngram_divergence(tokens[:2] + 9, tokens, 2)
    assert apart.value == pytest.approx(math.log(2))
    short = ngram_divergence(tokens[:2], tokens, 5)
    assert math.isnan(short.value) and short.ngrams == (0, 0, 0)


def uniform_score(tokens, documents):
    """log 8 nats for each valid token, and the batch size is what was asked for."""
    assert tokens.shape == documents.shape == (2, 5) and tokens.dtype == np.int32
    return documents.sum(1) * math.log(8)


def test_generative_perplexity():
    tokens = DISJOINT[:3]
    valid = np.arange(5) < np.array([5, 2, 4])[:, None]
    result = generative_perplexity(uniform_score, tokens, valid, batch_size=2)
    assert result.perplexity == pytest.approx(8) and result.tokens == 11
    assert result.standard_error == pytest.approx(0, abs=1e-12)
    assert result.token_entropy == ngrams.token_entropy(tokens, valid)
    nats = np.array([6.0, 1.0, 4.0, 9.0])  # the last is of a filling row
    found = generative_perplexity(lambda tokens, documents: nats, tokens, valid, batch_size=4)
    assert found.nats_per_token == 1.0
    residual = nats[:3] - np.array([5, 2, 4])
    error = math.sqrt(1.5 * np.sum(residual**2)) / 11
    assert found.standard_error == pytest.approx(math.e * error)


def test_a_likelihood_is_a_score():
    """The exact likelihood of a joint law; the second text has half a row, the third nothing."""
    evaluate = make_subset_likelihood(joint_law.apply_joint, 3, designs.every_subset())
    tokens = joint_law.STATES[[5, 50, 70]].astype(np.int32)
    valid = np.array([[True] * 4, [True, True, False, False], [False] * 4])
    score = likelihood_score(evaluate, jnp.asarray(joint_law.LAW), jax.random.key(0))
    result = generative_perplexity(score, tokens, valid, batch_size=2)
    padded = np.where(valid, tokens, 0)
    nats = joint_law.conditional_nats(padded[:2], valid[:2]).sum()
    assert result.tokens == 6 and result.nats_per_token == pytest.approx(nats / 6, rel=1e-5)


@pytest.mark.parametrize(
    "score, message",
    [
        (lambda tokens, documents: tokens, r"one number per row, \[64\], got \(64, 5\)"),
        (lambda tokens, documents: np.full(64, np.inf), "score of 4 texts is not finite"),
    ],
)
def test_scores_that_cannot_be_used(score, message):
    with pytest.raises(ValueError, match=message):
        generative_perplexity(score, SAME)


def test_all_figures_together():
    tokens, valid = random_texts(rows=6)
    held_out, _ = random_texts(3, rows=12)
    quality = measure_text_quality(
        tokens,
        valid,
        held_out=held_out,
        score=lambda tokens, documents: documents.sum(1) * 0.5,
        orders=(1, 2),
        bleu_order=2,
        max_bleu_texts=5,
    )
    assert quality.texts == 6 and quality.tokens == valid.sum()
    assert quality.entropy == ngrams.token_entropy(tokens, valid)
    assert quality.distinct == {n: ngrams.distinct_ngrams(tokens, n, valid) for n in (1, 2)}
    assert quality.self_bleu == ngrams.self_bleu(tokens, valid, order=2, max_texts=5)
    expected = ngram_divergence(tokens, held_out, 2, valid=valid)
    assert quality.divergence[2] == expected
    stored = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert stored["generative_perplexity"] == pytest.approx(math.exp(0.5))
    assert stored["self_bleu_2"] == quality.self_bleu.value and stored["self_bleu_texts"] == 5
    assert stored["divergence_2_reference"] == expected.reference
    assert stored["divergence_texts"] == 6
    lines = quality.summary().splitlines()
    at = next(i for i, line in enumerate(lines) if "generative perplexity 1.649" in line)
    assert "token entropy" in lines[at + 1]


def test_figures_of_a_single_text():
    quality = measure_text_quality([[1, 1, 2]], orders=(1, 4))
    assert quality.self_bleu is None and quality.perplexity is None and quality.divergence == {}
    stored = json.loads(json.dumps(quality.to_dict(), allow_nan=False))
    assert stored["distinct_4"] is None and stored["token_entropy_standard_error"] is None
    assert "token entropy" in quality.summary()


def test_errors():
    with pytest.raises(ValueError, match=r"got \(4, 5\) and \(3, 5\)"):
        ngrams.token_entropy(SAME, np.ones((3, 5)))
    with pytest.raises(ValueError, match="must be integers"):
        ngrams.token_entropy(SAME * 1.0)
    with pytest.raises(ValueError, match="none of the tokens of 4 texts"):
        measure_text_quality(SAME, np.zeros((4, 5), bool))
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        ngrams.distinct_ngrams(SAME - 1, 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ngrams.distinct_ngrams(SAME, 0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ngrams.self_bleu(SAME, order=0)
    with pytest.raises(ValueError, match="at least two texts with tokens, got 1"):
        ngrams.self_bleu(SAME[:1])
    with pytest.raises(ValueError, match="at least two held-out texts"):
        ngram_divergence(SAME, SAME[:1], 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        generative_perplexity(uniform_score, SAME, batch_size=0)


def record(sampler, steps, perplexity, entropy, error=None, passes=None):
    quality = {"generative_perplexity": perplexity, "token_entropy": entropy}
    if error is not None:
        quality["generative_perplexity_standard_error"] = error
    passes = steps if passes is None else passes
    return {"sampler": sampler, "num_steps": steps, "forward_passes": passes, "quality": quality}


RECORDS = [
    record("ancestral", 8, 30.0, 2.0, 1.5, 7.5),
    record("first hitting", 64, 10.0, 1.5),
    record("ancestral", 2, 90.0, 2.5, 4.0, 2.0),
    record("ancestral", 32, None, 1.8),
]


def curves(axes):
    return {c.get_label(): c.lines[0].get_xydata() for c in axes.containers}


def test_curves_are_drawn_by_sampler_in_order_of_steps():
    left, right = quality_by_steps(RECORDS, references={"token_entropy": 1.9}).axes
    found = curves(left)
    np.testing.assert_array_equal(found["ancestral"], [[2, 90], [8, 30]])
    np.testing.assert_array_equal(found["first hitting"], [[64, 10]])
    (bars,) = left.containers[0].lines[2]
    np.testing.assert_allclose(bars.get_segments(), [[[2, 86], [2, 94]], [[8, 28.5], [8, 31.5]]])
    np.testing.assert_array_equal(curves(right)["ancestral"], [[2, 2.5], [8, 2], [32, 1.8]])
    assert [line.get_ydata()[0] for line in right.lines if line.get_label() == "data"] == [1.9]
    assert not any(line.get_label() == "data" for line in left.lines)
    for axes, label in ((left, "generative perplexity"), (right, "token entropy (nats)")):
        assert axes.get_xscale() == "log" and axes.xaxis.get_transform().base == 2
        assert axes.xaxis.get_major_formatter()(16.0, 0) == "16"
        assert axes.get_xlabel() == "steps" and axes.get_ylabel() == label


def test_curves_against_forward_passes():
    left, _ = quality_by_steps(RECORDS, against="forward_passes").axes
    np.testing.assert_array_equal(curves(left)["ancestral"], [[2, 90], [7.5, 30]])
    assert left.get_xlabel() == "forward passes per text"
    with pytest.raises(ValueError, match="num_steps, forward_passes, got 'seconds'"):
        quality_curve(left, RECORDS, "token_entropy", against="seconds")
    with pytest.raises(ValueError, match="ancestral: num_steps must be positive, got 0"):
        quality_curve(left, [record("ancestral", 0, 1.0, 1.0)], "token_entropy")


def test_words_are_runs_of_letters_that_the_ends_do_not_cut():
    assert words_of("ted. The cat's _name_ is Émile2x; it sa") == [
        "the", "cat", "s", "name", "is", "émile", "x", "it"
    ]  # fmt: skip
    assert words_of("cut") == words_of("") == []


def test_share_of_known_words_counts_repeats():
    found = word_share([" the cat sat ", " the zog! "], {"the", "cat"})
    assert found == (3, 5, 4) and found.share == 0.6
    assert math.isnan(word_share(["12 34"], {"the"}).share)


def test_texts_of_rows_are_documents_and_at_most_so_many_tokens(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(8)))
    dataset = data.documents(path, 16, packing="first_fit", fractions=(1.0, 0.0, 0.0))
    texts = list(texts_of_rows(dataset.train, dataset.tokenizer))
    assert sorted(texts) == [f"text {i}" for i in range(8)]
    assert len(list(texts_of_rows(dataset.train, dataset.tokenizer, max_tokens=32))) == 4
    assert list(texts_of_rows(dataset.valid, dataset.tokenizer)) == []
