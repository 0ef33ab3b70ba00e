"""Runs on preference pairs and on rewards: they learn, resume to the same bits, and refuse."""

import copy
import dataclasses
import json
import math
import pathlib
import shutil
import types

import chex
import jax
import launching
import numpy as np
import pytest
import saved_run

from mdm_jax import files, training, variance
from mdm_jax.alignment import pairs
from mdm_jax.alignment.training import Answers
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import presets
from mdm_jax.launch.alignment import variance as aligned_variance
from mdm_jax.launch.alignment import variance as of_alignment
from mdm_jax.launch.alignment.experiment import REFERENCE, aligned, check_same_sampler
from mdm_jax.launch.alignment.rounds import RECORDS, Rounds
from mdm_jax.launch.alignment.validation import HeldOutPairs
from mdm_jax.launch.auto import choose
from mdm_jax.launch.build import make_experiment, open_workdir
from mdm_jax.launch.families import token_details
from mdm_jax.launch.modes import evaluate, measure, train
from mdm_jax.launch.names import CONFIGURED
from mdm_jax.launch.reports.page import write_page
from mdm_jax.launch.workdir import WorkdirError, claim, saved_config, set_history_aside

pytestmark = pytest.mark.usefixtures("one_device")
DATA = pathlib.Path(__file__).parents[1] / "data" / "hub"
SHAPE = ("width", "depth", "num_heads")
REWARD = "def ones(prompt, answer):\n    return answer.count('1') / 4\n"


@pytest.fixture(scope="module")
def started(one_device, tmp_path_factory):
    """Directory of a run of a task that has parameters, and no training."""
    workdir = tmp_path_factory.mktemp("alignment") / "start"
    config = presets.get_config("reward:smoke")
    config.alignment.method = ""
    config.data.task.name = "add"
    saved_run.save(make_experiment(config), workdir)
    return workdir


def rewarded(started, folder, steps=4, **settings):
    config = presets.get_config("reward:smoke")
    (folder / "rewards.py").write_text(REWARD)
    config.data.task.name = "add"
    config.train.update(init_from=str(started), steps=steps)
    config.optimizer.update(peak=0.03, ema_decay=0.5)
    config.alignment.update({"reward": f"{folder / 'rewards.py'}:ones", "answers": 4} | settings)
    return config


