"""Samples of documents: lengths as in the data, ends at EOS, no padding written."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mdm_jax import data
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import evaluate
from mdm_jax.launch.modes.sample import Job, free_canvases, make_jobs, show_samples
from mdm_jax.launch.presets import quickstart, text_ar, text_block, text_uniform

pytestmark = pytest.mark.usefixtures("one_device")

LENGTH = 16
TEXTS = ["ab" * n + "c" for n in (0, 1, 1, 2, 2, 2, 3, 5)] * 10  # 1 to 11 characters


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts") / "documents.jsonl"
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    return place


def dataset_of(path, **settings):
    return data.documents(path, LENGTH, fractions=(0.6, 0.2, 0.2), split_seed=1, **settings)


def jobs_of(dataset, count=400, gap=0, **settings):
    return make_jobs(dataset, dataset.valid, num_samples=count, gap=gap, prompts="", **settings)


def shown(dataset, jobs, tokens, tmp_path):
    return show_samples(dataset, jobs, lambda *_: np.asarray(tokens), tmp_path, 1, None, None)[
        "samples"
    ]


@pytest.mark.parametrize("packing", ["", "first_fit"])
def test_free_samples_have_the_lengths_of_training_documents(path, packing):
    dataset = dataset_of(path, packing=packing)
    rows = data.gather(dataset.train, range(len(dataset.train)))
    lengths = rows.eligible.sum(1)
    assert lengths.min() < LENGTH
    jobs = jobs_of(dataset)
    for job in jobs:
        masked = job.canvas == dataset.mask_id
        np.testing.assert_array_equal(masked, job.documents > 0)
        assert (job.canvas[~masked] == dataset.tokenizer.pad_id).all()
    drawn = np.array([(job.documents > 0).sum() for job in jobs])
    share = [np.bincount(n, minlength=LENGTH + 1) / len(n) for n in (lengths, drawn)]
    # Five standard errors of a share of 400 draws; the seed is fixed.
    np.testing.assert_allclose(*share, atol=5 * 0.5 / 20)
    canvas, documents = free_canvases(dataset, 400)
    np.testing.assert_array_equal(canvas, [job.canvas for job in jobs])
    np.testing.assert_array_equal(documents, [job.documents for job in jobs])


def test_whole_rows_are_free_where_the_model_ends_its_texts(path):
    for dataset, settings in (
        (dataset_of(path), {"left_to_right": True}),
        (dataset_of(path, document_padding="eos_scored"), {}),
    ):
        for job in jobs_of(dataset, 5, **settings):
            assert (job.canvas == dataset.mask_id).all() and (job.documents == 1).all()


def test_texts_end_at_their_eos_and_documents_are_told_apart(path, tmp_path):
    dataset = dataset_of(path)
    encode, eos, mask = dataset.tokenizer.encode, [dataset.tokenizer.eos_id], [dataset.mask_id]
    blank = np.full(8, dataset.mask_id, np.int32)
    row = np.concatenate([encode("ab"), eos, encode("ba"), eos, eos, encode("c")])
    answer = np.concatenate([encode("a"), blank[1:]])
    gap = np.concatenate([encode("a"), mask, mask, encode("b"), eos, eos, eos, eos])
    filled = np.concatenate([encode("a"), eos, encode("a"), encode("b"), eos, eos, eos, eos])
    numbers = np.array([1, 1, 1, 2, 2, 2, 3, 3])
    jobs = [
        Job("free", blank, np.ones(8, int)),
        Job("free", blank, numbers),
        Job("answer", answer, np.ones(8, int), np.where(blank > 0, row, 0)),
        Job("infilled", gap, np.ones(8, int), gap),
        Job("infilled", np.where(numbers == 2, blank, row), numbers, row),
    ]
    records = shown(dataset, jobs, [row, row, row, filled, row], tmp_path)
    assert [(r["kind"], r["text"], r.get("given"), r.get("original")) for r in records] == [
        ("free", "ab", None, None),
        ("free", "ab", None, None),
        ("free", "ba", None, None),
        ("free", "", None, None),
        ("answer", "ab", "a▁▁▁▁▁▁▁", "ab␃ba␃␃c"),
        ("infilled", "a␃ab", "a▁▁b", "a▁▁b"),
        ("infilled", "ba", None, "ba"),
    ]


def test_gaps_are_in_the_text_not_in_its_padding(path):
    dataset = dataset_of(path, document_padding="eos_scored")
    (job,) = jobs_of(dataset, 1, gap=1)[1:]
    eos = dataset.tokenizer.eos_id
    assert (job.original[job.canvas == dataset.mask_id] != eos).all()


def test_quality_is_of_texts_up_to_their_eos(path, tmp_path):
    """Every text has two tokens, EOS included, however long its row is."""
    config = quickstart("smoke")
    config.data.update(source="documents", path=str(path), length=LENGTH, packing="first_fit")
    config.data.update(train_stride=1, fractions=(0.6, 0.2, 0.2))
    config.sample.update(gap=0, sampler="ancestral", quality_steps=(2,), quality_texts=6)
    experiment = make_experiment(config)
    codec, canvases = experiment.dataset.tokenizer, []

    def generate(params, key, canvas, documents, numbers):
        canvases.append(canvas)
        second = (np.diff(documents, axis=1, prepend=0) == 0) & (documents > 0)
        return np.where(second, codec.eos_id, np.where(documents > 0, codec.encode("a"), canvas))

    family = dataclasses.replace(experiment.family, generator=lambda _: generate)
    experiment = dataclasses.replace(experiment, family=family)
    files = evaluate.measure_quality(experiment, tmp_path, 0, {}, jax.random.key(0))
    record = json.loads(pathlib.Path(files[0]).read_text())["quality"]
    assert (record["texts"], record["tokens"]) == (6, 12)
    np.testing.assert_array_equal(canvases[0], free_canvases(experiment.dataset, 6)[0])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, marks=[pytest.mark.slow] * (config in (text_block, text_ar)))
        for config in (quickstart, text_block, text_uniform, text_ar)
    ],
)
def test_samplers_do_not_write_padding(path, config):
    """Random parameters over five ids, of which padding is one: it would be in every row."""
    config = config("smoke")
    config.data.update(source="documents", path=str(path), length=LENGTH)
    config.data.update(train_stride=1, fractions=(0.6, 0.2, 0.2))
    config.sample.gap = 0
    config.train.monitors = ()
    experiment = make_experiment(config)
    dataset = experiment.dataset
    canvas = np.full((8, LENGTH), dataset.mask_id, np.int32)
    params = tiny.perturbed(
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), experiment.abstract_state().params)
    )
    tokens = experiment.generate(params, jax.random.key(0), canvas, np.ones_like(canvas))
    assert dataset.absent_ids == (dataset.tokenizer.pad_id,)
    whole = [(job.documents == 1).all() for job in experiment.jobs]
    assert all(whole) if config.process == "autoregressive" else not any(whole)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=dataset.vocab_size)
    assert counts[dataset.tokenizer.pad_id] == counts[dataset.mask_id] == 0
    assert counts[dataset.tokenizer.eos_id] > 0


def test_windows_of_text_have_neither_padding_nor_eos():
    dataset = data.embedded_text(32)
    codec = dataset.tokenizer
    assert dataset.absent_ids == (codec.pad_id, codec.eos_id)
