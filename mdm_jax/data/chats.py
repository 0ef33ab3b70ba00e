"""Conversations from JSON lines: several turns, loss on what the assistant says."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import numpy as np

from mdm_jax.checks import checked
from mdm_jax.data.datasets import (
    AnswerPadding,
    Dataset,
    Fractions,
    Length,
    VocabSize,
    make_dataset,
)
from mdm_jax.data.packing import Align, Packing, first_fit
from mdm_jax.data.pairs import (
    AnswerMarker,
    RandomCut,
    StructuralTokens,
    TooLong,
    check_structural,
    checker,
    mixed_rows,
    names_of,
    occurrences,
    stream_settings,
    structural_ids,
)
from mdm_jax.data.records import BadRows, Line, Record, field, read_sources
from mdm_jax.data.rows import PackedSpans, aligned
from mdm_jax.data.statistics import length_quantiles, length_table
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer, utf8
from mdm_jax.types import Batch

Messages = list[dict[str, Any]]
LossOn = Annotated[Literal["all", "last"], "answers of a conversation that are learned"]

FIELDS = ("messages", "conversations")
"""Where a row holds its conversation, the first that it has."""
ASSISTANT = "assistant"
_SPELLINGS = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
"""Roles of other data sets, mostly with ``from`` and ``value``."""


class Chat(NamedTuple):
    """A conversation: token ids [n] int32, and [n] bool, which are to be learned."""

    ids: np.ndarray
    answers: np.ndarray


class Renderer(Protocol):
    """Lays a conversation out as tokens; ValueError where it cannot."""

    def __call__(self, messages: Messages, loss_on: LossOn) -> tuple[np.ndarray, np.ndarray]:
        """Ids and answers of a :class:`Chat`."""
        ...

    def prompt(self, messages: Messages) -> np.ndarray:
        """Ids [n] of a conversation up to where the assistant is to speak."""
        ...


@dataclasses.dataclass(frozen=True)
class PlainTemplate:
    """The layout of conversations for tokenizers without a chat template.

    Turns are ``Role: content``, separated by a blank line; an assistant's content ends with EOS::

        System: Be brief.

        User: What is 2 + 2?

        Assistant: 4<EOS>

        User: ...

    Every piece is encoded by itself, so no token crosses the bounds of an answer, which is the
    content and its EOS.
    """

    codec: Tokenizer

    def __call__(self, messages: Messages, loss_on: LossOn) -> Chat:
        last = max(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
        ids, answers = [], []
        for i, (header, content, role) in enumerate(self.pieces(messages)):
            said = role == ASSISTANT
            tail = [self.codec.encode(content)] + [[self.codec.eos_id]] * said
            for piece, learned in [(self.codec.encode(header), False)] + [
                (each, said and (loss_on == "all" or i == last)) for each in tail
            ]:
                ids.append(np.asarray(piece, np.int32))
                answers.append(np.full(len(ids[-1]), learned))
        return Chat(np.concatenate(ids), np.concatenate(answers))

    def prompt(self, messages: Messages) -> np.ndarray:
        """Ids [n] up to where the assistant is to speak."""
        ids, _ = self([*messages, {"role": ASSISTANT, "content": ""}], "last")
        return ids[:-1]  # without the EOS of an empty answer

    @staticmethod
    def pieces(messages: Messages) -> list[tuple[str, str, str]]:
        """Header, content and role of each turn."""
        gaps = ["", *["\n\n"] * (len(messages) - 1)]
        return [
            (f"{gap}{m['role'].capitalize()}: ", m["content"], m["role"])
            for gap, m in zip(gaps, messages)
        ]


@checked
def chat(
    path: str | os.PathLike | Sequence[str],
    length: Length,
    *,
    messages_field: Annotated[
        str, "dotted key of the messages; '': messages or conversations"
    ] = "",
    loss_on: LossOn = "all",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    bad_rows: BadRows = "error",
    too_long: TooLong = "error",
    answer_padding: AnswerPadding = "eos_scored",
    random_cut: RandomCut = 0.0,
    structural_prompt_tokens: StructuralTokens = (),
    packing: Packing = "",
    align: Align = 1,
    answer_marker: AnswerMarker = "",
    renderer: Renderer | None = None,
) -> Dataset:
    """Rows ``[conversation][padding]`` from rows ``{"messages": [{"role", "content"}, ...]}``.

    Tokens of the assistant's answers are eligible, others never are. Messages after the last answer
    are left out, and counted.

    Args:
        path: as of :func:`mdm_jax.data.jsonl`: a file, a directory, a glob, or a mixture of them.
        length: positions of a row.
        messages_field: dotted path to the messages; "": the first of :data:`FIELDS`. Messages may
            be spelled ``{"from": "human" | "gpt", "value"}`` as well.
        loss_on: "all" answers, or the "last". A bidirectional model sees later turns when it learns
            an earlier answer; "last" alone is what answering needs.
        valid_path, test_path, fractions, split_seed: one file split by what stands before the first
            answer, or a file for each split; see :func:`mdm_jax.data.records.read_sources`.
        bad_rows, random_cut, structural_prompt_tokens: as of :func:`mdm_jax.data.jsonl`.
        too_long: for conversations that do not fit: "error"; "truncate" keeps the start, without
            EOS, of those with an answer in it and drops others; "drop". The report counts them.
        answer_padding: after the conversation. "eos_scored": EOS to the end of the row, eligible
            (as in LLaDA); not with packing. "eos_once": one EOS, eligible, unless it ends with one,
            then padding. "pad_hidden": padding, neither eligible nor attended to.
        packing, align: "first_fit" puts several conversations into a row, as documents that do
            not attend to each other, each from a multiple of ``align`` on.
        answer_marker: text before the result in every last answer, such as ``"####"``, for
            ``Dataset.check``; "": no check. With ``loss_on="last"`` and without packing.
        renderer: lays conversations out, as a model's chat template does
            (``hub.ChatRenderer``); None: :class:`PlainTemplate` of the tokenizer.

    ValueError as ``read_sources``; naming file and line, if a conversation is too long under
    "error"; if none of a split is left; for settings that contradict each other.
    """
    if packing and answer_padding == "eos_scored":
        raise ValueError(
            "answer_padding='eos_scored' fills the row after a conversation with EOS, where "
            f"packing={packing!r} puts other conversations; choose one of the two"
        )
    if length % align:
        raise ValueError(f"align must divide a row of {length} tokens, got {align}")
    if answer_marker and (loss_on != "last" or packing):
        raise ValueError(
            f"answer_marker={answer_marker!r} checks the answer of a row, of which there is one "
            f"with loss_on='last' and packing='', got {loss_on!r} and {packing!r}"
        )
    found = read_sources(
        path,
        lambda record, origin: conversation(record, messages_field, origin),
        wanted=repr(messages_field or FIELDS[0]),
        named_by="messages_field (pairs of texts: the source jsonl)",
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
        bad_rows=bad_rows,
    )
    parts = found.splits()
    texts = (text for record in parts["train"] for text in _texts(record))
    codec = make_tokenizer(tokenizer, texts, bpe_vocab_size)
    markup = structural_ids(structural_prompt_tokens, codec, random_cut)
    layout = _Layout(length, loss_on, too_long, answer_padding, packing, align)
    render = renderer or PlainTemplate(codec)
    sources, report, bad = [], dict(found.report), list(found.bad)
    groups = [*found.train, parts["valid"], parts["test"]]
    kept_bad = bad if bad_rows == "drop" else None
    rendered = [_rendered(records, codec, render, layout, kept_bad) for records in groups]
    if too_long == "error":
        _check_lengths([talk for talks in rendered for talk in talks], length)
    for number, (records, talks) in enumerate(zip(groups, rendered)):
        name = ("train", "valid", "test")[max(0, number - len(found.train) + 1)]
        sequences = markup if name == "train" else []
        rows, counts = _rows(records, [talk for talk, _ in talks], codec, layout, sequences)
        if records and not len(rows):
            raise ValueError(
                f"{records[0].origin}: every conversation of the {name} split was dropped as too "
                f"long (length {length}) or as bad: {(bad or ['none'])[-1]}"
            )
        sources.append(rows)
        for key, value in counts.items():
            report[f"{name}_{key}"] = report.get(f"{name}_{key}", 0) + value
    check_structural(structural_prompt_tokens, report)
    if bad:
        report["bad_rows"] = found.report.get("bad_rows", 0) + len(bad) - len(found.bad)
        found = found._replace(bad=bad[:5], report=report)
    everything = (record for records in parts.values() for record in records)
    check = None
    if answer_marker:
        check = checker(_questions(everything, codec, render, bad_rows), answer_marker)
    train, (valid, test) = sources[:-2], sources[-2:]
    content = json.dumps([[record.values[1] for record in records] for records in parts.values()])
    lines = (Line(t, r.origin) for records in parts.values() for r in records for t in _texts(r))
    settings = {k: v for k, v in dataclasses.asdict(layout).items() if v not in ("", 1)}
    tokens = hashlib.sha256(content.encode())
    for rows in sources:  # what the template made of them
        tokens.update(rows.tokens)
        tokens.update(rows.eligible)
    return make_dataset(
        {
            "train": mixed_rows(train, found.weights, random_cut, codec),
            "valid": valid,
            "test": test,
        },
        codec,
        length=length,
        digest=tokens.digest(),
        settings={
            **settings,
            "source": "chat",
            "tokenizer": codec.fingerprint,
            **stream_settings(train, found.weights, random_cut, structural_prompt_tokens),
        },
        headline=f"Conversations from {names_of(found.paths)}, one a line.",
        policy=f"Loss on {loss_on} answers, laid out by "
        f"{'the chat template' if renderer else 'the plain template'}; those longer than {length} "
        f"tokens: {too_long}; after the conversation: {answer_padding}."
        + (f" Several to a row, from multiples of {align} on." if packing else "")
        + found.describe([len(rows) for rows in train])
        + describe_unknown(lines, codec),
        report=report,
        check=check,
        layout=ChatLayout(length, answer_padding, render),
    )


@dataclasses.dataclass(frozen=True)
class ChatLayout:
    """Rows ``[prompt][answer ...]`` from the first position on: where conversations stand."""

    length: int
    answer_padding: AnswerPadding
    renderer: Renderer

    def encode_prompt(self, text: str) -> np.ndarray:
        """Ids [n] of the prompt that a user's message is."""
        return self.renderer.prompt([{"role": "user", "content": text}])

    def to_answer(self, ids: np.ndarray, codec: Tokenizer) -> Batch:
        """The row [1, L] of a prompt ``ids`` [n] whose answer is to be generated, masked there.

        To the end of the row, or under other paddings than "eos_scored" where ids are masked.
        ValueError if it does not fit, or does not say where the answer ends.
        """
        masked = np.flatnonzero(ids == codec.mask_id)
        if self.answer_padding == "eos_scored":
            ids = np.append(ids, np.full(self.length - len(ids), codec.mask_id, np.int32))
        elif not len(masked):
            raise ValueError(
                f"rows show where the answer ends (answer_padding={self.answer_padding!r}); say so "
                "by a length, or in a text file by one ▁ after the prompt for each token of the "
                "answer and one for its EOS"
            )
        size = len(ids)
        if size > self.length or not np.any(ids == codec.mask_id):
            raise ValueError(f"{size} tokens and an answer do not fit a row of {self.length}")
        tokens = np.full((1, self.length), codec.pad_id, np.int32)
        tokens[0, :size] = ids
        documents = (np.arange(self.length) < size).astype(np.int32)[None]
        eligible = (tokens == codec.mask_id) & (documents > 0)
        return Batch(tokens, eligible, documents, eligible.sum(1, dtype=np.int32))


