"""Checks of answers whose result stands after a marker, as after ``####`` in GSM8K.

Prompt and answer pairs from a JSONL file, for conditional training.
"""

import collections
import dataclasses
import decimal
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    StoredRows,
    check_positive,
    describe,
    fingerprint_of,
    split_bounds,
)
from mdm_jax.data.text import read_utf8
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer, utf8
from mdm_jax.types import Batch


def result_after(answer: str, marker: str) -> str | None:
    """What stands after the last ``marker``, or None without one.

    Numbers are brought to one form: ``$1,000``, ``1000.0`` and ``1000.`` are all ``1000``, and
    other texts lose the spaces around them.
    """
    _, found, text = answer.rpartition(marker)
    if not found:
        return None
    text = text.strip()
    try:
        number = decimal.Decimal(text.removeprefix("$").replace(",", "").rstrip("."))
    except decimal.InvalidOperation:
        return text
    return format(number.normalize(), "f") if number.is_finite() else text


@dataclasses.dataclass(frozen=True)
class ResultAfterMarker:
    """Whether an answer ends in the result of one of the prompt's reference answers.

    Attributes:
        marker: text before the result.
        results: of the reference answers, by prompt.
    """

    marker: str
    results: Mapping[str, frozenset[str]]

    def __call__(self, prompt: str, answer: str) -> bool:
        """As ``Dataset.check``.

        Raises:
            ValueError: for a prompt without a reference.
        """
        if prompt not in self.results:
            raise ValueError(f"no reference answer to the prompt {prompt!r}")
        return result_after(answer, self.marker) in self.results[prompt]


TooLong = Literal["error", "truncate", "drop"]
AnswerPadding = Literal["eos_scored", "pad_hidden"]


