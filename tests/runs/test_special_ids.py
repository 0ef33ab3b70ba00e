"""A run over tokens of a released model: mask among the ids, padding that is EOS, spare rows."""

import json
import pathlib

import jax
import launching
import numpy as np
import pytest
import tiny

from mdm_jax import data
from mdm_jax.data.tokenizers import SpecialIds
from mdm_jax.hub.tokenizer import HubTokenizer
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.presets import quickstart, text_ar, text_block, text_uniform

LLADA = pathlib.Path(__file__).parents[1] / "data/hub/llada-1"
ROWS = 300  # tokens are 0 to 287, the last of them the mask


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(documents, tokenizer): ids 285 of mask and 283 of EOS and padding, 12 rows to spare."""
    place = tmp_path_factory.mktemp("special")
    texts = ["ab" * n + "c" for n in (1, 2, 3, 5, 2, 4)] * 8
    (place / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    codec = HubTokenizer(
        (LLADA / "tokenizer.json").read_text("utf-8"), SpecialIds(283, 283, 285), vocab_size=ROWS
    )
    codec.save(place / "tokenizer.json")
    return place / "texts.jsonl", place / "tokenizer.json"


def configured(make, files):
    config = make("smoke")
    config.data.update(source="documents", path=str(files[0]), tokenizer=str(files[1]), length=16)
    config.data.update(train_stride=1, fractions=(0.6, 0.2, 0.2))
    config.train.monitors = ()
    return config


def test_the_special_ids_are_those_of_the_tokenizer(files):
    dataset = data.documents(files[0], 16, fractions=(0.6, 0.2, 0.2), tokenizer=str(files[1]))
    assert (dataset.vocab_size, dataset.mask_id) == (ROWS, 285)
    assert dataset.absent_ids == tuple(range(288, ROWS))  # padding is EOS, which rows hold
    rows = data.gather(dataset.train, range(len(dataset.train)))
    assert not np.isin(rows.tokens, (285, *dataset.absent_ids)).any()
    assert (rows.tokens[rows.documents == 0] == 283).all()
    windows = data.text(files[0], 16, tokenizer=str(files[1]))
    assert windows.absent_ids == (283, *range(288, ROWS))


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("make", [quickstart, text_block, text_ar])
def test_processes_take_them(files, make):
    experiment = make_experiment(configured(make, files))
    assert experiment.dataset.mask_id == experiment.objective.corruption.mask_id == 285
    assert experiment.model.config.vocab_size == ROWS


@pytest.mark.usefixtures("one_device")
def test_samples_hold_only_tokens_that_exist(files):
    """Random parameters over all rows: of 2048 tokens 80 would be others."""
    experiment = make_experiment(configured(quickstart, files))
    canvas = np.full((128, 16), 285, np.int32)
    params = tiny.perturbed(
        jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), experiment.abstract_state().params
        )
    )
    tokens = experiment.generate(params, jax.random.key(0), canvas, np.ones_like(canvas))
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=ROWS)
    assert counts[285] == counts[288:].sum() == 0
    assert counts[283] > 0 and (counts > 0).sum() > 200


@pytest.mark.usefixtures("one_device")
def test_what_needs_the_mask_token_last_says_so(files):
    with pytest.raises(ValueError, match="process=uniform needs .* has id 285"):
        make_experiment(configured(text_uniform, files))
    config = configured(quickstart, files)
    config.model.self_conditioning = True
    with pytest.raises(ValueError, match="model.self_conditioning needs .* has id 285"):
        make_experiment(config)


@pytest.mark.slow
def test_a_run_trains_evaluates_and_samples(files, tmp_path, monkeypatch, capsys):
    """By the launcher; the tokenizer is read back from the run."""
    launching.on_one_device(monkeypatch)
    run = tmp_path / "run"
    code, out, err = launching.call(
        monkeypatch,
        capsys,
        "--config=quickstart:smoke",
        f"--workdir={run}",
        "--config.data.source=documents",
        f"--config.data.path={files[0]}",
        f"--config.data.tokenizer={files[1]}",
        "--config.data.length=16",
        "--config.data.train_stride=1",
        "--config.data.fractions=(0.6,0.2,0.2)",
        "--config.model.width=4",
        "--config.model.num_heads=1",
        "--config.train.steps=4",
        "--config.train.evaluate_every=4",
        "--config.train.checkpoint_every=4",
        "--config.sample.gap=0",
    )
    assert code == 0, err
    codec = data.load_tokenizer(run / "tokenizer.json")
    assert isinstance(codec, HubTokenizer) and codec.special_ids == (283, 283, 285)
    assert 0 < json.loads((run / "evaluation.json").read_text())["nats_per_token"] < np.log(400)
    code, out, err = launching.call(monkeypatch, capsys, f"--workdir={run}", "--mode=sample")
    assert code == 0, err
    (path, *_) = sorted((run / "samples").glob("*.jsonl"))
    texts = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    assert texts and "▁" not in "".join(texts)
