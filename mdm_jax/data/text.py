"""Windows of one long text: a file of the user, or the text that CPython ships."""

import hashlib
import os
import pathlib
import sys
import unicodedata
from collections.abc import Sequence
from typing import Any

from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    TokenSpans,
    check_positive,
    describe,
    fingerprint_of,
    split_bounds,
)
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer


def text(
    path: str | os.PathLike,
    length: int,
    *,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: int = 4096,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    train_stride: int = 1,
) -> Dataset:
    """Rows of ``length`` tokens from a UTF-8 text file.

    The text is cut into three contiguous parts by number of characters, so no row straddles two
    splits; then each part is encoded. Training rows begin every ``train_stride`` tokens (1: at
    every position). Validation and test rows follow each other without overlap and cover their
    part; the last one is filled up with padding, which is neither eligible nor attended to.

    Args:
        path: the file; line ends and all other characters are kept as they are.
        length: L, tokens per row.
        tokenizer: "char", "byte", "bpe" (the first and last are fitted to the training part), the
            path of a tokenizer's JSON file, or a tokenizer.
        bpe_vocab_size: K for "bpe".
        fractions: of the characters for train, valid and test; 0 for no such split.
        train_stride: tokens between the starts of consecutive training rows.

    Raises:
        ValueError: naming the file, if it is empty, not UTF-8 (with byte offset and line), or too
            short for one training row; or if a setting is out of range.
        FileNotFoundError: if there is no such file.
    """
    content = read_utf8(path)
    if not content:
        raise ValueError(f"{path}: the file is empty")
    return _windows(
        content,
        str(path),
        f"Text file {pathlib.Path(path).name}, {len(content)} characters.",
        {},
        length=length,
        tokenizer=tokenizer,
        bpe_vocab_size=bpe_vocab_size,
        fractions=fractions,
        train_stride=train_stride,
    )


def embedded_text(
    length: int,
    *,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: int = 4096,
    fractions: Sequence[float] = (0.9, 0.05, 0.05),
    train_stride: int = 1,
) -> Dataset:
    """Rows from the language reference that every CPython carries, ``pydoc_data.topics``.

    English prose with code and grammar, about half a million characters, PSF-2.0 licence. The
    topics are joined by blank lines in the order of their names, then reduced to ASCII (NFKD, the
    rest dropped and counted). The text differs between Python versions, patch releases included;
    the description records its hash and the version. Arguments and splits as in :func:`text`.
    """
    from pydoc_data.topics import topics

    decomposed = unicodedata.normalize("NFKD", "\n\n".join(topics[name] for name in sorted(topics)))
    content = decomposed.encode("ascii", "ignore").decode("ascii")
    version = ".".join(map(str, sys.version_info[:3]))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return _windows(
        content,
        "pydoc_data.topics",
        f"CPython {version} language reference (pydoc_data.topics, {len(topics)} topics, "
        f"PSF-2.0), {len(content)} characters, sha256 {digest}, sys.version_info "
        f"{tuple(sys.version_info)}. The text varies with the Python version.",
        {"dropped_non_ascii_characters": len(decomposed) - len(content)},
        length=length,
        tokenizer=tokenizer,
        bpe_vocab_size=bpe_vocab_size,
        fractions=fractions,
        train_stride=train_stride,
    )


def read_utf8(path: str | os.PathLike) -> str:
    """Contents of a UTF-8 file; ValueError names file, line and byte offset of bad bytes."""
    data = pathlib.Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}:{line}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); convert the file to UTF-8 first"
        ) from error


def _windows(
    content: str,
    origin: str,
    headline: str,
    report: dict[str, int],
    *,
    length: int,
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
    fractions: Sequence[float],
    train_stride: int,
) -> Dataset:
    check_positive("length", length)
    check_positive("train_stride", train_stride)
    first, second = split_bounds(len(content), fractions, origin)
    parts = dict(zip(SPLITS, (content[:first], content[first:second], content[second:])))
    codec = make_tokenizer(tokenizer, [parts["train"]], bpe_vocab_size)
    tokens = {name: codec.encode(part) for name, part in parts.items()}
    if len(tokens["train"]) < length:
        raise ValueError(
            f"{origin}: too short, the train split has {len(tokens['train'])} tokens but one row "
            f"needs length = {length}; give a longer text, a smaller length or another fraction"
        )
    sources = {}
    for name in SPLITS:
        size = len(tokens[name])
        starts = range(0, size, length)
        if name == "train":
            starts = range(0, size - length + 1, train_stride)
        sources[name] = TokenSpans(
            tokens[name], starts, length, codec.pad_id, codec.character_counts
        )
        report[f"{name}_characters"] = len(parts[name])
        report[f"{name}_tokens"] = size
        report[f"{name}_rows"] = len(starts)
        report[f"{name}_unknown_characters"] = codec.count_unknown(tokens[name])
        if name == "train":
            covered = starts[-1] + length if train_stride <= length else len(starts) * length
            report["train_tokens_in_no_row"] = size - covered
        else:
            report[f"{name}_padded_positions"] = len(starts) * length - size
    settings: dict[str, Any] = {
        "source": "text",
        "length": length,
        "fractions": list(map(float, fractions)),
        "train_stride": train_stride,
        "tokenizer": codec.fingerprint,
    }
    return Dataset(
        **sources,
        tokenizer=codec,
        vocab_size=codec.vocab_size,
        mask_id=codec.mask_id,
        length=length,
        unit="character",
        event_shape=None,
        fingerprint=fingerprint_of(content.encode("utf-8"), settings),
        description=describe(
            headline, codec, f"Training rows begin every {train_stride} tokens.", report
        ),
        report=report,
    )
