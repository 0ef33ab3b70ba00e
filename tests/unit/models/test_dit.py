"""The DiT body: noise levels, inputs, masks and caches, gradients through the readout, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import corruption, models, objectives
from mdm_jax.models.cross_entropy import Chunking
from mdm_jax.models.dit import LEAST_SURVIVAL, noise_features
from mdm_jax.training.step import linen_init
from mdm_jax.variance.transform import draw_batch

ROWS, LENGTH = 4, tiny.LENGTH


def dit(**settings):
    chosen = {"vocab_size": tiny.VOCAB, "width": 16, "depth": 2, "num_heads": 2} | settings
    return models.DiT(models.DiTConfig(condition_width=8, **chosen))


@functools.cache
def conditioned():
    model = dit(condition_on_logsnr=True)
    return model, tiny.parameters(model, LENGTH)


def tokens(seed=0, rows=ROWS):
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (rows, LENGTH), np.int32)


@functools.cache
def jitted_attend():
    return tiny.jit(functools.partial(conditioned()[0].apply, method="attend"))


def attend(inputs, sigma, **options):
    options["sigma"] = np.full((len(inputs), 1), sigma, np.float32)
    return jitted_attend()(conditioned()[1], inputs, None, np.arange(LENGTH), None, **options)[0]


@pytest.mark.parametrize("scan_layers", [False, True])
def test_every_parameter_has_logical_axes_and_the_dtype_asked_for(scan_layers):
    model = dit(scan_layers=scan_layers, param_dtype=jnp.bfloat16)
    boxed = jax.eval_shape(linen_init(model, LENGTH), jax.random.key(0))
    boxes = jax.tree.leaves(boxed, is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))
    assert len(boxes) == 4 + 3 * 2 + (12 if scan_layers else 24)
    for box in boxes:
        assert isinstance(box, nn.meta.AxisMetadata) and box.unbox().dtype == jnp.bfloat16
        assert len(box.get_partition_spec()) == box.unbox().ndim


def test_scanned_layers_equal_unrolled_ones():
    model, params = conditioned()
    flat = params["params"]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), flat["block_0"], flat["block_1"])
    scanned = {k: v for k, v in flat.items() if not k.startswith("block_")}
    scanned = {"params": scanned | {"blocks": {"block": stacked}}}
    inputs, level = tokens(), np.zeros((ROWS, 2), np.float32)
    expected = tiny.jit(model.apply)(params, inputs, level)
    found = tiny.jit(dit(condition_on_logsnr=True, scan_layers=True).apply)(scanned, inputs, level)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_levels_are_minus_the_log_of_the_survival_probability():
    """At time t of the log-linear schedule, -log(1 - (1 - eps) t); the ends are finite."""
    model, params = conditioned()
    times = np.array([1e-3, 0.3, 0.9, 1.0])
    survival = 1 - (1 - LEAST_SURVIVAL) * times
    logsnr = np.log(survival / (1 - survival))[:, None].astype(np.float32)
    run = tiny.jit(model.apply)
    found = run(params, tokens(), logsnr)
    for row, t in enumerate(times):
        expected = attend(tokens(), -np.log1p(-(1 - LEAST_SURVIVAL) * t))
        np.testing.assert_allclose(found[row], expected[row], atol=1e-5)
    ends = run(params, tokens(), np.array([[np.inf], [-np.inf], [-30.0], [30.0]], np.float32))
    for row, sigma in enumerate([0.0, -np.log(LEAST_SURVIVAL), -np.log(LEAST_SURVIVAL), 0.0]):
        np.testing.assert_allclose(ends[row], attend(tokens(), sigma)[row], atol=1e-5)
    assert np.abs(attend(tokens(), 0.0) - attend(tokens(), 1.0)).max() > 1e-2


def test_segments_have_levels_of_their_own():
    model, params = conditioned()
    alone = np.eye(LENGTH, dtype=bool)[None, None]
    run = tiny.jit(functools.partial(model.apply, method="attend"))
    levels = np.array([[-1.0, 2.0]] * ROWS, np.float32)
    found, _ = run(params, tokens(), levels, np.arange(LENGTH), alone)
    for part, level in ((slice(0, 3), -1.0), (slice(3, 6), 2.0)):
        same = np.full((ROWS, 2), level, np.float32)
        expected, _ = run(params, tokens(), same, np.arange(LENGTH), alone)
        np.testing.assert_allclose(found[:, part], expected[:, part], atol=1e-5)


def test_features_are_cosines_then_sines():
    found = noise_features(jnp.array([[0.0, 2.0]]))
    angles = 2 * 1e4 ** (-np.arange(128) / 128)
    expected = [[*np.ones(128), *np.zeros(128)], [*np.cos(angles), *np.sin(angles)]]
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


def test_an_unconditioned_model_has_the_same_parameters_at_sigma_0():
    _, params = conditioned()
    plain = tiny.jit(dit().apply)
    levels = np.zeros((ROWS, 1), np.float32)
    expected = attend(tokens(), 0.0)
    np.testing.assert_allclose(plain(params, tokens(), levels), expected, atol=1e-5)


def test_probabilities_and_weighted_tokens_mix_embeddings():
    pairs = np.stack([tokens(1), tokens(2)], axis=-1)
    weights = np.random.default_rng(3).uniform(size=pairs.shape).astype(np.float32)
    one_hot = np.eye(tiny.VOCAB, dtype=np.float32)
    mixed = attend(pairs, 0.5, weights=weights)
    dense = attend((one_hot[pairs] * weights[..., None]).sum(-2), 0.5)
    np.testing.assert_allclose(mixed, dense, atol=1e-5)
    np.testing.assert_allclose(attend(one_hot[tokens()], 0.5), attend(tokens(), 0.5), atol=1e-5)


def test_attention_stays_within_documents():
    model, params = conditioned()
    documents = np.array([[1, 1, 2, 2, 2, 0]] * ROWS, np.int32)
    run, level = tiny.jit(model.apply), np.zeros((ROWS, 1), np.float32)
    other = tokens()
    other[:, 2:] = (other[:, 2:] + 1) % tiny.VOCAB
    before, after = (run(params, ids, level, documents) for ids in (tokens(), other))
    np.testing.assert_allclose(before[:, :2], after[:, :2], atol=1e-6)
    assert np.abs(before[:, 2:] - after[:, 2:]).max() > 1e-2


def test_decoding_with_a_cache_equals_the_pass_over_all_blocks():
    model, params = conditioned()
    noised, clean, size = tokens(1), tokens(2), 2
    levels = np.random.default_rng(4).normal(size=(ROWS, 3)).astype(np.float32)
    documents = np.ones((ROWS, LENGTH), np.int32)
    apply, decoder = models.block_apply(model, size), models.cached_block_decoder(model, size)

    def decode(params):
        memory, found = decoder.init(ROWS, LENGTH), []
        for block in range(3):
            at = np.s_[:, block * size : (block + 1) * size]
            level = levels[:, block : block + 1]
            found.append(decoder.logits(params, memory, noised[at], level, documents[at]))
            memory = decoder.append(params, memory, clean[at], documents[at])
        return jnp.concatenate(found, axis=1)

    whole = tiny.jit(apply)(params, np.concatenate([noised, clean], 1), levels, documents)
    np.testing.assert_allclose(tiny.jit(decode)(params), whole, atol=1e-5)


@pytest.mark.slow
def test_a_readout_gives_the_losses_and_gradients_of_logits():
    """The bias of the output included, for a loss through the whole network."""
    model = dit(condition_on_logsnr=True, depth=1)
    params = tiny.parameters(model, LENGTH)
    objective = objectives.masked_nelbo(corruption.fixed_count(tiny.MASK_ID))
    spec, chain = objective.spec(8, LENGTH), tiny.transform()
    batch = jax.tree.map(jnp.asarray, tiny.batch(8))

    def losses(params):
        draw = draw_batch(jax.random.key(1), chain, chain.init(spec), spec)

        def loss(params, apply):
            return objectives.sum_losses(
                draw, objective.loss(functools.partial(apply, params), batch, draw)
            ).loss

        applies = model.apply, models.readout_apply(model, Chunking(groups=2, positions=5))
        return [jax.value_and_grad(loss)(params, apply) for apply in applies]

    dense, found = tiny.jit(losses)(params)
    assert np.abs(dense[1]["params"]["head_bias"]).max() > 1e-3
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.max(jnp.abs(b))) + 1e-7)


def test_bfloat16_products_are_close_to_float32():
    _, params = conditioned()
    level = np.zeros((ROWS, 1), np.float32)
    rounded = dit(condition_on_logsnr=True, dtype=jnp.bfloat16)
    found = tiny.jit(rounded.apply)(params, tokens(), level)
    expected = tiny.jit(conditioned()[0].apply)(params, tokens(), level)
    assert found.dtype == np.float32
    assert 1e-4 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()


def test_a_fresh_model_predicts_all_tokens_alike():
    """Its blocks are identities and its output is zero (adaLN-zero)."""
    model = dit(depth=1)
    logits, params = tiny.jit(model.init_with_output)(jax.random.key(0), tokens())
    params = nn.meta.unbox(params)["params"]
    assert not np.any(params["block_0"]["modulation"]["kernel"]) and not np.any(logits)
    assert np.all(params["norm"]["scale"] == 1) and np.std(params["embedding"]) > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 18}, r"multiple of 2 \* num_heads = 4"),
        ({"num_heads": 0}, "num_heads"),
        ({"attention": "nope"}, "attention"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        dit(**settings)


def test_calls_that_it_cannot_answer_are_refused():
    model, params = conditioned()
    with pytest.raises(ValueError, match="no self-conditioning"):
        model.apply(params, tokens(), np.zeros((ROWS, 1)), None, np.zeros((ROWS, LENGTH, 7)))
    with pytest.raises(ValueError, match="one noise level per row"):
        model.apply(params, tokens())
