"""Runs of a suite by the launcher, each resumable and with one record at its end."""

import dataclasses
import functools
import importlib
import operator
import pathlib
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from experiments.study.gradient_noise import along_training
from experiments.study.suites import METHODS, Method, Suite, Task
from mdm_jax import files
from mdm_jax.checks import unknown_name
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import source as sources
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.workdir import WorkdirError, changes, check, read_config, write_json
from mdm_jax.training.loop import Interrupt, TrainingStopped
from mdm_jax.training.metrics import read_metrics

RECORD = "study.json"
PARTS = ("runs", "task", "method", "budget-seed")
"""Path of a run below the study's directory."""

PRETRAINING = "pretraining"
"""Budget of the runs whose parameters others start from."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of a study.

    Attributes:
        task, method: names in the suite.
        budget: "passes", "steps" or "pretraining".
        seed: of parameters, order of the data and noise.
    """

    task: str
    method: str
    budget: str
    seed: int

    @property
    def name(self) -> str:
        """Directory below the study's, also printed."""
        return f"{self.task}/{self.method}/{self.budget}-{self.seed}"


def plan(suite: Suite) -> list[Run]:
    """All runs: pretraining, then by budget and seed, so that any prefix compares all methods.

    A method of one forward pass has the same run under both budgets; it is listed under "passes".
    """
    runs = [
        Run(task, method, PRETRAINING, 0)
        for task in suite.pretrainings
        for method in sorted({_pretraining_method(suite, m) for m in suite.methods.values()})
    ]
    return runs + [
        Run(task, name, budget, seed)
        for budget in suite.budgets
        for seed in suite.seeds
        for task in suite.tasks
        for name, method in suite.methods.items()
        if not method.same_as and budget in _own_budgets(suite, method)
    ]


def changed(suite: Suite, changes: Mapping[str, str]) -> Suite:
    """The suite with other values, as text, of config fields; ValueError for text of no number."""
    values = {}
    for path, text in changes.items():
        *sections, name = path.split(".")
        section = functools.reduce(operator.getitem, sections, launch_config.get_config())
        kind = section.get_type(name)  # of a setting whose default is None, too
        try:
            values[path] = kind(text)
        except ValueError as error:
            raise ValueError(f"--config.{path}={text}: not of type {kind.__name__}") from error
    return dataclasses.replace(suite, settings={**suite.settings, **values})


def part(suite: Suite, tasks: Sequence[str], methods: Sequence[str]) -> Suite:
    """The suite's tasks and methods of these names, all where none is named; runs stay the same.

    Raises:
        ValueError: for a name that the suite does not have, and methods without the baseline.
    """
    for kind, names, known in (("task", tasks, suite.tasks), ("method", methods, suite.methods)):
        for name in names:
            if name not in known:
                raise unknown_name(name, known, f"{kind} of {suite.name}")
    if methods and suite.baseline not in methods:
        raise ValueError(
            f"methods are compared with {suite.baseline}, which must be among them, not only "
            + ", ".join(methods)
        )
    kept = {name: task for name, task in suite.tasks.items() if name in (tasks or suite.tasks)}
    started = {task.pretraining for task in kept.values()}
    return dataclasses.replace(
        suite,
        tasks=kept,
        methods={
            name: each for name, each in suite.methods.items() if name in (methods or suite.methods)
        },
        pretrainings={name: task for name, task in suite.pretrainings.items() if name in started},
    )


def planned_as(suite: Suite, run: Run) -> Run:
    """The planned run whose result is that of ``run``: equal method, equal budget."""
    method = suite.methods[run.method]
    name = method.same_as or run.method
    budgets = _own_budgets(suite, suite.methods[name])
    return dataclasses.replace(
        run, method=name, budget=run.budget if run.budget in budgets else budgets[0]
    )


def pretraining(suite: Suite, run: Run) -> Run | None:
    """The run whose parameters ``run`` starts from, if any."""
    source = "" if run.budget == PRETRAINING else suite.tasks[run.task].pretraining
    if not source:
        return None
    return Run(source, _pretraining_method(suite, suite.methods[run.method]), PRETRAINING, 0)


