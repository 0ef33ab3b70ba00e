"""What an experiment computes once, however often it is used."""

import jax
import numpy as np
import pytest
from flax import linen as nn

from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.start import scaled


def test_the_network_is_traced_once_for_its_shapes_shardings_and_values(monkeypatch):
    init_of, traced = training.linen_init, []

    def counted(*arguments):
        init = init_of(*arguments)
        return lambda key: traced.append(key) or init(key)

    monkeypatch.setattr(training, "linen_init", counted)
    experiment = make_experiment(scaled.filled(presets.digits_masked("smoke")))
    assert "parameters" in experiment.describe()
    state = jax.eval_shape(experiment.initial_state)
    assert jax.tree.structure(state) == jax.tree.structure(experiment.abstract_state())
    assert len(traced) == 1


@pytest.mark.parametrize("devices, tensor", [(2, 1), (4, 2), (8, 1)])
def test_losses_are_chunked_by_the_devices_of_the_run(devices, tensor):
    """mesh.data=-1 is of those that are given, which need not be all of this process."""
    config = presets.digits_masked("smoke")
    config.model.logits_at = "targets"
    config.mesh.update(data=-1, tensor=tensor)
    experiment = make_experiment(config, devices=jax.devices()[:devices])
    rows = np.zeros((8, experiment.dataset.length), np.int32)
    params = nn.meta.unbox(experiment.shapes())
    outputs = jax.eval_shape(experiment.apply_fn, params, rows, np.zeros((8, 1)), rows)
    assert outputs.chunking.groups == devices // tensor
    assert experiment.config.mesh.data == -1


def test_more_devices_than_there_are_is_an_error_about_the_mesh():
    config = presets.digits_masked("smoke")
    config.mesh.tensor = 16
    with pytest.raises(ValueError, match="does not use the 8 devices at hand"):
        make_experiment(config)


@pytest.mark.parametrize(
    "name, changes, unit, biased",
    [
        ("quickstart", {}, "char", False),
        ("quickstart", {"weighting.name": "min_snr"}, "char", True),  # of the monitor "levels"
        ("quickstart", {"weighting.clamp": 5.0}, "", True),
        ("quickstart", {"variance.order": ("stratified", "cdcd_warp")}, "char", True),
        ("text_cdcd", {}, "", True),
        ("digits_gaussian", {}, "dim", False),
        ("digits_gaussian", {"gaussian.recipe": "edm"}, "", True),
    ],
)
def test_a_loss_that_is_no_bound_is_not_shown_in_bits(name, changes, unit, biased):
    config = presets.get_config(f"{name}:smoke")
    config.update_from_flattened_dict(changes)
    loop = make_experiment(config).loop
    assert (loop.unit, loop.biased) == (unit, biased)


def test_warps_of_three_parameters_are_one_for_each_group():
    config = presets.get_config("table_cdtd:type")
    config.variance.order = ("stratified", "cdtd_warp_logistic")
    experiment = make_experiment(config)
    assert "cdtd_warp_logistic" in experiment.transform.name
    state = experiment.transform.init(experiment.spec)["cdtd_warp_logistic"]
    assert {leaf.shape for leaf in jax.tree.leaves(state.curves)} == {(2,)}
