"""Tokenizers of other models: ids of the original, special ids anywhere, mask tokens added."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from checkpoints import DATA
from safetensors.numpy import load_file, save_file

from mdm_jax import data, hub, sharding
from mdm_jax.data.tokenizers import SpecialIds
from mdm_jax.hub.tokenizer import MASK_TOKEN, HubTokenizer

QWEN, LLADA = DATA / "a2d_qwen3-1", DATA / "llada-1"


def expected(directory):
    return json.loads((directory / "tokenizer_expected.json").read_text("utf-8"))


def copied(directory, tmp_path, **changes):
    """A copy of the tokenizer's files; keys set, or with None removed, in those named."""
    target = tmp_path / "model"
    target.mkdir()
    for path in directory.glob("*.json"):
        shutil.copy(path, target)
    for name, values in changes.items():
        path = target / f"{name}.json"
        content = json.loads(path.read_text("utf-8")) | values
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")
    return target


def without_mask(tmp_path):
    """The Qwen tokenizer with 293 tokens, as of a causal model."""
    decoder = json.loads((QWEN / "tokenizer_config.json").read_text("utf-8"))
    added = json.loads((QWEN / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    stated = {k: v for k, v in decoder["added_tokens_decoder"].items() if k != "293"}
    return copied(
        QWEN,
        tmp_path,
        tokenizer={"added_tokens": added[:-1]},
        tokenizer_config={"mask_token": None, "added_tokens_decoder": stated},
        special_tokens_map={"mask_token": None},
    )


@pytest.fixture(scope="module", params=[QWEN, LLADA], ids=lambda path: path.name)
def read(request):
    """(tokenizer, what transformers gives) of a directory."""
    return HubTokenizer.read(request.param, vocab_size=310), expected(request.param)


def test_ids_and_texts_are_those_of_the_original(read):
    codec, wanted = read
    for case in wanted["plain"]:
        ids = codec.encode(case["text"], special=True)
        assert ids.tolist() == case["ids"] and ids.dtype == np.int32
        assert codec.decode_literally(ids) == case["decoded"]
        assert codec.decode_literally(ids, skip_special=True) == case["decoded_skip_special"]


def test_chats_are_those_of_the_original(read):
    codec, wanted = read
    for case in wanted["chat"]:
        encoded = codec.encode_chat(case["messages"], case["add_generation_prompt"])
        assert (encoded.text, encoded.ids.tolist()) == (case["text"], case["ids"])


def test_special_ids_are_where_the_files_say(read):
    codec, wanted = read
    names = ("pad_token_id", "eos_token_id", "mask_token_id")
    assert codec.special_ids == tuple(wanted[name] for name in names)
    assert codec.bos_id == (wanted["bos_token_id"] or wanted["pad_token_id"])
    assert (codec.vocab_size, codec.num_tokens) == (310, wanted["vocab_size"])
    assert codec.unused_ids == tuple(range(wanted["vocab_size"], 310))


def test_text_that_spells_a_special_token_is_text(read):
    codec, wanted = read
    for case in wanted["plain"]:
        ids = codec.encode(case["text"])
        assert codec.decode_literally(ids) == case["text"] and codec.mask_id not in ids
        assert codec.count_characters(ids) == len(case["text"])
        assert not set(codec.special_ids) & set(ids.tolist())


def test_canvases_are_shown_with_their_masks(read):
    codec, _ = read
    pad, eos, mask = codec.special_ids
    a, b = codec.encode("é"), codec.encode(" b")
    shown = codec.decode([*a, mask, mask, *b, eos, *a, eos, pad, pad])
    assert shown == "é▁▁ b␃é"
    assert codec.decode([eos, *a]) == "␃é" and codec.decode([pad, pad]) == ""
    assert codec.truncate_at_eos([*a, eos, *b]).tolist() == a.tolist()


def test_it_is_read_back_from_json(read):
    codec, wanted = read
    again = data.tokenizer_from_json(codec.to_json())
    assert again.fingerprint == codec.fingerprint and isinstance(again, HubTokenizer)
    assert again.special_ids == codec.special_ids and again.unused_ids == codec.unused_ids
    case = wanted["chat"][0]
    assert again.encode_chat(case["messages"], True).ids.tolist() == case["ids"]
    damaged = json.loads(codec.to_json()) | {"special_ids": {"pad": 1}}
    with pytest.raises(ValueError, match="file.json: not a tokenizer of kind hub"):
        data.tokenizer_from_json(json.dumps(damaged), "file.json")


def test_ids_of_the_config_win_over_strings(tmp_path):
    """As SDAR's files, which name one mask token differently; EOS may be a list."""
    directory = copied(
        QWEN,
        tmp_path,
        config={"mask_token_id": 291, "eos_token_id": [290, 292], "pad_token_id": None},
        tokenizer_config={"mask_token": "<|MASK|>", "pad_token": None},
        special_tokens_map={"mask_token": "<MASK>", "pad_token": None},
    )
    codec = HubTokenizer.read(directory)
    assert codec.special_ids == SpecialIds(pad=290, eos=290, mask=291)
    assert codec.bos_id == 290


def test_tokens_that_the_config_states_are_added(tmp_path):
    stated = json.loads((QWEN / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    token = {**stated["293"], "content": "<|extra|>", "rstrip": True}
    directory = copied(
        QWEN, tmp_path, tokenizer_config={"added_tokens_decoder": {**stated, "294": token}}
    )
    assert HubTokenizer.read(directory).encode("<|extra|>  ", special=True).tolist() == [294]
    (tmp_path / "other").mkdir()
    gap = {"added_tokens_decoder": {**stated, "299": token}}
    with pytest.raises(ValueError, match="'<|extra|>' is stated to have id 299, but has 294"):
        HubTokenizer.read(copied(QWEN, tmp_path / "other", tokenizer_config=gap))


def test_a_tokenizer_without_mask_token(tmp_path):
    directory = without_mask(tmp_path)
    with pytest.raises(ValueError, match="no mask token; set mask_token_id in config.json.* 293"):
        HubTokenizer.read(directory)
    codec = HubTokenizer.read(directory, mask_token=MASK_TOKEN)
    assert codec.mask_id == 293 and codec.mask_added and not HubTokenizer.read(QWEN).mask_added
    assert codec.encode(MASK_TOKEN, special=True).tolist() == [293]
    assert 293 not in codec.encode(MASK_TOKEN)
    written = tmp_path / "written"
    written.mkdir()
    codec.write(written, directory)
    again = HubTokenizer.read(written)
    assert again.special_ids == codec.special_ids
    assert again.templates == codec.templates and not again.mask_added
    plain = tokenizers.Tokenizer.from_file(str(written / "tokenizer.json"))
    assert plain.token_to_id(MASK_TOKEN) == 293


def test_faults_of_the_files_are_told(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer.json: no such file.*AutoTokenizer"):
        HubTokenizer.read(tmp_path / "empty")
    ends = {"eos_token": None, "pad_token": None}
    directory = copied(
        LLADA,
        tmp_path,
        config={"eos_token_id": None, "pad_token_id": None},
        tokenizer_config=ends,
        special_tokens_map=ends,
    )
    with pytest.raises(ValueError, match="neither an EOS nor a padding token"):
        HubTokenizer.read(directory)
    (directory / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizers JSON"):
        HubTokenizer.read(directory)
    content = (LLADA / "tokenizer.json").read_text("utf-8")
    with pytest.raises(ValueError, match="the mask token needs an id of its own"):
        HubTokenizer(content, SpecialIds(5, 6, 5))
    with pytest.raises(ValueError, match="no chat template 'default'.*not one for chats"):
        HubTokenizer(content, SpecialIds(5, 6, 7)).render([])


def test_a_mask_that_ordinary_text_becomes_is_refused():
    """As a word of the vocabulary, not marked as a token apart."""
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "mask": 1, "</s>": 2}, "a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    codec = HubTokenizer(model.to_str(), SpecialIds(2, 2, 1))
    assert codec.encode("a a").tolist() == [0, 0]
    with pytest.raises(ValueError, match="a text holds the mask token 'mask'"):
        codec.encode("a mask")


def test_sentencepiece_spaces_and_bytes():
    """A Llama-like tokenizer: ▁ for spaces, one before the text, bytes of unknown characters."""
    vocab = {"<unk>": 0, "</s>": 1, "<mask>": 2, "▁": 3, "a": 4, "▁a": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + byte for byte in range(256)}
    model = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    n, d = tokenizers.normalizers, tokenizers.decoders
    model.normalizer = n.Sequence([n.Prepend("▁"), n.Replace(" ", "▁")])
    parts = [d.Replace("▁", " "), d.ByteFallback(), d.Fuse(), d.Strip(" ", 1, 0)]
    model.decoder = d.Sequence(parts)
    codec = HubTokenizer(model.to_str(), SpecialIds(1, 1, 2))
    ids = codec.encode("a aé")
    assert ids[:2].tolist() == [5, 5] and codec.decode(ids) == "a aé"
    assert codec.decode([5, 2, 5, 2]) == "a▁ a▁"
    assert codec.count_characters(ids) == 5  # with the space before the text


def test_vocabulary_and_merges_of_qwen2_without_tokenizer_json(tmp_path):
    directory = copied(QWEN, tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    model = json.loads((directory / "tokenizer.json").read_text("utf-8"))["model"]
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]), "utf-8")
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges), "utf-8")
    codec = HubTokenizer.read(directory)
    assert codec.special_ids == HubTokenizer.read(QWEN).special_ids
    for case in expected(QWEN)["plain"]:
        assert codec.encode(case["text"], special=True).tolist() == case["ids"]


def test_assistant_tokens_are_marked():
    codec = HubTokenizer.read(QWEN)
    codec.templates["marked"] = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}"
        "{% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Hé?"}, {"role": "assistant", "content": "é 数."}]
    encoded = codec.encode_chat(messages, template="marked")
    assert codec.decode_literally(encoded.ids[encoded.assistant]) == "é 数.<|im_end|>"


