"""Text files and their lines; windows of a text, and documents from JSON lines."""

import collections
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import sys
import unicodedata
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from mdm_jax import files
from mdm_jax.checks import checked
from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    Fractions,
    Length,
    Stride,
    VocabSize,
    make_dataset,
    shuffled_split,
    split_bounds,
)
from mdm_jax.data.packing import (
    Align,
    DocumentLayout,
    DocumentPadding,
    LongDocuments,
    Packing,
    document_dataset,
)
from mdm_jax.data.rows import TokenSpans
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer, utf8


@checked
def text(
    path: str | os.PathLike,
    length: Length,
    *,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    fractions: Fractions = (0.9, 0.05, 0.05),
    train_stride: Stride = 1,
) -> Dataset:
    """Rows of ``length`` tokens from a UTF-8 text file (:func:`read_text`), line ends as they are.

    The text is cut into three contiguous parts by number of characters, each encoded by itself.
    Valid and test rows tile their part, the last padded: neither eligible nor attended to.

    Args:
        tokenizer: "char", "byte", "bpe" (the first and last are fitted to the training part), the
            path of a tokenizer's JSON file, or a tokenizer.
        fractions: of characters for train, valid, test, 0 for none.

    ValueError, naming the file, if it is empty, not UTF-8 (with byte offset and line), or too short
    for one training row.
    """
    content, dropped = read_text(path)
    return _windows(
        content,
        origin=str(path),
        headline=f"Text file {pathlib.Path(path).name}, {len(content)} characters.",
        report=dropped,
        length=length,
        tokenizer=tokenizer,
        bpe_vocab_size=bpe_vocab_size,
        fractions=fractions,
        train_stride=train_stride,
    )


@checked
def embedded_text(
    length: Length,
    *,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    fractions: Fractions = (0.9, 0.05, 0.05),
    train_stride: Stride = 1,
) -> Dataset:
    """Rows from the language reference in every CPython, ``pydoc_data.topics`` (PSF-2.0).

    Half a million characters: topics in the order of their names, joined by blank lines, reduced to
    ASCII (NFKD, the rest dropped and counted). The text differs between Python versions, patches
    too; the description has version and SHA-256. Arguments as in :func:`text`.
    """
    from pydoc_data.topics import topics

    decomposed = unicodedata.normalize("NFKD", "\n\n".join(topics[name] for name in sorted(topics)))
    content = decomposed.encode("ascii", "ignore").decode("ascii")
    version = ".".join(map(str, sys.version_info[:3]))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return _windows(
        content,
        origin="pydoc_data.topics",
        headline=f"CPython {version} language reference (pydoc_data.topics, {len(topics)} topics, "
        f"PSF-2.0), {len(content)} characters, sha256 {digest}, sys.version_info "
        f"{tuple(sys.version_info)}. The text varies with the Python version.",
        report={"dropped_non_ascii_characters": len(decomposed) - len(content)},
        length=length,
        tokenizer=tokenizer,
        bpe_vocab_size=bpe_vocab_size,
        fractions=fractions,
        train_stride=train_stride,
    )


def _windows(
    content: str,
    *,
    origin: str,
    headline: str,
    report: dict[str, int],
    length: int,
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
    fractions: Sequence[float],
    train_stride: int,
) -> Dataset:
    first, second = split_bounds(len(content), fractions, origin)
    parts = dict(zip(SPLITS, (content[:first], content[first:second], content[second:])))
    codec = make_tokenizer(tokenizer, [parts["train"]], bpe_vocab_size)
    rows = {}
    for name, part in parts.items():
        tokens = codec.encode(part)
        size = len(tokens)
        if name == "train" and size < length:
            raise ValueError(
                f"{origin}: too short, the train split has {size} tokens but one row needs length "
                f"= {length}; give a longer text, a smaller length or another fraction"
            )
        starts = range(0, size, length)
        if name == "train":
            starts = range(0, size - length + 1, train_stride)
        rows[name] = TokenSpans(tokens, starts, length, codec.pad_id, codec.character_counts)
        report[f"{name}_characters"] = len(part)
        report[f"{name}_tokens"] = size
        report[f"{name}_rows"] = len(starts)
        report[f"{name}_unknown_characters"] = codec.count_unknown(tokens)
        if name == "train":
            covered = starts[-1] + length if train_stride <= length else len(starts) * length
            report["train_tokens_in_no_row"] = size - covered
        else:
            report[f"{name}_padded_positions"] = len(starts) * length - size
    unknown = ""
    if any(report[f"{name}_unknown_characters"] for name in SPLITS):
        unknown = describe_unknown(_numbered(content, origin), codec)
    return make_dataset(
        rows,
        codec,
        length=length,
        digest=hashlib.sha256(content.encode("utf-8")).digest(),
        settings={
            "source": "text",
            "length": length,
            "fractions": list(map(float, fractions)),
            "train_stride": train_stride,
            "tokenizer": codec.fingerprint,
        },
        headline=headline,
        policy=f"Training rows begin every {train_stride} tokens.{unknown}",
        report=report,
        has_eos=False,
    )


