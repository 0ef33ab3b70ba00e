"""Runs of CDCD and CDTD, from training to samples, and what their processes refuse."""

import csv
import dataclasses
import json
import types

import numpy as np
import pytest

from experiments import tables
from mdm_jax import data
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.categorical.cdcd import cdcd
from mdm_jax.launch.categorical.cdtd import cdtd
from mdm_jax.launch.modes import evaluate, train
from mdm_jax.launch.spacing import compare as spacing
from mdm_jax.launch.spacing.stored import stored_generator

PICTURES = types.SimpleNamespace(tokenizer=None, columns=())
TEXT = types.SimpleNamespace(tokenizer=object(), columns=())
TABLE = types.SimpleNamespace(tokenizer=None, columns=(object(),))


@pytest.mark.parametrize(
    "build, name, dataset, change, words",
    [
        (cdcd, "text_cdcd", PICTURES, {}, "process=cdcd is of tokens of text"),
        (cdcd, "text_cdcd", TEXT, {"model.condition_on_logsnr": False}, "condition_on_logsnr=True"),
        (
            cdcd,
            "text_cdcd",
            TEXT,
            {"gaussian.recipe": "edm"},
            "does not read gaussian.recipe='edm'",
        ),
        (cdcd, "text_cdcd", TEXT, {"gaussian.low": 2.0}, "low < high"),
        (cdcd, "text_cdcd", TEXT, {"gaussian.path": "vq"}, "gaussian.path"),
        (cdcd, "text_cdcd", TEXT, {"sample.guidance": 2.0}, "does not read sample.guidance"),
        (cdtd, "table_cdtd", TABLE, {"sample.guidance": 2.0}, "does not read sample.guidance"),
        (cdtd, "table_cdtd", TEXT, {}, "process=cdtd is of tables"),
        (cdtd, "table_cdtd", TABLE, {"model.self_conditioning": True}, "takes no model.self"),
    ],
)
def test_what_does_not_fit_is_refused(build, name, dataset, change, words):
    config = presets.get_config(name)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=words):
        build(config, dataset)


def test_groups_of_another_number_of_columns_are_refused():
    config = presets.get_config("table_cdtd:smoke")
    config.variance.cdtd_warp.groups = (0, 1)
    with pytest.raises(ValueError, match="2 groups do not fit 11 levels per row"):
        make_experiment(config).abstract_state()


def finished(name, workdir):
    config = presets.get_config(name)
    config.optimizer.name = "adamw"  # compiles in half the time
    experiment = make_experiment(config)
    assert train.train(experiment, workdir)
    evaluate.report(experiment, workdir)
    return experiment, json.loads((workdir / "evaluation.json").read_text())


@pytest.mark.slow
def test_a_run_of_text_ends_with_its_bound_and_texts(tmp_path):
    experiment, record = finished("text_cdcd:smoke", tmp_path)
    assert record["bits_per_unit"] > 0 and record["cross_entropy_over_uniform_logsnr"] > 0
    report = (tmp_path / "report.txt").read_text("utf-8")
    assert "bound of Gaussian diffusion on embeddings" in report and "(no bound)" in report
    samples = [json.loads(line) for line in (tmp_path / "samples/step-4.jsonl").open()]
    assert [s["kind"] for s in samples] == ["free", "free", "infilled"]
    given, text = samples[2]["given"], samples[2]["text"]
    assert all(a in ("▁", b) for a, b in zip(given, text, strict=True))
    _, grid = stored_generator(experiment, tmp_path, 4)
    assert grid == "equal shares of the learned density"
    own = experiment.config.copy_and_resolve_references()
    own.spacing.update(steps=(4,), budget=0, replicates=2)
    (record,) = spacing.compare(dataclasses.replace(experiment, config=own), tmp_path)["records"]
    assert {"edm_rho", "learned density"} <= record["grids"].keys()
    assert ", of " in stored_generator(experiment, tmp_path, 4)[1]


@pytest.mark.slow
def test_a_run_of_a_table_ends_with_rows(tmp_path):
    experiment, record = finished("table_cdtd:smoke", tmp_path)
    assert record["unigram_bits_per_unit"] is None
    with (tmp_path / "samples/step-4.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 4 and list(rows[0]) == [c.name for c in experiment.dataset.columns]
    assert {row["sex"] for row in rows} <= {"sex 1", "sex 2"}
    with pytest.raises(ValueError, match="not for tables"):
        spacing.check(experiment)


@pytest.mark.slow
def test_a_forest_tells_training_rows_from_columns_drawn_one_by_one():
    found = tables.references(data.diabetes(), 2)
    same, apart = found["training rows"], found["columns drawn one by one"]
    assert same["interval"][0] < 0.5 < same["interval"][1]
    assert apart["interval"][0] > 0.6 and apart["correlations"] > 2 * same["correlations"]


def test_distances_and_intervals_of_judged_rows():
    dataset = data.diabetes()
    codes = tables.codes_of(dataset.train)
    nearest = tables.nearest_distance(
        tables.features(dataset.columns, codes[:5]), tables.features(dataset.columns, codes)
    )
    np.testing.assert_array_equal(nearest, 0)
    summary = tables.mean([{"accuracy": 0.5, "rows": 266.0}] * 3)
    assert summary["interval"][0] == pytest.approx(0.44, abs=0.005)
