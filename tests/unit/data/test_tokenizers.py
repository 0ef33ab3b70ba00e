"""Tokenizers: exact round trips, special ids, counts, files and their errors."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdm_jax import data
from mdm_jax.data.tokenizers import byte_alphabet

tokenizers = pytest.importorskip("tokenizers")

CORPUS = "the quick brown fox, 1234 times; naïve café 字 \r\n\tthe end. " * 20
BPE = data.BPETokenizer.train([CORPUS], 280)
CHAR = data.CharTokenizer.fit(CORPUS)
BYTE = data.ByteTokenizer()
ALL = [CHAR, BYTE, BPE]


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_special_ids_come_last_in_order(tokenizer):
    size = tokenizer.vocab_size
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.mask_id) == (size - 3, size - 2, size - 1)
    assert {CHAR.kind: len(set(CORPUS)) + 4, "byte": 259, "bpe": 280}[tokenizer.kind] == size
    assert tokenizer.count_characters([size - 3, size - 2, size - 1]) == 0


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_byte_and_bpe_reproduce_any_text(text):
    for tokenizer in (BYTE, BPE):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text
        assert tokenizer.count_characters(ids) == len(text)
        assert not np.isin(ids, np.arange(3) + tokenizer.pad_id).any()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_char_reproduces_any_text_it_was_fitted_to(text):
    tokenizer = data.CharTokenizer.fit(text + "x")
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_unknown(ids) == 0


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=lambda t: t.kind)
def test_text_that_spells_special_tokens_stays_text(tokenizer):
    text = "a<mask><pad> <eos>b"
    ids = tokenizer.encode(text)
    assert ids.max() < tokenizer.pad_id
    assert tokenizer.decode(ids) == text


def test_char_counts_unknown_characters():
    tokenizer = data.CharTokenizer.fit(["ab", "c"])
    ids = tokenizer.encode("a?b!")
    assert ids.tolist() == [0, 3, 1, 3]
    assert tokenizer.unknown_id == 3 and tokenizer.vocab_size == 7
    assert tokenizer.count_unknown(ids) == 2
    assert tokenizer.count_characters(ids) == 4
    assert tokenizer.decode(ids) == "a\ufffdb\ufffd"
    assert BYTE.count_unknown(BYTE.encode("?")) == 0


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=lambda t: t.kind)
def test_characters_are_counted_once_over_any_cut(tokenizer):
    text = "é字\U0001f600a" * 3
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # so some cuts fall inside a character
    for cut in range(len(ids)):
        parts = tokenizer.count_characters(ids[:cut]), tokenizer.count_characters(ids[cut:])
        assert sum(parts) == len(text)


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_decode_shows_masks_and_eos_between_texts_and_hides_padding(tokenizer):
    a, b = tokenizer.encode("the"), tokenizer.encode("end")
    mask, pad, eos = [tokenizer.mask_id], [tokenizer.pad_id], [tokenizer.eos_id]
    ids = np.concatenate([pad, mask, a, mask, mask, b, eos, pad, mask])
    assert tokenizer.decode(ids, mask_text="_", eos_text="|") == "_the__end|_"
    assert tokenizer.decode(ids) == "▁the▁▁end␃▁"
    assert tokenizer.decode(ids[:-1]) == "▁the▁▁end"
    two = np.concatenate([eos, a, eos, pad, b, eos, eos, pad])
    assert tokenizer.decode(two) == "␃the␃end"
    assert tokenizer.decode([]) == tokenizer.decode(eos) == tokenizer.decode(pad) == ""
    assert tokenizer.decode(tokenizer.truncate_at_eos(ids), mask_text="") == "theend"
    assert tokenizer.truncate_at_eos(a).tolist() == a.tolist()


def test_decode_replaces_bytes_that_are_not_utf8():
    assert BYTE.decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


@pytest.mark.parametrize("bad", [[-1], [259], [0.5]])
def test_ids_outside_the_vocabulary_are_refused(bad):
    with pytest.raises(ValueError, match="token ids must be"):
        BYTE.decode(bad)
    with pytest.raises(ValueError, match="token ids must be"):
        BYTE.count_characters(bad)


@pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=lambda t: t.kind)
def test_lone_surrogate_is_refused_with_its_place(tokenizer):
    with pytest.raises(ValueError, match=r"U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize("tokenizer", ALL, ids=lambda t: t.kind)
def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    json.loads(path.read_text())
    for again in (
        data.load_tokenizer(path),
        data.tokenizer_from_json(tokenizer.to_json()),
    ):
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(CORPUS).tolist() == tokenizer.encode(CORPUS).tolist()
        assert again.vocab_size == tokenizer.vocab_size


def test_fingerprints_differ_between_tokenizers():
    others = [data.CharTokenizer.fit("ab"), data.CharTokenizer.fit("abc"), *ALL]
    assert len({t.fingerprint for t in others}) == len(others)
    assert all(len(t.fingerprint) == 64 for t in others)


def test_bpe_training_is_a_function_of_the_texts():
    assert data.BPETokenizer.train([CORPUS], 280).fingerprint == BPE.fingerprint
    assert data.BPETokenizer.train([CORPUS + "zebra zebra"], 280).fingerprint != BPE.fingerprint


def test_bpe_splits_digits_and_merges_letters():
    tokenizer = data.BPETokenizer.train(["12 12 12 the the the " * 50], 280)
    assert len(tokenizer.encode("1212")) == 4
    assert len(tokenizer.encode("the")) == 1


def test_bpe_refuses_a_vocabulary_without_room_for_bytes():
    with pytest.raises(ValueError, match="at least 259"):
        data.BPETokenizer.train(["abc"], 258)
    assert data.BPETokenizer.train(["abc"], 259).vocab_size == 259


def testbyte_alphabet_is_that_of_the_package():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))


def foreign(*special, byte_level=True):
    """Somebody's tokenizers JSON, special tokens first."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    if byte_level:
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet() if byte_level else ["▁"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=alphabet,
        special_tokens=list(special),
        show_progress=False,
    )
    model.train_from_iterator([CORPUS], trainer)
    return model