class _Pair(NamedTuple):
    prompt: str
    answer: str
    origin: str  # file:line


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a pair becomes a row."""

    prompt_length: int
    answer_length: int
    answer_padding: AnswerPadding
    too_long: TooLong


def jsonl(
    path: str | os.PathLike,
    *,
    prompt_length: int,
    answer_length: int,
    prompt_field: str = "prompt",
    answer_field: str = "answer",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: int = 4096,
    too_long: TooLong = "error",
    answer_padding: AnswerPadding = "eos_scored",
    answer_marker: str = "",
) -> Dataset:
    """Rows ``[PAD ... prompt][answer EOS ...]`` from a file of one JSON object per line.

    The prompt is right-aligned in the first ``prompt_length`` positions and never eligible; the
    padding before it is neither eligible nor attended to. ``answer_padding`` says what follows the
    EOS that ends the answer:

    * ``"eos_scored"``: more EOS, eligible like the answer, so the model has to find the answer's
      length and L positions are always corrupted alike (as in LLaDA, Nie et al. 2025).
    * ``"pad_hidden"``: padding that is neither eligible nor attended to. Cheaper to fit, but the
      length of the answer is given away, so likelihoods are conditional on it.

    Without ``valid_path`` the file is split by *distinct prompt* after a seeded shuffle: rows with
    the same prompt share a split. With it, the whole file is for training, and ``test_path``, or
    nothing, is the test split.

    Args:
        path: the file, UTF-8. Empty lines are errors except at its end.
        prompt_length: positions for the prompt.
        answer_length: positions for the answer and its EOS.
        prompt_field: key of the prompt, a string.
        answer_field: key of the answer, a string.
        valid_path: file of the validation split.
        test_path: file of the test split; needs ``valid_path``.
        fractions: of the distinct prompts for train, valid and test; ignored with ``valid_path``.
        split_seed: seed of that split.
        tokenizer: as in :func:`mdm_jax.data.text`, fitted to the training pairs.
        bpe_vocab_size: K for "bpe".
        too_long: what to do with a pair that does not fit: "error"; "truncate" keeps the end of the
            prompt and the beginning of the answer, and a cut answer has no EOS; "drop" leaves the
            pair out. Both are counted in the report, by split.
        answer_padding: see above.
        answer_marker: text that the result stands after in every answer, such as ``"####"`` in
            GSM8K. An answer is then right if its result is that of the file (``Dataset.check``,
            numbers compared as numbers); "" for data whose answers cannot be checked.

    Raises:
        ValueError: naming file and line, if a line is malformed, lacks a field or has one that is
            not a string, has an answer without the marker, or does not fit and ``too_long`` is
            "error"; naming the file, if it is empty or a split would be; or if a setting is out of
            range.
        FileNotFoundError: if there is no such file.
    """
    check_positive("prompt_length", prompt_length)
    check_positive("answer_length", answer_length)
    _check_choice("too_long", too_long, get_args(TooLong))
    _check_choice("answer_padding", answer_padding, get_args(AnswerPadding))
    if test_path is not None and valid_path is None:
        raise ValueError("test_path needs valid_path; without both, the one file is split")
    layout = _Layout(prompt_length, answer_length, answer_padding, too_long)

    pairs = _read(path, prompt_field, answer_field)
    if valid_path is None:
        parts = _split(pairs, fractions, split_seed, str(path))
    else:
        others = [p and _read(p, prompt_field, answer_field) or [] for p in (valid_path, test_path)]
        parts = dict(zip(SPLITS, (pairs, *others)))

    train_texts = [text for pair in parts["train"] for text in (pair.prompt, pair.answer)]
    codec = make_tokenizer(tokenizer, train_texts, bpe_vocab_size)
    check = _checker(parts, codec, layout, answer_marker) if answer_marker else None
    sources, report = {}, {}
    train_prompts = {pair.prompt for pair in parts["train"]}
    for name in SPLITS:
        rows, counts = _encode(parts[name], codec, layout)
        if parts[name] and not len(rows.tokens):
            raise ValueError(
                f"{parts[name][0].origin}: every pair of the {name} split was dropped as too long; "
                f"raise prompt_length ({prompt_length}) or answer_length ({answer_length})"
            )
        sources[name] = StoredRows(rows)
        report |= {f"{name}_{key}": value for key, value in counts.items()}
        if name != "train":
            report[f"{name}_prompts_also_in_train"] = sum(
                pair.prompt in train_prompts for pair in parts[name]
            )
    settings = {
        "source": "jsonl",
        **dataclasses.asdict(layout),
        "tokenizer": codec.fingerprint,
    }
    content = json.dumps([[pair[:2] for pair in parts[name]] for name in SPLITS])
    return Dataset(
        **sources,
        tokenizer=codec,
        vocab_size=codec.vocab_size,
        mask_id=codec.mask_id,
        length=prompt_length + answer_length,
        unit="character",
        event_shape=None,
        fingerprint=fingerprint_of(content.encode(), settings),
        description=describe(
            f"Prompt and answer pairs from {pathlib.Path(path).name}, {len(pairs)} lines.",
            codec,
            f"Prompt in {prompt_length} positions, answer in {answer_length}; pairs that are too "
            f"long: {too_long}; after the answer: {answer_padding}.",
            report,
        ),
        report=report,
        check=check,
    )


def _checker(
    parts: Mapping[str, Sequence[_Pair]], codec: Tokenizer, layout: _Layout, marker: str
) -> ResultAfterMarker:
    """References are found by the prompt as a row shows it: cut, and without unknown characters."""
    results = collections.defaultdict(set)
    for pair in (pair for name in SPLITS for pair in parts[name]):
        result = result_after(pair.answer, marker)
        if result is None:
            raise ValueError(
                f"{pair.origin}: the answer has no {marker!r}, after which answer_marker says the "
                'result stands; mend the line, or use answer_marker="" for answers that cannot be '
                "checked"
            )
        shown = codec.decode(codec.encode(pair.prompt)[-layout.prompt_length :])
        results[shown].add(result)
    return ResultAfterMarker(marker, {shown: frozenset(found) for shown, found in results.items()})


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _read(path: str | os.PathLike, prompt_field: str, answer_field: str) -> list[_Pair]:
    # Not str.splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    lines = read_utf8(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    return [
        _parse(line, f"{path}:{number}", prompt_field, answer_field)
        for number, line in enumerate(lines, start=1)
    ]


def _parse(line: str, origin: str, prompt_field: str, answer_field: str) -> _Pair:
    if not line.strip():
        raise ValueError(f"{origin}: empty line; only the end of the file may have empty lines")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON, {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{origin}: not usable, the JSON is nested too deeply") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{origin}: expected a JSON object with {prompt_field!r} and {answer_field!r}, got "
            f"{type(record).__name__}"
        )
    values = []
    for field in (prompt_field, answer_field):
        if field not in record:
            raise ValueError(f"{origin}: no field {field!r}; the line has {sorted(record)}")
        if not isinstance(record[field], str):
            raise ValueError(
                f"{origin}: field {field!r} must be a string, got {type(record[field]).__name__}"
            )
        try:
            utf8(record[field])
        except ValueError as error:
            raise ValueError(f"{origin}: field {field!r}: {error}") from error
        values.append(record[field])
    return _Pair(*values, origin)


def _split(
    pairs: list[_Pair], fractions: Sequence[float], seed: int, origin: str
) -> dict[str, list[_Pair]]:
    prompts = list(dict.fromkeys(pair.prompt for pair in pairs))
    first, second = split_bounds(len(prompts), fractions, origin)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(prompts))
    split_of = {
        prompts[i]: SPLITS[(rank >= first) + (rank >= second)] for rank, i in enumerate(order)
    }
    return {name: [p for p in pairs if split_of[p.prompt] == name] for name in SPLITS}


def _encode(pairs: list[_Pair], codec: Tokenizer, layout: _Layout) -> tuple[Batch, dict[str, int]]:
    rows = []
    counts = dict.fromkeys(
        ("pairs", "rows", "truncated_prompts", "truncated_answers", "dropped_pairs"), 0
    )
    counts["unknown_characters"] = 0
    for pair in pairs:
        prompt, answer = codec.encode(pair.prompt), codec.encode(pair.answer)
        counts["pairs"] += 1
        long_prompt = len(prompt) > layout.prompt_length
        long_answer = len(answer) + 1 > layout.answer_length
        if long_prompt or long_answer:
            if layout.too_long == "error":
                raise ValueError(
                    f"{pair.origin}: too long, the prompt has {len(prompt)} tokens (prompt_length "
                    f"{layout.prompt_length}) and the answer with its EOS {len(answer) + 1} "
                    f"(answer_length {layout.answer_length}); raise the lengths, or choose "
                    "too_long='truncate' or 'drop', which count what they change"
                )
            if layout.too_long == "drop":
                counts["dropped_pairs"] += 1
                continue
            counts["truncated_prompts"] += long_prompt
            counts["truncated_answers"] += long_answer
            if long_prompt:
                prompt = prompt[-layout.prompt_length :]
        counts["rows"] += 1
        counts["unknown_characters"] += codec.count_unknown(prompt) + codec.count_unknown(answer)
        rows.append(_row(prompt, answer, codec, layout))
    return _stack(rows, layout), counts


def _row(prompt: np.ndarray, answer: np.ndarray, codec: Tokenizer, layout: _Layout) -> Batch:
    length = layout.prompt_length + layout.answer_length
    begin = layout.prompt_length - len(prompt)
    target = np.append(answer, np.int32(codec.eos_id))
    if len(target) > layout.answer_length:
        target = answer[: layout.answer_length]
    end = layout.prompt_length + len(target)
    visible_end = length if layout.answer_padding == "eos_scored" else end

    tokens = np.full(length, codec.pad_id, np.int32)
    tokens[begin : layout.prompt_length] = prompt
    tokens[layout.prompt_length : end] = target
    tokens[end:visible_end] = codec.eos_id
    position = np.arange(length)
    return Batch(
        tokens=tokens,
        eligible=(position >= layout.prompt_length) & (position < visible_end),
        documents=((position >= begin) & (position < visible_end)).astype(np.int32),
        units=np.int32(codec.count_characters(target)),
    )


def _stack(rows: list[Batch], layout: _Layout) -> Batch:
    shape = (len(rows), layout.prompt_length + layout.answer_length)
    if not rows:
        return Batch(
            np.zeros(shape, np.int32),
            np.zeros(shape, bool),
            np.zeros(shape, np.int32),
            np.zeros(0, np.int32),
        )
    return Batch(*(np.stack(field) for field in zip(*rows)))