def test_loaded_models_have_their_tokenizer():
    model = hub.load(QWEN)
    assert model.tokenizer.vocab_size == model.traits.vocab_size == 296
    assert model.tokenizer.chat_options == {"enable_thinking": False}
    # config.json has no mask token, the tokenizer has.
    assert (model.traits.mask_id, model.traits.eos_id, model.traits.bos_id) == (293, 292, 290)
    assert hub.load(QWEN, tokenizer=False).tokenizer is None
    assert hub.load(DATA / "dream-1").tokenizer is None


def small(directory):
    """Cut the rows of a tied model to its 293 tokens."""
    tensors = load_file(QWEN / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:293]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8")) | {"vocab_size": 293}
    path.write_text(json.dumps(config), "utf-8")


def test_a_mask_row_is_the_mean_of_the_others_and_is_saved(tmp_path):
    directory = without_mask(tmp_path)
    small(directory)
    with pytest.warns(UserWarning, match="294 tokens .mask token 293., the model 293 rows"):
        model = hub.load(directory)
    grown = hub.with_mask_row(model)
    before, after = (np.asarray(m.params["params"]["embedding"]) for m in (model, grown))
    assert after.shape == (320, 40) and grown.config.vocab_size == 320
    np.testing.assert_array_equal(after[:293], before)
    np.testing.assert_allclose(after[293:], np.tile(before.mean(0), (27, 1)), rtol=0, atol=1e-6)
    drawn = hub.with_mask_row(model, "normal", key=jax.random.key(0)).params["params"]["embedding"]
    assert abs(np.asarray(drawn)[293:].std() / 0.02 - 1) < 0.1  # 27 * 40 draws: 5 standard errors
    with pytest.raises(ValueError, match="'normal' with a key"):
        hub.with_mask_row(model, "normal")
    again = hub.load(hub.save(tmp_path / "saved", grown))
    np.testing.assert_array_equal(np.asarray(again.params["params"]["embedding"]), after)
    assert again.tokenizer.special_ids == grown.tokenizer.special_ids
    assert again.traits.mask_id == 293 and again.raw_config["vocab_size"] == 320


