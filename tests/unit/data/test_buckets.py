"""Batches of rows of about one length: which rows, their losses, and the gradient's mean."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mdm_jax import data, training, variance
from mdm_jax.data.rows import Mixture, StoredRows, example_keys
from mdm_jax.draws import row_words
from mdm_jax.models import lora
from mdm_jax.training.step import step_draw
from mdm_jax.types import Batch, KeyedBatch

LENGTH, SHORT, ROWS = 12, 6, 4
SIZES = (3, 5, 6, 2, 12, 4, 9, 1, 6, 5, 11, 3, 7, 6, 4, 2)
"""Visible tokens of row i, 12 of which fit the short length."""


def source(sizes=SIZES, left=0, first=0):
    """Rows [padding][prompt][answer][padding], ``left`` columns before those that fit."""
    rng = np.random.default_rng(first)
    documents, eligible = np.zeros((2, len(sizes), LENGTH), np.int32)
    for row, size in enumerate(sizes):
        start = min(left, LENGTH - size)
        documents[row, start : start + size] = 1
        eligible[row, start + size // 3 : start + size] = 1
    tokens = rng.integers(0, tiny.MASK_ID, documents.shape, dtype=np.int32)
    return StoredRows(Batch(tokens, eligible > 0, documents, first + np.arange(len(sizes))))


def batches(rows, lengths=(SHORT,), count=8, size=ROWS, **settings):
    buckets = data.bucketed(rows, lengths, size) if lengths else None
    stream = data.train_iterator(rows, size, 3, by_example=True, buckets=buckets, **settings)
    with contextlib.closing(stream):
        return [next(stream) for _ in range(count)]


def test_every_row_comes_once_an_epoch_in_a_batch_of_its_length():
    for left in (0, 4):
        found = batches(source(left=left))
        for epoch in (found[:4], found[4:]):
            assert sorted(np.concatenate([b.units for b in epoch])) == list(range(16))
            assert [b.tokens.shape[1] for b in epoch].count(SHORT) == 3
        for batch in found:
            assert {SIZES[i] <= SHORT for i in batch.units} == {batch.tokens.shape[1] == SHORT}
            assert (batch.documents > 0).sum(1).tolist() == [SIZES[i] for i in batch.units]
    keys = np.concatenate([b.example_keys[b.documents > 0] for b in found])
    assert len(np.unique(keys, axis=0)) == len(keys) == 2 * sum(SIZES)


def test_a_mixture_keeps_its_shares_and_the_stream_resumes_and_is_read_in_parts():
    mixture = Mixture((source(), source((3, 12, 4, 5, 8, 6), first=100)), (1.0, 3.0))
    found = batches(mixture, count=64)
    rows = np.concatenate([b.units for b in found])
    # A batch of a length is mixed to within a row, and there are two lengths.
    assert abs(np.mean(rows >= 100) - 0.75) < 0.03
    counts = [np.bincount(rows[rows < 100]), np.bincount(rows[rows >= 100] - 100)]
    for count, share in zip(counts, (64 / 16, 192 / 6)):
        assert np.all(np.abs(count - share) <= 2 + 0.03 * share), count
    buckets, local = data.bucketed(mixture, (SHORT,), ROWS), np.array([3, 1])
    first = data.train_iterator(mixture, ROWS, 3, by_example=True, buckets=buckets)
    with contextlib.closing(first):
        [next(first) for _ in range(5)]
        state = first.get_state()
    settings = {"by_example": True, "buckets": buckets, "rows": local, "prefetch": 1}
    second = data.train_iterator(mixture, ROWS, 3, **settings)
    with contextlib.closing(second):
        second.set_state(state)
        for expected in found[5:9]:
            jax.tree.map(
                np.testing.assert_array_equal,
                next(second),
                jax.tree.map(lambda field: field[local], expected),
            )


def test_lengths_without_a_batch_of_rows_of_their_own_and_bad_ones():
    def counts(lengths, size=ROWS, align=1, left=0):
        found = data.bucketed(source(left=left), lengths, size, align)
        return dict(zip(found.lengths, (len(rows[0]) for rows in found.rows)))

    assert counts((6,)) == {6: 12, 12: 4}
    assert counts((6, 10)) == {6: 12, 12: 4}  # of 9 and 7 tokens, beside those of 12 and 11
    assert counts((6, 10), size=2) == {6: 12, 10: 2, 12: 2}
    assert counts((6, 10), size=5) == {6: 11, 12: 5}  # takes both of 10, and one more
    assert counts((2, 6, 10), size=7) == {6: 9, 12: 7}
    assert counts((1, 6)) == {6: 12, 12: 4}  # a single row of one token
    # From column 4 on, where they begin at 5: five tokens fit.
    assert counts((6,), align=2, left=5) == {6: 9, 12: 7}
    assert (
        data.bucketed(source(), (6,), ROWS)
        .describe()
        .startswith(
            "batches of one length each: 6 (12 rows, 75% of those drawn), 12 (4 rows, 25% of those "
        )
    )
    for lengths in ((6, 6), (8, 6), (0, 6), (13,)):
        with pytest.raises(ValueError, match="ascending lengths of at most 12 tokens"):
            data.bucketed(source(), lengths, ROWS)
    with pytest.raises(ValueError, match="multiples of 4"):
        data.bucketed(source(), (6,), ROWS, align=4)
    with pytest.raises(ValueError, match="nothing to gain.*eos_scored"):
        data.bucketed(source((12,) * 8), (6,), ROWS)


def keyed(rows, length):
    """All rows at their first visit, cut to a length."""
    indices = np.arange(len(rows))
    keys = example_keys(rows, indices, 0 * indices, 0, LENGTH)
    batch = KeyedBatch(*data.gather(rows, indices), keys)
    return data.Buckets((length,), (), (), 0.0, (0.0, 0.0)).cut(batch, 0)


def test_the_loss_of_a_row_is_the_same_in_two_lengths():
    """Bit by bit where sums have two terms at most; else up to the order of sums, and, where
    columns before a prompt are cut, to rotary angles."""
    model, chain = tiny.transformer(), variance.chain(variance.mirror())
    params = tiny.parameters(model, LENGTH), tiny.params()["embedding"][:, : tiny.VOCAB]

    @tiny.jit
    def losses(params, batch):
        spec = tiny.objective().spec(len(batch.tokens), batch.tokens.shape[1])
        draw = step_draw(3, jnp.int32(0), chain, chain.init(spec), spec, batch.example_keys)
        attends = functools.partial(model.apply, params[0])
        stats = [
            tiny.objective().loss(model_fn, batch, draw)
            for model_fn in (attends, lambda inputs, *_: params[1][inputs])
        ]
        return *stats, draw.u

    for left in (0, 4):
        rows = source((6, 4, 3, 2), left=left)
        short, whole = (losses(params, keyed(rows, length)) for length in (SHORT, LENGTH))
        np.testing.assert_array_equal(short[-1], whole[-1])
        assert np.min(np.asarray(short[0].raw)) > 0.3
        for one, other in zip(short[1], whole[1]):
            np.testing.assert_array_equal(one[:, 2:], other[:, 2:])
        for one, other in zip(short[:2], whole[:2]):
            for name in ("weight", "eligible", "targets"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            np.testing.assert_allclose(one.raw, other.raw, rtol=1e-6)


def test_gradients_have_the_mean_of_the_mixture_s():
    """An epoch of batches of one length, at fixed parameters and noise, against all rows at once.

    Divided by their own tokens, batches of short rows would count for too much.
    """
    rows, chain = source(), variance.chain()
    buckets = data.bucketed(rows, (SHORT,), ROWS)

    def change(batch, **settings):
        spec = tiny.objective().spec(len(batch.tokens), batch.tokens.shape[1])
        step = training.make_train_step(
            tiny.apply_fn, tiny.objective(), chain, optax.sgd(1.0), spec, seed=3, **settings
        )
        state = training.new_state(tiny.params(), optax.sgd(1.0), chain, spec)
        return step(state, batch)[0].params["kernel"] - tiny.params()["kernel"]

    found = batches(rows, count=4)
    expected = ROWS * buckets.mean_eligible
    own = tiny.jit(change)
    steady = tiny.jit(functools.partial(change, tokens_per_batch=expected))
    wanted = own(keyed(rows, LENGTH))
    means = [np.mean([each(batch) for batch in found], axis=0) for each in (steady, own)]
    scale = np.max(np.abs(wanted))
    np.testing.assert_allclose(means[0], wanted, rtol=0, atol=1e-5 * scale)
    assert np.max(np.abs(means[1] - wanted)) > 0.03 * scale


def test_dropout_of_adapters_goes_with_the_example():
    """Whatever slot, batch and length it has."""
    spec = lora.Lora(rank=2, alpha=3.0, dropout=0.5, targets=("down",))
    model, rows = tiny.transformer(), source((6, 4, 5, 3))
    params = tiny.parameters(model, LENGTH)
    zeros = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, spec))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), zeros)
    adapters = tiny.perturbed(zeros, seed=1)

    def logits(batch):
        joined = lora.join(params, adapters, spec, jax.random.key(7), row_words(batch.example_keys))
        views = np.repeat(batch.tokens, 2, axis=0)  # MIRROR's two
        return jax.jit(model.apply)(joined, views, None, np.repeat(batch.documents, 2, axis=0))

    whole = np.asarray(logits(keyed(rows, LENGTH))).reshape(4, 2, LENGTH, -1)
    order = np.array([2, 0])
    part = jax.tree.map(lambda field: field[order], keyed(rows, SHORT))
    found = np.asarray(logits(part)).reshape(2, 2, SHORT, -1)
    for row, number in enumerate(order):
        size = (6, 4, 5, 3)[number]
        np.testing.assert_allclose(found[row, :, :size], whole[number, :, :size], atol=1e-5)
    assert np.all(np.max(np.abs(whole[:, 0] - whole[:, 1]), axis=(1, 2)) > 1e-3)
