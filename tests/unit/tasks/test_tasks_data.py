"""Generated tasks as a data source: rows, lengths, padding, order of reading, settings."""

import itertools
import json

import numpy as np
import pytest

from experiments.configs.study import chain, pairs, sudoku4, sudoku6, sudoku6_noisy
from mdm_jax import data, tasks
from mdm_jax.launch import build, names
from mdm_jax.launch import config as launch_config

COUNTDOWN = tasks.Countdown()
SIZES = {"train_rows": 24, "valid_rows": 5, "test_rows": 4}


def dataset(task=COUNTDOWN, **settings):
    return tasks.task_dataset(task, **{**SIZES, **settings})


def test_a_row_is_the_prompt_on_the_right_then_the_answer_and_one_scored_eos():
    source = dataset()
    codec, middle, lengths = source.tokenizer, COUNTDOWN.lengths[0], set()
    for index in range(24):
        row = source.train[index]
        prompt, answer = tasks.example(COUNTDOWN, "train", index)
        begin, end = middle - len(prompt), middle + len(answer)
        assert codec.decode(row.tokens[begin:middle]) == prompt
        assert codec.decode(row.tokens[middle:end]) == answer
        assert (row.tokens[:begin] == codec.pad_id).all()
        assert (row.tokens[end:] == codec.eos_id).all()
        places = np.arange(source.length)
        assert (row.eligible == ((places >= middle) & (places <= end))).all()
        assert (row.tokens[row.eligible] == codec.eos_id).sum() == 1
        assert (row.documents == ((places >= begin) & (places <= end))).all()
        assert row.units == len(answer)
        lengths.add(len(answer))
    assert len(lengths) > 1
    assert [a.dtype for a in row] == [np.int32, bool, np.int32, np.int32]
    assert source.length == middle + COUNTDOWN.lengths[1] + 1
    assert source.check is not None and source.check(prompt, answer)


def test_scored_padding_gives_nothing_away_about_the_length_of_the_answer():
    rows = data.gather(dataset(answer_padding="eos_scored").train, np.arange(24))
    assert (rows.eligible == (np.arange(rows.tokens.shape[1]) >= COUNTDOWN.lengths[0])).all()
    assert (rows.documents[:, COUNTDOWN.lengths[0] :] == 1).all()
    hidden = data.gather(dataset().train, np.arange(24))
    assert (rows.tokens == hidden.tokens).all() and (rows.units == hidden.units).all()


def test_longer_positions_than_needed():
    row = dataset(tasks.Add(2), prompt_length=9, answer_length=6).train[0]
    assert len(row.tokens) == 15
    assert row.documents.tolist() == [0] * 3 + [1] * 6 + [1] * 4 + [0] * 2


def test_rows_do_not_depend_on_what_was_read_before_or_on_the_size():
    one, two = dataset(), dataset(train_rows=30)
    for index in (7, 3, 7):
        one.train[index]
    left, right = (data.gather(d.train, np.arange(24)) for d in (one, two))
    for a, b in zip(left, right):
        assert (a == b).all()
    assert one.fingerprint == dataset().fingerprint != two.fingerprint
    with pytest.raises(IndexError, match=r"\[0, 24\)"):
        one.train[24]


def test_the_pipeline_goes_through_rows_as_through_any_others():
    source = dataset()
    batches = data.train_iterator(source.train, 8, seed=0)
    first = list(itertools.islice(batches, 3))
    state = batches.get_state()
    following = next(batches)
    again = data.train_iterator(source.train, 8, seed=0)
    again.set_state(state)
    assert (next(again).tokens == following.tokens).all()
    seen = np.concatenate([batch.tokens for batch in first])
    whole = data.gather(source.train, np.arange(24)).tokens
    assert sorted(map(tuple, seen)) == sorted(map(tuple, whole))
    last = list(data.evaluation_batches(source.valid, 4))[-1]
    assert last.eligible.any(1).tolist() == [True, False, False, False]


def test_all_tasks_have_one_vocabulary():
    codec = dataset().tokenizer
    for config in (chain, sudoku4, sudoku6, sudoku6_noisy):
        built = build.dataset(config.get_config("smoke"))
        assert built.tokenizer.fingerprint == codec.fingerprint
    text = tasks.VOCABULARY
    assert set(text) == set("0123456789abcdefghijklmnopqrstuvwxyz+-*/=,;?#()[]:. ")
    assert codec.decode(codec.encode(text)) == text and codec.count_unknown(codec.encode(text)) == 0


