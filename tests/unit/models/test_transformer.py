"""The transformer: axis names, scanning, masks, conditioning, embeddings, precision, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec
from variants import slow_except

from mdm_jax.models.layers import (
    Linear,
    Norm,
    apply_rotary,
    gelu,
    logsnr_features,
    rotary_embedding,
)
from mdm_jax.models.transformer import Transformer, TransformerConfig
from mdm_jax.sharding import LOGICAL_RULES
from mdm_jax.training.step import linen_init, num_params

ROWS, LENGTH = 4, 10
VARIANTS = {
    "plain": {},
    "swiglu_layer_norm": {"mlp": "swiglu", "norm": "layer"},
    "tied": {"tie_embeddings": True},
    "conditioned": {"condition_on_logsnr": True},
    "qk_norm": {"qk_norm": True},
    "learned_positions": {"learned_positions": LENGTH},
    "scanned": {"scan_layers": True, "depth": 3},
    "scanned_conditioned": {"scan_layers": True, "depth": 2, "condition_on_logsnr": True},
    "bfloat16": {"dtype": jnp.bfloat16},
    "low_parameters": {"param_dtype": jnp.bfloat16},
}
WHOLE = np.ones((ROWS, LENGTH), np.int32)


@functools.cache
def _made(name):
    """(model, random parameters: fresh ones are zero in places)."""
    model = tiny.transformer(**VARIANTS[name])
    return model, tiny.parameters(model, LENGTH)


@functools.cache
def _jitted(name):
    return tiny.jit(_made(name)[0].apply)


def _inputs(seed=0):
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, (ROWS, LENGTH), np.int32)


def _apply(name, inputs, logsnr=None, documents=WHOLE):
    logsnr = np.zeros((len(inputs), 1), np.float32) if logsnr is None else logsnr
    return np.asarray(_jitted(name)(_made(name)[1], inputs, logsnr, documents))


@pytest.mark.parametrize(
    "name", slow_except(set(VARIANTS) - {"scanned", "tied", "low_parameters"}, VARIANTS)
)
def test_logits_are_float32_of_the_right_shape_and_depend_on_context(name):
    inputs = _inputs()
    logits = _apply(name, inputs)
    assert logits.shape == (ROWS, LENGTH, tiny.VOCAB) and logits.dtype == np.float32
    assert np.all(np.isfinite(logits))
    other = inputs.copy()
    other[:, 3] = (inputs[:, 3] + 1) % tiny.VOCAB
    changed = _apply(name, other)
    moved = np.abs(changed - logits).max(-1)
    assert np.all(moved > 1e-4)  # every position depends on position 3, before and after it


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_a_logical_axis_for_every_dimension(name):
    model = tiny.transformer(**VARIANTS[name])
    boxed = jax.eval_shape(linen_init(model, LENGTH), jax.random.key(0))
    known = {axis for axis, _ in LOGICAL_RULES}
    boxes = jax.tree.leaves(boxed, is_leaf=lambda node: isinstance(node, nn.meta.AxisMetadata))
    assert len(boxes) > 5
    for box in boxes:
        assert isinstance(box, nn.meta.AxisMetadata)  # no parameter without names
        spec = box.get_partition_spec()
        assert len(spec) == box.unbox().ndim
        assert set(spec) <= known | {None}
        assert box.unbox().dtype == model.config.param_dtype
    specs = jax.tree.leaves(
        nn.get_partition_spec(boxed), is_leaf=lambda node: isinstance(node, PartitionSpec)
    )
    assert [len(spec) for spec in specs] == [box.unbox().ndim for box in boxes]
    layered = [box for box in boxes if "layers" in box.get_partition_spec()]
    assert bool(layered) == model.config.scan_layers
    assert all(box.unbox().shape[0] == model.config.depth for box in layered)


def test_learned_positions_distinguish_equal_tokens():
    """Of equal tokens every value is the same, however far apart they are."""
    inputs = np.zeros((ROWS, LENGTH), np.int32)
    rotary, learned = (_apply(name, inputs) for name in ("plain", "learned_positions"))
    np.testing.assert_allclose(rotary, np.broadcast_to(rotary[:, :1], rotary.shape), atol=1e-5)
    assert np.all(np.abs(learned[:, 1:] - learned[:, :-1]).max(-1) > 1e-3)


def test_learned_positions_of_a_part_are_those_in_the_row():
    model, params = _made("learned_positions")
    inputs, alone = _inputs()[:1], np.eye(LENGTH, dtype=bool)[None, None]
    attend = tiny.jit(functools.partial(model.apply, method="attend"))
    whole, _ = attend(params, inputs, None, np.arange(LENGTH), alone)
    part, _ = attend(params, inputs[:, 4:7], None, np.arange(4, 7), alone[..., :3, :3])
    np.testing.assert_allclose(part, whole[:, 4:7], atol=1e-5)


def test_rows_longer_than_the_learned_positions_are_refused():
    model, params = _made("learned_positions")
    with pytest.raises(ValueError, match="11 tokens is longer than learned_positions=10"):
        model.apply(params, jnp.zeros((1, 11), jnp.int32))
    far = jnp.arange(1, LENGTH + 1)
    logits, _ = jax.jit(functools.partial(model.apply, method="attend"))(
        params, jnp.zeros((1, LENGTH), jnp.int32), None, far, None
    )
    assert np.all(np.isnan(logits))


@pytest.mark.parametrize(
    "name", slow_except({"scanned_conditioned"}, ["scanned", "scanned_conditioned"])
)
def test_scanned_layers_equal_unrolled_ones(name):
    model, params = _made(name)
    settings = {**VARIANTS[name], "scan_layers": False}
    stacked = params["params"]["blocks"]["block"]
    unrolled = {k: v for k, v in params["params"].items() if k != "blocks"}
    for i in range(model.config.depth):
        unrolled[f"block_{i}"] = jax.tree.map(lambda leaf, i=i: np.asarray(leaf)[i], stacked)
    other = tiny.transformer(**settings)
    expected = jax.eval_shape(linen_init(other, LENGTH), jax.random.key(0))
    assert jax.tree.structure(nn.meta.unbox(expected)) == jax.tree.structure({"params": unrolled})
    logsnr = np.linspace(-3.0, 3.0, ROWS, dtype=np.float32)[:, None]
    out = tiny.jit(other.apply)({"params": unrolled}, _inputs(), logsnr, WHOLE)
    np.testing.assert_allclose(out, _apply(name, _inputs(), logsnr), rtol=2e-5, atol=2e-5)
    first, second = np.asarray(stacked["mlp"]["up"]["kernel"])[:2]
    assert not np.allclose(first, second)  # layers are not copies of each other


# --- documents ----------------------------------------------------------------------------------

DOCUMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0]] * ROWS, np.int32)


@pytest.mark.parametrize(
    "name",
    slow_except(
        {"plain", "conditioned", "bfloat16"}, ["plain", "conditioned", "scanned", "bfloat16"]
    ),
)
def test_attention_stays_within_documents(name):
    inputs = _inputs()
    logits = _apply(name, inputs, documents=DOCUMENTS)
    assert np.all(np.isfinite(logits))
    for document in (0, 1, 2, 3):
        inside = np.asarray(DOCUMENTS[0] == document)
        other = np.where(inside[None], (inputs + 1) % tiny.VOCAB, inputs)
        changed = _apply(name, other, documents=DOCUMENTS)
        np.testing.assert_array_equal(changed[:, ~inside], logits[:, ~inside])
        assert np.all(np.abs(changed[:, inside] - logits[:, inside]).max(-1) > 1e-3)


def test_no_documents_is_one_document():
    without = _apply("plain", _inputs(), documents=None)
    np.testing.assert_allclose(_apply("plain", _inputs()), without, rtol=1e-5, atol=1e-6)


def test_a_row_of_padding_has_a_finite_gradient():
    model, params = _made("plain")
    empty = np.zeros((ROWS, LENGTH), np.int32)
    gradient = tiny.jit(jax.grad(lambda p: jnp.sum(model.apply(p, _inputs(), None, empty) ** 2)))(
        params
    )
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


# --- conditioning -------------------------------------------------------------------------------


def test_conditioning_changes_the_output_at_every_level():
    levels = np.asarray([[-np.inf], [-2.0], [0.5], [np.inf]], np.float32)
    row = np.repeat(_inputs()[:1], ROWS, axis=0)
    logits = _apply("conditioned", row, levels)
    assert np.all(np.isfinite(logits))
    for i in range(ROWS):
        for j in range(i):
            assert np.abs(logits[i] - logits[j]).max() > 1e-3
    infinite = _apply("conditioned", row, np.asarray([[-np.inf], [np.inf]] * 2, np.float32))
    clipped = _apply("conditioned", row, np.asarray([[-20.0], [20.0]] * 2, np.float32))
    np.testing.assert_array_equal(infinite, clipped)


def test_a_fresh_conditioned_model_starts_as_the_identity():
    """adaLN-zero: blocks add nothing, and the level has no effect yet."""
    model = tiny.transformer(condition_on_logsnr=True, tie_embeddings=True)
    init, apply = tiny.jit(linen_init(model, LENGTH)), tiny.jit(model.apply)
    params = nn.meta.unbox(init(jax.random.key(0)))
    first, second = (
        apply(params, _inputs(), np.full((ROWS, 1), level, np.float32), WHOLE)
        for level in (-3.0, 3.0)
    )
    np.testing.assert_array_equal(first, second)
    table = np.asarray(params["params"]["embedding"], np.float64)
    x = table[np.asarray(_inputs())]
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) @ table.T
    np.testing.assert_allclose(first, expected, rtol=1e-4, atol=1e-5)


def test_an_unconditioned_model_ignores_the_level():
    levels = np.linspace(-5.0, 5.0, ROWS, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(_apply("plain", _inputs(), levels), _apply("plain", _inputs()))


@pytest.mark.parametrize("logsnr", [None, jnp.zeros((ROWS, 3))], ids=["none", "three"])
def test_a_conditioned_model_needs_levels_that_divide_the_row(logsnr):
    model, params = _made("conditioned")
    with pytest.raises(ValueError, match=r"one noise level per row, logsnr \[N, 1\], or one per"):
        model.apply(params, _inputs(), logsnr, None)


def test_level_features_tell_levels_apart():
    levels = np.linspace(-12.0, 12.0, 241, dtype=np.float32)
    features = np.asarray(tiny.jit(lambda s: logsnr_features(s, 16))(levels))
    assert features.shape == (241, 16) and np.all(np.abs(features) <= 1)
    distance = np.abs(features[:, None] - features[None]).max(-1) + np.eye(241)
    assert distance.min() > 1e-3


# --- embeddings, feed-forward, precision --------------------------------------------------------


def test_tied_embeddings_have_no_head_and_read_the_table():
    _, tied = _made("tied")
    _, plain = _made("plain")
    assert "head" not in tied["params"]
    assert num_params(plain) - num_params(tied) == 16 * tiny.VOCAB
    params = tied
    table = np.array(params["params"]["embedding"])
    table[tiny.MASK_ID] += 1.0
    # The mask token's output row, which no input refers to, moves its own logit only.
    params = {"params": {**params["params"], "embedding": table}}
    inputs = np.minimum(_inputs(), tiny.MASK_ID - 1)
    level = np.zeros((ROWS, 1), np.float32)
    changed = np.asarray(_jitted("tied")(params, inputs, level, WHOLE)) - _apply("tied", inputs)
    assert np.all(np.abs(changed[..., :-1]) < 1e-5) and np.all(np.abs(changed[..., -1]) > 0)


def test_swiglu_has_as_many_parameters_as_gelu():
    gelu = TransformerConfig(vocab_size=5, width=96, num_heads=2)
    swiglu = TransformerConfig(vocab_size=5, width=96, num_heads=2, mlp="swiglu")
    assert (gelu.hidden, swiglu.hidden) == (384, 256)
    counts = [
        num_params(jax.eval_shape(linen_init(Transformer(c), 4), jax.random.key(0)))
        for c in (gelu, swiglu)
    ]
    assert counts[0] == counts[1]


def test_bfloat16_products_are_close_to_float32():
    _, params = _made("plain")
    exact = _apply("plain", _inputs())
    logits = np.asarray(
        _jitted("bfloat16")(params, _inputs(), np.zeros((ROWS, 1), np.float32), WHOLE)
    )
    error = np.abs(logits - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 3e-2  # rounded, and no more than that


def test_products_of_bfloat16_accumulate_in_float32():
    """Four thousand ones: bfloat16 sums stall at 256."""
    layer = Linear(2, axes=("embed", "mlp"), dtype=jnp.bfloat16)
    x = np.ones((1, 4097), np.float32)
    out = tiny.jit(layer.apply)({"params": {"kernel": np.ones((4097, 2), np.float32)}}, x)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 4097.0)


def test_gradients_of_queries_keys_and_values_are_joined_without_padding():
    """Of three slices they would be three padded arrays, a seventh of a step on a CPU."""
    model = tiny.transformer()
    params, inputs = tiny.parameters(model, 6), jnp.zeros((1, 6), jnp.int32)
    gradient = jax.grad(lambda p: jnp.sum(model.apply(p, inputs)))
    text = jax.jit(gradient).lower(params).as_text()
    width = model.config.width
    assert "stablehlo.pad" not in text and f"1x6x3x{width}xf32" in text


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_computed_in_float32(kind):
    x = np.random.default_rng(0).normal(3.0, 2.0, (5, 64)).astype(jnp.bfloat16)
    params = {"params": {"scale": np.ones(64, np.float32)}}
    out = np.asarray(tiny.jit(Norm(kind).apply)(params, x))
    y = np.asarray(x, np.float64)
    y = y - y.mean(-1, keepdims=True) if kind == "layer" else y
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6), rtol=1e-5)


# --- rotary positions ---------------------------------------------------------------------------


@functools.partial(tiny.jit, static_argnames="base")
def rotary(x, positions, base=10_000.0):
    return apply_rotary(x, rotary_embedding(positions, x.shape[-1], base))


def test_rotary_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(1, 1, 2, 8)).astype(np.float32) for _ in range(2))

    def rotated(x, position):
        return np.asarray(rotary(x, np.asarray([position]), 100.0))

    def product(i, j):
        return np.sum(rotated(q, i) * rotated(k, j), -1)[0, 0]

    for distance in (-3, 0, 1, 7):
        expected = product(0, distance) if distance >= 0 else product(-distance, 0)
        np.testing.assert_allclose(product(20, 20 + distance), expected, rtol=1e-4, atol=1e-4)
    assert not np.allclose(product(0, 1), product(0, 2))
    assert not np.allclose(product(0, 1), product(1, 0))  # it knows left from right
    np.testing.assert_allclose(rotated(q, 0), q, rtol=1e-6)
    norms = np.linalg.norm(rotated(q, 13), axis=-1)
    np.testing.assert_allclose(norms, np.linalg.norm(q, axis=-1), rtol=1e-5)


def test_rotary_positions_may_differ_between_rows():
    x = np.random.default_rng(1).normal(size=(2, 3, 1, 4)).astype(np.float32)
    positions = np.asarray([[0, 1, 2], [5, 3, 1]])
    together = rotary(x, positions)
    for row in range(2):
        alone = rotary(x[row : row + 1], positions[row])
        np.testing.assert_allclose(together[row : row + 1], alone, rtol=1e-6)


@pytest.mark.parametrize("positions", [[0, 1, 2, 700], [[0, 5], [3, 9000]]])
def test_known_positions_rotate_as_traced_ones(positions):
    """Both round the angle p f to float32; the sine of either then errs by a few 2^-24."""
    known = rotary_embedding(np.asarray(positions), 8)
    traced = jax.jit(lambda p: rotary_embedding(p, 8))(jnp.asarray(positions))
    assert all(isinstance(table, np.ndarray) for table in known)
    frequency = 10_000.0 ** (-np.arange(4) / 4)
    angle = (np.asarray(positions)[..., None] * frequency).reshape(*known.sin.shape)
    for table, other, exact in zip(known, traced, (np.sin(angle), np.cos(angle))):
        assert table.dtype == other.dtype == jnp.float32 and table.shape == other.shape
        bound = 1e-6 + 2**-22 * np.abs(angle)
        assert np.all(np.abs(table - exact) < bound) and np.all(np.abs(other - exact) < bound)


# --- gelu ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float32", 3e-7), ("float64", 1e-14)])
def test_gelu_and_its_derivatives_are_those_of_jax(dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x = np.concatenate([np.linspace(-12, 12, 801), [-1e4, -0.0, 1e4]]).astype(dtype)
        tangent = np.cos(x)

        @tiny.jit
        def derivatives(x, tangent):
            forward = [jax.jvp(f, (x,), (tangent,)) for f in (gelu, jax.nn.gelu)]
            twice = [jax.grad(lambda a, f=f: jnp.sum(jax.grad(lambda b: jnp.sum(f(b)))(a) ** 2))
                     for f in (gelu, jax.nn.gelu)]  # fmt: skip
            second = [function(x[:801]) for function in twice]
            return *forward, jax.vjp(gelu, x)[1](tangent)[0], second

        pushed, expected, pulled, second = jax.device_get(derivatives(x, tangent))
        assert pushed[0].dtype == dtype
        scale = np.maximum(1, np.abs(x))
        for one, other in [*zip(pushed, expected), (pulled, expected[1])]:
            assert np.max(np.abs(one - other) / scale) < tolerance
        assert np.max(np.abs(second[0] - second[1])) < 40 * tolerance


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"vocab_size": 0}, r"vocab_size must be a whole number in \[1, 2e9\], got 0"),
        ({"depth": 0}, "depth must be a whole number"),
        ({"num_heads": 0}, "num_heads must be a whole number"),
        ({"width": 12, "num_heads": 4}, r"width 12 must be a multiple of 2 \* num_heads = 8"),
        ({"norm": "batch"}, "norm: unknown name 'batch'; .*known: layer, rms"),
        ({"learned_positions": -1}, "learned_positions must be a whole number .*, got -1"),
        ({"mlp": "relu"}, "mlp: unknown name 'relu'"),
    ],
)
def test_settings_that_make_no_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{"vocab_size": 5, **settings})