def test_foreign_tokenizer_gets_its_special_ids_moved_to_the_end(tmp_path):
    model = foreign("<eos>", "<mask>", "<bos>", "<pad>")
    model.enable_truncation(2)
    path = tmp_path / "tokenizer.json"
    model.save(str(path))
    tokenizer = data.load_tokenizer(path)
    assert isinstance(tokenizer, data.BPETokenizer)
    assert tokenizer.vocab_size == 300 and tokenizer.mask_id == 299
    text = "the café <bos><mask> 12"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.count_characters(tokenizer.encode(text)) == len(text)
    assert sorted(tokenizer._from_file.tolist()) == list(range(300))
    assert tokenizer._from_file[:4].tolist() == [298, 299, 0, 297]
    again = data.tokenizer_from_json(tokenizer.to_json())
    assert again.fingerprint == tokenizer.fingerprint


def test_foreign_tokenizer_with_other_names():
    names = data.SpecialTokens("[PAD]", "[SEP]", "[MASK]")
    tokenizer = data.BPETokenizer(foreign(*names).to_str(), names)
    again = data.tokenizer_from_json(tokenizer.to_json())
    assert again.encode("the end").tolist() == tokenizer.encode("the end").tolist()
    with pytest.raises(ValueError, match="must differ"):
        data.BPETokenizer(foreign(*names).to_str(), data.SpecialTokens("[PAD]", "[PAD]", "[MASK]"))


