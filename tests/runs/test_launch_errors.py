"""What the launcher says when something is wrong: one clean line, and nothing left behind."""

import errno
import functools
import json
import pathlib
import types

import launching
import pytest
from launching import DIGITS, QUICKSTART

from mdm_jax import training
from mdm_jax.launch import main, presets
from mdm_jax.launch import workdir as launch_workdir
from mdm_jax.launch.modes import evaluate, train

pytestmark = pytest.mark.first


@pytest.fixture
def launch(monkeypatch, capsys):
    """Calls the launcher in this process; returns (exit status, stdout, stderr)."""
    return functools.partial(launching.call, monkeypatch, capsys)


@pytest.fixture
def refused(launch, tmp_path):
    """Calls it for a new workdir and asserts one line of error and no trace on the disk."""

    def call(*arguments, config=QUICKSTART):
        workdir = tmp_path / "run"
        code, _, err = launch(f"--config={config}", f"--workdir={workdir}", *arguments)
        assert code == 2, err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and err.strip().splitlines()[-1] == lines[0]
        assert not workdir.exists()
        return lines[0]

    return call


# --- flags and fields ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("--config.trian.steps=3", ["config has no field 'trian'", "--config.train"]),
        (
            "--config.train.stepz=3",
            ["config.train has no field 'stepz'", "mean --config.train.steps "],
        ),
        ("--noconfig.model.scan_layer", ["did you mean --config.model.scan_layers?"]),
        ("--config.train.steps.more=3", ["config.train.steps is a value and has no fields"]),
        ("--config.data.xyzzy=3", ["config.data has no field 'xyzzy'; fields are ", "bpe_vocab"]),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest_names(refused, argument, expected):
    line = refused(argument)
    assert all(part in line for part in expected), line
    assert f"--{argument.lstrip('-').removeprefix('no').split('=')[0]}" in line


@pytest.mark.parametrize("argument", ["--config.train.steps=3.5", "--config.optimizer.peak=high"])
def test_a_value_of_the_wrong_type_is_refused(launch, tmp_path, argument):
    code, out, err = launch(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'run'}", argument)
    assert code == 1 and argument.split("=")[0] in out + err and "Traceback" not in out + err


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--workdir=x"], "--config is required to train"),
        ([f"--config={QUICKSTART}"], "--workdir is required"),
        (["--workdir=x", "--config.train.steps=3"], "give --config=FILE before it"),
        ([f"--config={QUICKSTART}", "--workdir=x", "more"], "unexpected arguments ['more']"),
        ([f"--config={QUICKSTART}", "--workdir=x", "--path=a.txt"], "--path is of mdm new; --mode"),
        (["compile", f"--config={QUICKSTART}", "--live"], "--live is of mdm sample; --mode=com"),
        (
            ["sample", "--source=x", "--dtype=int4"],
            "--dtype is of mdm export, eval; --mode=sample",
        ),
        (["--config=experiments/configs/quikstart.py"], "did you mean experiments/configs/quick"),
        (["--config=nowhere.py"], "there is no file nowhere.py"),
        (["--config=quikstart"], "did you mean quickstart? built in are quickstart, text_ar"),
        (["--config=quickstart:smoker"], "--config=quickstart:smoker: quickstart has the variant"),
        ([f"--config={QUICKSTART}r"], "quickstart has the variants smoke, char; not 'smoker'"),
        (["--workdir=nowhere", "--mode=sample"], "nowhere holds no run (no config.json)"),
    ],
)
def test_command_lines_that_are_not_complete(launch, arguments, expected):
    code, _, err = launch(*arguments)
    assert code == 2 and expected in err and len(err.strip().splitlines()) == 1


