"""Data sources, tokenizers and batch pipelines."""

from mdm_jax.data.chats import PlainTemplate, chat
from mdm_jax.data.datasets import Dataset, PairLayout
from mdm_jax.data.images import digits
from mdm_jax.data.packing import check_document_blocks, first_fit, unpacked
from mdm_jax.data.pairs import jsonl
from mdm_jax.data.pipeline import (
    check_same_stream,
    evaluation_batches,
    sample_rows,
    stream_fingerprint,
    train_iterator,
)
from mdm_jax.data.records import read_lines
from mdm_jax.data.rows import Buckets, RowSource, bucketed, gather, gather_together
from mdm_jax.data.statistics import (
    NgramEntropies,
    RowSummary,
    ngram_entropies,
    rare_tokens,
    split_entropies,
    summarise_rows,
)
from mdm_jax.data.tables import Column, as_csv, diabetes, table, table_dataset
from mdm_jax.data.text import documents, embedded_text, text
from mdm_jax.data.tfds_source import tfds_images, tfds_text
from mdm_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SpecialTokens,
    Tokenizer,
    describe_unknown,
    load_tokenizer,
    printable,
    tokenizer_from_json,
)
