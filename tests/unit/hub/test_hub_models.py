"""Loaded models give the logits of the original classes, on the checkpoints of tests/data/hub."""

import dataclasses
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from checkpoints import CLOSE, DATA, copied, loaded, logits, reference, stated
from variants import slow_except

from mdm_jax import corruption, hub, objectives, sharding, training, variance
from mdm_jax.draws import Draw
from mdm_jax.hub import files
from mdm_jax.objectives.objective import sum_losses, token_mean
from mdm_jax.types import Batch

TRANSFORMERS = sorted(
    path.name
    for path in DATA.iterdir()
    if path.name.startswith(("a2d", "llada", "dream", "sdar", "qwen2"))
)
ONE_EACH = {
    "a2d_qwen3-1",
    "a2d_llama-2",
    "dream-1",
    "llada-4",
    "lladamoe-3",
    "qwen2-1",
    "sdar-2",
}


def masked_logits(model, name):
    """Logits where the reference has tokens, and the reference's."""
    arrays = reference(name)
    mask = arrays["attention_mask"] == 1
    found = logits(model, arrays["input_ids"], mask)
    return found[mask], arrays["logits"][mask]


def test_the_checkpoints_are_found():
    assert len(TRANSFORMERS) == 19


@pytest.mark.parametrize("name", slow_except(ONE_EACH, TRANSFORMERS))
def test_float32_logits_are_those_of_the_original_class(name):
    model, arrays = loaded(name), reference(name)
    found, expected = masked_logits(model, name)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, **CLOSE)
    unmasked = logits(model, arrays["input_ids"][1:3])
    np.testing.assert_allclose(unmasked, arrays["logits_no_mask"], **CLOSE)


@pytest.mark.slow
def test_given_positions_of_a_causal_model():
    """As in a left-padded batch of a generation."""
    arrays = reference("qwen2-1")
    mask, given = arrays["attention_mask"] == 1, {"positions": arrays["position_ids"]}
    found = logits(loaded("qwen2-1"), arrays["input_ids"], mask, **given)
    np.testing.assert_allclose(found[mask], arrays["logits_positions"][mask], **CLOSE)


def test_logits_are_compiled_once_a_shape_for_all_parameters():
    model, ids, traces = loaded("a2d_qwen3-1"), reference("a2d_qwen3-1")["input_ids"][1:3], []

    def network(*inputs):
        traces.append(None)
        return model.family.outputs(*inputs)

    counted = dataclasses.replace(model, family=dataclasses.replace(model.family, outputs=network))
    first = counted.logits(ids)
    zeros = jax.tree.map(jnp.zeros_like, model.params)
    assert not np.any(dataclasses.replace(counted, params=zeros).logits(ids))
    np.testing.assert_array_equal(counted.logits(jnp.asarray(ids, jnp.int16)), first)
    assert len(traces) == 1


BF16 = [name for name in TRANSFORMERS if stated(name)["stored_dtype"] == "bfloat16"]


@pytest.mark.parametrize("name", slow_except({"a2d_qwen3-3", "llada-3"}, BF16))
def test_bfloat16_is_as_close_as_the_original_in_bfloat16(name):
    """No further from float32 than the original class run in bfloat16, at most and on average."""
    model = loaded(name, None)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    found, expected = masked_logits(model, name)
    theirs = reference(name)["logits_bf16"][reference(name)["attention_mask"] == 1]
    distance, allowed = np.abs(found - expected), np.abs(theirs - expected)
    assert 1e-3 < distance.max() <= allowed.max()
    assert distance.mean() <= allowed.mean()


@pytest.mark.parametrize("name", slow_except(ONE_EACH, TRANSFORMERS))
def test_saving_gives_the_same_tensors(name, tmp_path):
    """To the bit, from float32 parameters too; config.json and the tokenizer as they were."""
    model = loaded(name)
    target = hub.save(tmp_path / "model", model, max_shard_size=30_000)
    before, after = files.TensorFiles(DATA / name), files.TensorFiles(target)
    assert (after.shapes, after.dtypes) == (before.shapes, before.dtypes)
    assert len(set(after.file_of.values())) > 1
    for tensor in before.shapes:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    for file in DATA.joinpath(name).glob("*.json"):
        if file.name != files.INDEX:
            contents = [
                json.loads((d / file.name).read_text("utf-8")) for d in (target, DATA / name)
            ]
            assert contents[0] == contents[1]


@pytest.mark.parametrize("name", slow_except({"lladamoe-1"}, ["a2d_llama-2", "lladamoe-1"]))
def test_scanned_layers_are_the_same_model_and_the_same_file(name, tmp_path):
    model = loaded(name, scan_layers=True)
    np.testing.assert_allclose(*masked_logits(model, name), **CLOSE)
    before, after = (
        files.TensorFiles(DATA / name),
        files.TensorFiles(hub.save(tmp_path / "m", model)),
    )
    for tensor in before.shapes:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor


