"""The study of preference and reward training in miniature: parts, resuming, tables."""

import json

import pytest

from experiments import alignment as study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def test_the_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    small = {"UPDATES": 2, "BATCH": 16, "ANSWERS": 4, "HELD_OUT": 32, "SEEDS": range(2)}
    small |= {"OFTEN": 2, "MOST": 4, "WORD_STEPS": 4, "PAIRS": 64, "PAIR_UPDATES": 2}
    small |= {"TASKS": {"sudoku": study.TASKS["sudoku"]}, "REPLICATES": {"trace": 2, "espo": 1}}
    small |= {"LOSSES": {"dpo, plain": study.LOSSES["dpo, plain"]}}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    assert not study.study(tmp_path, minutes=0)  # trains the models, and no more
    assert (tmp_path / "sudoku" / "accuracy.json").exists()
    assert study.study(tmp_path, minutes=60)
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()}
    assert len(parts) == 6 and all(part.get("skipped", 0) == 0 for part in parts.values())
    first, second = (parts[f"sudoku-trace-{seed}"] for seed in range(2))
    assert len(first["reward"]) == 2 and first["reward"] != second["reward"]  # other prompts
    assert "preference_accuracy" in parts["words-dpo-plain-0"]
    text = study.tables(tmp_path)
    assert "| trace | exact | 2 |" in text and "| dpo, plain | none | 2 |" in text
    capsys.readouterr()
    assert study.study(tmp_path, minutes=60)
    assert "sudoku-trace" not in capsys.readouterr().out  # nothing is left to do