class Text(NamedTuple):
    """Contents of a text file, and what was dropped, for ``Dataset.report``."""

    content: str
    dropped: dict[str, int]


class Line(NamedTuple):
    """A line of a text file without its end, and its ``file:line`` for messages."""

    text: str
    origin: str


_SUFFIXES = {".gz": (gzip.open, b"\x1f\x8b"), ".xz": (lzma.open, b"\xfd7zXZ")}
"""How compressed files are opened, and what they begin with."""


def read_text(path: str | os.PathLike) -> Text:
    """A UTF-8 text file, .gz and .xz decompressed, without the byte order mark at its beginning.

    ValueError names the file if it is empty or not compressed as its suffix says; and the line and
    byte offset of bytes that are not UTF-8.
    """
    path = files.Path(path)
    decompress, _ = _SUFFIXES.get(path.suffix.lower(), (contextlib.nullcontext, b""))
    try:
        with path.open("rb") as raw, decompress(raw) as file:
            data = file.read()
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path}: damaged, or not a {path.suffix} file ({error})") from error
    try:
        content = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        suffixes = [suffix for suffix, (_, magic) in _SUFFIXES.items() if data.startswith(magic)]
        remedy = f"name it *{suffixes[0]}" if suffixes else "convert the file to UTF-8 first"
        raise ValueError(
            f"{path}:{line}: not UTF-8, byte 0x{data[error.start]:02x} at offset {error.start} "
            f"({error.reason}); {remedy}"
        ) from error
    text = content.removeprefix("\ufeff")
    if not text:
        raise ValueError(f"{path}: the file is empty")
    return Text(text, {"byte_order_marks": len(content) - len(text)})


def read_lines(path: str | os.PathLike) -> tuple[list[Line], dict[str, int]]:
    """The lines of :func:`read_text`, and counts of what was dropped.

    Lines end at ``\\n`` alone, not where ``str.splitlines`` cuts too, such as at U+2028 or a form
    feed; a ``\\r`` just before it is dropped and counted, and so are blank lines at the end.
    ValueError names file and line of a blank line before.
    """
    text, dropped = read_text(path)
    lines = _numbered(text, str(path))
    while lines and not lines[-1].text.strip(_BLANK):
        lines.pop()
    if not lines:
        raise ValueError(f"{path}: the file is empty")
    for line in lines:
        if not line.text.strip(_BLANK):
            raise ValueError(
                f"{line.origin}: empty line; only the end of the file may have empty lines"
            )
    returns = sum(line.text.endswith("\r") for line in lines)
    lines = [line._replace(text=line.text.removesuffix("\r")) for line in lines]
    return lines, dropped | {"carriage_returns": returns}


_BLANK = " \t\r"


def _numbered(text: str, origin: str) -> list[Line]:
    pieces = text.split("\n")
    return [Line(piece, f"{origin}:{number}") for number, piece in enumerate(pieces, start=1)]


class Record(NamedTuple):
    """String fields of one line of a JSON-lines file, and its ``file:line`` for error messages."""

    values: tuple[str, ...]
    origin: str


