"""Tokenizers: characters, bytes, and byte-level BPE through the ``tokenizers`` package.

Content ids come first; the last three are padding, EOS and mask, never returned by ``encode``.
Those of ``mdm_jax.hub`` have them where their files say (:class:`SpecialIds`).
"""

import abc
import collections
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax import files

NUM_SPECIAL = 3
REPLACEMENT = "\ufffd"
# Text that normalisers, added prefix spaces and stripping would change.
_PROBE = "A\u0301 é ﬁ²\r\n\n\t 2024 字\U0001f600  <mask> <pad>Don't \u2028end."
_CHUNK = 2**20
# Controls but tab and newline, line separators, bidirectional overrides, surrogates.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class SpecialIds(NamedTuple):
    """Ids of padding, end of text and mask; the first two may be the same."""

    pad: int
    eos: int
    mask: int


class Tokenizer(abc.ABC):
    """Base of all tokenizers; ``kind`` is the name under which one is saved.

    Attributes:
        character_counts: [K] int32, characters of text that each id stands for; one spread over
            several ids counts at its first one.
        unknown_id: id of characters outside the vocabulary, None where every text can be encoded.
        unused_ids: ids in [0, K) that stand for nothing, rows of a model beyond its tokens.
    """

    kind: ClassVar[str]
    character_counts: np.ndarray
    unknown_id: int | None = None
    unused_ids: tuple[int, ...] = ()

    @property
    def vocab_size(self) -> int:
        """K, special ids included."""
        return len(self.character_counts)

    @property
    def special_ids(self) -> SpecialIds:
        """The last three unless a tokenizer says otherwise."""
        return SpecialIds(*range(self.vocab_size - NUM_SPECIAL, self.vocab_size))

    @property
    def pad_id(self) -> int:
        return self.special_ids.pad

    @property
    def eos_id(self) -> int:
        return self.special_ids.eos

    @property
    def mask_id(self) -> int:
        return self.special_ids.mask

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, [n] int32; ValueError on a lone surrogate, if bytes are encoded."""

    @abc.abstractmethod
    def _decode_content(self, ids: np.ndarray) -> str:
        """Text of ids that are not special."""

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]:
        """JSON values that, with ``kind``, define the tokenizer."""

    @classmethod
    @abc.abstractmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self: ...

    def decode(self, ids: ArrayLike, mask_text: str = "▁", eos_text: str = "␃") -> str:
        """Text of ``ids`` [n]; each mask becomes ``mask_text``, padding becomes nothing.

        An EOS before anything else becomes ``eos_text``, at the end nothing; padding that is EOS
        counts as EOS. Invalid UTF-8 becomes U+FFFD. Raises ValueError for an id outside [0, K).
        """
        ids, (pad, eos, mask) = self._checked(ids).reshape(-1), self.special_ids
        ids = ids[(ids != pad) | (ids == eos)]
        others = np.flatnonzero(ids != eos)
        ids = ids[: others[-1] + 1 if len(others) else 0]
        first, *pieces = np.split(ids, np.flatnonzero((ids == eos) | (ids == mask)))
        texts = [self._decode_content(first)]
        for special, *content in pieces:
            texts.append(mask_text if special == mask else eos_text)
            texts.append(self._decode_content(np.asarray(content, ids.dtype)))
        return "".join(texts)

    def count_characters(self, ids: ArrayLike) -> int:
        """Characters of raw text that ``ids`` (any shape) stand for; special ids: 0."""
        return int(self.character_counts[self._checked(ids)].sum())

    def count_unknown(self, ids: ArrayLike) -> int:
        """How many of ``ids`` (any shape) stand for characters outside the vocabulary."""
        return 0 if self.unknown_id is None else int((np.asarray(ids) == self.unknown_id).sum())

    def unknown_in(self, text: str) -> str:  # noqa: ARG002
        """The characters of ``text`` outside the vocabulary, in order."""
        return ""

    def truncate_at_eos(self, ids: ArrayLike) -> np.ndarray:
        """The part of ``ids`` [n] before the first EOS, or all of it."""
        ids = np.asarray(ids)
        stops = np.flatnonzero(ids == self.eos_id)
        return ids[: stops[0]] if len(stops) else ids

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, **self._settings()})

    def save(self, path: str | os.PathLike) -> None:
        files.write(path, self.to_json())

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

    A likelihood does not tell unknown characters apart: report their count. ValueError unless
    ``characters`` are distinct, in code point order and at least one.
    """

    kind = "char"

    def __init__(self, characters: str):
        if not characters:
            raise ValueError("a character tokenizer needs at least one character, got none")
        if characters != "".join(sorted(set(characters))):
            raise ValueError("characters must be distinct and in code point order")
        self.characters, self._known = characters, frozenset(characters)
        self._codes = _code_points(characters)
        self.unknown_id = len(characters)
        self.character_counts = _counts_table([1] * (len(characters) + 1))

    @classmethod
    def fit(cls, texts: Iterable[str]) -> "CharTokenizer":
        """Tokenizer of the characters of ``texts``, which should be the training split only."""
        known: set[str] = set()
        for text in [texts] if isinstance(texts, str) else texts:
            known.update(text)
        return cls("".join(sorted(known)))

    def encode(self, text: str) -> np.ndarray:
        codes = _code_points(text)
        ids = np.minimum(np.searchsorted(self._codes, codes), len(self._codes) - 1)
        return np.where(self._codes[ids] == codes, ids, self.unknown_id).astype(np.int32)

    def unknown_in(self, text: str) -> str:
        return "".join(c for c in text if c not in self._known)

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
        self.character_counts = _counts_table([count_lead_bytes(bytes([b])) for b in range(256)])

    def encode(self, text: str) -> np.ndarray:
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


