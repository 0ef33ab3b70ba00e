"""Rows of documents: each in rows of its own, several packed into a row, or one stream wrapped.

Attention stays within a document (``models.masks``), so outputs and bound do not depend on packing,
those of a block model if documents begin where blocks do (``align``). Positions are not restarted:
rotary embeddings use differences, absolute ones would need it. In "wrapped" rows, the usual ones of
published perplexities, all documents are one: rows begin and end anywhere, and attention crosses
the EOS between documents.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from mdm_jax.checks import Whole, checked
from mdm_jax.data.datasets import (
    SPLITS,
    Dataset,
    Length,
    check_choice,
    check_positive,
    make_dataset,
)
from mdm_jax.data.rows import PackedSpans, aligned, leaves
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer, tokenizer_from_json

_SHARED = "how documents share rows; '': each has its own"
Packing = Annotated[Literal["", "first_fit"], _SHARED]
DocumentPacking = Annotated[Literal["", "first_fit", "wrapped"], _SHARED]
LongDocuments = Annotated[
    Literal["split", "cut", "error"],
    "documents longer than a row: several rows, the start, refused",
]
DocumentPadding = Annotated[
    Literal["pad_hidden", "eos_scored"],
    "after a document: padding not seen, or EOS that is learned",
]
Align = Annotated[int, Whole("[1, 1e7]", "positions", "packed documents begin at multiples of it")]


@checked
@dataclasses.dataclass(frozen=True)
class DocumentLayout:
    """How documents become rows, see :func:`mdm_jax.data.documents`; ValueError out of range."""

    length: Length
    packing: DocumentPacking = ""
    long_documents: LongDocuments = "split"
    document_padding: DocumentPadding = "pad_hidden"
    align: Align = 1

    def __post_init__(self):
        if self.length % self.align:
            raise ValueError(
                f"align must divide a row of {self.length} tokens, got {self.align}; choose a "
                "divisor, or another length"
            )
        if self.packing and self.document_padding == "eos_scored":
            raise ValueError(
                "document_padding='eos_scored' fills the row after a document with EOS, where "
                f"packing={self.packing!r} puts other documents; choose one of the two"
            )
        if self.packing == "wrapped" and (self.long_documents != "split" or self.align > 1):
            raise ValueError(
                "packing='wrapped' cuts one stream of documents into rows: it needs "
                f"long_documents='split' and align=1, got {self.long_documents!r} and {self.align}"
            )

    def settings(self) -> dict[str, Any]:
        """What changes rows, for the fingerprint; no defaults, so that older ones stay."""
        values, unsaid = dataclasses.asdict(self), ("split", "error", "pad_hidden", 1)
        del values["packing"]  # the source's
        length = values.pop("length")
        return {"length": length} | {k: v for k, v in values.items() if v not in unsaid}


def cut_documents(
    sizes: Sequence[int], length: int, long_documents: LongDocuments, origin: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Cut consecutive documents of ``sizes`` tokens into pieces of at most ``length``, in order.

    Gives [P] first token of each piece in the concatenation, [P] one past its last, and the number
    of long documents. Of these "split" makes full rows and then the rest, "cut" keeps the first
    row's worth only. An empty one gives none.
    ValueError names ``origin`` and the first long document if ``long_documents`` is "error".
    """
    check_positive("length", length)
    check_choice("long_documents", long_documents, LongDocuments)
    sizes = np.asarray(sizes, np.int64)
    long = np.flatnonzero(sizes > length)
    if len(long) and long_documents == "error":
        raise ValueError(
            f"{origin}: {len(long)} of {len(sizes)} documents do not fit a row of {length} tokens, "
            f"the first of them document {long[0]} (counted from 0) with {sizes[long[0]]} tokens, "
            "EOS included; raise data.length, or choose long_documents='split'"
        )
    counts = -(-sizes // length) if long_documents == "split" else np.minimum(sizes, 1)
    first = np.repeat(np.cumsum(sizes) - sizes, counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first + number * length
    ends = np.minimum(starts + length, np.repeat(np.cumsum(sizes), counts))
    return starts, ends, len(long)


def first_fit(sizes: Sequence[int], length: int) -> np.ndarray:
    """The row of each piece, [P] int64: the first row, in order, that still has room for it.

    At most 1.7 times the fewest rows possible (Dosa and Sgall 2013), in time ``O(P log P)``.
    ValueError if a piece is empty or longer than ``length``.
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > length):
        raise ValueError(
            f"first_fit packs pieces of 1 to {length} tokens, got {sizes.min()} to {sizes.max()}"
        )
    # A tree over rows, each node with the most room below it, so that a search is one descent.
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [length] * (2 * leaves)
    rows = np.empty(len(sizes), np.int64)
    for piece, size in enumerate(sizes.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        rows[piece] = node - leaves
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


class Encoded(NamedTuple):
    """Documents as one array of tokens, each ended by EOS: in memory, or mapped from a file.

    Attributes:
        tokens, sizes: [n] integers; [documents] tokens of each.
        counts: "unknown_characters", "empty_documents".
    """

    tokens: np.ndarray
    sizes: np.ndarray
    counts: dict[str, int]


def encode_documents(
    documents: Iterable[str], codec: Tokenizer, write: Callable[[np.ndarray], Any] | None = None
) -> Encoded:
    """Encode ``documents`` one after another; tokens go to ``write`` if given, else to memory."""
    pieces: list[np.ndarray] = []
    sizes, unknown, empty = array.array("q"), 0, 0
    for document in documents:
        ids = np.append(codec.encode(document), codec.eos_id).astype(np.int32)
        (write or pieces.append)(ids)
        sizes.append(len(ids))
        unknown += codec.count_unknown(ids)
        empty += not document
    counts = {"unknown_characters": unknown, "empty_documents": empty}
    tokens = np.concatenate([*pieces, np.zeros(0, np.int32)])
    return Encoded(tokens, np.frombuffer(sizes, np.int64), counts)


def document_rows(
    encoded: Encoded,
    codec: Tokenizer,
    layout: DocumentLayout,
    origin: str,
) -> tuple[PackedSpans, dict[str, int]]:
    """Rows of encoded documents and counts of what they hold; raises as :func:`cut_documents`."""
    (tokens, sizes, counts), length = encoded, layout.length
    whole = np.array([sizes.sum()]) if layout.packing == "wrapped" else sizes
    starts, ends, num_cut = cut_documents(whole, length, layout.long_documents, origin)
    if layout.packing == "wrapped":
        last = np.cumsum(sizes)
        num_cut = int(np.sum((last - sizes) // length != (last - 1) // length))
    numbers = np.arange(len(starts))
    if layout.packing == "first_fit":
        numbers = first_fit(aligned(ends - starts, layout.align), length)
    rows = PackedSpans(
        tokens,
        starts,
        ends,
        numbers,
        length,
        codec.pad_id,
        codec.character_counts,
        align=layout.align,
        eos_id=codec.eos_id if layout.document_padding == "eos_scored" else None,
    )
    kept = int((ends - starts).sum())
    return rows, {
        "documents": len(sizes),
        "split_documents" if layout.long_documents == "split" else "cut_documents": num_cut,
        "tokens": len(tokens),
        "tokens_cut_off": len(tokens) - kept,
        "rows": len(rows),
        "padded_positions": len(rows) * length - kept,
        **counts,
    }


def document_dataset(
    texts: Mapping[str, Iterable[str]],
    layout: DocumentLayout,
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
    *,
    origin: str,
    headline: str,
    settings: Mapping[str, Any],
    digest: bytes | None = None,
    cache: str | os.PathLike | None = None,
    identity: Any = None,
    report: Mapping[str, int] | None = None,
) -> Dataset:
    """Dataset of documents, each ended by EOS; a function of the arguments alone.

    ``texts`` are the documents by split; the tokenizer is fitted to "train". ``cache`` is a folder
    that keeps tokens on disk, under ``identity``, the JSON value that identifies the texts.
    ``report`` counts what reading dropped. Other arguments as in :func:`mdm_jax.data.documents` and
    ``datasets.make_dataset`` (digest None: of the tokens). ValueError, naming the split, as
    :func:`cut_documents` or if all documents of one are empty.
    """
    if cache is None:
        codec = make_tokenizer(tokenizer, texts["train"], bpe_vocab_size)
        parts = {split: encode_documents(documents, codec) for split, documents in texts.items()}
        content = hashlib.sha256()
        for part in parts.values():
            content.update(part.tokens)
            content.update(b"/")
        digest = digest or content.digest()
    else:
        codec, parts, digest = cached_documents(
            pathlib.Path(cache), identity, texts, tokenizer, bpe_vocab_size
        )
    rows: dict[str, PackedSpans] = {}
    report = dict(report or {})
    for split, part in parts.items():
        rows[split], counts = document_rows(part, codec, layout, f"{origin}, {split} split")
        if 0 < counts["documents"] == counts["empty_documents"]:
            raise ValueError(f"{origin}: every document of the {split} split is empty")
        report |= {f"{split}_{name}": count for name, count in counts.items()}
    positions = report["train_rows"] * layout.length
    filled = 1 - report["train_padded_positions"] / positions if positions else 1.0
    sharing = "each in rows of its own"
    if layout.packing == "wrapped":
        sharing = "one after another, cut into rows anywhere"
    elif layout.packing:
        sharing = "several to a row, first fit in order"
        sharing += f", from multiples of {layout.align} on" * (layout.align > 1)
    return make_dataset(
        rows,
        codec,
        length=layout.length,
        digest=digest,
        settings={**settings, **layout.settings(), "tokenizer": codec.fingerprint},
        headline=headline,
        policy=f"Documents end with EOS and stand {sharing}; those longer than a row: "
        f"{layout.long_documents}; after the EOS: {layout.document_padding}. Training rows are "
        f"filled to {filled:.1%}.",
        report=report,
    )


def cached_documents(
    cache: pathlib.Path,
    identity: Any,
    texts: Mapping[str, Iterable[str]],
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
) -> tuple[Tokenizer, dict[str, Encoded], bytes]:
    """Tokenizer, documents by split and digest of their tokens, from a folder of ``cache``.

    The folder is named by ``identity`` and the tokenizer. Where it is missing it is written whole
    and renamed, so that processes that write at once do no harm; then tokens are mapped from disk,
    not read. ValueError if its files do not fit one another.
    """
    wanted = tokenizer.to_json() if isinstance(tokenizer, Tokenizer) else tokenizer
    key = json.dumps([identity, str(wanted), bpe_vocab_size], sort_keys=True)
    if isinstance(wanted, str) and wanted.endswith(".json"):
        key += pathlib.Path(wanted).read_text("utf-8")
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="partial-", dir=cache) as partial:
            _write_cache(pathlib.Path(partial, "new"), texts, tokenizer, bpe_vocab_size)
            with contextlib.suppress(OSError):  # written by another process meanwhile
                os.rename(pathlib.Path(partial, "new"), folder)
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        parts = {}
        for split in texts:
            # An empty file cannot be mapped.
            tokens, sizes = (
                np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
                for path, dtype in (
                    (folder / f"{split}.tokens", about["dtype"]),
                    (folder / f"{split}.sizes", "int64"),
                )
            )
            if sizes.sum() != len(tokens):
                raise ValueError(f"{split}.tokens has {len(tokens)} tokens for {sizes.sum()}")
            parts[split] = Encoded(tokens, sizes, about["counts"][split])
        codec = tokenizer_from_json(json.dumps(about["tokenizer"]))
        return codec, parts, bytes.fromhex(about["digest"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder}: not tokens as mdm_jax keeps them ({error}); remove the folder to have it "
            "written anew"
        ) from error


def _write_cache(
    folder: pathlib.Path,
    texts: Mapping[str, Iterable[str]],
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
) -> None:
    folder.mkdir()
    codec = make_tokenizer(tokenizer, texts["train"], bpe_vocab_size)
    dtype, content, counts = np.min_scalar_type(codec.vocab_size - 1), hashlib.sha256(), {}
    for split, documents in texts.items():
        with open(folder / f"{split}.tokens", "wb") as file:

            def write(ids: np.ndarray, file: Any = file) -> None:
                content.update(ids)
                file.write(ids.astype(dtype))

            encoded = encode_documents(documents, codec, write)
        content.update(b"/")
        encoded.sizes.tofile(folder / f"{split}.sizes")
        counts[split] = encoded.counts
    about = {
        "tokenizer": json.loads(codec.to_json()),
        "dtype": dtype.name,
        "counts": counts,
        "digest": content.hexdigest(),
    }
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


def unpacked(
    tokens: np.ndarray, documents: np.ndarray, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each document of rows [N, L] in a row of its own, up to its first EOS: tokens, valid [M, L].

    The EOS is the last valid token; a document without one ends with its last token.
    """
    texts = []
    for row, numbers in zip(tokens, documents):
        for number in np.unique(numbers[numbers > 0]):
            text = row[numbers == number]
            texts.append(text[: np.append(np.flatnonzero(text == eos_id), len(text))[0] + 1])
    valid = np.arange(tokens.shape[1]) < np.array([[len(text)] for text in texts])
    apart = np.full(valid.shape, eos_id, np.int32)
    apart[valid] = np.concatenate(texts)
    return apart, valid


def check_document_blocks(dataset: Dataset, block_size: int) -> None:
    """Raise ValueError if documents that share a row begin inside a block of ``block_size``."""
    for split, source in ((s, part) for s in SPLITS for part in leaves(getattr(dataset, s))):
        if isinstance(source, PackedSpans) and np.any(source.offsets % block_size):
            raise ValueError(
                f"documents share the rows of the {split} split and begin inside blocks of "
                f"{block_size} tokens, so blocks would depend on the packing; pack with "
                f"align={block_size}, or not at all (packing='')"
            )
