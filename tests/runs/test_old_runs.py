"""A working directory of the release before (commit b9611b4): resumed, and evaluated."""

import json
import shutil

import launching
import pytest

OLD = launching.ROOT / "tests/data/run_b9611b4/run"


@pytest.fixture
def old(tmp_path):
    """A copy of the run: four steps of a tiny network on ``tests/data/run_b9611b4/text.txt``."""
    return shutil.copytree(OLD, tmp_path / "run")


def test_an_old_run_is_evaluated_to_the_same_number(old, monkeypatch, capsys):
    launching.on_one_device(monkeypatch)
    before = json.loads((OLD / "evaluation.json").read_text("utf-8"))
    code, out, err = launching.call(monkeypatch, capsys, f"--workdir={old}", "--mode=evaluate")
    assert code == 0, err
    after = json.loads((old / "evaluation.json").read_text("utf-8"))
    assert set(before) <= set(after) and after["step"] == before["step"]
    for name in ("bits_per_unit", "nats_per_token", "unigram_bits_per_unit"):
        assert after[name] == pytest.approx(before[name], rel=1e-5)
    assert f"test: {before['bits_per_unit']:.4f} ± " in out


@pytest.mark.slow
def test_an_old_run_is_resumed_longer(old, monkeypatch, capsys):
    """By the command line that it was started with, and a larger number of steps."""
    launching.on_one_device(monkeypatch)
    config = json.loads((OLD / "config.json").read_text("utf-8"))
    code, out, err = launching.call(
        monkeypatch,
        capsys,
        "--config=quickstart:smoke",
        f"--workdir={old}",
        "--allow_config_change",
        "--config.data.source=text",
        f"--config.data.path={config['data']['path']}",
        "--config.data.length=16",
        "--config.data.train_stride=8",
        "--config.model.width=4",
        "--config.model.num_heads=1",
        "--config.train.steps=6",
        "--config.train.evaluate_every=2",
        "--config.train.checkpoint_every=2",
        "--config.train.keep_last=1",
        "--config.optimizer.name=adamw",
        "--config.sample.gap=4",
    )
    assert code == 0, err
    assert "resuming at step 4" in out
    changed = json.loads((old / "config.1.json").read_text("utf-8"))
    assert changed == config  # the old one is kept
    assert (old / "checkpoints" / "last" / "6").exists()
