"""Metrics: what is dropped at a resume, bad lines, TensorBoard without TensorFlow, progress."""

import io
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from event_files import read_events

from mdm_jax import files, progress, training
from mdm_jax.launch import config as launch_config
from mdm_jax.launch.reports import writers


def _write(directory, steps, resume_step=0, again=()):
    writer = training.MetricWriter(directory, resume_step, again)
    for step in steps:
        writer.record(step, "train", {"loss": step / 10})
        writer.record(step, "evaluate", {"loss": np.float32(step)})
    writer.close()
    return writer.path


def _steps(path, kind="train"):
    return [record["step"] for record in training.read_metrics(path, kind)]


def test_records_come_back_as_written(tmp_path):
    path = _write(tmp_path, [2, 4])
    assert training.read_metrics(path) == [
        {"step": 2, "kind": "train", "loss": 0.2},
        {"step": 2, "kind": "evaluate", "loss": 2.0},
        {"step": 4, "kind": "train", "loss": 0.4},
        {"step": 4, "kind": "evaluate", "loss": 4.0},
    ]
    assert training.read_metrics(path, "other") == []


def test_resuming_drops_what_comes_again(tmp_path):
    _write(tmp_path, [2, 4, 6, 8])
    path = _write(tmp_path, [6, 8], resume_step=4)
    assert _steps(path) == [2, 4, 6, 8]


def test_a_kind_that_is_repeated_at_the_resume_step_is_dropped_there(tmp_path):
    _write(tmp_path, [2, 4])
    path = _write(tmp_path, [], resume_step=4, again=("evaluate",))
    assert (_steps(path), _steps(path, "evaluate")) == ([2, 4], [2])


def test_a_run_that_starts_over_starts_an_empty_file(tmp_path):
    path = _write(tmp_path, [2, 4])
    for number in (1, 2):
        before = path.read_bytes()
        assert _steps(_write(tmp_path, [2])) == [2]
        # What an older run left stays beside.
        assert (tmp_path / f"metrics.{number}.jsonl").read_bytes() == before


@pytest.mark.parametrize("cut", [1, 5, 20, 40])
def test_a_last_line_cut_off_by_a_kill_is_dropped(tmp_path, cut):
    path = _write(tmp_path, [2, 4])
    content = path.read_bytes()
    line = content.splitlines(keepends=True)[-1]
    assert cut < len(line)
    path.write_bytes(content[:-cut])
    if cut > 1:
        with pytest.raises(ValueError, match="metrics.jsonl:4"):
            training.read_metrics(path)
    resumed = _write(tmp_path, [6], resume_step=4)
    # Without its newline the last record is whole; with a byte less it is not.
    assert (_steps(resumed), _steps(resumed, "evaluate")) == (
        [2, 4, 6],
        [2, 4, 6] if cut == 1 else [2, 6],
    )


@pytest.mark.parametrize(
    "line",
    [
        *("not json", "[1, 2]", "7", '{"step": 3}', '{"kind": "train"}', "", "[" * 9999, "\xff"),
        '{"step": 3, "kind": "train", "losses": [1.0, "low"]}',
        '{"step": 3, "kind": "train", "losses": [[1.0]]}',
        '{"step": "3", "kind": "train"}',
        '{"step": true, "kind": "train"}',
        '{"step": 3.0, "kind": "train"}',
        '{"step": 3, "kind": ["train"]}',
        '{"step": 3, "kind": "train", "loss": "low"}',
        '{"step": 3, "kind": "train", "loss": null}',
    ],
    ids=lambda line: line[:40],
)
def test_a_bad_line_is_named_with_file_and_line(tmp_path, line):
    path = _write(tmp_path, [2, 4])
    lines = path.read_bytes().splitlines()
    lines[1] = line.encode("latin-1")
    path.write_bytes(b"\n".join(lines) + b"\n")
    expected = f"{path}:2: not a record"
    with pytest.raises(ValueError) as caught:
        training.read_metrics(path)
    assert expected in str(caught.value)
    with pytest.raises(ValueError) as caught:
        training.MetricWriter(tmp_path, 4)
    assert expected in str(caught.value)
    assert path.read_bytes().splitlines() == lines  # refused, not edited


