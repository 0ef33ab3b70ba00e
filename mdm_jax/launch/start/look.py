"""What is in a file that a model is to be trained on: sizes, lengths, duplicates, alphabet."""

import collections
import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mdm_jax.data.chats import PlainTemplate, conversation
from mdm_jax.data.records import Record, read_sources, read_text, text_field
from mdm_jax.data.statistics import length_table
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer

KINDS = ("text", "documents", "jsonl", "chat")
"""Values of ``data.source`` that a file can be looked at as."""
_PAIRS = (
    *(("prompt", "answer"), ("question", "answer"), ("prompt", "completion")),
    *(("prompt", "response"), ("instruction", "output"), ("input", "output"), ("source", "target")),
)
_TEXTS = ("text", "content", "body", "document", "article")
_MARKER = "####"


@dataclasses.dataclass(frozen=True)
class Look:
    """A file, read as one of :data:`KINDS`.

    Attributes:
        settings: of the section ``data`` that say how it is read.
        items: what it consists of, in words ("lines", "pairs", ...), and ``count``, how many.
        distinct: how many splits can tell apart; of a text 0, which is cut by characters.
        texts: all texts; ``parts``: the texts of an item by name, for lengths.
        bad: reasons why rows were left out.
        lines: what was found, for the user.
    """

    kind: str
    path: str
    settings: Mapping[str, Any]
    items: str
    count: int
    distinct: int
    texts: Sequence[str]
    parts: Mapping[str, Sequence[Any]]
    bad: Sequence[str]
    lines: Sequence[str]

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))

    @property
    def alphabet(self) -> int:
        """Different characters."""
        return len(set().union(*map(set, self.texts)))

    def tokenizer(self, name: str, vocab_size: int) -> Tokenizer:
        """A tokenizer by the name of ``data.tokenizer``, fitted to all texts."""
        return make_tokenizer(name, self.texts, vocab_size)

    def lengths(self, codec: Tokenizer) -> dict[str, np.ndarray]:
        """Tokens of each part of each item [N], EOS included where rows have one."""
        if self.kind == "chat":
            render = PlainTemplate(codec)
            return {"conversation": np.array([len(render(m, "all").ids) for m in self.parts["m"]])}
        ends = {"document", "answer"}
        return {
            name: np.array([len(codec.encode(text)) + (name in ends) for text in texts])
            for name, texts in self.parts.items()
        }


def look(kind: str, path: str, fields: Sequence[str] = ()) -> Look:
    """Read a file as one of :data:`KINDS`; ``fields`` name the keys of its rows.

    ValueError or OSError as the data sources raise them; for fields that are not there.
    """
    return {"text": _text, "documents": _documents, "jsonl": _pairs, "chat": _chats}[kind](
        path, fields
    )


def _text(path: str, fields: Sequence[str]) -> Look:
    if fields:
        raise ValueError(f"--fields={','.join(fields)}: a text has no fields; look at documents")
    content, _ = read_text(path)
    lines = content.split("\n")
    full = [line for line in lines if line.strip()]
    found = [
        f"{len(content):,} characters in {len(content.encode()):,} bytes, {len(content.split()):,} "
        f"words, {len(lines):,} lines, {len(lines) - len(full):,} of them empty",
        _duplicates(full, "lines"),
        _letters([content]),
        "lengths of lines that are not empty:",
        length_table({"line": [len(line) for line in full] or [0]}, "characters"),
    ]
    return Look("text", path, {}, "lines", len(lines), 0, [content], {"line": full}, (), found)


def _documents(path: str, fields: Sequence[str]) -> Look:
    if len(fields) > 1:
        raise ValueError(f"--fields={','.join(fields)}: documents have one, as in --fields=text")
    name = fields[0] if fields else _first(path, [(each,) for each in _TEXTS], "--fields=text")[0]
    records, bad = _records(path, lambda row, origin: (text_field(row, name, origin),), name)
    texts = [record.values[0] for record in records]
    return _of_records(
        "documents",
        path,
        {} if name == "text" else {"text_field": name},
        "documents",
        records,
        texts,
        {"document": texts},
        bad,
    )