def preferred(started, folder, steps=4, **settings):
    path = folder / "pairs.jsonl"
    lines = ({"prompt": f"{i}+1=", "chosen": f"{i + 1}", "rejected": f"{i}?"} for i in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = presets.get_config("preference:smoke")
    config.data.update(path=str(path), tokenizer=str(started / "tokenizer.json"))
    config.data.fractions = (0.6, 0.2, 0.2)
    config.train.update(init_from=str(started), steps=steps)
    config.optimizer.peak = 0.01
    config.alignment.update(settings)
    return config


def last_state(experiment, workdir):
    checkpoints = open_workdir(workdir)
    state = checkpoints.restore_last(aligned(experiment).abstract_state()).state
    checkpoints.close()
    return state


def records(workdir, kind):
    return training.read_metrics(workdir / "metrics.jsonl", kind)


def assert_resumes(workdir, folder):
    """The run without its last checkpoint ends in the same state."""
    again = files.as_path(shutil.copytree(workdir, folder / "again"))
    step = max(int(p.name) for p in (again / "checkpoints/last").iterdir() if p.name.isdigit())
    shutil.rmtree(again / f"checkpoints/last/{step}")
    shutil.rmtree(again / "checkpoints/best", ignore_errors=True)
    experiment = make_experiment(saved_config(again), again)
    assert train.train(experiment, again)
    chex.assert_trees_all_equal(last_state(experiment, again), last_state(experiment, workdir))


@pytest.mark.slow
def test_rewards_rise_and_a_run_resumes_to_the_same_bits(started, tmp_path, capsys):
    workdir = files.as_path(tmp_path / "run")
    config = rewarded(started, tmp_path, steps=24)
    config.train.batch_size = 32
    config.train.checkpoint_every = 22
    config.panel.cost = 0.5
    assert train.train(make_experiment(config, workdir), workdir)
    shown = capsys.readouterr().out
    assert "alignment: trace" in shown and "policy gradient exact" in shown
    found = records(workdir, "reward")
    assert len(found) == 24 and all(each["answers_without_reward"] == 0 for each in found)
    reward = np.array([each["reward"] for each in found])
    # 128 answers at each end, of standard deviations below 0.25: 0.03 a standard error.
    assert reward[-4:].mean() > reward[:4].mean() + 0.15, reward
    before = {path.name: path.read_text() for path in (workdir / RECORDS).iterdir()}
    assert set(before) == {f"step-{step}.jsonl" for step in range(2, 25, 2)}
    lines = [json.loads(line) for line in before["step-24.jsonl"].splitlines()]
    assert len(lines) == 32 and {line["step"] for line in lines} == {24}
    assert set(lines[0]) == {"step", "prompt", "answer", "reward", "steps"}
    assert {line["steps"] for line in lines} == {6}  # a pass for each of five digits and the end
    noise = records(workdir, "noise")
    assert noise and all(math.isfinite(each["total"]) for each in noise)
    # Held-out rewards choose the best parameters, and are those that evaluate prints.
    held_out = records(workdir, "evaluate")
    assert [each["step"] for each in held_out] == [*range(2, 25, 2)]
    assert all(each["loss"] == -each["reward"] for each in held_out)
    best = max(each["reward"] for each in held_out)
    checkpoints = open_workdir(workdir)
    assert checkpoints.best_metrics()["reward"] == best > held_out[0]["reward"]
    checkpoints.close()
    final = evaluate.evaluate(make_experiment(saved_config(workdir), workdir), workdir)
    assert final["rewarded_answers"] == 8 and 0 < final["reward"] <= 1
    assert "held-out reward" in "".join(token_details(final))
    # The last round is written again, and it alone.
    edited = tmp_path / "again" / RECORDS / "step-22.jsonl"
    (workdir / RECORDS / "step-22.jsonl").write_text("kept")
    (workdir / RECORDS / "step-24.jsonl").write_text("cut off")
    assert_resumes(workdir, tmp_path)
    assert edited.read_text() == "kept"
    assert (tmp_path / "again" / RECORDS / "step-24.jsonl").read_text() == before["step-24.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "espo", "inner_steps": 3, "kl": 0.1},
        {"method": "d1", "inner_steps": 2, "advantages": "standardised"},
        {"method": "elbo", "kl": 0.1, "tail": "masked"},
        *({"method": name} for name in ("gdpo", "coupled", "unigrpo", "wd1", "spg", "rejection")),
    ],
    ids=lambda settings: settings["method"],
)
def test_every_method_trains(started, tmp_path, settings):
    workdir = files.as_path(tmp_path / "run")
    config = rewarded(started, tmp_path, **settings)
    config.variance.order = ("stratified",)
    experiment = make_experiment(config, workdir)
    assert train.train(experiment, workdir)
    state = last_state(experiment, workdir)
    assert int(state.step) == 4 and int(state.skipped) == 0
    moved = [np.any(a != b) for a, b in zip(*map(leaves, (state.params, start_of(experiment))))]
    assert any(moved)
    assert (workdir / REFERENCE).exists() == ("kl" in settings)
    if settings.get("inner_steps"):
        assert_resumes(workdir, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("process, method", [("block", "elbo"), ("uniform", "rejection")])
def test_other_processes_are_rewarded_by_their_own_bound(started, tmp_path, process, method):
    workdir = files.as_path(tmp_path / "run")
    config = rewarded(started, tmp_path, method=method, kl=0.1)
    config.process = process
    config.block.size = 4
    config.sample.sampler = "first_hitting" if process == "block" else "uniform_ancestral"
    assert train.train(make_experiment(config, workdir), workdir)
    state = last_state(make_experiment(config, workdir), workdir)
    assert int(state.step) == 4 and int(state.skipped) == 0
    assert all(0 <= each["reward"] <= 1 for each in records(workdir, "reward"))
    written = [*(workdir / RECORDS).iterdir()][0].read_text().splitlines()
    passes = [json.loads(line)["steps"] for line in written]
    # One for each token and each block that is read, or one for each step.
    assert min(passes) > 2 if process == "block" else set(passes) == {config.sample.num_steps}
    config.alignment.update(method="trace", kl=0.0)
    with pytest.raises(ValueError, match="masks views of its own, for process=masked"):
        aligned(make_experiment(config))


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def start_of(experiment):
    return train.initial_state(experiment).params


@pytest.mark.slow
def test_preferences_are_learnt_and_a_run_resumes_to_the_same_bits(started, tmp_path):
    workdir = files.as_path(tmp_path / "run")
    config = preferred(started, tmp_path, steps=16)
    config.train.checkpoint_every = 14
    config.panel.cost = 0.5
    assert train.train(make_experiment(config, workdir), workdir)
    losses = [each["loss"] for each in records(workdir, "train")]
    assert losses[0] < math.log(2) + 0.02 and losses[-1] < math.log(2) - 0.05, losses
    assert (workdir / REFERENCE).exists() and records(workdir, "noise")
    held_out = records(workdir, "evaluate")
    assert [each["step"] for each in held_out] == [*range(2, 17, 2)]
    assert held_out[-1]["preference_accuracy"] > 0.7 and held_out[-1]["preference_margin"] > 0.5
    assert held_out[-1]["loss"] == held_out[-1]["preference_loss"] < held_out[0]["loss"]
    assert 0 < held_out[-1]["preference_margin_monte_carlo_error"] < 3
    final = evaluate.evaluate(make_experiment(saved_config(workdir), workdir), workdir)
    assert final["preference_accuracy"] > 0.7
    assert "held-out pairs: accuracy" in "".join(token_details(final))
    page = write_page(workdir).read_text()
    assert "held-out preference accuracy" in page and "Loss of the pairs" in page
    assert_resumes(workdir, tmp_path)


@pytest.mark.slow
def test_the_reference_stays_what_the_run_began_from(started, tmp_path):
    experiment = aligned(make_experiment(preferred(started, tmp_path)))
    state = train.initial_state(experiment)
    moved = state.replace(params=jax.tree.map(lambda a: a + 1, state.params))
    for each in (state, moved):
        kept = experiment.with_reference(each, files.as_path(tmp_path / "run"))
        chex.assert_trees_all_equal(kept.frozen, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("make", ["preferred", "rewarded"])
def test_adapters_share_their_frozen_parameters_with_the_reference(make, tmp_path):
    source = shutil.copytree(DATA / "a2d_qwen3-1", tmp_path / "model")
    workdir = files.as_path(tmp_path / "run")
    config = written(tmp_path) if make == "preferred" else asked(tmp_path)
    config.model.source = str(source)
    config.model.update({name: launch_config.get_config().model[name] for name in SHAPE})
    config.adapter.update(name="lora", rank=3, targets=("query", "down"))
    experiment = make_experiment(config, workdir)
    assert train.train(experiment, workdir)
    assert set(last_state(experiment, workdir).params) == {"adapters"}
    assert not (workdir / REFERENCE).exists()
    assert_resumes(workdir, tmp_path)


def written(folder):
    config = preferred(folder, folder)
    config.data.tokenizer = "char"  # the source's
    config.train.init_from = ""
    return config


def asked(folder):
    lines = ({"prompt": f"{i}+1", "answer": f"{i + 1}"} for i in range(40))
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = rewarded("", folder, kl=0.1, method="elbo")
    config.data.update(source="jsonl", path=str(folder / "asked.jsonl"), fractions=(0.6, 0.2, 0.2))
    config.data.task.update(launch_config.get_config().data.task)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "ipo"},
        {"method": "simpo", "beta": 2.0},
        {"method": "kto"},
        {"method": "dpo", "estimate": "plain", "replicates": 1},
    ],
    ids=lambda settings: settings["method"],
)
def test_every_preference_loss_trains(started, tmp_path, settings):
    workdir = files.as_path(tmp_path / "run")
    config = preferred(started, tmp_path, **settings)
    config.train.num_microbatches = 2
    config.variance.order = ("stratified", "ppots_slopes", "mirror")
    experiment = make_experiment(config, workdir)
    assert train.train(experiment, workdir)
    assert int(last_state(experiment, workdir).skipped) == 0


