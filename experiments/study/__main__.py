"""The stability study: methods x seeds x tasks, from one command, resumable run by run.

  python -m experiments.study --suite=small --workdir=runs/study

The same line resumes after Ctrl-C, a kill or a crash: finished runs are skipped, interrupted ones
go on from their last checkpoint. Every run is a working directory of the launcher below
WORKDIR/runs. Tables (study.md), all numbers (study.json) and plots are in WORKDIR, written again
whenever the command ends; --only_tables writes them from what is finished and runs nothing.
--only_tasks and --only_methods take a part of a suite, whose tables compare, and whose p-values are
corrected for, that part alone. Suites and parts that share a workdir overwrite each other's tables.

Suites (experiments/study/suites.py defines them, docs/study.md has the results):

  smoke            seconds: does everything work?
  eight            five methods, three tasks, seeds that chose nothing: an hour on two CPU cores
  longer           the same on two tasks at three times the steps
  tuned, weights, unweighted, field_text, field_sudoku, field_finetune
                   other learning rates, weights and methods on the seeds of eight, whose workdir
                   they may share
  small, confirmation, confirmation_rates, attempts
                   earlier: all 13 methods, and other ranges of rates, five seeds each
  larger           9x9 Sudoku, Countdown, subwords; all methods of the field: nights
  arithmetic       word problems; needs --config.data.path=FILE of experiments.prepare mawps
  finetune, finetune_auto
                   the repository's small model, or with --config.model.source=DIR another one
  tune, tune_answers, tune_finetune, tune_larger
                   learning rates of standard training, and of rates in [0.3, 0.8]
  curves           runs to fit P-POTS to
  noise_scale      gradients along training; experiments.study.noise_scale reads it
  full, a2d        a GPU; a2d needs --config.model.source=DIR --config.data.path=FILE
"""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from absl import app, flags, logging

from experiments.study import expected, plots, table
from experiments.study import runs as study_runs
from experiments.study.runs import Run
from experiments.study.suites import SUITES, Suite
from mdm_jax.data.tokenizers import printable
from mdm_jax.launch import command_line
from mdm_jax.launch.workdir import WorkdirError
from mdm_jax.training.checkpoints import CheckpointError
from mdm_jax.training.loop import Interrupt, Interrupted