def config_of(name, **settings):
    config = launch_config.get_config()
    config.data.source = "task"
    config.data.task.name = name
    config.data.task.update(SIZES)
    config.data.task.update(settings)
    return config


@pytest.mark.parametrize("name", names.TASKS)
def test_every_task_is_built_from_its_settings(name):
    plain, noisy = (build.dataset(config_of(name, noise_every=n)) for n in (0, 1))
    assert isinstance(plain.train.task, names.TASKS[name])
    assert noisy.train.task == tasks.Noisy(plain.train.task, 1)
    assert plain.check(*tasks.example(plain.train.task, "valid", 3))
    assert "Generated problems" in plain.description and plain.vocab_size == 56


def test_settings_from_the_config_reach_the_task():
    config = config_of("chain", chain={"steps": 5, "modulus": 7})
    config.data.prompt_length = 90
    built = build.dataset(config)
    assert built.train.task == tasks.Chain(steps=5, distractors=1, modulus=7)
    assert built.length == 90 + built.train.task.lengths[1] + 1


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"answer_padding": "eos"},
            "unknown name 'eos'; .* known: eos_once, eos_scored",
        ),
        ({"prompt_length": 3}, "prompt_length must be at least 12 for Countdown"),
        ({"answer_length": 4}, "answer_length must be at least 21 for Countdown"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataset(**change)


def test_configs_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="data.task.name: unknown name 'sudoko'.*'sudoku'"):
        build.dataset(config_of("sudoko"))
    config = config_of("chain")
    config.data.source = "embedded"
    with pytest.raises(ValueError, match="'embedded' does not read data.task="):
        build.dataset(config)
    config = config_of("chain")
    config.data.path = "somewhere.txt"
    with pytest.raises(ValueError, match="'task' does not read data.path"):
        build.dataset(config)


def test_pairs_of_a_file_take_part_in_the_study(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"question": f"{i} + {i}?", "answer": f"#### {2 * i}"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = pairs.get_config()
    config.data.path = str(path)
    built = build.dataset(config)
    assert len(built.train) == 36 and built.length == 768 and built.check is None


def write_pairs(path, pairs):
    lines = (json.dumps({"prompt": p, "answer": a, "rating": 3}) + "\n" for p, a in pairs)
    path.write_text("".join(lines), "utf-8")
    return str(path)


def test_problems_of_files_make_the_rows_of_generated_ones(tmp_path):
    paths = {
        name: write_pairs(
            tmp_path / f"{name}.jsonl", [tasks.example(COUNTDOWN, name, i) for i in range(5)]
        )
        for name in ("train", "valid", "test")
    }
    config = config_of("countdown")
    config.data.source = "task_file"
    config.data.update(path=paths["train"], valid_path=paths["valid"], test_path=paths["test"])
    with pytest.raises(ValueError, match="data.task.train_rows is 24; leave it at 20000"):
        build.dataset(config)
    config.data.task.update(train_rows=20_000, valid_rows=512, test_rows=512)
    found, generated = build.dataset(config), dataset()
    for name in ("train", "valid", "test"):
        left, right = (data.gather(getattr(d, name), np.arange(4)) for d in (found, generated))
        for a, b in zip(left, right):
            assert (a == b).all()
    assert found.check("5,7,3:36", "5+7=12,12*3=36") and found.layout == generated.layout
    assert found.tokenizer.fingerprint == generated.tokenizer.fingerprint
    config.data.valid_path = paths["test"]
    assert build.dataset(config).fingerprint != found.fingerprint
    config.data.update(valid_path="", test_path="", fractions=(0.6, 0.2, 0.2))
    assert [len(build.dataset(config).train), len(build.dataset(config).test)] == [3, 1]


@pytest.mark.parametrize(
    "pair, message",
    [
        (("5,7,3:36", "5+7=12,12+3=36"), ":2: '5.7=12,12.3=36' is no answer to '5,7,3:36'"),
        (("5,7,3", "5+7=12"), ":2: no prompt of Countdown"),
        (("5,7,3:36!", "5+7=12"), ":2: '!' is no character of the tasks' vocabulary"),
        (("5,7,3:36", "5+7=12,12*3=36,36*1=36"), ":2: too long, .* with its EOS 23"),
    ],
)
def test_files_of_other_problems_are_refused_by_line(tmp_path, pair, message):
    path = write_pairs(tmp_path / "pairs.jsonl", [tasks.example(COUNTDOWN, "train", 0), pair])
    with pytest.raises(ValueError, match=message):
        tasks.task_file_dataset(COUNTDOWN, path)