def test_settings_that_contradict_each_other_are_refused(started, tmp_path):
    made = {make: make_experiment(make(started, tmp_path)) for make in (rewarded, preferred)}

    def refused(match, change=lambda _: None, make=rewarded, **settings):
        config = copy.deepcopy(made[make].config)
        config.alignment.update(settings)
        change(config)
        with pytest.raises(ValueError, match=match):
            aligned(dataclasses.replace(made[make], config=config))

    refused("leaves some out", lambda c: c.train.stop.update(patience=2), on_error="skip")
    refused("starts from a trained model", lambda c: c.train.update(init_from=""))
    refused("trains on prompts", make=preferred, method="trace")
    refused("trains on pairs", method="dpo")
    refused("would not be read without alignment.method", method="", kl=0.1)
    refused("alignment.answers=3 must divide", answers=3)
    refused("leave out sample.top_k", lambda c: c.sample.update(top_k=4))
    refused("updates after the first need a ratio", inner_steps=2)
    refused("whole canvas", tail="masked")
    refused("takes pairs of draws of an answer, and has 1", method="gdpo", replicates=1)
    refused("takes 2 or more draws of an answer", method="spg", replicates=1)
    refused("needs alignment.replicates of 2", make=preferred, replicates=1)
    refused("no function of a file", reward="nowhere.py:f")
    refused("has no function 'twos', but ones", reward=f"{tmp_path / 'rewards.py'}:twos")
    refused("alignment.kl is of bounds", kl=0.1)
    refused("searched by the", lambda c: c.variance.update(order=("clipped_adaptive",)))
    for transform, method, match in (
        (variance.clipped(0.3, 0.8), "elbo", "no bounds of the likelihood"),
        (variance.log_uniform(), "trace", "log_uniform in variance.order would warp"),
    ):
        made[rewarded] = dataclasses.replace(made[rewarded], transform=transform)
        refused(match, method=method)
    pictures = dataclasses.replace(made[rewarded].dataset, tokenizer=None)
    made[rewarded] = dataclasses.replace(made[rewarded], dataset=pictures)
    refused("rewards are of texts")