def read_splits(
    path: str | os.PathLike,
    fields: Sequence[str],
    *,
    valid_path: str | os.PathLike | None,
    test_path: str | os.PathLike | None,
    fractions: Sequence[float],
    split_seed: int,
) -> tuple[dict[str, list[Record]], dict[str, int]]:
    """Records of each split, in the order of the files, from files of one JSON object per line;
    and counts of what :func:`read_lines` dropped.

    ``fields`` are the keys to read. Without ``valid_path`` the *distinct first fields* are shuffled
    with ``split_seed`` and split by ``fractions``, so none is in two splits. With it, the whole
    file is for training, and ``test_path``, or nothing, is the test split.

    ValueError names file and line, if a line is malformed or empty before the end of the file, or a
    field is missing or not a string; the file, if it is empty or a split would be.
    """
    if test_path is not None and valid_path is None:
        raise ValueError("test_path needs valid_path; without both, the one file is split")
    dropped = collections.Counter()

    def records(path: str | os.PathLike | None) -> list[Record]:
        lines, counts = ([], {}) if path is None else read_lines(path)
        dropped.update(counts)
        return [_parse(*line, fields) for line in lines]

    if valid_path is not None:
        paths = zip(SPLITS, (path, valid_path, test_path))
        return {name: records(file) for name, file in paths}, dropped
    found = records(path)
    distinct = list(dict.fromkeys(record.values[0] for record in found))
    parts = shuffled_split(len(distinct), fractions, split_seed, str(path))
    split_of = {distinct[i]: name for name, numbers in parts.items() for i in numbers}
    return {name: [r for r in found if split_of[r.values[0]] == name] for name in SPLITS}, dropped


def _parse(line: str, origin: str, fields: Sequence[str]) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: not JSON, {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError(f"{origin}: not usable, the JSON is nested too deeply") from error
    except ValueError as error:  # of an integer with thousands of digits
        raise ValueError(f"{origin}: not usable, {error}") from error
    if not isinstance(record, dict):
        raise ValueError(
            f"{origin}: expected a JSON object with {' and '.join(map(repr, fields))}, got "
            f"{type(record).__name__}"
        )
    for field in fields:
        if field not in record:
            raise ValueError(f"{origin}: no field {field!r}; the line has {sorted(record)}")
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise ValueError(f"{origin}: field {field!r} must be a string, got {kind}")
        try:
            utf8(record[field])
        except ValueError as error:
            raise ValueError(f"{origin}: field {field!r}: {error}") from error
    return Record(tuple(record[field] for field in fields), origin)


@checked
def documents(
    path: str | os.PathLike,
    length: Length,
    *,
    text_field: str = "text",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    packing: Packing = "",
    long_documents: LongDocuments = "split",
    document_padding: DocumentPadding = "pad_hidden",
    align: Align = 1,
) -> Dataset:
    """Rows of documents from a UTF-8 file of one JSON object per line, each with a text.

    A document ends with EOS, eligible and of no character. It has rows of its own, padded at the
    end, or shares rows by ``packing`` (:mod:`mdm_jax.data.packing`).

    Args:
        valid_path, test_path, fractions, split_seed: one file split by distinct text, or a file for
            each split; see :func:`mdm_jax.data.text.read_splits`.
        text_field, tokenizer, bpe_vocab_size: key of the text; as in :func:`mdm_jax.data.text`.
        packing: "" for none, or "first_fit".
        long_documents: longer than a row with their EOS: "split" them over rows, "cut" them to
            one, or raise an "error".
        document_padding: after the EOS. "pad_hidden": neither eligible nor attended to; models are
            then conditional on the length, which free samples take from the training rows.
            "eos_scored": more EOS, eligible, so the model has to find the length; not with packing.
        align: packed documents begin at multiples of it; a block model needs its block size.

    ValueError as ``read_splits``, for a long document under "error", or a setting out of range.
    """
    layout = DocumentLayout(length, packing, long_documents, document_padding, align)
    parts, dropped = read_splits(
        path,
        (text_field,),
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
    )
    texts = {name: [record.values[0] for record in records] for name, records in parts.items()}
    codec = make_tokenizer(tokenizer, texts["train"], bpe_vocab_size)
    lines = (Line(*r.values, r.origin) for records in parts.values() for r in records)
    return document_dataset(
        texts,
        layout,
        codec,
        bpe_vocab_size,
        origin=str(path),
        headline=f"Documents from {pathlib.Path(path).name}, one a line."
        + describe_unknown(lines, codec),
        settings={"source": "documents", "packing": packing},
        digest=hashlib.sha256(json.dumps(list(texts.values())).encode()).digest(),
        report=dropped,
    )
