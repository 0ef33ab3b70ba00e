"""MDLM, BD3-LM and Duo: what the original classes compute, on the checkpoints of tests/data/hub."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from checkpoints import CLOSE, DATA, copied, loaded, logits, reference, stated
from variants import slow_except

from mdm_jax import hub, models, sharding
from mdm_jax.hub import files
from mdm_jax.models import masks
from mdm_jax.models.cross_entropy import exclude_token, token_nats
from mdm_jax.objectives.losses import bound_rate
from mdm_jax.samplers.uniform import reverse_logits

MDLM, BD3LM = ("mdlm-1", "mdlm-2", "mdlm-3"), ("bd3lm-1", "bd3lm-2", "bd3lm-3")
EPS = 1e-3  # of the schedules of MDLM and Duo


def subs_log_probs(raw, ids, mask_id):
    """SUBS of the MDLM repository: the mask token is excluded, what is not masked is known."""
    log_probs = np.array(jax.nn.log_softmax(exclude_token(raw, mask_id), axis=-1))
    log_probs[..., mask_id] = (raw[..., mask_id] - 1e6) - np.log(np.exp(raw).sum(-1))
    log_probs[ids != mask_id] = -1e6
    known = np.nonzero(ids != mask_id)
    log_probs[(*known, ids[known])] = 0
    return log_probs


def assert_subs(raw, ids, arrays, mask_id):
    """The mask token's own entry, about -1e6, has the resolution of float32 there, 0.06."""
    found, expected = subs_log_probs(raw, ids, mask_id), arrays["subs_log_probs"]
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-4)


def cross_entropy(raw, arrays, ids, mask_id):
    where = arrays["loss_mask"].astype(bool)
    assert np.all(ids[where] == mask_id)
    return np.asarray(token_nats(raw, arrays["target_ids"].astype(np.int32), where, mask_id))


@pytest.mark.parametrize("name", slow_except({"mdlm-3"}, MDLM))
def test_mdlm_logits_and_losses(name):
    model, arrays = loaded(name), reference(name)
    ids, mask_id = arrays["input_ids"], stated(name)["mask_index"]
    assert model.traits == hub.Traits(
        vocab_size=model.config.vocab_size,
        mask_id=mask_id,
        length=model.raw_config["model_length"],
        time_conditioning=model.raw_config["time_conditioning"],
    )
    raw = logits(model, ids, timesteps=arrays["timesteps_sigma"])
    assert raw.dtype == np.float32
    np.testing.assert_allclose(raw, arrays["logits"], **CLOSE)
    if "logits_sigma0" in arrays:
        found = logits(model, ids, timesteps=np.zeros(len(ids)))
        np.testing.assert_allclose(found, arrays["logits_sigma0"], **CLOSE)
        assert np.abs(found - raw).max() > 0.1  # the level matters

    assert_subs(raw, ids, arrays, mask_id)
    nats = cross_entropy(raw, arrays, ids, mask_id)
    np.testing.assert_allclose(nats, arrays["subs_token_nll"], **CLOSE)
    weight = arrays["dsigma"] / np.expm1(arrays["timesteps_sigma"])
    tolerance = {"rtol": 0, "atol": 1e-4 * max(1.0, weight.max())}
    np.testing.assert_allclose(nats * weight[:, None], arrays["subs_token_loss"], **tolerance)


@pytest.mark.parametrize("name", slow_except({"bd3lm-1"}, BD3LM))
def test_bd3lm_logits_and_losses(name):
    model, arrays, facts = loaded(name), reference(name), stated(name)
    length, size, mask_id = facts["model_length"], facts["block_size"], facts["mask_index"]
    assert (model.traits.attention, model.traits.block_size) == ("block", size)
    assert (model.traits.length, model.traits.mask_id) == (length, mask_id)
    rule = masks.block_training(length, size)
    np.testing.assert_array_equal(np.asarray(rule.dense())[0, 0], arrays["train_mask"] != 0)

    both = arrays["concat_ids"]
    noised = both[:, :length]
    raw = logits(model, both)
    np.testing.assert_allclose(raw, arrays["logits"], **CLOSE)
    assert_subs(raw, noised, arrays, mask_id)
    nats = cross_entropy(raw, arrays, noised, mask_id)
    expected = arrays["subs_token_loss"] * arrays["t_per_token"]
    np.testing.assert_allclose(nats, expected, **CLOSE)
    row = logits(model, arrays["block_causal_ids"], sample_mode=True)
    np.testing.assert_allclose(row, arrays["block_causal_logits"], **CLOSE)
    clean = arrays["clean_block_causal_logits"]  # of fewer blocks, which see no later ones
    row = logits(model, both[:, length:], sample_mode=True)[:, : clean.shape[1]]
    np.testing.assert_allclose(row, clean, **CLOSE)


