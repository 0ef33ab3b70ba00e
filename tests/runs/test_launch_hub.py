"""Runs that begin from models of others: trained, resumed, read, exported, talked to."""

import dataclasses
import io
import json
import os
import pathlib
import shutil

import chex
import jax
import launching
import numpy as np
import pytest
import saved_run
from variants import slow_except

from mdm_jax import data, files, hub, models, training, variance
from mdm_jax.hub import decoding
from mdm_jax.hub.files import TensorFiles
from mdm_jax.launch import config as launch_config
from mdm_jax.launch import presets, source
from mdm_jax.launch.build import load_parameters, make_experiment, open_workdir
from mdm_jax.launch.datasets import dataset as make_dataset
from mdm_jax.launch.modes import chat, evaluate, export, measure, train
from mdm_jax.launch.sampling import screen as screens
from mdm_jax.launch.workdir import WorkdirError, claim, saved_config

DATA = pathlib.Path(__file__).parents[1] / "data" / "hub"


def configured(directory, folder, **settings):
    """A run of four steps from a model, on pairs of a file in ``folder``."""
    path = folder / "pairs.jsonl"
    pairs = ({"prompt": f"{i}+1", "answer": f"{i + 1} yes"} for i in range(40))
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = presets.finetune("smoke")
    config.model.source = str(directory)
    config.data.update(source="jsonl", path=str(path), prompt_length=8, answer_length=8)
    config.data.fractions = (0.6, 0.2, 0.2)
    config.optimizer.peak = 0.1
    config.update(settings)
    return config


def without_tokenizer(name, folder, **settings):
    """A run of four steps from a model of the DiT, whose directories have no tokenizer."""
    raw = json.loads((DATA / name / "config.json").read_text())
    characters = "".join(map(chr, range(97, 97 + raw["vocab_size"] - 4)))
    codec = data.tokenizers.CharTokenizer(characters)
    codec.save(folder / "tokenizer.json")
    text = np.random.default_rng(0).choice([*characters], 40 * raw["model_length"])
    (folder / "text.txt").write_text("".join(text))
    config = presets.finetune("smoke")
    config.model.source = str(DATA / name)
    config.data.update(source="text", path=str(folder / "text.txt"), length=raw["model_length"])
    config.data.tokenizer = str(folder / "tokenizer.json")
    config.sample.update(num_samples=1, gap=0)
    config.update(settings)
    return config


