"""What a compilation needs of data and of a released model, where neither is there."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mdm_jax import data, files, hub
from mdm_jax.data.datasets import make_dataset
from mdm_jax.data.rows import StoredRows
from mdm_jax.data.tokenizers import SpecialIds, Tokenizer
from mdm_jax.hub.files import NOTES, write_tensors
from mdm_jax.launch import datasets
from mdm_jax.types import Batch

_SOURCES = ("text", "jsonl", "chat", "documents")
_ROWS = 64
"""Rows of a split; no array of a compiled program depends on it."""


@contextlib.contextmanager
def with_outline(config: ConfigDict) -> Iterator[ConfigDict]:
    """The config, whose ``model.source`` may be a directory with config.json alone.

    Such a one gets an outline (``hub.outline``) in a temporary directory: its tensors have the
    dtype that config.json states, else float32.
    """
    source = pathlib.Path(config.model.source).expanduser()
    whole = not config.model.source or not (source / "config.json").is_file()
    if whole or any(source.glob("*.safetensors*")):
        yield config
        return
    raw = files.read_json(source / "config.json")
    dtype = raw.get("torch_dtype") or raw.get("dtype") or "float32"
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for path in source.glob("*.json"):
            (folder / path.name).write_bytes(path.read_bytes())
        write_tensors(folder, {}, 1)
        files.write_json(folder / NOTES, {"dtypes": {"all": dtype}})
        config = config.copy_and_resolve_references()
        config.model.source = name
        yield config


def dataset(config: ConfigDict, model: hub.HubModel | None) -> data.Dataset:
    """The data of a run, or rows of a released model's tokens where ``data.path`` names none.

    They are as long as ``data.length``, or the two lengths of pairs together, and all eligible.
    """
    c = config.data
    if model is None or c.path or c.source not in _SOURCES:
        return datasets.dataset(config, model)
    length = c.prompt_length + c.answer_length if c.source == "jsonl" else c.length
    if not length:
        raise ValueError(
            "no data.path, so rows have the lengths of the config, and these are 0: give "
            "--config.data.prompt_length and answer_length, or --config.data.path"
        )
    size, traits = (_ROWS, length), model.traits
    ones = np.ones(size, np.int32)
    rows = Batch(np.zeros(size, np.int32), ones > 0, ones, np.full(_ROWS, length, np.int32))
    codec = model.tokenizer or _Ids(traits.vocab_size, traits.mask_id)
    return make_dataset(
        dict.fromkeys(data.datasets.SPLITS, StoredRows(rows)),
        codec,
        length=length,
        digest=b"",
        settings={},
        headline="no data, for compiling alone",
        policy="",
        report={},
    )


class _Ids(Tokenizer):
    """Ids without texts: those of a model whose directory has no tokenizer."""

    kind = "ids"

    def __init__(self, vocab_size: int, mask_id: int | None):
        self.character_counts = np.ones(vocab_size, np.int32)
        self._mask_id = vocab_size - 1 if mask_id is None else mask_id

    @property
    def special_ids(self) -> SpecialIds:
        return SpecialIds(0, 0, self._mask_id)

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError("these ids have no texts")

    def _decode_content(self, ids: np.ndarray) -> str:
        raise NotImplementedError("these ids have no texts")

    def _settings(self) -> dict[str, Any]:
        return {"vocab_size": self.vocab_size, "mask_id": self._mask_id}

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> "_Ids":
        del origin
        return cls(**settings)