def test_bd3lm_decodes_with_a_cache_as_the_original_trains():
    """Logits of block 2 after the clean blocks 0 and 1; the network runs 4 tokens, not 32."""
    model, arrays = loaded("bd3lm-1"), reference("bd3lm-1")
    size, length = 4, 16
    noised, clean = np.split(arrays["concat_ids"].astype(np.int32), 2, axis=1)
    decoder = models.cached_block_decoder(model.model, size)
    documents = np.ones((3, 2 * size), np.int32)

    def run(params):
        memory = decoder.append(params, decoder.init(3, length), clean[:, :8], documents)
        part = noised[:, 8:12], np.zeros((3, 1), np.float32), documents[:, :4]
        return decoder.logits(params, memory, *part)

    found = tiny.jit(run)(model.params)
    np.testing.assert_allclose(found, arrays["logits"][:, 8:12], **CLOSE)


@pytest.mark.slow
def test_bd3lm_trains_in_one_pass_as_the_original():
    model, arrays = loaded("bd3lm-1"), reference("bd3lm-1")
    noised, clean = np.split(arrays["concat_ids"].astype(np.int32), 2, axis=1)
    in_one_pass = tiny.jit(models.block_apply(model.model, 4))
    found = in_one_pass(model.params, np.concatenate([noised, clean], axis=1))
    np.testing.assert_allclose(found, arrays["logits"], **CLOSE)


def test_duo_logits_of_tokens_of_distributions_and_of_weighted_tokens():
    model, arrays = loaded("duo-1"), reference("duo-1")
    assert model.traits.mask_id is None and model.traits.time_conditioning
    sigma = arrays["timesteps_sigma"]
    raw = logits(model, arrays["input_ids"], timesteps=sigma)
    np.testing.assert_allclose(raw, arrays["logits"], **CLOSE)
    log_probs = jax.nn.log_softmax(raw, axis=-1)
    np.testing.assert_allclose(log_probs, arrays["log_probs"], **CLOSE)
    soft = logits(model, arrays["soft_inputs"], timesteps=sigma)
    np.testing.assert_allclose(soft, arrays["soft_logits"], **CLOSE)
    mixed = logits(model, arrays["topk_ids"], timesteps=sigma, weights=arrays["topk_weights"])
    np.testing.assert_allclose(mixed, arrays["topk_logits"], **CLOSE)


def test_udlm_logits():
    """A class of its own with the parameters of Duo's."""
    model, arrays = loaded("udlm-1"), reference("udlm-1")
    assert (model.family.name, model.traits.time_conditioning) == ("udlm", True)
    found = logits(model, arrays["input_ids"], timesteps=arrays["timesteps_sigma"])
    np.testing.assert_allclose(found, arrays["logits"], **CLOSE)


@pytest.mark.slow
def test_duo_losses_and_steps_are_those_of_the_uniform_process():
    model, arrays = loaded("duo-1"), reference("duo-1")
    logsnr = masked_level(arrays["t"])
    raw = tiny.jit(model.model.apply)(model.params, arrays["input_ids"].astype(np.int32), logsnr)
    ids = (arrays[name].astype(np.int32) for name in ("input_ids", "target_ids"))
    nats = (1 - EPS) * np.asarray(bound_rate(raw, *ids, logsnr))
    np.testing.assert_allclose(nats, arrays["nll_per_token"], rtol=1e-4, atol=1e-4)
    survival = arrays["posterior_alpha_s"].astype(np.float64)
    next_logsnr = np.log(survival / (1 - survival)).astype(np.float32)[:, None, None]
    step = reverse_logits(raw, arrays["input_ids"], logsnr[:, None], next_logsnr)
    np.testing.assert_allclose(jax.nn.softmax(step), arrays["posterior"], rtol=0, atol=1e-5)


def masked_level(t):
    """[N, 1] logSNR of the log-linear schedule at times t: survival is 1 - (1 - eps) t."""
    survival = 1 - (1 - EPS) * t.astype(np.float64)
    return np.log(survival / (1 - survival)).astype(np.float32)[:, None]


