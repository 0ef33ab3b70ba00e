"""Samplers that put masks back: ReMDM, its loop, and predictor-corrector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toy_reverse import (
    BLANK,
    MASK,
    ROWS,
    STATES,
    ancestral_law,
    check_frequencies,
    draw,
    draw_with_trace,
    one_by_one_law,
    place_kernel,
    token_probabilities,
    total_variation,
    toy_model,
    uniform_grid,
)

from mdm_jax import samplers, schedules
from mdm_jax.samplers.remasking import (
    largest_remasking,
    loop_logsnr,
    predictor_corrector,
    remdm_cap,
    remdm_confidence,
    remdm_loop,
    remdm_rescale,
    reveal_with_remasking,
)
from mdm_jax.samplers.sampler import LOGSNR_LIMIT

COUNT = 4000


def law_of(*kernels) -> np.ndarray:
    law = np.eye(256)[BLANK]
    for kernel in kernels:
        law = law @ kernel
    return law


def own_step(before: float, after: float, remask) -> np.ndarray:
    """Kernel between survival probabilities, by the sampler's own rule in float64."""
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        levels = [jnp.asarray(np.log(a) - np.log1p(-a)) for a in (before, after)]
        sigma = remask(largest_remasking(*levels))
        return place_kernel(float(reveal_with_remasking(*levels, sigma)), float(sigma))


def standing_step(survival: float, sigma: float) -> np.ndarray:
    """Kernel that remasks at a level and reveals as many in return."""
    return place_kernel(sigma * survival / (1 - survival), sigma)


def masked_share(law: np.ndarray) -> np.ndarray:
    """[4] probability that each place is masked."""
    return law @ (STATES == MASK)


# ---- probabilities ----------------------------------------------------------------------------


def test_probabilities_over_the_whole_line():
    """Against float64 rates, at both infinite ends too; the share of masks is kept throughout."""
    grid = np.concatenate([[-np.inf], np.linspace(-12, 12, 25), [np.inf]])
    first, second = (a.ravel() for a in np.meshgrid(grid, grid, indexing="ij"))
    keep = first < second
    first, second = first[keep].astype(np.float32), second[keep].astype(np.float32)
    # Two equal levels, as in a correction.
    first, second = np.append(first, grid[1:-1]), np.append(second, grid[1:-1])

    def both(first, second):
        largest = largest_remasking(first, second)
        shares = [reveal_with_remasking(first, second, eta * largest) for eta in (0.0, 0.3, 1.0)]
        return largest, jnp.stack(shares)

    largest, reveal = jax.jit(both)(first.astype(np.float32), second.astype(np.float32))
    before, after = (1 / (1 + np.exp(-a.astype(np.float64))) for a in (first, second))
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.where(before > 0, np.minimum(1, (1 - after) / before), 1)
    np.testing.assert_allclose(largest, expected, rtol=2e-6)
    for eta, share in zip((0.0, 0.3, 1.0), np.asarray(reveal, np.float64)):
        sigma = eta * expected
        np.testing.assert_allclose(
            share, (after - (1 - sigma) * before) / (1 - before), rtol=5e-5, atol=1e-9
        )
        stay = 1 - share
        masked = sigma * before + (1 - before) * stay
        np.testing.assert_allclose(masked, 1 - after, rtol=1e-4, atol=2e-7)
        assert (share <= 1 + 1e-6).all() and (share >= 0).all()


# ---- ReMDM ------------------------------------------------------------------------------------

RULES = {
    "cap": (remdm_cap(0.1), lambda largest: jnp.minimum(0.1, largest)),
    "rescale": (remdm_rescale(0.5), lambda largest: 0.5 * largest),
}


@pytest.mark.parametrize(
    "name, steps, data_rows",
    [
        ("cap", 4, (0.01310261, 0.01078597, 0.06455201)),
        ("cap", 8, (0.01311718, 0.01113444, 0.07753119)),
        ("rescale", 4, (0.01289879, 0.01071682, 0.06366740)),
        ("rescale", 8, (0.01288330, 0.01118585, 0.07611373)),
    ],
)
def test_remdm_law(name, steps, data_rows):
    sampler, rule = RULES[name]
    law = np.eye(256)[BLANK]
    for i in range(steps):
        law = law @ own_step(i / steps, (i + 1) / steps, rule)
        np.testing.assert_allclose(masked_share(law), 1 - (i + 1) / steps, atol=1e-12)
    np.testing.assert_allclose(law[ROWS], data_rows, atol=6e-9)
    assert sampler.bias == "biased" and total_variation(law, one_by_one_law()) > 0.02


