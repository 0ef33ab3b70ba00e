"""Runs on conversations from a model of others: killed, resumed, on eight devices, sampled."""

import json
import pathlib
import re

import launching
import numpy as np
import pytest

from mdm_jax import training

pytestmark = pytest.mark.slow

MODEL = pathlib.Path(__file__).parents[1] / "data" / "hub" / "a2d_qwen3-1"
STEPS = 10


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A mixture of two files, packed, cut at random, in many small batches."""
    folder = tmp_path_factory.mktemp("chats")
    for name, turns in (("one", 1), ("two", 2)):
        chats = []
        for i in range(60):
            pairs = [
                said
                for j in range(turns)
                for said in (("user", f"{i}+{j}?"), ("assistant", f"{i + j}"))
            ]
            messages = [{"role": role, "content": content} for role, content in pairs]
            chats.append({"messages": [{"role": "system", "content": name}, *messages]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(c) + "\n" for c in chats))
    (folder / "prompts.txt").write_text("1+1?▁▁▁\n")
    return [
        "--config=finetune:smoke",
        f"--config.model.source={MODEL}",
        "--config.data.source=chat",
        f"--config.data.path={folder}/one.jsonl:0.7,{folder}/two.jsonl:0.3",
        "--config.data.length=160",
        "--config.data.loss_on=last",
        "--config.data.answer_padding=eos_once",
        "--config.data.packing=first_fit",
        "--config.data.random_cut=0.3",
        f"--config.sample.prompts={folder}/prompts.txt",
        "--config.evaluate.max_rows=2",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every=1",
        "--config.train.checkpoint_every=2",
        "--config.train.evaluate_every=5",
    ]


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, launching.finish(*arguments, f"--workdir={workdir}")[0]


def losses(workdir):
    records = training.read_metrics(workdir / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_the_data_are_shown_and_prompts_are_laid_out_as_chats(whole):
    workdir, out = whole
    for part in ("the chat template", "70.0%", "maskable", "first training row", "<|im_start|>"):
        assert part in out, part
    assert "\x1b" not in out  # not a terminal
    before, after = [
        json.loads(line)
        for path in sorted((workdir / "samples").glob("*.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert before["given"] == after["given"]
    assert "<|im_start|>user\n1+1?␃" in after["given"]


def test_killed_the_run_goes_on_as_if_nothing_had_happened(whole, arguments, tmp_path):
    workdir = tmp_path / "killed"
    process = launching.start(*arguments, f"--workdir={workdir}")
    for line in process.stderr:
        if re.search(rf"step [4-9]/{STEPS} ", line):
            process.kill()
            break
    process.communicate(timeout=300)
    assert not (workdir / "evaluation.json").exists()
    out, _ = launching.finish(*arguments, f"--workdir={workdir}")
    assert "resuming at step" in out
    assert losses(workdir) == losses(whole[0]) and len(losses(workdir)) == STEPS


def test_eight_devices_draw_the_same_noise(whole, arguments, tmp_path):
    workdir = tmp_path / "eight"
    launching.finish(*arguments, f"--workdir={workdir}", devices=8)
    np.testing.assert_allclose(losses(workdir), losses(whole[0]), rtol=1e-5)


def test_batches_of_one_length_resume_and_do_not_depend_on_devices(arguments, tmp_path):
    """Of adapters too, whose dropout goes with the example; the noise panel measures with them."""
    own = [
        *arguments,
        "--config.data.packing=",
        "--config.data.buckets=(48, 96)",
        "--config.adapter.name=lora",
        "--config.adapter.rank=2",
        "--config.adapter.dropout=0.3",
        "--config.panel.cost=0.5",
    ]
    out, _ = launching.finish(*own, f"--workdir={tmp_path / 'whole'}")
    assert re.search(r"batches of one length each: .*\d+% of their positions are padding", out)
    compiled = re.findall(r"rows of (\d+): step compiled", out)
    assert len(compiled) > 1, out
    expected = losses(tmp_path / "whole")
    assert len(expected) == STEPS
    assert training.read_metrics(tmp_path / "whole" / "metrics.jsonl", "noise")
    process = launching.start(*own, f"--workdir={tmp_path / 'killed'}")
    for line in process.stderr:
        if re.search(rf"step [4-9]/{STEPS} ", line):
            process.kill()
            break
    process.communicate(timeout=300)
    assert "resuming at step" in launching.finish(*own, f"--workdir={tmp_path / 'killed'}")[0]
    assert losses(tmp_path / "killed") == expected
    for devices in (2, 8):
        workdir = tmp_path / str(devices)
        launching.finish(*own, f"--workdir={workdir}", devices=devices)
        np.testing.assert_allclose(losses(workdir), expected, rtol=1e-5)
    more = "--config.data.buckets=(96,)"
    _, error = launching.finish(*own, more, f"--workdir={tmp_path / 'killed'}", code=2)
    assert "data.buckets" in error