def test_our_levels_are_the_noise_levels_of_mdlm():
    """What an objective calls, ``apply(params, inputs, logsnr)``, at the times of the reference."""
    model, arrays = loaded("mdlm-3"), reference("mdlm-3")
    run = tiny.jit(model.model.apply)
    ids = arrays["input_ids"].astype(np.int32)
    raw = run(model.params, ids, masked_level(arrays["t"]))
    np.testing.assert_allclose(raw, arrays["logits"], **CLOSE)


def test_bfloat16_is_as_close_as_the_original_in_bfloat16():
    model, arrays = loaded("mdlm-3", None), reference("mdlm-3")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {"bfloat16"}
    raw = logits(model, arrays["input_ids"], timesteps=arrays["timesteps_sigma"])
    distance = np.abs(raw - arrays["logits"]).max()
    assert 1e-3 < distance <= stated("mdlm-3")["bf16_autocast_vs_fp32_max_abs"]


@pytest.mark.slow
def test_scanned_layers_are_read_as_unrolled_ones():
    model, arrays = loaded("mdlm-2", scan_layers=True), reference("mdlm-2")
    assert model.params["params"]["blocks"]["block"]["attention"]["key"]["kernel"].shape == (
        3,
        48,
        48,
    )
    raw = logits(model, arrays["input_ids"])
    np.testing.assert_allclose(raw, arrays["logits"], **CLOSE)


def test_shards_of_queries_keys_and_values_come_from_their_rows_of_one_tensor():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharded, whole = loaded("mdlm-1", "float32", mesh=mesh).params, loaded("mdlm-1").params
    kernel = sharded["params"]["block_0"]["attention"]["value"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    jax.tree.map(np.testing.assert_array_equal, sharded, whole)


@pytest.mark.parametrize(
    "name", slow_except({"mdlm-3", "bd3lm-2", "udlm-1"}, (*MDLM, *BD3LM, "duo-1", "udlm-1"))
)
def test_saving_gives_the_same_tensors(name, tmp_path):
    """To the bit, buffers included: rotary frequencies, and the range of masking rates."""
    target = hub.save(tmp_path / "model", loaded(name, None, scan_layers=name == "bd3lm-2"))
    before, after = files.TensorFiles(DATA / name), files.TensorFiles(target)
    assert (after.shapes, after.dtypes) == (before.shapes, before.dtypes)
    for tensor in before.shapes:
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor))
    config = json.loads((target / "config.json").read_text("utf-8"))
    assert config == json.loads((DATA / name / "config.json").read_text("utf-8"))


@pytest.mark.parametrize(("name", "clip"), [("bd3lm-1", (0.001, 0.999)), ("bd3lm-3", (0.3, 0.8))])
def test_the_range_of_masking_rates_is_read_from_buffers(name, clip):
    assert loaded(name, None).traits.clip == clip
    bare = dataclasses.replace(loaded(name, None).traits, clip=None)
    other = files.TensorFiles(DATA / "mdlm-1")
    assert loaded(name, None).family.read_buffers(bare, other).clip is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mdlm-1", {"cond_dim": None}, "needs cond_dim"),
        ("mdlm-1", {"time_conditioning": None}, "needs time_conditioning"),
        ("mdlm-1", {"n_heads": 3}, "width 32 must be a multiple of 2"),
        ("bd3lm-1", {"adaln": False}, "adaln=False changes the numbers"),
        ("bd3lm-1", {"causal": True}, "causal=True changes the numbers"),
        ("bd3lm-1", {"block_size": 17}, "block_size 17 is not one of 1 to 16"),
        ("duo-1", {"causal": True}, "causal=True changes the numbers"),
        ("udlm-1", {"cfg": True}, "cfg=True changes the numbers"),
        ("mdlm-1", {"n_blocks": 3}, "no tensor backbone.blocks.2"),
        ("mdlm-1", {"n_blocks": 1}, "tensors that config.json does not ask for"),
        ("mdlm-1", {"hidden_dim": 64}, r"has shape \[61, 32\], config.json asks for \[61, 64\]"),
    ],
)
def test_configs_of_other_numbers_are_refused(name, changes, message, tmp_path):
    directory = copied(name, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        hub.load(directory)


def test_inputs_that_the_original_would_not_take_are_refused():
    ids = np.zeros((2, 10), np.int32)
    with pytest.raises(ValueError, match=r"needs timesteps \[N\]"):
        loaded("mdlm-3").logits(ids)
    with pytest.raises(ValueError, match=r"\[N, 32\]; got \(2, 10\).*sample_mode=True"):
        loaded("bd3lm-1").logits(ids)