def test_files_of_flags_are_read_where_they_stand(launch, tmp_path):
    """The config may stand in one, with its settings; what comes later wins."""
    file, workdir = tmp_path / "flags", f"--workdir={tmp_path / 'run'}"
    file.write_text(f"# mine\n--config=text_ar:smoke\n--config={QUICKSTART}\n--config.seed=-5\n")
    code, _, err = launch(f"--flagfile={file}", workdir, "--config.train.steps=5")
    assert code == 2 and "seed must be" in err and "got -5" in err
    code, _, err = launch("--flagfile", file, workdir, "--config.seed=-7")
    assert code == 2 and "got -7" in err
    file.write_text("--config.train.stepz=5\n")
    code, _, err = launch(f"--flagfile={file}", workdir, f"--config={QUICKSTART}")
    assert code == 2 and "did you mean --config.train.steps or" in err
    code, _, err = launch(f"--flagfile={file}s", workdir)
    assert (
        code == 2
        and f"Unable to open flagfile: [Errno 2] No such file or directory: '{file}s'" in err
    )


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, field, near",
    [
        ("--config.variance.order=miror", "variance.order", "mirror"),
        ("--config.variance.order=('stratified','mirrror')", "variance.order", "mirror"),
        ("--config.sample.sampler=first_hiting", "sample.sampler", "first_hitting"),
        ("--config.law.name=liner", "law.name", "linear"),
        ("--config.corruption.name=fixed_counts", "corruption.name", "fixed_count"),
        ("--config.data.source=embeded", "data.source", "embedded"),
        ("--config.optimizer.name=adam", "optimizer.name", "adamw"),
        ("--config.model.dtype=float16", "model.dtype", "float32"),
        ("--config.evaluate.final_split=tests", "evaluate.final_split", "test"),
    ],
)
def test_unknown_names_are_refused_with_suggestions(refused, argument, field, near):
    name = argument.split("=")[1].strip("()").split(",")[-1].strip("'")
    line = refused(argument)
    assert f"{field}: unknown name '{name}'" in line and f"'{near}'" in line
    assert "known: " in line


def test_an_unknown_grid_is_refused(refused):
    grid = "--config.sample.grid=unifrom_masking_rate"
    line = refused("--config.sample.sampler=ancestral", grid)
    assert "sample.grid: unknown name" in line and "did you mean 'uniform_masking_rate'" in line


# --- settings that cannot work, refused before anything is trained ------------------------------


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config.train.batch_size=80000"], "larger than the source"),
        (["--config.train.batch_size=7"], "does not split over 8 data-parallel devices"),
        (["--config.train.num_microbatches=4"], "use a multiple of 32"),
        (
            ["--config.train.num_microbatches=0"],
            "num_microbatches must be a whole number in [1, 1e6], got 0",
        ),
        (["--config.mesh.data=3"], "does not use the 8 devices"),
        (["--config.mesh.fsdp=3"], "does not use the 8 devices"),
        (["--config.train.steps=2"], "warmup_steps must lie in [0, total_steps)"),
        (
            ["--config.train.log_every=0"],
            "train.log_every must be a whole number in [1, 2e9], got 0",
        ),
        (
            ["--config.train.keep_last=0"],
            "train.keep_last must be a whole number in [1, 1e6], got 0",
        ),
        (
            ["--config.optimizer.ema_decay=1.5"],
            "optimizer.ema_decay must be a number in [0, 1), got 1.5",
        ),
        (
            ["--config.optimizer.clip_norm=-1.0"],
            "optimizer.clip_norm must be a number in [0, 1e6], got -1.0",
        ),
        (
            ["--config.evaluate.passes=0"],
            "evaluate.passes must be a whole number in [1, 1e6], got 0",
        ),
        (
            ["--config.evaluate.final_replicates=0"],
            "final_replicates must be a whole number in [1, 1e6], got 0",
        ),
        (
            ["--config.evaluate.batch_size=0"],
            "evaluate.batch_size must be a whole number in [1, 1e6], got 0",
        ),
        (["--config.sample.gap=-1"], "sample.gap must be a whole number in [0, 2e9], got -1"),
        (
            ["--config.sample.num_samples=0"],
            "sample.num_samples must be a whole number in [1, 1e6], got 0",
        ),
        (["--config.sample.prompts=/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
        (["--config.sample.top_p=0.0"], "top_p"),
        (["--config.sample.temperature=-1.0"], "temperature"),
        (["--config.model.width=10"], "width 10 must be a multiple of 2 * num_heads"),
        (["--config.model.mlp=relu"], "model.mlp: unknown name 'relu'"),
        (["--config.seed=-1"], "seed must be a whole number in [0, 4294967295], got -1"),
        (["--config.data.fractions=(1.0,0.0,0.0)"], "neither test nor validation rows"),
        (
            ["--config.data.fractions=(0.9,0.0,0.1)", "--config.evaluate.final_split=valid"],
            "final_split='valid': the data have no validation rows, only",
        ),
        (["--config.sample.quality_steps=(4,16)"], "'first_hitting' sets its own number of steps"),
        (["--config.train.init_from=/nowhere"], "train.init_from: /nowhere holds no run"),
        (["--mode=sample", "--steps=4"], "--steps: 'first_hitting' sets its own number of steps"),
        (["--mode=evaluate"], "has no checkpoint yet"),
        (["--mode=sample"], "has no checkpoint yet"),
        (
            ["--config.variance.order=('mirror','stratified')"],
            "the order is couple, warp, replicate",
        ),
        (["--config.data.prompt_length=5"], "data.source='embedded' does not read data.prompt_len"),
        (
            ["--config.process=uniform", "--config.sample.approximate_cache=dual"],
            "sample.approximate_cache=dual is for process=masked",
        ),
        (["--config.data.tokenizer=nowhere"], "tokenizer must be 'char', 'byte', 'bpe'"),
    ],
    ids=lambda value: value[0].removeprefix("--config.") if isinstance(value, list) else "",
)
def test_settings_that_cannot_work(refused, arguments, expected):
    assert expected in refused(*arguments)