@pytest.fixture(scope="module", params=slow_except({"a2d_qwen3-1"}, ["a2d_qwen3-1", "llada-1"]))
def run(request, tmp_path_factory):
    """(original, workdir, experiment) of a run whose source has gone since."""
    folder = tmp_path_factory.mktemp("hub")
    moved = shutil.copytree(DATA / request.param, folder / "model")
    workdir = files.as_path(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        launching.on_one_device(patch)
        experiment = make_experiment(configured(moved, folder), workdir)
        assert train.train(experiment, workdir)
        shutil.rmtree(moved)
        yield DATA / request.param, workdir, make_experiment(saved_config(workdir), workdir)


def restored(experiment, workdir):
    checkpoints = open_workdir(workdir)
    state = checkpoints.restore_last(experiment.abstract_state()).state
    checkpoints.close()
    return state


def test_the_workdir_says_what_the_run_began_from_and_has_all_but_the_weights(run):
    original, workdir, experiment = run
    notes = files.read_json(workdir / "source" / "mdm_jax.json")
    assert notes["source"] == saved_config(workdir).model.source
    assert notes["fingerprint"] == hub.files.fingerprint(original)
    assert notes["dtypes"] == TensorFiles(original).dtypes
    config = saved_config(workdir)
    assert (config.model.width, config.model.depth) == (
        experiment.source.config.width,
        experiment.source.config.depth,
    )
    size = sum(files.size(path) for path in files.below(workdir / "source"))
    weights = sum(path.stat().st_size for path in original.glob("*.safetensors"))
    assert files.size(workdir / "source" / "model.safetensors") < 200 < weights < size + weights


def test_training_moves_the_parameters_of_the_source(run):
    original, workdir, experiment = run
    begun = hub.load(original).params
    state = restored(experiment, workdir)
    assert jax.tree.structure(state.params) == jax.tree.structure(begun)
    for before, now in zip(jax.tree.leaves(begun), jax.tree.leaves(state.params)):
        assert 0 < np.max(np.abs(np.asarray(now) - before)) < 0.5  # warm-up of two steps


def test_a_run_resumes_to_the_same_bits_when_its_source_has_gone(run, tmp_path):
    _, workdir, experiment = run
    again = files.as_path(shutil.copytree(workdir, tmp_path / "again"))
    for path in ("last/4", "best"):
        shutil.rmtree(again / "checkpoints" / path)
    assert train.train(make_experiment(saved_config(again), again), again)
    ours, theirs = restored(experiment, again), restored(experiment, workdir)
    chex.assert_trees_all_equal(ours, theirs)


def test_evaluation_and_samples_need_no_source(run):
    _, workdir, experiment = run
    record = evaluate.evaluate(experiment, workdir)
    assert record["step"] in (2, 4) and 0 < record["bits_per_unit"] < 40
    drawn = evaluate.sample(experiment, workdir)
    assert [sample["kind"] for sample in drawn["samples"]] == ["answer"] * 3
    assert "▁" not in "".join(sample["text"] for sample in drawn["samples"])


@pytest.mark.parametrize("which", ["ema", pytest.param("last", marks=pytest.mark.slow)])
def test_an_exported_run_has_the_files_of_its_source_and_its_own_logits(
    run, which, tmp_path, monkeypatch, capsys
):
    original, workdir, experiment = run
    options = [] if which == "ema" else ["--parameters=last"]
    target = tmp_path / "made" / "out"
    done = launching.call(
        monkeypatch, capsys, "--mode=export", f"--workdir={workdir}", f"--to={target}", *options
    )
    assert done[0] == 0 and experiment.source.family.name in done[1], done
    expected = load_parameters(experiment, workdir)[1]
    if which == "last":
        expected = restored(experiment, workdir).params
    made, before = TensorFiles(target), TensorFiles(original)
    assert (made.shapes, made.dtypes) == (before.shapes, before.dtypes)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert json.loads((target / name).read_text()) == json.loads((original / name).read_text())
    assert not (target / "mdm_jax.json").exists()
    loaded = hub.load(target)
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(expected))
    rows = experiment.dataset.valid.rows(np.arange(3))
    own = experiment.model.apply(expected, rows.tokens, None, rows.documents)
    theirs = loaded.logits(rows.tokens, rows.documents)
    kept = rows.documents == 1
    np.testing.assert_allclose(theirs[kept], own[kept], rtol=0, atol=1e-5)


def test_export_refuses_what_is_there_and_a_missing_run(run, tmp_path, monkeypatch, capsys):
    _, workdir, _ = run
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    arguments = {
        "exists and is not empty": (f"--workdir={workdir}", f"--to={tmp_path / 'full'}"),
        "--to is required": (f"--workdir={workdir}",),
        "holds no run": (f"--workdir={tmp_path / 'none'}", f"--to={tmp_path / 'new'}"),
        "dtype must be one of": (f"--workdir={workdir}", f"--to={tmp_path / 'x'}", "--dtype=int4"),
    }
    for message, given in arguments.items():
        code, _, error = launching.call(monkeypatch, capsys, "--mode=export", *given)
        assert code == 2 and message in error


def test_a_source_that_changed_before_the_first_step_is_refused(tmp_path):
    moved = shutil.copytree(DATA / "llada-1", tmp_path / "model")
    config = configured(moved, tmp_path)
    workdir = files.as_path(tmp_path / "run")
    model = source.read(config, workdir)
    source.keep(config, model, workdir)
    source.keep(config, model, workdir)
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(WorkdirError, match="has changed since"):
        source.keep(config, model, workdir)


def test_a_model_is_evaluated_before_any_training(tmp_path, monkeypatch, capsys):
    launching.on_one_device(monkeypatch)
    config = configured(DATA / "llada-1", tmp_path)
    experiment = make_experiment(config)
    step, params = load_parameters(experiment, files.as_path(tmp_path / "run"))
    assert step == 0
    chex.assert_trees_all_equal(params, hub.load(DATA / "llada-1").params)
    ours = (f"--config.data.{name}={config.data[name]}" for name in ("source", "path"))
    lengths = (f"--config.data.{name}_length=8" for name in ("prompt", "answer"))
    code, out, error = launching.call(
        *(
            monkeypatch,
            capsys,
            "--mode=sample",
            "--config=finetune:smoke",
            f"--workdir={tmp_path / 'new'}",
        ),
        *(f"--config.model.source={DATA / 'llada-1'}", *ours, *lengths),
    )
    assert code == 0 and "--- answer ---" in out, error
    assert (tmp_path / "new" / "source" / "mdm_jax.json").exists()


