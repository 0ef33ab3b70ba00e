"""Every implementation of attention against the dense mask in float64, for every rule."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax import sharding
from mdm_jax.models import attention as attentions
from mdm_jax.models import masks
from mdm_jax.models.attention import attention
from mdm_jax.sharding import sharded_apply

pytestmark = pytest.mark.keyless

ROWS, LENGTH, HEADS, SIZE = 4, 12, 2, 8
NUMBERS = [
    [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0],
    [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    [1, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 4],
    [0] * 12,
]
DOCUMENTS = np.asarray(NUMBERS, np.int32)


def cached_rule(documents):
    """Four new tokens from position 8 over a ring of ten slots, two of them not written yet."""
    keys = np.asarray([5, 6, 7, -2, -1, 0, 1, 2, 3, 4, 8, 9, 10, 11])
    numbers = np.where(keys < 0, 0, documents[:, keys])
    pattern = masks.BlockCausal(LENGTH, 4, 2)
    return masks.CachedRule(pattern, np.arange(8, 12), keys, documents[:, 8:], numbers)


RULES = {
    "everything": lambda: None,
    "within_documents": lambda: masks.within_documents(DOCUMENTS),
    "causal": lambda: masks.causal(LENGTH),
    "causal_window": lambda: masks.causal(LENGTH, 3, DOCUMENTS),
    "block_causal": lambda: masks.block_causal(LENGTH, 3, 2, DOCUMENTS),
    "block_training": lambda: masks.block_training(LENGTH, 3),
    "block_training_window": lambda: masks.block_training(LENGTH, 2, 3, DOCUMENTS),
    "block_training_one_block": lambda: masks.block_training(LENGTH, LENGTH, None, DOCUMENTS),
    "cached": lambda: cached_rule(DOCUMENTS),
    "boolean_array": lambda: np.tril(np.ones((1, 1, LENGTH, LENGTH), bool)),
}


def operands(rule, seed=0, dtype=jnp.float32):
    """q, k, v and the gradient with respect to the result."""
    queries, keys = (LENGTH, LENGTH) if rule is None else rule.shape[-2:]
    rng = np.random.default_rng(seed)
    sizes = (queries, keys, keys, queries)
    return [rng.normal(size=(ROWS, n, HEADS, SIZE)).astype(jnp.dtype(dtype)) for n in sizes]


def reference(q, k, v, mask):
    """In float64, [N, Q, H, D]."""
    scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, v)


@tiny.jit
def reference_passes(mask, gradient, *inputs):
    out, pull = jax.vjp(functools.partial(reference, mask=mask), *inputs)
    return out, *pull(gradient)


dense_mask = tiny.jit(lambda rule: rule.dense())


def exact(rule, inputs):
    """The reference's result and gradients."""
    shape = (inputs[0].shape[1], inputs[1].shape[1])
    mask = np.asarray(dense_mask(masks.as_rule(rule, *shape)))
    with jax.enable_x64():
        wide = [np.asarray(x, np.float64) for x in inputs]
        mask = np.broadcast_to(mask, (ROWS, HEADS, *shape))
        return jax.device_get(reference_passes(mask, wide[3], *wide[:3]))


def both_passes(function, rule, inputs):
    """Result and gradients of ``function(q, k, v, rule)``."""

    @tiny.jit
    def run(rule, q, k, v, gradient):
        out, pull = jax.vjp(lambda *x: function(*x, rule), q, k, v)
        return out, *pull(gradient)

    return run(rule, *inputs)


@pytest.fixture
def few_scores(monkeypatch):
    """So few at once that rows are mapped over, two at a time on [12, 12] and one on [24, 24]."""
    monkeypatch.setattr(attentions, "SCORES_AT_ONCE", 2 * HEADS * LENGTH**2)


def implementations():
    """(rule, implementation, dtype) of all; dense masks and narrow dtypes mostly in slow tests."""
    few = set(RULES) - {"causal", "block_causal", "block_training_one_block"}
    fast = {(rule, "recompute", "float32") for rule in few}
    fast |= {("block_training_window", "einsum", "float32")}
    fast |= {("within_documents", name, "float32") for name in ("einsum", "xla")}
    fast |= {("cached", "xla", "float32")}
    for case in itertools.product(RULES, ("einsum", "recompute", "xla"), ("float32", "bfloat16")):
        yield pytest.param(*case, marks=() if case in fast else pytest.mark.slow)


@pytest.mark.parametrize("rule_name, name, dtype", [*implementations()])
def test_values_and_gradients_are_those_of_the_dense_mask(name, rule_name, dtype, few_scores):
    rule = RULES[rule_name]()
    inputs = operands(rule, dtype=dtype)
    error = 2e-6 if dtype == "float32" else 4e-2
    function = functools.partial(attention, implementation=name)
    for value, expected in zip(both_passes(function, rule, inputs), exact(rule, inputs)):
        assert value.dtype == dtype
        np.testing.assert_allclose(np.asarray(value, np.float64), expected, rtol=error, atol=error)


