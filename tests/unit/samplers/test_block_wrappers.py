"""Generation block by block with guidance, without repeated n-grams, and self-conditioned: exact
laws on the toy, and the same tokens with a cache as without.
"""

import functools

import block_toy
import jax
import numpy as np
import pytest
import tiny
import zoo
from scipy import stats

from mdm_jax import samplers
from mdm_jax.models.decoders import block_apply, cached_block_decoder, recomputing_block_decoder
from mdm_jax.samplers.blocks import make_block_generator
from mdm_jax.samplers.wrappers import completes_repeat, no_repeat_ngrams
from mdm_jax.schedules import grids
from mdm_jax.testing import toys

MASK, SIZE = toys.MASK_ID, 2
GRID = grids.uniform_masking_rate(3)


def generator(sampler, grid=None, apply_fn=None, **options):
    decoder = recomputing_block_decoder(apply_fn or block_toy.block_apply(SIZE), SIZE)
    return make_block_generator(decoder, sampler, grid, mask_id=MASK, **options)


@functools.cache
def log_probs(known, place):
    """log p(x_place = v | known), [3] per value; ``known`` is a tuple of (place, token)."""
    row = np.zeros(4, int)
    for j, token in known:
        row[j] = token
    found = []
    for v in range(3):
        row[place] = v
        number = int(row @ 3 ** np.arange(4)[::-1])
        every = block_toy.place_log_probabilities(tuple(j for j, _ in known), place)
        found.append(every[number])
    return np.array(found)


def enumerate_law(start, law_of):
    """[3, 3, 3, 3] law of rows filled block by block, in random order within a block.

    ``law_of(row, place)`` is the law of a token given the row so far (None where nothing is).
    """
    law = np.zeros((3,) * 4)

    def fill(row, chance, block):
        if block == 2:
            law[tuple(row)] += chance
            return
        holes = [i for i in range(2 * block, 2 * block + 2) if row[i] is None]
        if not holes:
            fill(row, chance, block + 1)
        for hole in holes:
            for token, p in enumerate(law_of(row, hole)):
                fill([*row[:hole], token, *row[hole + 1 :]], chance * p / len(holes), block)

    fill(list(start), 1.0, 0)
    return law


def softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def check_law(tokens, law, wrong):
    """Chi-square at 1e-4 of the rows against a law; the other law is refuted."""
    observed = np.bincount(np.asarray(tokens) @ 3 ** np.arange(4)[::-1], minlength=81)
    possible = law.ravel() > 0
    assert not observed[~possible].any()
    fit = stats.chisquare(observed[possible], len(tokens) * law.ravel()[possible], sum_check=False)
    assert fit.pvalue > 1e-4
    support = wrong.ravel() > 0
    if not observed[~support].any():
        other = len(tokens) * wrong.ravel()[support]
        assert stats.chisquare(observed[support], other, sum_check=False).pvalue < 1e-4


