"""Prompt and answer pairs from a JSON-lines file, with checks of final results."""

import collections
import dataclasses
import decimal
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from mdm_jax.checks import Plain, Real, Whole, checked
from mdm_jax.data.datasets import (
    AnswerPadding,
    Dataset,
    Fractions,
    PairLayout,
    VocabSize,
    make_dataset,
)
from mdm_jax.data.records import BadRows, Record, Template, lines_of, read_sources, text_field
from mdm_jax.data.rows import Mixture, RandomlyCut, RowSource, StoredRows
from mdm_jax.data.statistics import length_quantiles, length_table
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer
from mdm_jax.types import Batch

TooLong = Annotated[
    Literal["error", "truncate", "drop"],
    "rows that do not fit: refused, cut, or dropped and counted",
]
AnswerMarker = Annotated[str, "what stands before the result in an answer, for checks; '': none"]
PartLength = Annotated[
    int, Whole("[0, 1e7]", "tokens", "0: of the longest pair, or 99 % of them where pairs are cut")
]
StructuralTokens = Annotated[
    tuple[str, ...],
    Plain(str, "markup in prompts that is masked too in training, as ('<td>', '|'); biased", True),
]
RandomCut = Annotated[float, Real("[0, 1]", "of visits", "that see an answer cut at random")]


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
    path: str | os.PathLike | Sequence[str],
    *,
    prompt_length: PartLength = 0,
    answer_length: PartLength = 0,
    prompt_field: Annotated[str, "dotted key of the prompt"] = "prompt",
    answer_field: Annotated[str, "dotted key of the answer"] = "answer",
    prompt_template: Annotated[str, "prompt with fields in braces; '': prompt_field"] = "",
    answer_template: Annotated[str, "answer with fields in braces; '': answer_field"] = "",
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
    answer_marker: AnswerMarker = "",
) -> Dataset:
    """Rows ``[PAD ... prompt][answer EOS ...]`` from files of JSON objects, one a line, UTF-8.

    The prompt is right-aligned and never eligible; its padding is not attended to either.

    Args:
        path: a file, a directory, a glob, or a mixture of several: ``"a.jsonl:0.7,b.jsonl:0.3"``
            (:func:`mdm_jax.data.records.weighted_paths`). Parquet too, with pyarrow.
        prompt_length, answer_length: positions of each, the EOS of the answer included. 0: the
            longest of all pairs under ``too_long="error"``, else the 99 % quantile.
        prompt_field, answer_field: keys of each, strings, or dotted paths to them
            (``"meta.question"``, lists by index).
        prompt_template, answer_template: texts with such fields in braces, in place of the former:
            ``"Q: {meta.question}\\nA:"`` (:class:`mdm_jax.data.records.Template`).
        valid_path, test_path, fractions, split_seed: one file split by distinct prompt, or a file
            for each split; see :func:`mdm_jax.data.records.read_sources`.
        tokenizer, bpe_vocab_size: as in :func:`mdm_jax.data.text`, fitted to the training pairs.
        bad_rows: for rows that are no JSON or lack a field: "error", or "drop". The report counts
            them, and the description has file, line and reason of the first.
        too_long: for pairs that do not fit: "error"; "truncate" keeps the end of the prompt and the
            start of the answer, then without EOS; "drop". The report counts both.
        answer_padding: after the EOS. "eos_scored": more EOS, eligible, so the model has to find
            the length (as in LLaDA, Nie et al. 2025). "pad_hidden": padding, neither eligible nor
            attended to; easier to fit, but likelihoods are then conditional on the answer's length.
            "eos_once": likewise, with EOS as padding.
        random_cut: share of visits in training that see the answer, padding included, end at a
            random length (:class:`mdm_jax.data.rows.RandomlyCut`).
        structural_prompt_tokens: texts whose tokens are eligible in training wherever their ids
            stand in a row, so in prompts too: another objective than the answer's bound, which
            objectives call "biased". Held-out rows stay as they are. The report counts them.
        answer_marker: text before the result in every answer, such as ``"####"`` in GSM8K, for
            ``Dataset.check``; "": no check.

    ValueError as ``read_sources``; naming file and line, if an answer lacks the marker or a pair is
    too long under "error"; if all answers of a split are empty or dropped; for a bad setting.
    """
    prompt_of = _text_reader(prompt_field, "prompt", prompt_template)
    answer_of = _text_reader(answer_field, "answer", answer_template)
    found = read_sources(
        path,
        lambda record, origin: (prompt_of(record, origin), answer_of(record, origin)),
        wanted=f"{prompt_field!r} and {answer_field!r}",
        named_by="prompt_field, answer_field, or templates, whose fields may be numbers",
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
        bad_rows=bad_rows,
    )
    parts = found.splits()
    train_texts = [text for record in parts["train"] for text in record.values]
    codec = make_tokenizer(tokenizer, train_texts, bpe_vocab_size)
    groups = [*found.train, parts["valid"], parts["test"]]
    encoded = [[_ids(record, codec) for record in records] for records in groups]
    every = [pair for pairs in encoded for pair in pairs]
    sizes = np.array([[len(prompt), len(answer)] for prompt, answer in every])
    markup = structural_ids(structural_prompt_tokens, codec, random_cut)
    share = -1 if too_long == "error" else -2  # the longest, or 99 %
    unset = [max(1, length_quantiles(part)[share]) for part in sizes.T]
    layout = PairLayout(prompt_length or unset[0], answer_length or unset[1], answer_padding)
    if too_long == "error":
        _check_lengths([r.origin for records in groups for r in records], sizes, layout)
    shown = (
        (codec.decode(codec.encode(prompt)[-layout.prompt_length :]), answer, origin)
        for records in parts.values()
        for (prompt, answer), origin in records
    )  # as rows hold prompts: cut, and without unknown characters
    check = checker(shown, answer_marker) if answer_marker else None

    def rows_of(
        name: str, records: Sequence[Record], pairs: Sequence[_Pair]
    ) -> tuple[StoredRows, dict[str, int]]:
        batch, counts = _encode(pairs, codec, layout, too_long)
        if records and not batch.units.any():
            fault = f"empty; see answer_field ({answer_field!r})"
            if not counts["rows"]:
                prompt, answer = min(([len(part) for part in pair] for pair in pairs), key=sum)
                fault = (
                    f"dropped as too long; the shortest of {len(records)} pairs has {prompt} and "
                    f"{answer} tokens, see prompt_length ({layout.prompt_length}) and "
                    f"answer_length ({layout.answer_length})"
                )
            raise ValueError(
                f"{records[0].origin}: the answer of every pair of the {name} split was {fault}"
            )
        if name == "train" and markup:
            tokens, eligible, documents, units = batch
            more = occurrences(tokens, markup) & (documents > 0) & ~eligible
            counts["structural_prompt_tokens"] = int(more.sum())
            units = units + (codec.character_counts[tokens] * more).sum(1, dtype=np.int32)
            batch = batch._replace(eligible=eligible | more, units=units)
        return StoredRows(batch), counts

    trained = zip(found.train, encoded)
    sources, counts = zip(*(rows_of("train", records, pairs) for records, pairs in trained))
    report = found.report | {f"train_{key}": sum(c[key] for c in counts) for key in counts[0]}
    check_structural(structural_prompt_tokens, report)
    rows: dict[str, RowSource] = {
        "train": mixed_rows(sources, found.weights, random_cut, codec),
    }
    train_prompts = {record.values[0] for record in parts["train"]}
    for name, pairs in zip(("valid", "test"), encoded[-2:]):
        rows[name], counts = rows_of(name, parts[name], pairs)
        report |= {f"{name}_{key}": value for key, value in counts.items()}
        report[f"{name}_prompts_also_in_train"] = sum(
            record.values[0] in train_prompts for record in parts[name]
        )
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
            **stream_settings(sources, found.weights, random_cut, structural_prompt_tokens),
        },
        headline=f"Prompt and answer pairs from {names_of(found.paths)}, one a line.",
        policy=f"Prompt in {layout.prompt_length} positions, answer in {layout.answer_length}"
        + f" ({'the longest' if too_long == 'error' else '99 %'} of all pairs, where not set)"
        * (not (prompt_length and answer_length))
        + f"; pairs that are too long: {too_long}; after the answer: {answer_padding}."
        + _describe_dropped(report)
        + found.describe([len(source) for source in sources])
        + describe_unknown(lines_of(r for records in parts.values() for r in records), codec),
        report=report,
        check=check,
        layout=layout,
    )


