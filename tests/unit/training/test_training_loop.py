"""The loop: kills, interrupts, resuming to the same bits, NaN, hooks, what is saved and when."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import tempfile
import threading

import chex
import jax
import numpy as np
import optax
import pytest
import tiny
from variants import slow_except

from mdm_jax import data, files, training
from mdm_jax.data.rows import StoredRows
from mdm_jax.training import loop

ROWS, STEPS = 8, 24
OPTIONS = training.LoopOptions(
    total_steps=STEPS,
    log_every=4,
    evaluate_every=6,
    sample_every=6,
    checkpoint_every=5,
    max_skipped_in_a_row=3,
    views=1,
)


class Killed(BaseException):
    """What a SIGKILL is to the loop: nothing that it may catch."""


@functools.cache
def _step():
    spec, step = tiny.step_fn(ROWS, optax.adam(0.01), ema_decay=0.9)
    return spec, tiny.jit(step)


def _batches(place=None):
    source = StoredRows(tiny.batch(50, seed=4))
    return data.train_iterator(source, ROWS, seed=5, prefetch=2, place=place)


class Run:
    """One run's directory, started again and again as a user would with one command line."""

    def __init__(self, directory, options=OPTIONS):
        self.directory, self.options = directory, options
        self.samples = []

    def start(
        self,
        *,
        before_step=None,
        evaluate=None,
        sample=None,
        adapt=None,
        interrupt=None,
        step=None,
        place=None,
        panel=None,
    ):
        """Runs until the end, or until something stops it; returns the state."""
        spec, whole = _step()
        state = tiny.new_state(spec, optax.adam(0.01))
        checkpoints = training.Checkpoints(self.directory / "checkpoints", 2)
        restored = checkpoints.restore_last(
            training.abstract(jax.tree.map(jax.numpy.asarray, state))
        )
        progress = {}

        def step_fn(state, batch):
            if before_step is not None:
                before_step(int(state.step))
            return (whole if step is None else step)(state, batch)

        def default_evaluate(step, ema, check):
            check()
            return {"loss": float(np.sum(np.asarray(ema["kernel"], np.float64) ** 2)), "more": 1.0}

        def default_sample(step, ema, check):
            check()
            self.samples.append(step)

        with contextlib.closing(_batches(place)) as batches:
            if restored is not None:
                state, progress = restored.state, restored.notes["progress"]
                batches.set_state(restored.position)
            writer = training.MetricWriter(
                self.directory, int(state.step), again=progress.get("hooks_due", ())
            )
            try:
                return training.train(
                    step_fn,
                    state,
                    batches,
                    options=self.options,
                    checkpoints=checkpoints,
                    writer=writer,
                    hooks=training.Hooks(
                        evaluate or default_evaluate,
                        sample or default_sample,
                        adapt=adapt,
                        panel=panel,
                    ),
                    progress=progress,
                    interrupt=interrupt,
                )
            finally:
                writer.close()
                checkpoints.close()

    def records(self):
        found = training.read_metrics(self.directory / "metrics.jsonl")
        return [record for record in found if record["kind"] != "speed"]

    def last(self):
        spec, _ = _step()
        state = tiny.new_state(spec, optax.adam(0.01))
        checkpoints = training.Checkpoints(self.directory / "checkpoints", 2)
        restored = checkpoints.restore_last(
            training.abstract(jax.tree.map(jax.numpy.asarray, state))
        )
        best = checkpoints.restore_best(training.abstract(state.ema)), checkpoints.best_metrics()
        checkpoints.close()
        return restored, best


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.start()
    assert run.samples == [6, 12, 18, 24]
    return run


def _assert_same_run(run, whole):
    (last, best), (expected, expected_best) = run.last(), whole.last()
    assert int(last.state.step) == STEPS
    chex.assert_trees_all_equal(last.state, expected.state)
    assert last.position == expected.position
    assert last.notes == expected.notes
    chex.assert_trees_all_equal(best, expected_best)
    assert run.records() == whole.records()


def _kill_at(killed_step):
    def before_step(step):
        if step == killed_step:
            raise Killed

    return before_step


def test_records_of_an_uninterrupted_run(whole):
    records = whole.records()
    assert [r["step"] for r in records if r["kind"] == "train"] == [4, 8, 12, 16, 20, 24]
    assert [r["step"] for r in records if r["kind"] == "evaluate"] == [6, 12, 18, 24]
    assert all(np.isfinite(r["loss"]) for r in records)
    losses = [r["loss"] for r in records if r["kind"] == "evaluate"]
    assert whole.last()[1][1]["loss"] == min(losses)


