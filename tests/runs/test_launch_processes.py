"""Block diffusion, uniform tokens and the autoregressive baseline, as the launcher builds them."""

import json
import pathlib

import jax
import numpy as np
import pytest
import saved_run
from variants import slow_except

from mdm_jax.launch import names
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.modes.sample import show_samples
from mdm_jax.launch.presets import (
    quickstart,
    text_ar,
    text_block,
    text_partition,
    text_uniform,
)
from mdm_jax.launch.processes import parts
from mdm_jax.launch.spacing import compare
from mdm_jax.launch.spacing.stored import stored_generator

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.first]

CONFIGS = {
    "block": text_block,
    "partition": text_partition,
    "uniform": text_uniform,
    "autoregressive": text_ar,
}


@pytest.mark.parametrize("process", slow_except({"autoregressive"}, CONFIGS))
def test_a_run_trains_evaluates_and_writes(process, tmp_path, capsys):
    config = CONFIGS[process]("smoke")
    config.optimizer.name = "adamw"  # compiles in half the time
    experiment = make_experiment(config)
    assert experiment.config.process == process
    assert train.train(experiment, tmp_path / "run")
    record = evaluate.evaluate(experiment, tmp_path / "run")
    assert 0 < record["bits_per_unit"] < 10
    if process == "autoregressive":
        assert record["standard_error_bits_per_unit"] == 0
    drawn = evaluate.sample(experiment, tmp_path / "run")
    assert len(drawn["samples"]) == (2 if process == "autoregressive" else 3)
    for sample in drawn["samples"]:
        assert "▁" not in sample["text"]
        if sample["kind"] == "infilled":
            kept = [(g, t) for g, t in zip(sample["given"], sample["text"]) if g != "▁"]
            assert len(kept) == 24 and all(g == t for g, t in kept)


@pytest.mark.parametrize("preset", [text_uniform, text_ar])
def test_guidance_that_is_not_read_is_refused(preset):
    config = preset("smoke")
    config.sample.guidance = 2.0
    with pytest.raises(ValueError, match="does not read sample.guidance, got 2; leave it at 0"):
        make_experiment(config)


def test_block_sizes_by_variant():
    sizes = [text_block(v).block.size for v in ("1", "4", "16", "L")]
    assert sizes == [1, 4, 16, text_block().data.length]
    config = text_block("smoke")
    config.block.size = 5
    with pytest.raises(ValueError, match="block.size must divide a row of 32 tokens, got 5"):
        make_experiment(config)


def test_settings_that_mean_nothing_to_a_process_are_refused():
    config = text_ar("smoke")
    config.variance.order = ("stratified",)
    with pytest.raises(ValueError, match="no noise to couple or warp"):
        make_experiment(config)
    config.variance.order = ()
    config.weighting.name = "p2"
    with pytest.raises(ValueError, match="'autoregressive' does not read weighting.name='p2'"):
        make_experiment(config)
    config = text_uniform("smoke")
    config.corruption.name = "bernoulli"
    with pytest.raises(ValueError, match="'uniform' does not read corruption.name='bernoulli'"):
        make_experiment(config)
    config.corruption.name = "fixed_count"
    config.sample.sampler = "ancestral"
    with pytest.raises(ValueError, match="sample.sampler: unknown name 'ancestral'"):
        make_experiment(config)


@pytest.mark.slow  # test_launch_configs builds them by default
@pytest.mark.parametrize("name", sorted({*names.SAMPLERS, *names.UNIFORM_SAMPLERS}))
def test_every_sampler_is_built_from_its_settings(name):
    uniform = name in names.UNIFORM_SAMPLERS
    config = (text_uniform if uniform else quickstart)("smoke")
    config.sample.sampler = name
    config.data.length = 32
    experiment = make_experiment(config)
    assert callable(experiment.generate)


@pytest.mark.slow
def test_self_conditioning_from_the_config(tmp_path):
    """The network has the further input, and samples under wrappers."""
    config = quickstart("smoke")
    config.model.self_conditioning = True
    config.sample.update(guidance=1.0, no_repeat_ngrams=2, sampler="ancestral")
    experiment = make_experiment(config)
    assert "self-conditioned" in experiment.describe()
    params = experiment.initial_state().ema
    plain = make_experiment(quickstart("smoke")).initial_state().ema
    count = [sum(np.size(leaf) for leaf in jax.tree.leaves(tree)) for tree in (params, plain)]
    assert count[0] > count[1]
    drawn = show_samples(
        experiment.dataset,
        experiment.jobs,
        experiment.generate,
        tmp_path,
        0,
        params,
        jax.random.key(0),
    )
    assert all("▁" not in sample["text"] for sample in drawn["samples"])


