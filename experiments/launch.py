"""Trains, evaluates and samples from the command line.

Start a run, and resume it with the same line:

  python -m experiments.launch --config=experiments/configs/quickstart.py --workdir=runs/mine

Change any setting: --config.train.steps=2000 --config.variance.order="('stratified',)"
Own text:           --config.data.source=text --config.data.path=FILE
Evaluate or sample: --workdir=runs/mine --mode=evaluate (or sample); the config is the run's own
                    unless --config is given; --config.evaluate.* and --config.sample.* are free.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import run
from experiments.experiment import Experiment, make_experiment
from experiments.workdir import WorkdirError, claim, read_config
from mdm_jax.training import CheckpointError, Interrupt, Interrupted, TrainingStopped

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file, as in experiments/configs/quickstart.py or quickstart.py:smoke."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "evaluate", "sample"], "What to do; train ends with a report."
)
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir whose run has another config."
)

_USER_ERRORS = (WorkdirError, CheckpointError, TrainingStopped)


def main(argv: list[str]) -> int:
    """Runs one mode; returns the exit status."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {argv[1:]}; settings are written --config.name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax tells a story at every save
    if _WORKDIR.value is None:
        return _fail("--workdir is required: the directory of the run, made if missing")
    workdir = pathlib.Path(_WORKDIR.value)
    try:
        config = _config(workdir)
        experiment = make_experiment(config)
    except (ValueError, TypeError, OSError, ImportError, WorkdirError) as error:
        logging.debug("while building the experiment", exc_info=True)
        return _fail(str(error))
    try:
        return _MODES[_MODE.value](experiment, workdir)
    except _USER_ERRORS as error:
        return _fail(str(error))


def _config(workdir: pathlib.Path) -> ConfigDict:
    if _CONFIG.value is not None:
        return _CONFIG.value
    if _MODE.value == "train":
        raise ValueError("--config is required to train, as in experiments/configs/quickstart.py")
    found = read_config(workdir)
    if found is None:
        raise WorkdirError(f"{workdir} holds no run (no config.json); train one first")
    return ConfigDict(found)


def _train(experiment: Experiment, workdir: pathlib.Path) -> int:
    claim(workdir, experiment.config, _ALLOW.value)
    if experiment.dataset.tokenizer is not None:
        path = workdir / "tokenizer.json"
        if not path.exists():
            experiment.dataset.tokenizer.save(path)
    print(experiment.describe(), flush=True)
    with Interrupt() as interrupt:
        try:
            finished = run.train(experiment, workdir, interrupt)
            if finished:
                print(run.report(experiment, workdir, interrupt.check))
                return 0
        except Interrupted:
            pass  # during the final evaluation; training itself is saved
    print(f"stopped and saved in {workdir}; the same command line resumes:\n  {_command_line()}")
    return 130


def _evaluate(experiment: Experiment, workdir: pathlib.Path) -> int:
    _require_same(experiment, workdir)
    record = run.evaluate(experiment, workdir)
    error = record["standard_error_bits_per_unit"]
    print(
        f"{record['split']}: {record['bits_per_unit']:.4f}"
        + (f" ± {error:.4f}" if error is not None else "")
        + f" bits per {record['unit']}, perplexity per token {record['perplexity']:.4f}; all "
        f"numbers in {workdir / 'evaluation.json'}"
    )
    return 0


def _sample(experiment: Experiment, workdir: pathlib.Path) -> int:
    from experiments.generation import format_samples

    _require_same(experiment, workdir)
    drawn = run.sample(experiment, workdir)
    print(format_samples(drawn["samples"]) if drawn["samples"] else "")
    print(f"written to {', '.join(drawn['files'])}")
    return 0


def _require_same(experiment: Experiment, workdir: pathlib.Path) -> None:
    if read_config(workdir) is None:
        raise WorkdirError(f"{workdir} holds no run (no config.json); train one first")
    claim(workdir, experiment.config, _ALLOW.value)


def _command_line() -> str:
    return " ".join(["python -m experiments.launch", *sys.argv[1:]])


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


_MODES = {"train": _train, "evaluate": _evaluate, "sample": _sample}


if __name__ == "__main__":
    app.run(main)