class SpecialTokens(NamedTuple):
    """Names of the special tokens in tokenizers JSON."""

    pad: str = "<pad>"
    eos: str = "<eos>"
    mask: str = "<mask>"


DEFAULT_SPECIAL_TOKENS = SpecialTokens()


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding, in the JSON format of the ``tokenizers`` package.

    Ids are those of the JSON, except that the three ``special_tokens``, named as there, move to the
    end. Text that spells one is ordinary text. ValueError if the JSON cannot be read, lacks one, or
    does not reproduce text exactly (then characters could not be counted).
    """

    kind = "bpe"

    def __init__(
        self,
        tokenizer_json: str,
        special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS,
        origin: str = "the given JSON",
    ):
        tokenizers = import_tokenizers()
        try:
            model = tokenizers.Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{origin}: not a tokenizers JSON: {error}") from error
        model.no_truncation()
        model.no_padding()
        model.encode_special_tokens = True  # "<mask>" in a text is text
        self._model = model
        self._json = json.loads(tokenizer_json)
        self._special_tokens = SpecialTokens(*special_tokens)

        added = model.get_added_tokens_decoder()
        special_ids = self._find_special_ids(added, origin)
        size = model.get_vocab_size(with_added_tokens=True)
        if sorted(model.get_vocab(with_added_tokens=True).values()) != list(range(size)):
            raise ValueError(f"{origin}: token ids must be 0 to {size - 1} without gaps or repeats")
        content = [i for i in range(size) if i not in special_ids]
        self._from_file = np.empty(size, np.int32)
        self._from_file[content + special_ids] = np.arange(size)
        self._token_bytes = self._read_token_bytes(content, added, origin)
        self.character_counts = _counts_table([count_lead_bytes(b) for b in self._token_bytes])
        for probe in (_PROBE, f" {_PROBE} "):
            if (decoded := self.decode(self.encode(probe))) != probe:
                raise ValueError(
                    f"{origin}: the tokenizer does not reproduce text exactly ({probe!r} became "
                    f"{decoded!r}), so characters cannot be counted; use a byte-level tokenizer "
                    "without normalizer and without add_prefix_space"
                )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges from ``texts``, which should be the training split only.

        Each digit is a token. Deterministic; fewer than ``vocab_size`` tokens where the texts hold
        fewer distinct pairs. ValueError for ``vocab_size`` below 259.
        """
        smallest = 256 + NUM_SPECIAL
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes, {NUM_SPECIAL} special "
                f"tokens), got {vocab_size}"
            )
        tokenizers = import_tokenizers()
        splitters = tokenizers.pre_tokenizers
        digits = splitters.Digits(individual_digits=True)
        byte_level = splitters.ByteLevel(add_prefix_space=False)
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = splitters.Sequence([digits, byte_level])
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIAL,
            initial_alphabet=splitters.ByteLevel.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        texts = [texts] if isinstance(texts, str) else texts
        chunks = (text[i : i + _CHUNK] for text in texts for i in range(0, len(text), _CHUNK))
        model.train_from_iterator(chunks, trainer)
        model.add_special_tokens(
            [
                tokenizers.AddedToken(name, special=True, normalized=False)
                for name in DEFAULT_SPECIAL_TOKENS
            ]
        )
        return cls(model.to_str())

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        ids = self._model.encode(text, add_special_tokens=False).ids
        return self._from_file[np.asarray(ids, np.int64)]

    def _decode_content(self, ids: np.ndarray) -> str:
        return b"".join(self._token_bytes[i] for i in ids.tolist()).decode("utf-8", "replace")

    def _settings(self) -> dict[str, Any]:
        return {"special_tokens": self._special_tokens._asdict(), "tokenizer": self._json}

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self:
        if not isinstance(settings.get("tokenizer"), dict):
            raise ValueError(f"{origin}: a bpe tokenizer needs the object field 'tokenizer'")
        try:
            special_tokens = SpecialTokens(**settings.get("special_tokens", {}))
        except TypeError as error:
            raise ValueError(f"{origin}: 'special_tokens' must name pad, eos and mask") from error
        return cls(json.dumps(settings["tokenizer"]), special_tokens, origin)

    def _find_special_ids(self, added: dict[int, Any], origin: str) -> list[int]:
        special = {token.content: i for i, token in added.items() if token.special}
        names = self._special_tokens
        if len(set(names)) != NUM_SPECIAL:
            raise ValueError(f"{origin}: the special tokens must differ, got {tuple(names)}")
        for role, name in names._asdict().items():
            if name not in special:
                raise ValueError(
                    f"{origin}: the tokenizer has no {role} token {name!r}; its special tokens are "
                    f"{sorted(special)}. If one of them is meant, name it: BPETokenizer(json, "
                    f"SpecialTokens({role}=...)). Otherwise add what is missing: t = tokenizers."
                    f"Tokenizer.from_file(FILE); t.add_special_tokens({list(names)}); t.save(FILE)"
                )
        return [special[name] for name in names]

    def _read_token_bytes(
        self, content: Sequence[int], added: dict[int, Any], origin: str
    ) -> list[bytes]:
        alphabet = byte_alphabet()
        table = []
        for i in content:
            if i in added:
                table.append(added[i].content.encode("utf-8"))
                continue
            token = self._model.id_to_token(i)
            try:
                table.append(bytes(alphabet[c] for c in token))
            except KeyError as error:
                raise ValueError(
                    f"{origin}: token {i} ({token!r}) is not written in the byte-level alphabet; "
                    "only byte-level tokenizers are supported"
                ) from error
        return table


