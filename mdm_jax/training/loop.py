"""The training loop: steps, metrics, evaluation, checkpoints, and stopping on Ctrl-C or SIGTERM."""

import dataclasses
import math
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol

import jax
import numpy as np
from absl import logging

from mdm_jax import distributed
from mdm_jax.checks import Whole, checked
from mdm_jax.progress import Progress
from mdm_jax.training.checkpoints import Checkpoints
from mdm_jax.training.ema import averaged
from mdm_jax.training.metrics import MetricWriter
from mdm_jax.training.step import StepMetrics, TrainState
from mdm_jax.types import Batch, PyTree


class Interrupted(Exception):
    """Raised by :meth:`Interrupt.check` where work in progress can be discarded."""


class Interrupt:
    """Context manager that turns the first SIGINT or SIGTERM into a flag; reentrant.

    A second SIGINT raises KeyboardInterrupt. With several processes a signal to any stops all,
    where they :meth:`agree`; ``requested`` is that of this process alone.
    """

    def __init__(self):
        self.requested = False
        self._agreed = False
        self._depth = 0
        self._previous: dict[int, object] = {}

    @property
    def stopping(self) -> bool:
        """Whether all processes are to stop, as last agreed."""
        return self.requested if jax.process_count() == 1 else self._agreed

    def agree(self) -> None:
        """Share requests between processes; all call it at the same point."""
        self._agreed = self._agreed or distributed.any_of(self.requested)

    def check(self, *_: object) -> None:
        """Agree, and raise Interrupted if a stop was requested; usable as a progress callback."""
        self.agree()
        if self.stopping:
            raise Interrupted

    def __enter__(self) -> "Interrupt":
        self._depth += 1
        # Only the main thread may install handlers.
        if self._depth == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        while self._depth == 0 and self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, _frame: types.FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; once more to stop without saving\n")


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message names the reason and a remedy."""


class BatchStream(Protocol):
    """An endless iterator of placed batches; ``get_state()`` is the position after the last one."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...


@checked
@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """Frequencies of the loop's actions, in steps; 0 switches a recurring one off.

    Metrics are fetched from the device when logged. Evaluation also follows the last step, which is
    always saved.

    Attributes:
        views, unit: passes of a batch through the network, for the speed; unit of the bits shown,
            such as "character", "" where neither the loss nor ``normalised_loss`` is a likelihood.
        biased: whether the loss is none, which its records say; bits are of the other alone.
        profile_directory: target of a profile.
        launched_at: ``time.monotonic()`` at launch, to report the time to the first step, or None.
    """

    total_steps: Annotated[int, Whole("[1, 2e9]", "steps")]
    log_every: Annotated[int, Whole("[1, 2e9]", "steps", "between lines of metrics")] = 10
    evaluate_every: Annotated[
        int, Whole("[0, 2e9]", "steps", "between validations, besides the last; 0: never")
    ] = 0
    sample_every: Annotated[int, Whole("[0, 2e9]", "steps", "between samples; 0: never")] = 0
    checkpoint_every: Annotated[
        int, Whole("[0, 2e9]", "steps", "between checkpoints, besides the last; 0: never")
    ] = 0
    max_skipped_in_a_row: Annotated[
        int, Whole("[1, 2e9]", "steps", "that are not finite, before training stops")
    ] = 10
    views: int = 1
    unit: str = "token"
    biased: bool = False
    profile_at: Annotated[int, Whole("[0, 2e9]", "step", "first one of a profile; 0: none")] = 0
    profile_steps: Annotated[int, Whole("[1, 1e6]", "steps", "of a profile")] = 5
    profile_directory: str = ""
    launched_at: float | None = None


class Panel(Protocol):
    """Figures beside the loss that need more than the state, such as measurements now and then."""

    def visit(self, step: int, state: TrainState, batch: Batch) -> None:
        """Called after every step with its batch; may start work on the device."""

    def read(self, step: int, readings: Mapping[str, float]) -> dict[str, str]:
        """Called at every logging step with the monitors' readings; names and texts to show."""


@dataclasses.dataclass
class Hooks:
    """Functions that the loop calls besides the step; ``check`` raises if a stop was requested.

    Attributes:
        evaluate: ``evaluate(step, ema, check) -> metrics`` with at least "loss".
        sample: ``sample(step, ema, check)``.
        monitor: ``monitor(state) -> readings`` on the device, scalars or [bins] over the noise
            level, jitted; written with the metrics.
        adapt: ``adapt(step, state, check) -> state``, right before each evaluation; for settings in
            the state that are chosen from held-out data.
        finished: ``finished() -> bool``, before each step: whether training ends here.
        panel: see :class:`Panel`.
    """

    evaluate: Callable[[int, PyTree, Callable], dict[str, float]] | None = None
    sample: Callable[[int, PyTree, Callable], None] | None = None
    monitor: Callable[[TrainState], dict[str, jax.Array]] | None = None
    adapt: Callable[[int, TrainState, Callable], TrainState] | None = None
    finished: Callable[[], bool] = lambda: False
    panel: Panel | None = None