def configure(suite: Suite, run: Run, root: pathlib.Path) -> ConfigDict:
    """The launcher's config of a run.

    Raises:
        ValueError: if the views do not divide the batch, or the steps are not a multiple of the
            suite's measurements and evaluations.
    """
    task, method = _task(suite, run), _method(suite, run)
    module, _, variant = task.config.partition(":")
    config = importlib.import_module(f"experiments.configs.{module}").get_config(variant)
    own = {**method.settings, **method.of_task.get(run.task, {})}
    config.update_from_flattened_dict({**task.settings, **suite.settings, **own})
    config.variance.order = method.order
    config.seed = run.seed
    c = config.train
    if run.budget == "passes":
        if c.batch_size % method.views:
            raise ValueError(
                f"{run.name}: {method.views} views do not divide the batch of {c.batch_size} rows, "
                "so forward passes cannot be made equal; change the task's train.batch_size"
            )
        c.batch_size //= method.views
    for parts in (points(suite, run), suite.evaluations):
        if c.steps % parts:
            raise ValueError(f"{run.name}: {c.steps} steps cannot be cut into {parts} equal parts")
    c.evaluate_every = c.steps // suite.evaluations
    c.checkpoint_every = c.steps // points(suite, run)
    # Interruptions add checkpoints, which must not push out those to be measured.
    c.keep_last = 100 if is_measured(suite, run) else 1
    source = pretraining(suite, run)
    c.init_from = "" if source is None else _path_of(source, run, root)
    return config


def _path_of(source: Run, run: Run, root: pathlib.Path) -> str:
    """The path that the run was started with, so that a study's directory may be moved."""
    path, started = directory(root, source), read_config(directory(root, run))
    before = pathlib.PurePath(started["train"]["init_from"]) if started else path
    same = before.parts[-len(PARTS) :] == path.parts[-len(PARTS) :]
    return str(before if same else path)


def check_run(suite: Suite, run: Run, root: pathlib.Path) -> None:
    """Refuses results made under other settings than the suite's; changes nothing.

    Settings of the evaluation and of the measured variances must agree too.

    Raises:
        WorkdirError: listing what differs.
    """
    workdir, config = directory(root, run), configure(suite, run, root)
    if read_config(workdir) is not None:  # which has what its source fixes, too
        config = sources.filled(config, sources.read(config, workdir), workdir=workdir)
    check(workdir, config)
    changed = changes(workdir, config, ("evaluate", "sample"))
    record = read_record(root, run)
    for point in record["gradient"] if record else ():
        made = (len(point["total"]["group_variances"]), point["total"]["redraws"])
        if is_measured(suite, run) and made != (suite.groups, suite.redraws):
            changed.append(f"groups, redraws: {made} -> {(suite.groups, suite.redraws)}")
            break
    if changed:
        raise WorkdirError(
            f"{workdir} was made under other settings:\n  "
            + "\n  ".join(changed)
            + "\nName another --workdir, restore these settings, or remove this run's directory."
        )


def is_measured(suite: Suite, run: Run) -> bool:
    """Whether the gradient variance of the run is measured."""
    return run.budget == "passes" and run.seed in suite.measured_seeds


def points(suite: Suite, run: Run) -> int:
    """Number of checkpoints of the run."""
    return suite.measured_points if is_measured(suite, run) else 2


def forward_passes(suite: Suite, run: Run, root: pathlib.Path = pathlib.Path()) -> int:
    """Rows times views times steps of the training."""
    c = configure(suite, run, root).train
    return c.steps * c.batch_size * _method(suite, run).views


def directory(root: pathlib.Path, run: Run) -> pathlib.Path:
    """The launcher's working directory of a run."""
    return root / "runs" / run.name


def read_record(root: pathlib.Path, run: Run) -> dict[str, Any] | None:
    """The record of a finished run, or None."""
    path = directory(root, run) / RECORD
    return files.read_json(path) if path.exists() else None