def _describe_dropped(report: Mapping[str, int]) -> str:
    """A warning, for a description, if more than a tenth of the training pairs are too long."""
    dropped, pairs = report["train_dropped_pairs"], report["train_pairs"]
    if dropped <= pairs / 10:
        return ""
    return f"\nWARNING: {dropped} of {pairs} training pairs are longer than that, and dropped."


def _text_reader(path: str, role: str, template: str) -> Callable[[Mapping[str, Any], str], str]:
    """``reader(record, origin)`` of a prompt or an answer."""
    if not template:
        return lambda record, origin: text_field(record, path, origin)
    if path != role:
        raise ValueError(
            f"{role}_field={path!r} and {role}_template={template!r} both say what the {role} is; "
            "leave one out"
        )
    return Template(template, f"{role}_template").fill


def mixed_rows(
    sources: Sequence[RowSource],
    weights: Sequence[float] | None,
    random_cut: float,
    codec: Tokenizer,
) -> RowSource:
    """Training rows of one or several sources, cut at random if asked for."""
    if random_cut:
        counts = codec.character_counts
        sources = [RandomlyCut(each, random_cut, codec.pad_id, counts) for each in sources]
    return Mixture(sources, weights) if len(sources) > 1 else sources[0]


def structural_ids(texts: Sequence[str], codec: Tokenizer, random_cut: float) -> list[np.ndarray]:
    """Ids of each text; ValueError for one without tokens or with unknown ones, or cut answers."""
    if texts and random_cut:
        raise ValueError(
            "structural_prompt_tokens widens what is eligible, and random_cut ends rows after an "
            "eligible token, which might be one of the prompt's; choose one of the two"
        )
    found = [codec.encode(text) for text in texts]
    for text, ids in zip(texts, found):
        if not len(ids) or codec.count_unknown(ids):
            raise ValueError(f"structural_prompt_tokens: {text!r} is no text of this tokenizer")
    return found


