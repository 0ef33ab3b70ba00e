"""Samples from words of one's own, for every process: kept, filled, shown as they are made."""

import functools
import json
import pathlib
import re

import jax
import launching
import numpy as np
import pytest
import saved_run
from PIL import Image
from variants import slow_except

from mdm_jax import hub
from mdm_jax.launch import presets
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import evaluate
from mdm_jax.launch.sampling.options import Options, rows_and_watcher
from mdm_jax.launch.sampling.requests import make_request
from mdm_jax.launch.sampling.watch import in_batches

pytestmark = [pytest.mark.usefixtures("one_device"), pytest.mark.first]

CONFIGS = {
    "masked": presets.quickstart,
    "block": presets.text_block,
    "uniform": presets.text_uniform,
    "autoregressive": presets.text_ar,
    "gaussian": presets.digits_gaussian,
    "pictures": presets.digits_masked,
}
TEXTS = list(CONFIGS)[:4]
MODELS = pathlib.Path(__file__).parents[1] / "data" / "hub"
PROMPT, INFILL = make_request("--prompt", "The ", None, 9), make_request("--infill", infill="a▁▁5b")


@pytest.fixture(scope="module")
def run_of(one_device, tmp_path_factory):
    """(experiment, workdir) of a process, with random parameters."""

    @functools.cache
    def made(process):
        config = CONFIGS[process]("smoke")
        config.sample.num_samples = 2
        experiment = make_experiment(config)
        workdir = tmp_path_factory.mktemp(process) / "run"
        if process in TEXTS:
            saved_run.save(experiment, workdir)
        return experiment, workdir

    return made


@pytest.fixture
def launch(monkeypatch, capsys):
    return functools.partial(launching.call, monkeypatch, capsys)


def sample(run, *requests, **asked):
    experiment, workdir = run
    return evaluate.sample(experiment, workdir, asked=Options(requests, **asked))


# --- what is made and what is shown ---------------------------------------------------------------


@pytest.mark.parametrize("process", slow_except({"autoregressive"}, CONFIGS))
def test_what_is_shown_is_what_is_made(run_of, process):
    """Every state has the given tokens, the last is the result, watching changes nothing."""
    experiment, _ = run_of(process)
    canvas, documents = np.full((2, experiment.dataset.length), experiment.dataset.mask_id), None
    if process in TEXTS:
        (one, two), _ = rows_and_watcher(experiment, Options((PROMPT,), count=2))
        canvas, documents = np.stack([one.canvas, two.canvas]), np.stack([one.documents] * 2)
    params, frames = experiment.initial_state().params, []
    arguments = params, jax.random.key(1), canvas, documents
    made = experiment.family.generator(4)(*arguments)
    shown = experiment.family.generator(4, None, (frames.append, True))(*arguments)
    jax.effects_barrier()
    np.testing.assert_array_equal(made, shown)
    # One token at a time, along the grid, or from position to position; two blocks have places.
    steps = {"masked": [9], "block": range(9, 17), "autoregressive": [32], "pictures": [64]}
    assert len(frames) in steps.get(process, [4])
    mask = experiment.dataset.mask_id
    given, unwritten = canvas != mask, [frame == mask for frame in frames]
    if process == "block":  # given tokens of later blocks are not written yet
        frames = [np.where(given & left, canvas, frame) for frame, left in zip(frames, unwritten)]
        unwritten = [frame == mask for frame in frames]
    np.testing.assert_array_equal(made, frames[-1])
    assert all((frame[given] == canvas[given]).all() for frame in frames)
    left = [int(places.sum()) for places in unwritten]
    assert left == sorted(left, reverse=True) and left[-1] == 0
    assert (left[0] > 0) == (process not in ("uniform", "gaussian"))


