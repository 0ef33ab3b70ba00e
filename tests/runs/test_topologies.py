"""One step on one device and on meshes of eight: the same draws, losses, gradients and states."""

import functools

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
import tiny

from mdm_jax import data, training
from mdm_jax import sharding as mdm_jax_sharding
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment

CASES = {
    "masked": ("stratified", "ppots_slopes", "mirror"),
    "block": ("stratified_levels", "ema_bins"),
    "gaussian": ("stratified", "ema_bins", "mirror"),
}
MESHES = {
    "data": {"data": 8},
    "fsdp": {"data": 1, "fsdp": 8},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
STEPS = 2


def configure(case, mesh):
    config = (presets.digits_gaussian if case == "gaussian" else presets.quickstart)("smoke")
    config.process = case
    config.variance.order = CASES[case]
    for name in ("ppots_slopes", "ema_bins"):
        config.variance[name].warmup_steps = 0  # the second draw is already warped
    if case == "block":
        config.block.size = 8
    config.train.batch_size = 8
    config.mesh.update(mesh)
    return config


@functools.cache
def build(case, mesh_name=None):
    return make_experiment(configure(case, MESHES.get(mesh_name, {"data": 8})))


def plain_step(experiment):
    """The run's step under gradient descent with rate 1: parameters move by the gradient."""
    return training.make_train_step(
        experiment.apply_fn,
        experiment.objective,
        experiment.transform,
        optax.sgd(1.0),
        experiment.spec,
        seed=experiment.config.seed,
    )


def new_state(experiment):
    params = nn.meta.unbox(experiment._init(jax.random.key(1)))
    return training.new_state(params, optax.sgd(1.0), experiment.transform, experiment.spec)


@functools.cache
def start(case):
    """A host state and batches; the head starts at zero, so everything is moved a little."""
    experiment = build(case)
    state = jax.device_get(tiny.jit(lambda: new_state(experiment))())
    moved = tiny.perturbed(state.params, scale=0.1)
    rows = [np.arange(8) + 8 * number for number in range(STEPS)]
    return state.replace(params=moved, ema=moved), [
        data.gather(experiment.dataset.train, row) for row in rows
    ]


def follow(experiment, state, batches, **jitted):
    """(states, metrics) after each step, on the host."""
    step = tiny.jit(plain_step(experiment), **jitted)
    found = []
    for batch in batches:
        state, metrics = step(state, batch)
        found.append(jax.device_get((state, metrics)))
    return found


@functools.cache
def on_one_device(case):
    return follow(build(case), *start(case))


def draw_of(experiment, state, number, place=None):
    """The draw of a step, made on the mesh if ``place`` says so."""
    make = tiny.jit(
        lambda variance: training.step_draw(
            experiment.config.seed, number, experiment.transform, variance, experiment.spec
        ),
        out_shardings=place,
    )
    return jax.device_get(make(state.variance))


def assert_same_sums(found, expected):
    """Equal up to the order of summation. Parameters moved by a gradient, whose entries are float32
    sums of terms of both signs and of about the size of the array's largest entry; where they
    cancel, the error does not shrink with the sum. So the absolute tolerance follows the array's
    norm: 1e-5 of its largest entry, some eighty roundings."""
    atol = 1e-5 * np.max(np.abs(expected), initial=0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=atol)


# A default test of the step itself on a mesh of eight is in test_training_step.
@pytest.mark.slow
@pytest.mark.parametrize("mesh_name", MESHES)
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_changes_nothing(case, mesh_name, capfd):
    experiment, (state, batches) = build(case, mesh_name), start(case)
    expected = on_one_device(case)
    abstract = mdm_jax_sharding.abstract_sharded(
        lambda: training.new_state(
            experiment._init(jax.random.key(1)),
            optax.sgd(1.0),
            experiment.transform,
            experiment.spec,
        ),
        experiment.mesh,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    placed = [
        mdm_jax_sharding.place_batch(batch, mdm_jax_sharding.batch_sharding(experiment.mesh))
        for batch in batches
    ]
    found = follow(
        experiment, jax.device_put(state, shardings), placed, out_shardings=(shardings, None)
    )
    assert "rematerialization" not in capfd.readouterr().err  # the compiler's warning
    for number, ((one, told), (other, said)) in enumerate(zip(expected, found)):
        assert float(told.gradient_norm) > 1e-3
        chex.assert_trees_all_close(said, told, rtol=2e-5, atol=1e-6)
        jax.tree.map(assert_same_sums, other.params, one.params)
        chex.assert_trees_all_close(other.variance, one.variance, rtol=1e-4, atol=1e-6)
        if number:
            assert any(
                np.any(a != b)
                for a, b in zip(jax.tree.leaves(one.variance), jax.tree.leaves(state.variance))
            )
    sharding = jax.sharding.NamedSharding(
        experiment.mesh, jax.sharding.PartitionSpec(None, ("data", "fsdp"))
    )
    last = expected[-1][0]
    chex.assert_trees_all_equal(
        draw_of(experiment, last, STEPS), draw_of(experiment, last, STEPS, sharding)
    )


def test_heads_that_the_tensor_axis_would_cut_are_refused():
    with pytest.raises(ValueError, match="2 attention heads do not split over tensor=4"):
        make_experiment(configure("masked", {"data": 2, "tensor": 4}))


def test_what_does_not_divide_is_said():
    config = configure("masked", {"data": 1, "fsdp": 8})
    config.model.width = 20
    text = make_experiment(config).describe()
    assert "embed of size 20 does not divide by fsdp=8" in text and "arrays" in text
    config.model.width = 16
    assert "does not divide" not in make_experiment(config).describe()
