"""Tokenizers of ours in the files of others: ``tokenizer.json`` and its settings."""

import itertools
import json
from typing import Any

from mdm_jax.data.tokenizers import DEFAULT_SPECIAL_TOKENS, REPLACEMENT, Tokenizer, byte_alphabet
from mdm_jax.hub import Traits


def tokenizer_files(codec: Tokenizer, traits: Traits) -> dict[str, Any]:
    """Contents of tokenizer.json and tokenizer_config.json, by name.

    The ``tokenizers`` package and transformers give texts the ids of :meth:`Tokenizer.encode`,
    except where a text spells a special token. ValueError for a BPE file whose special tokens are
    not its last ids and whose vocabulary is no table of ids.
    """
    payload = json.loads(codec.to_json())
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    if traits.length is not None:
        settings["model_max_length"] = traits.length
    if payload["kind"] == "hub":
        settings |= payload["special_tokens"]
        if template := payload["templates"].get("default"):
            settings["chat_template"] = template
        return {"tokenizer.json": payload["tokenizer"], "tokenizer_config.json": settings}
    names = list(DEFAULT_SPECIAL_TOKENS)
    if payload["kind"] == "bpe":
        names = list(payload["special_tokens"].values())
        model = _bpe(payload["tokenizer"], names, codec.vocab_size)
    elif payload["kind"] == "byte":
        model = _byte()
    else:
        model = _char(payload["characters"])
    if payload["kind"] != "bpe":
        special = dict(zip(names, codec.special_ids))
        model["model"]["vocab"] |= special
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        model["added_tokens"] = [
            {"id": i, "content": name, **flags, "special": True} for name, i in special.items()
        ]
    settings |= {f"{role}_token": name for role, name in zip(("pad", "eos", "mask"), names)}
    if traits.bos_id in codec.special_ids:
        settings["bos_token"] = names[codec.special_ids.index(traits.bos_id)]
    return {"tokenizer.json": model, "tokenizer_config.json": settings}


def _parts(model: dict[str, Any], splitter: dict[str, Any], decoder: Any) -> dict[str, Any]:
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    parts = {"pre_tokenizer": splitter, "decoder": decoder, "model": model}
    return {"version": "1.0", "added_tokens": [], **empty, **parts}


def _char(characters: str) -> dict[str, Any]:
    """A word of each character. The unknown one is a character too, so that it counts as one."""
    vocab = {character: i for i, character in enumerate(characters)}
    private = map(chr, range(0xE000, 0xF900))
    unknown = next(c for c in itertools.chain(REPLACEMENT, private) if c not in vocab)
    vocab[unknown] = len(characters)
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
    pattern = {"Regex": r"[\s\S]"}
    splitter = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    shown = {"type": "Replace", "pattern": {"String": unknown}, "content": REPLACEMENT}
    return _parts(model, splitter, {"type": "Sequence", "decoders": [shown, {"type": "Fuse"}]})


def _byte() -> dict[str, Any]:
    """Byte-level BPE without merges."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    model = {"type": "BPE", "vocab": byte_alphabet(), "merges": []}
    return _parts(model, byte_level, byte_level)


def _bpe(given: dict[str, Any], special: list[str], size: int) -> dict[str, Any]:
    """The file without what adds or cuts tokens, its special tokens moved to the end."""
    empty = dict.fromkeys(("truncation", "padding", "post_processor"))
    made, model = {**given, **empty}, given["model"]
    added = {entry["content"]: entry["id"] for entry in given["added_tokens"]}
    listed = model["vocab"]
    known = {**listed, **added} if isinstance(listed, dict) else added
    last = [known[name] for name in special]
    if last == list(range(size - len(last), size)):
        return made
    if not isinstance(listed, dict):
        raise ValueError(f"a tokenizer of type {model['type']} whose special tokens are not last")
    order = [i for i in sorted(known.values()) if i not in last] + last
    moved = {old: new for new, old in enumerate(order)}
    made["model"] = {**model, "vocab": {token: moved[i] for token, i in known.items()}}
    made["added_tokens"] = sorted(
        ({**entry, "id": moved[entry["id"]]} for entry in given["added_tokens"]),
        key=lambda entry: entry["id"],
    )
    return made
