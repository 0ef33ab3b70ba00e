"""Prompt and answer pairs from a JSON-lines file, with checks of final results."""

import collections
import dataclasses
import decimal
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from mdm_jax.checks import checked
from mdm_jax.data.datasets import (
    Dataset,
    Fractions,
    Length,
    StoredRows,
    VocabSize,
    check_choice,
    make_dataset,
)
from mdm_jax.data.text import Record, read_splits
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer
from mdm_jax.types import Batch

TooLong = Literal["error", "truncate", "drop"]
AnswerPadding = Literal["eos_scored", "pad_hidden"]


def result_after(answer: str, marker: str) -> str | None:
    """The result after the last ``marker``, as after ``####`` in GSM8K; None without a marker.

    Numbers are normalised (``$1,000``, ``1000.0``, ``1000.`` are ``1000``), other texts stripped.
    """
    _, separator, text = answer.rpartition(marker)
    if not separator:
        return None
    text = text.strip()
    try:
        number = decimal.Decimal(text.removeprefix("$").replace(",", "").rstrip("."))
    except decimal.InvalidOperation:
        return text
    return format(number.normalize(), "f") if number.is_finite() else text


@dataclasses.dataclass(frozen=True)
class ResultAfterMarker:
    """``Dataset.check``: whether an answer ends in the result of a reference answer.

    ``results`` after ``marker`` by prompt; ValueError for a prompt without a reference.
    """

    marker: str
    results: Mapping[str, frozenset[str]]

    def __call__(self, prompt: str, answer: str) -> bool:
        if prompt not in self.results:
            raise ValueError(f"no reference answer to the prompt {prompt!r}")
        return result_after(answer, self.marker) in self.results[prompt]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Settings by which a pair becomes a row."""

    prompt_length: int
    answer_length: int
    answer_padding: AnswerPadding
    too_long: TooLong

    @property
    def length(self) -> int:
        return self.prompt_length + self.answer_length


@checked
def jsonl(
    path: str | os.PathLike,
    *,
    prompt_length: Length,
    answer_length: Length,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    too_long: TooLong = "error",
    answer_padding: AnswerPadding = "eos_scored",
    answer_marker: str = "",
) -> Dataset:
    """Rows ``[PAD ... prompt][answer EOS ...]`` from a file of one JSON object per line, UTF-8.

    The prompt is right-aligned and never eligible; its padding is not attended to either.

    Args:
        prompt_length, answer_length: positions of each, the EOS of the answer included.
        prompt_field, answer_field: keys of each, strings.
        valid_path, test_path, fractions, split_seed: one file split by distinct prompt, or a file
            for each split; see :func:`mdm_jax.data.text.read_splits`.
        tokenizer, bpe_vocab_size: as in :func:`mdm_jax.data.text`, fitted to the training pairs.
        too_long: for pairs that do not fit: "error"; "truncate" keeps the end of the prompt and the
            start of the answer, then without EOS; "drop". The report counts both.
        answer_padding: after the EOS. "eos_scored": more EOS, eligible, so the model has to find
            the length (as in LLaDA, Nie et al. 2025). "pad_hidden": padding, neither eligible nor
            attended to; easier to fit, but likelihoods are then conditional on the answer's length.
        answer_marker: text before the result in every answer, such as ``"####"`` in GSM8K, for
            ``Dataset.check``; "": no check.

    ValueError as ``read_splits``; naming file and line, if an answer lacks the marker or a pair is
    too long under "error"; if every pair of a split is dropped or a setting is out of range.
    """
    check_choice("too_long", too_long, TooLong)
    check_choice("answer_padding", answer_padding, AnswerPadding)
    layout = _Layout(prompt_length, answer_length, answer_padding, too_long)
    parts = read_splits(
        path,
        (prompt_field, answer_field),
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
    )
    train_texts = [text for record in parts["train"] for text in record.values]
    codec = make_tokenizer(tokenizer, train_texts, bpe_vocab_size)
    check = _checker(parts, codec, layout, answer_marker) if answer_marker else None
    rows, report = {}, {}
    train_prompts = {record.values[0] for record in parts["train"]}
    for name, records in parts.items():
        batch, counts = _encode(records, codec, layout)
        if records and not counts["rows"]:
            raise ValueError(
                f"{records[0].origin}: every pair of the {name} split was dropped as too long; "
                f"raise prompt_length ({prompt_length}) or answer_length ({answer_length})"
            )
        rows[name] = StoredRows(batch)
        report |= {f"{name}_{key}": value for key, value in counts.items()}
        if name != "train":
            report[f"{name}_prompts_also_in_train"] = sum(
                record.values[0] in train_prompts for record in records
            )
    content = json.dumps([[record.values for record in records] for records in parts.values()])
    return make_dataset(
        rows,
        codec,
        length=layout.length,
        digest=hashlib.sha256(content.encode()).digest(),
        settings=dataclasses.asdict(layout) | {"source": "jsonl", "tokenizer": codec.fingerprint},
        headline=f"Prompt and answer pairs from {pathlib.Path(path).name}, one a line.",
        policy=f"Prompt in {prompt_length} positions, answer in {answer_length}; pairs that are "
        f"too long: {too_long}; after the answer: {answer_padding}.",
        report=report,
        check=check,
    )


def _checker(
    parts: Mapping[str, Sequence[Record]], codec: Tokenizer, layout: _Layout, marker: str
) -> ResultAfterMarker:
    """References by the prompt as its row holds it: cut, and without unknown characters."""
    results = collections.defaultdict(set)
    for (prompt, answer), origin in (record for records in parts.values() for record in records):
        result = result_after(answer, marker)
        if result is None:
            raise ValueError(
                f"{origin}: the answer has no {marker!r}, after which answer_marker says the "
                'result stands; mend the line, or use answer_marker="" for answers that cannot be '
                "checked"
            )
        results[codec.decode(codec.encode(prompt)[-layout.prompt_length :])].add(result)
    return ResultAfterMarker(marker, {key: frozenset(values) for key, values in results.items()})


def _encode(
    records: Sequence[Record], codec: Tokenizer, layout: _Layout
) -> tuple[Batch, dict[str, int]]:
    """Rows of one split, and counts for the report."""
    counts = dict.fromkeys(
        ("pairs", "rows", "truncated_prompts", "truncated_answers", "dropped_pairs"), 0
    )
    counts |= {"pairs": len(records), "unknown_characters": 0}
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for (prompt, answer), origin in records:
        prompt, answer = codec.encode(prompt), codec.encode(answer)
        long_prompt = len(prompt) > layout.prompt_length
        long_answer = len(answer) + 1 > layout.answer_length
        if (long_prompt or long_answer) and layout.too_long == "error":
            raise ValueError(
                f"{origin}: too long, the prompt has {len(prompt)} tokens (prompt_length "
                f"{layout.prompt_length}) and the answer with its EOS {len(answer) + 1} "
                f"(answer_length {layout.answer_length}); raise the lengths, or choose "
                "too_long='truncate' or 'drop', which count what they change"
            )
        if (long_prompt or long_answer) and layout.too_long == "drop":
            counts["dropped_pairs"] += 1
            continue
        counts["truncated_prompts"] += long_prompt
        counts["truncated_answers"] += long_answer
        prompt = prompt[-layout.prompt_length :]
        counts["rows"] += 1
        counts["unknown_characters"] += codec.count_unknown(prompt) + codec.count_unknown(answer)
        kept.append((prompt, np.append(answer, codec.eos_id)[: layout.answer_length]))
    return _rows(kept, codec, layout), counts


def _rows(
    pairs: Sequence[tuple[np.ndarray, np.ndarray]], codec: Tokenizer, layout: _Layout
) -> Batch:
    shape = (len(pairs), layout.length)
    tokens = np.full(shape, codec.pad_id, np.int32)
    eligible, documents = np.zeros(shape, bool), np.zeros(shape, np.int32)
    units = np.zeros(len(pairs), np.int32)
    middle = layout.prompt_length
    for row, (prompt, answer) in enumerate(pairs):
        begin, end = middle - len(prompt), middle + len(answer)
        visible_end = layout.length if layout.answer_padding == "eos_scored" else end
        tokens[row, begin:middle] = prompt
        tokens[row, middle:end] = answer
        tokens[row, end:visible_end] = codec.eos_id
        eligible[row, middle:visible_end] = True
        documents[row, begin:visible_end] = 1
        units[row] = codec.count_characters(answer)
    return Batch(tokens, eligible, documents, units)
