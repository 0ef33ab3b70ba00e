"""A mixture of experts on a mesh: every device sorts the tokens of its own rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import distributed, sharding
from mdm_jax.launch.ahead import program
from mdm_jax.models import moe

LAYER = moe.Mixture(moe.Experts(count=4, per_token=2, hidden=6), jnp.float32, jnp.float32)


def loss(params, x):
    return jnp.sum(jnp.sin(LAYER.apply(params, x)))


def start():
    x = jax.random.normal(jax.random.key(1), (8, 3, 8))
    return nn.meta.unbox(tiny.jit(LAYER.init)(jax.random.key(0), x)), x


@pytest.mark.parametrize("stages", [1, 2])
def test_a_mesh_changes_nothing_and_gathers_no_token(stages, monkeypatch):
    """Also where kernels' gradients are scattered in stages, as on more than 8 TPUs."""
    params, x = start()
    both = jax.value_and_grad(loss, (0, 1))
    expected = tiny.jit(both)(params, x)
    mesh = sharding.make_mesh(*((2, 2, 2) if stages == 1 else (1, 8, 1)))
    if stages == 2:
        groups = [[[0, 2, 4, 6], [1, 3, 5, 7]], [[0, 1], [2, 3], [4, 5], [6, 7]]]
        monkeypatch.setattr(sharding, "scatter_stages", lambda size: groups)
    abstract = sharding.abstract_sharded(lambda: LAYER.init(jax.random.key(0), x), mesh)
    rows = sharding.batch_sharding(mesh)
    placed = jax.device_put((params, x), (jax.tree.map(lambda a: a.sharding, abstract), rows))
    step = tiny.jit(sharding.sharded_apply(both, mesh, sharding.LOGICAL_RULES))
    found = step(*placed)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), found, expected
    )
    text = step.lower(*placed).compile().as_text()
    visits = x.shape[0] * x.shape[1] * LAYER.experts.per_token
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    assert f"[{visits},8]" not in text and f"[{visits // ways},8]" in text


EXTREME = [[24, 24, 24, 24], [0, 95, 0, 1], [96, 0, 0, 0], [1, 1, 1, 93], [9, 1, 1, 85]]


@pytest.mark.parametrize(
    "dtype, sizes",
    [
        ("float32", EXTREME),
        ("bfloat16", EXTREME),
        ("float32", [[301, 1, 97, 1], [0, 0, 399, 1]]),  # blocks of 32
        ("float32", [[0, 1, 0, 0, 1, 1, 0, 0]]),  # fewer rows than experts
    ],
)
def test_blocks_of_one_expert_are_the_ragged_product(dtype, sizes):
    """Products and gradients, with experts of no rows, of one, and of nearly all."""
    rows, experts = sum(sizes[0]), len(sizes[0])
    x = jax.random.normal(jax.random.key(0), (rows, 8)).astype(dtype)
    kernels = jax.random.normal(jax.random.key(1), (experts, 8, 6)).astype(dtype)
    slopes = jax.random.normal(jax.random.key(2), (rows, 6))
    # Of a bfloat16 result the parts of a sum differ in their last bit.
    tolerance = {"rtol": 2e-5, "atol": 1e-4} if dtype == "float32" else {"rtol": 2e-2, "atol": 5e-2}

    @tiny.jit
    def both(sizes):
        def out(way):
            def total(x, kernels):
                y = way(x, kernels, sizes)
                return jnp.sum(y * slopes), y

            return jax.grad(total, (0, 1), has_aux=True)(x, kernels)

        return out(moe.grouped_product), out(moe._ragged)

    for some in sizes:
        found, expected = both(jnp.array(some))
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(
                *(np.asarray(leaf, np.float32) for leaf in (one, other)), **tolerance
            )


def test_of_no_rows_there_is_no_product():
    kernels = jnp.ones((4, 8, 6))
    assert moe.grouped_product(jnp.ones((0, 8)), kernels, jnp.zeros(4, int)).shape == (0, 6)


def test_stages_of_scattering():
    """Each device's part of a sum is its own, whichever the stages."""
    assert distributed.scatter_stages(64) == [None]  # not on CPUs
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    for size in (2, 8, 13, 16, 24, 64):
        mesh = jax.sharding.AbstractMesh((size,), ("fsdp",), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            stages = distributed.scatter_stages(size)
        parts = [range(size)] * size  # of what the devices hold
        for groups in stages:
            for group in groups or [range(size)]:
                assert len({parts[number] for number in group}) == 1
                step = len(parts[group[0]]) // len(group)
                for place, number in enumerate(group):
                    parts[number] = parts[number][place * step : (place + 1) * step]
        assert [list(part) for part in parts] == [[number] for number in range(size)]
        assert len(stages) == (2 if size in (16, 24, 64) else 1)


def test_products_of_experts_count_once_per_visit():
    params, x = start()
    visits, router = 8 * 3 * 2, 2 * 8 * 3 * 8 * 4
    forward = 3 * 2 * visits * 8 * 6 + router
    assert program.count_flops(jax.make_jaxpr(loss)(params, x)) == forward
    assert program.count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x)) == 3 * forward
