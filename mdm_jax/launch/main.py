"""Train, evaluate, sample and measure the variance of diffusion models.

  mdm train    --config=quickstart --workdir=runs/mine   (the same line resumes)
  mdm evaluate --workdir=runs/mine     held-out bound, accuracy
  mdm sample   --workdir=runs/mine     texts or pictures
  mdm variance --workdir=runs/mine     gradient variance of training methods

--config is a file or a built-in config: quickstart, text_ar, text_block:16,
text_uniform, digits_masked, digits_gaussian:vdm, mnist_gaussian; each also has
the variant :smoke, of seconds. A finished run has its own config.

Settings:   --config.train.steps=2000  --config.variance.order="('stratified',)"
Own text:   --config.data.source=text --config.data.path=FILE
Devices:    --config.mesh=data=2,fsdp=4,tensor=1
Free in every mode: --config.evaluate.*, --config.sample.*, --config.measure.*

Flags:
  --workdir: directory of the run, made if missing
  --mode: train, evaluate, sample or variance, as in the first word
  --allow_config_change: go on in a workdir whose run has another config
  --compilation_cache_dir: compiled programs, kept for the next start; by
    default below ~/.cache/mdm_jax, or $JAX_COMPILATION_CACHE_DIR; '' for none
  --coordinator_address=HOST:PORT --num_processes=N --process_id=I: one of
    several processes; found under Slurm and on TPUs (docs/scaling.md)
  --verbosity=1: show where an error came from; --helpfull: all flags
"""

import contextlib
import os
import pathlib
import shlex
import sys
import time
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from mdm_jax.launch import command_line, evaluate, measure, train
from mdm_jax.launch.build import Experiment, make_experiment
from mdm_jax.launch.config import MeasureSettings
from mdm_jax.launch.sample import format_samples
from mdm_jax.launch.variance_report import format_table
from mdm_jax.launch.workdir import WorkdirError, check, claim
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import Interrupt, Interrupted, TrainingStopped

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config: a built-in one, as in quickstart:smoke, or a file."
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if missing.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    command_line.MODES,
    "What to do; train ends with a report, variance measures methods on a trained or fresh model.",
)
_ALLOW = flags.DEFINE_bool(
    "allow_config_change", False, "Go on in a workdir whose run has another config."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Several processes: HOST:PORT of process 0, the same for all."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Several processes: how many; 1 does not look for a cluster.", 1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Several processes: number of this one, from 0.", 0
)
_CACHE = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Where compiled programs are kept for the next start; by default below ~/.cache/mdm_jax, or "
    "$JAX_COMPILATION_CACHE_DIR; '' for no cache.",
)
_STARTED = time.monotonic()
_ARGUMENTS: list[str] = []
"""The command line as typed."""

_USER_ERRORS = (
    ValueError,
    OSError,
    ImportError,
    MemoryError,  # with advice, from compiling the step
    WorkdirError,
    CheckpointError,
    TrainingStopped,
)
_STOPPED = 130  # what shells report after Ctrl-C


