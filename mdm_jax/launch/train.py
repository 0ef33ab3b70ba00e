"""The three modes of the launcher: train, evaluate, sample. Also called by notebooks and tests."""

import contextlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import tqdm
from ml_collections import ConfigDict

from mdm_jax import data, distributed, training
from mdm_jax.launch import build
from mdm_jax.launch.accuracy import check_accuracy, measure_accuracy
from mdm_jax.launch.experiment import (
    Experiment,
    checkpoint_directory,
    load_parameters,
    open_workdir,
)
from mdm_jax.launch.quality import check_quality, measure_quality
from mdm_jax.launch.report import write_report
from mdm_jax.launch.sample import prepare_samples, show_samples
from mdm_jax.launch.warm_start import check_source, initial_state
from mdm_jax.launch.workdir import WorkdirError, claim, read_config, training_lock, write_json
from mdm_jax.launch.workdir import check as check_workdir
from mdm_jax.meter.clip_search import ClipChoice, make_clip_search
from mdm_jax.training.checkpoints import Restored
from mdm_jax.training.loop import BatchStream
from mdm_jax.training.state import TrainState
from mdm_jax.types import PyTree
from mdm_jax.variance.warps import set_clip_range


def check_settings(experiment: Experiment) -> None:
    """Raises ValueError or OSError for settings that would first fail after hours of training."""
    if experiment.config.train.keep_last < 1:
        raise ValueError(
            f"train.keep_last must be at least 1, got {experiment.config.train.keep_last}"
        )
    experiment.train_step()
    c = experiment.config.evaluate
    experiment.likelihood(c.passes, c.replicates)
    experiment.likelihood(c.final_passes, c.final_replicates)
    _, source = experiment.held_out(c.final_split)
    experiment.batches(source, c.max_rows)
    prepare_samples(experiment)
    check_accuracy(experiment)
    if experiment.config.sample.quality_steps:
        check_quality(experiment)
    _clip_hook(experiment, pathlib.Path(), None)
    _loop_options(experiment, pathlib.Path())


def train(
    experiment: Experiment,
    workdir: pathlib.Path,
    interrupt: training.Interrupt | None = None,
    allow_config_change: bool = False,
    launched_at: float | None = None,
) -> bool:
    """Trains, resuming where the directory's last whole checkpoint stands.

    The directory becomes this config's (see ``workdir.claim``) once nothing stands in the way.

    Returns:
        True if training is finished, False if it was interrupted (and saved).

    Raises:
        WorkdirError, CheckpointError, TrainingStopped, ValueError: with a message for the user.
    """
    c = experiment.config
    check_workdir(workdir, c, allow_config_change)
    check_settings(experiment)
    _check_start(experiment, workdir)
    distributed.barrier("settings and directory are good")
    abstract = experiment.abstract_state()
    stream = data.stream_fingerprint(experiment.dataset, c.train.batch_size, c.seed)
    interrupt = interrupt or training.Interrupt()
    with contextlib.ExitStack() as stack:
        batches = stack.enter_context(contextlib.closing(experiment.train_batches()))
        if read_config(workdir) is None:
            _claim(workdir, c)
        distributed.barrier("directory claimed")
        _check_shared(workdir)
        stack.enter_context(training_lock(workdir))
        checkpoints = training.Checkpoints(checkpoint_directory(workdir), c.train.keep_last)
        stack.callback(checkpoints.close)
        restored = checkpoints.restore_last(abstract)
        if restored is None:
            state, progress = initial_state(experiment), {}
        else:
            state, progress = _continue(restored, stream, batches), restored.notes["progress"]
        _claim(workdir, c)
        if distributed.is_first():
            _save_tokenizer(experiment, workdir)
        start = int(jax.device_get(state.step))
        writer = _writer(workdir, start, progress)
        stack.callback(writer.close)
        if start < c.train.steps:
            print(f"{'resuming at' if start else 'starting from'} step {start}", flush=True)
        if start < c.train.steps:
            print("compiling the step", flush=True)
            step = training.compile_step(
                experiment.train_step(),
                abstract,
                experiment.abstract_batch(),
                experiment.placed_seed(),
            )
            print(step.describe(), flush=True)
        training.train(
            step.call if start < c.train.steps else None,
            state,
            batches,
            options=_loop_options(experiment, workdir, launched_at),
            checkpoints=checkpoints,
            writer=writer,
            hooks=_hooks(experiment, workdir, writer),
            notes={"stream": stream},
            progress=progress,
            interrupt=interrupt,
        )
    return not interrupt.stopping


