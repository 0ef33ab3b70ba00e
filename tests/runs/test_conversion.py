"""Causal models of others as the start of masked and block models: annealed masks, the shift."""

import json
import pathlib
import shutil
import sys

import chex
import jax
import launching
import numpy as np
import pytest
import tiny
from test_launch_hub import configured

from mdm_jax import files, hub, sharding
from mdm_jax.launch import source
from mdm_jax.launch.build import Experiment, load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, export, train
from mdm_jax.launch.workdir import saved_config
from mdm_jax.models import as_logits

DATA = pathlib.Path(__file__).parents[1] / "data" / "hub"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A directory of Qwen3: the A2D fixture under the name of its causal class."""
    directory = shutil.copytree(DATA / "a2d_qwen3-1", tmp_path_factory.mktemp("causal") / "qwen")
    raw = json.loads((directory / "config.json").read_text())
    raw |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def shifted_config(causal, folder):
    """Of a shifted conversion whose mask is annealed over three steps."""
    return configured(causal, folder, convert={"anneal_steps": 3, "shift": True})


def annealed_logits(experiment, params, rows):
    """By step; one program for all."""

    @tiny.jit
    def logits(step):
        apply_fn = experiment.apply_at(5, step)  # that of steps, of auto and of the noise panel
        return as_logits(apply_fn(params, rows.tokens, None, rows.documents))

    return lambda step: np.asarray(logits(step))


def test_logits_go_from_causal_to_bidirectional(causal, tmp_path, monkeypatch):
    launching.on_one_device(monkeypatch)
    experiment = make_experiment(shifted_config(causal, tmp_path))
    params, rows = hub.load(causal).params, experiment.dataset.valid.rows(np.arange(2))
    before = hub.decoding.shifted(hub.load(causal).logits(rows.tokens, rows.documents))
    apply_fn = tiny.jit(lambda *inputs: as_logits(experiment.apply_fn(*inputs)))
    after = apply_fn(params, rows.tokens, None, rows.documents)
    # A document's first token keeps its own logits here; there the row's first token does.
    begins = rows.documents != np.pad(rows.documents[:, :-1], ((0, 0), (1, 0)))
    kept = (rows.documents > 0) & ~begins
    start, between, end = map(annealed_logits(experiment, params, rows), (0, 2, 3))
    np.testing.assert_allclose(start[kept], before[kept], rtol=0, atol=1e-5)
    np.testing.assert_allclose(end, after, rtol=0, atol=1e-5)
    assert np.abs(between - start)[kept].max() > 1e-2 < np.abs(between - end)[kept].max()


@pytest.mark.slow
def test_chains_and_the_noise_panel_are_measured_under_the_mask_of_the_step(
    causal, tmp_path, monkeypatch
):
    launching.on_one_device(monkeypatch)
    config = configured(causal, tmp_path, convert={"anneal_steps": 400})
    config.variance.order = ("auto",)
    config.variance.auto.update(budget=1.0, passes=4, groups=4, warm_up=2, every=200)
    config.train.update(steps=400, evaluate_every=200, log_every=200, checkpoint_every=0)
    config.panel.cost = 0.5
    asked, apply_at = [], Experiment.apply_at

    def recorded(self, seed, step):
        asked.append((sys._getframe(1).f_code.co_name, step))
        return apply_at(self, seed, step)

    monkeypatch.setattr(Experiment, "apply_at", recorded)
    workdir = files.as_path(tmp_path / "run")
    assert train.train(make_experiment(config, workdir), workdir)
    assert [step for name, step in asked if name == "_measure"] == [0, 200]
    traced = [step for name, step in asked if name == "at_step"]
    assert traced and all(isinstance(step, jax.core.Tracer) for step in traced)
    lines = [json.loads(line) for line in (workdir / "auto.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 200] and all(line["chains"] for line in lines)


def test_the_shift_of_a_conversion_is_saved_and_read(causal, tmp_path):
    hub.save(tmp_path / "out", hub.bidirectional(hub.load(causal), shift=True))
    assert hub.describe(tmp_path / "out").traits.shift
    hub.save(tmp_path / "plain", hub.bidirectional(hub.load(causal)))
    assert not hub.describe(tmp_path / "plain").traits.shift


@pytest.mark.slow
def test_a_shifted_conversion_trains_evaluates_samples_exports_and_reloads(
    causal, tmp_path, monkeypatch
):
    launching.on_one_device(monkeypatch)
    workdir = files.as_path(tmp_path / "run")
    assert train.train(make_experiment(shifted_config(causal, tmp_path), workdir), workdir)
    experiment = make_experiment(saved_config(workdir), workdir)
    assert experiment.source.traits.shift
    assert 0 < evaluate.evaluate(experiment, workdir)["bits_per_unit"] < 40
    drawn = evaluate.sample(experiment, workdir)
    assert "▁" not in "".join(sample["text"] for sample in drawn["samples"])
    export.export(workdir, str(tmp_path / "out"))
    loaded = hub.load(tmp_path / "out")
    assert loaded.family.name == "a2d-qwen3" and loaded.traits.shift
    assert loaded.traits.attention == "bidirectional"
    assert source.filled(experiment.config, loaded).process == "masked"
    rows = experiment.dataset.valid.rows(np.arange(3))
    params = load_parameters(experiment, workdir)[1]
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(params))
    own = as_logits(experiment.apply_fn(params, rows.tokens, None, rows.documents))
    theirs = hub.decoding.shifted(loaded.logits(rows.tokens, rows.documents))
    kept = np.pad(rows.documents[:, :-1], ((0, 0), (1, 0))) & rows.documents > 0
    np.testing.assert_allclose(theirs[kept], own[kept], rtol=0, atol=1e-5)
    written = hub.generate(loaded, [rows.tokens[0][rows.documents[0] > 0][:4]], 4, steps=4)
    assert written.written.sum() == 4


def test_settings_of_a_conversion_are_refused_where_nothing_is_converted(causal, tmp_path):
    for directory, process, given in (
        (DATA / "a2d_qwen3-1", "masked", {"shift": True}),
        (causal, "autoregressive", {"anneal_steps": 5}),
        ("", "masked", {"anneal_steps": 5, "shift": True}),
    ):
        config = configured(directory, tmp_path, convert=given)
        config.process = process
        with pytest.raises(ValueError, match="convert.*leave these settings out"):
            source.read(config)
    config = configured(causal, tmp_path, convert={"shift": True})
    config.process = "block"
    with pytest.raises(ValueError, match="convert.shift.*process=masked"):
        source.read(config)


@pytest.mark.slow
@pytest.mark.parametrize("process", ["masked", "block"])
def test_an_annealed_step_is_the_same_on_one_and_on_eight_devices(process, causal, tmp_path):
    settings = {"process": process, "convert": {"anneal_steps": 4}, "block": {"size": 4}}
    found = []
    for devices in (1, 8):
        with pytest.MonkeyPatch.context() as patch:
            if devices == 1:
                launching.on_one_device(patch)
            config = configured(causal, tmp_path, **settings)
            config.train.batch_size = 8
            experiment = make_experiment(config)
            state = experiment.initial_state().replace(step=jax.numpy.int32(2))
            rows = experiment.dataset.train.rows(np.arange(8))
            batch = sharding.place_batch(rows, sharding.batch_sharding(experiment.mesh))
            state, metrics = jax.jit(experiment.step)(state, batch)
            found.append((float(metrics.loss), float(metrics.gradient_norm)))
    np.testing.assert_allclose(*found, rtol=1e-5)