@pytest.mark.filterwarnings("ignore:vocab of size", "ignore:.*rows; hub")
def test_a_mask_row_of_eight_devices(tmp_path):
    directory = without_mask(tmp_path)
    small(directory)
    expected = hub.with_mask_row(hub.load(directory)).params["params"]["embedding"]
    model = hub.load(directory, mesh=sharding.make_mesh(fsdp=4, tensor=2))
    grown = hub.with_mask_row(model)
    found, before = (m.params["params"]["embedding"] for m in (grown, model))
    assert found.sharding == before.sharding and found.addressable_shards[0].data.shape[1] == 10
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found)[:293], before)
    ids = np.array([[1, 293, 3]])
    one_device = hub.with_mask_row(hub.load(directory)).logits(ids)
    np.testing.assert_allclose(grown.logits(ids), one_device, rtol=0, atol=1e-5)


def test_a_mask_row_among_the_rows_of_the_model(tmp_path):
    """As Qwen's: rows beyond the tokens exist, and were not trained."""
    model = hub.load(
        QWEN,
        tokenizer=HubTokenizer.read(without_mask(tmp_path), vocab_size=296, mask_token=MASK_TOKEN),
    )
    before = np.asarray(model.params["params"]["embedding"])
    changed = hub.with_mask_row(model)
    after = np.asarray(changed.params["params"]["embedding"])
    others = np.delete(np.arange(296), 293)
    np.testing.assert_array_equal(after[others], before[others])
    np.testing.assert_allclose(after[293], before[:293].mean(0), rtol=0, atol=1e-6)
    assert changed.raw_config["vocab_size"] == 296


def test_a_head_of_its_own_gets_the_row_too():
    model = hub.load(DATA / "a2d_qwen3-2")
    codec = HubTokenizer.read(QWEN)
    grown = hub.with_mask_row(dataclasses.replace(model, tokenizer=codec))
    before, after = (np.asarray(m.params["params"]["head"]["kernel"]) for m in (model, grown))
    assert before.shape[1] == 136 and after.shape[1] == 320
    np.testing.assert_array_equal(after[:, :136], before)
    np.testing.assert_allclose(after[:, 293], before.mean(1), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="needs a tokenizer and a transformer"):
        hub.with_mask_row(model)