def test_tensorboard_holds_scalars_text_and_pictures(tmp_path):
    writer = training.MetricWriter(tmp_path)
    writer.record(3, "train", {"loss": 1.5, "gradient_norm": 2.0})
    writer.text(3, "samples", "# hello\n*world*")
    writer.image(3, "picture", np.linspace(0, 1, 12).reshape(3, 4))
    writer.image(3, "colours", np.zeros((3, 4, 3)))
    writer.close()
    events = read_events(writer.tensorboard_directory)
    found = {v.tag: (e.step, v) for e in events for v in e.summary.value}
    assert found["train/loss"][0] == 3 and found["train/loss"][1].simple_value == 1.5
    assert found["train/gradient_norm"][1].simple_value == 2.0
    # Indented, so that Markdown keeps lines and signs as they are.
    assert found["samples/text_summary"][1].tensor.string_val == [b"    # hello\n    *world*"]
    assert found["picture"][1].image.height == 3 and found["colours"][1].image.width == 4


def test_values_over_the_noise_level_are_one_list_and_one_histogram(tmp_path):
    """Its bars, thirty as TensorBoard draws, are as high as the values; unknown ones have none."""
    writer = training.MetricWriter(tmp_path)
    loss = np.array([0.5, np.nan, 2.0], np.float32)
    writer.record(3, "monitor", {"level_loss": loss, "masked_share": np.float32(0.25)})
    writer.close()
    expected = {"level_loss": [0.5, None, 2.0], "masked_share": 0.25}
    assert training.read_metrics(writer.path) == [{"step": 3, "kind": "monitor", **expected}]
    assert "NaN" not in writer.path.read_text()
    found = {v.tag: v for e in read_events(writer.tensorboard_directory) for v in e.summary.value}
    assert {*found} == {"monitor/level_loss", "monitor/masked_share"}
    histogram = found["monitor/level_loss"].histo
    assert histogram.bucket == [0.5] * 10 + [0.0] * 10 + [2.0] * 10
    np.testing.assert_allclose(histogram.bucket_limit, np.arange(1, 31) / 30)
    assert (histogram.min, histogram.max) == (0, 1)
    resumed = training.MetricWriter(tmp_path, 3)
    resumed.close()
    assert training.read_metrics(writer.path)[0]["level_loss"] == [0.5, None, 2.0]


def test_results_are_shown_on_boards_and_leave_the_records_alone(tmp_path):
    writer = training.MetricWriter(tmp_path)
    writer.show(7, "test", {"bits_per_unit": 1.5})
    writer.close()
    assert writer.path.read_text() == ""
    (event,) = [e for e in read_events(writer.tensorboard_directory) if e.summary.value]
    assert (event.step, event.summary.value[0].tag) == (7, "test/bits_per_unit")


