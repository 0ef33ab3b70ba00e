"""Reading and writing directories in the layout of Hugging Face, and what is refused."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from checkpoints import DATA, copied, write_config
from safetensors.numpy import load_file, save_file

from mdm_jax import hub
from mdm_jax.hub import files, leaves

pytestmark = pytest.mark.keyless


def some_tensors():
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(37, 5)).astype(np.float32),
        "b.weight": rng.normal(size=(7, 3, 2)).astype("bfloat16"),
        "scalar": np.array(0.25, np.float32),
        "counts": np.arange(6, dtype=np.int64),
        "empty": np.zeros((0, 4), np.float16),
    }


def written(directory, max_shard_size=10**9):
    directory.mkdir(exist_ok=True)
    made = {
        name: files.Tensor(value.shape, value.dtype.name, lambda value=value: value)
        for name, value in some_tensors().items()
    }
    files.write_tensors(directory, made, max_shard_size)
    return directory


@pytest.mark.parametrize(("size", "shards"), [(10**9, 1), (100, 3), (1, 5)])
def test_what_is_written_is_read_by_us_and_by_safetensors(size, shards, tmp_path):
    written(tmp_path, size)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(names) == shards
    theirs = {}
    for name in names:
        theirs |= load_file(tmp_path / name)
    ours = files.TensorFiles(tmp_path)
    assert ours.shapes.keys() == theirs.keys() == some_tensors().keys()
    for name, value in some_tensors().items():
        for found in (theirs[name], ours.read(name)):
            assert found.dtype == value.dtype and found.shape == value.shape
            assert found.tobytes() == value.tobytes()
    if shards > 1:
        index = json.loads((tmp_path / files.INDEX).read_text("utf-8"))
        assert index["weight_map"] == ours.file_of
        total = sum(value.nbytes for value in some_tensors().values())
        assert index["metadata"] == {"total_size": total}


def loaded(found, leaf_of, shape, dtype, mesh, spec):
    """One array of the file's tensors, loaded onto a mesh."""
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    target = jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=where)
    names = {leaf_of.sources.flat[i] for i in range(leaf_of.sources.size)}
    ignored = "|".join(set(found.shapes) - names)
    return leaves.load_params(found, [leaf_of], {"params": {"w": target}}, ignored)["params"]["w"]


@pytest.mark.parametrize("chunk", [1, 50, 3000])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shards_are_read_in_chunks_transposed_and_converted(chunk, dtype, tmp_path, monkeypatch):
    """Rows and columns of 8 devices, one to all rows a chunk; parts, stacks, and the whole."""
    monkeypatch.setattr(files, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(12, 8)).astype(np.float32) for _ in "ab")
    save_file({"a": a, "b": b, "s": np.array(2.5, np.float32)}, tmp_path / "model.safetensors")
    found = files.TensorFiles(tmp_path)
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    stack = leaves.leaf("w", ["a", "b"], True), np.stack([a.T, b.T])
    cases = [(*stack, ("x", "y"))]
    for spec in ((), ("x", "y"), ("y", "x"), (None, "y")):
        cases.append((leaves.leaf("w", "a"), a, spec))
        cases.append((leaves.leaf("w", "a", True), a.T, spec))
        cases.append((*stack, (None, *spec)))
    for leaf, value, spec in cases:
        array = loaded(found, leaf, value.shape, dtype, mesh, spec)
        assert array.sharding.spec == jax.sharding.PartitionSpec(*spec)
        np.testing.assert_array_equal(np.asarray(array), value.astype(dtype))
    assert float(loaded(found, leaves.leaf("w", "s"), (), dtype, mesh, ())) == 2.5
    np.testing.assert_array_equal(found.read("b"), b)
    assert found.read("s") == np.float32(2.5) and not found.are_equal("a", "b")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_found(dtype):
    largest = np.array([65504.0, -65504.0, 0.0, -0.0, 1e-8], dtype)
    assert leaves._are_finite(largest) and leaves._are_finite(largest[:0])
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        for at in range(5):
            values = np.stack([largest, largest], axis=1)
            values[at, 1] = bad
            assert leaves._are_finite(values[:, 0]) and not leaves._are_finite(values[:, 1])


