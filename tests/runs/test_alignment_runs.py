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
import numpy as np
import pytest
import saved_run

from mdm_jax import files, training, variance
from mdm_jax.alignment import pairs
from mdm_jax.alignment.training import Answers
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import presets
from mdm_jax.launch.alignment.experiment import REFERENCE, aligned, check_same_sampler
from mdm_jax.launch.alignment.rounds import RECORDS, Rounds
from mdm_jax.launch.build import make_experiment, open_workdir
from mdm_jax.launch.modes import measure, train
from mdm_jax.launch.workdir import WorkdirError, claim, saved_config

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
    assert train.train(make_experiment(config, workdir), workdir)
    shown = capsys.readouterr().out
    assert "alignment: trace" in shown and "policy gradient exact" in shown
    found = records(workdir, "reward")
    assert len(found) == 24 and all(each["answers_without_reward"] == 0 for each in found)
    reward = np.array([each["reward"] for each in found])
    # 128 answers at each end, of standard deviations below 0.25: 0.03 a standard error.
    assert reward[-4:].mean() > reward[:4].mean() + 0.15, reward
    lines = [json.loads(line) for line in (workdir / RECORDS).read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(2, 25, 2)) and len(lines) == 12 * 32
    assert set(lines[0]) == {"step", "prompt", "answer", "reward", "steps"}
    before = (workdir / RECORDS).read_text()
    assert_resumes(workdir, tmp_path)
    assert (tmp_path / "again" / RECORDS).read_text() == before


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


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def start_of(experiment):
    return train.initial_state(experiment).params


@pytest.mark.slow
def test_preferences_are_learnt_and_a_run_resumes_to_the_same_bits(started, tmp_path):
    workdir = files.as_path(tmp_path / "run")
    config = preferred(started, tmp_path, steps=16)
    config.train.checkpoint_every = 14
    assert train.train(make_experiment(config, workdir), workdir)
    losses = [each["loss"] for each in records(workdir, "train")]
    assert losses[0] < math.log(2) + 0.02 and losses[-1] < math.log(2) - 0.05, losses
    assert (workdir / REFERENCE).exists()
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

    refused("trained least here", lambda c: c.train.update(evaluate_every=2))
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
    refused("chosen by the likelihood bound", lambda c: c.variance.update(order=("auto",)))
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
    with pytest.raises(ValueError, match="this run's loss is alignment.method='trace'"):
        measure.measure(experiment, workdir)
    claim(workdir, experiment.config)
    experiment.config.sample.temperature = 0.5
    with pytest.raises(WorkdirError, match="sample.temperature: 1.0 -> 0.5: .*another policy's"):
        check_same_sampler(aligned(experiment), workdir, allow_change=False)
    check_same_sampler(aligned(experiment), workdir, allow_change=True)


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
    rounds._by_rows = jax.devices()[0]
    rounds._old = lambda _state, _answers, number, _frozen: np.float32(number)
    rounds.write = lambda _state, _prompts, _number: Answers(*[np.zeros(1)] * 7)
    seen = []

    def step(state, answers):
        old = None if answers.old is None else int(answers.old)
        seen.append((int(state.step), old))
        return state.replace(step=state.step + 1), None

    state = StateOf(jax.device_put(np.int32(0), rounds._by_rows))
    for number in range(3):
        state, _ = rounds(step, state, None)
        assert int(state.step) == number + 1
    assert [number for number, _ in seen] == [*range(3 * inner)]
    # The old policy is scored by the draw of the update that its values are for.
    assert all(old == (number if inner > 1 else None) for number, old in seen)


@dataclasses.dataclass
class StateOf:
    step: jax.Array

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)