class _Wandb(types.ModuleType):
    """What of wandb is used, noting its calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return types.SimpleNamespace(
            define_metric=lambda *a, **k: self.calls.append(("define_metric", a, k)),
            log=lambda values: self.calls.append(("log", values)),
            finish=lambda: self.calls.append(("finish",)),
        )

    def Histogram(self, np_histogram):
        return ("histogram", *(values.tolist() for values in np_histogram))

    def Html(self, text):
        return ("html", text)

    def Image(self, image):
        return ("image", image.dtype.name, image.tolist())


def test_weights_and_biases_get_what_tensorboard_gets(tmp_path, monkeypatch):
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)

    def board():
        return training.WeightsAndBiases(tmp_path, "drafts", config={"seed": 3})

    writer = training.MetricWriter(tmp_path, boards=[board()])
    writer.record(2, "train", {"loss": 1.5})
    writer.record(2, "monitor", {"level_loss": [1.0, float("nan"), 3.0]})
    writer.text(2, "samples", "a < b")
    writer.image(2, "pictures", np.array([[0.0, 1.0]]))
    writer.close()
    (_, settings), define, *logged, last = fake.calls
    assert settings["project"] == "drafts" and settings["entity"] is None
    assert settings["config"] == {"seed": 3} and settings["name"] == tmp_path.name
    assert settings["dir"] == str(tmp_path) and settings["resume"] == "allow"
    assert define == ("define_metric", ("*",), {"step_metric": "step"}) and last == ("finish",)
    values = {}
    for name, call in logged:
        assert name == "log" and call["step"] == 2
        values |= call
    kind, heights, edges = values["monitor/level_loss"]
    assert kind == "histogram" and heights == [1.0] * 10 + [0.0] * 10 + [3.0] * 10
    assert values["train/loss"] == 1.5 and (edges[0], edges[-1], len(edges)) == (0, 1, 31)
    assert values["samples"] == ("html", "<pre>a &lt; b</pre>")
    assert values["pictures"] == ("image", "uint8", [[0, 255]])
    before = settings["id"]
    board()  # a resumed run goes on with the same one
    assert fake.calls[-2][1]["id"] == before
    assert board_of(tmp_path / "other", fake)["id"] != before


def board_of(directory, fake):
    directory.mkdir()
    training.WeightsAndBiases(directory, "drafts")
    return fake.calls[-2][1]


def test_the_launcher_opens_the_boards_that_the_config_names(tmp_path, monkeypatch):
    fake, config = _Wandb(), launch_config.get_config()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    workdir = files.as_path(tmp_path)
    writers.open_writer(config, workdir, 0).close()
    assert fake.calls == []
    config.wandb.update(project="drafts", entity="team")
    writer = writers.open_writer(config, workdir, 0)
    writer.record(2, "train", {"loss": 1.5})
    writer.close()
    reopened = writers.reopen_writer(config, workdir)
    reopened.show(2, "test", {"loss": 1.25})
    reopened.close()
    first, again = (settings for name, *rest in fake.calls if name == "init" for settings in rest)
    assert (first["project"], first["entity"]) == ("drafts", "team")
    assert first["config"]["train"]["steps"] == 500 and first["id"] == again["id"]
    assert ("log", {"step": 2, "test/loss": 1.25}) in fake.calls
    assert _steps(writer.path) == [2]  # nothing is dropped when results are shown later


def test_without_wandb_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if not installed
    with pytest.raises(ImportError, match="wandb.project is set.*pip install wandb, or leave"):
        training.WeightsAndBiases(tmp_path, "drafts")
    assert list(tmp_path.iterdir()) == []
    config = launch_config.get_config()
    writers.check_boards(config)
    config.wandb.project = "drafts"
    with pytest.raises(ImportError, match="wandb.project is set"):
        writers.check_boards(config)


def test_tensorboard_forgets_the_steps_that_come_again(tmp_path):
    _write(tmp_path, [2, 4, 6])
    writer = training.MetricWriter(tmp_path, 4)
    writer.close()
    starts = [
        e.step for e in read_events(writer.tensorboard_directory) if e.HasField("session_log")
    ]
    assert starts == [5]


def test_no_tensorflow_is_imported(tmp_path):
    script = (
        "import sys\n"
        "from mdm_jax import training\n"
        f"w = training.MetricWriter({str(tmp_path)!r})\n"
        "w.record(1, 'train', {'loss': 1.0}); w.text(1, 'a', 'b'); w.close()\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'torch')])\n"
    )
    root = pathlib.Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root
    )
    assert done.stdout.strip() == "[]"
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_a_planted_link_is_not_followed(tmp_path):
    """Neither under the name of a temporary file nor under that of the metrics themselves."""
    _write(tmp_path, [2, 4])
    target = tmp_path / "precious.txt"
    target.write_text("precious")
    for name in ("metrics.partial", "metrics.jsonl.partial"):
        (tmp_path / name).symlink_to(target)
    assert _steps(_write(tmp_path, [6], resume_step=4)) == [2, 4, 6]
    assert target.read_text() == "precious"
    assert not [p for p in tmp_path.glob("*.partial") if not p.is_symlink()]  # none left behind


def test_a_bucket_has_the_metrics_after_a_flush(bucket, monkeypatch):
    """Nothing can be appended there: whole files at a flush, by the loop before it saves."""
    writer = training.MetricWriter("gs://bucket/run")
    local = writer._local
    writer.record(2, "train", {"loss": 1.0})
    assert (bucket / "run/metrics.jsonl").exists() is False
    writer.flush()
    assert _steps("gs://bucket/run/metrics.jsonl") == [2]
    monkeypatch.setattr("mdm_jax.training.metrics.UPLOAD_SECONDS", -1)
    writer.record(4, "train", {"loss": 1.0})  # by the time
    assert _steps("gs://bucket/run/metrics.jsonl") == [2, 4]
    writer.close()
    assert [e.step for e in read_events(bucket / "run/tensorboard") if e.summary.value] == [2, 4]
    assert not local.exists()
    resumed = training.MetricWriter("gs://bucket/run", resume_step=2)
    resumed.record(6, "train", {"loss": 1.0})
    resumed.close()
    assert _steps("gs://bucket/run/metrics.jsonl") == [2, 6]
    assert len(list((bucket / "run/tensorboard").iterdir())) == 2


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    shown = training.Progress(10, start=2, stream=stream)
    shown.advance(4, {"loss": "1.250", "tokens/s": "1,000"}, seconds_per_step=10.0)
    shown.note("profile written")
    shown.advance(10, {"loss": "1.000"}, seconds_per_step=10.0)
    shown.close()
    assert stream.getvalue() == (
        "step 4/10 loss 1.250 tokens/s 1,000 left 01:00\n"
        "profile written\n"
        "step 10/10 loss 1.000 left 00:00\n"
    )


def test_progress_is_a_bar_on_a_terminal():
    stream = _Terminal()
    shown = training.Progress(10, start=2, stream=stream)
    shown.advance(4, {"loss": "1.250"}, seconds_per_step=0.1)
    shown.advance(10, {"loss": "1.125"}, seconds_per_step=0.1)
    shown.note("a note")
    shown.close()
    text = stream.getvalue()
    assert "10/10" in text and "loss 1.125" in text and "\r" in text and "a note\n" in text
    assert "step 4/10" not in text


@pytest.mark.parametrize("total, last", [(3, "3/3 rows"), (None, "3 rows")])
def test_bars_are_whole_lines_where_there_is_no_terminal(total, last, monkeypatch):
    """At intervals, and one at the end; without a carriage return or an escape."""
    stream, clock = io.StringIO(), iter([0.0, 1.0, 1.0, 40.0, 40.0, 41.0, 41.0, 41.0])
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Lines(total, "evaluating", "rows", stream=stream) as bar:
        bar.update(1)  # at 1 s: too early for a line
        bar.set_postfix_str("of test")
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.5)
        bar.update(1)
        bar.set_postfix_str("")
        bar.update(1)
    lines = stream.getvalue().splitlines()
    assert not {*stream.getvalue()} & {"\r", "\x1b"}
    assert lines[-1].startswith(f"evaluating: {last} in ") and lines[0].endswith(" s of test")
    assert len(lines) == 2


def test_a_bar_is_tqdm_on_a_terminal_and_lines_in_a_file(monkeypatch):
    terminal, file = _Terminal(), io.StringIO()
    for stream in (terminal, file):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.progress_bar(2, "measuring", "methods") as bar:
            bar.set_description("mirror")
            bar.update(2)
        with progress.progress_bar(2, silent=True) as bar:
            bar.update(2)
    assert "\r" in terminal.getvalue() and "mirror" in terminal.getvalue()
    assert file.getvalue() == "mirror: 2/2 methods in 0 s\n"


def test_numbers_are_plain_json(tmp_path):
    path = _write(tmp_path, [1])
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
