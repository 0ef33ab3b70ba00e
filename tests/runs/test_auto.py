"""``variance.order=auto`` in the launcher: what it costs, records, refuses, and how it resumes."""

import json

import chex
import launching
import numpy as np
import pytest
import tiny

from mdm_jax import training
from mdm_jax.launch import presets
from mdm_jax.launch.auto import chain as chains
from mdm_jax.launch.auto import choose
from mdm_jax.launch.auto.chain import Chain
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import train
from mdm_jax.launch.workdir import WorkdirError

STEPS, EVERY = 12, 6
FIRST, SECOND = Chain(("stratified", "mirror")), Chain(("stratified_levels",))


STEP = train.Running.step


class Killed(BaseException):
    """What a SIGKILL is to the loop: nothing that it may catch."""


def automatic(order=("auto",), **settings):
    config = presets.quickstart("smoke")
    config.optimizer.name = "adamw"  # compiles in half the time
    config.variance.order = order
    config.variance.auto.update(passes=4, groups=4, warm_up=2, **settings)
    config.train.update(
        steps=STEPS, evaluate_every=EVERY, checkpoint_every=EVERY, log_every=2, sample_every=0
    )
    return config


@pytest.fixture
def one_device(monkeypatch):
    launching.on_one_device(monkeypatch)


def test_chains_are_measured_within_the_budget(one_device, tmp_path, monkeypatch):
    """At equal forward passes: a chain of two views gets half the rows of a step."""
    two = (("stratified",), ("stratified", "ppots_slopes", "mirror"))
    monkeypatch.setitem(chains.CANDIDATES, "masked", two)
    config = automatic(budget=1.0)
    config.train.steps = 80  # 640 passes, of which the shortest measurement takes most
    experiment = tiny.with_small_network(make_experiment(config, tmp_path))
    assert experiment.chain == Chain(("stratified", "ppots_slopes"))
    state = experiment.initial_state()
    done = []
    record, chain, _ = choose.choose(experiment, state, lambda *_: done.append(1))
    assert list(record["chains"]) == [choose.REFERENCE, *(Chain(order).name for order in two)]
    # Two batches of warm-up; 13 redraws of 4 groups in batches of 4 passes under 3 chains.
    assert record["passes"] == 2 * 4 + 13 * 4 * 4 * 3 <= record["allowed"] == 640
    assert record["chains"]["stratified, ppots_slopes, mirror"]["views"] == 2
    assert record["chains"][record["name"]]["tied"] and record["name"] == chain.name
    assert done
    text = choose.describe(record)
    assert f"chosen: {chain.name} [exact] (" in text and "variance per pass" in text
    choose.write(tmp_path, record)
    choose.write(tmp_path, record)
    assert chains.last_choice(tmp_path) == chain  # the same step is not written twice
    assert len((tmp_path / chains.RECORDS).read_text().splitlines()) == 1
    again = make_experiment(config, tmp_path)
    assert again.chain == chain
    assert again.spec.batch_size * again.transform.views == config.train.batch_size
    assert again.loop.views == again.transform.views


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["text_block", "text_uniform", "digits_gaussian"])
def test_every_process_has_candidates_that_can_be_measured(one_device, preset):
    config = presets.PRESETS[preset]("smoke")
    config.variance.order = ("auto",)
    config.variance.auto.update(budget=1.0, passes=4, groups=4, warm_up=2)
    config.train.update(steps=200)
    experiment = make_experiment(config)
    record, chain, _ = choose.choose(experiment, experiment.initial_state())
    names = [Chain(order).name for order in chains.CANDIDATES[config.process]]
    assert list(record["chains"]) == [choose.REFERENCE, *names] and not record["left_out"]
    assert record["passes"] <= record["allowed"]
    assert chain.name in names


def test_too_small_a_budget_is_said_and_the_default_taken(one_device):
    experiment = make_experiment(automatic())
    assert choose.plan(experiment, {}, same_rows=False).redraws == 0
    state = training.TrainState(np.int32(0), {}, {}, {}, {}, {}, 0, 0)
    record, chain, _ = choose.choose(experiment, state)
    assert chain == Chain(("stratified", "ppots_slopes")) and record["passes"] == 0
    assert "variance.auto.budget=0.02 of the run's 96 forward-backward passes allows 1" in (
        choose.describe(record)
    )