def test_layers_of_two_kinds_are_not_scanned():
    with pytest.raises(ValueError, match=r"only the blocks \(1,\) have experts"):
        hub.load(DATA / "lladamoe-2", scan_layers=True)


def plain_forward(name, input_ids, causal):
    """Logits of a Llama or Qwen3 in NumPy float64, from the description of the layout alone."""
    raw = json.loads((DATA / name / "config.json").read_text("utf-8"))
    found = files.TensorFiles(DATA / name)
    heads, groups = raw["num_attention_heads"], raw["num_key_value_heads"]
    size = raw.get("head_dim") or raw["hidden_size"] // heads

    def get(tensor):
        return found.read(tensor).astype(np.float64)

    def norm(x, tensor):
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + raw["rms_norm_eps"])
        return x * get(tensor)

    length, half = input_ids.shape[1], size // 2
    angle = np.arange(length)[:, None] * raw["rope_theta"] ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = get("model.embed_tokens.weight")[input_ids]
    for i in range(raw["num_hidden_layers"]):
        block = f"model.layers.{i}."
        h = norm(x, f"{block}input_layernorm.weight")
        q, k, v = (
            (h @ get(f"{block}self_attn.{part}_proj.weight").T).reshape(*h.shape[:2], -1, size)
            for part in "qkv"
        )
        if f"{block}self_attn.q_norm.weight" in found.shapes:
            q, k = (norm(a, f"{block}self_attn.{p}_norm.weight") for a, p in ((q, "q"), (k, "k")))
        q, k = rotate(q), rotate(k)
        k, v = (np.repeat(a, heads // groups, axis=2) for a in (k, v))
        scores = np.einsum("nqhd,nkhd->nhqk", q, k) / size**0.5
        if causal:
            scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = np.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*h.shape[:2], -1)
        x = x + y @ get(f"{block}self_attn.o_proj.weight").T
        h = norm(x, f"{block}post_attention_layernorm.weight")
        gate, up = (h @ get(f"{block}mlp.{part}_proj.weight").T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ get(f"{block}mlp.down_proj.weight").T
    head = "model.embed_tokens" if raw["tie_word_embeddings"] else "lm_head"
    return norm(x, "model.norm.weight") @ get(f"{head}.weight").T


@pytest.mark.parametrize(
    ("name", "architecture", "family"),
    [
        ("a2d_qwen3-1", "Qwen3ForCausalLM", "qwen3"),
        pytest.param("a2d_llama-1", "LlamaForCausalLM", "llama", marks=pytest.mark.slow),
        pytest.param("a2d_llama-1", "MistralForCausalLM", "mistral", marks=pytest.mark.slow),
    ],
)
def test_causal_models_under_both_masks(name, architecture, family, tmp_path):
    """Against NumPy, which gives the recorded logits of the bidirectional class, too."""
    changes = {"architectures": [architecture], "model_type": family, "sliding_window": None}
    model, arrays = hub.load(copied(name, tmp_path, **changes)), reference(name)
    ids = arrays["input_ids"][1:3]
    assert (model.family.name, model.traits.attention) == (family, "causal")
    causal, both_ways = (plain_forward(name, ids, causal) for causal in (True, False))
    np.testing.assert_allclose(both_ways, arrays["logits_no_mask"], **CLOSE)
    np.testing.assert_allclose(logits(model, ids), causal, **CLOSE)
    assert np.abs(causal - both_ways).max() > 1

    if family == "mistral":
        with pytest.raises(ValueError, match="mistral has no bidirectional counterpart"):
            hub.bidirectional(model)
        return
    converted = hub.bidirectional(model)
    np.testing.assert_allclose(logits(converted, ids), both_ways, **CLOSE)
    again = hub.load(hub.save(tmp_path / "a2d", converted))
    assert again.family.name == f"a2d-{family}" and again.traits.attention == "bidirectional"
    assert again.raw_config["model_type"] == f"a2d-{family}"


MESHES = {"fsdp 8": {"fsdp": 8}, "fsdp 2 x tensor 4": {"data": 1, "fsdp": 2, "tensor": 4}}


@pytest.mark.parametrize("name", slow_except({"lladamoe-2"}, ["a2d_qwen3-1", "lladamoe-2"]))
@pytest.mark.parametrize("axes", slow_except({"fsdp 2 x tensor 4"}, MESHES))
def test_logits_on_eight_devices(axes, name):
    """Two key-value heads on four devices are kept whole, with a message."""
    mesh = sharding.make_mesh(**MESHES[axes])
    with warnings.catch_warnings(record=True) as told:
        model = hub.load(DATA / name, dtype="float32", mesh=mesh)
    messages = [str(warning.message) for warning in told]
    cut = any("2 key-value heads do not divide by tensor=4" in text for text in messages)
    assert cut == ("tensor" in axes)
    kernel = model.params["params"]["block_0"]["attention"]["query"]["kernel"]
    shard = (kernel.shape[0] // mesh.shape["fsdp"], kernel.shape[1] // mesh.shape["tensor"])
    assert {each.data.shape for each in kernel.addressable_shards} == {shard}
    jax.tree.map(np.testing.assert_array_equal, model.params, loaded(name).params)

    arrays = reference(name)
    mask = arrays["attention_mask"] == 1
    apply = functools.partial(model.family.outputs, model.model)

    def network(params, ids):
        return apply(params, model.traits, ids, mask).logits()

    run = sharding.sharded_apply(network, mesh, sharding.LOGICAL_RULES)
    found = np.asarray(tiny.jit(run)(model.params, arrays["input_ids"]))
    np.testing.assert_allclose(found[mask], arrays["logits"][mask], **CLOSE)


def test_query_heads_that_the_mesh_would_cut_are_refused():
    with pytest.raises(ValueError, match="6 attention heads do not split over tensor=4"):
        hub.load(DATA / "llada-2", mesh=sharding.make_mesh(fsdp=2, tensor=4))


def apply_of(model, mask_id=None):
    """``apply(params, inputs, logsnr, documents)``, predictions where they belong.

    With ``mask_id`` its logit is there a second time, behind the others. Objectives leave out the
    mask token, and this copy stands for it where the softmax is over all tokens.
    """

    def apply(params, inputs, logsnr=None, documents=None):
        raw = model.model.apply(params, inputs, logsnr, documents)
        raw = jnp.concatenate([raw[:, :1], raw[:, :-1]], 1) if model.traits.shift else raw
        return raw if mask_id is None else jnp.concatenate([raw, raw[..., mask_id, None]], -1)

    return apply


BOUNDS = ["a2d_qwen3-1", "llada-1", "dream-1"]


@pytest.mark.parametrize("name", slow_except({"a2d_qwen3-1", "dream-1"}, BOUNDS))
def test_the_masked_bound_is_the_loss_that_dllm_trains(name):
    """On recorded masks and times; its three normalisers are divisions of the same sums.

    Its softmax is over the mask token too, which the bound leaves out (SUBS).
    """
    model, arrays, facts = loaded(name), reference(name), stated(name)
    rate, masked = arrays["train_t"][:, None], arrays["train_loss_mask"]
    labels, visible = arrays["train_labels"] != -100, arrays["train_attention_mask"] == 1
    batch = Batch(arrays["train_ids"], labels, visible.astype(np.int32), labels.sum(1))
    draw = Draw(
        u=jnp.asarray(1 - rate)[None],
        log_weight=jnp.zeros((1, *rate.shape)),
        noise=jnp.asarray(np.where(masked, rate / 2, (1 + rate) / 2))[None],
    )
    mask_id = facts["mask_token_id"]
    bound = objectives.masked_nelbo(corruption.bernoulli(mask_id))

    def loss(params, apply):
        stats = bound.loss(functools.partial(apply, params), batch, draw)
        return sum_losses(draw, stats), stats

    sums, stats = tiny.jit(functools.partial(loss, apply=apply_of(model, mask_id)))(model.params)
    np.testing.assert_array_equal(stats.targets[0, :, 0], masked.sum(1))
    rows, tokens = np.asarray(stats.weight * stats.raw)[0, :, 0], labels.sum(1)
    expected = facts["train_loss"]
    ours = {
        "token": token_mean(sums.loss, sums.eligible),
        "sequence": np.mean(rows / tokens),
        "batch": np.mean(rows),
    }
    for normaliser, value in ours.items():
        np.testing.assert_allclose(value, expected[normaliser], rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_small_updates_need_float32_parameters(param_dtype):
    """A training step in bfloat16; parameters in bfloat16 round steps of 1e-5 away."""
    model = hub.load(DATA / "a2d_qwen3-3", dtype="bfloat16", param_dtype=param_dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {param_dtype}
    bound = objectives.masked_nelbo(corruption.fixed_count(stated("a2d_qwen3-3")["mask_token_id"]))
    spec, optimizer = bound.spec(4, 8), optax.adam(1e-5)
    chain = variance.chain(variance.stratified(), variance.mirror())
    state = training.new_state(model.params, optimizer, chain, spec)
    ids = np.arange(32, dtype=np.int32).reshape(4, 8)
    batch = Batch(ids, np.ones(ids.shape, bool), np.ones(ids.shape, np.int32), np.full(4, 8))
    step = training.make_train_step(apply_of(model), bound, chain, optimizer, spec, seed=0)
    new, metrics = jax.jit(step)(state, batch)
    assert np.isfinite(metrics.loss) and metrics.skipped == 0
    before, after = (s.params["params"]["norm"]["scale"] for s in (state, new))
    assert after.dtype.name == param_dtype
    moved = np.asarray(before != after)
    assert moved.all() if param_dtype == "float32" else not moved.any()
    assert {leaf.dtype.name for leaf in jax.tree.leaves(new.ema)} == {"float32"}
