"""Accuracy of answers: what is counted as right, its errors, and what the launcher makes of it."""

import json
import math

import chex
import jax
import numpy as np
import pytest
import saved_run

from experiments.configs.study import sudoku4, sudoku6_noisy
from mdm_jax import data, files, samplers, tasks
from mdm_jax.data.tokenizers import load_tokenizer
from mdm_jax.evaluation.accuracy import TaskAccuracy, measure_task_accuracy
from mdm_jax.launch.build import load_parameters, make_experiment
from mdm_jax.launch.modes import evaluate, train

pytestmark = pytest.mark.usefixtures("one_device")

TASK = tasks.Countdown()
DATA = tasks.task_dataset(TASK, train_rows=8, valid_rows=8, test_rows=10)
CODEC = DATA.tokenizer
ROWS = data.gather(DATA.test, np.arange(10))


def measure(generate, **settings):
    batches = data.evaluation_batches(DATA.test, 4)
    return measure_task_accuracy(
        generate, None, jax.random.key(0), batches, check=TASK.check, tokenizer=CODEC, **settings
    )


def oracle(change=lambda row, places, tokens: None):
    """Writes the true answers, changed; checks that it was not shown them."""

    def generate(params, key, canvas, documents, row_offset):
        found = np.array(canvas)
        for place in range(len(canvas)):
            row = row_offset + place
            if row >= len(ROWS.tokens):
                continue  # fills up the last batch
            eligible = ROWS.eligible[row]
            assert (canvas[place][eligible] == CODEC.mask_id).all()
            assert (canvas[place][~eligible] == ROWS.tokens[row][~eligible]).all()
            assert (documents[place] == ROWS.documents[row]).all()
            found[place] = ROWS.tokens[row]
            change(row, np.flatnonzero(eligible), found[place])
        return found

    return generate


def test_true_answers_are_right_and_each_prompt_is_asked_once():
    seen = []
    found = measure(oracle(), progress=seen.append)
    assert found.accuracy == 1 and len(found.correct) == 10 and seen == [4, 4, 4]
    pairs = [tasks.example(TASK, "test", i) for i in range(10)]
    assert list(zip(found.prompts, found.answers)) == pairs


@pytest.mark.parametrize("token", ["pad", "mask", "digit", "early eos", "no eos"])
def test_answers_that_are_spoilt_are_wrong(token):
    def spoil(row, places, tokens):
        if row % 3:  # 6 of 10
            where = places[-1] if token == "no eos" else places[1]
            put = {"pad": CODEC.pad_id, "mask": CODEC.mask_id, "early eos": CODEC.eos_id}
            tokens[where] = put.get(token, CODEC.encode(";")[0])

    found = measure(oracle(spoil))
    assert found.correct.tolist() == [row % 3 == 0 for row in range(10)]
    assert found.accuracy == 0.4
    assert found.standard_error == pytest.approx(math.sqrt(0.4 * 0.6 / 10))
    if token in ("pad", "mask"):
        assert found.answers[1][1] == "▁"


def test_what_follows_the_first_eos_does_not_count():
    task = tasks.Add(2)
    source = tasks.task_dataset(
        task, answer_length=8, answer_padding="eos_scored", train_rows=1, valid_rows=1, test_rows=4
    )
    rows = data.gather(source.test, np.arange(4))

    def generate(params, key, canvas, documents, row_offset):
        found = np.array(rows.tokens)
        found[:, -2:] = CODEC.encode("77")
        return found

    found = measure_task_accuracy(
        generate,
        None,
        jax.random.key(0),
        data.evaluation_batches(source.test, 4),
        check=task.check,
        tokenizer=CODEC,
    )
    assert found.accuracy == 1


@pytest.mark.parametrize("right", [0, 3, 10])
def test_the_interval_holds_the_accuracies_that_explain_the_one_found(right):
    """Its ends are where the accuracy found is just 1.96 of *their* deviations away."""
    found = TaskAccuracy(("",) * 10, ("",) * 10, np.arange(10) < right)
    low, high = found.interval()
    for end in (low, high):
        if 0 < end < 1:
            deviation = math.sqrt(end * (1 - end) / 10)
            assert abs(found.accuracy - end) == pytest.approx(1.96 * deviation)
    assert low <= found.accuracy <= high and high - low > 0.25
    assert found.to_dict()["accuracy_interval"] == [low, high]


