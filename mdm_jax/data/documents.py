"""Documents from a JSONL file, one a line."""

import json
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    check_positive,
    describe,
    fingerprint_of,
    split_bounds,
)
from mdm_jax.data.packing import LongDocuments, Packing, policy, split_rows
from mdm_jax.data.text import read_utf8
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer, utf8


def documents(
    path: str | os.PathLike,
    length: int,
    *,
    text_field: str = "text",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: int = 4096,
    packing: Packing = "",
    long_documents: LongDocuments = "split",
) -> Dataset:
    """Rows of documents from a file of one JSON object per line, each with a text.

    A document is encoded and EOS is appended, which is eligible and stands for no character. It
    stands in rows of its own, the last filled up with padding that is neither eligible nor attended
    to; with ``packing`` documents share rows (:mod:`mdm_jax.data.packing`).

    Without ``valid_path`` the file is split by *distinct text* after a seeded shuffle, so no text
    is in two splits. With it, the whole file is for training, and ``test_path``, or nothing, is the
    test split. Within a split documents keep the order of the file.

    Args:
        path: the file, UTF-8. Empty lines are errors except at its end.
        length: L, tokens per row.
        text_field: key of the text, a string.
        valid_path: file of the validation split.
        test_path: file of the test split; needs ``valid_path``.
        fractions: of the distinct texts for train, valid and test; ignored with ``valid_path``.
        split_seed: seed of that split.
        tokenizer: as in :func:`mdm_jax.data.text`, fitted to the training documents.
        bpe_vocab_size: K for "bpe".
        packing: "" for none, or "first_fit".
        long_documents: longer than a row with their EOS: "split" them, or raise an "error".

    Raises:
        ValueError: naming file and line, if a line is malformed or has no such text; naming the
            file, if it is empty or a split would be, or if a document is too long and that is an
            error; or if a setting is out of range.
        FileNotFoundError: if there is no such file.
    """
    check_positive("length", length)
    if test_path is not None and valid_path is None:
        raise ValueError("test_path needs valid_path; without both, the one file is split")
    texts = _read(path, text_field)
    if valid_path is None:
        parts = _split(texts, fractions, split_seed, str(path))
    else:
        others = [[] if p is None else _read(p, text_field) for p in (valid_path, test_path)]
        parts = dict(zip(SPLITS, (texts, *others)))
    codec = make_tokenizer(tokenizer, parts["train"], bpe_vocab_size)
    rows, report = split_rows(
        *({name: parts[name] for name in SPLITS}, length, codec),
        packing=packing,
        long_documents=long_documents,
        origin=str(path),
    )
    settings = {
        "source": "documents",
        "length": length,
        "packing": packing,
        "tokenizer": codec.fingerprint,
    }
    return Dataset(
        **rows,
        tokenizer=codec,
        vocab_size=codec.vocab_size,
        mask_id=codec.mask_id,
        length=length,
        unit="character",
        event_shape=None,
        fingerprint=fingerprint_of(json.dumps([parts[n] for n in SPLITS]).encode(), settings),
        description=describe(
            f"Documents from {pathlib.Path(path).name}, {len(texts)} lines.",
            codec,
            policy(packing, long_documents, report, length),
            report,
        ),
        report=report,
    )


def _read(path: str | os.PathLike, text_field: str) -> list[str]:
    # Not str.splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    lines = read_utf8(path).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    return [_parse(line, f"{path}:{number}", text_field) for number, line in enumerate(lines, 1)]


def _parse(line: str, origin: str, text_field: str) -> str:
    if not line.strip():
        raise ValueError(f"{origin}: empty line; only the end of the file may have empty lines")
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON, {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{origin}: not usable, the JSON is nested too deeply") from error
    text = record.get(text_field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(
            f"{origin}: expected a JSON object with a string under {text_field!r}; name another "
            "text_field"
        )
    try:
        utf8(text)
    except ValueError as error:
        raise ValueError(f"{origin}: field {text_field!r}: {error}") from error
    return text


def _split(
    texts: list[str], fractions: Sequence[float], seed: int, origin: str
) -> dict[str, list[str]]:
    distinct = list(dict.fromkeys(texts))
    first, second = split_bounds(len(distinct), fractions, origin)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(distinct))
    part = {distinct[i]: SPLITS[(rank >= first) + (rank >= second)] for rank, i in enumerate(order)}
    return {name: [text for text in texts if part[text] == name] for name in SPLITS}
