"""Chunked linear cross-entropy against logits: values, gradients, cost, sharding."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from mdm_jax import sharding
from mdm_jax.models import cross_entropy
from mdm_jax.models.cross_entropy import (
    Chunking,
    Projection,
    Readout,
    exclude_token,
    position_losses,
    token_nats,
)

pytestmark = pytest.mark.keyless

N, L, D, K, MASK = 8, 6, 5, 11, 10
COUNTS = (0, 1, 3, 4, 5, 12, 47, 48)  # of 48 positions in chunks of 4 (or 2, within groups)


@functools.cache
def arrays(tied=False):
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.normal(size=(N, L, D)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(K, D) if tied else (D, K)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, MASK, (N, L)), jnp.int32)
    slope = jnp.asarray(rng.normal(size=(N, L)), jnp.float32)
    return features, weights, targets, slope


def places(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(N * L).reshape(N, L) < count


def total(features, weights, targets, slope, where, chunking, projection):
    readout = Readout(features, weights, projection)
    outputs = (
        readout.logits() if chunking is None else dataclasses.replace(readout, chunking=chunking)
    )
    return jnp.sum(slope * token_nats(outputs, targets, where, MASK))


@functools.cache
def compiled(chunking, tied=False, dtype=jnp.float32):
    settings = {"chunking": chunking, "projection": Projection(tied, dtype)}
    return tiny.jit(jax.value_and_grad(functools.partial(total, **settings), (0, 1)))


def assert_close(found, wanted, rtol=2e-5):
    found, wanted = jax.device_get((found, wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * float(np.max(np.abs(b)) + 1e-30))


@pytest.mark.parametrize(
    "groups", [1, 4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 6, 8))]
)
def test_equals_the_dense_loss_for_every_number_of_positions(groups):
    """Also where groups do not divide the rows."""
    run = compiled(Chunking(groups, 4 if groups < 4 else 2))
    for count in COUNTS:
        inputs = (*arrays(), places(count))
        assert_close(run(*inputs), compiled(None)(*inputs))


@pytest.mark.parametrize(
    "chunk", [7, None, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 5, 6, 48, 100))]
)
def test_no_size_of_a_chunk_matters(chunk):
    inputs = (*arrays(), places(25))
    assert_close(compiled(Chunking(1, chunk))(*inputs), compiled(None)(*inputs))


def test_tied_weights():
    inputs = (*arrays(tied=True), places(25))
    assert_close(compiled(Chunking(2, 4), True)(*inputs), compiled(None, True)(*inputs))


def test_bfloat16_operands_and_wide_sums():
    """Against float32 logits of the rounded operands; the slopes are rounded once, to 2**-9."""
    features, weights, *rest = (*arrays(), places(25))
    rounded = [a.astype(jnp.bfloat16).astype(jnp.float32) for a in (features, weights)]
    found = compiled(Chunking(2, 4), False, jnp.bfloat16)(features, weights, *rest)
    wanted = compiled(None)(*rounded, *rest)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    assert [g.dtype for g in found[1]] == [jnp.float32, jnp.float32]
    assert_close(found[1], wanted[1], rtol=2.0**-8)


def test_the_mask_token_gets_no_probability_and_no_gradient():
    features, weights, *rest = (*arrays(), places(25))
    run = compiled(Chunking(2, 4))
    value, (_, slope) = run(features, weights, *rest)
    moved, _ = run(features, weights.at[:, MASK].add(3.0), *rest)
    assert value == moved
    assert not np.any(slope[:, MASK]) and np.all(np.any(slope[:, :MASK], axis=0))


@pytest.mark.parametrize("ids", [(3,), (3, None, 9, 5), (*range(2, 6), 8, 99, None)])
def test_any_number_of_tokens_is_excluded(ids):
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 9)), jnp.float32)
    expected = np.array(logits)
    expected[..., [i for i in ids if i is not None and i < 9]] = np.finfo(np.float32).min
    np.testing.assert_array_equal(exclude_token(logits, *ids), expected)


def test_what_is_not_asked_for_plays_no_part():
    features, weights, targets, slope = arrays()
    where = places(20)
    other = jnp.where(where[..., None], features, 100.0)
    odd, steep = jnp.where(where, targets, 999), jnp.where(where, slope, 1e9)
    run = compiled(Chunking(2, 4))
    found = run(other, weights, odd, steep, where)
    assert_close(found, run(features, weights, targets, slope, where))
    assert not np.any(np.asarray(found[1][0])[~np.asarray(where)])


def test_the_cost_follows_the_number_of_positions():
    """The chunks that are computed, counted from inside."""
    features, weights, _, _ = arrays()
    seen = []

    def loss(logits):
        jax.debug.callback(lambda: seen.append(1))
        return logits[..., 0], logits

    readout = Readout(features, weights, Projection(False, jnp.float32), Chunking(1, 4))
    run = tiny.jit(lambda where: position_losses(loss, readout, where))
    for count, turns in ((0, 0), (1, 1), (4, 1), (5, 2), (48, 12)):
        seen.clear()
        jax.block_until_ready(run(places(count)))
        jax.effects_barrier()
        assert len(seen) == turns


def test_the_size_of_a_chunk():
    """On CPUs 32 MiB of float32 logits, an eighth of the positions at most, one at least."""
    assert Chunking().size(10**6, 2**15) == 2**25 // (4 * 2**15)
    assert Chunking().size(1000, 100) == 125 and Chunking().size(1001, 100) == 126
    assert Chunking().size(10**6, 2**30) == 1
    assert Chunking(positions=7).size(5, 100) == 5 and Chunking(positions=7).size(50, 100) == 7


def test_rematerialisation():
    """A step may run under ``jax.checkpoint``."""
    inputs = (*arrays(), places(21))
    loss = functools.partial(total, projection=Projection(False, jnp.float32))

    def run(chunking):
        again = jax.checkpoint(functools.partial(loss, chunking=chunking))
        return tiny.jit(jax.grad(again, (0, 1)))(*inputs)

    assert_close(run(Chunking(2, 4)), compiled(None)(*inputs)[1])


WEIGHTS = {
    "right": (lambda slope: slope, 1),
    "in proportion": (lambda slope: -2.5 * slope, 1),
    "in proportion where there is a loss": (lambda s: jnp.where(places(21), s, 7.0), 1),
    "wrong": (lambda slope: slope + 0.01, 2),
    "wrong at one place": (
        lambda s: s * (1 + 1e-4 * (jnp.cumsum(places(21)).reshape(N, L) == 9)),
        2,
    ),
    "of none": (jnp.zeros_like, 2),
    "nonsense": (lambda slope: slope.at[0, 0].set(jnp.nan), 2),
}


def some_places():
    where = places(21)
    where[0, 0] = True
    return where


@functools.cache
def in_float64(tied):
    """Loss and gradients from logits in float64."""
    features, weights, targets, slope = (np.asarray(a) for a in arrays(tied=tied))
    with jax.enable_x64():
        wide = [jnp.asarray(a, jnp.float64) for a in (features, weights, slope)]

        def dense(x, w):
            where = some_places()
            return total(x, w, targets, wide[2], where, None, Projection(tied, jnp.float64))

        return jax.device_get(tiny.jit(jax.value_and_grad(dense, (0, 1)))(*wide[:2]))


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_loss_weights_are_used_where_they_are_right_and_nowhere_else(tied):
    """Against logits in float64; how often a chunk's gradient is computed is counted inside."""
    features, weights, targets, slope = arrays(tied=tied)
    where, seen = some_places(), []

    def counted(logits, targets):
        jax.debug.callback(lambda: seen.append(1))
        loss = lambda logits: token_nats(logits, targets, True, MASK)  # noqa: E731
        nats, pullback = jax.vjp(loss, logits)
        return nats, pullback(jnp.ones_like(nats))[0]

    def run(x, w, loss_weights):
        settings = (Projection(tied, jnp.float32), Chunking(2, 4), loss_weights)
        return jnp.sum(slope * position_losses(counted, Readout(x, w, *settings), where, targets))

    run = tiny.jit(jax.value_and_grad(run, (0, 1)))
    chunks = int(np.max(-(-np.sum(where.reshape(2, -1), axis=1) // 4)))
    for name, (weights_of, passes) in WEIGHTS.items():
        seen.clear()
        found = jax.block_until_ready(run(features, weights, weights_of(slope)))
        jax.effects_barrier()
        assert len(seen) == passes * chunks, name
        assert_close(found, in_float64(tied))


def test_values_can_be_mapped_over():
    features, weights, targets, _ = arrays()
    where = jnp.stack([places(3), places(30), places(0)])

    def run(where, chunking):
        readout = Readout(features, weights, Projection(False, jnp.float32), chunking)
        return token_nats(readout, targets, where, MASK)

    found = tiny.jit(jax.vmap(functools.partial(run, chunking=Chunking(2, 4))))(where)
    alone = tiny.jit(functools.partial(run, chunking=Chunking()))
    assert_close(found, jnp.stack([alone(w) for w in where]))


@pytest.mark.parametrize(
    "shape", [(8, 1, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((2, 2, 2), (4, 1, 2)))]
)
def test_on_eight_devices(shape):
    """Rows over data x fsdp, weights over fsdp x tensor; no logits and no positions move."""
    mesh = sharding.make_mesh(*shape)
    groups = shape[0] * shape[1]
    rng = np.random.default_rng(0)
    k = 12
    features, _, targets, slope = arrays()
    features = jnp.concatenate([features, features[..., :1]], axis=-1)  # a width of 6 splits
    weights = jnp.asarray(rng.normal(size=(6, k)), jnp.float32)
    where = places(21)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    loss = functools.partial(total, projection=Projection(False, jnp.float32))
    dense = tiny.jit(jax.value_and_grad(functools.partial(loss, chunking=None), (0, 1)))
    wanted = jax.device_get(dense(features, weights, targets, slope, where))
    run = jax.jit(
        jax.value_and_grad(functools.partial(loss, chunking=Chunking(groups, 2)), (0, 1)),
        in_shardings=(rows, cut, rows, rows, rows),
        out_shardings=(None, (rows, cut)),
    )
    inputs = features, weights, targets, slope, where
    compiled = run.lower(*inputs).compile()
    assert_close(compiled(*inputs), wanted)
    if shape == (8, 1, 1):
        # The number of turns before the loop, loss and weights' gradient after it; none inside.
        text = compiled.as_text()
        assert 1 <= text.count(" all-reduce(") <= 3
        assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))


@pytest.mark.parametrize("k", [10, 256])
def test_gradients_of_weights_are_scattered(k, monkeypatch):
    """Each device gets its part of the width, in stages as on more than 8 TPUs; of long rows, too,
    which are cut."""
    stages = [[[0, 2], [1, 3]], [[0, 1], [2, 3]]]
    monkeypatch.setattr(cross_entropy, "scatter_stages", lambda size: stages)
    monkeypatch.setattr(cross_entropy, "_WIDEST", 200)
    mesh, width = sharding.make_mesh(data=2, fsdp=4, tensor=1), 8
    rng = np.random.default_rng(0)
    gradients = jnp.asarray(rng.normal(size=(8, width, k)), jnp.float32)
    chunking = Chunking(8, 2, mesh.abstract_mesh)
    add = functools.partial(cross_entropy._add_groups, chunking, False)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    compiled = jax.jit(lambda g: add((g, None))[0], in_shardings=rows).lower(gradients).compile()
    found = compiled(jax.device_put(gradients, rows))
    np.testing.assert_allclose(found, gradients.sum(0), rtol=1e-5, atol=1e-5)
    assert found.addressable_shards[0].data.shape == (width // 4, k)
    scattered = re.findall(r" = (\S+) reduce-scatter\(", compiled.as_text())
    assert len(scattered) == 2 and all(("2,128]" in shape) == (k > 200) for shape in scattered)


@pytest.mark.parametrize("tied", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sharded_vocabulary_is_never_gathered(tied):
    """Equal losses and gradients; devices have weights and logits of their own tokens alone."""
    mesh, k, width = sharding.make_mesh(data=1, fsdp=2, tensor=4), 64, 6
    rng = np.random.default_rng(0)
    _, _, targets, slope = arrays()
    features = jnp.asarray(rng.normal(size=(N, L, width)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(k, width) if tied else (width, k)), jnp.float32)
    where = jnp.asarray(places(21))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    cut = NamedSharding(mesh, PartitionSpec(*(("tensor", "fsdp") if tied else ("fsdp", "tensor"))))

    def loss(features, weights, targets, slope, where, chunking):
        readout = Readout(features, weights, Projection(tied, jnp.float32), loss_weights=slope)
        nats = token_nats(readout.chunked(chunking), targets, where, MASK)
        return jnp.sum(slope * nats)

    def gradient(chunking):
        return jax.value_and_grad(functools.partial(loss, chunking=chunking), (0, 1))

    inputs = features, weights, targets, slope, where
    wanted = jax.device_get(tiny.jit(gradient(None))(*inputs))
    apply = sharding.sharded_apply(gradient(Chunking(2, 4)), mesh, sharding.LOGICAL_RULES)
    run = jax.jit(
        apply, in_shardings=(rows, cut, rows, rows, rows), out_shardings=(None, (rows, cut))
    )
    compiled = run.lower(*inputs).compile()
    assert_close(compiled(*inputs), wanted)
    text = compiled.as_text()
    assert f"f32[{k // 4},{width}]" in text or f"f32[{width},{k // 4}]" in text
    assert not [shape for shape in re.findall(r"\[([\d,]+)\]", text) if str(k) in shape.split(",")]
