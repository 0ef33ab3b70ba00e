"""Tokenizers of other models: ``tokenizer.json``, with special ids where the files say."""

import functools
import itertools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from mdm_jax.data.tokenizers import (
    SpecialIds,
    Tokenizer,
    byte_alphabet,
    count_lead_bytes,
    import_tokenizers,
    utf8,
)
from mdm_jax.hub import chat, files

MASK_TOKEN = "<|mask|>"  # of those that are added, as in dllm
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
# How Qwen2 and its kin cut text, for directories that have vocab.json and merges.txt alone.
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")


class EncodedChat(NamedTuple):
    """A conversation: its text, ids [n] int32, and [n] bool, which tokens the assistant says."""

    text: str
    ids: np.ndarray
    assistant: np.ndarray


class HubTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` package with any special ids, and its chat templates.

    ``encode`` takes text as text: one that spells a special token does not become it, and the mask
    id never comes out (ValueError). With ``special=True``, and in chats, special tokens are read
    where they are spelled, as by transformers. No BOS is added. Characters are counted as the
    tokenizer's normaliser leaves them; special tokens stand for none.

    Attributes:
        bos_id: beginning of a text, None if there is none.
        special_tokens: {"bos_token": ..., "eos_token": ...}, variables of chat templates.
        templates: chat templates by name; the usual one is "default".
        chat_options: further variables of them.
        num_tokens: ids from here on are rows of the model alone.
        mask_added: whether the files had no mask token.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: K, rows of the model, if more than the tokens; the rest are ``unused_ids``.

    ValueError, naming ``origin``, for other JSON, ids below 0, or a mask that is EOS or padding.
    """

    kind = "hub"
    mask_added = False

    def __init__(
        self,
        tokenizer_json: str,
        special_ids: SpecialIds,
        *,
        vocab_size: int = 0,
        bos_id: int | None = None,
        special_tokens: Mapping[str, str] | None = None,
        templates: Mapping[str, str] | None = None,
        chat_options: Mapping[str, Any] | None = None,
        origin: str = "the given JSON",
    ):
        self._model = _parsed(tokenizer_json, origin)
        self._special_ids = SpecialIds(*special_ids)
        pad, eos, mask = self._special_ids
        if min(pad, eos, mask) < 0 or mask in (pad, eos):
            raise ValueError(
                f"{origin}: the mask token needs an id of its own, none may be negative; got "
                f"{self._special_ids}"
            )
        _make_special(self._model, mask)
        self._json = self._model.to_str()
        self._model.encode_special_tokens = True  # "<mask>" in a text is text
        self.bos_id, self.special_tokens = bos_id, dict(special_tokens or {})
        self.templates, self.chat_options = dict(templates or {}), dict(chat_options or {})
        known = self._model.get_vocab(with_added_tokens=True)
        size = max(*known.values(), pad, eos, mask) + 1
        self.num_tokens, size = size, max(size, vocab_size)
        self.unused_ids = tuple(sorted(set(range(size)) - {*known.values(), pad, eos, mask}))
        self.character_counts = self._count_characters(known, size)
        unknown = known.get(json.loads(self._json)["model"].get("unk_token"))
        self.unknown_id = None if unknown in self._special_ids else unknown
        self._anchor = eos if self._model.id_to_token(eos) is not None else min(known.values())

    @property
    def special_ids(self) -> SpecialIds:
        return self._special_ids

    @classmethod
    def read(
        cls,
        directory: str | os.PathLike,
        *,
        vocab_size: int = 0,
        mask_token: str | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """The tokenizer of a directory.

        Ids of config.json (``mask_token_id``, ...) win over the strings of tokenizer_config.json,
        and these over those of special_tokens_map.json, for released files disagree. Where one of
        EOS and padding is missing it is the other, and BOS is padding, as in dllm.

        Args:
            vocab_size: rows of the model.
            mask_token: added at the first free id if there is none, e.g. :data:`MASK_TOKEN`. The
                model needs a row for it (``hub.with_mask_row``).
            chat_options: variables that the family's own code gives to chat templates.

        ValueError, naming the file, if one is missing or damaged, or there is no mask token, or
        neither EOS nor padding.
        """
        directory = pathlib.Path(directory)
        raw = _optional_json(directory / "config.json")
        settings = _optional_json(directory / "tokenizer_config.json")
        names = _names(_optional_json(directory / "special_tokens_map.json")) | _names(settings)
        model = _parsed(*_find_tokenizer(directory, settings))
        _add_stated(model, settings, directory)

        def find(role: str) -> int | None:
            stated = raw.get(f"{role}_token_id")
            stated = stated[0] if isinstance(stated, list) and stated else stated
            if isinstance(stated, int):
                return stated
            return model.token_to_id(names[f"{role}_token"]) if f"{role}_token" in names else None

        bos, eos, pad, mask = map(find, ("bos", "eos", "pad", "mask"))
        if mask is None and mask_token is None:
            raise ValueError(
                f"{directory}: no mask token; set mask_token_id in config.json, or read it with "
                f'mask_token="{MASK_TOKEN}", which adds one at the first free id, '
                f"{model.get_vocab_size(with_added_tokens=True)}"
            )
        mask_added = mask is None
        if mask_added:
            model.add_special_tokens(_special([mask_token]))
            names["mask_token"], mask = mask_token, model.token_to_id(mask_token)
        if eos is None and pad is None:
            raise ValueError(
                f"{directory}: neither an EOS nor a padding token; set eos_token_id in config.json"
            )
        eos, pad = (pad if eos is None else eos), (eos if pad is None else pad)
        made = cls(
            model.to_str(),
            SpecialIds(pad, eos, mask),
            vocab_size=vocab_size,
            bos_id=pad if bos is None else bos,
            special_tokens=names,
            templates=_find_templates(directory, settings),
            chat_options=chat_options,
            origin=str(directory),
        )
        made.mask_added = mask_added
        return made

    def replaced(self, **settings: Any) -> Self:
        """The tokenizer with other arguments of the constructor."""
        made = self._from_settings(self._settings() | settings, self.kind)
        made.mask_added = self.mask_added
        return made

    def write(self, directory: str | os.PathLike, original: str | os.PathLike) -> None:
        """Write tokenizer.json and, from those of ``original``, the files that name the mask."""
        directory, original = pathlib.Path(directory), pathlib.Path(original)
        mask, text = self.mask_id, self.special_tokens.get("mask_token")
        text = text if text is not None else self._model.id_to_token(mask)
        settings = _optional_json(original / "tokenizer_config.json")
        added = {"content": text, "special": True, "normalized": False, "lstrip": False}
        added |= {"rstrip": False, "single_word": False}
        stated = {**settings.get("added_tokens_decoder", {}), str(mask): added}
        settings |= {"mask_token": text, "added_tokens_decoder": stated}
        special = _optional_json(original / "special_tokens_map.json") | {"mask_token": text}
        named = (("tokenizer_config.json", settings), ("special_tokens_map.json", special))
        for name, content in (("tokenizer.json", json.loads(self._json)), *named):
            written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (directory / name).write_text(written, "utf-8")

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        utf8(text)
        model = self._reading_special if special else self._model
        ids = np.asarray(model.encode(text, add_special_tokens=False).ids, np.int32)
        if not special and self.mask_id in ids:
            raise ValueError(
                f"a text holds the mask token {self._model.id_to_token(self.mask_id)!r}, which "
                "this tokenizer also makes of ordinary text; remove it"
            )
        return ids

    def unknown_in(self, text: str) -> str:
        found = self._model.encode(text, add_special_tokens=False)
        places = zip(found.ids, found.offsets)
        return "".join(text[slice(*place)] for i, place in places if i == self.unknown_id)

    def render(
        self,
        messages: chat.Messages,
        add_generation_prompt: bool = False,
        *,
        template: str = "default",
        **options: Any,
    ) -> chat.Rendered:
        """:func:`chat.render_spans` with the named template and the variables of this tokenizer."""
        if template not in self.templates:
            raise ValueError(
                f"there is no chat template {template!r}; this tokenizer has "
                f"{', '.join(sorted(self.templates)) or 'none: the model is not one for chats'}"
            )
        variables = {**self.special_tokens, **self.chat_options, **options}
        return chat.render_spans(
            self.templates[template], messages, add_generation_prompt, **variables
        )

    def encode_chat(
        self, messages: chat.Messages, add_generation_prompt: bool = False, **options: Any
    ) -> EncodedChat:
        """A conversation by :meth:`render` as ids; special tokens are read, whoever spells them.

        ``assistant`` marks tokens of ``{% generation %}`` blocks.
        """
        text, spans = self.render(messages, add_generation_prompt, **options)
        encoding = self._reading_special.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        said = np.zeros(len(starts), bool)
        for start, end in spans:
            said |= (starts < end) & (ends > start)
        return EncodedChat(text, np.asarray(encoding.ids, np.int32), said)

    def encode_answers(
        self, messages: chat.Messages, loss_on: str, **options: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """A conversation as ids [n], and [n] bool, which are answers: "all" or the "last".

        Answers are those of :func:`mdm_jax.hub.chat.answer_spans`. The text is encoded at once;
        where a token would cross the bounds of an answer, piece by piece, as when one is generated.
        ValueError too if the pieces do not give the text.
        """
        render = functools.partial(self.render, **options)
        text, spans = chat.answer_spans(render, messages, loss_on == "last")
        pieces = [text]
        encoding = self._reading_special.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        bounds = np.array(spans).reshape(-1, 1)
        if np.any((starts < bounds) & (bounds < ends)):
            cuts = [0, *bounds.ravel().tolist(), len(text)]
            pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        ids = [self.encode(piece, special=True) for piece in pieces]
        if len(pieces) > 1:
            learned = [np.full(len(each), i % 2 == 1) for i, each in enumerate(ids)]
            if self.decode_literally(np.concatenate(ids)) != text:
                raise ValueError(
                    "a token crosses the beginning or end of an answer, and this tokenizer does "
                    f"not give the text back piece by piece: {text[:60]!r}...; change the content "
                    "there, such as white space at its ends"
                )
            return np.concatenate(ids), np.concatenate(learned)
        learned = np.any([(starts >= a) & (ends <= b) for a, b in spans], axis=0)
        return ids[0], learned

    def decode(self, ids: ArrayLike, mask_text: str = "▁", eos_text: str = "␃") -> str:
        text = super().decode(ids, mask_text, eos_text)
        first = np.asarray(ids).reshape(-1)[:1]
        # The space that some tokenizers put before a text; elsewhere it is one.
        if first.size and self._decode_content(first) == " " + self.decode_literally(first):
            return text.removeprefix(" ")
        return text

    def decode_literally(self, ids: ArrayLike, skip_special: bool = False) -> str:
        """Text of ``ids`` [n] as transformers decodes it, special tokens by name or skipped."""
        ids = self._checked(ids).reshape(-1).tolist()
        return self._model.decode(ids, skip_special_tokens=skip_special)

    def _decode_content(self, ids: np.ndarray) -> str:
        # Behind a token of known text, for some decoders drop a space at the start.
        before = self._model.decode([self._anchor], skip_special_tokens=False)
        ids = [self._anchor, *ids.tolist()]
        return self._model.decode(ids, skip_special_tokens=False).removeprefix(before)

    def _settings(self) -> dict[str, Any]:
        return {
            "tokenizer": json.loads(self._json),
            "special_ids": self.special_ids._asdict(),
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "special_tokens": self.special_tokens,
            "templates": self.templates,
            "chat_options": self.chat_options,
        }

    @classmethod
    def _from_settings(cls, settings: dict[str, Any], origin: str) -> Self:
        rest = {k: v for k, v in settings.items() if k not in ("kind", "tokenizer", "special_ids")}
        try:
            special_ids = SpecialIds(**settings["special_ids"])
            return cls(json.dumps(settings["tokenizer"]), special_ids, origin=origin, **rest)
        except (TypeError, KeyError) as error:
            raise ValueError(f"{origin}: not a tokenizer of kind hub ({error})") from error

    @functools.cached_property
    def _reading_special(self) -> Any:
        return _parsed(self._json, self.kind)

    def _count_characters(self, known: Mapping[str, int], size: int) -> np.ndarray:
        alphabet, added = byte_alphabet(), self._model.get_added_tokens_decoder()
        byte_level = '"type":"ByteLevel"' in self._json.replace('": "', '":"')
        counts = np.zeros(size, np.int32)
        for token, i in known.items():
            if i in added:
                counts[i] = 0 if added[i].special else len(token)
            elif byte_level and all(c in alphabet for c in token):
                counts[i] = count_lead_bytes(bytes(alphabet[c] for c in token))
            elif len(token) == 6 and token.startswith("<0x"):  # a byte of a character
                counts[i] = count_lead_bytes(bytes([int(token[3:5], 16)]))
            else:
                counts[i] = len(token.removeprefix("##"))
        counts[list(self.special_ids)] = 0
        counts.flags.writeable = False
        return counts


class ChatRenderer(NamedTuple):
    """A tokenizer's default chat template as the renderer of ``data.chat``."""

    tokenizer: HubTokenizer

    def __call__(self, messages: chat.Messages, loss_on: str) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer.encode_answers(messages, loss_on)

    def prompt(self, messages: chat.Messages) -> np.ndarray:
        return self.tokenizer.encode_chat(messages, add_generation_prompt=True).ids


def has_tokenizer(directory: pathlib.Path) -> bool:
    """Whether there are files that :meth:`HubTokenizer.read` can read or explains."""
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    return any((directory / name).is_file() for name in names)


def _parsed(tokenizer_json: str, origin: str) -> Any:
    try:
        model = import_tokenizers().Tokenizer.from_str(tokenizer_json)
    except ImportError:
        raise
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{origin}: not a tokenizers JSON: {error}") from error
    model.no_truncation()
    model.no_padding()
    return model


def _special(tokens: list[str]) -> list[Any]:
    made = import_tokenizers().AddedToken
    return [made(token, special=True, normalized=False) for token in tokens]


def _make_special(model: Any, token: int) -> None:
    """Mark a token as special, so that no text is split at it."""
    added = model.get_added_tokens_decoder().get(token)
    if model.id_to_token(token) is not None and not (added and added.special):
        model.add_special_tokens(_special([model.id_to_token(token)]))


def _optional_json(path: pathlib.Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _names(settings: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by role, ("mask_token", ...), of a file that gives text or an object."""
    found = {f"{role}_token": settings.get(f"{role}_token") for role in _ROLES}
    found = {k: v.get("content") if isinstance(v, dict) else v for k, v in found.items()}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _find_tokenizer(directory: pathlib.Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """JSON of the ``tokenizers`` package, and the file that it is from."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return json.dumps(files.read_json(path)), str(path)
    parts = (directory / "vocab.json", directory / "merges.txt")
    if settings.get("tokenizer_class") in _QWEN2_CLASSES and all(map(pathlib.Path.is_file, parts)):
        t = import_tokenizers()
        try:
            model = t.Tokenizer(t.models.BPE.from_file(*map(str, parts)))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(f"{parts[0]}, {parts[1]}: not byte-level BPE: {error}") from error
        split = t.pre_tokenizers.Split(t.Regex(_QWEN2), "isolated")
        byte_level = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = t.pre_tokenizers.Sequence([split, byte_level])
        model.normalizer, model.decoder = t.normalizers.NFC(), t.decoders.ByteLevel()
        return model.to_str(), str(parts[0])
    raise ValueError(
        f"{path}: no such file; where transformers is installed, make it by "
        f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
    )


def _add_stated(model: Any, settings: Mapping[str, Any], directory: pathlib.Path) -> None:
    """Add tokens that tokenizer_config.json or added_tokens.json states beyond tokenizer.json."""
    decoder = settings.get("added_tokens_decoder", {})
    listed = _optional_json(directory / "added_tokens.json")
    stated = {i: {"content": token, "special": True} for token, i in listed.items()}
    stated |= {int(i): properties for i, properties in decoder.items()}
    for i, properties in sorted(stated.items()):
        if model.id_to_token(i) is not None:  # tokenizer.json wins
            continue
        token, special = properties["content"], properties.get("special", False)
        flags = {k: properties.get(k, False) for k in _FLAGS}
        added = import_tokenizers().AddedToken(token, special=special, **flags)
        (model.add_special_tokens if special else model.add_tokens)([added])
        if model.token_to_id(token) != i:
            raise ValueError(
                f"{directory}: the added token {token!r} is stated to have id {i}, but has "
                f"{model.token_to_id(token)}; tokenizer files of two models?"
            )


def _find_templates(directory: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name: files ``*.jinja`` win over tokenizer_config.json."""
    stated = settings.get("chat_template") or {}
    if isinstance(stated, str):
        stated = {"default": stated}
    elif isinstance(stated, list):
        stated = {entry["name"]: entry["template"] for entry in stated}
    paths = {path.stem: path for path in directory.glob("additional_chat_templates/*.jinja")}
    paths["default"] = directory / "chat_template.jinja"
    return stated | {name: p.read_text("utf-8") for name, p in paths.items() if p.is_file()}