def test_settings_that_contradict_the_source_are_named(tmp_path):
    config = configured(DATA / "llada-1", tmp_path)
    found = source.read(config)
    config.model.update(width=64, rope_base=10_000.0)
    config.process = "gaussian"
    config.data.tokenizer = "byte"
    with pytest.raises(ValueError, match="contradicts") as refused:
        source.filled(config, found)
    for part in ("model.width=64 (it has 48)", "process='gaussian' (it has 'masked')"):
        assert part in str(refused.value)
    assert "model.rope_base=10000.0 (it has 500000.0)" in str(refused.value)
    assert "data.tokenizer='byte' (it has 'source')" in str(refused.value)
    assert "depth" not in str(refused.value)
    # A default counts if the command line gave it.
    config = configured(DATA / "llada-1", tmp_path)
    assert source.filled(config, found).model.width == 48
    with pytest.raises(ValueError, match=r"model.width=128 \(it has 48\)"):
        source.filled(config, found, ["model.width"])
    # What the source leaves free.
    config.model.update(dtype="bfloat16", remat="full", scan_layers=True, attention="xla")
    built = source.read(config).config
    assert (built.dtype.name, built.param_dtype.name) == ("bfloat16", "float32")
    assert (built.remat, built.scan_layers, built.attention) == ("full", True, "xla")


def test_texts_take_the_tokenizer_of_a_directory(tmp_path):
    config = presets.quickstart("smoke")
    config.data.tokenizer = str(DATA / "a2d_qwen3-1")
    made = make_dataset(config)
    expected = hub.describe(DATA / "a2d_qwen3-1").tokenizer
    assert made.mask_id == expected.mask_id and made.tokenizer.special_ids == expected.special_ids
    np.testing.assert_array_equal(made.tokenizer.encode("a text"), expected.encode("a text"))
    config.data.tokenizer = str(tmp_path)
    with pytest.raises(ValueError, match=rf"data.tokenizer: {tmp_path}.*no such file"):
        make_dataset(config)


def test_process_and_blocks_are_those_of_the_source(tmp_path):
    config = configured(DATA / "sdar-1", tmp_path)
    found = source.filled(config, source.read(config))
    assert (found.process, found.block.size) == ("block", 4)
    config.block.size = 8
    with pytest.raises(ValueError, match=r"block.size=8 \(it has 4\)"):
        source.filled(config, source.read(config))
    config = configured(DATA / "dream-1", tmp_path)
    config.process = "block"
    with pytest.raises(ValueError, match="process='block'"):
        source.filled(config, source.read(config))
    with pytest.raises(ValueError, match="the model .* has 144 with mask token"):
        make_experiment(configured(DATA / "dream-1", tmp_path))


def test_the_range_that_a_model_was_trained_on_is_the_default(tmp_path):
    """BD3-LM's; visible in the config, and given way to whatever else is set."""
    config, workdir = without_tokenizer("bd3lm-2", tmp_path), files.as_path(tmp_path / "run")
    experiment = make_experiment(config)
    stored = experiment.config
    assert (stored.process, stored.block.size) == ("block", 8)
    assert stored.variance.order == ("stratified", "clipped") and experiment.bias() == "truncated"
    assert stored.variance.clipped.to_dict() == {"low": 0.45, "high": 0.95}
    spec, transform = experiment.spec, experiment.transform
    draw = variance.draw_batch(jax.random.key(0), transform, transform.init(spec), spec)
    rates = 1 - np.asarray(draw.u)
    assert 0.45 <= rates.min() < 0.5 and 0.9 < rates.max() <= 0.95

    def found(given=(), **changes):
        changed = without_tokenizer("bd3lm-2", tmp_path)
        changed.update_from_flattened_dict(changes)
        return source.filled(changed, experiment.source, given, workdir).variance

    default = config.variance.order
    assert found(["variance.order"]).order == default  # as on the command line
    assert found(**{"variance.order": ("mirror",)}).order == ("mirror",)
    assert found(**{"law.name": "power"}).order == default
    assert found(**{"variance.clipped.low": 0.2}).clipped.to_dict() == {"low": 0.2, "high": 0.95}
    assert found(["variance.clipped.high"]).clipped.to_dict() == {"low": 0.45, "high": 0.8}
    # A run that has begun keeps its own choice, by whichever line it goes on.
    claim(workdir, config)
    assert found().order == default
    claim(workdir, stored, allow_change=True)
    assert found() == stored.variance == make_experiment(stored, workdir).config.variance


