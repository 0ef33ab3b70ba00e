"""Our tokenizers in the files of others: the ``tokenizers`` package gives texts the same ids."""

import json
import types

import numpy as np
import pytest

from mdm_jax import hub
from mdm_jax.data.tokenizers import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    SpecialTokens,
    import_tokenizers,
)
from mdm_jax.launch.modes.export_tokenizer import tokenizer_files

TEXT = "The quick brown fox, 2024.\n\n\tIt isn't  <pa> far.\r\n"
TEXTS = (
    TEXT,
    "",
    " a  b ",
    "é e\u0301 ﬁ² 字\U0001f600\u2028\x00 ue000\ue000 \ufffd ## <0x41>",
    "\u200d\U0001f468\u200d\U0001f469 \xa0\x85",
)


def _middle():
    """A BPE file whose special tokens have names and ids of their own, amid the others."""
    t = import_tokenizers()
    model = t.Tokenizer(t.models.BPE())
    model.pre_tokenizer = t.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = t.decoders.ByteLevel()
    model.post_processor = t.processors.TemplateProcessing("[E] $A", None, [("[E]", 1)])
    trainer = t.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["[P]", "[E]", "[M]"],
        initial_alphabet=t.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([TEXT] * 3, trainer)
    model.add_tokens(["quick brown"])
    model.enable_truncation(3)
    return BPETokenizer(model.to_str(), SpecialTokens("[P]", "[E]", "[M]"))


CODECS = {
    "char": CharTokenizer.fit(TEXT),
    "char with the replacement": CharTokenizer.fit(TEXT + "\ufffd"),
    "byte": ByteTokenizer(),
    "bpe": BPETokenizer.train(TEXT * 4, 300),
    "bpe, special tokens first": _middle(),
}


@pytest.mark.parametrize("name", CODECS)
def test_ids_and_texts_are_ours(name, tmp_path):
    codec = CODECS[name]
    traits = hub.Traits(vocab_size=codec.vocab_size, length=64, bos_id=codec.mask_id)
    contents = tokenizer_files(codec, traits)
    theirs = import_tokenizers().Tokenizer.from_str(json.dumps(contents["tokenizer.json"]))
    for text in TEXTS:
        ids = codec.encode(text)
        assert theirs.encode(text).ids == ids.tolist()  # with what transformers would add
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == codec.decode(ids)
    content = np.random.default_rng(0).integers(0, codec.vocab_size - 3, (50, 9))
    for ids in content:  # bytes that are no text among them
        assert theirs.decode(ids.tolist(), skip_special_tokens=False) == codec.decode(ids)
    settings = contents["tokenizer_config.json"]
    special = [theirs.token_to_id(settings[f"{role}_token"]) for role in ("pad", "eos", "mask")]
    assert special == list(codec.special_ids) and settings["bos_token"] == settings["mask_token"]
    assert theirs.get_vocab_size() == codec.vocab_size

    for file, value in contents.items():
        (tmp_path / file).write_text(json.dumps(value))
    read = hub.HubTokenizer.read(tmp_path)
    assert (read.special_ids, read.vocab_size) == (codec.special_ids, codec.vocab_size)
    np.testing.assert_array_equal(read.character_counts, codec.character_counts)
    for text in (*TEXTS, "<mask> [M]"):
        np.testing.assert_array_equal(read.encode(text), codec.encode(text))
        assert read.unknown_in(text) == codec.unknown_in(text)
        assert read.count_unknown(read.encode(text)) == codec.count_unknown(codec.encode(text))


def test_a_tokenizer_of_others_is_written_as_it_is(tmp_path):
    first = tokenizer_files(CODECS["byte"], hub.Traits(vocab_size=259))
    first["tokenizer_config.json"]["chat_template"] = "{{ messages }}"
    for file, value in first.items():
        (tmp_path / file).write_text(json.dumps(value))
    again = tokenizer_files(hub.HubTokenizer.read(tmp_path), hub.Traits(vocab_size=259))
    assert again["tokenizer_config.json"] == first["tokenizer_config.json"]
    vocabularies = (each["tokenizer.json"]["model"]["vocab"] for each in (first, again))
    assert next(vocabularies) == next(vocabularies)


def test_special_tokens_that_cannot_be_moved_are_refused():
    codec = CODECS["bpe, special tokens first"]
    payload = json.loads(codec.to_json())
    payload["tokenizer"]["model"].update(type="Unigram", vocab=[["a", 0.0]])
    odd = types.SimpleNamespace(to_json=lambda: json.dumps(payload), vocab_size=codec.vocab_size)
    with pytest.raises(ValueError, match="type Unigram whose special tokens are not last"):
        tokenizer_files(odd, hub.Traits(vocab_size=300))
