"""Conversations: spans of answers, paddings, packing, bad rows; templates of others."""

import json
import pathlib

import numpy as np
import pytest

from mdm_jax import data
from mdm_jax.data.chats import PlainTemplate
from mdm_jax.hub import chat as templates
from mdm_jax.hub.tokenizer import ChatRenderer, HubTokenizer

HUB = pathlib.Path(__file__).parents[2] / "data" / "hub"
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
]
TEXT = "System: s\n\nUser: ab\n\nAssistant: cd␃\n\nUser: e\n\nAssistant: f␃"


def short(i):
    return [
        {"role": "user", "content": f"{i}"},
        {"role": "assistant", "content": "y" * (1 + i % 3)},
    ]


@pytest.fixture
def write(tmp_path):
    def write(*rows, name="chats.jsonl"):
        text = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text("\n".join(text) + "\n", "utf-8")
        return tmp_path / name

    return write


def made(path, length=96, **settings):
    return data.chat(path, length, **{"fractions": (1, 0, 0), **settings})


def answers(dataset, row=0):
    """Eligible stretches of a row, as text."""
    batch = dataset.train[row]
    pieces = np.split(np.arange(len(batch.tokens)), np.flatnonzero(np.diff(batch.eligible)) + 1)
    return [
        dataset.tokenizer.decode(np.append(batch.tokens[p], dataset.tokenizer.mask_id), "")
        for p in pieces
        if batch.eligible[p[0]]
    ]


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_the_plain_template_and_its_answers(write, kind):
    path = write({"messages": TURNS})
    whole = made(path, answer_padding="pad_hidden", tokenizer=kind)
    row, codec = whole.train[0], whole.tokenizer
    shown = row.tokens[row.documents > 0]
    assert codec.decode(np.append(shown, codec.mask_id), "") == TEXT
    assert answers(whole) == ["cd␃", "f␃"] and row.units == 3
    assert answers(made(path, answer_padding="pad_hidden", loss_on="last")) == ["f␃"]
    prompt = PlainTemplate(codec).prompt(TURNS[:4])
    assert codec.decode(np.append(prompt, codec.mask_id), "") == TEXT.removesuffix("f␃")


def test_markup_outside_of_answers_is_eligible_too(write):
    settings = {"answer_padding": "pad_hidden", "structural_prompt_tokens": ("User: ", "e")}
    dataset = made(write({"messages": TURNS}), **settings)
    assert answers(dataset) == ["e", "User: ", "cd␃", "User: e", "f␃"]
    assert dataset.train[0].units == 3 + 1 + 6 + 6 + 1
    assert dataset.report["train_structural_prompt_tokens"] == 14


def test_paddings_of_the_families(write):
    path, size = write({"messages": TURNS}), len(TEXT)
    shared = {}
    for padding in ("eos_scored", "eos_once", "pad_hidden"):
        dataset = made(path, answer_padding=padding)
        row, codec = dataset.train[0], dataset.tokenizer
        scored = padding == "eos_scored"
        assert row.eligible[size:].all() == row.documents[size:].all() == scored
        assert row.eligible[size:].any() == scored
        filler = codec.eos_id if scored else codec.pad_id
        assert set(row.tokens[size:].tolist()) == {filler}
        shared[padding] = row.eligible[:size].tolist()
    assert shared["eos_scored"] == shared["eos_once"] == shared["pad_hidden"]