def test_there_must_be_something_to_answer():
    empty = [ROWS._replace(eligible=np.zeros_like(ROWS.eligible))]
    with pytest.raises(ValueError, match="none of 10 rows has an eligible position"):
        measure_task_accuracy(
            lambda params, key, canvas, documents, row_offset: canvas,
            None,
            jax.random.key(0),
            empty,
            check=TASK.check,
            tokenizer=CODEC,
        )


def test_a_sampler_of_the_library_answers():
    """A network that has the solutions by heart, asked for the surest place first."""
    answers = jax.nn.one_hot(ROWS.tokens, CODEC.vocab_size) * 20.0

    def apply_fn(params, inputs, logsnr, documents):
        rows = jax.numpy.argmax((inputs[:, None, :12] == ROWS.tokens[None, :, :12]).all(-1), 1)
        return answers[rows]

    chosen = samplers.by_score(token_filter=samplers.temperature(0.0))
    generate = samplers.make_generator(apply_fn, chosen, None, mask_id=CODEC.mask_id)
    assert measure(generate).accuracy == 1


@pytest.mark.parametrize(
    "process, answered_by",
    [
        pytest.param("autoregressive", "next_token", marks=pytest.mark.slow),
        pytest.param("block", "by_confidence", marks=pytest.mark.slow),
    ],
)
def test_other_processes_answer_too(process, answered_by, tmp_path):
    config = sudoku4.get_config("smoke")
    config.process = process
    config.variance.order = ()
    config.train.monitors = ()
    config.block.size = 12
    config.data.prompt_length = 19  # rows of three blocks, the first of which begins with padding
    config.sample.num_answers = 4
    experiment = make_experiment(config)
    record = evaluate.measure_accuracy(experiment, tmp_path, experiment.initial_state().params)
    assert (record["answers"], record["answered_by"]) == (4, answered_by)
    assert record["accuracy"] == 0  # untrained


@pytest.fixture(scope="module")
def reported(one_device, tmp_path_factory):
    """(directory, text) of the report on a run on a task, whose parameters are random."""
    workdir = tmp_path_factory.mktemp("task") / "sudoku"
    experiment = make_experiment(sudoku4.get_config("smoke"))
    saved_run.save(experiment, workdir)
    return workdir, evaluate.report(experiment, workdir)


def test_a_run_reports_the_accuracy_of_its_answers(reported):
    workdir, out = reported
    record = json.loads((workdir / "evaluation.json").read_text())
    assert 0 <= record["accuracy"] <= 1 and record["answers"] == 8
    assert record["answered_by"] == "by_confidence" and record["temperature"] == 0
    assert record["split"] == "test" and record["rows"] == 8
    line = f"accuracy {record['accuracy']:.3f} ± {record['standard_error_accuracy']:.3f} over 8"
    assert line in out and line in (workdir / "report.txt").read_text()


def test_evaluation_answers_by_other_settings(reported, tmp_path):
    """Along the grid that is stored in the run."""
    workdir, _ = reported
    levels = [-12.0, -1.0, 0.0, 1.0, 12.0]
    grids = {"best": "mine", "grids": {"mine": {"levels": levels}}}
    (tmp_path / "spacing").mkdir()
    files.write_json(tmp_path / "spacing" / "ancestral-4.json", grids)
    config = sudoku4.get_config("smoke")
    config.sample.update(sampler="ancestral", num_answers=0, temperature=0.5)
    experiment = make_experiment(config)
    _, params = load_parameters(experiment, workdir)
    record = evaluate.measure_accuracy(experiment, tmp_path, params)
    assert (record["answered_by"], record["answers"]) == ("ancestral", 16)
    assert record["grid"].startswith("mine, of ") and config.sample.num_steps == 4
    config.sample.num_answers = -1
    with pytest.raises(ValueError, match=r"num_answers must be a whole number in \[0, "):
        make_experiment(config)


def test_a_noisy_task_goes_on_from_the_parameters_of_another(reported):
    workdir, _ = reported
    config = sudoku6_noisy.get_config("smoke")
    config.train.init_from = str(workdir)
    experiment = make_experiment(config)
    assert load_tokenizer(workdir / "tokenizer.json").fingerprint == (
        experiment.dataset.tokenizer.fingerprint
    )
    assert experiment.dataset.length > make_experiment(sudoku4.get_config("smoke")).dataset.length
    state = train.initial_state(experiment)
    chex.assert_trees_all_equal(state.params, load_parameters(experiment, workdir)[1])
