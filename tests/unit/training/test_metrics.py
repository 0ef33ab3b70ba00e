"""Metrics: what is dropped at a resume, bad lines, TensorBoard without TensorFlow, progress."""

import io
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from mdm_jax import training


def _write(directory, steps, resume_step=0, again=()):
    writer = training.MetricWriter(directory, resume_step, again)
    for step in steps:
        writer.scalars(step, "train", {"loss": step / 10})
        writer.scalars(step, "evaluate", {"loss": np.float32(step)})
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


def _events(directory):
    from tensorboardX.proto import event_pb2

    events = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return events


def test_tensorboard_holds_scalars_text_and_pictures(tmp_path):
    writer = training.MetricWriter(tmp_path)
    writer.scalars(3, "train", {"loss": 1.5, "gradient_norm": 2.0})
    writer.text(3, "samples", "hello")
    writer.image(3, "picture", np.linspace(0, 1, 12).reshape(3, 4))
    writer.image(3, "colours", np.zeros((3, 4, 3)))
    writer.close()
    events = _events(writer.tensorboard_directory)
    found = {v.tag: (e.step, v) for e in events for v in e.summary.value}
    assert found["train/loss"][0] == 3 and found["train/loss"][1].simple_value == 1.5
    assert found["train/gradient_norm"][1].simple_value == 2.0
    assert "samples/text_summary" in found
    assert found["picture"][1].image.height == 3 and found["colours"][1].image.width == 4


def test_tensorboard_forgets_the_steps_that_come_again(tmp_path):
    _write(tmp_path, [2, 4, 6])
    writer = training.MetricWriter(tmp_path, 4)
    writer.close()
    starts = [e.step for e in _events(writer.tensorboard_directory) if e.HasField("session_log")]
    assert starts == [5]


def test_no_tensorflow_is_imported(tmp_path):
    script = (
        "import sys\n"
        "from mdm_jax import training\n"
        f"w = training.MetricWriter({str(tmp_path)!r})\n"
        "w.scalars(1, 'train', {'loss': 1.0}); w.text(1, 'a', 'b'); w.close()\n"
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
    writer.scalars(2, "train", {"loss": 1.0})
    assert (bucket / "run/metrics.jsonl").exists() is False
    writer.flush()
    assert _steps("gs://bucket/run/metrics.jsonl") == [2]
    monkeypatch.setattr("mdm_jax.training.metrics.UPLOAD_SECONDS", -1)
    writer.scalars(4, "train", {"loss": 1.0})  # by the time
    assert _steps("gs://bucket/run/metrics.jsonl") == [2, 4]
    writer.close()
    assert [e.step for e in _events(bucket / "run/tensorboard") if e.summary.value] == [2, 4]
    assert not local.exists()
    resumed = training.MetricWriter("gs://bucket/run", resume_step=2)
    resumed.scalars(6, "train", {"loss": 1.0})
    resumed.close()
    assert _steps("gs://bucket/run/metrics.jsonl") == [2, 6]
    assert len(list((bucket / "run/tensorboard").iterdir())) == 2


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_prints_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = training.Progress(10, start=2, stream=stream)
    progress.advance(4, {"loss": "1.250", "tokens/s": "1,000"}, seconds_per_step=10.0)
    progress.note("profile written")
    progress.advance(10, {"loss": "1.000"}, seconds_per_step=10.0)
    progress.close()
    assert stream.getvalue() == (
        "step 4/10 loss 1.250 tokens/s 1,000 left 01:00\n"
        "profile written\n"
        "step 10/10 loss 1.000 left 00:00\n"
    )


def test_progress_is_a_bar_on_a_terminal():
    stream = _Terminal()
    progress = training.Progress(10, start=2, stream=stream)
    progress.advance(4, {"loss": "1.250"}, seconds_per_step=0.1)
    progress.advance(10, {"loss": "1.125"}, seconds_per_step=0.1)
    progress.note("a note")
    progress.close()
    text = stream.getvalue()
    assert "10/10" in text and "loss 1.125" in text and "\r" in text and "a note\n" in text
    assert "step 4/10" not in text


def test_numbers_are_plain_json(tmp_path):
    path = _write(tmp_path, [1])
    assert all(isinstance(json.loads(line), dict) for line in path.read_text().splitlines())