@pytest.mark.parametrize("process", slow_except({"masked"}, TEXTS))
def test_prompts_are_kept_places_filled_and_seeds_repeated(run_of, process, tmp_path, capsys):
    run, sees_all = run_of(process), process in ("masked", "uniform")
    requests = (PROMPT, INFILL) if sees_all else (PROMPT,)
    gif = str(tmp_path / "film.gif")
    first = sample(run, *requests, count=2, seed=5)
    assert capsys.readouterr().out == ""
    again = sample(run, *requests, count=2, seed=5, live=True, gif=gif)
    other = sample(run, *requests, count=2, seed=6)
    assert first["samples"] == again["samples"] != other["samples"]
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"The ⟦{9 * '▁'}⟧⏎⏎The ⟦▁▁▁")
    lines = pathlib.Path(first["files"][0]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == first["samples"]
    texts = pathlib.Path(first["files"][1]).read_text()
    assert "--- prompt 1, sample 2 ---\nThe ⟦" in texts or not sees_all
    assert again["files"][-1] == gif
    with Image.open(gif) as image:
        assert image.n_frames > 3
    for record in first["samples"]:
        given, made, *rest = record["parts"]
        assert record["text"] == "".join(record["parts"]) and "▁" not in record["text"]
        if record["kind"] == "prompt":
            assert (record["prompt"], given, rest) == ("The ", "The ", [])
            assert record["answer"] == made and len(made) == 9
        else:
            assert (record["infill"], given, len(made), rest) == ("a▁▁5b", "a", 5, ["b"])
    if not sees_all:
        infill = make_request("--infill", infill="a▁▁9b")
        with pytest.raises(ValueError, match="--infill: .*from left to right, and a gap does not"):
            sample(run, infill)


def test_samples_from_nothing(run_of):
    run = run_of("masked")
    drawn = sample(run, length=7, count=4)["samples"]
    assert [(r["kind"], len(r["text"])) for r in drawn] == [("free", 7)] * 4
    jobs, _ = rows_and_watcher(run[0], Options(length=7))  # as many as the config says
    assert len(jobs) == 2 and len(rows_and_watcher(run[0], Options(count=5))[0]) == 5


def test_pictures_are_filmed_and_take_no_words(run_of, tmp_path):
    experiment, workdir = run_of("gaussian")
    for asked, message in (
        (Options((PROMPT,)), "this run's data are pictures"),
        (Options(length=3), "this run's data are pictures"),
        (Options(live=True), "--live shows texts"),
    ):
        with pytest.raises(ValueError, match=message):
            rows_and_watcher(experiment, asked)
    jobs, watcher = rows_and_watcher(experiment, Options(count=3, gif=str(tmp_path / "film.gif")))
    assert len(jobs) == 3
    canvas = np.stack([job.canvas for job in jobs])
    watcher.begin(canvas, np.ones_like(canvas))
    for shade in (0, 8, 16):
        watcher.show(np.full_like(canvas, shade))
    (path,) = watcher.write()
    with Image.open(path) as image:
        greys = []
        for frame in range(image.n_frames):
            image.seek(frame)
            greys.append(image.convert("RGB").getpixel((0, 0))[0])
    assert greys == pytest.approx([0, 128, 255], abs=3)


def test_batches_have_one_shape_and_rows_their_own_numbers():
    calls, watched = [], []

    class Watcher:
        def begin(self, canvas, documents):
            watched.append(len(canvas))

        def end(self):
            watched.append("end")

    def generate(params, key, canvas, documents, row_offset):
        calls.append((canvas.shape, row_offset))
        return canvas + row_offset

    canvas = np.arange(7)[:, None] * 10
    made = in_batches(generate, 3, Watcher())({}, None, canvas, canvas)
    assert calls == [((3, 1), 0), ((3, 1), 3), ((3, 1), 6)]
    assert watched == [3, "end", 3, "end", 1, "end"]
    assert made[:, 0].tolist() == [0, 10, 20, 33, 43, 53, 66]
    assert in_batches(generate, 9, None)({}, None, canvas, canvas).shape == (7, 1)


# --- the command ----------------------------------------------------------------------------------


def test_the_command_reads_words_from_flags_and_files(run_of, launch, tmp_path):
    experiment, workdir = run_of("masked")
    code, out, error = launch(
        *("--mode=sample", f"--workdir={workdir}", "--prompt=The ", "--infill=cat ▁▁4"),
        *("--n=4", "--seed=1", "--temperature=0.5"),
    )
    assert code == 0, error
    assert len(re.findall(r"^The cat ⟦.{4}⟧", out, re.MULTILINE | re.DOTALL)) == 4
    path = tmp_path / "words.jsonl"
    path.write_text('"a\\nb"\n{"infill": "▁▁3 of", "prompt": "in "}\n', "utf-8")
    code, out, error = launch(
        "--mode=sample", f"--workdir={workdir}", f"--prompts={path}", "--length=5", "--n=2"
    )
    assert code == 0 and "--- prompt 1, sample 2 ---\na\nb⟦" in out and "in ⟦" in out, error
    path.write_text('"é"\n', "utf-8")
    code, _, error = launch("--mode=sample", f"--workdir={workdir}", f"--prompts={path}")
    assert code == 2 and "words.jsonl:1: outside the vocabulary of this run: 'é' (1)" in error


def test_what_cannot_be_written_is_said_before_anything_runs(run_of, launch, tmp_path):
    _, workdir = run_of("masked")
    (tmp_path / "old.gif").write_text("")
    (tmp_path / "prompts.txt").write_text("a")
    for arguments, message in (
        (["--prompt="], "--prompt: the prompt is empty"),
        (["--prompt=" + 40 * "a"], "--prompt: 40 tokens do not fit a row of 32"),
        (["--infill=a ▁▁40"], "--infill: 42 tokens do not fit a row of 32"),
        (["--infill=a ▁ b"], "--infill: malformed place"),
        (["--infill=é ▁▁ ?é"], "outside the vocabulary of this run: 'é' (2)"),
        (["--prompt=a", f"--gif={tmp_path}/old.gif"], "old.gif exists"),
        (["--prompt=a", f"--prompts={tmp_path}/prompts.txt"], "give one of them"),
        ([f"--prompts={tmp_path}/none.jsonl"], "none.jsonl is no file"),
    ):
        code, _, error = launch("--mode=sample", f"--workdir={workdir}", *arguments)
        assert code == 2 and message in error, error
    code, _, error = launch("--mode=evaluate", f"--workdir={workdir}", "--prompt=a")
    assert code == 2 and "--prompt is of mdm sample; --mode=evaluate does not read it" in error


# --- released models ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_released_model_writes_from_words(launch, tmp_path):
    """Its own rule; the same with and without a film."""
    given = ["--mode=sample", f"--source={MODELS / 'a2d_qwen3-1'}", "--n=2", "--temperature=0.7"]
    path = tmp_path / "words.jsonl"
    path.write_text('{"prompt": "ab", "length": 4}\n"a ▁▁3 b"\n', "utf-8")
    records = []
    for more in ([], ["--live", f"--gif={tmp_path}/film.gif"]):
        to = tmp_path / f"records{len(more)}.jsonl"
        code, out, error = launch(*given, f"--prompts={path}", f"--to={to}", *more)
        assert code == 0, error
        records.append([json.loads(line) for line in to.read_text("utf-8").splitlines()])
    assert "--- infill 2, sample 2 ---" in out and records[0] == records[1]
    model = hub.load(MODELS / "a2d_qwen3-1")
    codec, key = model.tokenizer, jax.random.fold_in(jax.random.key(0), 1)
    ids = {"mask_id": codec.mask_id, "eos_id": codec.eos_id, "pad_id": codec.pad_id}
    prompts = [codec.encode("ab")] * 2
    made = hub.generate(model, prompts, 4, key=key, temperature=0.7, **ids)
    for record, row in zip(records[0], np.asarray(made.tokens)):
        assert record["text"] == codec.decode(codec.truncate_at_eos(row))
        assert record["prompt"] == record["parts"][0] == "ab"
    for record in records[0][2:]:
        assert (record["parts"][0], record["parts"][2]) == ("a ", " b")


def test_a_released_model_refuses_what_it_cannot_write(launch, tmp_path):
    path = MODELS / "a2d_qwen3-1"
    (tmp_path / "old.jsonl").write_text("")
    for arguments, message in (
        ([], "say what to write, --prompt, --infill or --prompts=FILE"),
        (["--prompt=a", f"--to={tmp_path}/old.jsonl"], "old.jsonl exists"),
        (["--infill=a ▁▁ b"], "--infill: no row says how much fits: write ▁▁5, or give --length"),
        (["--prompt=a", "--length=1000000"], "--prompt: 1000001 tokens, but the model states"),
        (["--prompt=a", "--workdir=runs/a"], "runs/a holds no run"),
    ):
        code, _, error = launch("--mode=sample", f"--source={path}", *arguments)
        assert code == 2 and message in error, error
