"""The study of what the field proposes: power, time, noise scale, problems, a released model."""

import dataclasses
import json
import pathlib

import jax
import launching
import numpy as np
import pytest

from experiments.prepare import puzzles
from experiments.study import expected, noise_scale, table
from experiments.study import runs as study_runs
from experiments.study.methods import CURVES, FIELD
from experiments.study.runs import Run
from experiments.study.suites import SUITES
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.workdir import WorkdirError, claim
from mdm_jax.training.loop import Interrupt

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.first]

SMALL = launching.ROOT / "experiments/models/small"


def test_power_is_that_of_students_test():
    """Of 20,000 studies of eight seeds, 0.8 ± 0.003 find the least difference."""
    size = expected.detectable(8, 4)
    generator = np.random.default_rng(0)
    differences = size + generator.standard_normal((20_000, 8))
    statistic = differences.mean(1) / differences.std(1, ddof=1) * np.sqrt(8)
    limit = 3.335  # Student's with 7 degrees of freedom, two-sided at 0.05 / 4
    assert np.mean(statistic > limit) == pytest.approx(0.8, abs=0.01)
    assert expected.detectable(8, 12) > size > expected.detectable(16, 4)
    line = expected.power_line(SUITES["field_text"])
    assert "8 seeds and 6 comparisons a table" in line
    assert expected.power_line(dataclasses.replace(SUITES["field_text"], seeds=(0,))) == ""
    with pytest.raises(ValueError, match="at least two seeds"):
        expected.detectable(1, 1)


def _run(seed, totals, signals, views=1):
    points = [
        {
            "step": 10 * (i + 1),
            "total": {"group_variances": [t - 1, t + 1], "signal": s, "unsettled": ""},
        }
        for i, (t, s) in enumerate(zip(totals, signals))
    ]
    return {"seed": seed, "gradient": points, "batch_size": 4, "views": views}


def test_the_noise_scale_is_a_ratio_of_means_over_seeds():
    found = noise_scale.noise_scale([_run(0, [6, 4], [2, 1], 2), _run(1, [10, 4], [2, -1], 2)])
    assert [point["step"] for point in found] == [10, 20]
    assert found[0]["noise_scale"] == pytest.approx(8 * 8 / 2)
    # Residuals of 48 and 80 over 2 are 8 and -8: their mean has the standard error 8.
    assert found[0]["standard_error"] == pytest.approx(8.0)
    assert found[0]["forward_passes"] == 80 and found[0]["seeds"] == 2
    assert found[1]["noise_scale"] is None and found[1]["standard_error"] is None
    (single,) = noise_scale.noise_scale([_run(0, [6], [2])])
    assert single["noise_scale"] == 12 and single["standard_error"] is None
    assert noise_scale.noise_scale([]) == []
    suite = SUITES["noise_scale"]
    text = noise_scale.table(suite, {"standard": found, "mirror": [single, single]})
    assert "| standard | 32 ± 8 | no signal left |" in text and "| MIRROR | 12 | 12 |" in text


def test_the_noise_scale_of_kept_results_is_their_noise_to_signal():
    record = table.published("confirmation")
    found = noise_scale.of_results(record)
    (point,) = found["text"]["standard"]
    (kept,) = record["results"]["passes"]["text"]["standard"]["gradient"]
    assert point["noise_scale"] == pytest.approx(16 * kept["noise_to_signal"])
    assert point["standard_error"] is None and not point["settled"]
    assert noise_scale.table(SUITES["confirmation"], {"standard": [point]}).count("260* |") == 1
    assert point["seeds"] == 3 and set(found) == {"sudoku6", "text", "sudoku4_noisy"}


def test_word_problems_are_written_out(tmp_path):
    record = {"split": "train", "question": "number1 of number0 ?", "numbers": [2.0, 3.5]}
    lines = [
        record | {"equation": "* number0 - number1 1", "answer": 5.0},
        record | {"split": "test", "equation": "number0", "answer": 2.0},
    ]
    file = tmp_path / "mawps.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(puzzles.mawps(file)) == [("3.5 of 2 ?\n", "2 * ( 3.5 - 1 ) #### 5")]
    ((prompt, answer),) = puzzles.mawps(file)
    pairs = [(f"{number} and {prompt}", answer) for number in range(40)]
    puzzles.write_pairs(pairs, tmp_path / "pairs.jsonl")
    suite = study_runs.changed(SUITES["arithmetic"], {"data.path": str(tmp_path / "pairs.jsonl")})
    config = study_runs.configure(suite, Run("mawps", "pairs", "passes", 0), tmp_path)
    dataset = make_experiment(config).dataset
    asked = "7 and 3.5 of 2 ?\n"
    assert dataset.check(asked, "2 * 2.5 #### 5") and not dataset.check(asked, "2 #### 6")
    file.write_text(json.dumps(record | {"equation": "+ number0", "answer": 1}) + "\n")
    with pytest.raises(ValueError, match=r"mawps.jsonl:1: no problem of MAWPS"):
        list(puzzles.mawps(file))