@dataclasses.dataclass(frozen=True)
class _Layout:
    length: int
    loss_on: LossOn
    too_long: TooLong
    answer_padding: AnswerPadding
    packing: Packing
    align: int


def conversation(record: Mapping[str, Any], path: str, origin: str) -> tuple[str, Messages, int]:
    """What stands before the first answer, the messages to the last, and how many are behind it."""
    names = [path] if path else [name for name in FIELDS if name in record]
    if not names:
        raise ValueError(
            f"{origin}: no field {' or '.join(map(repr, FIELDS))}; the line has {sorted(record)}"
        )
    value = field(record, names[0], origin)
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"{origin}: field {names[0]!r} must be a list of messages, got {got}")
    messages = [_message(each, f"{origin}: message {i}") for i, each in enumerate(value)]
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    if not any(messages[i]["content"] for i in answers):
        raise ValueError(
            f"{origin}: no message of role {ASSISTANT!r} with a content; the roles are "
            f"{', '.join(sorted({m['role'] for m in messages}))}"
        )
    kept = messages[: answers[-1] + 1]
    return json.dumps(messages[: answers[0]]), kept, len(messages) - len(kept)


def _message(value: Any, origin: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise ValueError(f"{origin}: must be an object with role and content, got {kind}")
    message = dict(value)
    for name, other in (("role", "from"), ("content", "value")):
        if name not in message and other in message:
            message[name] = message.pop(other)
        if not isinstance(message.get(name), str):
            raise ValueError(
                f"{origin}: needs a {name} that is a string, as in "
                f'{{"role": "user", "content": "Hello"}}; it has {sorted(value)}'
            )
        try:
            utf8(message[name])
        except ValueError as error:
            raise ValueError(f"{origin}: {name}: {error}") from error
    message["role"] = _SPELLINGS.get(message["role"], message["role"])
    return message


def _texts(record: Record) -> list[str]:
    return [piece for turn in PlainTemplate.pieces(record.values[1]) for piece in turn[:2]]


def _questions(
    records: Iterable[Record], codec: Tokenizer, render: Renderer, bad_rows: BadRows
) -> Iterator[tuple[str, str, str]]:
    """What stands before the last answer and that answer, as their rows show them, and origins."""
    for (_, messages, _), origin in records:
        try:
            ids, answers = render(messages, "last")
        except ValueError:
            if bad_rows == "error":
                raise
            continue
        first = int(np.flatnonzero(answers)[0])
        answer = codec.decode(codec.truncate_at_eos(ids[first:]))
        yield codec.decode(ids[:first]), answer, origin


def _rendered(
    records: Sequence[Record],
    codec: Tokenizer,
    render: Renderer,
    layout: _Layout,
    bad: list[str] | None,
) -> list[tuple[Chat, str]]:
    """Conversations with the EOS of their padding, and origins; ``bad``: what is not rendered."""
    talks = []
    for (_, messages, _), origin in records:
        try:
            ids, answers = render(messages, layout.loss_on)
        except ValueError as error:
            if bad is None:
                raise ValueError(f"{origin}: {error}") from error
            bad.append(f"{origin}: {error}")
            continue
        if layout.answer_padding != "pad_hidden" and not (len(ids) and ids[-1] == codec.eos_id):
            ids, answers = np.append(ids, np.int32(codec.eos_id)), np.append(answers, True)
        elif layout.answer_padding != "pad_hidden":
            answers = np.append(answers[:-1], True)
        talks.append((Chat(ids, answers), origin))
    return talks


def _check_lengths(talks: Sequence[tuple[Chat, str]], length: int) -> None:
    """Raise ValueError where some do not fit, with quantiles of all and what to set."""
    sizes = np.array([len(talk.ids) for talk, _ in talks])
    misfits = np.flatnonzero(sizes > length)
    if not len(misfits):
        return
    *_, most, longest = length_quantiles(sizes)
    raise ValueError(
        f"{talks[misfits[0]][1]}: too long, the conversation has {sizes[misfits[0]]} tokens "
        f"(length {length}); it is the first of {len(misfits)} of {len(sizes)} that do not fit:\n"
        f"{length_table({'conversation': sizes})}\n"
        f"At this length too_long='drop' leaves out {len(misfits)}, and 'truncate' cuts them. For "
        f"all set data.length={longest}; without the longest {int((sizes > most).sum())}: "
        f"data.length={most}, data.too_long=drop"
    )


def _rows(
    records: Sequence[Record],
    talks: Sequence[Chat],
    codec: Tokenizer,
    layout: _Layout,
    markup: Sequence[np.ndarray],
) -> tuple[PackedSpans, dict[str, int]]:
    """Rows of one source or split, and counts for the report; ``markup`` is eligible anywhere."""
    behind = sum(record.values[2] for record in records)
    counts = {"conversations": len(records), "messages_after_the_last_answer": behind}
    counts |= dict.fromkeys(("truncated_conversations", "dropped_conversations"), 0)
    counts |= {"structural_prompt_tokens": 0} if markup else {}
    pieces: list[Chat] = []
    for ids, answers in talks:
        if len(ids) > layout.length:
            ids, answers = ids[: layout.length], answers[: layout.length]
            if layout.too_long == "drop" or not answers.any():
                counts["dropped_conversations"] += 1
                continue
            counts["truncated_conversations"] += 1
        if markup:
            more = occurrences(ids, markup) & ~answers
            counts["structural_prompt_tokens"] += int(more.sum())
            answers = answers | more
        pieces.append(Chat(ids, answers))
    sizes = np.array([len(piece.ids) for piece in pieces], np.int64)
    numbers = np.arange(len(sizes))
    if layout.packing:
        numbers = first_fit(aligned(sizes, layout.align), layout.length)
    ids = np.concatenate([np.zeros(0, np.int32), *(piece.ids for piece in pieces)])
    eligible = np.concatenate([np.zeros(0, bool), *(piece.answers for piece in pieces)])
    rows = PackedSpans(
        ids,
        np.cumsum(sizes) - sizes,
        np.cumsum(sizes),
        numbers,
        layout.length,
        codec.pad_id,
        codec.character_counts,
        align=layout.align,
        eos_id=codec.eos_id if layout.answer_padding == "eos_scored" else None,
        eligible=eligible,
    )
    filled = int(sizes.sum()) if layout.answer_padding != "eos_scored" else len(rows) * rows.length
    return rows, counts | {
        "rows": len(rows),
        "tokens": int(sizes.sum()),
        "answer_tokens": int(eligible.sum()),
        "padded_positions": len(rows) * layout.length - filled,
        "unknown_characters": codec.count_unknown(ids),
    }
