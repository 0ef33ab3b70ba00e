"""One trainer at a time in a working directory."""

import errno
import fcntl
import os

import pytest

from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import (
    FILE,
    WorkdirError,
    check,
    claim,
    new_files,
    read_config,
    training_lock,
)


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


@pytest.mark.parametrize("allowed", [False, True])
def test_a_run_that_begins_after_the_first_check_is_not_resumed_unasked(
    tmp_path, monkeypatch, allowed
):
    """Another config's run appears between the check and the lock."""
    config = presets.quickstart("smoke")
    experiment = make_experiment(config)
    other = presets.quickstart("smoke")
    other.optimizer.peak = 0.5
    monkeypatch.setattr(train, "check_start", lambda *_: claim(tmp_path, other))

    def resume(*_):
        raise InterruptedError  # the state would be read here

    monkeypatch.setattr(train.training, "Checkpoints", resume)
    with pytest.raises(InterruptedError if allowed else WorkdirError) as refused:
        train.train(experiment, tmp_path, allow_config_change=allowed)
    assert allowed or "optimizer.peak: 0.5 -> 0.02" in str(refused.value)
    assert read_config(tmp_path)["optimizer"]["peak"] == 0.5
    assert not (tmp_path / "config.1.json").exists()


def test_killed_between_lock_and_config_the_directory_is_still_new(tmp_path):
    with training_lock(tmp_path / "run"):
        pass
    (tmp_path / "run" / "variance").mkdir()  # measured before there is a run
    check(tmp_path / "run", presets.quickstart("smoke"))
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(WorkdirError, match="is not empty and holds no run"):
        check(tmp_path / "run", presets.quickstart("smoke"))


def test_names_of_files_are_taken_by_making_them(tmp_path):
    """Two writers never get one name; files of either kind keep it."""
    first = new_files(tmp_path / "new", "step-1", ".jsonl", ".txt")
    second = new_files(tmp_path / "new", "step-1", ".jsonl", ".txt")
    (tmp_path / "new" / "step-1-3.txt").touch()
    third = new_files(tmp_path / "new", "step-1", ".jsonl", ".txt")
    names = [[path.name for path in paths] for paths in (first, second, third)]
    stems = ("step-1", "step-1-2", "step-1-4")
    assert names == [[f"{stem}.jsonl", f"{stem}.txt"] for stem in stems]
    assert all(paths[0].exists() for paths in (first, second, third))
    with pytest.raises(WorkdirError, match="step-1-3.txt/a.png could not be written: File exists"):
        new_files(tmp_path / "new" / "step-1-3.txt", "a", ".png")
