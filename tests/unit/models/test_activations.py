"""Activations on a mesh: the same numbers, rows that stay where they are, and no mesh needed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax.models import attention as attention_kernels
from mdm_jax.models.attention import attention
from mdm_jax.models.masks import within_documents
from mdm_jax.sharding import (
    LOGICAL_RULES,
    abstract_sharded,
    batch_sharding,
    constrain,
    make_mesh,
    num_shards,
    sharded_apply,
)
from mdm_jax.training import linen_init

pytestmark = pytest.mark.keyless

RULES = (("batch", ("data", "fsdp")), ("heads", "tensor"), ("mlp", "tensor"), ("embed", "fsdp"))
ROWS = PartitionSpec(("data", "fsdp"))


def layout(x):
    """Where ``constrain`` puts an array under a mesh of 2 x 2 x 2."""
    mesh = make_mesh(2, 2, 2)
    x = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
    return jax.jit(sharded_apply(lambda y: constrain(y, "batch", None, "heads"), mesh, RULES))(x)


def test_axes_are_cut_as_their_names_say():
    whole = NamedSharding(make_mesh(2, 2, 2), PartitionSpec(("data", "fsdp"), None, "tensor"))
    assert layout(jnp.zeros((8, 3, 4))).sharding.is_equivalent_to(whole, 3)


def test_sizes_that_do_not_divide_stay_whole():
    rows_only = NamedSharding(make_mesh(2, 2, 2), ROWS)
    assert layout(jnp.zeros((8, 3, 5))).sharding.is_equivalent_to(rows_only, 3)


def test_without_a_mesh_nothing_happens():
    x = jnp.zeros((8, 3, 4))
    assert constrain(x, "batch", None, "heads") is x and num_shards(8, "batch") == 1
    with nn.logical_axis_rules(RULES):
        assert constrain(x, "batch", None, "heads") is x and num_shards(8, "batch") == 1
    run = sharded_apply(
        lambda: (num_shards(8, "batch"), num_shards(6, "batch")), make_mesh(4, 2), RULES
    )
    assert run() == (8, 1) and num_shards(8, "batch") == 1


@pytest.mark.parametrize(
    "remat, scanned", [pytest.param("none", False, marks=pytest.mark.slow), ("full", True)]
)
def test_networks_give_the_same_on_a_mesh(remat, scanned, monkeypatch):
    """Losses and gradients, with rows over four devices and heads over two."""
    monkeypatch.setattr(attention_kernels, "SCORES_AT_ONCE", 1)
    model = tiny.transformer(depth=2, remat=remat, scan_layers=scanned)
    inputs = np.random.default_rng(0).integers(0, tiny.VOCAB, (8, 6), np.int32)
    documents = np.where(np.arange(6) < 4, 1, 2)[None].repeat(8, axis=0).astype(np.int32)
    params = tiny.parameters(model, 6)
    mesh = make_mesh(2, 2, 2)

    def loss(apply, params, *batch):
        return jnp.mean(apply(params, batch[0], None, batch[1]) ** 2)

    def gradient(apply):
        return tiny.jit(jax.value_and_grad(lambda p, *b: loss(apply, p, *b)))

    expected = gradient(model.apply)(params, inputs, documents)
    placed = jax.device_put((inputs, documents), NamedSharding(mesh, ROWS))
    copies = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    sharded = gradient(sharded_apply(model.apply, mesh, RULES))(copies, *placed)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-6),
        sharded,
        expected,
    )


MESHES = [(2, 2, 2), (1, 8, 1), (2, 4, 1), (1, 1, 8)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        *(
            pytest.param(options, id="-".join(options), marks=pytest.mark.slow)
            for options in (
                {"tie_embeddings": True, "learned_positions": 16, "scan_layers": True},
                {"self_conditioning": True, "condition_on_logsnr": True, "mlp": "swiglu"},
            )
        ),
    ],
)
@pytest.mark.parametrize(
    "shape",
    [pytest.param(shape, marks=[pytest.mark.slow] * (1 in shape)) for shape in MESHES],
    ids=str,
)
def test_the_compiler_lays_the_network_out_without_a_warning(shape, options, capfd):
    """Losses and gradients, with parameters cut along both axes: the compiler warns on stderr when
    it has to copy an array to every device (an "involuntary full rematerialization")."""
    model = tiny.transformer(vocab_size=64, width=32, depth=1, num_heads=8, **options)
    mesh = make_mesh(*shape)
    params = abstract_sharded(lambda: linen_init(model, 16)(jax.random.key(0)), mesh)
    rows = batch_sharding(mesh)
    inputs = jax.ShapeDtypeStruct((16, 16), jnp.int32, sharding=rows)
    logsnr = jax.ShapeDtypeStruct((16, 1), jnp.float32, sharding=rows)
    apply = sharded_apply(model.apply, mesh, LOGICAL_RULES)

    def loss(params, inputs, logsnr):
        return jnp.mean(apply(params, inputs, logsnr) ** 2)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    gradient = tiny.jit(jax.grad(loss), out_shardings=shardings)
    capfd.readouterr()
    gradient.lower(params, inputs, logsnr).compile()
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["einsum", "recompute"])
def test_no_row_moves_in_attention(name, monkeypatch):
    """Mapping over rows must not gather them: no collective at all in either pass."""
    monkeypatch.setattr(attention_kernels, "SCORES_AT_ONCE", 1)
    mesh = make_mesh(2, 2, 2)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(16, 4, 2, 4)).astype(np.float32) for _ in range(3))
    documents = np.ones((16, 4), np.int32)
    documents[3, 2:] = 2

    def run(q, k, v, documents):
        q, k, v = (constrain(x, "batch", None, "heads", None) for x in (q, k, v))
        return attention(q, k, v, within_documents(documents), name)

    def both(apply):
        def passes(q, k, v, documents):
            out, pull = jax.vjp(lambda *x: apply(*x, documents), q, k, v)
            return out, *pull(out)

        return jax.jit(passes)

    by_head = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    placed = jax.device_put((q, k, v), by_head)
    rows = jax.device_put(documents, NamedSharding(mesh, ROWS))
    compiled = both(sharded_apply(run, mesh, RULES)).lower(*placed, rows).compile()
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert collective not in text
    assert ("while" in text) == (name == "recompute")
    for one, other in zip(compiled(*placed, rows), both(run)(q, k, v, documents)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
