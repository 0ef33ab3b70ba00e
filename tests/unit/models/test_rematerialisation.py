"""Policies and scanned layers change what a training step costs, never what it computes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from variants import slow_except

from mdm_jax.models.layers import POLICIES, check_policy

pytestmark = pytest.mark.keyless

ROWS, LENGTH, DEPTH = 4, 16, 3
INPUTS = jnp.asarray(np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, LENGTH)), jnp.int32)


def network(**settings):
    return tiny.transformer(depth=DEPTH, condition_on_logsnr=True, **settings)


@functools.cache
def parameters(scanned):
    """The same numbers, stacked or layer by layer."""
    shapes = nn.meta.unbox(
        jax.eval_shape(network(scan_layers=True).init, jax.random.key(0), INPUTS, LEVELS)
    )
    stacked = tiny.perturbed(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))["params"]
    return {"params": stacked if scanned else unrolled(stacked)}


def unrolled(stacked):
    blocks = stacked["blocks"]["block"]
    others = {name: leaf for name, leaf in stacked.items() if name != "blocks"}
    return others | {
        f"block_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(DEPTH)
    }


LEVELS = jnp.linspace(-2.0, 2.0, ROWS)[:, None]


@functools.cache
def step(remat, scanned):
    """Loss, gradients layer by layer, and bytes of temporary memory."""
    model, params = network(remat=remat, scan_layers=scanned), parameters(scanned)

    def loss(params):
        logits = model.apply(params, INPUTS, LEVELS)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 0])

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    value, gradient = compiled(params)
    gradient = unrolled(gradient["params"]) if scanned else gradient["params"]
    return value, gradient, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    "scanned", [pytest.param(False, marks=pytest.mark.slow), True], ids=["unrolled", "scanned"]
)
@pytest.mark.parametrize(
    "remat", slow_except({"full"}, [name for name in POLICIES if name != "none"])
)
def test_losses_and_gradients_are_equal(remat, scanned):
    expected, expected_gradient, _ = step("none", scanned)
    value, gradient, _ = step(remat, scanned)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        gradient,
        expected_gradient,
    )


@pytest.mark.slow  # test_transformer has it of whole networks
def test_scanned_layers_compute_what_unrolled_ones_do():
    np.testing.assert_allclose(step("none", True)[0], step("none", False)[0], rtol=1e-6)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6),
        step("none", True)[1],
        step("none", False)[1],
    )


@pytest.mark.slow
def test_what_is_not_kept_takes_no_memory():
    """Compiled, with layers in a scan; without one the CPU's compiler merges the passes again."""
    memory = {remat: step(remat, True)[2] for remat in POLICIES}
    assert memory["full"] < memory["dots_without_batch"] < memory["dots"] < memory["none"]
    assert memory["full"] < memory["attention"] < memory["dots_without_batch"]
    assert memory["full"] < 0.5 * memory["none"]


@functools.cache
def bytes_kept(remat):
    model = network(remat=remat)

    def pull(params):
        return jax.vjp(lambda p: model.apply(p, INPUTS, LEVELS), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, parameters(False)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def test_what_is_kept_between_the_passes():
    """Bytes that the forward pass hands to the backward one, layer by layer, on any backend."""
    kept = {remat: bytes_kept(remat) for remat in POLICIES if not remat.startswith("offload")}
    assert kept["full"] < kept["dots_without_batch"] < kept["dots"] < kept["none"]
    heads = DEPTH * 4 * 4 * ROWS * LENGTH * 16  # queries, keys, values and the output, float32
    assert kept["full"] + 0.9 * heads < kept["attention"] < kept["full"] + 1.1 * heads
    width, weights = 16, sum(leaf.nbytes for leaf in jax.tree.leaves(parameters(False)))
    inputs_of_blocks = DEPTH * 4 * ROWS * LENGTH * width
    assert kept["full"] < weights + inputs_of_blocks + kept["none"] / 4


@pytest.mark.slow
def test_what_is_offloaded_is_what_would_be_kept():
    assert bytes_kept("offload_inputs") == bytes_kept("full")
    assert bytes_kept("offload_dots") == bytes_kept("dots_without_batch")


def test_unknown_policies_are_refused():
    with pytest.raises(
        ValueError, match="remat: unknown name 'some'; .* known: attention, dots, .*f"
    ):
        network(remat="some")


def test_a_device_without_a_host_s_memory_refuses_to_offload():
    class Device:
        device_kind = "toaster"

        def addressable_memories(self):
            return [jax.devices()[0].default_memory()]

    kind = Device().addressable_memories()[0].kind
    assert kind != "pinned_host"
    with pytest.raises(ValueError, match="offload_dots .*toaster cannot reach; take model.remat=f"):
        check_policy(Device(), "offload_dots")
    check_policy(Device(), "full")
    check_policy(jax.devices()[0], "offload_inputs")


def stored_by_layer(**settings):
    """(dtype, last axis) of what a scan over layers stores of each for its backward pass."""
    model = network(scan_layers=True, dtype=jnp.bfloat16, param_dtype=jnp.float32, **settings)
    params = parameters(True)["params"]
    if settings["mlp"] == "swiglu":
        shapes = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), INPUTS, LEVELS))
        params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)["params"]

    def loss(params):
        return jnp.sum(model.apply({"params": params}, INPUTS, LEVELS))

    scans = [e for e in jax.make_jaxpr(jax.grad(loss))(params).eqns if e.primitive.name == "scan"]
    outputs = scans[0].outvars[scans[0].params["num_carry"] :]
    large = [v.aval for v in outputs if v.aval.shape[:3] == (DEPTH, ROWS, LENGTH)]
    return [(aval.dtype.name, aval.shape[3:]) for aval in large]


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("remat", ["none", "dots_without_batch"])
def test_a_scan_stores_hidden_activations_and_heads_in_the_dtype_of_products(mlp, remat):
    hidden = network(mlp=mlp).config.hidden
    stored = stored_by_layer(mlp=mlp, remat=remat)
    inside = [dtype for dtype, shape in stored if shape[-1] == hidden]
    most = {"gelu": 2, "swiglu": 3} if remat == "none" else {"gelu": 1, "swiglu": 2}
    assert 0 < len(inside) <= most[mlp] and set(inside) == {"bfloat16"}
    heads = [dtype for dtype, shape in stored if len(shape) > 1]
    assert set(heads) <= {"bfloat16"}