def test_tensors_that_differ_in_their_last_bit_are_not_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_CHUNK", 16)
    value = np.arange(12, dtype=np.float32).reshape(6, 2)
    other = value.copy()
    other.view(np.uint32)[5, 1] ^= 1
    save_file({"a": value, "b": value.copy(), "c": other}, tmp_path / "model.safetensors")
    found = files.TensorFiles(tmp_path)
    assert found.are_equal("a", "b") and not found.are_equal("a", "c")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def with_header(path, change):
    """Rewrite the header of a file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def overlap(header):
    header["a.weight"]["data_offsets"] = header["counts"]["data_offsets"]


DAMAGE = {
    "cut short": (lambda p: cut(p, p.stat().st_size - 1), "damaged or cut short .holds"),
    "cut in the header": (lambda p: cut(p, 100), "cut short .no header in its 100 bytes"),
    "empty": (lambda p: cut(p, 0), "cut short .no header in its 0 bytes"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"0"), "damaged or cut short .holds"),
    "a huge header": (lambda p: p.write_bytes(b"\xff" * 99), "cut short .no header"),
    "not JSON": (lambda p: p.write_bytes((4).to_bytes(8, "little") + b"{{{{"), "header: JSON"),
    "a list": (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), "damaged .*header"),
    "of git LFS": (lambda p: p.write_bytes(b"version https://git-lfs"), "run `git lfs pull`"),
    "two at one place": (lambda p: with_header(p, overlap), "damaged .*a.weight of 740 bytes"),
    "negative": (
        lambda p: with_header(p, lambda h: h["counts"].update(shape=[-6])), "damaged .*no tensor"
    ),
    "another shape": (
        lambda p: with_header(p, lambda h: h["counts"].update(shape=[7])), "counts of 56 bytes"
    ),
    "another dtype": (
        lambda p: with_header(p, lambda h: h["counts"].update(dtype="Q4")), "dtype Q4; known are"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named(kind, tmp_path):
    damage, message = DAMAGE[kind]
    path = written(tmp_path) / "model.safetensors"
    damage(path)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*{message}"):
        files.TensorFiles(tmp_path)


def edit(path, **changes):
    content = json.loads(path.read_text("utf-8"))
    content["weight_map"] |= changes
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("file", ["../a.safetensors", "/a.safetensors", "..", "", "C:a", 3, "a.bin",
                                  "..\\a.safetensors"])  # fmt: skip
def test_an_index_that_leads_elsewhere_is_refused(file, tmp_path):
    edit(written(tmp_path, 100) / files.INDEX, counts=file)
    with pytest.raises(ValueError, match="counts must be in a .safetensors file of this directory"):
        files.TensorFiles(tmp_path)


def test_shards_and_index_must_agree(tmp_path):
    index = written(tmp_path, 100) / files.INDEX
    whole = index.read_text("utf-8")
    edit(index, more="model-00001-of-00003.safetensors")
    with pytest.raises(ValueError, match="says that more is in model-00001.*have it in None"):
        files.TensorFiles(tmp_path)
    index.write_text(whole, "utf-8")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shutil.copyfile(tmp_path / "model-00001-of-00003.safetensors", shard)
    with pytest.raises(ValueError, match="is in model-00001.* and model-00002"):
        files.TensorFiles(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors: missing, though"):
        files.TensorFiles(tmp_path)
    index.write_text('{"weight_map": {}}', "utf-8")
    with pytest.raises(ValueError, match="needs a weight_map"):
        files.TensorFiles(tmp_path)


def test_pickles_are_refused_and_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin are pickles.*convert_pickle"):
        files.TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="no model.safetensors and no model.safetensors.index"):
        files.TensorFiles(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        files.TensorFiles(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), ("{", "not JSON"), ("[1]", "expected a JSON object, got list"),
     ("[" * 100_000, "not JSON"), (b"\xff", "not JSON in UTF-8")],
)  # fmt: skip
def test_a_config_that_is_none(content, message, tmp_path):
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        hub.load(tmp_path)


def drop(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


def put(name, value):
    return lambda tensors: tensors | {name: value(tensors)}


KEY = "model.layers.1.self_attn.k_proj.weight"
TENSORS = {
    "missing": (drop(KEY), f"no tensor {KEY}, which config.json asks for"),
    "renamed": (
        lambda t: drop(KEY)(t) | {KEY.replace("k_proj", "k_projection"): t[KEY]},
        f"no tensor {KEY}.*it has model.layers.1.self_attn.k_projection",
    ),
    "extra": (
        put("model.layers.2.self_attn.k_proj.weight", lambda t: t[KEY].copy()),
        "1 tensors that config.json does not ask for, such as model.layers.2.self_attn",
    ),
    "another shape": (
        put(KEY, lambda t: np.ascontiguousarray(t[KEY].T)),
        rf"safetensors: {KEY} has shape \[40, 32\], config.json asks for \[32, 40\]",
    ),
    "another rank": (put(KEY, lambda t: t[KEY].reshape(-1)), r"has shape \[1280\]"),
    "quantised": (put(KEY, lambda t: t[KEY].astype(np.int8)), f"{KEY} has dtype int8; weights"),
    "another head": (
        put("lm_head.weight", lambda t: t["model.embed_tokens.weight"] + 1),
        "lm_head.weight differs from model.embed_tokens.weight, but config.json ties them",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_the_config_does_not_ask_for_are_refused_by_name(kind, tmp_path):
    change, message = TENSORS[kind]
    with pytest.raises(ValueError, match=message):
        hub.load(copied("a2d_qwen3-1", tmp_path, change))


def test_a_tied_head_may_be_stored_and_is_written_back(tmp_path):
    head = put("lm_head.weight", lambda t: t["model.embed_tokens.weight"].copy())
    model = hub.load(copied("a2d_qwen3-1", tmp_path, head))
    assert "head" not in model.params["params"]
    params = {"params": {**model.params["params"]}}
    params["params"]["embedding"] = params["params"]["embedding"] + 1
    saved = load_file(hub.save(tmp_path / "new", model, params=params) / "model.safetensors")
    np.testing.assert_array_equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
    np.testing.assert_array_equal(saved["lm_head.weight"], params["params"]["embedding"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_told(value, tmp_path):
    def spoil(tensors):
        tensors[KEY][3, 3] = value

    with pytest.warns(UserWarning, match=f"NaN or infinite weights in 1 arrays, such as {KEY}"):
        hub.load(copied("a2d_qwen3-1", tmp_path, spoil))


def test_saving_leaves_what_is_there_and_fails_whole(tmp_path):
    model = hub.load(DATA / "a2d_qwen2-2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine", "utf-8")
    with pytest.raises(ValueError, match="full: exists and is not empty"):
        hub.save(tmp_path / "full", model)
    (tmp_path / "empty").mkdir()
    assert hub.save(tmp_path / "empty", model, dtype="float16") == tmp_path / "empty"
    found = files.TensorFiles(tmp_path / "empty")
    assert set(found.dtypes.values()) == {"float16"}
    raw = json.loads((tmp_path / "empty" / "config.json").read_text("utf-8"))
    assert raw == {**model.raw_config, "torch_dtype": "float16"}
    for options, message in (({"dtype": "int8"}, "dtype must be"), ({"max_shard_size": 0}, "byte")):
        with pytest.raises(ValueError, match=message):
            hub.save(tmp_path / "none", model, **options)
    del model.params["params"]["norm"]
    with pytest.raises(KeyError):
        hub.save(tmp_path / "none", model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_side_files_are_copied_and_other_weights_are_not(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    for directory in (source, target):
        directory.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "README.md",
                 "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                 "pytorch_model.bin.index.json", "tf_model.h5", "config.json"):  # fmt: skip
        (source / name).write_text("source", "utf-8")
    (target / "config.json").write_text("target", "utf-8")
    files.copy_side_files(source, target)
    assert {path.name: path.read_text("utf-8") for path in target.iterdir()} == {
        "tokenizer.json": "source",
        "chat_template.jinja": "source",
        "modeling_x.py": "source",
        "LICENSE": "source",
        "README.md": "source",
        "config.json": "target",
    }


def test_settings_and_sources_that_are_none(tmp_path):
    with pytest.raises(TypeError, match=r"no setting norm_eps; it has attention, remat"):
        hub.load(DATA / "a2d_qwen3-1", norm_eps=1e-5)
    for options in ({"dtype": "int8"}, {"param_dtype": "float7"}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be one of float64"):
            hub.load(DATA / "a2d_qwen3-1", **options)
    with pytest.raises(ValueError, match="no such directory; name one with config.json"):
        hub.load(tmp_path / "none")


ARCHITECTURES = {
    ("Qwen3ForCausalML",): "nearest: Qwen3ForCausalLM",
    ("SDARMoeForCausalLM",): "nearest: SDARForCausalLM",
    (
        "BertForMaskedLM",
    ): "BertForMaskedLM .model_type a2d-qwen3. is not supported; .*supported are",
    (): "needs the field architectures",
}


@pytest.mark.parametrize("names", ARCHITECTURES)
def test_unknown_architectures_name_the_nearest(names, tmp_path):
    directory = copied("a2d_qwen3-1", tmp_path, architectures=list(names))
    with pytest.raises(hub.Unsupported, match=ARCHITECTURES[names]):
        hub.load(directory)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CAUSAL = {"architectures": ["Qwen3ForCausalLM"]}
MISTRAL = {"architectures": ["MistralForCausalLM"]}
FIELDS = [
    ("a2d_qwen3-1", {"hidden_act": "gelu"}, "hidden_act='gelu' changes the numbers"),
    ("a2d_qwen3-1", {"attention_bias": True}, "attention_bias=True changes the numbers"),
    ("a2d_qwen3-1", {"rope_theta": ...}, "needs rope_theta"),
    ("a2d_qwen3-1", {"rms_norm_eps": "1e-6"}, "rms_norm_eps must be float, got '1e-6'"),
    ("a2d_qwen3-1", {"rms_norm_eps": float("nan")}, "norm_eps must be a number in"),
    ("a2d_qwen3-1", {"head_dim": ...}, "needs head_dim"),
    ("a2d_qwen3-1", {"head_dim": 15}, "turns pairs: head_dim 15"),
    ("a2d_qwen3-1", {"num_key_value_heads": 3}, "must be a multiple of num_kv_heads 3"),
    ("a2d_qwen3-1", {"num_attention_heads": 0}, "num_heads must be a whole number"),
    ("a2d_qwen3-1", {"vocab_size": True}, "vocab_size must be int, got True"),
    ("a2d_qwen3-1", {"mask_token_id": 296}, "mask_token_id 296 is not one of 296 tokens"),
    ("a2d_qwen3-1", {"eos_token_id": "<eos>"}, "eos_token_id must be int"),
    ("a2d_qwen3-1", {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be bool"),
    ("a2d_qwen3-1", {"tie_word_embeddings": False}, "no tensor lm_head.weight"),
    ("a2d_qwen3-1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 changes"),
    ("a2d_qwen3-1", {"quantization_config": {"bits": 4}}, "quantization_config=.* changes"),
    ("a2d_qwen3-1", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "type 'linear' changes"),
    ("a2d_qwen3-1", {"rope_scaling": {"factor": 2.0}}, "type None changes the numbers"),
    ("a2d_qwen3-1", {"rope_scaling": "yarn"}, "rope_scaling must be dict, got 'yarn'"),
    ("a2d_qwen3-1", {"rope_scaling": {**SCALED, "low_freq_factor": 4.0}}, "out of range"),
    ("a2d_qwen3-1", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
     "rope_parameters contradict rope_theta"),
    ("a2d_llama-1", {"mlp_bias": True}, "mlp_bias=True changes the numbers"),
    ("a2d_llama-1", {"pretraining_tp": 2}, "pretraining_tp=2 changes the numbers"),
    ("a2d_qwen3-1", {**CAUSAL, "use_sliding_window": True}, "use_sliding_window=True changes"),
    ("a2d_qwen3-1", {**CAUSAL, "layer_types": ["full_attention", "sliding_attention"]},
     "layer_types=.* changes the numbers and is not supported; only null"),
    ("a2d_llama-1", {**MISTRAL, "sliding_window": 8}, "sliding_window=8 changes .* only null"),
    ("a2d_llama-1", {**MISTRAL, "sliding_window": ...}, "sliding_window='missing, which is 4096'"),
    ("dream-1", {"use_sliding_window": True}, "use_sliding_window=True changes the numbers"),
    ("sdar-1", {"block_size": ...}, "needs block_size"),
    ("sdar-1", {"block_size": 0}, "block_size must be at least 1"),
    *(("llada-1", {name: value}, f"{name}={value!r} changes the numbers") for name, value in {
        "alibi": True, "activation_type": "swiglu", "block_type": "sequential",
        "layer_norm_type": "default", "layer_norm_with_affine": False,
        "attention_layer_norm_with_affine": False, "bias_for_layer_norm": True,
        "include_bias": True, "input_emb_norm": True, "scale_logits": True, "block_group_size": 2,
        "clip_qkv": 8.0, "rope": False, "rope_full_precision": False, "multi_query_attention": True,
    }.items()),
    *(("llada-1", {name: ...}, f"needs {name}") for name in (
        "rope", "block_type", "layer_norm_type", "activation_type", "weight_tying", "rope_theta",
        "rms_norm_eps")),
    ("lladamoe-1", {"clip_qkv": 8.0}, "clip_qkv=8.0 changes the numbers"),
    ("lladamoe-1", {"rope_scaling": SCALED}, "rope_scaling=.* changes the numbers"),
    ("lladamoe-1", {"attention_bias": True}, "attention_bias=True changes the numbers"),
    ("lladamoe-1", {"hidden_act": "gelu"}, "hidden_act='gelu' changes the numbers"),
    ("lladamoe-1", {"partial_rotary_factor": ...}, "needs partial_rotary_factor"),
    ("lladamoe-1", {"moe_layer_freq": [1]}, "moe_layer_freq must hold 0 .dense. or 1 for each"),
    ("lladamoe-1", {"num_experts_per_tok": 5}, "a mixture needs 1 <= per_token <= count"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), FIELDS)
def test_fields_that_change_the_numbers_are_refused_by_name(name, changes, message, tmp_path):
    directory = tmp_path / "model"  # the config is checked before any tensor is looked at
    directory.mkdir()
    weights = (DATA / name / "model.safetensors").resolve()
    (directory / "model.safetensors").symlink_to(weights)
    write_config(directory, name, changes)
    with pytest.raises(ValueError, match=message) as error:
        hub.load(directory)
    assert str(directory) in str(error.value)
