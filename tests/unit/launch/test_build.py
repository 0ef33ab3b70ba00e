"""What an experiment computes once, however often it is used."""

import jax

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
