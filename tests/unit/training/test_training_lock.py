"""One trainer at a time in a working directory."""

import errno
import fcntl
import os

import pytest

from mdm_jax.launch import presets, train
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.workdir import FILE, WorkdirError, claim, training_lock


def test_a_second_trainer_is_refused_by_name_until_the_first_has_ended(tmp_path):
    with training_lock(tmp_path):
        for _ in range(2):  # the refused one has not let go of it
            with (
                pytest.raises(WorkdirError, match=f"already, by process {os.getpid()} on"),
                training_lock(tmp_path),
            ):
                pass
    with pytest.raises(ZeroDivisionError), training_lock(tmp_path):
        raise ZeroDivisionError
    with training_lock(tmp_path):
        assert len((tmp_path / FILE).read_text().splitlines()) == 1


def test_a_file_system_without_locks_trains_without_one(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with training_lock(tmp_path), training_lock(tmp_path):
        pass


def test_the_launcher_does_not_open_a_directory_in_which_another_trains(tmp_path):
    experiment = make_experiment(presets.quickstart("smoke"))
    claim(tmp_path, experiment.config)
    with training_lock(tmp_path), pytest.raises(WorkdirError, match="trained in already"):
        train.train(experiment, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "run.json", FILE}