def test_ranges_are_tried_when_asked_for_and_in_mid_run_views_stay(one_device):
    experiment = make_experiment(automatic(("auto_truncated",), budget=1.0))
    planned = choose.plan(experiment, {}, same_rows=False)
    ranges = [name for name, t in planned.transforms.items() if t.bias == "truncated"]
    assert ranges == ["stratified, clipped 0.3 to 0.8", "stratified, clipped 0.45 to 0.95"]
    clipped = experiment.with_chain(planned.chains[ranges[0]])
    assert clipped.bias() == "truncated"
    assert chains.chain_of(json.loads(json.dumps(clipped.chain.to_dict())), "") == clipped.chain
    later = choose.plan(experiment.with_chain(FIRST), {}, same_rows=True)
    assert {t.views for n, t in later.transforms.items() if n != choose.REFERENCE} == {2}
    assert "it would change the rows of a step" in later.left_out["stratified"]


class Stop(training.Interrupt):
    """Asks to stop in the first choice at a step."""

    def __init__(self, step=None):
        super().__init__()
        self.step = step


def run(workdir, monkeypatch, interrupt=None, kill_at=None):
    """Train with choices that are made up: another chain of two views in mid-run."""

    def made_up(experiment, state, check):
        step, chain = int(state.step), FIRST if int(state.step) < EVERY else SECOND
        if interrupt is not None and interrupt.step == step:
            interrupt.requested = True
        check()
        record = {"step": step, "passes": 0, "allowed": 0, "left_out": {}, "chains": {}}
        record |= {
            "name": chain.name,
            "chain": chain.to_dict(),
            "reason": "made up",
            "bias": "exact",
        }
        return record, chain, experiment.with_chain(chain).transform.init(experiment.spec)

    def killing(self, state, batch):
        if kill_at is not None and int(state.step) == kill_at:
            raise Killed
        return STEP(self, state, batch)

    monkeypatch.setattr(choose, "choose", made_up)
    monkeypatch.setattr(train.Running, "step", killing)
    experiment = make_experiment(automatic(every=EVERY), workdir)
    return train.train(experiment, workdir, interrupt)


def last(workdir):
    experiment = make_experiment(automatic(every=EVERY), workdir)
    checkpoints = training.CheckpointReader(workdir / "checkpoints")
    restored = checkpoints.restore_last(
        lambda records: experiment.with_noted_chain(records["notes"]).abstract_state()
    )
    checkpoints.close()
    return restored


@pytest.mark.slow
def test_a_chain_that_changes_in_mid_run_resumes_bit_for_bit(one_device, tmp_path, monkeypatch):
    """Stopped in the choice, whose checkpoint has the old chain; killed after it; resumed."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(whole, monkeypatch)
    assert not run(parts, monkeypatch, Stop(EVERY))
    assert last(parts).notes["chain"]["order"] == list(FIRST.order)
    with pytest.raises(Killed):
        run(parts, monkeypatch, kill_at=EVERY + 2)
    assert chains.last_choice(parts) == SECOND
    assert last(parts).notes["chain"]["order"] == list(FIRST.order)  # of the state that is there
    assert run(parts, monkeypatch)
    found, expected = last(parts), last(whole)
    assert expected.notes["chain"]["order"] == list(SECOND.order)
    assert found.notes == expected.notes and found.position == expected.position
    chex.assert_trees_all_equal(found.state, expected.state)
    for name in ("auto.jsonl", "metrics.jsonl"):
        records = [
            [line for line in map(json.loads, (each / name).read_text().splitlines())
             if line.get("kind") != "speed"]
            for each in (whole, parts)
        ]  # fmt: skip
        assert records[0] == records[1]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"variance.order": ("auto", "mirror")}, "chooses the whole chain and stands alone"),
        ({"variance.auto.every": 4}, "multiple of train.evaluate_every=6"),
        ({"variance.order": ("stratified",), "variance.auto.every": 6}, "only read with"),
        ({"train.stop.patience": 2, "train.evaluate_every": 0}, "there are none"),
        ({"process": "autoregressive", "train.monitors": ()}, "no noise to couple or warp"),
    ],
)
def test_contradictions_are_refused(one_device, changes, words):
    config = automatic()
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=words):
        make_experiment(config)


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / chains.RECORDS).write_text('{"step": 0, "chain": {"order": ["mirrors"]}}\n')
    with pytest.raises(WorkdirError, match=r"auto.jsonl:1 is damaged"):
        chains.last_choice(tmp_path)
