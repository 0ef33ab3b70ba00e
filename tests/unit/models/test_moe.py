"""A mixture of experts on a mesh: every device sorts the tokens of its own rows."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mdm_jax import sharding
from mdm_jax.launch.ahead import program
from mdm_jax.models import moe

LAYER = moe.Mixture(moe.Experts(count=4, per_token=2, hidden=6), jnp.float32, jnp.float32)


def loss(params, x):
    return jnp.sum(jnp.sin(LAYER.apply(params, x)))


def start():
    x = jax.random.normal(jax.random.key(1), (8, 3, 8))
    return nn.meta.unbox(tiny.jit(LAYER.init)(jax.random.key(0), x)), x


def test_a_mesh_changes_nothing_and_gathers_no_token():
    params, x = start()
    both = jax.value_and_grad(loss, (0, 1))
    expected = tiny.jit(both)(params, x)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
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
    assert f"[{visits},8]" not in text and f"[{visits // 4},8]" in text


def test_products_of_experts_count_once_per_visit():
    params, x = start()
    visits, router = 8 * 3 * 2, 2 * 8 * 3 * 8 * 4
    forward = 3 * 2 * visits * 8 * 6 + router
    assert program.count_flops(jax.make_jaxpr(loss)(params, x)) == forward
    assert program.count_flops(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x)) == 3 * forward
