"""The mode ``train``: start or resume a run."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mdm_jax import data, distributed, files, training
from mdm_jax.data.tokenizers import load_tokenizer
from mdm_jax.launch import source as sources
from mdm_jax.launch.alignment import validation
from mdm_jax.launch.alignment.experiment import (
    AlignedExperiment,
    aligned,
    check_same_sampler,
    with_reference,
)
from mdm_jax.launch.alignment.rounds import RewardPanel, Rounds
from mdm_jax.launch.auto import choose, clip
from mdm_jax.launch.auto.chain import Chain, is_automatic, last_choice
from mdm_jax.launch.build import Experiment, open_workdir, read_parameters
from mdm_jax.launch.modes.sample import show_samples
from mdm_jax.launch.reports.panel import NoisePanel
from mdm_jax.launch.reports.writers import check_boards, open_writer
from mdm_jax.launch.spacing.stored import stored_generator
from mdm_jax.launch.start import longer
from mdm_jax.launch.start.optimizer import learning_rate
from mdm_jax.launch.workdir import (
    WorkdirError,
    changes,
    check,
    check_history,
    check_source,
    claim,
    read_config,
    saved_config,
    saved_nothing,
    set_history_aside,
    training_lock,
)
from mdm_jax.training.checkpoints import CheckpointError, Restored
from mdm_jax.training.loop import BatchStream
from mdm_jax.training.step import TrainState
from mdm_jax.types import Batch, PyTree


def train(
    experiment: Experiment,
    workdir: str | os.PathLike,
    interrupt: training.Interrupt | None = None,
    allow_config_change: bool = False,
    launched_at: float | None = None,
    restart: bool = False,
) -> bool:
    """Train, resuming from the directory's last undamaged checkpoint.

    A directory with a history and no checkpoint is refused. ``restart``: from step 0, whatever is
    there; the old history is kept beside the new one (``workdir.set_history_aside``), as is that of
    a run with another config that has saved nothing yet. Claims the directory (``workdir.claim``)
    after all checks. True: finished; False: interrupted and saved.

    Raises WorkdirError, CheckpointError, TrainingStopped or ValueError for users.
    """
    c, workdir, experiment = experiment.config, files.as_path(workdir), aligned(experiment)
    check(workdir, c, allow_config_change or saved_nothing(workdir))
    check_same_sampler(experiment, workdir, allow_config_change)
    check_start(experiment, workdir)
    check_boards(c)
    interrupt = interrupt or training.Interrupt()
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(experiment.train_batches()))
        stack.enter_context(training_lock(workdir))
        unsaved = saved_nothing(workdir)
        allow_config_change = allow_config_change or unsaved
        check(workdir, c, allow_config_change)  # again: a run may have begun in the meantime
        restart = restart or distributed.from_first(unsaved and bool(changes(workdir, c)))
        distributed.barrier("settings and directory are good")
        if read_config(workdir) is None and distributed.is_first():
            claim(workdir, c)
        distributed.barrier("directory claimed")
        _check_shared(workdir)
        if restart:
            set_history_aside(workdir)
        checkpoints = training.Checkpoints(workdir / "checkpoints", c.train.keep_last)
        stack.callback(checkpoints.close)
        restored = _restore(experiment, checkpoints)
        if restored is None:
            check_history(workdir, checkpoints.unsaved)
            checkpoints.begin()
            sources.keep(c, experiment.source, workdir)
            experiment = experiment.with_frozen(workdir)
            state, noted, rows = initial_state(experiment), {}, experiment.spec.batch_size
            experiment = with_reference(experiment, state, workdir)
            if is_automatic(c) and last_choice(workdir) is None:
                experiment, state = _with_chosen_chain(experiment, state, workdir, interrupt)
            if experiment.spec.batch_size != rows:
                batches = stack.enter_context(contextlib.closing(experiment.train_batches()))
        else:
            experiment = experiment.with_noted_chain(restored.notes).with_frozen(workdir)
            state, noted = _continue(restored, _stream(experiment), batches)
        experiment = with_reference(experiment, state, workdir)
        old, start = read_config(workdir), int(jax.device_get(state.step))
        raised = c.train.steps > old["train"]["steps"]
        if start > c.train.steps:
            raise WorkdirError(
                f"train.steps={c.train.steps}: {workdir} has been trained for {start} steps, and "
                f"none is undone; give --config.train.steps={start} or more, another --workdir, or "
                "--restart to start anew"
            )
        progress = noted.get("progress", {})
        stopping = training.EarlyStopping(training.StopSettings(**c.train.stop), noted.get("stop"))
        notes = {"stream": _stream(experiment), "stop": stopping.state}
        notes |= {"chain": experiment.chain.to_dict()} if is_automatic(c) else {}
        if distributed.is_first():
            if start and raised:
                longer.set_results_aside(workdir)
            claim(workdir, c, allow_config_change)
            _save_tokenizer(experiment, workdir)
        running = Running(experiment)
        writer = open_writer(c, workdir, start, again=progress.get("hooks_due", ()))
        stack.callback(writer.close)
        hooks = make_hooks(running, workdir, writer, stopping, notes)
        if start < c.train.steps and not stopping.stopped:
            if start and raised:
                print(longer.describe(old, c, start), flush=True)
            print(f"{'resuming at' if start else 'starting from'} step {start}", flush=True)
            running.prepare(writer, workdir)
            running.compile()
            running.panel = NoisePanel(experiment, writer, start)
            hooks.panel = running.panel
            if running.rounds:
                hooks.panel = RewardPanel(running.rounds, running.panel)
        if restored is None and (c.model.source or c.train.init_from):
            # What the model writes before it is trained, for the report.
            hooks.sample(0, training.averaged(state), interrupt.check)
        profile = _profile_directory(workdir) if c.train.profile_at else ""
        options = dataclasses.replace(
            experiment.loop, profile_directory=profile, launched_at=launched_at
        )
        training.train(
            running.step,
            state,
            batches,
            options=options,
            checkpoints=checkpoints,
            writer=writer,
            hooks=hooks,
            notes=notes,
            progress=progress,
            interrupt=interrupt,
        )
        if stopping.stopped:
            best = (checkpoints.best_metrics() or {}).get("step")
            print(f"{stopping.describe()}; the best parameters, of step {best}, are those that")
            print("evaluate, sample and export take", flush=True)
    return not interrupt.stopping


def _restore(experiment: Experiment, checkpoints: training.Checkpoints) -> Restored | None:
    """The last state; monitors that it has not, or in another form, start afresh."""

    def abstract(records: dict[str, Any]) -> TrainState:
        return experiment.with_noted_chain(records["notes"]).abstract_state()

    fields = [field.name for field in dataclasses.fields(TrainState) if field.name != "monitors"]
    restored = checkpoints.restore_last_fields(abstract, fields)
    if restored is None:
        return None
    monitors, state = restored.state.monitors, restored.state
    leaves = {name: jax.tree.leaves(monitors[name], is_leaf=_is_none) for name in monitors}
    missing = [name for name, each in leaves.items() if any(leaf is None for leaf in each)]
    if missing:
        print(f"the monitors {', '.join(missing)} are not in the checkpoint; they start afresh")

        def new(params: PyTree) -> dict[str, PyTree]:
            return {m.name: m.init(params) for m in experiment.monitors if m.name in missing}

        wanted = experiment.abstract_state().monitors
        places = {n: jax.tree.map(lambda a: a.sharding, wanted[n]) for n in missing}
        monitors = {**monitors, **jax.jit(new, out_shardings=places)(state.params)}
    return restored._replace(state=state.replace(monitors=monitors))


def _is_none(leaf: Any) -> bool:
    return leaf is None


def initial_state(experiment: Experiment) -> TrainState:
    """The state at step 0, with parameters of the run ``train.init_from`` or of ``model.source``.

    A masked model can continue as a block or autoregressive one; optimiser, averages and variance
    transforms start afresh. Raises WorkdirError if there is no run, its tokens differ, or it holds
    adapters alone, CheckpointError without a checkpoint of this network.
    """
    source = experiment.config.train.init_from
    if not source:
        return experiment.initial_state()
    directory = files.as_path(source)
    _check_source(experiment)
    found = read_parameters(directory, experiment.abstract_state())
    if found is None:
        raise CheckpointError(f"train.init_from: {directory} has no checkpoint yet; train it first")
    step, params = found
    print(f"parameters of {directory}, step {step}", flush=True)
    return experiment.initial_state(params)


def check_start(experiment: Experiment, workdir: files.Path) -> None:
    """Raise WorkdirError where ``train.init_from`` is needed (no checkpoints yet) but unusable."""
    source = experiment.config.train.init_from
    if not source:
        return
    checkpoints = open_workdir(workdir)
    started = bool(checkpoints.steps())
    checkpoints.close()
    if not started:
        _check_source(experiment)


def _check_source(experiment: Experiment) -> None:
    directory = files.as_path(experiment.config.train.init_from)
    check_source(directory, experiment.dataset.tokenizer, "train.init_from")
    if saved_config(directory).adapter.name:
        raise WorkdirError(
            f"train.init_from: {directory} holds adapters alone; mdm export writes the merged "
            "model, from which model.source=DIR begins"
        )


class Running:
    """The experiment that is being trained, and its compiled step: ``auto`` may change both."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self.panel: NoisePanel | None = None
        self.rounds: Rounds | None = None
        self._steps: dict[int, Callable[..., Any]] = {}

    def prepare(self, writer: training.MetricWriter, workdir: files.Path) -> None:
        """What a step needs besides its program: answers, where these are rewarded."""
        if isinstance(self.experiment, AlignedExperiment):
            print(self.experiment.describe_method(), flush=True)
            if self.experiment.reward:
                self.rounds = Rounds(self.experiment, writer, workdir)

    def compile(self) -> None:
        """Compile the step for each length of a batch, and say what that took."""
        print("compiling the step", flush=True)
        experiment = self.experiment
        for length in experiment.lengths:
            compiled = training.compile_step(
                experiment.step,
                experiment.abstract_state(),
                experiment.abstract_batch(length),
                *experiment.constants,
            )
            rows = f"rows of {length}: " * (len(experiment.lengths) > 1)
            print(rows + compiled.describe(), flush=True)
            self._steps[length] = compiled.call

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, training.StepMetrics]:
        step = self._steps[batch.tokens.shape[1]]
        return self.rounds(step, state, batch) if self.rounds else step(state, batch)

    def change(self, chain: Chain, state: TrainState, variance: PyTree) -> TrainState:
        """Go on under another chain, whose state is ``variance``."""
        self.experiment = self.experiment.with_chain(chain)
        self.__dict__.pop("monitor", None)
        self.compile()
        for each in filter(None, (self.panel, self.rounds)):
            each.follow(self.experiment)
        places = jax.tree.map(lambda leaf: leaf.sharding, self.experiment.abstract_state().variance)
        return state.replace(variance=jax.device_put(variance, places))

    @functools.cached_property
    def monitor(self) -> Callable[[TrainState], dict[str, jax.Array]]:
        """Readings of the monitors and of the chain, and the learning rate, jitted."""
        e, schedule = self.experiment, learning_rate(self.experiment.config)

        @jax.jit
        def read(state: TrainState) -> dict[str, jax.Array]:
            done = jnp.maximum(state.step - state.skipped - 1, 0)  # updates before the last one
            return {
                "learning_rate": schedule(done),
                **training.read_monitors(e.monitors, state.monitors),
                **training.read_level_profile(e.transform, state.variance, e.spec.num_levels),
            }

        return read


