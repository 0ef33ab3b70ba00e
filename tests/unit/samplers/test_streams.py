"""Rows that come and go: each as it would be alone, whatever is beside it; parallel filling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import samplers
from mdm_jax.models.cross_entropy import readout_apply
from mdm_jax.models.decoders import partial_decoder
from mdm_jax.samplers.by_score import confident_positions

LENGTH, EOS = 10, 0
NUMBERS = (4, 7, 1, 0, 9)
PARALLEL = samplers.confidence_parallel(3, 0.35)


def rows(numbers=NUMBERS):
    """Prompts of one to three tokens, and padding behind one of them."""
    for number in numbers:
        canvas, documents = np.full(LENGTH, tiny.MASK_ID), np.ones(LENGTH, np.int32)
        canvas[: 1 + number % 3] = 1 + (number + np.arange(1 + number % 3)) % 5
        if number == 1:
            canvas[8:], documents[8:] = 2, 0
        yield samplers.Row(number, canvas, documents)


@functools.cache
def network(cached):
    if not cached:
        return tiny.apply_fn, None, tiny.params()
    model = tiny.transformer(depth=2, num_heads=4, num_kv_heads=2)
    decoder, cache = partial_decoder(model), samplers.ApproximateCache(cached)

    def over(sampler, params, documents):
        put = samplers.approximately_cached
        return put(sampler, cache, decoder, params, documents, rows_per_pass=1)

    return readout_apply(model), over, tiny.parameters(model, LENGTH)


@functools.cache
def make_stream(sampler, cached, batch_size):
    apply_fn, over, params = network(cached)
    options = {"mask_id": tiny.MASK_ID, "batch_size": batch_size, "over": over}
    return functools.partial(samplers.make_stream(apply_fn, sampler, **options), params)


def alone(sampler, cached):
    """Tokens of each row by ``sample``, in a batch of its own."""
    apply_fn, over, params = network(cached)

    @tiny.jit
    def run(params, canvas, documents, number):
        own = sampler if over is None else over(sampler, params, documents)
        model_fn = functools.partial(apply_fn, params)
        options = {"mask_id": tiny.MASK_ID, "documents": documents, "row_offset": number}
        return samplers.sample(jax.random.key(5), model_fn, own, None, canvas, **options)

    return {r.number: np.asarray(run(params, r.canvas[None], r.documents[None], r.number)[0])
            for r in rows()}  # fmt: skip


SAMPLERS = {
    "parallel": PARALLEL,
    "stopping": samplers.stopping_at(PARALLEL, EOS),
    "by_margin": samplers.by_score(samplers.margin, (1, 3, 2)),
    "first_hitting": samplers.first_hitting(),
    "random": samplers.random_remasking(3, 2),
    "entropy": samplers.entropy_bounded(0.7),
}
CASES = [(name, "") for name in SAMPLERS]
CASES += [("parallel", kind) for kind in ("prefix", "dual", "delayed")]


@pytest.mark.parametrize("case", slow_except({("stopping", "")}, CASES))
def test_a_row_of_a_stream_is_that_of_a_batch_of_one(case):
    """Two places for five rows; then one row at a time, to the bit."""
    name, cached = case
    stream = make_stream(SAMPLERS[name], cached, 2)
    found = list(stream(jax.random.key(5), rows()))
    expected = alone(SAMPLERS[name], cached)
    assert sorted(row.number for row in found) == sorted(NUMBERS)
    for row in found:
        np.testing.assert_array_equal(row.tokens, expected[row.number])
        assert 1 <= row.steps <= LENGTH and (row.tokens != tiny.MASK_ID).all()
        (single,) = stream(jax.random.key(5), rows([row.number]))
        np.testing.assert_array_equal(single.tokens, row.tokens)
        assert single.steps == row.steps
    assert len(np.unique([row.tokens for row in found])) > 3


def test_rows_are_read_as_places_become_free():
    """Two places: the third row is read when the first is given out, and no sooner."""
    read = []

    def noted():
        for row in rows():
            read.append(row.number)
            yield row

    stream = make_stream(SAMPLERS["stopping"], "", 2)(jax.random.key(5), noted())
    first = next(stream)
    assert read == [4, 7] and first.number in read
    rest = list(stream)
    assert read == [*NUMBERS] and len(rest) == 4
    assert list(make_stream(SAMPLERS["stopping"], "", 2)(jax.random.key(5), iter(()))) == []


def test_a_row_ends_at_its_stop_where_all_before_it_is_filled():
    """One token a step, left to right; right to left the EOS at 2 waits for 1, and goes over 4."""
    mask, wanted = tiny.MASK_ID, np.array([3, 3, EOS, 4])

    def step(from_left, context, denoise, state):
        masked = state.tokens == context.mask_id
        order = (jnp.arange(4) if from_left else -jnp.arange(4))[None]
        first = jnp.min(jnp.where(masked, order, 9), axis=-1, keepdims=True)
        return state._replace(
            tokens=jnp.where(masked & (order == first), wanted[None], state.tokens)
        )

    canvas = np.array([[EOS, mask, mask, mask]])
    for from_left in (True, False):
        plain = PARALLEL._replace(step=functools.partial(step, from_left), blocks=None)
        stopped = samplers.stopping_at(plain, EOS)
        run = functools.partial(samplers.sample, jax.random.key(0), None, grid=None, mask_id=mask)
        assert run(stopped, canvas=canvas)[0].tolist() == [EOS, 3, EOS, EOS]
        assert run(plain, canvas=canvas)[0].tolist() == [EOS, 3, EOS, 4]


def test_positions_that_are_likely_enough():
    score = np.array([[0.92, 0.5, 0.97, 0.95, 0.99], [0.3, 0.5, 0.4, 0.2, 0.99]])
    candidates, one = np.array([[True] * 4 + [False]] * 2), np.array([1, 1])
    fill = functools.partial(confident_positions, score, candidates)
    assert fill(one, 0.93).tolist() == [
        [False, False, True, True, False],
        [False, True] + [False] * 3,
    ]
    # 2 (1 - .97) = .06, 3 (1 - .95) = .15, 4 (1 - .92) = .32
    assert np.argwhere(fill(one, 0.0, 0.2)).tolist() == [[0, 2], [0, 3], [1, 1]]
    assert np.argwhere(fill(one, 0.0, 0.1)).tolist() == [[0, 2], [1, 1]]
    assert np.argwhere(fill(2 * one, 0.96)).tolist() == [[0, 2], [0, 3], [1, 1], [1, 2]]


def test_bad_streams():
    options = {"mask_id": tiny.MASK_ID, "batch_size": 2}
    with pytest.raises(ValueError, match="steps along a grid"):
        samplers.make_stream(tiny.apply_fn, samplers.ancestral(), **options)
    with pytest.raises(ValueError, match="at least one row, got batch_size=0"):
        samplers.make_stream(tiny.apply_fn, PARALLEL, mask_id=3, batch_size=0)
    stream = make_stream(SAMPLERS["stopping"], "", 2)
    some = [samplers.Row(0, np.full(4, tiny.MASK_ID)), samplers.Row(1, np.full(5, tiny.MASK_ID))]
    with pytest.raises(ValueError, match="one length, 4, .* row 1 has 5"):
        list(stream(jax.random.key(0), some))
    some[1] = samplers.Row(1, np.full(4, tiny.MASK_ID), np.ones(4, np.int32))
    with pytest.raises(ValueError, match="all or none documents; row 1"):
        list(stream(jax.random.key(0), some))