def test_other_spellings_trailing_messages_and_splits_by_the_first_prompt(write):
    said = [("human", "q"), ("gpt", "a"), ("human", "more")]
    rows = [{"conversations": [{"from": f, "value": v} for f, v in said]}, {"messages": TURNS}]
    dataset = made(write(*rows))
    assert answers(dataset)[0].startswith("a␃")
    assert dataset.report["train_messages_after_the_last_answer"] == 1
    nested = write({"x": {"chat": TURNS}}, name="nested.jsonl")
    assert len(made(nested, messages_field="x.chat").train) == 1
    twice = [{"messages": short(i // 2)} for i in range(3, 43)]
    parts = data.chat(write(*twice), 48, tokenizer="byte", fractions=(0.5, 0.25, 0.25))
    seen = [
        {parts.tokenizer.decode(row[:8]) for row in data.gather(s, np.arange(len(s))).tokens}
        for s in (parts.train, parts.valid, parts.test)
    ]
    assert not seen[0] & seen[1] and not (seen[0] | seen[1]) & seen[2]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, r"chats.jsonl:2: no field 'messages' or 'conversations'; .*\['text'\]"),
        ({"messages": []}, "chats.jsonl:2: field 'messages' must be a list of messages"),
        ({"messages": ["a"]}, "chats.jsonl:2: message 0: must be an object"),
        ({"messages": [{"role": "user"}]}, "chats.jsonl:2: message 0: needs a content"),
        ({"messages": TURNS[:2]}, "chats.jsonl:2: no message of role 'assistant'.* system, user"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "message 0: content: .*surrogate"),
        ("{", "chats.jsonl:2: not JSON"),
    ],
)
def test_bad_rows_are_named_or_dropped(write, row, message):
    path = write({"messages": TURNS}, row)
    with pytest.raises(ValueError, match=message):
        made(path)
    dropped = made(path, bad_rows="drop")
    assert len(dropped.train) == 1 and dropped.report["bad_rows"] == 1
    assert "chats.jsonl:2" in dropped.description


def test_what_a_template_refuses_is_bad_too(write):
    class Picky(PlainTemplate):
        def __call__(self, messages, loss_on):
            if messages[0]["role"] == "system":
                raise ValueError("no system messages")
            return super().__call__(messages, loss_on)

    path = write({"messages": short(1)}, {"messages": TURNS})
    codec = made(path).tokenizer
    with pytest.raises(ValueError, match="chats.jsonl:2: no system messages"):
        made(path, renderer=Picky(codec), tokenizer=codec)
    dropped = made(path, renderer=Picky(codec), tokenizer=codec, bad_rows="drop")
    assert len(dropped.train) == 1 and dropped.report["bad_rows"] == 1
    assert "chats.jsonl:2: no system messages" in dropped.description


def test_too_long_conversations(write):
    path = write({"messages": short(1)}, {"messages": TURNS})
    with pytest.raises(ValueError, match=r"chats.jsonl:2: too long, the conversation has 59 token"):
        made(path, 40)
    for told in ("first of 1 of 2 that do not", "For all set data.length=59;", "leaves out 1"):
        with pytest.raises(ValueError, match=told):
            made(path, 40)
    assert len(made(path, 40, too_long="drop").train) == 1
    cut = made(path, 40, too_long="truncate")
    assert cut.report["train_truncated_conversations"] == 1
    assert answers(cut, 1) == ["cd␃"]  # the second answer does not fit
    few = made(path, 25, too_long="truncate")
    assert few.report["train_dropped_conversations"] == 1  # no answer in its start


def test_packed_conversations_are_documents_whose_prompts_are_not_eligible(write):
    chats = [{"messages": short(i)} for i in range(1, 12)]
    apart = made(write(*chats), 64, answer_padding="eos_once")
    packed = made(write(*chats), 64, answer_padding="eos_once", packing="first_fit", align=4)
    assert len(packed.train) < len(apart.train) == 11

    def texts(dataset, mask):
        batch = data.gather(dataset.train, np.arange(len(dataset.train)))
        return sorted(
            tokens[(documents == n) & (eligible | mask)].tolist()
            for tokens, eligible, documents, _ in zip(*batch)
            for n in np.unique(documents[documents > 0])
        )

    for mask in (True, False):
        assert texts(packed, mask) == texts(apart, mask)
    data.check_document_blocks(packed, 4)
    other = write({"messages": short(1)}, name="other.jsonl")
    mixed = made(f"{write(*chats)}:1,{other}:1", 64, answer_padding="eos_once",
                 packing="first_fit", random_cut=0.5)  # fmt: skip
    with pytest.raises(ValueError, match="begin inside blocks of 4 tokens"):
        data.check_document_blocks(mixed, 4)
    with pytest.raises(ValueError, match="choose one of the two"):
        made(write(*chats), packing="first_fit")


def test_prompts_to_answer_are_laid_out_as_chats(write):
    dataset = made(write({"messages": TURNS}))
    codec, layout = dataset.tokenizer, dataset.layout
    row = layout.to_answer(layout.encode_prompt("ab"), codec)
    assert codec.decode(row.tokens[0], "") == "User: ab\n\nAssistant: "
    assert np.array_equal(row.eligible, row.tokens == codec.mask_id) and row.documents.all()
    with pytest.raises(ValueError, match="do not fit a row of 96"):
        layout.to_answer(np.zeros(96, np.int32), codec)