def test_a_causal_model_is_converted_unless_the_process_is_autoregressive(tmp_path):
    causal = shutil.copytree(DATA / "a2d_qwen3-1", tmp_path / "qwen")
    raw = json.loads((causal / "config.json").read_text())
    raw |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (causal / "config.json").write_text(json.dumps(raw))
    config = configured(causal, tmp_path)
    assert source.read(config).family.name == "a2d-qwen3"
    config.process = "autoregressive"
    found = source.read(config)
    assert found.family.name == "qwen3"
    assert source.filled(config, found).process == "autoregressive"


def test_shifted_outputs_are_those_of_dream(tmp_path):
    model = hub.load(DATA / "dream-1", dtype="float32")
    with np.load(DATA / "dream-1" / "reference.npz") as arrays:
        ids, expected = arrays["input_ids"][:1].astype(np.int32), arrays["logits_shifted"]
    apply = models.shifted_apply(models.readout_apply(model.model))
    found = jax.jit(lambda params: apply(params, ids).logits())(model.params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    # The first of a document keeps its own.
    documents = np.repeat([[0, 1, 2]], [4, 6, 10], axis=1)

    @jax.jit
    def both(params):
        shifted = models.shifted_apply(model.model.apply)
        return [apply(params, ids, None, documents) for apply in (model.model.apply, shifted)]

    own, found = map(np.asarray, both(model.params))
    firsts = [0, 4, 10]
    np.testing.assert_array_equal(found[:, firsts], own[:, firsts])
    np.testing.assert_array_equal(found[:, 11:], own[:, 10:-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "settings", "family"),
    [
        pytest.param("masked", {"qk_norm": True}, "a2d-qwen3", marks=pytest.mark.slow),
        ("masked", {"qk_norm": False, "qkv_bias": True}, "a2d-qwen2"),
        pytest.param(
            *("autoregressive", {"qk_norm": False, "tie_embeddings": True}, "llama"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_of_our_own_is_exported_where_a_layout_has_its_settings(
    process, settings, family, tmp_path
):
    config = presets.quickstart("smoke") if process == "masked" else presets.text_ar("smoke")
    config.model.update(mlp="swiglu", num_kv_heads=1, **settings)
    experiment = make_experiment(config)
    workdir = files.as_path(tmp_path / "run")
    saved_run.save(experiment, workdir)
    assert export.export(workdir, str(tmp_path / "out"))[1] == family
    loaded = hub.load(tmp_path / "out")
    codec = experiment.dataset.tokenizer
    text = "The quick\nbrown é字"
    np.testing.assert_array_equal(loaded.tokenizer.encode(text), codec.encode(text))
    assert loaded.traits.mask_id == codec.mask_id and loaded.traits.eos_id == codec.eos_id
    params = load_parameters(experiment, workdir)[1]
    tokens = experiment.dataset.valid.rows(np.arange(2)).tokens
    own = experiment.apply_fn(params, tokens, None, np.ones_like(tokens))
    own = np.asarray(models.cross_entropy.as_logits(own))
    if process == "autoregressive":  # it reads a start token first
        theirs = loaded.logits(np.pad(tokens, ((0, 0), (1, 0)), constant_values=codec.mask_id))
        theirs = theirs[:, :-1]
        assert loaded.traits.bos_id == codec.mask_id
    else:
        theirs = loaded.logits(tokens)
    np.testing.assert_allclose(theirs, own, rtol=0, atol=1e-4)
    # As the source of another run: the same rows, parameters and units.
    other = presets.quickstart("smoke") if process == "masked" else presets.text_ar("smoke")
    other.model.update(launch_config.get_config().model)
    other.model.source = str(tmp_path / "out")
    again = make_experiment(other)
    rows = (each.dataset.train.rows(np.arange(4)) for each in (experiment, again))
    chex.assert_trees_all_equal(next(rows), next(rows))
    found = jax.device_get(again.source_params())
    chex.assert_trees_all_equal(found, jax.device_get(loaded.params))
    assert again.config.process == process


@pytest.mark.slow
def test_our_own_exports_train_on(tmp_path, monkeypatch):
    """Trained, exported, trained on from there: the loss goes on where it was."""
    launching.on_one_device(monkeypatch)
    config = presets.quickstart("smoke")
    config.model.update(mlp="swiglu", width=32)
    config.train.update(steps=60, evaluate_every=60, checkpoint_every=60)
    workdir, other = files.as_path(tmp_path / "run"), files.as_path(tmp_path / "other")
    assert train.train(make_experiment(config), workdir)
    export.export(workdir, str(tmp_path / "out"), last=True)
    config.model.update(launch_config.get_config().model)
    config.model.source = str(tmp_path / "out")
    assert train.train(make_experiment(config), other)
    first, second = (
        [r["loss"] for r in training.read_metrics(w / "metrics.jsonl", "train")]
        for w in (workdir, other)
    )
    assert np.mean(first[-5:]) < 0.9 * np.mean(first[:5])
    assert np.mean(second[:5]) < 0.9 * np.mean(first[:5])
    assert np.mean(second[-5:]) < np.mean(first[-5:])


@pytest.mark.parametrize("name", slow_except({"duo-1"}, ["bd3lm-2", "duo-1", "mdlm-1"]))
def test_runs_of_the_dit_are_exported(name, tmp_path, monkeypatch, capsys):
    """Parameters under the original's names, with its buffers; no tensor more or less."""
    process = {"process": "uniform"} if name == "duo-1" else {}
    config = without_tokenizer(name, tmp_path, **process)
    if process:
        config.variance.order = ("stratified",)
        config.sample.sampler = "uniform_ancestral"
    experiment, workdir = make_experiment(config), files.as_path(tmp_path / "run")
    saved_run.save(experiment, workdir)
    source.keep(experiment.config, experiment.source, workdir)
    target = tmp_path / "out"
    line = ("--mode=export", f"--workdir={workdir}", f"--to={target}")
    code, out, error = launching.call(monkeypatch, capsys, *line)
    assert code == 0 and experiment.source.family.name in out, error
    made, before = TensorFiles(target), TensorFiles(DATA / name)
    assert (made.shapes, made.dtypes) == (before.shapes, before.dtypes)
    for tensor in made.shapes:
        if tensor.startswith("sampling_eps") or "inv_freq" in tensor:
            np.testing.assert_array_equal(made.read(tensor), before.read(tensor))
    loaded = hub.load(target)
    expected = load_parameters(experiment, workdir)[1]
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(expected))
    assert loaded.traits.clip == experiment.source.traits.clip
    codec = experiment.dataset.tokenizer
    np.testing.assert_array_equal(loaded.tokenizer.encode("abz?"), codec.encode("abz?"))
    if name == "duo-1":
        code, _, error = launching.call(monkeypatch, capsys, "--mode=chat", f"--workdir={workdir}")
        assert code == 2 and "process='uniform'" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a2d_qwen3-1", "llada-1", "bd3lm-2"])
def test_scanned_layers_train_resume_and_export_as_others_do(name, tmp_path, monkeypatch):
    launching.on_one_device(monkeypatch)
    made = {}
    for scanned in (False, True):
        folder = tmp_path / str(scanned)
        folder.mkdir()
        has_tokenizer = (DATA / name / "tokenizer.json").exists()
        if has_tokenizer:
            config = configured(DATA / name, folder)
        else:
            config = without_tokenizer(name, folder)
        config.model.scan_layers = scanned
        config.optimizer.update(peak=1e-3, warmup_steps=1)
        config.train.steps = 2
        workdir = files.as_path(folder / "run")
        assert train.train(make_experiment(config, workdir), workdir)
        config.train.steps = 4  # resumed
        assert train.train(make_experiment(config, workdir), workdir, allow_config_change=True)
        assert open_workdir(workdir).steps()[-1] == 4
        assert export.open_run(workdir).model.config.scan_layers == scanned
        export.export(workdir, str(folder / "out"), last=True)
        made[scanned] = TensorFiles(folder / "out")
    assert made[True].shapes == made[False].shapes and made[True].dtypes == made[False].dtypes
    moved = 0.0
    for tensor in made[False].shapes:
        one, other, before = (
            np.asarray(each.read(tensor), np.float64)
            for each in (made[False], made[True], TensorFiles(DATA / name))
        )
        np.testing.assert_allclose(other, one, rtol=0, atol=2e-5)
        moved = max(moved, np.max(np.abs(one - before)))
    assert moved > 5e-4


def test_settings_that_no_layout_has_are_named(tmp_path):
    config = presets.quickstart("smoke")
    config.model.update(learned_positions=32, norm="layer")
    workdir = files.as_path(tmp_path / "run")
    saved_run.save(make_experiment(config), workdir)
    with pytest.raises(ValueError, match="settings of the section model") as refused:
        export.export(workdir, str(tmp_path / "out"))
    for part in ("a2d-qwen3", "mlp='gelu'", "norm='layer'", "learned_positions=32"):
        assert part in str(refused.value)
    assert not (tmp_path / "out").exists()
    config.process = "uniform"
    files.write_json(workdir / "config.json", json.loads(config.to_json()))
    with pytest.raises(ValueError, match="process='uniform'"):
        export.export(workdir, str(tmp_path / "out"))


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_and_is_exported_without_its_source(
    bucket, tmp_path, monkeypatch
):
    launching.on_one_device(monkeypatch)
    moved = shutil.copytree(DATA / "a2d_qwen3-1", tmp_path / "model")
    config, workdir = configured(moved, tmp_path), files.as_path("gs://bucket/run")
    config.train.steps, config.optimizer.warmup_steps = 2, 1
    assert train.train(make_experiment(config, workdir), workdir)
    assert (bucket / "run" / "source" / "mdm_jax.json").exists()
    shutil.rmtree(moved)
    config.train.steps = 4
    assert train.train(make_experiment(config, workdir), workdir, allow_config_change=True)
    experiment = make_experiment(saved_config(workdir), workdir)
    assert evaluate.evaluate(experiment, workdir)["step"] in (2, 4)
    step, _ = export.export(workdir, str(tmp_path / "out"))
    loaded, expected = hub.load(tmp_path / "out"), load_parameters(experiment, workdir)
    assert step == expected[0]
    chex.assert_trees_all_equal(jax.device_get(loaded.params), jax.device_get(expected[1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a2d_qwen3-1", "bd3lm-2"])
def test_the_variance_of_a_model_is_measured_before_and_after_training(name, tmp_path, monkeypatch):
    launching.on_one_device(monkeypatch)
    workdir = files.as_path(tmp_path / "run")
    if name == "bd3lm-2":
        config = without_tokenizer(name, tmp_path)
    else:
        config = configured(DATA / name, tmp_path)
    config.measure.update(methods=("stratified",), data_batches=3, groups=3, redraws=12)
    experiment = make_experiment(config, workdir)
    methods = measure.named(config.measure.methods, experiment)
    settings = measure.settings_of(experiment.config)

    def measured():
        return measure.measure(make_experiment(config, workdir), workdir, methods, settings)

    before = measured()
    assert before["step"] is None and before["parameters"] == str(DATA / name)
    assert train.train(experiment, workdir)
    after = measured()
    assert after["step"] == 4 and after["levels"] != before["levels"]
    for record in (before, after):
        assert {*record["methods"]} == {"independent", "stratified", "this run"}
        for result in record["methods"].values():
            assert not result["refused"] and result["loss"]["total"] > 0, result
        assert record["methods"]["this run"]["bias"] == experiment.bias()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_chat_shows_the_canvas_being_unmasked(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\n1+1\n"))
    arguments = (f"--source={DATA / 'a2d_qwen3-1'}", "--max_tokens=4", "--steps=4", "--notemplate")
    before = decoding._decode._cache_size()
    code, out, error = launching.call(monkeypatch, capsys, "--mode=chat", *arguments)
    assert code == 0, error
    assert decoding._decode._cache_size() == before + 1  # prompts of 5 and of 3 tokens
    canvases = [line.count("▁") for line in out.splitlines()]
    assert canvases[0] == 3 and canvases.count(0) <= 4  # one token a step, of two answers
    assert out == data.printable(out)


def test_a_run_answers_without_its_data(run, monkeypatch, capsys):
    _, workdir, _ = run
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    arguments = ("--mode=chat", f"--workdir={workdir}", "--max_tokens=4")
    code, out, error = launching.call(monkeypatch, capsys, *arguments)
    assert code == 0 and "▁" not in out.splitlines()[-1], error
    # On the devices that share the run's parameters, the same.
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    again = launching.call(monkeypatch, capsys, *arguments, "--config.mesh=fsdp=2")
    assert again[:2] == (code, out), again
    for setting, message in (
        ("mesh.fsdp=16", "mesh.fsdp=16 times mesh.tensor=1 needs more than the 8 devices"),
        ("sample.temperature=1", "--mode=chat does not read --config.sample.temperature"),
    ):
        code, _, error = launching.call(monkeypatch, capsys, *arguments, f"--config.{setting}")
        assert code == 2 and message in error
    config = launch_config.get_config()
    config.mesh.fsdp = 16  # of a run on more devices
    assert dict(export.chat_mesh(config).shape) == {"data": 1, "fsdp": 8, "tensor": 1}


def test_a_terminal_is_redrawn_in_place_and_obeys_no_model(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    monkeypatch.setattr(screens.shutil, "get_terminal_size", lambda: os.terminal_size((5, 10)))
    codec = data.tokenizers.CharTokenizer("\n\x1babcdef")
    model = hub.describe(DATA / "llada-1")
    canvas = chat._Canvas(model, codec, {codec.eos_id}, hub.RULES["dllm"])
    prompt, mask = codec.encode("ab"), codec.mask_id
    canvas.begin(prompt, 6)
    canvas.show(np.array([[*prompt, *codec.encode("abc"), mask, mask, mask]]))
    first = screen.getvalue()
    assert first == "abc▁\n▁▁"  # cells of four columns, since some terminals wrap at the fifth
    canvas.show(np.array([[*prompt, *codec.encode("a\x1bc"), mask, mask, mask]]))
    assert screen.getvalue() == first + "\x1b[1A\r\x1b[J" + "a\\u0\n01bc\n▁▁▁"
    answer = canvas.end(np.array([*codec.encode("a\x1bc"), codec.eos_id, mask, mask]))
    assert screen.getvalue().endswith("\x1b[2A\r\x1b[Ja\\u001bc\n") and answer == "a\x1bc"


def test_chat_needs_a_model_of_one_kind(tmp_path, monkeypatch, capsys):
    for arguments, message in (
        ((), "--workdir is required"),
        ((f"--source={DATA / 'mdlm-1'}",), "no tokenizer to chat with"),
        ((f"--source={tmp_path / 'none'}",), "no such directory"),
    ):
        code, _, error = launching.call(monkeypatch, capsys, "--mode=chat", *arguments)
        assert code == 2 and message in error


def test_a_block_model_answers_block_by_block(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abcdef\n"))
    model = hub.load(DATA / "sdar-1", dtype="float32")
    codec = data.tokenizers.CharTokenizer("".join(map(chr, range(97, 97 + 100))))
    ids = {"mask_id": codec.mask_id, "eos_id": codec.eos_id}
    model = dataclasses.replace(model, traits=dataclasses.replace(model.traits, **ids))
    screen = io.StringIO()
    monkeypatch.setattr("sys.stdout", screen)
    options = {"max_tokens": 6, "steps": 4, "temperature": 0.0, "templated": False}
    chat.chat(model, codec, **options, trained_here=True)
    left = [line.count("▁") for line in screen.getvalue().splitlines()]
    assert left == sorted(left, reverse=True) and left[0] > left[-1] == 0


def test_a_block_attends_as_far_as_it_did_in_training(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("abcdef\n"))
    model, asked = hub.describe(DATA / "sdar-1"), {}

    def generate(*_, **given):
        asked.update(given)
        raise ValueError("seen")

    monkeypatch.setattr(chat, "generate", generate)
    codec = data.tokenizers.CharTokenizer("abcdef")
    options = {"max_tokens": 6, "steps": 4, "temperature": 0.0, "templated": False}
    with pytest.raises(ValueError, match="seen"):
        chat.chat(model, codec, **options, window=2)
    size = model.traits.block_size
    assert (asked["block_size"], asked["window"]) == (size, 2 * size)


def test_an_answer_is_as_long_as_the_length_that_a_model_states_leaves():
    model = hub.describe(DATA / "a2d_qwen3-1")
    for length, prompt, longest in ((96, 15, 80), (96, 90, 16), (4096, 15, 128), (None, 15, 128)):
        stated = dataclasses.replace(model, traits=dataclasses.replace(model.traits, length=length))
        assert chat.longest_answer(stated, prompt) == longest
