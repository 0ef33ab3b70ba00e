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
from mdm_jax.data.datasets import Dataset, Fractions, Length, PairLayout, VocabSize, make_dataset
from mdm_jax.data.rows import StoredRows
from mdm_jax.data.text import Line, Record, read_splits
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer
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
    too long under "error"; if all answers of a split are empty or dropped; for a bad setting.
    """
    layout = PairLayout(prompt_length, answer_length, answer_padding)
    parts, dropped = read_splits(
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
    rows, report = {}, dict(dropped)
    train_prompts = {record.values[0] for record in parts["train"]}
    for name, records in parts.items():
        batch, counts = _encode(records, codec, layout, too_long)
        if records and not batch.units.any():
            fault = "empty" if counts["rows"] else "dropped as too long"
            raise ValueError(
                f"{records[0].origin}: the answer of every pair of the {name} split was {fault}; "
                f"see answer_field ({answer_field!r}), prompt_length ({prompt_length}) and "
                f"answer_length ({answer_length})"
            )
        rows[name] = StoredRows(batch)
        report |= {f"{name}_{key}": value for key, value in counts.items()}
        if name != "train":
            report[f"{name}_prompts_also_in_train"] = sum(
                record.values[0] in train_prompts for record in records
            )
    lines = (Line(t, r.origin) for records in parts.values() for r in records for t in r.values)
    content = json.dumps([[record.values for record in records] for records in parts.values()])
    return make_dataset(
        rows,
        codec,
        length=layout.length,
        digest=hashlib.sha256(content.encode()).digest(),
        settings={
            **dataclasses.asdict(layout),
            "too_long": too_long,
            "source": "jsonl",
            "tokenizer": codec.fingerprint,
        },
        headline=f"Prompt and answer pairs from {pathlib.Path(path).name}, one a line.",
        policy=f"Prompt in {prompt_length} positions, answer in {answer_length}; pairs that are "
        f"too long: {too_long}; after the answer: {answer_padding}."
        + describe_unknown(lines, codec),
        report=report,
        check=check,
        layout=layout,
    )


def _checker(
    parts: Mapping[str, Sequence[Record]], codec: Tokenizer, layout: PairLayout, marker: str
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
    records: Sequence[Record], codec: Tokenizer, layout: PairLayout, too_long: TooLong
) -> tuple[Batch, dict[str, int]]:
    """Rows of one split, and counts for the report."""
    counts = dict.fromkeys(
        ("pairs", "rows", "truncated_prompts", "truncated_answers", "dropped_pairs"), 0
    )
    counts |= {"pairs": len(records), "unknown_characters": 0}
    prompts, answers = [], []
    for (prompt, answer), origin in records:
        prompt, answer = codec.encode(prompt), np.append(codec.encode(answer), codec.eos_id)
        misfit = layout.misfit(prompt, answer)
        if misfit and too_long == "error":
            raise ValueError(
                f"{origin}: {misfit}; raise the lengths, or choose too_long='truncate' or 'drop', "
                "which count what they change"
            )
        if misfit and too_long == "drop":
            counts["dropped_pairs"] += 1
            continue
        counts["truncated_prompts"] += len(prompt) > layout.prompt_length
        counts["truncated_answers"] += len(answer) > layout.answer_length
        prompts.append(prompt[-layout.prompt_length :])
        counts["unknown_characters"] += codec.count_unknown(prompts[-1])
        counts["unknown_characters"] += codec.count_unknown(answer)
        answers.append(answer[: layout.answer_length])
    counts["rows"] = len(prompts)
    units = [codec.count_characters(answer) for answer in answers]
    ids = {"pad_id": codec.pad_id, "eos_id": codec.eos_id}
    return layout.rows(prompts, answers, **ids, units=units), counts