@pytest.mark.parametrize("name", RULES)
def test_remdm_follows_its_law(name):
    """4000 rows; the share of masked places within 5 standard errors of the grid's rates."""
    sampler, rule = RULES[name]
    canvas = samplers.blank_canvas(COUNT, 4, MASK)
    tokens, states = draw_with_trace(
        toy_model, sampler, uniform_grid(4), canvas, 1, lambda state: state.tokens
    )
    check_frequencies(tokens, law_of(*(own_step(i / 4, (i + 1) / 4, rule) for i in range(4))))
    rate = np.array([0.75, 0.5, 0.25, 0])
    error = np.sqrt(rate * (1 - rate) / states[0].size)
    assert (np.abs((states == MASK).mean((1, 2)) - rate) <= 5 * error).all()
    back = (states[:-1] != MASK) & (states[1:] == MASK)
    assert back[:2].any((1, 2)).all() and not back[2].any()
    changed = (states[:-1] != MASK) & (states[1:] != states[:-1])
    assert (states[1:][changed] == MASK).all()


def test_remdm_without_remasking_is_ancestral():
    """The same tokens, bit for bit."""
    canvas = samplers.blank_canvas(500, 4, MASK)
    expected = draw(toy_model, samplers.ancestral(), uniform_grid(3), canvas, seed=5)
    got = draw(toy_model, remdm_cap(0.0), uniform_grid(3), canvas, seed=5)
    np.testing.assert_array_equal(got, expected)


def probabilities_of(states) -> np.ndarray:
    """[256, 4] probability of the token at each place, drawn in ``states`` (one or [256])."""
    probs = np.broadcast_to(token_probabilities()[states], (256, 4, 4))
    return np.take_along_axis(probs, STATES[..., None], -1)[..., 0]


def confidence_kernel(number: int, steps: int, memory: np.ndarray) -> np.ndarray:
    """Step ``number`` of a uniform grid, with the confidence [256, 4] of the revealed places."""
    before, after = number / steps, (number + 1) / steps
    if number in (0, steps - 1):  # nothing to remask yet, or nothing allowed
        return place_kernel((after - before) / (1 - before))
    doubt = np.where(STATES == MASK, 0, np.exp(-memory))
    share = doubt / np.maximum(doubt.sum(1, keepdims=True), 1e-300)
    largest = min(1, (1 - after) / before)
    return place_kernel((after - before) / (1 - before), largest * share)


def confidence_law(steps: int) -> np.ndarray:
    """[256] law of up to four steps, over all states that a token may have been revealed in.

    After the first step every confidence is from the blank state; after the second it is from the
    state after the first one, where that had a mask.
    """
    blank = probabilities_of(BLANK)
    first = law_of(confidence_kernel(0, steps, blank))
    if steps < 4:
        for number in range(1, steps):
            first = first @ confidence_kernel(number, steps, blank)
        return first
    second, law = confidence_kernel(1, 4, blank), np.zeros(256)
    for state in np.flatnonzero(first):
        memory = np.where(STATES[state] == MASK, probabilities_of(state), blank)
        law += first[state] * second[state] @ confidence_kernel(2, 4, memory)
    return law @ confidence_kernel(3, 4, blank)


@pytest.mark.parametrize("steps", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3)), 4])
def test_remdm_confidence_follows_its_law(steps):
    sampler = remdm_confidence()
    canvas = samplers.blank_canvas(COUNT, 4, MASK)
    tokens, (states, memory, _) = draw_with_trace(
        toy_model, sampler, uniform_grid(steps), canvas, 2, tuple
    )
    check_frequencies(tokens, confidence_law(steps))
    # Confidence is the probability of the token when it was revealed, in each step.
    before = np.concatenate([np.full((1, COUNT, 4), MASK), states[:-1]])
    new = (before == MASK) & (states != MASK)
    number = before @ np.array([64, 16, 4, 1])
    chance = np.take_along_axis(token_probabilities()[number], states[..., None], -1)[..., 0]
    assert new.any((1, 2)).all()
    np.testing.assert_allclose(memory[new], chance[new], rtol=1e-5)
    kept = (before == states) & (states != MASK)
    np.testing.assert_array_equal(memory[1:][kept[1:]], memory[:-1][kept[1:]])