def test_prompts_that_do_not_fit_name_file_and_line(refused, tmp_path):
    assert "error: sample.prompts: /nope is no file" in refused("--config.sample.prompts=/nope")
    path = tmp_path / "prompts.txt"
    path.write_text("short ▁▁\n" + 40 * "long" + "\n", "utf-8")
    assert f"{path}:2: 160 tokens do not fit a row of 32" in refused(
        f"--config.sample.prompts={path}"
    )
    path.write_text("", "utf-8")
    assert f"{path}: the file is empty" in refused(f"--config.sample.prompts={path}")


def test_rows_to_evaluate_without_a_character_are_refused(refused, tmp_path):
    pairs = [tmp_path / "train.jsonl", tmp_path / "valid.jsonl"]
    for path, answers in zip(pairs, (["b"] * 9, ["", "b", "", "b"])):
        path.write_text("".join(f'{{"prompt": "a", "answer": "{a}"}}\n' for a in answers))
    source = [*_source("jsonl", pairs[0]), f"--config.data.valid_path={pairs[1]}"]
    source += ["--config.evaluate.max_rows=2", "--config.sample.gap=0"]
    line = refused(*source)
    assert "max_rows=2: the rows of the valid split that are evaluated hold no character" in line


def _source(kind, path):
    length = ["--config.data.length=128", "--config.data.train_stride=1"]
    sizes = ["--config.data.prompt_length=8", "--config.data.answer_length=8"]
    start = [f"--config.data.source={kind}", f"--config.data.path={path}"]
    return start + (length + sizes if kind == "jsonl" else [])