def _pairs(path: str, fields: Sequence[str]) -> Look:
    if fields and len(fields) != 2:
        raise ValueError(f"--fields={','.join(fields)}: pairs have two, --fields=prompt,answer")
    prompt, answer = fields or _first(path, _PAIRS, "--fields=PROMPT,ANSWER")
    records, bad = _records(
        path,
        lambda row, origin: (text_field(row, prompt, origin), text_field(row, answer, origin)),
        f"{prompt} and {answer}",
    )
    prompts, answers = zip(*(record.values for record in records))
    settings = {"prompt_field": prompt} if prompt != "prompt" else {}
    settings |= {"answer_field": answer} if answer != "answer" else {}
    if all(_MARKER in text for text in answers):
        settings["answer_marker"] = _MARKER
    parts = {"prompt": prompts, "answer": answers}
    texts = [*prompts, *answers]
    return _of_records("jsonl", path, settings, "pairs", records, texts, parts, bad)


def _chats(path: str, fields: Sequence[str]) -> Look:
    name = fields[0] if fields else ""
    records, bad = _records(
        path, lambda row, origin: conversation(row, name, origin), name or "messages"
    )
    talks = [record.values[1] for record in records]
    texts = [message["content"] for talk in talks for message in talk]
    settings = {"messages_field": name} if name else {}
    return _of_records("chat", path, settings, "conversations", records, texts, {"m": talks}, bad)


def _of_records(
    kind: str,
    path: str,
    settings: Mapping[str, Any],
    items: str,
    records: Sequence[Record],
    texts: Sequence[str],
    parts: Mapping[str, Sequence[Any]],
    bad: Sequence[str],
) -> Look:
    distinct = len({record.values[0] for record in records})
    words = sum(len(text.split()) for text in texts)
    found = [
        f"{len(records):,} {items}, {sum(map(len, texts)):,} characters in "
        f"{sum(len(text.encode()) for text in texts):,} bytes, {words:,} words",
        _duplicates([repr(record.values) for record in records], items),
        _letters(texts),
        f"{sum(not text.strip() for text in texts):,} of {len(texts):,} texts are empty",
        *[f"{len(bad):,} rows are no such {items}, as {reason}" for reason in bad[:1]],
    ]
    return Look(kind, path, settings, items, len(records), distinct, texts, parts, bad, found)


def _records(
    path: str, reader: Callable[[Mapping[str, Any], str], tuple], wanted: str
) -> tuple[list[Record], list[str]]:
    """Records, and reasons why others were left out (of the first five, then dots)."""
    found = read_sources(path, reader, wanted=wanted, named_by="--fields", bad_rows="drop")
    missing = found.report.get("bad_rows", 0) - len(found.bad)
    return [r for records in found.train for r in records], [*found.bad, *["..."] * missing]


def _first(path: str, known: Sequence[tuple[str, ...]], example: str) -> tuple[str, ...]:
    """The first of the ``known`` fields that the first row has, all as strings."""
    row: list[Mapping[str, Any]] = []

    def read(record: Mapping[str, Any], _: str) -> tuple:
        row.append(record)
        return (str(len(row)),)

    read_sources(path, read, wanted="a row", named_by="--fields", bad_rows="drop")
    for names in known:
        if all(isinstance(row[0].get(name), str) for name in names):
            return names
    texts = [name for name, value in row[0].items() if isinstance(value, str)]
    raise ValueError(
        f"{path}: say which fields to read, as in {example}; texts of the first row are "
        f"{', '.join(texts) or 'none'}"
    )


def _duplicates(texts: Sequence[str], items: str) -> str:
    counts = collections.Counter(texts)
    more = len(texts) - len(counts)
    common = counts.most_common(1)
    if not more:
        return f"no {items} occur twice"
    return (
        f"{more:,} {items} ({more / len(texts):.1%}) repeat an earlier one; the commonest, "
        f"{common[0][0][:40]!r}, is there {common[0][1]:,} times"
    )


def _letters(texts: Sequence[str]) -> str:
    counts = collections.Counter()
    for text in texts:
        counts.update(text)
    rare = sum(count < 10 for count in counts.values())
    return f"{len(counts):,} different characters, {rare:,} of them fewer than ten times"


def name_of(path: str) -> str:
    """The name of a file without its suffixes."""
    return pathlib.Path(path).name.split(".")[0] or "data"