# ---- loop -------------------------------------------------------------------------------------

LOOP = {"eta": 0.2, "on": 0.6, "off": 0.2, "survival_on": 0.8}


def loop_survival(time):
    """Through (1, 0), (on, survival_on), (off, survival_on), (0, 1)."""
    return np.interp(time, [0, LOOP["off"], LOOP["on"], 1], [1, 0.8, 0.8, 0])


def test_loop_levels():
    time = np.array([1, 0.9, 0.7, 0.6, 0.4, 0.2, 0.1, 1e-6, 0])
    with np.errstate(divide="ignore"):
        grid = (np.log1p(-time) - np.log(time)).astype(np.float32)
    level = jax.jit(lambda x: loop_logsnr(x, LOOP["on"], LOOP["off"], LOOP["survival_on"]))(grid)
    np.testing.assert_allclose(
        schedules.survival_probability(level), loop_survival(time), rtol=1e-6
    )
    np.testing.assert_allclose(
        schedules.masking_rate(level), 1 - loop_survival(time), rtol=1e-5, atol=1e-12
    )
    assert (level[0], level[-1]) == (-np.inf, np.inf)


def test_loop_follows_its_law():
    """Eight steps: three up, then three whole ones in which the level stands, then to the end.

    The step from 5/8 to 1/2 crosses the beginning of the middle phase and remasks nothing.
    """
    survival = loop_survival(1 - np.arange(9) / 8)
    standing = [4, 5]
    kernels = [
        standing_step(0.8, LOOP["eta"])
        if i in standing
        else place_kernel((survival[i + 1] - survival[i]) / (1 - survival[i]))
        for i in range(8)
    ]
    canvas = samplers.blank_canvas(COUNT, 4, MASK)
    tokens, states = draw_with_trace(
        toy_model, remdm_loop(**LOOP), uniform_grid(8), canvas, 3, lambda state: state.tokens
    )
    check_frequencies(tokens, law_of(*kernels))
    np.testing.assert_allclose(masked_share(law_of(*kernels[:6])), 0.2, atol=1e-12)
    back = ((states[:-1] != MASK) & (states[1:] == MASK)).mean((1, 2))
    expected = np.zeros(7)
    expected[np.array(standing) - 1] = 0.8 * LOOP["eta"]
    assert (np.abs(back - expected) <= 5 * np.sqrt(expected / states[0].size)).all()
    assert ((expected > 0) == (back > 0)).all()


def test_full_rows_finish_with_the_loop():
    """Rows that are full when the middle phase ends are left alone; sampling stops early."""
    steps = []
    canvas = samplers.blank_canvas(1, 1, MASK)
    samplers.sample(
        jax.random.key(0),
        *(lambda *args: jnp.zeros((1, 1, 3)), remdm_loop(0.0, 0.5, 0.4, 0.999), uniform_grid(40)),
        canvas,
        mask_id=MASK,
        progress=lambda done, total: steps.append((done, total)),
    )
    jax.effects_barrier()
    assert steps == [(i + 1, 40) for i in range(24)]


# ---- predictor-corrector ----------------------------------------------------------------------


@pytest.mark.parametrize("survival", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.0])
def test_corrections_keep_independent_places(survival, sigma):
    """The law "masked with probability m, else p_i" of every place is a fixed point, exactly."""
    probs = token_probabilities()[BLANK]
    free = np.broadcast_to(probs, (256, 4, 4))
    place = survival * probs + (1 - survival) * np.eye(4)[MASK]
    law = np.einsum("a,b,c,d->abcd", *place).ravel()
    with jax.enable_x64(True):
        level = jnp.asarray(np.log(survival / (1 - survival)))
        remask = float(jnp.minimum(sigma, largest_remasking(level, level)))
        reveal = float(reveal_with_remasking(level, level, remask))
    kernel = place_kernel(reveal, remask, free)
    np.testing.assert_allclose(law @ kernel, law, atol=1e-15)
    other = place_kernel(0.9 * reveal, remask, free)
    assert np.abs(law @ other - law).max() > 1e-4


