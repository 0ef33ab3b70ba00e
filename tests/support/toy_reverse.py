"""The toy's reverse processes by enumeration: laws over its 256 states as products of matrices.

State number = base-4 digits of the four places, 3 for the mask. A step in which every place changes
on its own is :func:`place_kernel`; one that fills a set of places :func:`fill_kernel`.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from mdm_jax import samplers
from mdm_jax.samplers.ancestral import reveal_probability
from mdm_jax.testing import toys

MASK = toys.MASK_ID
STATES = np.array(list(itertools.product(range(4), repeat=4)))  # number = base-4 digits
BLANK = 255
CLEAN = np.flatnonzero((STATES != MASK).all(1))
ROWS = [int(np.dot(row, [64, 16, 4, 1])) for row in toys.ROWS]


def toy_model(inputs, logsnr, documents):
    return toys.Toy().apply(toys.toy_params(), inputs)


def uniform_grid(steps: int) -> np.ndarray:
    """logSNR of masking rates 1, 1 - 1/N, ..., 0."""
    clean = np.arange(steps + 1) / steps
    with np.errstate(divide="ignore"):
        return (np.log(clean) - np.log1p(-clean)).astype(np.float32)


def draw(model, sampler, grid, canvas, seed, mask_id=MASK) -> np.ndarray:
    """``sample``, compiled: one small program instead of a hundred operations."""
    run = jax.jit(
        lambda key, canvas: samplers.sample(key, model, sampler, grid, canvas, mask_id=mask_id)
    )
    return np.asarray(run(jax.random.key(seed), canvas))


def draw_with_trace(model, sampler, grid, canvas, seed, trace, mask_id=MASK):
    """``sample_with_trace``, compiled; NumPy arrays."""
    run = jax.jit(
        lambda key, canvas: samplers.sample_with_trace(
            key, model, sampler, grid, canvas, trace, mask_id=mask_id
        )
    )
    return jax.tree.map(np.asarray, run(jax.random.key(seed), canvas))


@functools.cache
def token_probabilities() -> np.ndarray:
    """[256, 4, 4] float64: the toy's distribution at each place of each state, 0 for the mask."""
    with jax.enable_x64(True):
        params, model = toys.toy_params(jnp.float64), toys.Toy(jnp.float64)
        run = jax.jit(lambda states: jax.nn.softmax(model.apply(params, states), axis=-1))
        probs = np.asarray(run(STATES))
    return np.pad(probs, [(0, 0), (0, 0), (0, 1)])


def place_kernel(reveal, remask=0.0, probabilities=None) -> np.ndarray:
    """[256, 256] transition matrix: masked places are revealed and revealed ones masked.

    With a probability for all, or one for each place of each state [256, 4]; tokens come from
    ``probabilities`` [256, 4, 4], by default the toy's.
    """
    if probabilities is None:
        probabilities = token_probabilities()
    reveal, remask = (np.broadcast_to(p, STATES.shape)[..., None] for p in (reveal, remask))
    stay, masked = np.eye(4)[STATES], (STATES == MASK)[..., None]
    filled = reveal * probabilities + (1 - reveal) * stay
    cleared = remask * np.eye(4)[MASK] + (1 - remask) * stay
    places = np.where(masked, filled, cleared)
    return np.einsum("na,nb,nc,nd->nabcd", *places.transpose(1, 0, 2)).reshape(256, 256)


def fill_kernel(places: np.ndarray) -> np.ndarray:
    """[256, 256] transition matrix that fills, in each state, the masked ones of ``places``."""
    return place_kernel(np.asarray(places, float))


def entropy(law: np.ndarray) -> float:
    """Nats."""
    return -float(np.sum(law[law > 0] * np.log(law[law > 0])))


def total_variation(law: np.ndarray, other: np.ndarray) -> float:
    """Half the sum of absolute differences."""
    return float(np.abs(law - other).sum()) / 2


@functools.cache
def ancestral_law(steps: int) -> np.ndarray:
    """[256] law of the ancestral sampler on the uniform grid, by the sampler's own rule."""
    rate = 1 - np.arange(steps + 1) / steps
    with jax.enable_x64(True), np.errstate(divide="ignore"):
        logsnr = jnp.asarray(np.log1p(-rate) - np.log(rate))
        reveal = np.asarray(reveal_probability(logsnr[:-1], logsnr[1:]))
    law = np.eye(256)[BLANK]
    for r in reveal:
        law = law @ place_kernel(r)
    return law


@functools.cache
def one_by_one_law() -> np.ndarray:
    """[256] law of filling a uniformly chosen place at a time."""
    law = np.eye(256)[BLANK]
    for _ in range(4):
        new = np.zeros(256)
        for state in np.flatnonzero(law):
            places = np.flatnonzero(STATES[state] == MASK)
            for place, token in itertools.product(places, range(3)):
                target = state + (token - MASK) * 4 ** (3 - place)
                share = token_probabilities()[state, place, token] / len(places)
                new[target] += law[state] * share
        law = new
    return law


def check_frequencies(tokens, law: np.ndarray) -> None:
    """Chi-square over the 81 outcomes (level 1e-4), and 5 standard errors on the data rows.

    Outcomes expected fewer than five times count as one.
    """
    number = np.asarray(tokens) @ np.array([64, 16, 4, 1])
    observed = np.bincount(number, minlength=256)
    assert observed[CLEAN].sum() == len(tokens)
    expected = len(tokens) * law
    rare = expected < 5
    assert not observed[law < 1e-15].any()
    for row in ROWS:
        assert abs(observed[row] - expected[row]) <= 5 * np.sqrt(expected[row] * (1 - law[row]))
    observed, expected = (np.append(a[~rare], a[rare].sum()) for a in (observed, expected))
    some = expected > 0
    assert stats.chisquare(observed[some], expected[some]).pvalue > 1e-4