def test_other_modes_say_what_they_do_not_do(started, tmp_path):
    workdir = files.as_path(tmp_path / "run")
    experiment = make_experiment(rewarded(started, tmp_path))
    with pytest.raises(ValueError, match="fitted to the .*alignment.method='trace'"):
        measure.parameters(experiment, workdir)
    claim(workdir, experiment.config)
    experiment.config.sample.temperature = 0.5
    with pytest.raises(WorkdirError, match="sample.temperature: 1.0 -> 0.5: .*another policy's"):
        check_same_sampler(aligned(experiment), workdir, allow_change=False)
    check_same_sampler(aligned(experiment), workdir, allow_change=True)


@pytest.mark.slow
def test_two_processes_write_and_train_as_one(started, tmp_path):
    """The same answers, rewards and files; losses up to the order of summation."""
    arguments = [
        "--config=reward:smoke",
        "--config.data.task.name=add",
        f"--config.train.init_from={started}",
        "--config.alignment.method=espo",
        "--config.alignment.inner_steps=2",
        "--config.alignment.kl=0.1",
        "--config.optimizer.peak=0.01",
    ]
    launching.finish(*arguments, f"--workdir={tmp_path / 'one'}", devices=2)
    several = launching.start_several(2, *arguments, f"--workdir={tmp_path / 'two'}")
    found = launching.finish_several(several)
    assert all(code == 0 for code, _, _ in found), found
    one, two = (
        {kind: records(tmp_path / name, kind) for kind in ("reward", "train", "evaluate")}
        for name in ("one", "two")
    )
    assert one["reward"] == two["reward"] and one["evaluate"] == two["evaluate"]
    for first, second in zip(one["train"], two["train"], strict=True):
        np.testing.assert_allclose(first["loss"], second["loss"], rtol=1e-4, atol=1e-6)
    for path in (tmp_path / "one" / RECORDS).iterdir():
        assert (tmp_path / "two" / RECORDS / path.name).read_text() == path.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("make", ["preferred", "rewarded"])