def test_partition_models_are_trained_on_grids_too():
    suite = SUITES["larger"]
    config = study_runs.configure(suite, Run("sudoku9", "partition", "passes", 0), pathlib.Path())
    config.data.task.update(train_rows=8, valid_rows=8, test_rows=8)
    experiment = make_experiment(config)
    assert experiment.config.process == "partition" and experiment.transform.views == 1
    assert "partition" in FIELD and "partition" not in SUITES["arithmetic"].methods


def test_p_pots_without_its_weight_has_a_curve_for_each_task():
    suite, root = SUITES["unweighted"], pathlib.Path("study")
    assert [*CURVES] == [*suite.tasks] and not set(suite.seeds) & set(SUITES["curves"].seeds)
    for task in suite.tasks:
        run = Run(task, "ppots_unweighted", "passes", 20)
        config = study_runs.configure(suite, run, root)
        assert config.variance.ppots_unweighted.parameters == CURVES[task]
        assert config.weighting.clamp == 10 and config.corruption.name == "bernoulli"
        standard = dataclasses.replace(run, method="standard")  # a workdir may hold both suites
        one, other = (
            study_runs.configure(SUITES[name], standard, root) for name in ("eight", suite.name)
        )
        assert one.to_dict() == other.to_dict()
    config.train.init_from = ""
    assert make_experiment(config).bias() == "biased"


def _tiny_a2d(tmp_path):
    """The suite for a GPU, with the small model of the repository, for two steps."""
    lines = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(60)]
    file = tmp_path / "gsm8k.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"model.source": str(SMALL), "data.path": str(file), "train.batch_size": "4"}
    suite = study_runs.changed(SUITES["a2d"], given)
    few = {"data.prompt_length": 16, "data.answer_length": 16, "train.steps": 6}
    few |= {"model.dtype": "float32", "sample.low_confidence_remasking.block_size": 16}
    few |= {"sample.low_confidence_remasking.steps_per_block": 2, "sample.num_answers": 2}
    few |= {
        "evaluate.batch_size": 4,
        "evaluate.final_replicates": 2,
        "train.log_every": 1,
        "optimizer.warmup_steps": 2,
    }
    tasks = {
        name: dataclasses.replace(task, settings={**task.settings, **few})
        for name, task in suite.tasks.items()
    }
    return dataclasses.replace(suite, tasks=tasks)


def test_the_suite_for_a_gpu_says_how_long_it_takes(tmp_path):
    suite = _tiny_a2d(tmp_path)
    runs = study_runs.plan(suite)
    assert len(runs) == 2 * 7 * 8
    assert len({study_runs.forward_passes(suite, run, tmp_path) for run in runs}) == 1
    title, *lines = expected.time_lines(suite, tmp_path)
    assert "expected on one H100" in title and len(lines) == 2
    assert expected.time_lines(SUITES["field_text"], tmp_path) == []
    each = [
        make_experiment(study_runs.configure(suite, Run(task, "standard", "passes", 0), tmp_path))
        for task in suite.tasks
    ]
    assert each[0].adapter is not None and each[1].adapter is None
    lora, full = map(expected.operations, each)
    weights = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(each[1].shapes()))
    length, rows, depth, width = 32, 6 * 4, 4, 128
    forward = 2 * weights + 4 * depth * length * width
    assert full - lora == pytest.approx(length * rows * forward)  # gradients of frozen weights
    held_out = len(each[1].dataset.test)
    bounds = held_out * each[1].config.evaluate.final_passes * 2
    assert full == pytest.approx(length * forward * (3 * rows + bounds + 2 * 2))


def test_a_study_of_a_released_model_is_resumed(tmp_path):
    """The config that a run keeps has what the model fixes, such as its tokenizer and width."""
    suite, run = _tiny_a2d(tmp_path), Run("gsm8k_lora", "standard", "passes", 0)
    config = make_experiment(study_runs.configure(suite, run, tmp_path)).config
    claim(study_runs.directory(tmp_path, run), config)
    study_runs.check_run(suite, run, tmp_path)
    other = study_runs.changed(suite, {"optimizer.peak": "1"})
    with pytest.raises(ValueError, match="optimizer.peak=high: not of type float"):
        study_runs.changed(suite, {"optimizer.peak": "high"})
    with pytest.raises(WorkdirError, match=r"config:\n  optimizer.peak: 0.0002 -> 1.0\nName"):
        study_runs.check_run(other, run, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "task, method", [("gsm8k_lora", "mirror"), ("gsm8k_full", "highest_rates")]
)
def test_the_suite_for_a_gpu_runs_on_a_tiny_model(task, method, tmp_path):
    suite = _tiny_a2d(tmp_path)
    with Interrupt() as interrupt:
        record = study_runs.execute(suite, Run(task, method, "passes", 0), tmp_path, interrupt)
    assert not record["failed"] and 0 <= record["evaluation"]["accuracy"] <= 1
    assert record["views"] * record["batch_size"] == 4