@pytest.mark.slow
@pytest.mark.parametrize("process", ("masked", "block", "uniform"))
def test_grids_of_tokens_are_compared(process, tmp_path):
    config = (CONFIGS | {"masked": quickstart})[process]("smoke")
    config.variance.order = ("stratified",)
    if process != "uniform":
        config.sample.sampler = "ancestral"
    config.sample.num_steps, config.spacing.steps = 3, (3,)
    experiment = make_experiment(config)
    saved_run.save(experiment, tmp_path)
    shown = []
    (record,) = compare.compare(experiment, tmp_path, shown.append)["records"]
    found = {name: np.array(grid["levels"]) for name, grid in record["grids"].items()}
    bounds = {name: grid["bound"] for name, grid in record["grids"].items()}
    assert {"uniform_masking_rate", config.law.name, "cosine_md4", "search"} <= {*found}
    assert "learned density" not in found  # the chain learns none
    rates = 1 / (1 + np.exp(found["uniform_masking_rate"]))
    np.testing.assert_allclose(rates, [1, 2 / 3, 1 / 3, 0], atol=1e-5)
    for grid in record["grids"].values():
        assert len(grid["distances"]) == 2 and max(grid["distances"]) <= np.log(2) + 1e-9
    if process == "uniform":  # its tokens are replaced, not revealed
        assert set(bounds.values()) == {None} and "align steps, curve" not in found
    else:
        least = min(bounds.values())
        assert bounds["align steps, curve"] == pytest.approx(least, abs=1e-9) and least > -1e-9
    assert "search" in shown[0] and "entropy of a text" in shown[0]
    generate, described = stored_generator(experiment, tmp_path, 3)
    assert described.startswith(record["best"])
    canvas = np.full((2, 32), experiment.dataset.mask_id, np.int32)
    tokens = np.asarray(generate(experiment.initial_state().ema, jax.random.key(0), canvas))
    assert np.all(tokens != experiment.dataset.mask_id)


def test_runs_without_a_grid_have_no_spacing():
    with pytest.raises(ValueError, match="'first_hitting' sets its own .* are ancestral, cached"):
        compare.check(make_experiment(quickstart("smoke")))
    with pytest.raises(ValueError, match="process='autoregressive' has no noise levels"):
        compare.check(make_experiment(text_ar("smoke")))


def test_samplers_with_steps_of_their_own_have_no_quality_by_steps():
    config = quickstart("smoke")
    found = parts.grid_samplers(config.sample)
    assert {"ancestral", "cached_ancestral", "remdm_cap"} <= set(found)
    assert not {"first_hitting", "by_margin", "low_confidence_remasking"} & set(found)
    config.sample.quality_steps = (2, 4)
    with pytest.raises(ValueError, match="'first_hitting' sets its own .* are ancestral, cached"):
        make_experiment(config)
    config.sample.sampler = "ancestral"
    make_experiment(config)


@pytest.mark.slow
def test_quality_against_steps_under_a_judge(tmp_path):
    judge = make_experiment(text_ar("smoke"))
    assert train.train(judge, tmp_path / "judge")
    config = quickstart("smoke")
    config.sample.update(sampler="ancestral", judge=str(tmp_path / "judge"))
    config.sample.update(quality_steps=(1, 4), quality_texts=8)
    experiment = make_experiment(config)
    params = experiment.initial_state().ema
    for _ in range(2):  # the second time nothing is overwritten
        files = evaluate.measure_quality(experiment, tmp_path, 0, params, jax.random.key(0))
    assert [pathlib.Path(f).name for f in files] == [
        "ancestral-1-2.json",
        "ancestral-4-2.json",
        "quality.png",
    ]
    found = json.loads(pathlib.Path(files[0]).read_text())["quality"]
    assert found["texts"] == 8 and 1 < found["generative_perplexity"] < 1e4
    assert found["divergence_1"] > found["divergence_1_reference"] > 0
    config.process = "autoregressive"
    config.variance.order = ()
    with pytest.raises(ValueError, match="one step per token"):
        make_experiment(config)
