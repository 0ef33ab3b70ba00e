"""Configs for files of one's own: what is found in them, what is chosen, and that it runs."""

import ast
import dataclasses
import json
import runpy

import numpy as np
import pytest

from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.datasets import dataset
from mdm_jax.launch.modes import train
from mdm_jax.launch.start import new, plan, trial
from mdm_jax.launch.start.look import look

WORDS = ["red", "cat", "sat", "on", "mats", "and", "saw", "old", "birds", "over", "hills", "while"]
CPU = plan.Machine("cpu", "cpu", 1, 2, 2**34)
GPU = plan.Machine("gpu", "H100", 8, 64, 80 * 2**30, bfloat16=True)


def _sentences(count, words=8):
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, words)) for _ in range(count)]


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def measured(monkeypatch):
    """Trials that build the run, and say 10 ms a step for (96, 3) and more for larger ones."""
    tried = []

    def measure(config, seconds):
        experiment = make_experiment(config)
        size = config.model.width, config.model.depth
        tried.append(size)
        step = 0.01 * plan.parameters(*size) / plan.parameters(96, 3)
        rows = len(experiment.dataset.train)
        shape = experiment.dataset.vocab_size, experiment.dataset.length
        return trial.Trial(1.0, step, 2 * step, 5, 2**20, rows, *shape)

    monkeypatch.setattr(trial, "measure", measure)
    return tried


def _made(kind, path, out, **options):
    shown = []
    written = new.new(kind, path, str(out), 1.0, show=shown.append, **options)
    return runpy.run_path(str(written))["get_config"](), "\n".join(shown), written.read_text()


def test_a_text_is_counted(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("one two\n\none two\nthree é\n")
    found = look("text", str(path))
    text = "\n".join(found.lines)
    assert "25 characters in 26 bytes, 6 words, 5 lines, 2 of them empty" in text
    assert "1 lines (33.3%) repeat an earlier one; the commonest, 'one two', is there 2 t" in text
    assert f"{found.alphabet} different characters" in text and found.alphabet == 10


def test_rows_are_counted_and_their_fields_found(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(9)]
    path = _write(tmp_path / "mine.jsonl", [*rows, rows[0], {"question": 3}])
    found = look("jsonl", path)
    assert found.settings == {
        "prompt_field": "question", "answer_marker": "####"}  # fmt: skip
    assert (found.count, found.distinct, len(found.bad)) == (10, 9, 1)
    assert "1 rows are no such pairs" in "\n".join(found.lines)
    with pytest.raises(ValueError, match=r"say which fields .*--fields=text; .*question, answer"):
        look("documents", path)
    assert look("documents", path, ["answer"]).settings == {"text_field": "answer"}


def test_a_text_gets_a_config_that_builds_with_reasons(tmp_path, measured, one_device):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(_sentences(2000)))
    config, shown, text = _made("text", str(path), tmp_path / "mine.py")
    assert measured[0] == (96, 3)
    size = config.model.width, config.model.depth
    step = 0.01 * plan.parameters(*size) / plan.parameters(96, 3)
    assert config.train.steps == int(60 * new.TRAINING_SHARE / step)
    assert config.data.path == str(path) and config.data.source == "text"
    assert "characters are too few to learn words of" in text and config.data.tokenizer == "char"
    assert "a step" in text and "measured" in text and "# windows of the text" in text
    assert 'config.data.update(tokenizer="char")' in text and "\nline  " not in text
    assert max(len(line) for line in text.splitlines() if "path" not in line) <= 100
    assert f"mdm train --config={tmp_path / 'mine.py'} --workdir=runs/mine" in shown
    experiment = make_experiment(config)
    assert experiment.loop.total_steps == config.train.steps


def test_pairs_with_a_long_tail_are_dropped_and_counted(tmp_path, measured, one_device):
    rows = [{"prompt": f"{i:03}?", "answer": "yes" * (40 if i == 7 else 1)} for i in range(200)]
    config, shown, text = _made("jsonl", _write(tmp_path / "p.jsonl", rows), tmp_path / "p.py")
    assert (config.data.prompt_length, config.data.answer_length) == (4, 4)
    assert config.data.too_long == "drop" and "1 of 200 pairs are dropped, and counted" in text
    report = make_experiment(config).dataset.report
    assert sum(report[f"{split}_dropped_pairs"] for split in ("train", "valid", "test")) == 1
    assert "answer                 4       4       4     121" in shown


@pytest.mark.parametrize("kind", ["jsonl", "chat"])
def test_rows_fit_though_the_tokenizer_of_a_run_sees_less_than_all_texts(kind, tmp_path):
    """Lengths without a long tail, and rare words; held-out ones have more tokens than here."""
    generator, rows = np.random.default_rng(0), []
    words = ["".join(generator.choice([*"abcdefghijkl"], 6)) for _ in range(400)]
    for _ in range(250):
        pair = [" ".join(generator.choice(words, 60)) for _ in range(2)]
        messages = [{"role": r, "content": text} for r, text in zip(("user", "assistant"), pair)]
        rows.append(dict(zip(("prompt", "answer"), pair)) | {"messages": messages})
    path = _write(tmp_path / "rows.jsonl", rows)
    found = look(kind, path)
    sizes = found.lengths(found.tokenizer("bpe", 1024))
    (choice,) = plan.lengths(found, sizes, CPU)
    data = {"source": kind, "path": path, "tokenizer": "bpe", "bpe_vocab_size": 1024}
    report = dataset(plan.apply([plan.Choice("data", data, ""), choice])).report
    if kind == "jsonl":
        assert choice.settings == {"prompt_length": 0, "answer_length": 0}
        assert "the longest of the prompts has" in choice.why
    else:
        dropped = sum(report[f"{s}_dropped_conversations"] for s in ("train", "valid", "test"))
        assert choice.settings["too_long"] == "drop" and dropped < 3