def evaluate(
    experiment: Experiment,
    workdir: pathlib.Path,
    check: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Likelihood bound of the final split under the best parameters, and accuracy where answers can
    be checked; written and returned."""
    c = experiment.config.evaluate
    step, params = load_parameters(experiment, workdir)
    split, source = experiment.held_out(c.final_split)
    rows = len(source) if not c.max_rows else min(c.max_rows, len(source))
    silent = not distributed.is_first()
    with tqdm.tqdm(total=rows, desc=f"evaluating {split}", unit="row", disable=silent) as bar:

        def progress(count: int) -> None:
            if not silent:
                bar.update(min(count, rows - bar.n))
            if check is not None:
                check()

        result = experiment.likelihood(c.final_passes, c.final_replicates)(
            params, experiment.key(0, "final"), experiment.batches(source, c.max_rows), progress
        )
    entropies = data.split_entropies(source, experiment.dataset.vocab_size, c.max_rows or None)
    record = {
        "step": step,
        "split": split,
        "unit": experiment.dataset.unit,
        "unigram_bits_per_unit": entropies.unigram_per_unit,
        "bigram_bits_per_unit": entropies.bigram_per_unit,
        **experiment.process.record(result),
        **measure_accuracy(experiment, params, check),
    }
    if distributed.is_first():
        write_json(workdir / "evaluation.json", record)
    return record


def sample(experiment: Experiment, workdir: pathlib.Path) -> dict[str, Any]:
    """Draws samples under the best parameters; written to ``samples/`` and returned."""
    step, params = load_parameters(experiment, workdir)
    key = experiment.key(step, "sample")
    drawn = show_samples(experiment, workdir, step, params, key)
    if experiment.config.sample.quality_steps:
        drawn["files"] += measure_quality(experiment, workdir, step, params, key)
    return drawn


def report(experiment: Experiment, workdir: pathlib.Path, check: Callable | None = None) -> str:
    """Evaluates, samples, plots, and returns the text that ends a training run."""
    record = evaluate(experiment, workdir, check)
    drawn = sample(experiment, workdir)
    return write_report(experiment, workdir, record, drawn) if distributed.is_first() else ""


def _check_start(experiment: Experiment, workdir: pathlib.Path) -> None:
    """Raises WorkdirError for a run that is to start from another one and cannot.

    One that has checkpoints goes on from these, wherever the other one is by now.
    """
    source = experiment.config.train.init_from
    if not source:
        return
    checkpoints = open_workdir(workdir)
    started = bool(checkpoints.steps())
    checkpoints.close()
    if not started:
        check_source(experiment, pathlib.Path(source), "train.init_from")


def _claim(workdir: pathlib.Path, config: ConfigDict) -> None:
    if distributed.is_first():
        claim(workdir, config)


def _check_shared(workdir: pathlib.Path) -> None:
    if read_config(workdir) is None:
        raise WorkdirError(
            f"process {jax.process_index()} does not see the config.json that process 0 wrote to "
            f"{workdir}; several processes need a --workdir on a file system that all of them share"
        )


def _writer(workdir: pathlib.Path, start: int, progress: dict[str, Any]) -> training.MetricWriter:
    if not distributed.is_first():
        return training.SilentWriter()
    return training.MetricWriter(workdir, start, again=progress.get("hooks_due", ()))


def _save_tokenizer(experiment: Experiment, workdir: pathlib.Path) -> None:
    path = workdir / "tokenizer.json"
    if experiment.dataset.tokenizer is not None and not path.exists():
        experiment.dataset.tokenizer.save(path)


def _continue(restored: Restored, stream: dict[str, Any], batches: BatchStream) -> TrainState:
    data.check_same_stream(restored.notes["stream"], stream)
    batches.set_state(restored.position)
    return restored.state


def _loop_options(
    experiment: Experiment, workdir: pathlib.Path, launched_at: float | None = None
) -> training.LoopOptions:
    c = experiment.config.train
    return training.LoopOptions(
        total_steps=c.steps,
        log_every=c.log_every,
        evaluate_every=c.evaluate_every,
        sample_every=c.sample_every,
        checkpoint_every=c.checkpoint_every,
        max_skipped_in_a_row=c.max_skipped_in_a_row,
        tokens_per_step=c.batch_size * experiment.dataset.length * experiment.transform.views,
        unit="char" if experiment.dataset.unit == "character" else "dim",
        profile_at=c.profile_at,
        profile_steps=c.profile_steps,
        profile_directory=str(workdir / "profile"),
        launched_at=launched_at,
    )


def _hooks(
    experiment: Experiment, workdir: pathlib.Path, writer: training.MetricWriter
) -> training.Hooks:
    c = experiment.config.evaluate
    estimate = experiment.likelihood(c.passes, c.replicates)
    source = experiment.dataset.valid
    generate = prepare_samples(experiment)

    def evaluate_step(_step: int, ema: PyTree, check: Callable) -> dict[str, float]:
        # The same key every time: differences between evaluations are not masking noise.
        batches = experiment.batches(source, c.max_rows)
        found = estimate(ema, experiment.key(0, "evaluate"), batches, check)
        return _scalars(experiment.process.record(found))

    def sample_step(step: int, ema: PyTree, check: Callable) -> None:
        check()
        key = experiment.key(step, "sample")
        show_samples(experiment, workdir, step, ema, key, writer, generate)

    return training.Hooks(
        evaluate_step if len(source) else None,
        sample_step,
        _monitor_hook(experiment),
        _clip_hook(experiment, workdir, writer),
    )


def _monitor_hook(experiment: Experiment) -> Callable:
    monitors, transform, levels = (
        experiment.monitors,
        experiment.transform,
        experiment.spec.num_levels,
    )

    @jax.jit
    def read(state: TrainState) -> dict[str, jax.Array]:
        return training.read_monitors(monitors, state.monitors) | training.read_level_profile(
            transform, state.variance, levels
        )

    return read


def _clip_hook(
    experiment: Experiment, workdir: pathlib.Path, writer: training.MetricWriter | None
) -> Callable | None:
    """Chooses the range of ``clipped_adaptive`` from validation rows; None without it.

    Every choice goes to ``clip_search.jsonl`` with the scores of all ranges, and the range in use
    is part of the state.
    """
    c = experiment.config
    if "clipped_adaptive" not in c.variance.order:
        return None
    criterion = build.lookup(build.CLIP_CRITERIA, c.clip_search.criterion, "clip_search.criterion")
    source, rows = experiment.dataset.valid, c.evaluate.batch_size
    count = min(c.clip_search.batches, len(source) // rows)
    if count < 2:
        raise ValueError(
            f"clipped_adaptive is searched on at least 2 validation batches of {rows} rows "
            f"(evaluate.batch_size, clip_search.batches = {c.clip_search.batches}), and there are "
            f"{len(source)} rows; take smaller batches, or variance.clipped with a fixed range"
        )
    search = make_clip_search(
        experiment.apply_fn,
        experiment.objective,
        (rows, experiment.dataset.length),
        criterion=criterion,
    )

    def adapt(step: int, state: TrainState, check: Callable) -> TrainState:
        batches = list(experiment.batches(source, count * rows))
        key = experiment.key(step, "clip_search")
        choice = search(
            training.averaged(state), batches, key, step=step, progress=lambda _: check()
        )
        if distributed.is_first():
            _append_choice(workdir / "clip_search.jsonl", choice)
        writer.scalars(step, "adapt", {"clip_low": choice.low, "clip_high": choice.high})
        moved = set_clip_range(state.variance, choice.low, choice.high)
        # Where the old range lay, so that the step is not compiled for another placement.
        placed = jax.tree.map(lambda n, o: jax.device_put(n, o.sharding), moved, state.variance)
        return state.replace(variance=placed)

    return adapt


def _append_choice(path: pathlib.Path, choice: ClipChoice) -> None:
    """Adds a line; those of this step and later ones, from before a resume, are replaced."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if json.loads(line)["step"] < choice.step]
    temporary = path.with_suffix(".partial")
    temporary.write_text("\n".join([*kept, json.dumps(choice.to_dict()), ""]), "utf-8")
    temporary.replace(path)


def _scalars(record: dict[str, Any]) -> dict[str, float]:
    names = {
        "loss": "nats_per_element",
        "bits_per_unit": "bits_per_unit",
        "standard_error": "standard_error_bits_per_unit",
        "perplexity": "perplexity",
    }
    found = {name: record[theirs] for name, theirs in names.items() if theirs in record}
    return {name: float("nan") if value is None else value for name, value in found.items()}