def occurrences(ids: np.ndarray, sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Where ``ids`` [..., L] belong to an occurrence of one of the sequences, [..., L] bool."""
    found = np.zeros(ids.shape, bool)
    for sequence in sequences:
        size, last = len(sequence), ids.shape[-1] - len(sequence) + 1
        if last > 0:
            begins = np.all([ids[..., i : last + i] == sequence[i] for i in range(size)], axis=0)
            for i in range(size):
                found[..., i : last + i] |= begins
    return found


def check_structural(texts: Sequence[str], report: Mapping[str, int]) -> None:
    """ValueError where no token of the training prompts is one of the ``texts``."""
    if texts and not report["train_structural_prompt_tokens"]:
        raise ValueError(
            f"structural_prompt_tokens={tuple(texts)} occur in no training prompt (as the ids that "
            "each has by itself); see how the tokenizer cuts them, or leave it empty"
        )


def stream_settings(
    sources: Sequence[RowSource],
    weights: Sequence[float] | None,
    random_cut: float,
    structural: Sequence[str],
) -> dict[str, Any]:
    """What changes a training stream, for the fingerprint; no defaults, so that older ones stay."""
    settings: dict[str, Any] = {"random_cut": random_cut} if random_cut else {}
    settings |= {"structural_prompt_tokens": list(structural)} if structural else {}
    if len(sources) > 1:
        settings |= {"mixture": [len(source) for source in sources], "weights": weights}
    return settings


def names_of(paths: Sequence[str]) -> str:
    """Names of files, for a headline."""
    return ", ".join(pathlib.Path(path).name for path in paths)


def checker(answers: Iterable[tuple[str, str, str]], marker: str) -> ResultAfterMarker:
    """``Dataset.check`` from prompts as rows hold them, answers, and origins.

    ValueError names the origin of an answer without the marker.
    """
    results = collections.defaultdict(set)
    for prompt, answer, origin in answers:
        result = result_after(answer, marker)
        if result is None:
            raise ValueError(
                f"{origin}: the answer has no {marker!r}, after which answer_marker says the "
                'result stands; mend the line, or use answer_marker="" for answers that cannot be '
                "checked"
            )
        results[prompt].add(result)
    return ResultAfterMarker(marker, {key: frozenset(values) for key, values in results.items()})


_Pair = tuple[np.ndarray, np.ndarray]
"""Token ids of a prompt, and of an answer with its EOS."""


def _ids(record: Record, codec: Tokenizer) -> _Pair:
    prompt, answer = record.values
    return codec.encode(prompt), np.append(codec.encode(answer), codec.eos_id)


def _check_lengths(origins: Sequence[str], sizes: np.ndarray, layout: PairLayout) -> None:
    """Raise ValueError where pairs of these sizes [N, 2] do not fit, with all that there is to set.

    Quantiles of all pairs, how many would be dropped or cut, lengths that fit all or 99 %.
    """
    lengths = np.array([layout.prompt_length, layout.answer_length])
    too_long = sizes > lengths
    misfits = np.flatnonzero(too_long.any(axis=1))
    if not len(misfits):
        return
    first, (prompts, answers) = misfits[0], too_long.sum(axis=0)
    all_of, most = np.array([length_quantiles(part)[::-1][:2] for part in sizes.T]).T
    left_out = int((sizes > most).any(axis=1).sum())
    misfit = layout.misfit(range(sizes[first, 0]), range(sizes[first, 1]))
    table = length_table({"prompt": sizes[:, 0], "answer with EOS": sizes[:, 1]})
    raise ValueError(
        f"{origins[first]}: {misfit}; it is the first of {len(misfits)} of {len(sizes)} pairs that "
        f"do not fit:\n{table}\n"
        f"At these lengths too_long='drop' leaves out {len(misfits)} pairs; 'truncate' cuts "
        f"{prompts} prompts and {answers} answers. For all pairs set data.prompt_length={all_of[0]}"
        f" and data.answer_length={all_of[1]} (or neither); without the longest {left_out}: "
        f"data.prompt_length={most[0]}, data.answer_length={most[1]}, data.too_long=drop"
    )


def _encode(
    pairs: Sequence[_Pair], codec: Tokenizer, layout: PairLayout, too_long: TooLong
) -> tuple[Batch, dict[str, int]]:
    """Rows of one split, and counts for the report."""
    counts = dict.fromkeys(
        ("pairs", "rows", "truncated_prompts", "truncated_answers", "dropped_pairs"), 0
    )
    counts |= {"pairs": len(pairs), "unknown_characters": 0}
    prompts, answers = [], []
    for prompt, answer in pairs:
        if too_long == "drop" and layout.misfit(prompt, answer):
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