def train(
    step_fn: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]],
    state: TrainState,
    batches: BatchStream,
    *,
    options: LoopOptions,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    hooks: Hooks | None = None,
    notes: dict[str, Any] | None = None,
    progress: dict[str, Any] | None = None,
    interrupt: Interrupt | None = None,
) -> TrainState:
    """Train until ``options.total_steps``, a hook ends it, or interrupted; saves in any case.

    Nothing is fetched from the device between logging steps. With several processes a stop request
    takes effect at the next logging step, or inside a hook. States are saved before their hooks
    run; a resumed run runs those that are left. In a single process an error saves the state first.
    Files are written beside the next steps, and all of them are there when this returns.

    ``step_fn`` is jitted, the state donated; ``batches`` are at the position that matches
    ``state``; ``notes``, as they are then, go into each checkpoint; ``progress`` is
    ``restored.notes["progress"]``.

    Returns the final state; if ``interrupt.stopping``, training is unfinished and saved.
    TrainingStopped after too many non-finite steps in a row; the last good state is saved.
    """
    hooks = hooks or Hooks()
    start = step = int(jax.device_get(state.step))
    window, hooks_due = _remembered(progress or {})
    hooks_due = [name for name in hooks_due if getattr(hooks, name)]
    loop = _Log(options, writer, start, window, hooks.panel, checkpoints)
    profiling = False

    def remembered() -> dict[str, Any]:
        left = {"window": loop.window, "hooks_due": list(hooks_due)}
        return {**(notes or {}), "progress": left}

    def save() -> None:
        loop.collect()
        writer.flush()
        checkpoints.save(step, state, batches.get_state(), remembered())

    def call_hooks(check: Callable, keep: bool) -> None:
        nonlocal state
        started = time.monotonic()
        if hooks_due[:1] == ["adapt"]:
            state = hooks.adapt(step, state, check)
            hooks_due.pop(0)
        if keep:  # after adapting, before hooks that may end the process
            save()
        while hooks_due:
            if hooks_due[0] == "evaluate":
                average = averaged(state)
                values = hooks.evaluate(step, average, check)
                writer.record(step, "evaluate", values)
                checkpoints.save_best(step, average, values)
            else:
                hooks.sample(step, averaged(state), check)
            hooks_due.pop(0)  # not before it is done: an interrupted one runs again
            if keep:
                writer.flush()
                checkpoints.amend_notes(step, remembered())
        loop.pause(time.monotonic() - started)

    with interrupt or Interrupt() as stop:
        consistent = True  # the state is that of `step`, and no step has taken its buffers
        try:
            # Hooks left by an interrupt; the checkpoint has this state unless adapting is due.
            call_hooks(stop.check, keep=bool(hooks_due) and "adapt" not in hooks_due)
            while step < options.total_steps and not stop.stopping and not hooks.finished():
                if options.profile_at and step == options.profile_at:
                    jax.profiler.start_trace(options.profile_directory)
                    profiling = True
                batch = next(batches)
                consistent = False
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, metrics = step_fn(state, batch)
                step += 1
                ending = step == options.total_steps
                loop.pending.append(metrics)
                loop.tokens += options.views * batch.tokens.size
                if step == start + 1 and options.launched_at is not None:
                    jax.block_until_ready(metrics)
                    seconds = time.monotonic() - options.launched_at
                    loop.progress.note(f"first step done {seconds:.1f} s after the start")
                if hooks.panel:
                    hooks.panel.visit(step, state, batch)
                if profiling and step == options.profile_at + options.profile_steps:
                    jax.block_until_ready(state)
                    jax.profiler.stop_trace()
                    profiling = False
                    loop.progress.note(f"profile written to {options.profile_directory}")
                if _due(step, options.log_every) or ending:
                    readings = hooks.monitor(state) if hooks.monitor else {}
                    loop.write(step, readings, stop_after=options.max_skipped_in_a_row)
                    checkpoints.check()
                    stop.agree()
                consistent = True
                evaluating = _due(step, options.evaluate_every, ending)
                if hooks.adapt and evaluating:
                    hooks_due.append("adapt")
                if hooks.evaluate and evaluating:
                    hooks_due.append("evaluate")
                if hooks.sample and _due(step, options.sample_every):
                    hooks_due.append("sample")
                call_hooks(stop.check, keep=ending or _due(step, options.checkpoint_every))
        except Interrupted:
            pass  # raised inside a hook; the hooks run again after resuming
        except TrainingStopped:
            save()
            checkpoints.wait()
            raise
        except Exception:
            # With several processes a save would wait for those that did not fail.
            if consistent and step > start and jax.process_count() == 1:
                try:
                    save()
                    checkpoints.wait()
                    loop.progress.note(f"an error ends the run; its state at step {step} is saved")
                except Exception:
                    logging.warning("step %d could not be saved after an error", step)
            raise
        finally:
            if profiling:
                jax.profiler.stop_trace()
            loop.progress.close()
        save()
        checkpoints.wait()
    return state


