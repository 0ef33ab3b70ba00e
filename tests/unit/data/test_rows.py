"""Mixtures of sources, the keys of their examples' noise, and rows cut at random."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mdm_jax import data, draws, sharding, training, variance
from mdm_jax.data.packing import first_fit
from mdm_jax.data.rows import Mixture, PackedSpans, RandomlyCut, StoredRows, example_keys
from mdm_jax.types import Batch, KeyedBatch

LENGTH, PAD, EOS = 8, 9, 8


def source(size, first=0):
    """Row i holds i + first in all of its three tokens."""
    tokens = np.repeat(np.arange(first, first + size, dtype=np.int32)[:, None], 3, axis=1)
    ones = np.ones(tokens.shape, np.int32)
    return StoredRows(Batch(tokens, ones > 0, ones, ones.sum(1, dtype=np.int32)))


PARTS = (source(7), source(5, 100), source(4, 200))


def stream(parts, weights=None, batch_size=4, batches=9, **settings):
    """Row numbers and example keys of the first batches of a mixture."""
    iterator = data.train_iterator(
        Mixture(parts, weights), batch_size, seed=3, by_example=True, **settings
    )
    with contextlib.closing(iterator):
        found = [next(iterator) for _ in range(batches)]
    return (
        np.concatenate([batch.tokens[:, 0] for batch in found]),
        np.concatenate([batch.example_keys for batch in found]),
    )


def test_a_mixture_keeps_its_shares_and_every_part_its_own_epochs():
    rows, _ = stream(PARTS[:2], (3.0, 1.0), batches=14)
    assert (rows < 100).reshape(-1, 4).sum(1).tolist() == [3] * 14  # in every batch
    first = rows[rows < 100]
    assert all(sorted(epoch) == list(range(7)) for epoch in first.reshape(-1, 7).tolist())
    alone = data.train_iterator(PARTS[0], 7, seed=3)
    with contextlib.closing(alone):
        assert first[:7].tolist() == next(alone).tokens[:, 0].tolist()  # in the order of old
    rows, _ = stream(PARTS[:2], batches=12)
    assert np.sum(rows < 100) == 28  # 7 of 12, by the number of rows


def test_keys_are_unique_and_do_not_move_when_a_source_is_added():
    rows, keys = stream(PARTS[:1], batches=12)
    assert len(np.unique(keys.reshape(-1, 2), axis=0)) == keys.size // 2  # over epochs too
    alone = [(row, key.tolist()) for row, key in zip(rows, keys)]
    for parts, weights, size in ((PARTS[:2], (0.5, 0.5), 4), (PARTS, (1.0, 2.0, 3.0), 5)):
        rows, keys = stream(parts, weights, size, batches=20)
        seen = [(row, key.tolist()) for row, key in zip(rows, keys) if row < 100]
        assert len(seen) > 15 and seen == alone[: len(seen)]
        assert len(np.unique(keys.reshape(-1, 2), axis=0)) == keys.size // 2


def test_a_mixture_is_resumed_exactly_and_read_in_parts():
    weights = (1.0, 1.0, 2.0)
    rows, keys = stream(PARTS, weights)
    first = data.train_iterator(Mixture(PARTS, weights), 4, 3, by_example=True)
    with contextlib.closing(first):
        next(first), next(first)
        state = first.get_state()
    local = np.array([3, 1])
    second = data.train_iterator(
        Mixture(PARTS, weights), 4, 3, by_example=True, rows=local, prefetch=1
    )
    with contextlib.closing(second):
        second.set_state(state)
        for start in (8, 12, 16):
            batch = next(second)
            assert batch.tokens[:, 0].tolist() == rows[start + local].tolist()
            assert np.array_equal(batch.example_keys, keys[start + local])


def test_sampled_rows_are_of_parts_by_weight_and_cut_as_in_training():
    rows = data.sample_rows(Mixture(PARTS[:2], (1.0, 9.0)), 1000, np.random.default_rng(0))
    share = np.mean(rows.tokens[:, 0] >= 100)
    assert abs(share - 0.9) < 4 * (0.09 / 1000) ** 0.5  # standard errors; 5 / 12 by rows
    assert set(rows.tokens[:, 0].tolist()) == {*range(7), *range(100, 105)}
    cut = RandomlyCut(PARTS[0], 1.0, PAD, np.ones(300, np.int32))
    rows = data.sample_rows(cut, 60, np.random.default_rng(0))
    assert np.bincount(rows.eligible.sum(1), minlength=4)[1:].min() > 8  # 1, 2 and 3 of 3, 20 each
    plain = data.sample_rows(PARTS[0], 9, np.random.default_rng(5)).tokens[:, 0]
    assert plain.tolist() == np.random.default_rng(5).integers(0, 7, 9).tolist()


def test_mixtures_are_their_parts_in_a_row_and_refuse_bad_weights():
    mixture = Mixture(PARTS)
    assert len(mixture) == 16
    picked = mixture.rows(np.array([15, 0, 7, 8])).tokens[:, 0]
    assert picked.tolist() == [203, 0, 100, 101]
    for weights in ((1.0,), (1.0, 0.0, 1.0), (1.0, -1.0, 1.0), (1.0, np.nan, 1.0)):
        with pytest.raises(ValueError, match="positive weight"):
            Mixture(PARTS, weights)


SIZES = np.array([3, 5, 2, 4, 6])
COUNTS = np.ones(10, np.int32)


def spans(packed):
    """Documents of ``SIZES`` tokens, several to a row or each in its own."""
    ends = np.cumsum(SIZES)
    rows = first_fit(SIZES, LENGTH) if packed else np.arange(len(SIZES))
    tokens = np.repeat(np.arange(len(SIZES), dtype=np.int32), SIZES)
    return PackedSpans(tokens, ends - SIZES, ends, rows, LENGTH, PAD, COUNTS)


def keyed(rows, visits=0):
    indices = np.arange(len(rows))
    keys = example_keys(rows, indices, np.full(len(rows), visits), 1, LENGTH)
    return KeyedBatch(*data.gather(rows, indices), jnp.asarray(keys))


STEP_DRAW = jax.jit(training.step_draw, static_argnums=(2, 4))


def noise_of(batch, transform=None, step=0):
    """Base noise by document, and the draw, of a training step."""
    spec = draws.DrawSpec(len(batch.tokens), 1, (LENGTH,))
    transform = transform or variance.identity()
    state, keys = transform.init(spec), batch.example_keys
    drawn = STEP_DRAW(5, step, transform, state, spec, keys)
    noise = np.asarray(drawn.noise[-1])
    inside = batch.documents > 0
    return {n: noise[inside & (batch.tokens == n)].tolist() for n in range(len(SIZES))}, drawn


def test_the_noise_of_a_document_is_the_same_however_it_is_packed_and_mirrored():
    packed, apart = keyed(spans(True)), keyed(spans(False))
    assert len(packed.tokens) < len(apart.tokens)
    once, drawn = noise_of(apart)
    assert noise_of(packed)[0] == once and len(set(sum(once.values(), []))) == SIZES.sum()
    mirror = variance.mirror()
    assert noise_of(packed, mirror)[0] == noise_of(apart, mirror)[0] != once
    again, _ = noise_of(keyed(spans(True), visits=1))
    assert all(set(again[n]).isdisjoint(once[n]) for n in once)  # each visit has its own
    later, other = noise_of(apart, step=7)
    assert later == once and np.array_equal(other.u, drawn.u)  # whatever step that is
    strata = variance.stratified()
    coupled, cells = noise_of(apart, strata)
    assert coupled == once  # what a transform draws anew is by step and slot
    assert not np.array_equal(cells.u, noise_of(apart, strata, step=7)[1].u)
    assert sorted((np.asarray(cells.u[0, :, 0]) * len(SIZES)).astype(int)) == [0, 1, 2, 3, 4]


def test_uniforms_by_example_are_uniform_and_distinct():
    keys = np.stack(np.meshgrid(np.arange(64), np.arange(128), indexing="ij"), -1).astype("u4")
    spec = draws.DrawSpec(64, 3, (128, 2))
    drawn = draws.by_example(jax.random.key(0), jnp.asarray(keys), spec)
    assert drawn.noise.shape == (1, 64, 128, 2) and drawn.u.shape == (1, 64, 3)
    values = np.asarray(drawn.noise).ravel()
    # 2^14 uniforms: the mean has standard error 0.0023, a tenth of the cells 0.0023 about 0.1.
    assert abs(values.mean() - 0.5) < 4 * 0.0023
    assert np.all(np.abs(np.histogram(values, 10, (0, 1))[0] / values.size - 0.1) < 4 * 0.0024)
    assert len(np.unique(values)) > values.size - 40  # of 2^23 grid points
    next_token = spec._replace(event_shape=(1,))  # whose one element is not read
    few = draws.by_example(jax.random.key(0), jnp.asarray(keys), next_token)
    assert few.noise.shape == (1, 64, 1) and np.array_equal(few.u, drawn.u)
    for wrong in (keys[:2], keys[:, :2]):
        with pytest.raises(ValueError, match="example_keys must be"):
            draws.by_example(jax.random.key(0), jnp.asarray(wrong), spec)


def test_a_step_by_example_is_the_same_on_one_and_eight_devices():
    batch = tiny.batch(8, seed=1)
    rows = StoredRows(batch)
    keys = example_keys(rows, np.arange(8), np.zeros(8, int), 0, tiny.LENGTH)
    objective, chain = tiny.objective(), variance.chain(variance.mirror())
    spec = objective.spec(8, tiny.LENGTH)

    def draw(keys):
        return training.step_draw(0, jnp.int32(3), chain, chain.init(spec), spec, keys)

    found = []
    for count in (1, 8):
        mesh = jax.make_mesh((count,), ("data",), devices=jax.devices()[:count])
        placed = jax.device_put(
            keys, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None, None))
        )
        found.append(jax.device_get(jax.jit(draw)(placed)))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, found[0], other)


def test_rows_cut_at_random_are_cut_by_example_and_visit():
    rows = StoredRows(tiny.batch(64, seed=2, counts=(6, 4)))
    cut = RandomlyCut(rows, 0.5, 0, np.ones(tiny.VOCAB, np.int32))
    every = np.arange(64)
    whole = data.gather(cut, every)
    jax.tree.map(np.testing.assert_array_equal, whole, data.gather(rows, every))
    first = cut.visit(every, np.zeros(64, int), (3, 0))
    order = np.random.default_rng(0).permutation(64)
    again = cut.visit(order, np.zeros(64, int), (3, 0))
    for a, b in zip(first, again):  # whatever is read with it
        assert np.array_equal(a[order], b)
    other = cut.visit(every, np.ones(64, int), (3, 0))
    assert not np.array_equal(first.eligible, other.eligible)
    kept, of = first.eligible.sum(1), whole.eligible.sum(1)
    assert np.all((kept >= 1) & (kept <= of)) and np.array_equal(kept, first.units)
    short = kept < of  # 1/2 (1 - 1/n): 0.375 to 0.417 of rows, standard error 0.06
    assert 0.15 < short.mean() < 0.65
    for i in range(64):
        end = np.flatnonzero(first.eligible[i])[-1] + 1 if short[i] else tiny.LENGTH
        visible = np.where(np.arange(tiny.LENGTH) < end, whole.documents[i], 0)
        assert np.array_equal(first.documents[i], visible)


def test_a_train_step_on_keyed_rows_equals_one_with_those_numbers():
    """And prompts, padding and other slots' noise leave it alone."""
    batch, chain = tiny.batch(8, seed=1), variance.chain()
    objective = tiny.objective()
    spec = objective.spec(8, tiny.LENGTH)
    optimizer = optax.sgd(0.1)
    state = training.new_state(tiny.params(), optimizer, chain, spec)
    step = tiny.jit(
        training.make_train_step(tiny.apply_fn, objective, chain, optimizer, spec, seed=4)
    )
    keys = example_keys(StoredRows(batch), np.arange(8), np.zeros(8, int), 0, tiny.LENGTH)
    after, metrics = step(state, KeyedBatch(*batch, keys))
    later, _ = step(state.replace(step=jnp.int32(9)), KeyedBatch(*batch, keys))
    jax.tree.map(np.testing.assert_array_equal, after.params, later.params)
    order = np.random.default_rng(1).permutation(8)
    moved = jax.tree.map(lambda field: field[order], KeyedBatch(*batch, keys))
    _, shuffled = step(state, moved)
    np.testing.assert_allclose(metrics.loss, shuffled.loss, rtol=1e-6)
    _, by_slot = step(state, batch)
    assert abs(float(by_slot.loss - metrics.loss)) > 1e-3


def test_sharding_helpers_place_keyed_batches():
    mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
    batch = tiny.batch(8)
    keys = np.zeros((8, tiny.LENGTH, 2), np.uint32)
    placed = sharding.place_batch(KeyedBatch(*batch, keys), sharding.batch_sharding(mesh))
    assert placed.example_keys.dtype == jnp.uint32 and placed.example_keys.shape == keys.shape