def test_tokenizer_file_without_mask_names_file_and_remedy(tmp_path):
    path = tmp_path / "gpt.json"
    foreign("<pad>", "<eos>").save(str(path))
    with pytest.raises(ValueError, match=r"gpt\.json: .*no mask token '<mask>'") as caught:
        data.load_tokenizer(path)
    assert "add_special_tokens" in str(caught.value) and "'<eos>', '<pad>'" in str(caught.value)

    model = tokenizers.Tokenizer.from_file(str(path))  # the remedy that the message gives
    model.add_special_tokens(["<pad>", "<eos>", "<mask>"])
    model.save(str(path))
    assert data.load_tokenizer(path).mask_id == data.load_tokenizer(path).vocab_size - 1


@pytest.mark.parametrize("change", ["Lowercase", "NFC", "NFKC", "StripAccents", "Strip", "prefix"])
def test_tokenizer_that_changes_text_is_refused(change):
    model = foreign("<pad>", "<eos>", "<mask>")
    data.BPETokenizer(model.to_str())  # fine before the change
    if change == "prefix":
        model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    else:
        model.normalizer = getattr(tokenizers.normalizers, change)()
    with pytest.raises(ValueError, match="does not reproduce text exactly"):
        data.BPETokenizer(model.to_str())


def test_tokenizer_that_is_not_byte_level_is_refused():
    with pytest.raises(ValueError, match="byte-level"):
        data.BPETokenizer(foreign("<pad>", "<eos>", "<mask>", byte_level=False).to_str())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"kind":\n oops}', r"t\.json:2: not a tokenizer"),
        (b'{"kind": "word"}', r"t\.json: .*'bpe', 'byte', 'char'.*'word'"),
        (b"[1]", r"t\.json: not a tokenizer"),
        (b'{"kind": ["byte"]}', r"t\.json: not a tokenizer"),
        (b"\xff", r"t\.json: not a tokenizer"),
        (b'{"kind": "char"}', r"t\.json: .*'characters'"),
        (b'{"kind": "char", "characters": "ba"}', r"t\.json: .*code point order"),
        (b'{"kind": "char", "characters": ""}', r"t\.json: .*at least one"),
        (b'{"kind": "byte", "size": 3}', r"t\.json: .*no settings.*size"),
        (b'{"kind": "bpe"}', r"t\.json: .*'tokenizer'"),
        (b'{"kind": "bpe", "tokenizer": {}, "special_tokens": {"x": 1}}', r"pad, eos and mask"),
        (b'{"model": {}}', r"t\.json: not a tokenizers JSON"),
    ],
)
def test_bad_tokenizer_files_name_the_file(content, message, tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(path)


def test_bpe_without_the_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match="pip install tokenizers"):
        data.BPETokenizer.train(["abc"], 300)


def test_unknown_characters_are_told_with_their_lines():
    tokenizer = data.CharTokenizer.fit("ab")
    assert (
        tokenizer.unknown_in("a?b!?") == "?!?" and BYTE.unknown_in("?") == BPE.unknown_in("?") == ""
    )
    lines = [(text, f"f:{n}") for n, text in enumerate(["ab", "?!?", "", "é", "b\x1b"], start=1)]
    expected = " Outside the vocabulary: f:2 has '?' (2), '!' (1); f:4 has 'é' (1)"
    assert data.describe_unknown(lines, tokenizer) == f"{expected}; f:5 has '\\x1b' (1)."
    assert data.describe_unknown(lines, tokenizer, 2) == f"{expected}; and more lines."
    assert data.describe_unknown(lines[:1], tokenizer) == data.describe_unknown(lines, BYTE) == ""


def test_printable_text_has_no_power_over_a_terminal_and_json_stays_the_same_values():
    harmless = "a\tb\n字 é \xa0\u200d\U0001f600\\x1b"
    assert data.printable(harmless) == harmless
    assert data.printable("\x1b[1m\r\x7f\x9b\u2029\u2066\ud800") == (
        "\\u001b[1m\\u000d\\u007f\\u009b\\u2029\\u2066\\ud800"
    )
    values = {"".join(map(chr, range(0x100))): "\u2028\u202e\ud800"}
    printed = data.printable(json.dumps(values, ensure_ascii=False))
    assert json.loads(printed) == values and len(printed.splitlines()) == 1