@pytest.mark.parametrize(
    "kind, content, expected",
    [
        ("text", None, "{path}"),
        ("text", b"", "{path}: the file is empty"),
        ("text", b"good\nbad \xff\n", "{path}:2: not UTF-8"),
        ("text", b"too short a text: no", "{path}: too short"),
        ("jsonl", None, "{path}"),
        ("jsonl", b"", "{path}: the file is empty"),
        ("jsonl", b'{"prompt": "a", "answer": "b"}\n{"prompt": \n', "{path}:2: not JSON"),
        ("jsonl", b'{"prompt": "a"}\n', "{path}:1: no field 'answer'"),
        ("jsonl", b'{"prompt": "long prompt", "answer": "b"}\n' * 9, "{path}"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_files_are_named(refused, tmp_path, kind, content, expected):
    path = tmp_path / "data.file"
    if content is not None:
        path.write_bytes(content)
    assert expected.format(path=path) in refused(*_source(kind, path))


def test_a_source_without_its_path_is_refused(refused):
    assert "data.source='text' needs --config.data.path" in refused("--config.data.source=text")


def test_an_unknown_tfds_dataset_is_refused(refused, tmp_path):
    line = refused(
        "--config.data.source=tfds",
        "--config.data.name=no_such_dataset",
        "--config.data.train_stride=1",
        f"--config.data.data_dir={tmp_path}",
    )
    assert "tfds dataset 'no_such_dataset'" in line and "not found" in line
    assert "data.kind" in refused("--config.data.source=tfds", "--config.data.kind=sound")


# --- workdirs -----------------------------------------------------------------------------------


def test_a_directory_that_is_something_else_is_refused(launch, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = launch(f"--config={QUICKSTART}", f"--workdir={tmp_path}")
    assert code == 2 and "is not empty and holds no run" in err
    code, _, err = launch(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'mine.txt'}")
    assert code == 2 and "is not a directory" in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_of_another_config_is_refused_with_what_differs(launch, tmp_path):

    launch_workdir.claim(tmp_path, presets.quickstart("smoke"))
    saved = (tmp_path / "config.json").read_text()
    changes = ["--config.optimizer.peak=0.5", "--config.variance.order=('systematic',)"]
    code, _, err = launch(f"--config={QUICKSTART}", f"--workdir={tmp_path}", *changes)
    assert code == 2 and "Traceback" not in err
    assert "optimizer.peak: 0.02 -> 0.5" in err
    assert 'variance.order: ["stratified", "ppots_slopes"] -> ["systematic"]' in err
    assert "--allow_config_change" in err
    assert (tmp_path / "config.json").read_text() == saved
    code, _, err = launch(f"--workdir={tmp_path}", "--mode=evaluate", "--config.seed=4")
    assert code == 2 and "seed: 0 -> 4" in err
    code, _, err = launch(f"--workdir={tmp_path}", "--mode=evaluate")
    assert code == 2 and "has no checkpoint yet" in err


def test_claiming_keeps_the_old_config(tmp_path):

    config = presets.quickstart("smoke")
    launch_workdir.claim(tmp_path, config)
    first = (tmp_path / "config.json").read_text(), (tmp_path / "run.json").read_text()
    config.sample.num_samples = 9  # how a model is looked at may differ
    launch_workdir.check(tmp_path, config)
    launch_workdir.claim(tmp_path, config)
    assert ((tmp_path / "config.json").read_text(), (tmp_path / "run.json").read_text()) == first
    for number, peak in ((1, 0.5), (2, 0.25)):
        config.optimizer.peak = peak
        with pytest.raises(launch_workdir.WorkdirError, match="optimizer.peak"):
            launch_workdir.claim(tmp_path, config)  # never without the flag
        launch_workdir.claim(tmp_path, config, allow_change=True)
        assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["peak"] == peak
        assert (tmp_path / f"config.{number}.json").exists()
        assert (tmp_path / f"run.{number}.json").exists() and (tmp_path / "run.json").exists()
    assert json.loads((tmp_path / "config.1.json").read_text()) == json.loads(first[0])


def test_killed_while_claiming_is_no_obstacle(tmp_path):
    """Between config.json and run.json, or inside either, the same command goes on."""

    config = presets.quickstart("smoke")
    (tmp_path / "config.partial").write_text('{"seed":')
    launch_workdir.check(tmp_path, config)
    launch_workdir.claim(tmp_path, config)
    (tmp_path / "run.json").unlink()
    launch_workdir.check(tmp_path, config)
    launch_workdir.claim(tmp_path, config)
    assert json.loads((tmp_path / "run.json").read_text())["seed"] == 0


def test_digits_do_not_read_text_settings(refused):
    assert "data.source='digits' does not read data.length=9" in refused(
        "--config.data.length=9", config=DIGITS
    )


# --- what happens during a run ------------------------------------------------------------------


@pytest.fixture
def stopped(launch, monkeypatch, tmp_path):
    """Calls the launcher with one of ``run``'s functions replaced by one that raises."""

    def call(function, error):

        def fail(*_, **__):
            raise error

        monkeypatch.setattr(train, "train", lambda *_: True)
        monkeypatch.setattr({"train": train, "report": evaluate}[function], function, fail)
        return launch(f"--config={QUICKSTART}", f"--workdir={tmp_path / 'a dir'}", "--mode=train")

    return call


def test_a_run_that_cannot_go_on_says_why_in_one_line(stopped):
    from mdm_jax.training.loop import TrainingStopped

    code, _, err = stopped("train", TrainingStopped("10 steps in a row were not finite"))
    assert code == 2 and err == "error: 10 steps in a row were not finite\n"


def test_errors_of_a_full_disk_name_the_directory(stopped):
    code, _, err = stopped("train", OSError(errno.ENOSPC, "No space left on device"))
    assert code == 2 and err.endswith("a dir: [Errno 28] No space left on device\n")


def test_a_run_that_has_saved_nothing_gives_way_to_another_config(launch, monkeypatch, tmp_path):
    """Its step does not fit: what the error advises must be possible in the same directory."""

    def fail(*_):
        raise MemoryError("the step does not fit")

    monkeypatch.setattr(training, "compile_step", fail)
    line = (f"--config={QUICKSTART}", f"--workdir={tmp_path}")
    changed = ("--config.train.batch_size=16", "--config.data.tokenizer=byte")
    for more in ((), changed):
        code, _, err = launch(*line, *more)
        assert code == 2 and "the step does not fit" in err
    kept = [json.loads((tmp_path / f"config{i}.json").read_text()) for i in (".1", "")]
    assert [config["train"]["batch_size"] for config in kept] == [8, 16]
    kinds = [json.loads((tmp_path / f"tokenizer{i}.json").read_text())["kind"] for i in (".1", "")]
    assert kinds == ["char", "byte"] and not (tmp_path / "config.2.json").exists()
    (tmp_path / "checkpoints" / "unsaved").unlink()  # as saving does
    code, _, err = launch(*line)
    assert code == 2 and "train.batch_size: 16 -> 8" in err


def test_an_interrupt_during_the_final_evaluation_says_how_to_go_on(stopped):
    from mdm_jax.training.loop import Interrupted

    code, out, _ = stopped("report", Interrupted())
    assert code == 130 and "the same command line resumes" in out
    assert out.strip().endswith("a dir' --mode=train")  # quoted, so that it can be pasted


def test_a_second_interrupt_is_no_traceback(stopped):
    code, _, err = stopped("train", KeyboardInterrupt())
    assert code == 130 and "what was saved before is whole" in err and "Traceback" not in err


def test_one_of_several_processes_that_is_stopped_at_once_does_not_wait(monkeypatch, capsys):
    """As one that fails does not: the others might wait for it, and it for them."""

    def stop(_):
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(main, "_run", stop)
    monkeypatch.setattr(main, "_MODE", types.SimpleNamespace(value="train"))
    monkeypatch.setattr(main.os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        main._run_as_one_of_several(pathlib.Path("run"))
    assert left.value.code == 130
    assert "stopped at once" in capsys.readouterr().err
    monkeypatch.setattr(main, "_run", lambda _: 130)  # saved, as all have agreed
    assert main._run_as_one_of_several(pathlib.Path("run")) == 130


def test_errors_of_the_program_keep_their_traceback(stopped):
    with pytest.raises(ZeroDivisionError):
        stopped("train", ZeroDivisionError())
