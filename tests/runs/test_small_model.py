"""The small pretrained model of the repository, its corpus, and the files of its tasks."""

import dataclasses
import json
import lzma
import pathlib
import shutil

import chex
import launching
import numpy as np
import pytest

from experiments import conversations, pretrain_small
from mdm_jax import files, hub
from mdm_jax.hub.tokenizer import HubTokenizer
from mdm_jax.launch import presets
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, export, train
from mdm_jax.launch.workdir import saved_config

EXPERIMENTS = pathlib.Path(conversations.__file__).parent
MODEL = EXPERIMENTS / "models" / "small"


def test_the_model_is_small_and_whole():
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4e6
    model = hub.describe(MODEL)
    traits, codec = model.traits, model.tokenizer
    assert model.family.name == "a2d-qwen3" and not codec.mask_added
    assert (traits.mask_id, traits.eos_id, traits.pad_id) == (1023, 1022, 1020)
    assert traits.vocab_size == codec.vocab_size == pretrain_small.VOCABULARY
    text = "Tom has 12 apples.\n"
    assert codec.decode(codec.encode(text)) == text
    assert codec.templates["default"] == pretrain_small.TEMPLATE


def test_rows_of_the_corpus_are_conversations_by_the_chat_template():
    codec = HubTokenizer.read(MODEL)
    novels = {"train": np.zeros(1000, np.int32), "valid": np.zeros(1000, np.int32)}
    rows = pretrain_small.Rows(codec, novels, seed=0)
    batch = rows.batch("train", 0, 12, "chat")
    for tokens, eligible, documents in zip(batch.tokens, batch.eligible, batch.documents):
        text = codec.decode_literally(tokens[documents > 0])
        messages = []
        for turn in text.split("<|im_start|>")[1:]:
            role, content = turn.partition("<|im_end|>")[0].split("\n", 1)
            messages.append({"role": role, "content": content})
        expected = codec.encode_chat(messages)
        size = len(expected.ids)
        np.testing.assert_array_equal(tokens[:size], expected.ids)
        assert (tokens[size : documents.sum()] == codec.eos_id).all()
        whole = eligible[: documents.sum()].all()
        assert whole or (eligible[:size] == expected.assistant).all()
        assert eligible[size : documents.sum()].all() and not eligible[documents == 0].any()


@pytest.mark.parametrize("task", conversations.TASKS)
def test_the_stored_files_are_those_of_the_command(task, tmp_path):
    with lzma.open(EXPERIMENTS / "data" / f"{task}.jsonl.xz", "rt", encoding="utf-8") as file:
        stored = file.read()
    conversations.write(tmp_path / "again.jsonl", task, "pairs", 2500)
    assert (tmp_path / "again.jsonl").read_text("utf-8") == stored
    for line in stored.splitlines():
        pair = json.loads(line)
        assert conversations.MARKER in pair["answer"] and pair["prompt"].endswith("\n")


def test_results_of_exchanges_are_right():
    for number in range(200):
        one = conversations.exchange("stories", "train", number)
        *steps, result = one.answer.replace("We have ", "").replace("So ", "").split(".")
        for step in steps:
            left, right = step.split("=")
            a, sign, b = left.split()
            assert int(right) == (int(a) + int(b) if sign == "+" else int(a) - int(b)) >= 0
        assert result.strip() == f"{conversations.MARKER} {one.result}"
        assert one.result == steps[-1].rpartition("= ")[2]
        other = conversations.exchange("sorting", "train", number)
        numbers = [int(n) for n in other.result.split(", ")]
        assert numbers == sorted(numbers) and len(set(numbers)) == 3


@pytest.mark.slow
def test_the_model_answers_what_it_was_taught():
    shares = {name: share for name, share, _ in pretrain_small.answered(hub.load(MODEL), 20)}
    assert np.mean(list(shares.values())) > 0.35 and shares["greeting"] > 0.9, shares


@pytest.mark.slow
def test_a_file_of_chats_from_training_to_the_same_tokens_elsewhere(tmp_path, monkeypatch):
    launching.on_one_device(monkeypatch)
    source = shutil.copytree(MODEL, tmp_path / "source")
    conversations.write(tmp_path / "chats.jsonl", "stories", "chat", 80)
    config = presets.finetune("smoke")
    config.model.source = str(source)
    config.data.update(path=str(tmp_path / "chats.jsonl"), length=64)
    config.data.fractions = (0.8, 0.1, 0.1)
    config.optimizer.peak = 1e-2
    workdir = files.as_path(tmp_path / "run")
    assert train.train(make_experiment(config, workdir), workdir)
    ended = load_parameters(make_experiment(saved_config(workdir), workdir), workdir)

    again = files.as_path(shutil.copytree(workdir, tmp_path / "again"))
    for path in (again / "checkpoints" / "last").iterdir():  # as a kill between checkpoints
        if path.name == str(config.train.steps):
            shutil.rmtree(path)
    shutil.rmtree(again / "checkpoints" / "best")
    shutil.rmtree(source)  # which a run that has begun does not need
    experiment = make_experiment(saved_config(again), again)
    assert train.train(experiment, again)
    step, params = load_parameters(experiment, again)
    chex.assert_trees_all_equal((step, params), ended)

    assert 0 < evaluate.evaluate(experiment, again)["bits_per_unit"] < 40
    assert "▁" not in "".join(s["text"] for s in evaluate.sample(experiment, again)["samples"])
    export.export(again, str(tmp_path / "out"), dtype="float32")
    elsewhere = shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    loaded = hub.load(elsewhere)
    question = [{"role": "user", "content": "Tom has 3 eggs. Anna has 2 more. How many eggs?"}]
    prompt = loaded.tokenizer.encode_chat(question, add_generation_prompt=True).ids
    own = dataclasses.replace(loaded, params=params)
    first, second = (hub.generate(model, [prompt], 16, steps=16) for model in (own, loaded))
    np.testing.assert_array_equal(first.tokens, second.tokens)
    assert (np.asarray(second.tokens)[second.written] != loaded.traits.mask_id).all()
