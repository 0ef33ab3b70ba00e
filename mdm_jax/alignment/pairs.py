"""Preference pairs from files: JSON objects with a prompt, a chosen and a rejected answer."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from mdm_jax.checks import checked
from mdm_jax.data.datasets import (
    AnswerPadding,
    Dataset,
    Fractions,
    PairLayout,
    VocabSize,
    make_dataset,
)
from mdm_jax.data.pairs import PartLength
from mdm_jax.data.records import BadRows, Record, lines_of, read_sources, text_field
from mdm_jax.data.rows import StoredRows
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer
from mdm_jax.types import Batch

TooLongPairs = Annotated[Literal["error", "drop"], "pairs that do not fit: refused, or dropped"]


@checked
def preference_pairs(
    path: str | os.PathLike | Sequence[str],
    *,
    prompt_length: PartLength = 0,
    answer_length: PartLength = 0,
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    bad_rows: BadRows = "error",
    too_long: TooLongPairs = "error",
    answer_padding: AnswerPadding = "eos_scored",
) -> Dataset:
    """Training rows of 2 L positions, ``[prompt, chosen][prompt, rejected]``, for
    ``training.pair_objective``; validation and test rows of L positions hold the chosen answer, and
    ``Dataset.rejected`` those of the rejected ones.

    Files, splits, tokenizer and lengths as of ``data.jsonl``, whose layout both halves have.
    ``bad_rows`` also covers answers that are empty, and pairs of equal answers.
    ValueError names file and line of these under "error", and of a pair that is too long.
    """

    def pair(record: Mapping[str, Any], origin: str) -> tuple[str, str, str]:
        texts = tuple(text_field(record, name, origin) for name in ("prompt", "chosen", "rejected"))
        for name, answer in zip(("chosen", "rejected"), texts[1:]):
            if not answer.strip():
                raise ValueError(f"{origin}: the {name} answer is empty")
        if texts[1] == texts[2]:
            raise ValueError(
                f"{origin}: chosen and rejected are the same answer, {texts[1][:40]!r}"
            )
        return texts

    found = read_sources(
        path,
        pair,
        wanted="'prompt', 'chosen' and 'rejected'",
        named_by="data.path: a file of objects with these three fields",
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
        bad_rows=bad_rows,
    )
    parts = found.splits()
    texts = [text for record in parts["train"] for text in record.values]
    codec = make_tokenizer(tokenizer, texts, bpe_vocab_size)
    encoded = {name: [_ids(record, codec) for record in records] for name, records in parts.items()}
    every = [ids for pairs in encoded.values() for ids in pairs]
    layout = PairLayout(
        prompt_length or max(1, max(len(prompt) for prompt, *_ in every)),
        answer_length or max(len(answer) for _, *answers in every for answer in answers),
        answer_padding,
    )
    report, rows, rejected_rows = dict(found.report), {}, {}
    for name, pairs in encoded.items():
        kept = []
        for ids, record in zip(pairs, parts[name]):
            misfits = [layout.misfit(ids[0], answer) for answer in ids[1:]]
            if not any(misfits):
                kept.append(ids)
            elif too_long == "error":
                raise ValueError(
                    f"{record.origin}: {max(misfits)}; longer parts (data.prompt_length, "
                    "data.answer_length; 0: of the longest), or data.too_long=drop"
                )
        report |= {f"{name}_pairs": len(kept), f"{name}_dropped_pairs": len(pairs) - len(kept)}
        if pairs and not kept:
            raise ValueError(f"{path}: all {len(pairs)} pairs of the {name} split are too long")
        chosen, rejected = (_rows(kept, answer, layout, codec) for answer in (1, 2))
        rows[name] = StoredRows(_side_by_side(chosen, rejected) if name == "train" else chosen)
        if name != "train":
            rejected_rows[name] = StoredRows(rejected)
    content = json.dumps([[record.values for record in records] for records in parts.values()])
    made = make_dataset(
        rows,
        codec,
        length=layout.length,
        digest=hashlib.sha256(content.encode()).digest(),
        settings={
            **dataclasses.asdict(layout),
            "source": "preferences",
            "too_long": too_long,
            "tokenizer": codec.fingerprint,
        },
        headline=f"Preference pairs from {', '.join(map(str, found.paths))}, one a line.",
        policy=f"Prompt in {layout.prompt_length} positions, answers in {layout.answer_length}; "
        f"pairs that are too long: {too_long}; after the answer: {answer_padding}."
        + found.describe([len(rows["train"])] * len(found.paths))
        + describe_unknown(lines_of(r for records in parts.values() for r in records), codec),
        report=report,
        layout=layout,
    )
    return dataclasses.replace(made, rejected=rejected_rows)


def _ids(record: Record, codec: Tokenizer) -> tuple[np.ndarray, ...]:
    prompt, *answers = record.values
    return codec.encode(prompt), *(np.append(codec.encode(a), codec.eos_id) for a in answers)


def _rows(
    pairs: Sequence[tuple[np.ndarray, ...]], answer: int, layout: PairLayout, codec: Tokenizer
) -> Batch:
    return layout.rows(
        [ids[0] for ids in pairs],
        [ids[answer] for ids in pairs],
        pad_id=codec.pad_id,
        eos_id=codec.eos_id,
        units=[codec.count_characters(ids[answer]) for ids in pairs],
    )


def _side_by_side(chosen: Batch, rejected: Batch) -> Batch:
    """Rows [N, 2 L], the rejected half as a document of its own; units of the chosen answer."""
    second = rejected._replace(documents=2 * rejected.documents)
    tokens, eligible, documents = (np.concatenate(p, axis=1) for p in zip(chosen[:3], second[:3]))
    return Batch(tokens, eligible, documents, chosen.units)