def main(argv: list[str]) -> int:
    """Run one mode; returns the exit status."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {argv[1:]}; settings are written --config.name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax logs every save
    if _WORKDIR.value is None:
        return _fail("--workdir is required: the directory of the run, made if missing")
    if _CONFIG.value is None:
        return _fail("--config is required to train, as in --config=quickstart")
    try:
        command_line.use_compilation_cache(_CACHE.value)
        command_line.start_processes(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except (ValueError, RuntimeError) as error:
        return _fail(str(error))
    workdir = pathlib.Path(_WORKDIR.value)
    if jax.process_count() > 1:
        return _run_as_one_of_several(workdir)
    try:
        return _run(workdir)
    except KeyboardInterrupt:
        return _stopped_at_once()


def _run(workdir: pathlib.Path) -> int:
    try:
        check(workdir, _CONFIG.value, _ALLOW.value)
        try:
            experiment = make_experiment(_CONFIG.value)
        except TypeError as error:
            raise ValueError(str(error)) from error  # a setting of the wrong kind
        return _MODES[_MODE.value](experiment, workdir)
    except _USER_ERRORS as error:
        logging.debug("where it came from:", exc_info=True)
        return _fail(str(error))


def _run_as_one_of_several(workdir: pathlib.Path) -> int:
    """As :func:`_run`; only process 0 prints, and a failing process ends the others too."""
    if _MODE.value == "variance":
        return _fail("--mode=variance runs in one process; start it with --num_processes=1")
    try:
        with contextlib.ExitStack() as stack:
            if jax.process_index():
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
            code = _run(workdir)
    except KeyboardInterrupt:
        _leave(_stopped_at_once())
    except BaseException as error:
        logging.debug("where it came from:", exc_info=True)
        code = _fail(str(error))
    if code not in (0, _STOPPED):
        _fail(f"process {jax.process_index()} ends; the first to end says why")
        _leave(code)
    return code


def _leave(code: int) -> NoReturn:
    """Exit at once, without waiting for other processes; closed connections end them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train(experiment: Experiment, workdir: pathlib.Path) -> int:
    print(experiment.describe(), flush=True)
    with Interrupt() as interrupt:
        try:
            if train.train(experiment, workdir, interrupt, _ALLOW.value, _STARTED):
                print(evaluate.report(experiment, workdir, interrupt.check))
                return 0
        except Interrupted:
            pass  # during the final evaluation; training itself is saved
    print(f"stopped and saved in {workdir}; the same command line resumes:\n  {_command()}")
    return _STOPPED


def _evaluate(experiment: Experiment, workdir: pathlib.Path) -> int:
    record = evaluate.evaluate(experiment, workdir)
    error = record["standard_error_bits_per_unit"]
    print(
        f"{record['split']}: {record['bits_per_unit']:.4f}"
        + (f" ± {error:.4f}" if error is not None else "")
        + f" bits per {record['unit']}; all numbers in {workdir / 'evaluation.json'}"
    )
    for line in experiment.family.details(record):
        print(line)
    return 0


def _sample(experiment: Experiment, workdir: pathlib.Path) -> int:
    drawn = evaluate.sample(experiment, workdir)
    if drawn["samples"]:
        print(format_samples(drawn["samples"]))
    print(f"written to {', '.join(drawn['files'])}")
    return 0


def _variance(experiment: Experiment, workdir: pathlib.Path) -> int:
    c = dict(experiment.config.measure)
    names = c.pop("methods")
    methods = measure.named(names) if names else None
    claim(workdir, experiment.config)
    record = measure.measure(experiment, workdir, methods, MeasureSettings(**c))
    print(format_table(record))
    print(f"written to {', '.join(map(str, record['files']))}")
    return 0


_MODES = {"train": _train, "evaluate": _evaluate, "sample": _sample, "variance": _variance}


def _parse(argv: list[str]) -> list[str]:
    _ARGUMENTS[:] = argv
    if {"--help", "-help", "-h"} & {*argv[1:]}:
        print(__doc__)
        sys.exit(1)  # absl's status for --help
    try:
        # ml_collections reads the overrides from sys.argv, whatever it is given.
        sys.argv = command_line.with_config(argv)
    except command_line.CommandLineError as error:
        sys.exit(_fail(str(error)))
    except flags.Error:
        pass  # absl reports it below
    return app.parse_flags_with_usage(sys.argv)


def _command() -> str:
    program = pathlib.Path(_ARGUMENTS[0]).name
    start = {
        "mdm": ["mdm"],
        "__main__.py": ["python", "-m", "mdm_jax.launch"],
    }.get(program, ["python", "-m", "experiments.launch"])
    return shlex.join([*start, *_ARGUMENTS[1:]])


def _stopped_at_once() -> int:
    print("\nstopped at once; what was saved before is whole", file=sys.stderr)
    return _STOPPED


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def run() -> None:
    """Console script ``mdm``."""
    app.run(main, flags_parser=_parse)
