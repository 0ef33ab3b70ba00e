"""Filters and the categorical draw, in particular its tail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdm_jax import samplers

PROBS = np.array([0.3, 0.5, 0.2])


def kept(token_filter, probs) -> list[bool]:
    logits = token_filter(jnp.log(jnp.asarray(probs, jnp.float32)))
    return np.isfinite(np.asarray(logits)).tolist()


@pytest.mark.parametrize(
    "mass, expected",
    [
        (0.6, [True, True, False]),  # the crossing token stays
        (0.49, [False, True, False]),
        (0.5, [False, True, False]),
        (0.51, [True, True, False]),
        (0.79, [True, True, False]),
        (0.81, [True, True, True]),
        (1e-6, [False, True, False]),
        (1.0, [True, True, True]),
    ],
)
def test_top_p_keeps_the_crossing_token(mass, expected):
    assert kept(samplers.top_p(mass), PROBS) == expected


def test_top_p_is_the_shortest_prefix():
    """Random distributions: mass reached, and not without the least likely kept token."""
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(20, 0.3), size=200)
    for mass in (0.1, 0.5, 0.9):
        keep = np.isfinite(samplers.top_p(mass)(jnp.log(jnp.asarray(probs, jnp.float32) + 1e-30)))
        total = np.where(keep, probs, 0).sum(-1)
        least = np.where(keep, probs, 2).min(-1)
        assert (total >= mass - 1e-6).all() and (total - least < mass + 1e-6).all()
        assert (least >= np.where(keep, 0, probs).max(-1)).all()


def test_ties_go_to_the_lower_id():
    flat = np.full(4, 0.25)
    assert kept(samplers.top_p(0.5), flat) == [True, True, False, False]
    assert kept(samplers.top_k(3), flat) == [True, True, True, False]
    assert kept(samplers.temperature(0), flat) == [True, False, False, False]
    assert kept(samplers.top_k(2), [0.2, 0.4, 0.2, 0.2]) == [True, True, False, False]


def test_top_k():
    assert kept(samplers.top_k(1), PROBS) == [False, True, False]
    assert kept(samplers.top_k(2), PROBS) == [True, True, False]
    assert kept(samplers.top_k(3), PROBS) == [True] * 3
    assert kept(samplers.top_k(100), PROBS) == [True] * 3


def test_temperature_and_composition():
    logits = jnp.log(jnp.asarray(PROBS, jnp.float32))
    half = np.asarray(jax.nn.softmax(samplers.temperature(0.5)(logits)))
    np.testing.assert_allclose(half, PROBS**2 / np.sum(PROBS**2), rtol=1e-6)
    np.testing.assert_array_equal(samplers.compose()(logits), logits)
    # Reading order: at temperature 1/2 the two likeliest tokens have the mass 0.895.
    assert kept(samplers.compose(samplers.temperature(0.5), samplers.top_p(0.89)), PROBS) == [
        True,
        True,
        False,
    ]
    assert (
        kept(samplers.compose(samplers.top_p(0.89), samplers.temperature(0.5)), PROBS) == [True] * 3
    )
    ruled_out = samplers.compose(samplers.top_k(1), samplers.temperature(3.0), samplers.top_p(0.5))
    assert kept(ruled_out, PROBS) == [False, True, False]


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: samplers.temperature(-1.0), r"in \[0, 1e6\], got -1.0"),
        (lambda: samplers.temperature(float("nan")), "got nan"),
        (lambda: samplers.temperature(float("inf")), "got inf"),
        (lambda: samplers.top_k(0), r"in \[1, 2e9\], got 0"),
        (lambda: samplers.top_p(0.0), r"\(0, 1\], got 0.0"),
        (lambda: samplers.top_p(1.5), "got 1.5"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def truncated_gumbel_law(probs: np.ndarray, floor: float) -> np.ndarray:
    """Law of the Gumbel-max winner when -log U is ``floor + Exp(1)`` instead of Exp(1)."""
    order = np.argsort(-probs, kind="stable")
    p = probs[order].astype(np.float64)
    inverse = np.append(1 / p, np.inf)
    total, r = np.cumsum(p), np.arange(1, len(p) + 1)
    # e^{rc} is multiplied in before subtracting: r c and c P_r / p_r are of one size.
    term = np.exp(r * floor - floor * total * inverse[:-1])
    term = term - np.exp(r * floor - floor * total * inverse[1:])
    law = np.empty_like(p)
    law[order] = p * np.cumsum((term / total)[::-1])[::-1]
    return law


def zipf_entropy(steps: int, floor: float) -> float:
    """Token entropy of mask-or-token drawing in one go, reveal probability 1/steps, Zipf(50257)."""
    probs = 1 / np.arange(1, 50_258)
    probs /= probs.sum()
    one_shot = probs if steps == 1 else np.append(probs / steps, 1 - 1 / steps)
    law = truncated_gumbel_law(one_shot, floor)[: len(probs)]
    law /= law.sum()
    return float(-np.sum(law * np.log(np.maximum(law, 1e-300))))


def test_truncated_gumbel_formula():
    law = truncated_gumbel_law(np.array([0.7, 0.25, 0.05]), 0.05)
    np.testing.assert_allclose(law, [0.74374493, 0.23488433, 0.02137075], atol=6e-9)
    np.testing.assert_allclose(truncated_gumbel_law(PROBS, 1e-13), PROBS, atol=1e-9)


@pytest.mark.parametrize(
    "steps, expected", [(1, 7.5381), (64, 6.5356), (1024, 4.8860), (8192, 3.5964)]
)
def test_what_the_default_draw_would_do(steps, expected):
    """Entropy of drawn tokens with the cut at 2**-23; without it the law has 7.5659 nats."""
    assert zipf_entropy(steps, 2.0**-23) == pytest.approx(expected, abs=6e-5)
    assert zipf_entropy(steps, 2.0**-46) == pytest.approx(7.5659, abs=6e-5)


def test_draw_keeps_the_tail():
    """2**18 tokens of probability 4e-8 next to one that takes the rest, 600 draws.

    Their mass is 0.0105, so 6.3 +- 2.5 draws are expected to fall into the tail. The default draw,
    cut off at 15.94, would put 0.3 there, and three or more in one seed of 300.
    """
    tail, probability, draws = 2**18, 4e-8, 600
    mass = tail * probability
    probs = np.append(1 - mass, np.full(tail, probability))
    logits = jnp.asarray(np.log(probs), jnp.float32)
    assert draws * (1 - truncated_gumbel_law(probs, 2.0**-23)[0]) < 0.4

    # The law is the same in all draws, so that its masses are summed once.
    draw = jax.jit(jax.vmap(lambda key: samplers.draw_tokens(key[None], logits[None])[0]))
    found = int(np.sum(np.asarray(draw(jax.random.split(jax.random.key(0), draws))) > 0))
    assert 3 <= found <= draws * mass + 5 * np.sqrt(draws * mass)