def test_last_answers_are_checked_as_rows_show_them(write):
    turns = [dict(turn) for turn in TURNS]
    turns[-1]["content"] = "it is #### 1,250"
    dataset = made(write({"messages": turns}), loss_on="last", answer_marker="####")
    row, codec = dataset.train[0], dataset.tokenizer
    first = np.flatnonzero(row.eligible)[0]
    prompt = codec.decode(row.tokens[:first])
    assert dataset.check(prompt, "so #### 1250") and not dataset.check(prompt, "#### 12")
    with pytest.raises(ValueError, match="chats.jsonl:1: the answer has no '####'"):
        made(write({"messages": TURNS}), loss_on="last", answer_marker="####")
    with pytest.raises(ValueError, match="of which there is one with loss_on='last'"):
        made(write({"messages": turns}), answer_marker="####")


@pytest.fixture(scope="module", params=["a2d_qwen3-1", "llada-1"])
def codec(request):
    return HubTokenizer.read(HUB / request.param, vocab_size=310)


def test_answers_of_a_chat_template_are_what_is_generated_after_its_prompt(codec):
    """Tokens are those of the whole text, and a prompt is where inference begins."""
    ids, learned = codec.encode_answers(TURNS, "last")
    assert ids.tolist() == codec.encode_chat(TURNS).ids.tolist()
    prompt = codec.encode_chat(TURNS[:4], add_generation_prompt=True).ids
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert np.flatnonzero(learned).tolist() == list(range(len(prompt), len(ids)))
    both, every = codec.encode_answers(TURNS[:3] + TURNS[3:], "all")
    assert both.tolist() == ids.tolist()
    first = codec.decode_literally(both[every & ~learned])
    assert first.startswith("cd") and "ab" not in first and "user" not in first


def test_a_template_whose_beginnings_change_is_refused_and_one_that_marks_answers_is_not():
    last = "{% for m in messages %}{% if loop.last %}[{{ m.content }}]{% else %}{{ m.content }};"
    last += "{% endif %}{% endfor %}{% if add_generation_prompt %}[{% endif %}"

    def render(template):
        return lambda messages, add: templates.render_spans(template, messages, add)

    with pytest.raises(ValueError, match="beginning of the whole, up to message 2: .*loss_on=last"):
        templates.answer_spans(render(last), TURNS, last=False)
    marked = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<{{ m.content }}"
    marked += ">{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    text, spans = templates.answer_spans(render(marked), TURNS, last=False)
    assert [text[a:b] for a, b in spans] == ["<cd>", "<f>"]
    assert templates.answer_spans(render(marked), TURNS, last=True)[1] == spans[1:]


def test_tokens_that_would_cross_the_bounds_of_an_answer_are_cut_there(codec):
    """By byte pairs of 'a' + 'b', which the templates are made to put side by side."""
    codec = codec.replaced(templates={"default": "{% for m in messages %}{{ m.content }}"
                                                 "{% endfor %}"})  # fmt: skip
    for left, right in (("he", "llo"), ("wor", "ld"), ("th", "e"), ("1", "2"), ("\n", "\n")):
        chat = [{"role": "user", "content": left}, {"role": "assistant", "content": right}]
        ids, learned = codec.encode_answers(chat, "all")
        assert codec.decode_literally(ids[~learned]) == left
        assert codec.decode_literally(ids[learned]) == right


def test_a_chat_template_lays_out_rows(write, codec):
    dataset = made(write({"messages": TURNS}), 160, tokenizer=codec, loss_on="last",
                   renderer=ChatRenderer(codec), answer_padding="eos_once")  # fmt: skip
    row = dataset.train[0]
    ids, learned = codec.encode_answers(TURNS, "last")
    assert row.tokens[: len(ids)].tolist() == ids.tolist()
    assert row.eligible[: len(ids)].tolist() == learned.tolist()
    assert row.eligible.sum() - learned.sum() == (ids[-1] != codec.eos_id)
    assert "the chat template" in dataset.description
