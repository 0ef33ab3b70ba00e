"""experiments.convert_pickle; what needs torch runs where it is installed."""

import argparse
import json
import os
import pathlib

import numpy as np
import pytest
from checkpoints import DATA

from experiments import convert_pickle
from mdm_jax import hub
from mdm_jax.hub import files

CHECKPOINT = DATA / "mdlm-ckpt-1" / "last.ckpt"


def arrays(*shapes):
    return [np.full(shape, i, np.float32) for i, shape in enumerate(shapes)]


def checkpoint():
    names = ("embedding", "rotary_emb.inv_freq", "norm.weight", "sampling_eps_min")
    state = dict(zip(names, arrays((4, 2), (3,), (2,), ())))
    averages = [array + 100 for name, array in state.items() if name in (names[0], names[2])]
    return {"epoch": 3, "state_dict": state, "ema": {"decay": 0.9, "shadow_params": averages}}


def test_averages_stand_for_the_parameters_and_buffers_are_as_they_were():
    found = convert_pickle.weights(checkpoint())
    assert {name: float(array.flat[0]) for name, array in found.items()} == {
        "embedding": 100,
        "rotary_emb.inv_freq": 1,
        "norm.weight": 102,
        "sampling_eps_min": 3,
    }
    raw = convert_pickle.weights(checkpoint(), raw=True)
    assert raw is not found and float(raw["norm.weight"][0]) == 2
    plain = checkpoint()["state_dict"]
    assert convert_pickle.weights(plain).keys() == plain.keys()


def test_averages_of_another_model_are_refused():
    other = checkpoint()
    other["ema"]["shadow_params"].reverse()
    with pytest.raises(ValueError, match=r"embedding \(4, 2\) against \(2,\); --raw"):
        convert_pickle.weights(other)
    other["ema"]["shadow_params"].pop()
    with pytest.raises(ValueError, match="moving averages, 1, are not those of the 2 parameters"):
        convert_pickle.weights(other)
    with pytest.raises(ValueError, match="no tensors by name; its entries are epoch"):
        convert_pickle.weights({"epoch": 3})


def test_sources_and_targets_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected one file of weights, found none"):
        convert_pickle.sources(tmp_path)
    (tmp_path / "a.bin").touch()
    assert convert_pickle.sources(tmp_path) == [tmp_path / "a.bin"]
    with pytest.raises(ValueError, match="config.json: no such file; .* --config"):
        convert_pickle.convert(tmp_path, tmp_path / "new")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exists; name a new directory"):
        convert_pickle.convert(tmp_path, tmp_path)
    (tmp_path / "b.bin").touch()
    with pytest.raises(ValueError, match=r"found a\.bin, b\.bin; name the file"):
        convert_pickle.sources(tmp_path)


def mdlm_config(path):
    """config.json of the checkpoint's model, in the names of the released ones."""
    facts = json.loads((CHECKPOINT.parent / "reference.json").read_text("utf-8"))["model"]
    names = {"hidden_size": "hidden_dim", "length": "model_length"}
    config = {names.get(name, name): value for name, value in facts.items()}
    config |= {"architectures": ["MDLM"], "time_conditioning": False}
    path.write_text(json.dumps(config), "utf-8")
    return path


@pytest.mark.parametrize("raw", [False, True])
def test_a_training_checkpoint_gives_the_logits_of_its_averages(tmp_path, raw):
    pytest.importorskip("torch")
    config = mdlm_config(tmp_path / "given.json")
    convert_pickle.convert(CHECKPOINT, tmp_path / "model", config, raw)
    model = hub.load(tmp_path / "model")
    with np.load(CHECKPOINT.parent / "reference.npz") as reference:
        logits = np.asarray(model.logits(reference["input_ids"]))
        expected = reference["logits_raw_weights" if raw else "logits"]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)


class Caller:
    """Its pickle calls a function when it is opened."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def test_no_code_of_a_pickle_runs_and_its_tensors_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    ran = tmp_path / "ran"
    tied = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    content = {
        "state_dict": {"embed.weight": tied, "head.weight": tied, "norm.weight": torch.ones(3)},
        "hyper_parameters": [argparse.Namespace(length=14), pathlib.PurePosixPath("a/b"), {1, 2}],
        "callback": Caller(exec, f"open({str(ran)!r}, 'w').close()"),
    }
    (tmp_path / "config.json").write_text("{}")
    source = tmp_path / "model.pt"
    torch.save(content, source)
    names = convert_pickle.convert(tmp_path, tmp_path / "new")
    assert not ran.exists() and names == ["embed.weight", "norm.weight"]
    found = files.TensorFiles(tmp_path / "new")
    assert found.dtypes["embed.weight"] == "bfloat16"
    np.testing.assert_array_equal(found.read("embed.weight"), np.arange(6.0).reshape(2, 3))

    torch.save({**content, "callback": Caller(os.mkdir, str(ran))}, source)
    with pytest.raises(ValueError, match=r"model\.pt: cannot be read as weights alone") as error:
        convert_pickle.convert(tmp_path, tmp_path / "other")
    assert not ran.exists() and "weights_only" not in str(error.value)
    source.write_bytes(source.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"model\.pt: cannot be read as weights alone"):
        convert_pickle.convert(tmp_path, tmp_path / "other")
