"""Short documents side by side in one row, told apart by their document numbers.

Attention stays within a document (``models.attention_masks``), so a document's network outputs are
those it has in a row of its own. Positions go on along the row: rotary embeddings see differences
of positions alone, which packing does not change. A network with absolute positions would need them
to restart.

The bound is that of the documents one by one, too: of a uniformly random order of all tokens of a
row each document sees a uniformly random order of its own.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np

from mdm_jax.data.datasets import PackedSpans, TokenSpans, check_positive
from mdm_jax.data.tokenizers import Tokenizer

Packing = Literal["", "first_fit"]
LongDocuments = Literal["split", "error"]


class Pieces(NamedTuple):
    """Documents, those longer than a row cut into pieces that are not.

    Attributes:
        starts: [P] first token of each piece in the concatenated documents.
        ends: [P] one past its last token.
        num_split: documents that were cut.
    """

    starts: np.ndarray
    ends: np.ndarray
    num_split: int


def cut_documents(
    sizes: Sequence[int], length: int, long_documents: LongDocuments, origin: str
) -> Pieces:
    """Cuts documents of ``sizes`` tokens, which follow each other, into pieces of at most a row.

    A long document gives full rows first and then the rest. Pieces are in the order of documents;
    empty documents give none.

    Args:
        sizes: tokens of each document.
        length: L, tokens of a row.
        long_documents: what to do with a document of more than L tokens, "split" or "error".
        origin: where the documents are from, for error messages.

    Raises:
        ValueError: for a document that is too long, naming it, if they are errors; for settings
            that do not exist.
    """
    check_positive("length", length)
    if long_documents not in get_args(LongDocuments):
        raise ValueError(f"long_documents must be 'split' or 'error', got {long_documents!r}")
    sizes = np.asarray(sizes, np.int64)
    long = np.flatnonzero(sizes > length)
    if len(long) and long_documents == "error":
        raise ValueError(
            f"{origin}: {len(long)} of {len(sizes)} documents do not fit a row of {length} tokens, "
            f"the first of them document {long[0]} (counted from 0) with {sizes[long[0]]} tokens, "
            "EOS included; raise data.length, or choose long_documents='split'"
        )
    counts = -(-sizes // length)
    first = np.repeat(np.cumsum(sizes) - sizes, counts)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = first + number * length
    ends = np.minimum(starts + length, np.repeat(np.cumsum(sizes), counts))
    return Pieces(starts, ends, len(long))


def first_fit(sizes: Sequence[int], length: int) -> np.ndarray:
    """The row of each piece, [P] int64: the first row, in order, that still has room for it.

    Pieces are taken in the given order, and stand in their row in that order. No row holds more
    than ``length`` tokens and no piece is left out. At most 1.7 times as many rows as the best
    packing needs (Dosa and Sgall 2013), in time ``O(P log P)``.

    Args:
        sizes: tokens of each piece.
        length: L, tokens of a row.

    Raises:
        ValueError: if a piece is empty or longer than a row.
    """
    sizes = np.asarray(sizes, np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > length):
        raise ValueError(
            f"first_fit packs pieces of 1 to {length} tokens, got {sizes.min()} to {sizes.max()}"
        )
    # A tree over rows: every node knows the most room below it, so the first fit is one descent.
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


def document_rows(
    documents: Sequence[np.ndarray],
    length: int,
    codec: Tokenizer,
    *,
    packing: Packing,
    long_documents: LongDocuments,
    origin: str,
) -> tuple[TokenSpans | PackedSpans, dict[str, int]]:
    """Rows of encoded documents, and counts of what became of them.

    The rows are a function of the documents and the settings alone, so a shuffled stream over them
    resumes wherever it stopped.

    Args:
        documents: [n_i] int32 each, EOS included.
        length: L, tokens of a row.
        codec: the tokenizer.
        packing: "" for a row per piece of a document, "first_fit" to share rows.
        long_documents: "split" or "error", see :func:`cut_documents`.
        origin: for error messages.

    Raises:
        ValueError: as :func:`cut_documents`, and for a packing that does not exist.
    """
    if packing not in get_args(Packing):
        raise ValueError(f"packing must be '' (none) or 'first_fit', got {packing!r}")
    pieces = cut_documents([len(d) for d in documents], length, long_documents, origin)
    tokens = np.concatenate([*documents, np.zeros(0, np.int32)]).astype(np.int32)
    shared = (length, codec.pad_id, codec.character_counts)
    if packing == "first_fit":
        numbers = first_fit(pieces.ends - pieces.starts, length)
        rows = PackedSpans(tokens, pieces.starts, pieces.ends, numbers, *shared)
    else:
        rows = TokenSpans(tokens, pieces.starts, *shared, ends=pieces.ends)
    counts = {
        "documents": len(documents),
        "split_documents": pieces.num_split,
        "tokens": len(tokens),
        "rows": len(rows),
        "padded_positions": len(rows) * length - len(tokens),
        "unknown_characters": codec.count_unknown(tokens),
    }
    return rows, counts


def split_rows(
    texts: Mapping[str, Sequence[str]],
    length: int,
    codec: Tokenizer,
    *,
    packing: Packing,
    long_documents: LongDocuments,
    origin: str,
) -> tuple[dict[str, TokenSpans | PackedSpans], dict[str, int]]:
    """:func:`document_rows` of every split's texts, each ended by EOS, and one report of them all.

    Args:
        texts: documents by split.
        length, codec, packing, long_documents, origin: as for :func:`document_rows`.

    Raises:
        ValueError: as :func:`document_rows`, naming the split.
    """
    rows: dict[str, TokenSpans | PackedSpans] = {}
    report: dict[str, int] = {}
    for split, documents in texts.items():
        rows[split], counts = document_rows(
            [np.append(codec.encode(text), codec.eos_id) for text in documents],
            *(length, codec),
            packing=packing,
            long_documents=long_documents,
            origin=f"{origin}, {split} split",
        )
        report |= {f"{split}_{key}": value for key, value in counts.items()}
        report[f"{split}_empty_documents"] = sum(len(text) == 0 for text in documents)
    return rows, report


def fill_fraction(report: dict[str, int], split: str, length: int) -> float:
    """Share of the positions of a split's rows that hold tokens; 1 for a split without rows.

    Args:
        report: ``Dataset.report`` of a source made of documents.
        split: "train", "valid" or "test".
        length: L.
    """
    positions = report[f"{split}_rows"] * length
    return 1.0 if not positions else 1 - report[f"{split}_padded_positions"] / positions


def policy(
    packing: Packing, long_documents: LongDocuments, report: dict[str, int], length: int
) -> str:
    """What a dataset's description says of its rows."""
    shared = "several to a row, first fit in order" if packing else "each in rows of its own"
    return (
        f"Documents end with EOS and stand {shared}; those longer than a row: {long_documents}. "
        f"Training rows are filled to {fill_fraction(report, 'train', length):.1%}."
    )