def test_few_documents_are_split_so_that_each_part_has_one(tmp_path, measured, one_device):
    rows = [{"text": text} for text in _sentences(5, words=200)]
    path = _write(tmp_path / "d.jsonl", rows)
    config, *_ = _made("documents", path, tmp_path / "d.py")
    dataset = make_experiment(config).dataset
    assert config.data.fractions == (0.6, 0.2, 0.2) and len(dataset.valid) and len(dataset.test)
    with pytest.raises(ValueError, match="2 different documents cannot be split"):
        _made("documents", _write(tmp_path / "e.jsonl", rows[:2]), tmp_path / "e.py")


def test_chats_have_the_length_of_their_template(tmp_path, measured, one_device):
    rows = [
        {"messages": [{"role": "user", "content": f"{i:02}?"}, {"role": "assistant", "content": t}]}
        for i, t in enumerate(_sentences(60, words=2))
    ]
    config, *_ = _made("chat", _write(tmp_path / "c.jsonl", rows), tmp_path / "c.py")
    longest = max(len("User: 00?\n\nAssistant: ") + len(r["messages"][1]["content"]) for r in rows)
    assert config.data.length == longest + 1  # its EOS
    assert len(make_experiment(config).dataset.train)


def test_no_file_is_written_over_without_being_asked(tmp_path, measured, one_device):
    path, out = tmp_path / "mine.txt", tmp_path / "mine.py"
    path.write_text("\n".join(_sentences(500)))
    out.write_text("precious")
    with pytest.raises(ValueError, match="mine.py is there already; .*--overwrite"):
        _made("text", str(path), out)
    assert out.read_text() == "precious" and not measured
    _made("text", str(path), out, overwrite=True)
    assert "get_config" in out.read_text()


@pytest.mark.parametrize(
    "kind, path, out, message",
    [
        ("poem", "x", "x.py", "KIND is one of text, documents, jsonl, chat"),
        ("text", "", "x.py", "needs --path=FILE"),
        ("text", "x", "x.yaml", "Python file"),
        ("text", "x", "nowhere/x.py", "there is no directory nowhere"),
    ],
)
def test_what_cannot_be_meant_is_refused(kind, path, out, message):
    with pytest.raises(ValueError, match=message):
        new.new(kind, path, out, 1.0)


def test_settings_are_written_as_python_reads_them():
    path = 'a "\\ \U0001f600.txt'
    (line,) = new._update(plan.Choice("data", {"path": path, "kind": "text"}, ""))
    call = ast.parse(line).body[0].value
    read = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert read == {"path": path, "kind": "text"} and 'kind="text"' in line


def test_larger_budgets_get_larger_networks():
    row = (16, 128, 2048)
    sizes = [plan.fitting_size(60 * m, 0.03, (96, 3), row)[0] for m in (0.5, 5, 60, 600)]
    counts = [plan.parameters(*size) for size in sizes]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[2] < counts[3]
    assert plan.fitting_size(1, 10.0, (96, 3), row)[0] == plan.SIZES[0]


def test_subwords_need_text_and_their_number_the_machine(tmp_path):
    path = tmp_path / "mine.txt"
    for count, name in ((2000, "char"), (5000, "bpe")):
        path.write_text("\n".join(_sentences(count)))
        assert plan.tokens(look("text", str(path)), True, CPU).settings["tokenizer"] == name
    found = dataclasses.replace(look("text", str(path)), texts=["word " * 2 * 10**7])
    assert plan.tokens(found, True, CPU).settings["bpe_vocab_size"] == 2048
    assert plan.tokens(found, True, GPU).settings["bpe_vocab_size"] == 32768
    assert plan.tokens(found, False, GPU).settings == {"tokenizer": "char"}


def test_accelerators_get_bfloat16_rows_for_all_devices_and_longer_ones():
    assert plan.network((512, 8), GPU, "").settings["dtype"] == "bfloat16"
    assert "dtype" not in plan.network((96, 3), CPU, "").settings
    with_units = dataclasses.replace(CPU, bfloat16=True)
    assert plan.network((96, 3), with_units, "").settings["dtype"] == "bfloat16"
    assert plan.batch(GPU).settings["batch_size"] == 8 * 64


@pytest.mark.slow
def test_the_config_of_a_real_trial_trains(tmp_path, one_device):
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(_sentences(2000)))
    config, shown, _ = _made("text", str(path), tmp_path / "mine.py")
    assert "s a step (median of" in shown
    config.train.steps = 4
    assert train.train(make_experiment(config), tmp_path / "run")