def test_the_meter_measures_such_runs(started, tmp_path, make):
    """Chains by source and per pass, pairs by what sharing masks removes, answers by method."""
    workdir = files.as_path(tmp_path / "run")
    config = globals()[make](started, tmp_path, steps=6)
    config.measure.update(levels_per_row=2, masks_per_level=2, redraws=16, data_batches=3, rows=8)
    assert train.train(make_experiment(config, workdir), workdir)
    shown = []
    run = aligned_variance.configured(make_experiment(config, workdir))
    paths = run(make_experiment(config, workdir), workdir, shown.append)
    assert all(pathlib.Path(path).exists() for path in paths)
    record = files.read_json(workdir / "variance" / "variance.json")
    assert record["step"] == 6 and {"independent", CONFIGURED, "stratified, mirror"} <= set(
        record["methods"]
    )
    own = record["methods"][CONFIGURED]
    assert own["score"]["total"] > 0
    # One step of a trace is a level; the masks are those of the order.
    assert (own["score"]["pattern"] > 0) == (make == "preferred")
    assert own["efficiency"]["passes"] == 2
    if make == "preferred":
        assert record["estimators"] is None and "on masks of their own" in shown[0]
        assert record["sharing"]["factor"] > 2
    else:
        refused = record["methods"]["stratified, ppots_slopes"]["refused"]
        assert "ppots_slopes in variance.order would warp" in refused
        found = record["estimators"]
        assert record["sharing"] is None and found["trace"]["cosine"] == pytest.approx(1)
        assert found["coupled"]["passes"] == 3 and found["gdpo"]["passes"] == 2
        assert "within_standard_error" in own["score"]
        assert "methods on batches of the same 8 answers" in shown[0]


@pytest.mark.slow
@pytest.mark.parametrize("make", ["preferred", "rewarded"])
def test_auto_chooses_the_chain_of_such_runs(started, tmp_path, make):
    workdir = files.as_path(tmp_path / "run")
    config = globals()[make](
        started, tmp_path, steps=4, method="dpo" if make == "preferred" else "elbo"
    )
    config.variance.order = ("auto",)
    config.variance.auto.update(budget=1.0, passes=8, groups=4, warm_up=2)
    config.train.update(steps=400, batch_size=16)
    experiment = aligned(make_experiment(config, workdir))
    state = train.initial_state(experiment)
    experiment = experiment.with_reference(state, workdir)
    record, chain, _ = choose.choose(experiment, state)
    assert record["redraws"] > 0 and not record["left_out"], record
    assert {"independent", "stratified", "stratified, mirror"} <= set(record["chains"])
    under = experiment.with_chain(chain)
    assert under.transform.views == 2 * under.base.transform.views
    assert under.frozen is experiment.frozen and under.rollout is experiment.rollout


def test_policy_and_reference_are_evaluated_on_the_same_masks(started, tmp_path):
    """Of equal parameters all margins are 0 bit for bit; others are the difference of the bounds
    that the likelihood estimator gives, and equal validations are equal."""
    experiment = make_experiment(preferred(started, tmp_path))
    params = train.initial_state(experiment).params
    key = experiment.key(0, "evaluate")

    def pairs_of(reference):
        return HeldOutPairs(experiment, "valid", experiment.validate, key, reference)

    figures, chosen = pairs_of(params).measure(params)
    assert figures.accuracy[0] == 0.5 and figures.margin == (0, 0, 0)
    np.testing.assert_allclose(figures.losses, math.log(2), rtol=1e-6)
    moved = jax.tree.map(lambda a: a + 0.1 * np.cos(np.arange(a.size)).reshape(a.shape), params)
    held_out = pairs_of(params)
    figures, chosen = held_out.measure(moved)
    rows = experiment.batches(experiment.dataset.valid, 8)
    np.testing.assert_array_equal(
        chosen.replicate_row_nats, experiment.validate(moved, key, rows).replicate_row_nats
    )
    assert len(figures.losses) == 8 and figures.margin.standard_error > 0
    assert held_out.measure(moved)[0].margin == figures.margin


