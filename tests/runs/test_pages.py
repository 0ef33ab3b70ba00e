"""Commands of README, docs and config headers, run one after the other in a reduced form.

As written, but with the variant "smoke" of a config, few steps, made-up data and the repository's
small model. Those that begin with ``python -m experiments`` are run by tests of their own.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import commands
import launching
import pytest

from mdm_jax.evaluation import local_tasks

pytestmark = pytest.mark.slow

SMALL = launching.ROOT / "experiments/models/small"
REDUCED = {
    "train.steps": "4",
    "train.evaluate_every": "2",
    "train.batch_size": "8",
    "train.stop.patience": "1",
    "optimizer.warmup_steps": "1",
    "evaluate.max_rows": "8",
    "evaluate.width": "2.0",
    "sample.num_answers": "4",
    "sample.quality_steps": "(4,)",
    "data.length": "96",
    "data.prompt_length": "24",
    "data.answer_length": "24",
    "data.buckets": "32,64",
    "measure.redraws": "4",
    "measure.rows": "4",
}
"""Values in place of those given; settings that are not given stay as they are."""
PAIRS = [
    {
        "question": f"{n} + 1 =",
        "answer": f"#### {n + 1}",
        "prompt": f"{n} + 1 =",
        "meta": {"question": f"{n} + 1 ="},
        "answers": [{"text": f"#### {n + 1}"}],
    }
    for n in range(64)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": pair["prompt"]},
            {"role": "assistant", "content": pair["answer"]},
        ]
    }
    for pair in PAIRS
]


@pytest.fixture
def folder(tmp_path):
    """A directory with data of every kind, in which commands are run."""
    return with_data(tmp_path)


def with_data(tmp_path):
    texts = " ".join(f"The cat number {n} sat on mat {n % 7}." for n in range(2000))
    (tmp_path / "FILE").write_text(texts, "utf-8")
    for name, rows in (("pairs.jsonl", PAIRS), ("chats.jsonl", CHATS)):
        lines = [json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", "utf-8")
    (tmp_path / "words.jsonl").write_text('"The cat "\n{"infill": "The ▁▁3 cat"}\n', "utf-8")
    choice = [{"question": "France: ", "choices": ["Paris", "Rome"], "answer": 0}]
    local_tasks.write(str(tmp_path / "tasks"), "my_task", "choice", choice * 2)
    return tmp_path


def value(words, name, default=None):
    """The value of the last flag of this name."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found[-1] if found else default


def mode_of(words):
    return words[1] if len(words) > 1 and not words[1].startswith("-") else "train"


def left_out(words):
    """Why a command is not run here; nothing if it is."""
    if words[0] != "mdm" or len(words) == 1:
        return "read in test_commands.py, run by tests of its own"
    if any(word.startswith(("--coordinator", "--compare")) for word in words):
        return "several processes, or results of two others"
    if re.search(r"^mnist|configs/benchmarks", value(words, "config", "")):
        return "prepared data"
    if value(words, "config.wandb.project"):
        return "an account of Weights & Biases"
    return ""


