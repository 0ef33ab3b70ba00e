"""Approximate caches: exact where nothing is out of date, and what they run otherwise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import samplers
from mdm_jax.models.cross_entropy import as_logits, readout_apply, shifted_apply
from mdm_jax.models.decoders import partial_decoder
from mdm_jax.samplers.caching import Store

ROWS, LENGTH, BLOCK = 3, 12, 3
CANVAS = np.full((ROWS, LENGTH), tiny.MASK_ID, np.int32)
CANVAS[:, :3] = [[1, 2, 3], [0, 0, 4], [5, 1, 1]]
CANVAS[1, 10:] = 0
CANVAS[2, 6] = 2
DOCUMENTS = np.ones((ROWS, LENGTH), np.int32)
DOCUMENTS[1, :2] = DOCUMENTS[1, 10:] = 0

GREEDY = samplers.temperature(0.0)
SAMPLERS = {
    "blocks": (samplers.low_confidence_remasking(BLOCK, BLOCK, GREEDY), None),
    "parallel": (samplers.confidence_parallel(4, 0.3, token_filter=GREEDY), None),
    "by_margin": (samplers.by_score(samplers.margin, 2), None),
    "first_hitting": (samplers.first_hitting(), None),
    "ancestral": (samplers.ancestral(), np.array([-np.inf, -1.0, 0.0, 1.0, np.inf])),
}
KINDS = ("prefix", "dual", "delayed")


@functools.cache
def made(depth, shift, conditioned=False):
    """A network with grouped heads: (decoder, apply_fn of whole rows, parameters)."""
    settings = {"num_heads": 4, "num_kv_heads": 2, "condition_on_logsnr": conditioned}
    model = tiny.transformer(depth=depth, **settings)
    apply_fn = readout_apply(model)
    apply_fn = shifted_apply(apply_fn) if shift else apply_fn
    return partial_decoder(model, shift=shift), apply_fn, tiny.parameters(model, LENGTH)


@functools.cache
def generated(name, depth, shift, kind="", refresh=None, rows=None, **options):
    """Tokens [B, L], over a cache or without one."""
    decoder, apply_fn, params = made(depth, shift, **options)
    sampler, grid = SAMPLERS[name]
    canvas, documents = CANVAS[: rows or ROWS], DOCUMENTS[: rows or ROWS]

    @tiny.jit
    def run(params):
        over = sampler
        if kind:
            cache = samplers.ApproximateCache(kind, refresh)
            over = samplers.approximately_cached(sampler, cache, decoder, params, documents)
        given = {"mask_id": tiny.MASK_ID, "documents": documents}
        network = functools.partial(apply_fn, params)
        return samplers.sample(jax.random.key(3), network, over, grid, canvas, **given)

    return np.asarray(run(params))


def test_a_store_of_one_layer_is_never_out_of_date():
    """Keys and values of a single layer are those of the token itself, so that caches are exact."""
    exact = generated("blocks", 1, True)
    assert (exact != tiny.MASK_ID).all() and len(np.unique(exact)) > 3
    for kind in ("dual", "delayed"):  # prefix: the slow test
        np.testing.assert_array_equal(generated("blocks", 1, True, kind), exact)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_and_cache_where_it_is_exact(name, kind, shift):
    exact = generated(name, 1, shift)
    np.testing.assert_array_equal(generated(name, 1, shift, kind), exact)
    exact = generated(name, 2, shift)
    np.testing.assert_array_equal(generated(name, 2, shift, kind, refresh=1), exact)


@pytest.mark.parametrize("name", slow_except({"first_hitting"}, SAMPLERS))
def test_a_pass_over_all_positions_at_every_step_is_exact(name):
    conditioned = {"conditioned": name == "blocks"}
    exact = generated(name, 2, False, **conditioned)
    np.testing.assert_array_equal(generated(name, 2, False, "dual", 1, **conditioned), exact)


@pytest.mark.slow
def test_rows_of_a_batch_do_not_know_of_each_other():
    for kind in KINDS:
        together = generated("parallel", 2, True, kind)
        np.testing.assert_array_equal(generated("parallel", 2, True, kind, rows=1), together[:1])


def test_positions_run_anew_see_what_is_stored_of_the_others():
    """Two layers; slots of padding, of one row more than of others, and of a changed token."""
    decoder, apply_fn, params = made(2, False)
    level = np.zeros((ROWS, 1), np.float32)
    slots = np.array([[3, 7], [LENGTH, 4], [LENGTH, LENGTH]], np.int32)

    @tiny.jit
    def run(params, tokens, changed):
        store = decoder.run(
            params,
            decoder.init(ROWS, LENGTH),
            tokens,
            level,
            DOCUMENTS,
            np.arange(ROWS),
        )
        same = decoder.update(params, store, tokens, level, DOCUMENTS, slots)
        other = decoder.update(params, store, changed, level, DOCUMENTS, slots)
        everything = np.broadcast_to(np.arange(LENGTH), tokens.shape)
        anew = decoder.update(params, store, changed, level, DOCUMENTS, everything)
        rows = decoder.run(params, store, changed[2:], level[2:], DOCUMENTS[2:], np.array([ROWS]))
        exact = [as_logits(apply_fn(params, x, level, DOCUMENTS)) for x in (tokens, changed)]
        stores = (store, same, other, anew, rows)
        return [decoder.readout(params, s.features, DOCUMENTS).logits() for s in stores], exact

    changed = CANVAS.copy()
    changed[0, 7] = changed[1, 4] = changed[2, 9] = 3
    (store, same, other, anew, rows), (before, after) = jax.device_get(run(params, CANVAS, changed))
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(store, before, **close)
    np.testing.assert_allclose(same, before, **close)
    np.testing.assert_allclose(anew, after, **close)
    np.testing.assert_array_equal(rows, store)  # a row beyond the store is not written
    moved = np.abs(other - store).max(-1) > 1e-3
    assert np.argwhere(moved).tolist() == [[0, 3], [0, 7], [1, 4]]
    # The token itself is that of now, what it sees is partly that of before.
    assert np.abs(other - after).max(-1)[0, 7] < np.abs(store - after).max(-1)[0, 7]
    assert np.abs(other - after).max(-1)[0, 7] > 1e-6


@pytest.mark.parametrize("kind", slow_except({"delayed"}, KINDS))
def test_positions_that_a_step_runs(kind):
    """By hand: nine positions to fill in blocks of three, one a step, refresh every third step."""
    sampler, _ = SAMPLERS["blocks"]
    model = tiny.transformer()
    runs = []
    decoder = partial_decoder(model)._replace(
        run=lambda params, store, *inputs: noted(store, inputs[-1], "all"),
        update=lambda params, store, *inputs: noted(store, inputs[-1], "some"),
    )

    def noted(store, positions, what):
        jax.debug.callback(
            lambda p: runs.append((what, p.ravel().tolist())), positions, ordered=True
        )
        return store

    cache = samplers.ApproximateCache(kind, 2 if kind == "dual" else None)

    @tiny.jit
    def run(params):
        over = samplers.approximately_cached(sampler, cache, decoder, params)
        return samplers.sample(
            jax.random.key(0), None, over, None, CANVAS[:1], mask_id=tiny.MASK_ID
        )

    run(tiny.parameters(model, LENGTH)).block_until_ready()
    jax.effects_barrier()
    # Equal scores fill from the left: 3, 4, ..., 11; blocks begin at 3, 6 and 9.
    whole = ("all", [0])
    if kind == "dual":
        some = [[3, 4, 5], [6, 7, 8], [9, 10, 11]]
        assert runs == [step for s in some for step in (whole, ("some", s), whole)]
    elif kind == "prefix":
        some = [[*range(3, 12)], [*range(6, 12)], [*range(9, 12)]]
        assert runs == [step for s in some for step in (whole, ("some", s), ("some", s))]
    else:
        steps = []
        for first in range(3, 12):
            wanted = [*range(first - 1, 12)]
            size = next(n for n in (3, 6, 9, 12) if n >= len(wanted))
            steps.append(("some", wanted + [12] * (size - len(wanted))))
        steps[::3] = [whole] * 3
        assert runs == steps


def test_a_store_forgets_rows():
    store = Store(None, None, np.ones((2, 3), bool), np.array([4, 4]))
    assert store.forget(np.array([True, False])).block.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: samplers.ApproximateCache("suffix"), "prefix"),
        (lambda: samplers.ApproximateCache("dual", 0), "refresh"),
        (lambda: refused(samplers.cached_ancestral(2)), "once a step, on all rows"),
        (lambda: refused(samplers.predictor_corrector()), "once a step, on all rows"),
        (
            lambda: refused(samplers.wrapped(samplers.ancestral(), samplers.prompt_guidance(1.0))),
            "once a step, on all rows",
        ),
        (lambda: refused(samplers.by_score()), "sets its own noise levels"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def refused(sampler):
    decoder, _, params = made(1, False)
    grid = np.array([-1.0, np.inf])
    generate = samplers.make_cached_generator(
        decoder, sampler, samplers.ApproximateCache(), grid, mask_id=tiny.MASK_ID
    )
    jax.eval_shape(generate, params, jax.random.key(0), jnp.asarray(CANVAS))
