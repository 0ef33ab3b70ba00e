"""The optax chain: schedules, clipping, which parameters decay, Muon on scanned layers."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
import tiny

from mdm_jax import sharding, training
from mdm_jax.training.optimizers import decayed


def test_schedule_warms_up_and_ends_at_its_fraction():
    schedule = training.warmup_cosine(2.0, 4, 20, final_fraction=0.1)
    np.testing.assert_allclose([schedule(s) for s in (0, 2, 4)], [0.0, 1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(
        [schedule(12), schedule(20), schedule(30)], [1.1, 0.2, 0.2], rtol=1e-5
    )
    assert float(training.warmup_cosine(2.0, 0, 20)(0)) == 2.0


@pytest.mark.parametrize("warmup, total", [(20, 20), (5, 3)])
def test_a_warm_up_as_long_as_the_run_is_refused(warmup, total):
    with pytest.raises(ValueError, match=r"in \[0, total_steps\), .*lower optimizer.warmup_s"):
        training.warmup_cosine(1.0, warmup, total)


@pytest.mark.parametrize("factory", [training.adamw, training.muon])
def test_clip_norm_must_be_positive(factory):
    with pytest.raises(ValueError, match=r"clip_norm must be a number in \(0, 1e6\]"):
        factory(optax.constant_schedule(0.1), clip_norm=0.0)


def test_clipping_is_by_the_global_norm():
    """Element-wise clipping would change the direction; Adam's first moment keeps what came in."""
    gradient = {"kernel": jnp.asarray([[3.0, 0.0]]), "scale": jnp.asarray([-4.0])}
    optimizer = training.adamw(optax.constant_schedule(0.1), b1=0.0, clip_norm=0.5)
    run = tiny.jit(lambda given: optimizer.update(given, optimizer.init(given), given)[1])
    state = run(gradient)
    mean = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(mean["kernel"], [[0.3, 0.0]], rtol=1e-5)
    np.testing.assert_allclose(mean["scale"], [-0.4], rtol=1e-5)


def _params(scan):
    model = tiny.transformer(depth=2, scan_layers=scan, qk_norm=True, condition_on_logsnr=True)
    return nn.meta.unbox(jax.eval_shape(training.linen_init(model, 4), jax.random.key(0)))


@pytest.mark.parametrize("scan", [False, True])
def test_norms_and_biases_do_not_decay(scan):
    """By name: a scanned norm scale has two dimensions and is still none of the matrices."""
    marks = jax.tree_util.tree_flatten_with_path(decayed(_params(scan)))[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): mark for path, mark in marks}
    for name, mark in names.items():
        assert mark == (name.endswith(("kernel", "embedding"))), name
    assert {name.rsplit("/", 1)[1] for name in names} == {"kernel", "bias", "scale", "embedding"}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_scanned_layers_are_updated_as_unrolled_ones(name):
    rng = np.random.default_rng(0)

    def tree(blocks):
        return {"embedding": outer, "head": {"kernel": outer.T}, **blocks}

    outer = jnp.asarray(rng.normal(size=(5, 8)), jnp.float32)
    layers = [
        {
            "up": {"kernel": jnp.asarray(rng.normal(size=(8, 12)), jnp.float32)},
            "norm": {"scale": jnp.asarray(rng.normal(size=8), jnp.float32)},
        }
        for _ in range(3)
    ]
    unrolled = tree({f"block_{i}": layer for i, layer in enumerate(layers)})
    scanned = tree({"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)})
    chosen = getattr(training, name)(optax.constant_schedule(0.1), weight_decay=0.1)

    @tiny.jit
    def two_updates(params):
        state = chosen.init(params)
        for _ in range(2):
            updates, state = chosen.update(params, state, params)
        return updates

    first, second = two_updates(unrolled), two_updates(scanned)
    for i in range(3):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], second["blocks"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
            first[f"block_{i}"],
            block,
        )
    np.testing.assert_allclose(first["embedding"], second["embedding"], rtol=1e-4, atol=1e-6)


def test_muon_orthogonalises_inner_kernels_only():
    rng = np.random.default_rng(1)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=(8, 8)), jnp.float32)}
        for name in ("up", "head")
    }
    chosen = training.muon(optax.constant_schedule(1.0), clip_norm=None)
    updates = tiny.jit(lambda given: chosen.update(given, chosen.init(given), given)[0])(params)
    inner = np.linalg.svd(np.asarray(updates["up"]["kernel"]), compute_uv=False)
    outer = np.linalg.svd(np.asarray(updates["head"]["kernel"]), compute_uv=False)
    assert inner.max() / inner.min() < 2.5  # singular values near one another
    assert outer.max() / outer.min() > 5.0


def library_muon(schedule):
    """Optax's own, for the kernels of :func:`kernels_and_rest`."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.contrib.muon(
        schedule,
        beta=0.95,
        adam_b2=0.99,
        weight_decay=0.1,
        muon_weight_dimension_numbers=lambda _: {"stack": {"kernel": matrix}, "norm": None},
    )


def kernels_and_rest(seed):
    rng = np.random.default_rng(seed)
    shapes = {"stack": {"kernel": (3, 8, 4)}, "norm": (8,)}
    is_shape = lambda shape: isinstance(shape, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), "f4"), shapes, is_leaf=is_shape)


def test_muon_is_that_of_optax_and_has_its_state():
    schedule = optax.linear_schedule(0.1, 0.2, 10)
    ours = training.muon(schedule, weight_decay=0.1, clip_norm=None)
    theirs = optax.chain(optax.identity(), library_muon(schedule))
    params = kernels_and_rest(0)
    mine, other = ours.init(params), theirs.init(params)
    assert jax.tree.structure(mine) == jax.tree.structure(other)
    for seed in (1, 2):
        gradients = kernels_and_rest(seed)
        update, mine = ours.update(gradients, mine, params)
        expected, other = theirs.update(gradients, other, params)
        for one, two in ((update, expected), (mine, other)):
            jax.tree.map(np.testing.assert_array_equal, one, two)


def test_muon_on_a_mesh_orthogonalises_whole_matrices_without_collectives():
    """Three layers on four shards: one member of zeros is added."""
    transformation = training.muon(optax.constant_schedule(1.0), clip_norm=None)
    params = kernels_and_rest(0)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    placed = {"stack": {"kernel": jax.device_put(params["stack"]["kernel"], where)}}
    placed["norm"] = sharding.replicate(params["norm"], mesh)

    def update(params):
        return transformation.update(params, transformation.init(params), params)[0]

    compiled = tiny.jit(sharding.sharded_apply(update, mesh, sharding.LOGICAL_RULES))
    lowered = compiled.lower(placed).compile()
    found = lowered(placed)["stack"]["kernel"]
    np.testing.assert_allclose(found, update(params)["stack"]["kernel"], rtol=1e-4, atol=1e-5)
    text = lowered.as_text()
    moved = re.findall(r"= (f32\[[\d,]*\]).* (?:all-gather|all-reduce|all-to-all)\(", text)
    assert len(moved) <= 4, moved  # there, and back; nothing in the five iterations
