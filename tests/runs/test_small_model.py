"""The small pretrained model of the repository, its corpus, and the files of its tasks."""

import json
import lzma
import pathlib

import numpy as np
import pytest

from experiments import conversations, pretrain_small
from mdm_jax import hub
from mdm_jax.hub.tokenizer import HubTokenizer

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
    assert np.mean(list(shares.values())) > 0.6, shares