def validation_curve(
    root: pathlib.Path, run: Run, record: Mapping[str, Any]
) -> dict[str, list[float]]:
    """The validation bound of a finished run over forward passes."""
    rows = list(read_metrics(directory(root, run) / "metrics.jsonl", "evaluate"))
    passes = record["batch_size"] * record["views"]
    return {
        "forward_passes": [row["step"] * passes for row in rows],
        "bits_per_unit": [row["bits_per_unit"] for row in rows],
    }


def revision(root: pathlib.Path, run: Run) -> str:
    """Git revision of the source that a run was started with."""
    path = directory(root, run) / "run.json"
    return files.read_json(path)["git_revision"] if path.exists() else "unknown"


def execute(
    suite: Suite,
    run: Run,
    root: pathlib.Path,
    interrupt: Interrupt,
    keep_checkpoints: bool = False,
) -> dict[str, Any] | None:
    """Trains, evaluates and measures one run, resuming it if started, and writes its record.

    A diverged run has a record too (``failed``). Checkpoints are removed once the record is
    written, except those that other runs start from.

    Returns:
        The record; None if it was interrupted, and saved.

    Raises:
        Interrupted: if stopped after training.
        ValueError, OSError, WorkdirError, CheckpointError: with a message for the user.
    """
    started, workdir = time.monotonic(), directory(root, run)
    config = configure(suite, run, root)
    experiment = make_experiment(config)
    views = _method(suite, run).views
    if experiment.transform.views != views:
        raise ValueError(f"{run.method}: {experiment.transform.views} views, not {views}")
    record = dataclasses.asdict(run) | {
        "steps": config.train.steps,
        "batch_size": config.train.batch_size,
        "views": views,
        "forward_passes": config.train.steps * config.train.batch_size * views,
        "failed": "",
        "evaluation": None,
        "gradient": [],
    }
    try:
        if not train.train(experiment, workdir, interrupt):
            return None
    except TrainingStopped as error:
        record["failed"] = str(error)
    else:
        record["evaluation"] = evaluate.evaluate(experiment, workdir, interrupt.check)
        if is_measured(suite, run):
            record["gradient"] = along_training(
                experiment,
                workdir,
                batch_size=config.train.batch_size * views,
                groups=suite.groups,
                redraws=suite.redraws,
                noise=suite.measured_noise,
                reference=_reference(suite, run, root),
                check=interrupt.check,
            )
    record["training_seconds"] = training_seconds(workdir)
    record["seconds_since_last_start"] = time.monotonic() - started
    write_json(workdir / RECORD, record)
    if not keep_checkpoints and run.budget != PRETRAINING:
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
    return record


def training_seconds(workdir: pathlib.Path) -> float:
    """Seconds of the steps alone, over all sessions: no compilation, evaluation or saving."""
    total, before = 0.0, 0
    for record in read_metrics(workdir / "metrics.jsonl", "speed"):
        total += record["step_seconds"] * (record["step"] - before)
        before = record["step"]
    return total


def _reference(suite: Suite, run: Run, root: pathlib.Path):
    method = suite.methods[run.method]
    other = method.settings.get("process", "masked") != "masked"  # has other parameters
    if run.method == suite.baseline or other or suite.baseline not in suite.methods:
        return None
    if not suite.measured_noise:
        return None
    return make_experiment(configure(suite, dataclasses.replace(run, method=suite.baseline), root))


def _own_budgets(suite: Suite, method: Method) -> tuple[str, ...]:
    return suite.budgets if method.views > 1 else suite.budgets[:1]


def _pretraining_method(suite: Suite, method: Method) -> str:
    process = method.settings.get("process", "masked")
    return suite.pretrained_by if process == "masked" else process


def _task(suite: Suite, run: Run) -> Task:
    return (suite.pretrainings if run.budget == PRETRAINING else suite.tasks)[run.task]


def _method(suite: Suite, run: Run) -> Method:
    return (METHODS if run.budget == PRETRAINING else suite.methods)[run.method]