def test_hidden_keys_have_no_influence():
    """Not even as not-a-number: exactly zero weight and gradient."""
    rule = masks.block_training(LENGTH, 3, 2, DOCUMENTS)
    q, k, v, gradient = operands(rule)
    gradient[:, 1:] = 0.0  # only query 0 matters, which attends to few keys
    _, dq, dk, dv = jax.device_get(
        both_passes(attentions.einsum_attention, rule, (q, k, v, gradient))
    )
    allowed = np.asarray(dense_mask(rule))[:, 0, 0]
    keys, values = (np.abs(leaf).max((2, 3)) > 0 for leaf in (dk, dv))
    np.testing.assert_array_equal(values, allowed)
    assert not np.any(keys & ~allowed)
    np.testing.assert_array_equal(dq[:, 1:], 0.0)


def largest(jaxpr):
    """Elements of the largest array in a program, and of the programs inside it."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [var.aval.size for var in equation.outvars if hasattr(var.aval, "size")]
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            sizes.append(largest(inner) if hasattr(inner, "eqns") else 0)
    return max(sizes)


def test_block_training_never_holds_the_whole_square():
    rule = masks.block_training(64, 4)
    shape = jax.ShapeDtypeStruct((1, 128, 1, 2), jnp.float32)
    gradient = jax.grad(lambda q, k, v: attention(q, k, v, rule, "einsum").sum(), (0, 1, 2))
    assert largest(jax.make_jaxpr(gradient)(shape, shape, shape).jaxpr) < 128**2 / 2
    dense = jax.grad(lambda q, k, v: attention(q, k, v, rule, "xla").sum(), (0, 1, 2))
    assert largest(jax.make_jaxpr(dense)(shape, shape, shape).jaxpr) >= 128**2


def test_recomputing_takes_less_memory(few_scores):
    inputs = [jax.ShapeDtypeStruct((16, LENGTH, HEADS, SIZE), jnp.float32)] * 3
    memory = {}
    for name in ("einsum", "recompute"):
        gradient = jax.grad(lambda q, k, v, n=name: attention(q, k, v, None, n).sum(), (0, 1, 2))
        compiled = jax.jit(gradient).lower(*inputs).compile()
        memory[name] = compiled.memory_analysis().temp_size_in_bytes
    assert memory["recompute"] < memory["einsum"]


def test_what_recomputing_keeps_for_the_backward_pass(few_scores):
    """Besides q, k and v the result and, of each softmax, its largest score and its total."""
    inputs = [jax.ShapeDtypeStruct((16, LENGTH, HEADS, SIZE), jnp.float32)] * 3
    attend = functools.partial(attention, implementation="recompute")
    pull = jax.eval_shape(lambda *x: jax.vjp(attend, *x)[1], *inputs)
    kept = sum(leaf.size for leaf in jax.tree.leaves(pull))
    per_query = 16 * LENGTH * HEADS
    assert kept == per_query * (3 * SIZE + SIZE + 2)


def test_forward_mode(few_scores):
    """Likelihoods by the trace of a Jacobian push tangents through the network."""
    q, k, v, tangent = operands(None)

    @tiny.jit
    def run(q, tangent):
        return [
            jax.jvp(lambda q, n=n: attention(q, k, v, None, n), (q,), (tangent,))[1]
            for n in ("einsum", "recompute", "xla")
        ]

    pushed = run(q, tangent)
    np.testing.assert_allclose(pushed[0], pushed[2], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(pushed[1], pushed[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_except({"einsum"}, ["einsum", "recompute", "xla"]))
def test_networks_do_not_depend_on_the_implementation(name, few_scores):
    settings = {"qk_norm": True}
    inputs = np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, LENGTH))
    model = tiny.transformer(attention=name, **settings)
    params = tiny.parameters(model, LENGTH)
    logits = tiny.jit(model.apply)(params, inputs, None, DOCUMENTS)
    other = tiny.transformer(attention="auto", **settings)
    expected = tiny.jit(other.apply)(params, inputs, None, DOCUMENTS)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


# --- what is chosen, and what is refused --------------------------------------------------------


def on(monkeypatch, backend, capability="9.0"):
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])


def shapes(length=256, size=64, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((2, length, 4, size), dtype)


@pytest.mark.parametrize(
    "backend, settings, capability, expected",
    [
        ("cpu", {}, "", "recompute"),
        ("gpu", {}, "9.0", "cudnn"),
        ("gpu", {"dtype": jnp.float32}, "9.0", "einsum"),
        ("gpu", {"size": 12}, "9.0", "einsum"),
        ("gpu", {"size": 256}, "9.0", "cudnn"),
        ("gpu", {"size": 256}, "8.0", "einsum"),
        ("gpu", {"length": 255}, "9.0", "einsum"),
        ("gpu", {}, "7.5", "einsum"),
        ("gpu", {}, "gfx90a", "einsum"),
        ("tpu", {}, "", "splash"),
        ("tpu", {"length": 200}, "", "einsum"),
    ],
)
def test_auto_takes_what_works(monkeypatch, backend, settings, capability, expected):
    on(monkeypatch, backend, capability)
    x = shapes(**settings)
    assert attentions.best(x, x, masks.causal(x.shape[1])) == expected


def test_auto_decodes_with_products_on_tpus(monkeypatch):
    on(monkeypatch, "tpu")
    q, k = shapes(4), shapes(14)
    assert attentions.best(q, k, cached_rule(DOCUMENTS)) == "einsum"


def test_what_cannot_be_done_is_refused_by_name(monkeypatch):
    x = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(ValueError, match='"cudnn" needs an NVIDIA GPU, and .* for a cpu; choose'):
        attention(x, x, x, None, "cudnn")
    with pytest.raises(ValueError, match='"splash" needs a TPU, and this is for a cpu'):
        attention(x, x, x, None, "splash")
    with pytest.raises(ValueError, match=r"attention must be one of .*'recompute'.*, got 'flash'"):
        attention(x, x, x, None, "flash")
    with pytest.raises(ValueError, match="attention: unknown name 'flash'; did you mean 'splash'"):
        tiny.transformer(attention="flash")
    with pytest.raises(ValueError, match="5 queries and 5 keys does not fit 4 queries and 4 keys"):
        attention(x, x, x, masks.causal(5))
    on(monkeypatch, "gpu")
    obstacle = attentions.cudnn_obstacle
    assert "operands in bfloat16 or float16" in obstacle(x, x, masks.causal(4))
    assert "multiple of 8 up to 256, got 12" in obstacle(shapes(size=12), shapes(size=12), None)
    odd = shapes(5)
    assert "even numbers of queries and keys" in obstacle(odd, odd, masks.causal(5))
    assert obstacle(odd, odd, masks.as_rule(None, 5, 5)) is None
    on(monkeypatch, "tpu")
    dense, x = masks.as_rule(jnp.ones((1, 1, 128, 128), bool), 128, 128), shapes(128)
    assert "not a boolean array" in attentions.splash_obstacle(x, x, dense)
    assert "in multiples of 128" in attentions.splash_obstacle(
        shapes(64), shapes(64), masks.causal(64)
    )


# --- splash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule_name", RULES)
def test_splash_reads_the_pattern_in_tiles(rule_name):
    rule = RULES[rule_name]()
    if not isinstance(rule, masks.Rule):
        pytest.skip("no static pattern")
    mask = attentions.pattern_mask(rule.pattern)
    queries, keys = (np.arange(size) for size in rule.shape)
    whole = rule.pattern.allows(queries[:, None], keys[None])
    assert mask.shape == whole.shape
    np.testing.assert_array_equal(mask[4:8, 0:12], whole[4:8, 0:12])
    np.testing.assert_array_equal(mask[:, 5:9], whole[:, 5:9])
    again = RULES[rule_name]()
    other = attentions.pattern_mask(masks.causal(LENGTH, 9).pattern)
    assert mask == attentions.pattern_mask(again.pattern) and mask != other
    assert hash(mask) == hash(attentions.pattern_mask(again.pattern))


@pytest.mark.parametrize(
    "kind", slow_except({"block_training"}, ["block_training", "within_documents"])
)
def test_splash_agrees_with_products(kind):
    """The TPU kernel in Pallas' interpreter, gradients included."""
    documents = np.asarray([[1] * 50 + [2] * 70 + [0] * 8], np.int32)
    if kind == "block_training":
        rule = masks.block_training(64, 16, 3, documents[:, :64])
    else:
        rule = masks.within_documents(documents)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(1, 128, 1, 8)).astype(np.float32) for _ in range(4)]
    splash = functools.partial(attentions.splash_attention, interpret=True)
    values = both_passes(splash, rule, inputs)
    expected = both_passes(attentions.einsum_attention, rule, inputs)
    for value, exact_value in zip(values, expected):
        np.testing.assert_allclose(value, exact_value, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_splash_runs_on_the_devices_of_a_mesh():
    """Each with its own rows and heads, which are whole rows to the kernel."""
    documents = np.asarray([[1] * 100 + [0] * 28, [1] * 60 + [2] * 68], np.int32)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, 128, 2, 8)).astype(np.float32) for _ in range(3)]
    run = functools.partial(attentions.splash_attention, interpret=True)
    mesh = sharding.make_mesh(2, 1, 4)  # four do not divide two heads, which stay whole
    rules = (("batch", ("data", "fsdp")), ("heads", "tensor"))
    placed, spread = (
        jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))) for x in (inputs, documents)
    )
    call = sharded_apply(lambda q, k, v, d: run(q, k, v, masks.causal(128, 40, d)), mesh, rules)
    values = tiny.jit(call)(*placed, spread)
    rule = masks.causal(128, 40, documents)
    expected = tiny.jit(attentions.einsum_attention)(*inputs, rule)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
