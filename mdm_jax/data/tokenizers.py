"""Text to token ids and back.

Every tokenizer numbers its content tokens from 0 and puts three special ids last: padding, end of
sequence, mask. They never come out of :meth:`Tokenizer.encode`, whatever the text says.
"""

import abc
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

NUM_SPECIAL = 3
REPLACEMENT = "\ufffd"


class Tokenizer(abc.ABC):
    """What every tokenizer offers.

    Attributes:
        kind: name under which the tokenizer is saved.
        character_counts: [K] int32, characters of raw text that each id stands for. A character
            that is spread over several ids is counted once, at its first one.
        unknown_id: id of characters outside the vocabulary, None where every text can be encoded.
    """

    kind: ClassVar[str]
    character_counts: np.ndarray
    unknown_id: int | None = None

    @property
    def vocab_size(self) -> int:
        """K, the three special ids included."""
        return len(self.character_counts)

    @property
    def pad_id(self) -> int:
        return self.vocab_size - 3

    @property
    def eos_id(self) -> int:
        return self.vocab_size - 2

    @property
    def mask_id(self) -> int:
        return self.vocab_size - 1

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, [n] int32, without special ids."""

    @abc.abstractmethod
    def _decode_content(self, ids: np.ndarray) -> str:
        """Text of ids that are not special."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What, next to ``kind``, defines the tokenizer; JSON values only."""

    @classmethod
    @abc.abstractmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self: ...

    def decode(self, ids: ArrayLike, mask_text: str = "▁") -> str:
        """Text of ``ids`` [n]; each mask becomes ``mask_text``, padding and EOS become nothing.

        Bytes that are not valid UTF-8 (a model can write them) become U+FFFD.

        Raises:
            ValueError: if an id is outside the vocabulary.
        """
        ids = self._checked(ids).reshape(-1)
        ids = ids[(ids != self.pad_id) & (ids != self.eos_id)]
        pieces = np.split(ids, np.flatnonzero(ids == self.mask_id))
        return mask_text.join(
            self._decode_content(piece[1:] if i else piece) for i, piece in enumerate(pieces)
        )

    def count_characters(self, ids: ArrayLike) -> int:
        """Number of characters of raw text that ``ids`` (any shape) stand for; special ids: 0."""
        return int(self.character_counts[self._checked(ids)].sum())

    def count_unknown(self, ids: ArrayLike) -> int:
        """How many of ``ids`` (any shape) stand for characters outside the vocabulary."""
        return 0 if self.unknown_id is None else int((np.asarray(ids) == self.unknown_id).sum())

    def truncate_at_eos(self, ids: ArrayLike) -> np.ndarray:
        """The part of ``ids`` [n] before the first EOS; all of it where there is none."""
        ids = np.asarray(ids)
        stops = np.flatnonzero(ids == self.eos_id)
        return ids[: stops[0]] if len(stops) else ids

    def to_json(self) -> str:
        """The tokenizer as JSON text, read back by :func:`tokenizer_from_json`."""
        return json.dumps({"kind": self.kind, **self._settings()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Like :func:`tokenizer_from_json`; ValueError where the JSON holds another kind."""
        return cls._require(tokenizer_from_json(text), "the given JSON")

    def save(self, path: str | os.PathLike) -> None:
        """Writes :meth:`to_json` to ``path``."""
        pathlib.Path(path).write_text(self.to_json(), "utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Self:
        """Like :func:`load_tokenizer`; ValueError where the file holds another kind."""
        return cls._require(load_tokenizer(path), str(path))

    @classmethod
    def _require(cls, tokenizer: "Tokenizer", origin: str) -> Self:
        if not isinstance(tokenizer, cls):
            raise ValueError(f"{origin}: holds a {tokenizer.kind} tokenizer, not {cls.__name__}")
        return tokenizer

    @property
    def fingerprint(self) -> str:
        """SHA-256 of :meth:`to_json`, hexadecimal."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def _checked(self, ids: ArrayLike) -> np.ndarray:
        ids = np.asarray(ids)
        if ids.size == 0:
            return ids.astype(np.int32)
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"token ids must be integers, got {ids.dtype}")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {self.vocab_size}), got {ids.min()} to {ids.max()}"
            )
        return ids

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class CharTokenizer(Tokenizer):
    """One id per Unicode character; other characters share ``unknown_id``, the id before padding.

    A likelihood of text with unknown characters leaves out which ones they were: report the count.

    Args:
        characters: the known characters, each once, in code point order.

    Raises:
        ValueError: if there are none, or they are repeated or out of order.
    """

    kind = "char"

    def __init__(self, characters: str):
        if not characters:
            raise ValueError("a character tokenizer needs at least one character, got none")
        if characters != "".join(sorted(set(characters))):
            raise ValueError("characters must be distinct and in code point order")
        self.characters = characters
        self._codes = _code_points(characters)
        self.unknown_id = len(characters)
        self.character_counts = _frozen(
            [1] * (len(characters) + 1) + [0] * NUM_SPECIAL,
        )

    @classmethod
    def fit(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Knows the characters that occur in ``texts``, which should be the training split only."""
        known: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            known.update(text)
        return cls("".join(sorted(known)))

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[ids] == codes, ids, self.unknown_id).astype(np.int32)

    def _decode_content(self, ids: np.ndarray) -> str:
        table = self.characters + REPLACEMENT
        return "".join(table[i] for i in ids.tolist())

    def _settings(self) -> dict[str, Any]:
        return {"characters": self.characters}

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self:
        characters = settings.get("characters")
        if not isinstance(characters, str):
            raise ValueError(f"{origin}: a char tokenizer needs the string field 'characters'")
        try:
            return cls(characters)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from error


class ByteTokenizer(Tokenizer):
    """One id per byte of the UTF-8 encoding; every text round-trips exactly."""

    kind = "byte"

    def __init__(self):
        counts = [count_lead_bytes(bytes([b])) for b in range(256)]
        self.character_counts = _frozen(counts + [0] * NUM_SPECIAL)

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, [n] int32. Raises ValueError on a lone surrogate."""
        return np.frombuffer(utf8(text), np.uint8).astype(np.int32)

    def _decode_content(self, ids: np.ndarray) -> str:
        return ids.astype(np.uint8).tobytes().decode("utf-8", "replace")

    def _settings(self) -> dict[str, Any]:
        return {}

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self:
        if extra := sorted(set(settings) - {"kind"}):
            raise ValueError(f"{origin}: a byte tokenizer has no settings, got {extra}")
        return cls()


def tokenizer_from_json(text: str, origin: str = "the given JSON") -> Tokenizer:
    """The tokenizer that :meth:`Tokenizer.to_json` wrote, or one in Hugging Face tokenizers JSON.

    Args:
        text: JSON text.
        origin: what to call it in error messages.

    Raises:
        ValueError: if it is not JSON, of an unknown kind, or lacks a special token.
    """
    from mdm_jax.data.bpe import BPETokenizer

    try:
        payload = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}:{error.lineno}: not a tokenizer, {error}") from error
    kinds = {cls.kind: cls for cls in (CharTokenizer, ByteTokenizer, BPETokenizer)}
    if isinstance(payload, dict) and "kind" not in payload and "model" in payload:
        return BPETokenizer(text, origin=origin)
    kind = payload.get("kind") if isinstance(payload, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{origin}: not a tokenizer; expected an object with 'kind' in {sorted(kinds)}, or a "
            f"tokenizers JSON with 'model', got kind {kind!r}"
        )
    return kinds[kind]._from_settings(payload, origin)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Reads a tokenizer file; see :func:`tokenizer_from_json`. Errors name the file."""
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a tokenizer, {error}") from error
    return tokenizer_from_json(text, origin=str(path))


def make_tokenizer(
    tokenizer: str | Tokenizer, train_texts: Iterable[str], bpe_vocab_size: int
) -> Tokenizer:
    """The tokenizer that a source's ``tokenizer`` argument asks for, fitted to the given texts.

    Raises:
        ValueError: if the name is unknown and not that of a JSON file.
    """
    from mdm_jax.data.bpe import BPETokenizer

    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    if tokenizer == "char":
        return CharTokenizer.fit(train_texts)
    if tokenizer == "byte":
        return ByteTokenizer()
    if tokenizer == "bpe":
        return BPETokenizer.train(train_texts, bpe_vocab_size)
    if str(tokenizer).endswith(".json"):
        return load_tokenizer(tokenizer)
    raise ValueError(
        f"tokenizer must be 'char', 'byte', 'bpe', the path of a .json file or a Tokenizer, got "
        f"{tokenizer!r}"
    )


def utf8(text: str) -> bytes:
    """UTF-8 bytes of ``text``; ValueError names the place of a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"lone surrogate U+{code:04X} at character {error.start}: not valid Unicode text"
        ) from error


def count_lead_bytes(data: bytes) -> int:
    """Number of bytes of UTF-8 ``data`` that begin a character."""
    return sum((byte & 0xC0) != 0x80 for byte in data)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _frozen(counts: list[int]) -> np.ndarray:
    table = np.asarray(counts, np.int32)
    table.flags.writeable = False
    return table
