"""Rows of documents: each in rows of its own, or several packed into a row.

Attention stays within a document (``models.masks``), so outputs and bound do not depend on packing.
Positions are not restarted: rotary embeddings use differences, absolute ones would need it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mdm_jax.data.datasets import (
    Dataset,
    PackedSpans,
    check_choice,
    check_positive,
    make_dataset,
)
from mdm_jax.data.tokenizers import Tokenizer, make_tokenizer

Packing = Literal["", "first_fit"]
LongDocuments = Literal["split", "error"]


def cut_documents(
    sizes: Sequence[int], length: int, long_documents: LongDocuments, origin: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Cut consecutive documents of ``sizes`` tokens into pieces of at most ``length``, in order.

    Gives [P] first token of each piece in the concatenation, [P] one past its last, and the number
    of documents cut. A long document gives full rows and then the rest; an empty one none.
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
    counts = -(-sizes // length)
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


def document_dataset(
    texts: Mapping[str, Sequence[str]],
    length: int,
    tokenizer: str | Tokenizer,
    bpe_vocab_size: int,
    packing: Packing,
    long_documents: LongDocuments,
    *,
    origin: str,
    headline: str,
    settings: Mapping[str, Any],
    content: bytes | None = None,
) -> Dataset:
    """Dataset of documents, each ended by EOS; a function of the arguments alone.

    ``texts`` are the documents by split; the tokenizer is fitted to "train". Other arguments as in
    :func:`mdm_jax.data.documents` and ``datasets.make_dataset`` (content None: the tokens).
    ValueError as :func:`cut_documents`, naming the split, and for an unknown packing.
    """
    check_choice("packing", packing, Packing)
    codec = make_tokenizer(tokenizer, texts["train"], bpe_vocab_size)
    rows: dict[str, PackedSpans] = {}
    report: dict[str, int] = {}
    for split, documents in texts.items():
        encoded = [np.append(codec.encode(text), codec.eos_id) for text in documents]
        sizes = [len(ids) for ids in encoded]
        starts, ends, num_split = cut_documents(
            sizes, length, long_documents, f"{origin}, {split} split"
        )
        tokens = np.concatenate([*encoded, np.zeros(0, np.int32)]).astype(np.int32)
        numbers = first_fit(ends - starts, length) if packing else np.arange(len(starts))
        rows[split] = PackedSpans(
            tokens, starts, ends, numbers, length, codec.pad_id, codec.character_counts
        )
        counts = {
            "documents": len(documents),
            "split_documents": num_split,
            "tokens": len(tokens),
            "rows": len(rows[split]),
            "padded_positions": len(rows[split]) * length - len(tokens),
            "unknown_characters": codec.count_unknown(tokens),
            "empty_documents": sum(len(text) == 0 for text in documents),
        }
        report |= {f"{split}_{name}": count for name, count in counts.items()}
    if content is None:
        content = b"".join(source.tokens.tobytes() + b"/" for source in rows.values())
    positions = report["train_rows"] * length
    filled = 1 - report["train_padded_positions"] / positions if positions else 1.0
    sharing = "several to a row, first fit in order" if packing else "each in rows of its own"
    return make_dataset(
        rows,
        codec,
        length=length,
        content=content,
        settings={**settings, "length": length, "tokenizer": codec.fingerprint},
        headline=headline,
        policy=f"Documents end with EOS and stand {sharing}; those longer than a row: "
        f"{long_documents}. Training rows are filled to {filled:.1%}.",
        report=report,
    )
