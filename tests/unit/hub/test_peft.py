"""Adapters as PEFT 0.21.2 wrote them for tests/data/hub/a2d_qwen3-1 (causal), and as we write."""

import dataclasses
import json
import pathlib
import shutil

import chex
import jax
import numpy as np
import pytest
import tiny

from mdm_jax import hub
from mdm_jax.hub.files import TensorFiles
from mdm_jax.hub.peft import CONFIG, WEIGHTS
from mdm_jax.models import lora

DATA = pathlib.Path(__file__).parents[2] / "data"
PEFT = DATA / "peft"
SPEC = lora.Lora(rank=4, alpha=6.0, dropout=0.1, rslora=True, targets=("down", "query", "value"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """The model as a plain Qwen3, which PEFT adapted."""
    directory = shutil.copytree(DATA / "hub" / "a2d_qwen3-1", tmp_path_factory.mktemp("m") / "qwen")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (directory / "config.json").write_text(json.dumps(raw))
    return hub.load(directory, tokenizer=False)


def test_peft_s_own_directory_gives_peft_s_logits(causal):
    assert hub.read_spec(PEFT, causal) == SPEC
    adapters = hub.load_adapters(PEFT, causal, SPEC)
    with np.load(PEFT / "reference.npz") as arrays:
        ids, expected = arrays["ids"], arrays["logits"]
    unmerged = dataclasses.replace(causal, params=lora.join(causal.params, adapters, SPEC))
    for model in (unmerged, hub.with_adapters(causal, PEFT)):
        np.testing.assert_allclose(model.logits(ids), expected, rtol=0, atol=1e-4)
    assert np.max(np.abs(causal.logits(ids) - expected)) > 1


def test_what_is_written_has_peft_s_fields_keys_and_bits(causal, tmp_path):
    adapters = hub.load_adapters(PEFT, causal, SPEC)
    hub.save_adapters(tmp_path / "out", causal, adapters, SPEC)
    ours, theirs = (TensorFiles(path, WEIGHTS) for path in (tmp_path / "out", PEFT))
    assert (ours.shapes, ours.dtypes) == (theirs.shapes, theirs.dtypes)
    for name in theirs.shapes:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    written, own = (json.loads((path / CONFIG).read_text()) for path in (tmp_path / "out", PEFT))
    own["target_modules"].sort()
    for name in ("auto_mapping", "peft_version"):  # of its own class and release
        own.pop(name), written.pop(name, None)
    assert written == own
    with pytest.raises(ValueError, match="exists and is not empty"):
        hub.save_adapters(tmp_path / "out", causal, adapters, SPEC)
    hub.save_adapters(tmp_path / "narrow", causal, adapters, SPEC, dtype="bfloat16")
    assert set(TensorFiles(tmp_path / "narrow", WEIGHTS).dtypes.values()) == {"bfloat16"}


def test_scanned_layers_and_llada_s_names(tmp_path):
    spec = lora.Lora(rank=2, targets=("down", "gate"))
    for scan in (False, True):
        model = hub.load(DATA / "hub" / "llada-1", tokenizer=False, scan_layers=scan)
        made = tiny.perturbed(lora.init(jax.random.key(0), model.params, spec))
        directory = hub.save_adapters(tmp_path / str(scan), model, made, spec)
        chex.assert_trees_all_equal(hub.load_adapters(directory, model, spec), made)
        names = TensorFiles(directory, WEIGHTS).shapes
        stem = "base_model.model.model.transformer.blocks.1"
        assert names[f"{stem}.ff_proj.lora_A.weight"] == (2, 48)
        assert names[f"{stem}.ff_out.lora_B.weight"] == (48, 2)
        # The head is called ff_out as well.
        pattern = json.loads((directory / CONFIG).read_text())["target_modules"]
        assert pattern == (
            r"model\.transformer\.blocks\.\d+\.ff_out|model\.transformer\.blocks\.\d+\.ff_proj"
        )


def test_what_is_not_computed_is_refused_by_name(causal, tmp_path):
    cases = {
        "use_dora=True": {"use_dora": True},
        "rank_pattern=": {"rank_pattern": {"q_proj": 2}},
        "modules_to_save=": {"modules_to_save": ["lm_head"]},
        "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
        "needs r": {"r": None},
    }
    raw = json.loads((PEFT / CONFIG).read_text())
    for message, changes in cases.items():
        directory = shutil.copytree(PEFT, tmp_path / message)
        (directory / CONFIG).write_text(json.dumps(raw | changes))
        with pytest.raises(ValueError, match=message) as refused:
            hub.read_spec(directory, causal)
        assert CONFIG in str(refused.value)
    with pytest.raises(
        ValueError, match=r'--config.adapter.targets="\(.down., .query., .value.\)"'
    ):
        hub.load_adapters(PEFT, causal, dataclasses.replace(SPEC, targets=("query",)))
    with pytest.raises(ValueError, match="adapter_config.json: no such file"):
        hub.read_spec(DATA / "hub" / "llada-1", causal)
    wrong = hub.describe(DATA / "hub" / "a2d_qwen3-2", tokenizer=False)
    with pytest.raises(ValueError, match=r"has shape \[4, 40\], .* asks for \[4, 48\]|no tensor"):
        hub.load_adapters(PEFT, wrong, SPEC)


def test_a_projection_that_the_class_has_not_is_refused(tmp_path):
    spec = lora.Lora(rank=2, targets=("query",))
    model = hub.load(DATA / "hub" / "mdlm-1")
    adapters = lora.init(jax.random.key(0), model.params, spec)
    with pytest.raises(ValueError, match="mdlm has no linear layer of its own for block_0/att"):
        hub.save_adapters(tmp_path / "out", model, adapters, spec)
