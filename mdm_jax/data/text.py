"""Text files and their lines; windows of a text, and documents from JSON lines."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

from mdm_jax.checks import checked
from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    Fractions,
    Length,
    Stride,
    TextField,
    VocabSize,
    make_dataset,
    split_bounds,
)
from mdm_jax.data.packing import (
    Align,
    DocumentLayout,
    DocumentPacking,
    DocumentPadding,
    LongDocuments,
    document_dataset,
)
from mdm_jax.data.records import StreamedTexts, lines_of, numbered, read_sources, read_text
from mdm_jax.data.records import text_field as text_field_of
from mdm_jax.data.rows import TokenSpans
from mdm_jax.data.tokenizers import Tokenizer, describe_unknown, make_tokenizer

EMBEDDED = pathlib.Path(__file__).with_name("embedded") / "python_reference.txt.xz"
"""The text of :func:`embedded_text`."""


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
    """Rows from the language reference of CPython 3.11.7, which the package carries (PSF-2.0).

    465,000 characters of ASCII, the same everywhere; ``embedded/README.md`` says where they are
    from. Arguments as in :func:`text`.
    """
    content, dropped = read_text(EMBEDDED)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return _windows(
        content,
        origin=EMBEDDED.name,
        headline=f"Language reference of CPython 3.11.7 (Copyright 2001-2023 Python Software "
        f"Foundation, PSF-2.0), {len(content)} characters, sha256 {digest}.",
        report=dropped,
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
        unknown = describe_unknown(numbered(content, origin), codec)
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


@checked
def documents(
    path: str | os.PathLike,
    length: Length,
    *,
    text_field: TextField = "text",
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    tokenizer: str | Tokenizer = "char",
    bpe_vocab_size: VocabSize = 4096,
    packing: DocumentPacking = "",
    long_documents: LongDocuments = "split",
    document_padding: DocumentPadding = "pad_hidden",
    align: Align = 1,
    cache: str | os.PathLike | None = None,
) -> Dataset:
    """Rows of documents from a UTF-8 file of one JSON object per line, each with a text.

    A document ends with EOS, eligible and of no character. It has rows of its own, padded at the
    end, or shares rows by ``packing`` (:mod:`mdm_jax.data.packing`).

    Args:
        valid_path, test_path, fractions, split_seed: one file split by distinct text, or a file for
            each split; see :func:`mdm_jax.data.records.read_sources`.
        text_field, tokenizer, bpe_vocab_size: key of the text; as in :func:`mdm_jax.data.text`.
        packing: "" for none, "first_fit", or "wrapped": documents one after another, cut into rows
            anywhere, and attended to across their ends.
        long_documents: longer than a row with their EOS: "split" them over rows, "cut" them to
            one, or raise an "error".
        document_padding: after the EOS. "pad_hidden": neither eligible nor attended to; models are
            then conditional on the length, which free samples take from the training rows.
            "eos_scored": more EOS, eligible, so the model has to find the length; not with packing.
        align: packed documents begin at multiples of it; a block model needs its block size.
        cache: folder where all text is encoded once and tokens are mapped from, for files larger
            than memory. Needs ``valid_path`` and ``test_path``, and does not compare their texts
            with those for training; a file is the same if its name and size are.

    ValueError as ``read_sources``, for a long document under "error", or a setting out of range.
    """
    layout = DocumentLayout(length, packing, long_documents, document_padding, align)
    shared = {"origin": str(path), "settings": {"source": "documents", "packing": packing}}
    headline = f"Documents from {pathlib.Path(path).name}, one a line."
    if cache is not None:
        paths = dict(zip(SPLITS, (path, valid_path, test_path)))
        if missing := [f"{name}_path" for name in SPLITS[1:] if paths[name] is None]:
            raise ValueError(
                f"cache={str(cache)!r} reads files without keeping them and cannot split one: give "
                f"{' and '.join(missing)} too"
            )
        streams = {name: StreamedTexts(str(own), text_field) for name, own in paths.items()}
        identity = {name: stream.identity() for name, stream in streams.items()}
        return document_dataset(
            streams,
            layout,
            tokenizer,
            bpe_vocab_size,
            **shared,
            headline=headline,
            cache=cache,
            identity=identity,
        )
    found = read_sources(
        path,
        lambda record, origin: (text_field_of(record, text_field, origin),),
        wanted=repr(text_field),
        named_by="text_field",
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
    )
    if found.weights is not None:
        raise ValueError(f"{path}: documents are not mixed by weight; leave the weights out")
    parts = found.splits()
    texts = {name: [record.values[0] for record in records] for name, records in parts.items()}
    codec = make_tokenizer(tokenizer, texts["train"], bpe_vocab_size)
    lines = lines_of(record for records in parts.values() for record in records)
    return document_dataset(
        texts,
        layout,
        codec,
        bpe_vocab_size,
        **shared,
        headline=headline + describe_unknown(lines, codec),
        digest=hashlib.sha256(json.dumps(list(texts.values())).encode()).digest(),
        report=found.report,
    )
