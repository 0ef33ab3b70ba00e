"""Runs that train adapters beside a frozen source: trained, resumed, read, exported."""

import io
import shutil

import chex
import jax
import launching
import numpy as np
import pytest
from test_launch_hub import DATA, configured, restored

from mdm_jax import files, hub
from mdm_jax.hub.files import TensorFiles
from mdm_jax.launch.auto import chain as chains
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, export, measure, train
from mdm_jax.launch.workdir import WorkdirError, saved_config
from mdm_jax.models import lora


def adapted(directory, folder, **adapter):
    config = configured(directory, folder)
    config.adapter.update({"name": "lora", "rank": 3, "targets": ("query", "down")} | adapter)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(source, workdir, experiment) of a finished run of adapters with dropout."""
    folder = tmp_path_factory.mktemp("lora")
    source = shutil.copytree(DATA / "a2d_qwen3-1", folder / "model")
    workdir = files.as_path(folder / "run")
    with pytest.MonkeyPatch.context() as patch:
        launching.on_one_device(patch)
        experiment = make_experiment(adapted(source, folder, dropout=0.2), workdir)
        assert train.train(experiment, workdir)
        yield source, workdir, make_experiment(saved_config(workdir), workdir)


def test_adapters_alone_are_trained_and_saved(run):
    source, workdir, experiment = run
    state = restored(experiment, workdir)
    for tree in (state.params, state.ema, experiment.abstract_state().params):
        assert set(tree) == {"adapters"}
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == 3 * 2 * (40 + 64 + 72 + 40)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert moments < 2 * count + 10
    for layer in (0, 1):
        halves = state.params["adapters"][f"block_{layer}"]["mlp"]["down"]
        assert all(np.any(np.asarray(half)) for half in halves.values())
    chex.assert_trees_all_equal(experiment.with_frozen(workdir).frozen, hub.load(source).params)
    shown = experiment.describe()
    assert f"trained: {count:,} parameters of adapters of rank 3" in shown
    assert "frozen in float32" in shown


@pytest.mark.slow
def test_a_run_resumes_to_the_same_bits(run, tmp_path):
    _, workdir, experiment = run
    again = files.as_path(shutil.copytree(workdir, tmp_path / "again"))
    for path in ("last/4", "best"):
        shutil.rmtree(again / "checkpoints" / path)
    assert train.train(make_experiment(saved_config(again), again), again)
    chex.assert_trees_all_equal(restored(experiment, again), restored(experiment, workdir))


def test_a_run_is_exported_merged_or_as_adapters_that_begin_another(
    run, tmp_path, monkeypatch, capsys
):
    source, workdir, experiment = run
    step, params = load_parameters(experiment, workdir)
    expected = lora.merge(hub.load(source).params, params, experiment.adapter)
    assert export.export(workdir, str(tmp_path / "out")) == (step, "a2d-qwen3")
    chex.assert_trees_all_close(hub.load(tmp_path / "out").params, expected, rtol=0, atol=1e-6)
    made, before = TensorFiles(tmp_path / "out"), TensorFiles(source)
    assert (made.shapes, made.dtypes) == (before.shapes, before.dtypes)
    same = {name for name in made.shapes if np.array_equal(made.read(name), before.read(name))}
    assert {
        n for n in made.shapes if "q_proj" in n or "down_proj" in n
    } == made.shapes.keys() - same
    arguments = ("--mode=export", f"--workdir={workdir}", f"--to={tmp_path / 'peft'}", "--adapter")
    code, out, error = launching.call(monkeypatch, capsys, *arguments)
    assert code == 0 and f"step {step} written" in out and "PEFT" in out, error
    read = hub.with_adapters(hub.load(source), tmp_path / "peft")
    chex.assert_trees_all_close(read.params, expected, rtol=0, atol=1e-6)
    # The adapters begin another run, under a dropout of its own.
    config = adapted(source, tmp_path, dropout=0.0, init_from=str(tmp_path / "peft"))
    begun = train.initial_state(make_experiment(config))
    chex.assert_trees_all_equal(begun.params, {"adapters": params["adapters"]})
    config.adapter.rank = 2
    with pytest.raises(ValueError, match=r"other settings: --config.adapter.rank=3"):
        train.initial_state(make_experiment(config))


@pytest.mark.slow
def test_evaluation_samples_and_chats_read_the_run(run, monkeypatch, capsys):
    _, workdir, experiment = run
    record = evaluate.evaluate(experiment, workdir)
    assert 0 < record["bits_per_unit"] < 40
    drawn = evaluate.sample(experiment, workdir)
    assert "▁" not in "".join(sample["text"] for sample in drawn["samples"])
    monkeypatch.setattr("sys.stdin", io.StringIO("1+1\n"))
    arguments = ("--mode=chat", f"--workdir={workdir}", "--max_tokens=4")
    code, out, error = launching.call(monkeypatch, capsys, *arguments)
    assert code == 0 and "▁▁▁" in out, error


@pytest.mark.slow
def test_variance_is_of_the_gradient_of_adapters(run, tmp_path):
    _, workdir, experiment = run
    copy = files.as_path(shutil.copytree(workdir, tmp_path / "run"))
    record = measure.measure(experiment, copy, {}, measure.settings_of(experiment.config))
    assert {result["refused"] for result in record["methods"].values()} == {""}


@pytest.mark.slow
def test_chains_are_measured_and_chosen_for_adapters(run, tmp_path, monkeypatch):
    """And the range of clipped rates searched, by gradients with respect to adapters."""
    source, _, _ = run
    monkeypatch.setitem(chains.CANDIDATES, "masked", (("stratified",), ("stratified", "mirror")))
    for order, file in ((("auto",), "auto.jsonl"), (("clipped_adaptive",), "clip_search.jsonl")):
        config = adapted(source, tmp_path, dropout=0.2)
        config.optimizer.name = "muon"
        config.variance.order = order
        config.variance.auto.update(budget=1.0, passes=4, groups=4)
        config.train.update(steps=80, evaluate_every=40, log_every=40, checkpoint_every=0)
        config.evaluate.update(batch_size=2, max_rows=8)
        workdir = files.as_path(tmp_path / file)
        assert train.train(make_experiment(config, workdir), workdir)
        _, first = next(iter(files.read_records(workdir / file)))
        if order == ("auto",):
            figures = [np.array(each["group_variances"]) for each in first["chains"].values()]
            assert first["passes"] > 500 and all(np.all(each > 0) for each in figures)
            assert first["name"] in ("stratified", "stratified, mirror")
        else:
            scores = [score for score in first["scores"] if score is not None]
            assert len(scores) > 10 and np.all(np.isfinite(scores)) and np.std(scores) > 0
        state = restored(make_experiment(saved_config(workdir), workdir), workdir)
        assert set(state.params) == {"adapters"} and int(state.step) == 80


def test_a_source_that_has_gone_or_changed_is_named(run, tmp_path):
    source, workdir, experiment = run
    moved = source.with_name("moved")
    source.rename(moved)
    try:
        with pytest.raises(WorkdirError, match=r"model.source has gone .* put it back"):
            load_parameters(experiment, workdir)
        # Adapters alone need no source.
        export.export(workdir, str(tmp_path / "peft"), adapter=True)
        export.export(workdir, str(tmp_path / "merged"), moved=str(moved))
        shutil.copytree(moved, source)
        with (source / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\0")
        with pytest.raises(WorkdirError, match=r"has changed, and .* put it back"):
            load_parameters(experiment, workdir)
        shutil.rmtree(source)
    finally:
        moved.rename(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 41}, r"adapter.rank=41 is more than the smaller side, 40, of block_0"),
        ({"targets": ("q_proj",)}, r"'q_proj' is query.*known: down, gate, key, out, query"),
        ({"targets": ("quary",)}, r"did you mean 'query'"),
        ({"dropout": 1.0}, r"adapter.dropout must be a number in \[0, 1\)"),
        ({"name": ""}, r"adapter.rank=3, .*would not be read"),
    ],
)
def test_adapters_that_cannot_be_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_experiment(adapted(DATA / "a2d_qwen3-1", tmp_path, **changes))


def test_settings_that_contradict_adapters_are_refused(tmp_path):
    cases = {
        "needs model.source": ("model", "source", ""),
        "does not read train.init_from": ("train", "init_from", "runs/other"),
        "adapter.base_dtype is of the frozen": ("model", "param_dtype", "bfloat16"),
    }
    for message, (section, name, value) in cases.items():
        config = adapted(DATA / "a2d_qwen3-1", tmp_path)
        config[section][name] = value
        with pytest.raises(ValueError, match=message):
            make_experiment(config)


def test_a_run_of_all_parameters_does_not_begin_from_adapters(run, tmp_path):
    source, workdir, _ = run
    config = configured(source, tmp_path)
    config.train.init_from = str(workdir)
    with pytest.raises(WorkdirError, match="holds adapters alone; mdm export"):
        train.train(make_experiment(config), files.as_path(tmp_path / "run"))
