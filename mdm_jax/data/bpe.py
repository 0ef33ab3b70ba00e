"""Byte-level byte-pair encoding through the ``tokenizers`` package."""

import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from mdm_jax.data.tokenizers import NUM_SPECIAL, Tokenizer, _frozen, count_lead_bytes, utf8

# Text that normalisers, added prefix spaces and stripping would change.
_PROBE = "A\u0301 é ﬁ²\r\n\n\t 2024 字\U0001f600  <mask> <pad>Don't \u2028end."
_CHUNK = 2**20


class SpecialTokens(NamedTuple):
    """Names of the special tokens inside a tokenizers JSON."""

    pad: str = "<pad>"
    eos: str = "<eos>"
    mask: str = "<mask>"


DEFAULT_SPECIAL_TOKENS = SpecialTokens()


class BPETokenizer(Tokenizer):
    """A byte-level tokenizer in the JSON format of the ``tokenizers`` package.

    Ids are those of the JSON except that the three special tokens are moved to the end. Text that
    spells a special token is encoded as ordinary text.

    Args:
        tokenizer_json: contents of a ``tokenizer.json``.
        special_tokens: what padding, end of sequence and mask are called in it.
        origin: what to call the JSON in error messages.

    Raises:
        ValueError: if the JSON cannot be read, lacks one of the special tokens, or does not
            reproduce text exactly (then characters could not be counted).
    """

    kind = "bpe"

    def __init__(
        self,
        tokenizer_json: str,
        special_tokens: SpecialTokens = DEFAULT_SPECIAL_TOKENS,
        origin: str = "the given JSON",
    ):
        tokenizers = _import_tokenizers()
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

        special_ids = self._find_special_ids(origin)
        size = model.get_vocab_size(with_added_tokens=True)
        if sorted(model.get_vocab(with_added_tokens=True).values()) != list(range(size)):
            raise ValueError(f"{origin}: token ids must be 0 to {size - 1} without gaps or repeats")
        content = [i for i in range(size) if i not in special_ids]
        self._from_file = np.empty(size, np.int32)
        self._from_file[content + special_ids] = np.arange(size)
        self._token_bytes = self._read_token_bytes(content, origin)
        self.character_counts = _frozen(
            [count_lead_bytes(b) for b in self._token_bytes] + [0] * NUM_SPECIAL
        )
        for probe in (_PROBE, f" {_PROBE} "):
            if (decoded := self.decode(self.encode(probe))) != probe:
                raise ValueError(
                    f"{origin}: the tokenizer does not reproduce text exactly ({probe!r} became "
                    f"{decoded!r}), so characters cannot be counted; use a byte-level tokenizer "
                    "without normalizer and without add_prefix_space"
                )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learns merges from ``texts``, which should be the training split only.

        Digits are always tokens of their own. The result is a function of the texts alone; it has
        fewer than ``vocab_size`` tokens where the texts hold fewer distinct pairs.

        Args:
            texts: training texts.
            vocab_size: tokens wanted, the 256 bytes and the three special tokens included.

        Raises:
            ValueError: if ``vocab_size`` is too small for bytes and special tokens.
        """
        smallest = 256 + NUM_SPECIAL
        if vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be at least {smallest} (256 bytes, {NUM_SPECIAL} special "
                f"tokens), got {vocab_size}"
            )
        tokenizers = _import_tokenizers()
        byte_level = tokenizers.pre_tokenizers.ByteLevel
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                byte_level(add_prefix_space=False),
            ]
        )
        model.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIAL,
            initial_alphabet=byte_level.alphabet(),
            special_tokens=[],
            show_progress=False,
        )
        model.train_from_iterator(_chunks(texts), trainer)
        model.add_special_tokens(
            [
                tokenizers.AddedToken(name, special=True, normalized=False)
                for name in DEFAULT_SPECIAL_TOKENS
            ]
        )
        return cls(model.to_str())

    def encode(self, text: str) -> np.ndarray:
        """Ids of ``text``, [n] int32. Raises ValueError on a lone surrogate."""
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
        names = settings.get("special_tokens", {})
        try:
            special_tokens = SpecialTokens(**names)
        except TypeError as error:
            raise ValueError(f"{origin}: 'special_tokens' must name pad, eos and mask") from error
        return cls(json.dumps(settings["tokenizer"]), special_tokens, origin)

    def _find_special_ids(self, origin: str) -> list[int]:
        added = {token.content: i for i, token in self._model.get_added_tokens_decoder().items()}
        special = {
            token.content
            for token in self._model.get_added_tokens_decoder().values()
            if token.special
        }
        wanted = self._special_tokens
        if len(set(wanted)) != NUM_SPECIAL:
            raise ValueError(f"{origin}: the special tokens must differ, got {tuple(wanted)}")
        for role, name in wanted._asdict().items():
            if name not in special:
                raise ValueError(
                    f"{origin}: the tokenizer has no {role} token {name!r}; its special tokens are "
                    f"{sorted(special)}. If one of them is meant, name it: BPETokenizer(json, "
                    f"SpecialTokens({role}=...)). Otherwise add what is missing: t = tokenizers."
                    f"Tokenizer.from_file(FILE); t.add_special_tokens({list(wanted)}); t.save(FILE)"
                )
        return [added[name] for name in wanted]

    def _read_token_bytes(self, content: Sequence[int], origin: str) -> list[bytes]:
        added = {i: token.content for i, token in self._model.get_added_tokens_decoder().items()}
        alphabet = _byte_alphabet()
        table = []
        for i in content:
            if i in added:
                table.append(added[i].encode("utf-8"))
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


def _byte_alphabet() -> dict[str, int]:
    """Byte of each character by which byte-level tokenizers show it.

    Printable Latin-1 bytes stand for themselves, the others are shifted up in order from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _chunks(texts: Iterable[str]) -> Iterable[str]:
    for text in [texts] if isinstance(texts, str) else texts:
        for start in range(0, len(text), _CHUNK):
            yield text[start : start + _CHUNK]


def _import_tokenizers():
    try:
        import tokenizers
        import tokenizers.decoders
        import tokenizers.models
        import tokenizers.pre_tokenizers
        import tokenizers.trainers
    except ImportError as error:
        raise ImportError(
            "the BPE tokenizer needs the 'tokenizers' package: pip install tokenizers; the 'char' "
            "and 'byte' tokenizers need nothing"
        ) from error
    return tokenizers
