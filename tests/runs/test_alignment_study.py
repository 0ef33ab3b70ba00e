"""The study of preference and reward training in miniature: parts, resuming, tables."""

import json

import pytest

from experiments import alignment as study

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]


def test_the_study_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    small = {"UPDATES": 2, "BATCH": 16, "ANSWERS": 4, "HELD_OUT": 32, "SEEDS": range(2)}
    small |= {"PRETRAINING": {"sudoku": 4, "words": 4}, "PAIRS": 64, "PAIR_UPDATES": 2}
    small |= {"TASKS": {"sudoku": study.TASKS["sudoku"]}, "REPLICATES": {"trace": 2, "espo": 1}}
    small |= {"LOSSES": {"dpo, plain": study.LOSSES["dpo, plain"]}}
    for name, value in small.items():
        monkeypatch.setattr(study, name, value)
    assert not study.study(tmp_path, minutes=0)  # trains the first model, and no more
    assert study.study(tmp_path, minutes=60)
    parts = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "parts").iterdir()}
    assert len(parts) == 6
    for name, part in parts.items():
        assert len(part["accuracy"]) == (3 if "sudoku" in name else 2)
        assert all(0 <= value <= 1 for value in part["accuracy"])
    # Seeds differ, and what is before the updates does not.
    first, second = (parts[f"sudoku-trace-{seed}"] for seed in range(2))
    assert first["accuracy"][0] == second["accuracy"][0] and first["reward"] != second["reward"]
    text = study.tables(tmp_path)
    assert "| trace | exact | 2 |" in text and "| dpo, plain | none | 2 |" in text
    capsys.readouterr()
    assert study.study(tmp_path, minutes=60)
    assert "sudoku-trace" not in capsys.readouterr().out  # nothing is left to do
