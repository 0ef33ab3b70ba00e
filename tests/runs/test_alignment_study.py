"""The study of preference and reward training in miniature: parts, resuming, tables."""

import json

import numpy as np
import pytest

from experiments import alignment as study
from experiments import words
from mdm_jax import alignment, data, models, testing
from mdm_jax.launch.workdir import WorkdirError
from mdm_jax.models.cross_entropy import as_logits

pytestmark = pytest.mark.usefixtures("one_device")


def test_gains_have_errors_over_seeds_and_prompts():
    """By hand, and of 400 studies whose seeds, prompts and single answers vary."""
    before, after = np.array([0.0, 1, 0, 0]), np.array([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    found = study.gain(after, before)
    assert found.mean == pytest.approx(0.375)
    assert found.over_seeds == pytest.approx(0.125)  # of 0.25 and 0.5
    by_prompt = np.array([1, 0, 0.5, 0])
    assert found.over_prompts == pytest.approx(by_prompt.std(ddof=1) / 2)
    assert found.error == pytest.approx(np.hypot(found.over_seeds, found.over_prompts))
    assert 1 < found.freedom < 1 + 3  # of one and of three
    random, made = np.random.default_rng(0), []
    for _ in range(400):
        seeds, prompts, rest = (random.normal(size=s) for s in ((5, 1), (1, 30), (5, 30)))
        made.append(study.gain(0.3 * seeds + prompts + 0.5 * rest, np.zeros(30)))
    spread = np.std([g.mean for g in made])
    error = np.sqrt(np.mean([g.error**2 for g in made]))
    assert 0.88 < error / spread < 1.2  # 400 studies: 3.5 % a standard error; rather too large


def test_all_ways_take_as_many_passes():
    taken = {w.replicates * alignment.METHODS[w.method].passes for w in study.WAYS.values()}
    assert taken == {study.PASSES}


def test_runs_of_other_settings_are_not_taken_for_these(tmp_path, monkeypatch):
    study.check_settings(tmp_path)
    study.check_settings(tmp_path)
    monkeypatch.setattr(study, "RATE", 2 * study.RATE)
    with pytest.raises(WorkdirError, match="holds runs of other settings"):
        study.check_settings(tmp_path)


def test_the_table_says_which_start_missed_its_target():
    start = {"steps": 300, "accuracy": 0.2, "target": 0.45}
    assert "the target of 0.45 was not reached" in study._start_line("sudoku", start)
    assert "not reached" not in study._start_line("sudoku", start | {"accuracy": 0.46})


def test_an_optimum_by_hand():
    start = np.log(np.full(len(words.REWARDS), 1 / len(words.REWARDS)))
    best = words.optimum(start, beta=2.0)
    assert np.exp(best).sum() == pytest.approx(1)
    assert best.max() - best.min() == pytest.approx(words.REWARDS.max() / 2)
    assert words.REWARDS.max() == 3 and words.true_reward("abcabab") == 3
    found = words.figures(best + np.log(0.9), start, beta=2.0)
    assert found["words"] == pytest.approx(0.9)
    assert found["divergence"] == pytest.approx(-np.log(0.9))
    assert found["true_reward"] == pytest.approx(np.exp(best) @ words.REWARDS)


@pytest.mark.slow
def test_the_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    small = {"UPDATES": 2, "BATCH": 16, "ROWS": 16, "ANSWERS": 4, "HELD_OUT": 32, "SEEDS": range(2)}
    small |= {"OFTEN": 2, "MOST": 4, "WORD_STEPS": 4, "PAIR_UPDATES": 2}
    small |= {"SHARED_PAIRS": 2, "SHARED_DRAWS": 16}
    small |= {"TASKS": {"sudoku": study.TASKS["sudoku"]}}
    small |= {"WAYS": {name: study.WAYS[name] for name in ("espo", "trace, left to right")}}
    small |= {"LOSSES": {"dpo, plain": study.LOSSES["dpo, plain"]}}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    assert not study.study(tmp_path, minutes=0)  # trains the models, and no more
    start = json.loads((tmp_path / "sudoku" / "accuracy.json").read_text())
    assert start["target"] == study.TARGET and start["steps"] == 4
    assert study.study(tmp_path, minutes=60)
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()}
    assert len(parts) == 6 and all(part["skipped"] == 0 for part in parts.values())
    first, second = (parts[f"sudoku-espo-{seed}"] for seed in range(2))
    assert len(first["reward"]) == 2 and len(first["right"]) == 32 and "right_own" not in first
    assert len(parts["sudoku-trace-left-to-right-0"]["right_own"]) == 32
    figures = parts["words-dpo-plain-0"]
    assert figures["law"] is None and figures["divergence"] > 0 and 0 < figures["words"] <= 1
    shared = json.loads((tmp_path / "sharing.json").read_text())
    assert shared["independent"][0] > shared["shared"][0] > 0
    text = study.tables(study.results(tmp_path))
    assert "| trace, left to right, written so | exact | 2 |" in text
    assert "| dpo, plain | 2 |" in text and "**the target of 0.45 was not reached**" in text
    assert "| factor |" in text
    capsys.readouterr()
    assert study.study(tmp_path, minutes=60)
    assert "sudoku-espo" not in capsys.readouterr().out  # nothing is left to do
    assert_law(study.compiled("words", "dpo, plain", tmp_path / "words", tmp_path, {}).experiment)


def assert_law(experiment):
    """That of single words by the enumeration of :mod:`mdm_jax.testing`."""
    params, dataset = study.start_of(experiment), experiment.dataset
    network = models.without_tokens(experiment.apply_fn, dataset.absent_ids)
    rows = data.gather(dataset.test, np.arange(2))
    wanted = testing.any_order_log_likelihood(
        lambda *inputs: as_logits(network(params, *inputs)), rows, dataset.mask_id
    )
    texts = [dataset.tokenizer.decode(t[e][:-1]) for t, e in zip(rows.tokens, rows.eligible)]
    numbers = [int("".join(str(words.LETTERS.index(letter)) for letter in t), 3) for t in texts]
    law = words.log_law(experiment, params)
    np.testing.assert_allclose(law[numbers], wanted, rtol=1e-4)
    assert 0 < np.exp(law).sum() < 1