def make_hooks(
    running: Running,
    workdir: files.Path,
    writer: training.MetricWriter,
    stopping: training.EarlyStopping,
    notes: dict[str, Any],
) -> training.Hooks:
    """Hooks of the loop: evaluation, early stopping, samples, monitors, the clip search.

    What must be known after a resume is put into ``notes``.
    """
    experiment = running.experiment
    dataset = experiment.dataset
    generate, _ = stored_generator(experiment, workdir, experiment.config.sample.num_steps)

    validate = (
        validation.validator(experiment, generate)
        if experiment.config.alignment.method
        else functools.partial(_validate, experiment)
    )

    def evaluate_step(step: int, ema: PyTree, check: Callable) -> dict[str, float]:
        values, losses, sizes = validate(experiment.variables(ema), check)
        if experiment.config.train.stop.patience:
            gain = stopping.observe(step, losses, sizes)
            notes["stop"] = stopping.state
            if gain is not None:
                values |= {"gain": gain.value, "gain_standard_error": gain.standard_error}
        return values

    def sample_step(step: int, ema: PyTree, check: Callable) -> None:
        check()
        key = experiment.key(step, "sample")
        params = experiment.variables(ema)
        show_samples(dataset, experiment.jobs, generate, workdir, step, params, key, writer)

    adapt = None
    if experiment.clip_search:
        adapt = clip.adapt_hook(experiment, workdir, writer)
    elif experiment.config.variance.auto.every:
        adapt = _rechoose_hook(running, workdir, writer, notes)
    return training.Hooks(
        evaluate_step if len(dataset.valid) else None,
        sample_step,
        lambda state: running.monitor(state),
        adapt,
        lambda: stopping.stopped,
    )