_SUITE = flags.DEFINE_enum("suite", None, sorted(SUITES), "Which runs.", required=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the study.", required=True)
_PROCESSES = flags.DEFINE_integer(
    "processes", 0, "Runs at a time, each in a process; 0: one per core, but one with a GPU."
)
_ONLY_TABLES = flags.DEFINE_bool("only_tables", False, "Run nothing, write tables and plots.")
_TASKS = flags.DEFINE_list(
    "only_tasks", [], "Only these; another call with this workdir adds others."
)
_METHODS = flags.DEFINE_list("only_methods", [], "Only these, the baseline among them.")
_KEEP = flags.DEFINE_bool("keep_checkpoints", False, "Keep those of finished runs.")
_CHANGES = {
    path: flags.DEFINE_string(f"config.{path}", None, f"The field {path} of every run.")
    for path in ("model.source", "model.dtype", "data.path", "train.batch_size", "optimizer.peak")
}
_CACHE = flags.DEFINE_string(
    "compilation_cache_dir", None, "As of the command mdm; '' for no cache."
)
_WORKER = flags.DEFINE_integer("worker", -1, "Used by the command itself.")

_STOPPED = 130
_ERRORS = (ValueError, OSError, ImportError, WorkdirError, CheckpointError)
_PATIENCE = 1.0
"""Seconds between checks for runs that other processes have finished."""


def main(argv: list[str]) -> int:
    """Runs what is not finished, then writes the tables; returns the exit status."""
    if len(argv) > 1:
        return _fail(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    root = pathlib.Path(_WORKDIR.value)
    changes = {path: flag.value for path, flag in _CHANGES.items() if flag.value is not None}
    try:
        suite = study_runs.part(SUITES[_SUITE.value], _TASKS.value, _METHODS.value)
        suite = study_runs.changed(suite, changes)
    except ValueError as error:
        return _fail(str(error))
    if _WORKER.value >= 0:
        return _work(suite, root)
    try:
        runs = study_runs.plan(suite)
        for run in runs:
            study_runs.check_run(suite, run, root)
        print(table.progress(suite, root), flush=True)
        for line in (*expected.time_lines(suite, root), expected.power_line(suite)):
            print(line, flush=True)
        code = 0 if _ONLY_TABLES.value else _supervise(suite, runs, root)
        print(table.progress(suite, root))
        record = table.write(suite, root)
        files = plots.write(suite, root, record)
    except _ERRORS as error:
        return _fail(str(error))
    except KeyboardInterrupt:  # a second Ctrl-C, which the workers received too
        return _fail("stopped at once; earlier checkpoints are complete", _STOPPED)
    print(f"written to {root / 'study.md'}, {root / 'study.json'} and {len(files)} plots")
    if code == _STOPPED:
        print("stopped; the same command line resumes")
    return code


def _supervise(suite: Suite, runs: Sequence[Run], root: pathlib.Path) -> int:
    """Starts the workers and reports finished runs; returns the exit status."""
    pending = [run for run in runs if study_runs.read_record(root, run) is None]
    if not pending:
        return 0
    count = min(_PROCESSES.value or _default_processes(), len(pending))
    (root / "logs").mkdir(parents=True, exist_ok=True)
    started, done, total = time.monotonic(), 0, len(pending)
    with Interrupt() as interrupt:
        workers = [_start_worker(number, root) for number in range(count)]
        stopping = False
        while any(worker.poll() is None for worker in workers):
            if interrupt.requested and not stopping:
                stopping = True
                for worker in workers:
                    if worker.poll() is None:
                        worker.send_signal(signal.SIGTERM)
            time.sleep(_PATIENCE / 4)
            for run in list(pending):
                if (record := study_runs.read_record(root, run)) is not None:
                    pending.remove(run)
                    done += 1
                    left = (time.monotonic() - started) / done * (total - done)
                    print(table.line(suite, run, record, done, total, left), flush=True)
    if interrupt.requested:
        return _STOPPED
    failed = [n for n, worker in enumerate(workers) if worker.returncode]
    for number in failed:
        log = root / "logs" / f"worker-{number}.log"
        _fail(f"a worker ended early; the end of {log}:\n" + "\n".join(_tail(log)))
    return 2 if failed or pending else 0


def _start_worker(number: int, root: pathlib.Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.study", *sys.argv[1:], f"--worker={number}"]
    with (root / "logs" / f"worker-{number}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def _work(suite: Suite, root: pathlib.Path) -> int:
    """One worker: executes one unclaimed run after the other."""
    sys.argv[:] = [each for each in sys.argv if not each.startswith("--worker=")]  # as runs record
    _stay_on_a_core(_WORKER.value)
    parent = os.getppid()
    try:
        command_line.use_compilation_cache(_CACHE.value)
        with Interrupt() as interrupt:
            for run in _claimed(suite, root):
                print(f"=== {run.name}", flush=True)
                study_runs.execute(suite, run, root, interrupt, _KEEP.value)
                if interrupt.stopping or os.getppid() != parent:
                    return _STOPPED
    except (Interrupted, KeyboardInterrupt):
        return _STOPPED
    except _ERRORS as error:
        return _fail(str(error))
    return 0


def _claimed(suite: Suite, root: pathlib.Path) -> Iterator[Run]:
    """Runs claimed by this process, until none is left to claim.

    A claim is a file lock, which the system releases however the process ends.
    """
    left = study_runs.plan(suite)
    (root / "locks").mkdir(parents=True, exist_ok=True)
    while left := [run for run in left if study_runs.read_record(root, run) is None]:
        waiting = False
        for run in left:
            source = study_runs.pretraining(suite, run)
            if source is not None and study_runs.read_record(root, source) is None:
                waiting = True
                continue
            with (root / "locks" / run.name.replace("/", "-")).open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if study_runs.read_record(root, run) is None:
                    yield run
                    break
        else:
            if not waiting:
                return  # other workers have the rest
            time.sleep(_PATIENCE)


def _default_processes() -> int:
    if pathlib.Path("/dev/nvidiactl").exists() and os.environ.get("JAX_PLATFORMS") != "cpu":
        return 1
    return len(os.sched_getaffinity(0))


def _stay_on_a_core(number: int) -> None:
    """Pins the worker: two runs at a time beat one run on two cores by a factor of two."""
    cores = sorted(os.sched_getaffinity(0))
    if (_PROCESSES.value or _default_processes()) > 1:
        os.sched_setaffinity(0, {cores[number % len(cores)]})


def _tail(path: pathlib.Path, lines: int = 10) -> list[str]:
    return path.read_text("utf-8", errors="replace").splitlines()[-lines:]


def _fail(message: str, code: int = 2) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    app.run(main)