def posterior(joint: np.ndarray) -> np.ndarray:
    """[256, 4, 4] exact conditionals of a law [81] over the clean states, given what is visible."""
    clean = STATES[(STATES != MASK).all(1)]
    fits = ((STATES[:, None] == clean[None]) | (STATES[:, None] == MASK)).all(-1)
    given = fits * joint / np.maximum(fits @ joint, 1e-300)[:, None]
    return np.einsum("nc,cik->nik", given, np.eye(4)[clean])


def test_corrections_keep_a_law_to_second_order():
    """With exact conditionals: halving sigma divides the change of the noised law by four."""
    joint = np.random.default_rng(0).dirichlet(np.full(81, 0.3))
    probs, level = posterior(joint), 0.6
    noisy = level * np.eye(4)[STATES[(STATES != MASK).all(1)]] + (1 - level) * np.eye(4)[MASK]
    law = joint @ np.einsum("na,nb,nc,nd->nabcd", *noisy.transpose(1, 0, 2)).reshape(81, 256)
    change = [
        total_variation(law @ place_kernel(sigma * level / (1 - level), sigma, probs), law)
        for sigma in (0.08, 0.04, 0.02)
    ]
    ratios = np.divide(change[:-1], change[1:])
    assert (np.abs(ratios - 4) < 0.5).all() and change[0] > 1e-4


def test_corrections_keep_independent_places_when_drawn():
    """4000 rows of a model that ignores context, after one step and two corrections."""
    probs = token_probabilities()[BLANK, :, :3]

    def model(inputs, logsnr, documents):
        return jnp.broadcast_to(jnp.log(probs)[None], (len(inputs), 4, 3)).astype(jnp.float32)

    canvas = samplers.blank_canvas(COUNT, 4, MASK)
    tokens, states = draw_with_trace(
        *(model, predictor_corrector(2, 0.8), uniform_grid(2), canvas, 4, lambda s: s.tokens)
    )
    for place in range(4):
        observed = np.bincount(states[0][:, place], minlength=4)
        expected = COUNT * np.append(0.5 * probs[place], 0.5)
        assert stats.chisquare(observed, expected).pvalue > 1e-4
        observed = np.bincount(tokens[:, place], minlength=3)
        assert stats.chisquare(observed, COUNT * probs[place]).pvalue > 1e-4


def test_predictor_corrector_follows_its_law():
    kernels = [
        *(place_kernel(1 / 3), standing_step(1 / 3, 0.3)),
        *(place_kernel(1 / 2), standing_step(2 / 3, 0.3)),
        place_kernel(1.0),
    ]
    law = law_of(*kernels)
    assert total_variation(law, ancestral_law(3)) > 0.01
    sampler = predictor_corrector(1, 0.3)
    canvas = samplers.blank_canvas(COUNT, 4, MASK)
    check_frequencies(draw(toy_model, sampler, uniform_grid(3), canvas, seed=6), law)
    assert sampler.bias == "biased"
    # The correction is cut to what the level allows: sigma (2/3) / (1/3) <= 1.
    with jax.enable_x64(True):
        assert float(largest_remasking(jnp.log(2.0), jnp.log(2.0))) == pytest.approx(0.5)


def test_last_step_needs_no_correction():
    """Two steps with one correction: three passes; the correction at the last level costs none."""
    calls = []

    def model(inputs, logsnr, documents):
        jax.debug.callback(lambda level: calls.append(float(level[0, 0])), logsnr)
        return toy_model(inputs, logsnr, documents)

    canvas = samplers.blank_canvas(64, 4, MASK)
    draw(model, predictor_corrector(1, 0.5), uniform_grid(2), canvas, seed=0)
    jax.effects_barrier()
    # The last step is made at the same level as the correction before it.
    np.testing.assert_allclose(calls, [-LOGSNR_LIMIT, 0.0, 0.0], atol=1e-6)


# ---- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: remdm_loop(on=0.05, off=0.55), "0 < off < on < 1, got on=0.05, off=0.55"),
        (lambda: remdm_loop(eta=0.12), r"eta in \[0, 0.1111\].*survival_on=0.9 allows, got 0.12"),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_corrections_need_a_distribution():
    sampler = predictor_corrector(1, 0.1, samplers.temperature(0.0))
    canvas = samplers.blank_canvas(1, 4, MASK)
    with pytest.raises(ValueError, match="predictor_corrector draws from a distribution"):
        samplers.sample(
            jax.random.key(0), toy_model, sampler, uniform_grid(2), canvas, mask_id=MASK
        )