def _validate(experiment: Experiment, params: PyTree, check: Callable) -> validation.Validation:
    """The bound, with the same key every time: differences of evaluations are not mask noise."""
    batches = experiment.batches(experiment.dataset.valid, experiment.config.evaluate.max_rows)
    result = experiment.validate(params, experiment.key(0, "evaluate"), batches, check)
    values = _scalars(experiment.family.record(result))
    return validation.Validation(values, result.per_row_nats, row_sizes(result))


def row_sizes(result: Any) -> np.ndarray:
    """Elements [N] of the rows of a likelihood: eligible tokens, or dimensions."""
    return result.row_tokens if hasattr(result, "row_tokens") else result.row_elements


def _with_chosen_chain(
    experiment: Experiment,
    state: TrainState,
    workdir: files.Path,
    interrupt: training.Interrupt,
) -> tuple[Experiment, TrainState]:
    """The choice of ``variance.order=auto`` before the first step, recorded in the workdir."""
    record, chain, _ = choose.choose(experiment, state, interrupt.check)
    print(choose.describe(record), flush=True)
    choose.write(workdir, record)
    if chain == experiment.chain:
        return experiment, state
    experiment = experiment.with_chain(chain)
    return experiment, experiment.initial_state(state.params)


def _rechoose_hook(
    running: Running,
    workdir: files.Path,
    writer: training.MetricWriter,
    notes: dict[str, Any],
) -> Callable[..., TrainState]:
    """Choose the chain again every ``variance.auto.every`` steps."""

    def adapt(step: int, state: TrainState, check: Callable) -> TrainState:
        c = running.experiment.config
        if step % c.variance.auto.every or step >= c.train.steps:
            return state
        record, chain, variance = choose.choose(running.experiment, state, check)
        choose.write(workdir, record)
        print(f"\n{choose.describe(record)}", flush=True)
        changed = chain != running.experiment.chain
        writer.record(step, "adapt", {"chain_changed": float(changed), **choose.scalars(record)})
        if changed:
            state = running.change(chain, state, variance)
            notes["chain"] = chain.to_dict()
        return state

    return adapt


