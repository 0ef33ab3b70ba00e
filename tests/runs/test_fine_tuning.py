"""Fine-tuning as a user does it: trained, stopped, killed, resumed, exported, read elsewhere."""

import json
import pathlib
import re
import shutil
import signal

import launching
import pytest

from mdm_jax import hub, tasks, training

pytestmark = pytest.mark.slow

MODEL = launching.ROOT / "experiments" / "models" / "small"
GSM8K = launching.ROOT / "tests" / "data" / "gsm8k" / "train.jsonl"
STEPS = 12
SHORT = [
    f"--config.train.steps={STEPS}",
    "--config.train.batch_size=4",
    "--config.train.log_every=1",
    "--config.train.evaluate_every=6",
    "--config.train.checkpoint_every=3",
    "--config.evaluate.max_rows=4",
    "--config.evaluate.batch_size=4",
    "--config.optimizer.peak=2e-3",
    "--config.optimizer.warmup_steps=2",
    "--config.sample.num_samples=3",
    "--config.sample.num_answers=3",
    "--config.data.fractions=(0.8,0.1,0.1)",
]
LORA = ["--config.adapter.name=lora", "--config.adapter.rank=4"]


def write(path: pathlib.Path, rows: list) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def gsm8k(_folder: pathlib.Path) -> list[str]:
    """Pairs with a template, answers that are checked."""
    return [
        "--config=finetune_pairs",
        f"--config.data.path={GSM8K}",
        "--config.data.prompt_template={question}\\n",
        "--config.data.answer_template={answer}",
        "--config.data.prompt_length=56",
        "--config.data.answer_length=80",
        "--config.data.answer_marker=####",
    ]


def nested(folder: pathlib.Path) -> list[str]:
    """Problems with lists and numbers, as in MAWPS, and a row without its second number."""
    rows = [
        {
            "meta": {"question": f"{name} has number0 and gets number1 ."},
            "numbers": [float(i), i + 0.5][: 1 if i == 20 else 2],
            "answer": 2 * i + 0.5,
        }
        for i, name in enumerate(["Ann", "Ben", "Cleo", "Dora", "Emil"] * 10)
    ]
    return [
        "--config=finetune_pairs",
        f"--config.data.path={write(folder / 'nested.jsonl', rows)}",
        "--config.data.prompt_template={meta.question} ({numbers.0}, {numbers.1})\\n",
        "--config.data.answer_template=+ number0 number1 = {answer}",
        "--config.data.prompt_length=40",
        "--config.data.answer_length=32",
        "--config.data.bad_rows=drop",
    ]


def chats(folder: pathlib.Path) -> list[str]:
    """Conversations of one or two generated problems, some with a system prompt."""
    rows = []
    for i in range(60):
        task = (tasks.Add(2), tasks.Run(), tasks.Countdown())[i % 3]
        messages = [{"role": "system", "content": "Compute."}][: i % 2]
        for pair in (tasks.example(task, "train", 2 * i + k) for k in range(1 + (i % 4 == 0))):
            messages += [
                {"role": "user", "content": pair.prompt},
                {"role": "assistant", "content": pair.answer},
            ]
        rows.append({"messages": messages})
    path = write(folder / "chats.jsonl", rows)
    return ["--config=finetune", f"--config.data.path={path}", "--config.data.length=96"]


def stop(arguments: list[str], at: str, by: signal.Signals) -> int:
    """Exit status of a run that gets a signal at a step."""
    process = launching.start(*arguments)
    for line in process.stderr:
        if re.search(rf"step {at}/{STEPS} ", line):
            process.send_signal(by)
            break
    _, rest = process.communicate(timeout=300)
    assert process.returncode != 2, rest
    return process.returncode


def losses(workdir: pathlib.Path) -> list[float]:
    records = training.read_metrics(workdir / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def greedy_texts(workdir: pathlib.Path, *arguments: str) -> list[str]:
    """Samples that a command writes, one token a step."""
    greedy = ["--config.sample.temperature=0", "--config.sample.num_steps=96"]
    out, _ = launching.finish("sample", f"--workdir={workdir}", *arguments, *greedy)
    (path,) = re.findall(r"written to (\S+\.jsonl)", out)
    return [json.loads(line)["text"] for line in pathlib.Path(path).read_text().splitlines()]


def generated(model: hub.HubModel) -> list[list[int]]:
    prompts = [model.tokenizer.encode(text) for text in ("12+30=", "Ann has 3 apples.\n")]
    made = hub.generate(model, prompts, 16, steps=16, block_size=16)
    return [row[new].tolist() for row, new in zip(made.tokens, made.written)]


@pytest.mark.parametrize(("data", "adapter"), [(gsm8k, []), (nested, LORA), (chats, [])])
def test_a_model_fine_tuned_on_own_data_says_the_same_everywhere(data, adapter, tmp_path):
    workdir, whole, merged = tmp_path / "run", tmp_path / "whole", tmp_path / "merged"
    settings = [*data(tmp_path), *SHORT]
    source = pathlib.Path(shutil.copytree(MODEL, tmp_path / "model"))
    arguments = [*settings, *adapter, f"--config.model.source={source}"]
    line = [*arguments, f"--workdir={workdir}"]
    assert stop(line, "[2-4]", signal.SIGINT) == 130
    assert stop(line, "[5-8]", signal.SIGKILL) == -signal.SIGKILL
    out, _ = launching.finish(*line)
    assert "resuming at step" in out
    launching.finish(*arguments, f"--workdir={whole}")
    assert losses(workdir) == losses(whole) and len(losses(workdir)) == STEPS
    numbers = (workdir / "evaluation.json").read_text()
    assert numbers == (whole / "evaluation.json").read_text()
    launching.finish("evaluate", f"--workdir={workdir}")
    assert (workdir / "evaluation.json").read_text() == numbers

    texts = greedy_texts(workdir)
    assert len(set(texts)) == 3
    source.rename(tmp_path / "moved")
    export = ["export", f"--workdir={workdir}", "--dtype=float32"]
    if adapter:
        _, err = launching.finish(*export, f"--to={merged}", code=2)
        assert "name where it is now: --config.model.source=DIR" in err
        export.append(f"--config.model.source={tmp_path / 'moved'}")
        peft = tmp_path / "peft"
        launching.finish("export", f"--workdir={workdir}", f"--to={peft}", "--adapter")
        started = [*settings, *adapter, f"--config.model.source={MODEL}"]
        started.append(f"--config.adapter.init_from={peft}")
        own = hub.with_adapters(hub.load(MODEL, dtype="float32"), peft)
    launching.finish(*export, f"--to={merged}")
    workdir.rename(tmp_path / "gone")
    elsewhere = [*settings, f"--config.model.source={merged}"]
    assert greedy_texts(tmp_path / "elsewhere", *elsewhere) == texts
    model = hub.load(merged, dtype="float32")
    assert generated(model) != generated(hub.load(MODEL, dtype="float32"))
    if adapter:
        assert greedy_texts(tmp_path / "adapters", *started) == texts
        assert generated(own) == generated(model)
