"""Starting from another run's parameters."""

import chex
import jax
import pytest
import saved_run

from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.build import load_parameters, make_experiment, open_workdir
from mdm_jax.launch.modes import measure, train
from mdm_jax.launch.workdir import WorkdirError, check_source, saved_config

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def trained(one_device, tmp_path_factory):
    """Directory of a short run that was never evaluated, so that its last state is all it has."""
    workdir = tmp_path_factory.mktemp("warm") / "run"
    config = presets.quickstart("smoke")
    config.optimizer.name = "adamw"  # compiles in half the time
    saved_run.save(make_experiment(config), workdir)
    return workdir


def goes_on(trained, **data):
    """A run of another batch size and chain that starts from it."""
    config = saved_config(trained)
    config.train.update(init_from=str(trained), batch_size=16)
    config.variance.order = ()
    config.data.update(**data)
    return make_experiment(config)


def goes_on_as_it_was(trained):
    return make_experiment(saved_config(trained))


@pytest.mark.slow
def test_parameters_are_those_of_the_other_run_and_the_rest_is_new(trained, capsys):
    experiment = goes_on(trained)
    state = train.initial_state(experiment)
    step, expected = load_parameters(experiment, trained)
    assert f"parameters of {trained}, step {step}" in capsys.readouterr().out
    whole = open_workdir(trained).restore_last(goes_on_as_it_was(trained).abstract_state())
    chex.assert_trees_all_equal(training.averaged(whole.state), expected)
    fresh = experiment.initial_state()
    chex.assert_trees_all_equal(state.params, expected)
    chex.assert_trees_all_equal(state.ema, expected)
    for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(state.ema)):
        pointers = [a.addressable_data(0).unsafe_buffer_pointer() for a in (one, other)]
        assert pointers[0] != pointers[1]  # both are donated
    chex.assert_trees_all_equal(state.opt_state, fresh.opt_state)
    assert int(state.step) == 0
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(fresh.params, expected)


def test_a_run_that_has_begun_goes_on_when_the_other_one_has_moved(trained, tmp_path):
    """Training reads its own checkpoint, and so do the other modes."""
    config = saved_config(trained)
    config.train.init_from = str(tmp_path / "moved")
    experiment = make_experiment(config)
    train.check_start(experiment, trained)
    with pytest.raises(WorkdirError, match="train.init_from: .*moved holds no run"):
        train.check_start(experiment, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_what_is_measured_before_training_is_what_it_starts_from(trained, tmp_path):
    experiment = goes_on(trained)
    _, step, params, _ = measure.parameters(experiment, tmp_path)
    assert step is None and measure.origin(experiment, step) == f"the run {trained}"
    chex.assert_trees_all_equal(params, load_parameters(experiment, trained)[1])


def test_a_run_of_other_tokens_or_none_at_all_is_refused(trained, tmp_path):
    with pytest.raises(WorkdirError, match="tokenizer of .* is another"):
        train.initial_state(goes_on(trained, tokenizer="byte"))
    experiment = goes_on(trained)
    with pytest.raises(WorkdirError, match="holds no run"):
        check_source(tmp_path, experiment.dataset.tokenizer, "train.init_from")