def _stream(experiment: Experiment) -> dict[str, Any]:
    buckets = experiment.buckets
    return data.stream_fingerprint(
        experiment.dataset, experiment.spec.batch_size, experiment.config.seed
    ) | ({"buckets": list(buckets.lengths)} if buckets else {})


def _profile_directory(workdir: files.Path) -> str:
    """Where the profiler writes, which cannot write to a bucket."""
    return tempfile.mkdtemp() if files.is_remote(workdir) else str(workdir / "profile")


def _check_shared(workdir: files.Path) -> None:
    if read_config(workdir) is None:
        raise WorkdirError(
            f"process {jax.process_index()} does not see the config.json that process 0 wrote to "
            f"{workdir}; several processes need a --workdir on a file system that all of them share"
        )


def _save_tokenizer(experiment: Experiment, workdir: files.Path) -> None:
    path, tokenizer = workdir / "tokenizer.json", experiment.dataset.tokenizer
    if tokenizer is not None and not path.exists():
        tokenizer.save(path)
    elif tokenizer is not None and load_tokenizer(path).fingerprint != tokenizer.fingerprint:
        raise WorkdirError(
            f"{path} is damaged: it is not the tokenizer of this run's data; move it away, and the "
            "same command line writes it again"
        )


def _continue(
    restored: Restored, stream: dict[str, Any], batches: BatchStream
) -> tuple[TrainState, dict[str, Any]]:
    notes = restored.notes if isinstance(restored.notes, dict) else {}
    if not all(isinstance(notes.get(name), dict) for name in ("stream", "progress")):
        raise CheckpointError(
            f"the notes of the checkpoint of step {int(restored.state.step)} are not those of a "
            f"training run: {restored.notes}; move it away to resume from the one before"
        )
    data.check_same_stream(notes["stream"], stream)
    batches.set_state(restored.position)
    return restored.state, notes


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    """Evaluation results that go to the metrics."""
    fields = {
        "loss": "nats_per_element",
        "loss_standard_error": "standard_error_nats_per_element",
        "bits_per_unit": "bits_per_unit",
        "bits_per_unit_standard_error": "standard_error_bits_per_unit",
        "perplexity": "perplexity",
    }
    values = {name: record[field] for name, field in fields.items() if field in record}
    return {name: float("nan") if value is None else value for name, value in values.items()}
