"""The uniform-token process, the two readings of a network, and its estimate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uniform_oracle as oracle
import zoo
from scipy import stats

from mdm_jax import variance
from mdm_jax.corruption.uniform import leave_one_out, own_evidence, token_estimate, uniform_tokens
from mdm_jax.draws import DrawSpec
from mdm_jax.testing import toys
from mdm_jax.testing.toys import row_denoiser
from mdm_jax.variance.transform import EmptyState


def corrupt(x, logsnr, noise, eligible, num_tokens=3, level_ids=None):
    run = zoo.quick(uniform_tokens(num_tokens).corrupt)
    arguments = (jnp.asarray(a) for a in (x, logsnr, noise, eligible))
    return jax.tree.map(np.asarray, run(*arguments, level_ids))


@pytest.mark.parametrize("num_tokens", [2, 3, 7])
def test_law_of_a_noisy_token(num_tokens):
    """Every cell of a lattice over both base noises once: the law to the lattice's width."""
    side = 84 * 5
    lattice = (np.arange(side) + 0.5) / side
    noise = np.stack(np.meshgrid(lattice, lattice), -1).reshape(-1, 1, 2).astype(np.float32)
    x = np.ones((len(noise), 1), np.int32)
    for survival in (0.25, 0.9):
        logsnr = np.full((len(noise), 1), np.log(survival / (1 - survival)), np.float32)
        found = corrupt(x, logsnr, noise, x > 0, num_tokens)
        law = np.bincount(found.inputs[:, 0], minlength=num_tokens) / len(noise)
        np.testing.assert_allclose(law, oracle.kernel(survival, num_tokens)[1], atol=1e-6)
        assert found.target_mask.all() and not found.log_weight.any()


def test_only_eligible_places_change_and_special_tokens_are_never_drawn():
    """Ids from K on may stand on padding; at m = 1 every real token comes up (chi-square, 1e-4)."""
    rng = np.random.default_rng(0)
    x = np.where(np.arange(20) < 12, 1, 6)[None].repeat(500, 0).astype(np.int32)
    eligible = np.broadcast_to(np.arange(20) < 9, x.shape)
    noise = rng.uniform(size=(*x.shape, 2)).astype(np.float32)
    noise[0, 0] = [0.0, np.float32(1 - 2**-24)]  # the last point of the grid is a token too
    found = corrupt(x, np.full((500, 1), -np.inf, np.float32), noise, eligible, 5)
    assert (found.inputs[~eligible] == x[~eligible]).all()
    assert (found.target_mask == eligible).all()
    counts = np.bincount(found.inputs[eligible])
    assert len(counts) == 5 and stats.chisquare(counts).pvalue > 1e-4
    clean = corrupt(x, np.full((500, 1), np.inf, np.float32), noise, eligible, 5)
    assert (clean.inputs == x).all()


def test_segments_have_their_own_level():
    x = np.zeros((1, 8), np.int32)
    noise = np.full((1, 8, 2), 0.5, np.float32)
    levels, eligible = np.array([[-1.0, 1.0]], np.float32), np.ones((1, 8), bool)
    found = corrupt(x, levels, noise, eligible)
    assert found.inputs.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    ids = jnp.array([[0, 1] * 4])
    assert corrupt(x, levels, noise, eligible, level_ids=ids).inputs.tolist() == [[1, 0] * 4]
    assert found.log_weight.shape == (1, 2)


def test_mirrored_views_replace_disjoint_sets():
    """Up to m = 1/2 no place is replaced twice; the tokens drawn are v and K - 1 - v."""
    transform, spec = variance.mirror(), DrawSpec(50, 1, (6, 2))
    draw = zoo.quick(lambda key: variance.draw_batch(key, transform, EmptyState(), spec))(
        jax.random.key(0)
    )
    x = np.full((1, 50, 6), 7, np.int32)  # marks what was kept
    for logsnr in (0.3, 0.0, -np.inf):
        level = np.full((2, 50, 1), logsnr, np.float32)
        views = corrupt(x, level, draw.noise, x > 0, 5).inputs
        kept = views == 7
        if logsnr >= 0:
            assert (kept[0] | kept[1]).all()
        else:
            assert (views.sum(0) == 4).all()


def test_own_evidence_is_the_log_likelihood_ratio():
    for survival in (1e-6, 0.5, 0.999):
        single = oracle.kernel(survival, 4)
        level = np.log(survival) - np.log1p(-survival)
        expected = np.log(single[0, 0] / single[1, 0])
        np.testing.assert_allclose(own_evidence(level, 4), expected, rtol=2e-4)


def test_leave_one_out_takes_the_own_token_out_of_a_posterior():
    """The posterior of every noisy row by Bayes over the toy's three rows, given as a network."""
    noisy = oracle.states(4, 3)
    survival = np.array([0.3, 0.8])
    single = oracle.kernel(survival, 3)
    # Places 0, 1 are noised at the first level, 2, 3 at the second.
    match = [single[i // 2][np.array(toys.ROWS)[:, i]][:, noisy[:, i]] for i in range(4)]
    joint = np.array(toys.ROW_PROBABILITIES)[:, None] * np.prod(match, axis=0)
    clean = np.eye(3)[np.array(toys.ROWS)]
    posterior = np.einsum("jn,jlk->nlk", joint / joint.sum(0), clean)
    calls = []

    def network(inputs, logsnr, documents, **further):
        calls.append(further)
        return jnp.log(jnp.maximum(posterior, 1e-300))

    with jax.enable_x64(True):
        logsnr = jnp.tile(jnp.log(survival / (1 - survival)), (81, 1))
        found = leave_one_out(network, 3)(jnp.asarray(noisy), logsnr, None, estimate=5)
        found, expected = jax.nn.softmax(found), row_denoiser()(jnp.asarray(noisy), logsnr)
        np.testing.assert_allclose(found, jnp.exp(expected), atol=1e-12)
    assert calls == [{"estimate": 5}]


def test_estimate_is_a_law_over_real_tokens_without_gradient():
    logits = jnp.array([[0.0, 1.0, 2.0, 50.0, -jnp.inf]])
    estimate = token_estimate(logits, 3)
    np.testing.assert_allclose(estimate[0, :3], jax.nn.softmax(jnp.arange(3.0)), rtol=1e-6)
    np.testing.assert_array_equal(estimate[0, 3:], 0)
    gradient = jax.grad(lambda a: jnp.sum(jnp.square(token_estimate(a, 3))))(logits)
    np.testing.assert_array_equal(gradient, 0)
    with pytest.raises(ValueError, match="5 logits are too few for 6 tokens"):
        token_estimate(logits, 6)


def test_errors():
    for count in (1, 0, 2**23 + 1):
        with pytest.raises(ValueError, match=f"2 <= num_tokens <= .*, got {count}"):
            uniform_tokens(count)
    ones = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="needs integer tokens, got float32"):
        uniform_tokens(3).corrupt(ones, ones[:, :1], ones, ones > 0)