def _remembered(progress: dict[str, Any]) -> tuple[list[list[float]], list[str]]:
    """Window and hooks due; ValueError unless as :func:`train` notes them."""
    try:
        window, due = progress.get("window", []), [*progress.get("hooks_due", [])]
        rows = np.asarray(window, np.float64).reshape(len(window), len(StepMetrics._fields))
        known = {*due} <= {"adapt", "evaluate", "sample"}
    except (AttributeError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"the progress in the checkpoint's notes is not what the loop wrote: {progress}; "
            "resume from another checkpoint"
        )
    return rows.tolist(), due


class _Log:
    """Metrics between two logging steps: on the device first, then as numbers, then written."""

    def __init__(
        self,
        options: LoopOptions,
        writer: MetricWriter,
        start: int,
        window: list[list[float]],
        panel: Panel | None,
        checkpoints: Checkpoints,
    ):
        self.pending: list[StepMetrics] = []
        self.window = window
        self.tokens = 0
        self.progress = Progress(options.total_steps, start, silent=not distributed.is_first())
        self._options = options
        self._writer = writer
        self._panel = panel
        self._checkpoints, self._waited = checkpoints, checkpoints.waited
        self._clock = time.monotonic()
        self._timed_from = start

    def collect(self) -> None:
        """Move pending metrics from the device into the window."""
        self.window += [[float(v) for v in metrics] for metrics in jax.device_get(self.pending)]
        self.pending = []

    def pause(self, seconds: float) -> None:
        """Exclude time that was not training from the speed."""
        self._clock += seconds

    def write(self, step: int, readings: dict[str, jax.Array], stop_after: int) -> None:
        """Write means over the window and monitor readings; TrainingStopped as in :func:`train`."""
        self.collect()
        rows = np.asarray(self.window, np.float64)
        columns = dict(zip(StepMetrics._fields, rows.T))
        good = columns["skipped"] == 0
        values = {"skipped": columns["skipped"].sum()}
        for name in ("loss", "bits_per_unit", "cross_entropy", "gradient_norm"):
            values[name] = columns[name][good].mean() if good.any() else math.nan
        if self._options.biased:
            values["biased"] = 1.0
        self.window = []
        now = time.monotonic()
        seconds = max(now - self._clock, 1e-9) / max(step - self._timed_from, 1)
        before, self._clock, self._timed_from = self._clock, now, step
        # Speed goes to the terminal and TensorBoard records of its own: it is not reproducible.
        self._writer.record(step, "train", values)
        known = {n: v for n, v in jax.device_get(readings).items() if np.any(np.isfinite(v))}
        if known:
            self._writer.record(step, "monitor", known)
        known = {name: float(value) for name, value in known.items() if np.ndim(value) == 0}
        speed, self.tokens = self.tokens / max(now - before, 1e-9), 0
        waited, self._waited = self._checkpoints.waited - self._waited, self._checkpoints.waited
        values_of_speed = {"tokens_per_second": speed, "step_seconds": seconds}
        self._writer.record(step, "speed", values_of_speed | {"saving_seconds": waited})
        text = self._losses(values, known) | {"tokens/s": f"{speed:,.0f}"}
        if values["skipped"]:
            text["skipped"] = f"{values['skipped']:.0f}"
        if self._panel:
            text |= self._panel.read(step, known)
        self.progress.advance(step, text, seconds)
        worst = int(columns["skipped_in_a_row"].max())
        if worst >= stop_after:
            raise TrainingStopped(
                f"{worst} steps in a row up to step {step} had a loss or gradient that was not "
                f"finite; the limit is {stop_after} (train.max_skipped_in_a_row). Parameters are "
                "those before the first of them and are saved. Try a lower learning rate, a longer "
                "warm-up or float32 (model.dtype)."
            )

    def _losses(self, values: Mapping[str, float], known: Mapping[str, float]) -> dict[str, str]:
        """The loss in nats and bits, both of one estimate: without level noise where known."""
        loss, bits, error = values["loss"], values["bits_per_unit"], math.nan
        unit = "" if self._options.biased else self._options.unit
        if "normalised_loss" in known and loss:
            unit = self._options.unit
            bits *= known["normalised_loss"] / loss
            loss = known["normalised_loss"]
            error = known.get("normalised_loss_standard_error", math.nan)
        shown = f"{loss:.3f}" + (f"±{error:.3f}" if math.isfinite(error) else "")
        return {"loss": shown} | ({f"bits/{unit}": f"{bits:.3f}"} if unit else {})


def _due(step: int, every: int, ending: bool = False) -> bool:
    return every > 0 and (step % every == 0 or ending)