def test_runs_killed_at_random_steps_end_the_same(whole, tmp_path):
    """In the middle of windows, before the first checkpoint, after checkpoints and hooks."""
    run = Run(tmp_path)
    steps = np.random.default_rng(0).choice(np.arange(5, STEPS), 4, replace=False)
    for killed_step in [3, *sorted(steps)]:
        with pytest.raises(Killed):
            run.start(before_step=_kill_at(killed_step))
    run.start()
    _assert_same_run(run, whole)


def test_a_run_in_a_bucket_killed_between_uploads_ends_the_same(whole, bucket, monkeypatch):
    """No checkpoint is there before the metrics up to it."""
    run = Run(files.as_path("gs://bucket/run"))
    monkeypatch.setattr(tempfile, "tempdir", str(bucket.parent.parent))
    for killed_step in (8, 13, 21):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training.MetricWriter, "close", lambda _: None)
            run.start(before_step=_kill_at(killed_step))
    run.start()
    _assert_same_run(run, whole)


WIDTH = len(training.StepMetrics._fields)


@pytest.mark.parametrize(
    "progress",
    [
        *({"window": 3}, {"window": [[1.0]]}, {"window": [["a"] * WIDTH]}, {"window": {}}, []),
        *({"hooks_due": 3}, {"hooks_due": ["fly"]}, {"hooks_due": [["evaluate"]]}),
    ],
    ids=str,
)
def test_progress_that_the_loop_did_not_write_is_refused(progress):
    with pytest.raises(ValueError, match="is not what the loop wrote"):
        loop._remembered(progress)
    assert loop._remembered({"window": [[1] * WIDTH], "hooks_due": ["sample"]})[1] == ["sample"]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["evaluate", "sample"])
def test_a_run_killed_in_a_hook_ends_the_same(whole, tmp_path, where):
    run = Run(tmp_path)

    def die(step, ema, check):
        if step == 12:
            raise Killed
        return {"loss": float(np.sum(np.asarray(ema["kernel"], np.float64) ** 2)), "more": 1.0}

    with pytest.raises(Killed):
        run.start(**{where: die})
    run.start()
    _assert_same_run(run, whole)


def _loss(ema):
    return {"loss": float(np.sum(np.asarray(ema["kernel"], np.float64) ** 2)), "more": 1.0}


@pytest.mark.parametrize("where", slow_except({"sample"}, ["evaluate", "sample"]))
def test_a_step_is_saved_before_its_hooks(whole, tmp_path, where):
    """A kill in a hook costs no step, and what was done before it is not done again."""
    run = Run(tmp_path, dataclasses.replace(OPTIONS, checkpoint_every=6))
    calls, steps = [], []

    def hook(step, ema, check, name):
        if (step, name) == (12, where) and calls.count((12, where)) == 0:
            calls.append((step, name))
            raise Killed
        calls.append((step, name))
        return _loss(ema)

    hooks = {name: functools.partial(hook, name=name) for name in ("evaluate", "sample")}
    with pytest.raises(Killed):
        run.start(**hooks)
    restored, _ = run.last()
    due = ["evaluate", "sample"] if where == "evaluate" else ["sample"]
    assert int(restored.state.step) == 12
    assert restored.notes["progress"]["hooks_due"] == due
    run.start(before_step=steps.append, **hooks)
    assert steps == list(range(12, STEPS))
    assert calls.count((12, "evaluate")) == len(due) and calls.count((12, "sample")) == (
        2 if where == "sample" else 1
    )
    _assert_same_run(run, whole)


@pytest.mark.parametrize("where", slow_except({"data"}, ["evaluate", "sample", "data"]))
def test_an_error_outside_a_step_saves_and_the_run_goes_on_when_it_is_mended(
    whole, tmp_path, where
):
    run = Run(tmp_path, dataclasses.replace(OPTIONS, checkpoint_every=0))

    def fail(step, ema, check):
        if step == 12:
            raise FileNotFoundError("prompts.txt")
        return _loss(ema)

    batches = iter(range(STEPS))

    def place(batch):
        if next(batches) == 12:
            raise FileNotFoundError("prompts.txt")
        return batch

    with pytest.raises(FileNotFoundError, match="prompts.txt"):
        run.start(**({"place": place} if where == "data" else {where: fail}))
    assert int(run.last()[0].state.step) == 12
    run.start()
    _assert_same_run(run, whole)


def test_an_error_inside_a_step_saves_nothing(tmp_path):
    """Its buffers may have been given away."""

    def fail(step):
        if step == 7:
            raise RuntimeError("out of memory")

    run = Run(tmp_path)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.start(before_step=fail)
    assert int(run.last()[0].state.step) == 5