def tokenizer_from_json(text: str, origin: str = "the given JSON") -> Tokenizer:
    """The tokenizer of :meth:`Tokenizer.to_json`, or of Hugging Face tokenizers JSON.

    ValueError, naming ``origin``, if not JSON, of an unknown kind, or without a special token.
    """
    try:
        payload = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}:{error.lineno}: not a tokenizer, {error}") from error
    kinds = {cls.kind: cls for cls in Tokenizer.__subclasses__() if hasattr(cls, "kind")}
    if isinstance(payload, dict) and "kind" not in payload and "model" in payload:
        return BPETokenizer(text, origin=origin)
    kind = payload.get("kind") if isinstance(payload, dict) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{origin}: not a tokenizer; expected an object with 'kind' in {sorted(kinds)}, or a "
            f"tokenizers JSON with 'model', got kind {kind!r}"
            + "; import mdm_jax.hub, which has that kind, first"
            * (kind == "hub")
        )
    return kinds[kind]._from_settings(payload, origin)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a tokenizer file; see :func:`tokenizer_from_json`. Errors name the file."""
    try:
        text = files.Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a tokenizer, {error}") from error
    return tokenizer_from_json(text, origin=str(path))


def make_tokenizer(
    tokenizer: str | Tokenizer, train_texts: Iterable[str], bpe_vocab_size: int
) -> Tokenizer:
    """Tokenizer of a ``tokenizer`` argument, fitted where needed; ValueError if unknown."""
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
        f"tokenizer must be 'char', 'byte', 'bpe', a .json file or a Tokenizer, got {tokenizer!r}"
    )


def describe_unknown(lines: Iterable[tuple[str, str]], codec: Tokenizer, most: int = 5) -> str:
    """Characters outside the vocabulary by place, a sentence to append; "" if there are none.

    ``lines`` are texts, each with its ``file:line``; the first ``most`` that have any are named.
    """
    found = ((origin, unknown) for text, origin in lines if (unknown := codec.unknown_in(text)))
    found = list(itertools.islice(found, most + 1))
    parts = [
        f"{origin} has {', '.join(f'{c!r} ({n})' for c, n in collections.Counter(unknown).items())}"
        for origin, unknown in found[:most]
    ]
    parts += ["and more lines"] * (len(found) > most)
    return f" Outside the vocabulary: {'; '.join(parts)}." if found else ""


def printable(text: str) -> str:
    """``text`` without power over a terminal: control characters become their JSON escapes.

    Tabs and newlines stay. Applied to JSON it stays JSON of the same values.
    """
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def utf8(text: str) -> bytes:
    """UTF-8 bytes of ``text``; ValueError names the position of a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise ValueError(
            f"lone surrogate U+{code:04X} at character {error.start}: not valid Unicode text"
        ) from error


def count_lead_bytes(data: bytes) -> int:
    """Characters that begin in some UTF-8 bytes."""
    return sum((byte & 0xC0) != 0x80 for byte in data)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _counts_table(content: list[int]) -> np.ndarray:
    """Read-only [K] int32: characters of the content ids, and 0 for the special ids."""
    table = np.asarray(content + [0] * NUM_SPECIAL, np.int32)
    table.flags.writeable = False
    return table


def byte_alphabet() -> dict[str, int]:
    """Byte by its character in byte-level tokenizers: printable Latin-1, others from U+0100 up."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def import_tokenizers():
    """The ``tokenizers`` package; ImportError that says what to do."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers of other models and 'bpe' need the 'tokenizers' package: pip install "
            "tokenizers; the 'char' and 'byte' tokenizers need nothing"
        ) from error
    return tokenizers