def reduced(words, folder):
    """Words of the small form of a command."""
    mode, made, config = mode_of(words), [], value(words, "config", "")
    for word in words:
        name, equals, given = word.partition("=")
        if word.startswith("--config.mesh"):
            continue
        if name == "--config":
            given = "quickstart" if given in ("FILE", "my_config.py") else given
            file, _, variant = given.partition(":")
            if (folder / file).is_file():  # written by mdm new
                made += [f"--config={file}", "--config.train.steps=4"]
                continue
            if file.endswith(".py"):
                file = str(launching.ROOT / file)
            if variant in ("stories", "sorting"):  # has no smoke
                made += ["--config.train.steps=4", "--config.optimizer.warmup_steps=2"]
            else:
                variant = "smoke"
            given = f"{file}:{variant}"
        elif name in ("--config.model.source", "--source"):
            here = folder / given
            given = str(here if (here / "config.json").is_file() else SMALL)
        elif name == "--config.data.path":
            given = data_of(given, config, words)
        elif name == "--path":  # of mdm new
            given = {"jsonl": "pairs.jsonl", "chat": "chats.jsonl"}.get(words[2], "FILE")
        elif name == "--minutes":
            given = "0.01"
        elif name == "--workdir":
            given = given.lstrip("/")
        elif name == "--over":
            given = given.split(";")[0].replace("0,75", "0,2")
        elif name in ("--tasks", "--include_path"):
            given = "my_task" if name == "--tasks" else "tasks"
        elif name in ("--steps", "--max_tokens"):
            given = "4"
        elif name in ("--prompts", "--config.sample.prompts"):
            given = "words.jsonl"
        elif name.removeprefix("--config.") in REDUCED and equals:
            given = REDUCED[name.removeprefix("--config.")]
            if name == "--config.data.length" and "embedded" in " ".join(words):
                given = "32"
        made.append(f"{name}={given}" if equals else word)
    if config.startswith("finetune_pairs") and value(words, "config.data.prompt_length") is None:
        made += ["--config.data.prompt_length=24", "--config.data.answer_length=24"]
    if mode == "variance" and value(words, "config.measure.methods") is None:
        made.append("--config.measure.methods=('stratified',)")
    if mode == "tune-levels":
        made += ["--budget=28", "--config.spacing.budget=0"]
        made += ["--config.spacing.grids=('cosine','edm_rho')"]
    if mode == "eval" and value(words, "include_path") is None:
        made.append("--include_path=tasks")
    return made


def data_of(given, config, words):
    if (launching.ROOT / given).is_file():
        return str(launching.ROOT / given)
    if config.startswith("finetune_pairs") or "pairs.py" in config or "jsonl" in " ".join(words):
        chats = config == "finetune" and value(words, "config.data.source", "chat") == "chat"
        return "chats.jsonl" if chats else "pairs.jsonl"
    return "chats.jsonl" if config.startswith("finetune") else "FILE"


def run(words, folder, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "mdm_jax.launch", *words[1:]],
        capture_output=True,
        text=True,
        input="Hello\n",
        cwd=folder,
        env={**launching.environment(), "PYTHONPATH": str(launching.ROOT)},
        timeout=300,
    )
    shown = f"{' '.join(words)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    assert done.returncode == code, shown


def run_all(found, folder):
    count = 0
    for command in found:
        words = ["mdm", *command.words[1:]]
        if command.quoted or program(command) != "mdm" or left_out(words):
            continue
        small = reduced(words, folder)
        workdir = value(small, "workdir")
        needed = [workdir] if mode_of(words) not in ("train", "sweep", "tune-levels") else []
        needed += [value(small, "config.train.init_from"), value(small, "config.sample.judge")]
        for path in filter(None, needed):
            if not (folder / path / "config.json").is_file():
                run(["mdm", "train", "--config=quickstart:smoke", f"--workdir={path}"], folder)
        if mode_of(words) == "train" and workdir and (folder / workdir).exists():
            shutil.rmtree(folder / workdir)  # the same name under another config
        run(small, folder, 2 if command.refused else 0)
        count += 1
    return count


def program(command):
    return commands.program(command.words)


def has_runs(found):
    return any(program(c) == "mdm" and not c.quoted and not left_out([*c.words]) for c in found)


@pytest.mark.parametrize("page", [p for p in commands.PAGES if has_runs(commands.of_page(p))])
def test_commands_of_a_page_run(page, folder):
    assert run_all(commands.of_page(page), folder)


@pytest.mark.parametrize("file", [f for f in commands.HEADERS if has_runs(commands.of_header(f))])
def test_commands_of_a_config_header_run(file, folder):
    assert run_all(commands.of_header(file), folder)


def test_python_of_the_variance_page_runs(tmp_path):
    text = (launching.ROOT / "docs/variance.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (tmp_path / "block.py").write_text(block, "utf-8")
    done = subprocess.run(
        [sys.executable, "block.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**launching.environment(), "PYTHONPATH": str(launching.ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mine" in done.stdout
    assert pathlib.Path(tmp_path / "runs/mine/variance/variance.json").is_file()


def test_a_newcomer_gets_through_the_readme(tmp_path):
    """In a fresh environment, from a package index; seconds of training."""
    script = launching.ROOT / "tests/runs/newcomer.sh"
    done = subprocess.run(
        [script, "--smoke", tmp_path / "new"],
        capture_output=True,
        text=True,
        timeout=1800,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"== \d+ commands of README.md ran", done.stdout)