def known_places(row, block, places):
    """(place, token) of what is there among the places up to the end of the block."""
    return tuple((i, row[i]) for i in places if row[i] is not None and i < 2 * block + 2)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param((2, None, None, None), marks=pytest.mark.slow),
        pytest.param((0, 1, None, None), marks=pytest.mark.slow),
        (1, None, 0, None),
    ],
)
def test_guidance_hides_the_prompt_of_the_blocks_before(start):
    """40,000 rows against enumeration: the network without the prompt sees what was generated."""
    scale = 2.5
    generated = [i for i in range(4) if start[i] is None]

    def guided(row, place, hidden=generated):
        block = place // 2
        target = log_probs(known_places(row, block, range(4)), place)
        base = log_probs(known_places(row, block, hidden), place)
        return softmax(base + scale * (target - base))

    def one_block(row, place):  # only the own block's prompt is taken away
        free = [i for i in range(4) if start[i] is None or i // 2 != place // 2]
        return guided(row, place, free)

    canvas = np.array([MASK if t is None else t for t in start], np.int32)
    sampler = samplers.wrapped(samplers.first_hitting(), samplers.prompt_guidance(scale))
    generate = generator(sampler, guided=True)
    tokens = generate(toys.toy_params(), jax.random.key(0), np.tile(canvas, (40_000, 1)))
    check_law(tokens, enumerate_law(start, guided), enumerate_law(start, one_block))


@pytest.mark.slow
def test_a_prefix_is_hidden_too():
    """Remembered in one pass or block by block, the tokens are the same."""
    sampler = samplers.wrapped(samplers.first_hitting(), samplers.prompt_guidance(2.0))
    canvas = np.tile(np.array([[2, 0, 1, MASK]], np.int32), (64, 1))
    plain, ahead = (generator(sampler, guided=True, prefix=prefix) for prefix in (0, 2))
    first = plain(toys.toy_params(), jax.random.key(1), canvas)
    np.testing.assert_array_equal(ahead(toys.toy_params(), jax.random.key(1), canvas), first)


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_ngram_of_the_written_row_comes_again(n):
    """40,000 rows against enumeration; with n = 1 a fourth token must fall back to the network."""

    def allowed(row, place, from_block=False):
        p = softmax(log_probs(known_places(row, place // 2, range(4)), place))
        seen = [t if t is not None and i < 2 * (place // 2) + 2 else -1 for i, t in enumerate(row)]
        first = 2 * (place // 2) if from_block else 0
        repeats = []
        for token in range(3):
            filled = seen[:place] + [token] + seen[place + 1 :]
            grams = {
                i: tuple(filled[i : i + n])
                for i in range(first, 5 - n)
                if -1 not in filled[i : i + n]
            }
            own = [i for i in grams if i <= place < i + n]
            repeats.append(any(grams[i] == grams[j] for i in own for j in grams if i != j))
        keep = p * ~np.array(repeats)
        return keep / keep.sum() if keep.sum() else p

    sampler = samplers.wrapped(samplers.first_hitting(), no_repeat_ngrams(n))
    canvas = samplers.blank_canvas(40_000, 4, MASK)
    tokens = generator(sampler)(toys.toy_params(), jax.random.key(2), canvas)
    blank = (None,) * 4
    own_block = enumerate_law(blank, functools.partial(allowed, from_block=True))
    check_law(tokens, enumerate_law(blank, allowed), own_block)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("past", [1, 4, 6])
def test_what_stands_before_counts_as_a_part_of_the_row(n, past):
    """Against the same function on the whole row, at the places after the cut."""
    rng = np.random.default_rng(past)
    rows = rng.integers(0, 4, (64, 8)).astype(np.int32)  # 3 is the mask
    run = zoo.quick(completes_repeat, static_argnums=(1, 2, 3))
    whole = np.asarray(run(rows, n, 3, 3))[:, past:]
    cut = run(rows[:, past:], n, 3, 3, rows[:, :past])
    np.testing.assert_array_equal(cut, whole)
    assert whole.any()


# --- self-conditioning --------------------------------------------------------------------------


def test_the_estimate_starts_at_zero_in_every_block():
    """A decoder that notes what it is shown: zeros first, then what it said a step before."""
    shown = []
    plain = recomputing_block_decoder(block_toy.block_apply(SIZE), SIZE)

    def logits(params, memory, tokens, logsnr, documents, estimate):
        said = plain.logits(params, memory, tokens, logsnr, documents)
        jax.debug.callback(lambda *a: shown.append([np.asarray(x) for x in a]), estimate, said)
        return said

    sampler = samplers.self_conditioned(samplers.ancestral(), 3, 3)
    decoder = plain._replace(logits=logits)
    generate = make_block_generator(decoder, sampler, GRID, mask_id=MASK)
    tokens = generate(toys.toy_params(), jax.random.key(0), samplers.blank_canvas(40, 4, MASK))
    jax.effects_barrier()
    assert (np.asarray(tokens) < 3).all() and len(shown) == 6  # three steps for each block
    for step, (estimate, _) in enumerate(shown):
        if step % 3 == 0:
            np.testing.assert_array_equal(estimate, 0.0)
            continue
        before = np.exp(shown[step - 1][1].astype(np.float64))
        before /= before.sum(-1, keepdims=True)
        unfinished = np.abs(estimate - before).max((1, 2)) < 1e-5
        assert unfinished.any()  # rows that are done keep the estimate they ended with


# --- with a cache -------------------------------------------------------------------------------

LENGTH = 8
CANVAS = np.full((4, LENGTH), tiny.MASK_ID, np.int32)
CANVAS[1, :3] = [0, 1, 2]
CANVAS[2, 3:6] = 2
DOCUMENTS = np.ones((4, LENGTH), np.int32)
DOCUMENTS[3, 6:] = 0
WRAPPERS = (samplers.prompt_guidance(2.0), no_repeat_ngrams(2))


@functools.cache
def network():
    model = tiny.transformer(depth=1, self_conditioning=True)
    return model, tiny.parameters(model, LENGTH)


@pytest.mark.parametrize(
    "name, window",
    [pytest.param("ancestral", None, marks=pytest.mark.slow), ("cached_ancestral", 3)],
)
def test_cached_generation_draws_the_tokens_of_the_uncached_one(name, window):
    """Guided, constrained and self-conditioned at once."""
    model, params = network()
    inner = {"ancestral": samplers.ancestral(), "cached_ancestral": samplers.cached_ancestral(2)}
    sampler = samplers.wrapped(inner[name], *WRAPPERS)
    sampler = samplers.self_conditioned(sampler, tiny.MASK_ID, tiny.VOCAB)
    found = []
    for decoder in (
        cached_block_decoder(model, SIZE, window),
        recomputing_block_decoder(block_apply(model, SIZE, window), SIZE),
    ):
        generate = make_block_generator(decoder, sampler, GRID, mask_id=tiny.MASK_ID, guided=True)
        found.append(np.asarray(generate(params, jax.random.key(7), CANVAS, DOCUMENTS)))
    np.testing.assert_array_equal(*found)
    given = CANVAS != tiny.MASK_ID
    assert (found[0] < tiny.MASK_ID).all() and (found[0][given] == CANVAS[given]).all()


def test_guidance_without_its_memory_is_refused():
    sampler = samplers.wrapped(samplers.first_hitting(), samplers.prompt_guidance(2.0))
    with pytest.raises(ValueError, match="only with guided=True"):
        generator(sampler)(toys.toy_params(), jax.random.key(0), np.array([[0, 1, MASK, MASK]]))