def test_an_error_before_the_first_step_leaves_no_checkpoint(tmp_path):
    with pytest.raises(ZeroDivisionError):
        Run(tmp_path).start(place=lambda batch: 1 / 0)
    assert training.CheckpointReader(tmp_path / "checkpoints").steps() == []


@pytest.mark.parametrize("every", [pytest.param(0, marks=pytest.mark.slow), 6])
def test_what_adapts_is_saved_before_the_evaluation(tmp_path, every):
    """With a checkpoint at the step and without one, where the interrupt saves."""
    run = Run(tmp_path, dataclasses.replace(OPTIONS, checkpoint_every=every))
    interrupt, adapted = training.Interrupt(), []

    def adapt(step, state, check):
        adapted.append(step)
        return state.replace(skipped=state.skipped + 100)

    def evaluate(step, ema, check):
        if step == 12:
            interrupt.requested = True
        check()
        return _loss(ema)

    run.start(adapt=adapt, evaluate=evaluate, interrupt=interrupt)
    restored, _ = run.last()
    assert adapted == [6, 12] and int(restored.state.skipped) == 200
    assert restored.notes["progress"]["hooks_due"] == ["evaluate", "sample"]
    run.start(adapt=adapt)
    assert adapted == [6, 12, 18, 24] and int(run.last()[0].state.skipped) == 400
    run.start(adapt=adapt, before_step=_kill_at(STEPS))
    assert len(adapted) == 4


def test_the_last_step_is_evaluated_too(tmp_path):
    run = Run(tmp_path, training.LoopOptions(total_steps=5, log_every=5, evaluate_every=3))
    adapted = []

    def adapt(step, state, check):
        adapted.append(step)
        return state

    run.start(adapt=adapt)
    assert [r["step"] for r in run.records() if r["kind"] == "evaluate"] == adapted == [3, 5]
    run = Run(tmp_path / "without", training.LoopOptions(total_steps=2, log_every=2))
    run.start()
    assert {r["kind"] for r in run.records()} == {"train"}


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    run = Run(tmp_path)
    run.start()
    run.start(before_step=_kill_at(STEPS))
    _assert_same_run(run, whole)


# --- interrupts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_resumes_to_the_same_end(whole, tmp_path, number, capfd):
    before = signal.getsignal(number)
    run = Run(tmp_path)

    def before_step(step):
        if step == 10:
            os.kill(os.getpid(), number)

    interrupt = training.Interrupt()
    run.start(before_step=before_step, interrupt=interrupt)
    assert interrupt.requested
    assert "once more to stop without saving" in capfd.readouterr().err
    assert signal.getsignal(number) == before
    restored, _ = run.last()
    assert int(restored.state.step) == 11
    assert len(restored.notes["progress"]["window"]) == 3  # steps 9, 10, 11
    run.start()
    _assert_same_run(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["evaluate", "sample"])
def test_an_interrupt_in_a_hook_runs_only_what_is_left_again(whole, tmp_path, where):
    """The evaluation before an interrupted sample is neither repeated nor lost."""
    run, interrupt, calls = Run(tmp_path), training.Interrupt(), []

    def hook(step, ema, check):
        calls.append(step)
        if step == 12 and calls.count(12) == 1:
            interrupt.requested = True
        check()
        return {"loss": float(np.sum(np.asarray(ema["kernel"], np.float64) ** 2)), "more": 1.0}

    run.start(interrupt=interrupt, **{where: hook})
    assert interrupt.requested
    assert int(run.last()[0].state.step) == 12
    due = ["evaluate", "sample"] if where == "evaluate" else ["sample"]
    assert run.last()[0].notes["progress"]["hooks_due"] == due
    # Killed on the way, so that the checkpoint with unfinished hooks is used twice.
    with pytest.raises(Killed):
        run.start(before_step=_kill_at(14), **{where: hook})
    run.start(**{where: hook})
    _assert_same_run(run, whole)