def test_bad_pairs_are_named_by_file_and_line(tmp_path):
    good = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    path = tmp_path / "pairs.jsonl"

    def read(*rows, **options):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return pairs.preference_pairs(path, fractions=(1, 0, 0), **options)

    for row, match in (
        (good | {"rejected": "yes"}, r"pairs.jsonl:2: chosen and rejected are the same"),
        (good | {"chosen": " "}, r"pairs.jsonl:2: the chosen answer is empty"),
        ({"prompt": "a", "chosen": "yes"}, r"pairs.jsonl:2: .*rejected"),
    ):
        with pytest.raises(ValueError, match=match):
            read(good, row)
        assert read(good, row, bad_rows="drop").report["bad_rows"] == 1
    with pytest.raises(ValueError, match=r"pairs.jsonl:2: too long"):
        read(good, good | {"chosen": "much longer"}, answer_length=4)
    made = read(good, good | {"chosen": "much longer"}, answer_length=4, too_long="drop")
    assert {name: len(rows) for name, rows in made.rejected.items()} == {"valid": 0, "test": 0}
    row = made.train[0]
    assert len(made.train) == 1 and made.length == 5 and row.tokens.shape == (10,)
    np.testing.assert_array_equal(row.documents, [1] * 5 + [2] * 5)
    np.testing.assert_array_equal(row.eligible, ([False] + [True] * 4) * 2)
    assert made.tokenizer.decode(row.tokens[6:8]) == "no"


@pytest.mark.parametrize("inner", [1, 2, 4, 12])
def test_every_update_of_every_round_has_a_draw_of_its_own(inner):
    """Draws are functions of the step's number, which no two updates share."""
    rounds = object.__new__(Rounds)
    settings = types.SimpleNamespace(inner_steps=inner)
    rounds._experiment = types.SimpleNamespace(settings=settings, frozen=None)
    rounds._old = lambda _state, _answers, number, _frozen: np.float32(number)
    rounds.write = lambda _state, _prompts, _number: Answers(*[np.zeros(1)] * 7)
    seen = []

    def step(state, answers):
        old = None if answers.old is None else int(answers.old)
        seen.append((int(state.step), old))
        metrics = training.StepMetrics(*[float(state.step)] * 4, 0.0, 0.0)
        return state.replace(step=state.step + 1), metrics

    state = StateOf(jax.device_put(np.int32(0), jax.devices()[0]))
    for number in range(3):
        state, metrics = rounds(step, state, None)
        assert int(state.step) == number + 1
        # What is logged is the mean over the updates of the round.
        assert metrics.loss == number * inner + (inner - 1) / 2 and metrics.skipped == 0
    assert [number for number, _ in seen] == [*range(3 * inner)]
    # The old policy is scored by the draw of the update that its values are for.
    assert all(old == (number if inner > 1 else None) for number, old in seen)


@dataclasses.dataclass
class StateOf:
    step: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def test_a_trained_run_without_its_reference_is_refused(started, tmp_path):
    experiment = aligned(make_experiment(preferred(started, tmp_path)))
    state = types.SimpleNamespace(step=np.int32(3), params=None)
    with pytest.raises(WorkdirError, match="reference, the parameters .* is missing"):
        experiment.with_reference(state, files.as_path(tmp_path))


def test_a_start_of_another_vocabulary_is_refused(started, tmp_path):
    config = preferred(started, tmp_path)
    config.data.tokenizer = "char"  # of the pairs, which have fewer characters
    with pytest.raises(WorkdirError, match="the tokenizer of .* is another than this run's"):
        train.initial_state(make_experiment(config))


def test_histories_of_before_are_set_aside_too(tmp_path):
    """``answers.jsonl`` is what runs wrote before answers were in a folder."""
    workdir = files.as_path(tmp_path)
    (tmp_path / "answers.jsonl").write_text("old")
    (tmp_path / RECORDS).mkdir()
    set_history_aside(workdir)
    assert (tmp_path / "answers.1.jsonl").read_text() == "old"
    assert not (tmp_path / RECORDS).exists() and not (tmp_path / "answers.jsonl").exists()


def test_orders_that_the_network_does_not_choose_have_exact_traces(started, tmp_path):
    """Left to right too: blocks of one token."""
    experiment = aligned(make_experiment(rewarded(started, tmp_path)))
    labels = {}
    for name in ("first_hitting", "random_remasking", "low_confidence_remasking"):
        experiment.config.sample.sampler = name
        labels[name] = experiment.policy_gradient_label("trace").partition(":")[0]
    assert [*labels.values()] == ["exact", "exact", "biased"]


def test_kto_has_no_sources_by_row(started, tmp_path):
    experiment = make_experiment(preferred(started, tmp_path, method="kto"))
    with pytest.raises(ValueError, match="no sources by row"):
        of_alignment.measure(experiment, files.as_path(tmp_path), [], None)
