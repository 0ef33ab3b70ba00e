"""Documents from a JSON-lines file, one a line."""

import json
import os
import pathlib
from collections.abc import Sequence

from mdm_jax.data.datasets import Dataset, check_positive
from mdm_jax.data.packing import LongDocuments, Packing, document_dataset
from mdm_jax.data.text import read_splits
from mdm_jax.data.tokenizers import Tokenizer


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

    Args:
        path: the file, UTF-8.
        length: L, tokens per row.
        text_field: key of the text, a string.
        valid_path, test_path, fractions, split_seed: one file split by distinct text, or a file for
            each split; see :func:`mdm_jax.data.text.read_splits`.
        tokenizer, bpe_vocab_size: as in :func:`mdm_jax.data.text`, fitted to the training split.
        packing: "" for none, or "first_fit".
        long_documents: longer than a row with their EOS: "split" them, or raise an "error".

    Raises:
        ValueError: as ``read_splits``, with file and line; naming the file, if a document is too
            long and that is an error; or if a setting is out of range.
    """
    check_positive("length", length)
    parts = read_splits(
        path,
        (text_field,),
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
    )
    texts = {name: [record.values[0] for record in records] for name, records in parts.items()}
    return document_dataset(
        texts,
        length,
        tokenizer,
        bpe_vocab_size,
        packing,
        long_documents,
        origin=str(path),
        headline=f"Documents from {pathlib.Path(path).name}, one a line.",
        settings={"source": "documents", "packing": packing},
        content=json.dumps(list(texts.values())).encode(),
    )