def test_a_second_sigint_stops_at_once(tmp_path):
    run = Run(tmp_path)

    def before_step(step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run.start(before_step=before_step)
    assert signal.getsignal(signal.SIGINT) == handler
    assert int(run.last()[0].state.step) == 5  # the checkpoint before


def test_an_interrupt_may_be_nested_and_restores_handlers():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt = training.Interrupt()
    with interrupt:
        with interrupt:
            assert signal.getsignal(signal.SIGINT) not in handlers
        assert signal.getsignal(signal.SIGINT) not in handlers
        os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.requested
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    with pytest.raises(training.Interrupted):
        interrupt.check(3)


def test_an_interrupt_outside_the_main_thread_installs_nothing():
    handler, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with training.Interrupt():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [handler] and signal.getsignal(signal.SIGINT) == handler


# --- steps that are not finite ------------------------------------------------------------------


def _poisoning(steps):
    """The step with NaN parameters smuggled in, as a broken kernel would."""
    _, whole = _step()
    poison = tiny.jit(lambda state: jax.tree.map(lambda p: p * np.nan, state.params))

    def step_fn(state, batch):
        if int(state.step) not in steps:
            return whole(state, batch)
        after, metrics = whole(state.replace(params=poison(state)), batch)
        # Parameters come back as they went in; the true ones are put back.
        assert float(metrics.skipped) == 1.0
        return after.replace(params=state.params), metrics

    return step_fn


def test_skipped_steps_are_counted_and_left_out_of_the_means(tmp_path):
    run = Run(tmp_path)
    state = run.start(step=_poisoning({5, 6, 9, 12, 13}))
    assert int(state.skipped) == 5 and int(state.skipped_in_a_row) == 0
    chex.assert_tree_all_finite(state)
    train = {r["step"]: r for r in run.records() if r["kind"] == "train"}
    assert [train[s]["skipped"] for s in (4, 8, 12, 16, 20, 24)] == [0, 2, 1, 2, 0, 0]
    assert all(np.isfinite(record["loss"]) for record in train.values())


def test_too_many_in_a_row_stop_the_run_and_nothing_saved_is_poisoned(whole, tmp_path):
    run = Run(tmp_path)
    with pytest.raises(training.TrainingStopped, match="3 steps in a row up to step 12") as caught:
        run.start(step=_poisoning(set(range(9, STEPS))))
    for hint in ("max_skipped_in_a_row", "learning rate", "saved"):
        assert hint in str(caught.value)
    restored, (ema, _) = run.last()
    assert (int(restored.state.step), int(restored.state.skipped)) == (12, 3)
    chex.assert_tree_all_finite((restored.state, ema))
    records = run.records()
    assert records[-1]["step"] == 12 and records[-1]["skipped"] == 3
    # Nine steps were good: the parameters saved are those of the uninterrupted run's ninth step.
    nine = Run(tmp_path / "nine", training.LoopOptions(total_steps=9, evaluate_every=9))
    nine.start()
    chex.assert_trees_all_equal(restored.state.params, nine.last()[0].state.params)
    chex.assert_trees_all_equal(restored.state.opt_state, nine.last()[0].state.opt_state)


def test_a_window_without_a_finite_step_is_logged_as_nan(tmp_path):
    run = Run(tmp_path, training.LoopOptions(total_steps=4, log_every=2, evaluate_every=4))
    run.start(step=_poisoning({2, 3}))
    first, second, _ = run.records()
    assert np.isfinite(first["loss"]) and np.isnan(second["loss"]) and second["skipped"] == 2


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("total_steps", 0),
        ("log_every", 0),
        ("max_skipped_in_a_row", 0),
        ("profile_steps", 0),
        ("evaluate_every", -1),
        ("sample_every", -1),
        ("checkpoint_every", -1),
        ("profile_at", -1),
    ],
)
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must"):
        training.LoopOptions(**{"total_steps": 5, name: value})


def test_notes_are_kept_beside_the_progress(tmp_path):
    spec, step = _step()
    checkpoints = training.Checkpoints(tmp_path)
    writer = training.MetricWriter(tmp_path / "run")
    state = tiny.new_state(spec, optax.adam(0.01))
    with contextlib.closing(_batches()) as batches:
        training.train(
            step,
            state,
            batches,
            options=training.LoopOptions(total_steps=3),
            checkpoints=checkpoints,
            writer=writer,
            notes={"stream": {"seed": 5}},
        )
    notes = checkpoints.restore_last(
        training.abstract(jax.tree.map(jax.numpy.asarray, state))
    ).notes
    assert notes["stream"] == {"seed": 5}
    assert json.loads(json.dumps(notes)) == notes
    assert checkpoints.steps() == [3]  # the end is saved without checkpoint_every
    writer.close()
    checkpoints.close()


@pytest.mark.slow
def test_a_profile_covers_the_steps_asked_for(tmp_path):
    options = training.LoopOptions(
        total_steps=5, profile_at=2, profile_steps=2, profile_directory=str(tmp_path / "profile")
    )
    Run(tmp_path / "run", options).start()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_the_first_step_is_reported_before_the_panel_compiles(tmp_path, monkeypatch):
    order = []

    class Panel:
        def visit(self, step, state, batch):
            order.append(step)

        def read(self, step, readings):
            return {}

    monkeypatch.setattr(loop.Progress, "note", lambda _, text: order.append(text.split()[:3]))
    Run(tmp_path, dataclasses.replace(OPTIONS, launched_at=0.0)).start(panel=Panel())
    assert order == [["first", "step", "done"], *range(1, STEPS + 1)]
