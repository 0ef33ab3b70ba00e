"""``mdm eval``: every family of models, runs, interruption, devices; what is refused."""

import json
import math
import pathlib
import signal
import time

import jax
import launching
import numpy as np
import pytest
import saved_run

from mdm_jax import files, hub, likelihood, models, sharding
from mdm_jax.data.tokenizers import CharTokenizer
from mdm_jax.evaluation import local_tasks
from mdm_jax.evaluation.answering import Answerer
from mdm_jax.evaluation.model import EvaluatedModel
from mdm_jax.evaluation.settings import Settings
from mdm_jax.launch.build import make_experiment
from mdm_jax.launch.modes import eval_tasks
from mdm_jax.launch.presets import get_config
from mdm_jax.tasks import stored
from mdm_jax.tasks.arithmetic import Add
from mdm_jax.types import Batch

MODELS = pathlib.Path(__file__).parents[1] / "data" / "hub"


@pytest.mark.parametrize(
    "arguments, match",
    [
        ([f"--source={MODELS}/a2d_qwen3-1"], "name the tasks: --tasks=gsm8k"),
        (["--tasks=x", "--source=a", "--workdir=b"], "holds no run"),
        (["--tasks=x", f"--source={MODELS}/a2d_qwen3-1", "--settings=pases=3"], "'passes'"),
        (["--tasks=x", f"--source={MODELS}/a2d_qwen3-1", "--settings=passes=0"], "passes must be"),
        (["--tasks=x", f"--source={MODELS}/a2d_qwen3-1", "--settings=passes=a"], "passes"),
        (["--tasks=x", f"--source={MODELS}/a2d_qwen3-1", "--tries=2"], "without --temperature"),
        (["--compare=a.json"], "takes two results"),
        (["--compare=a.json,b.json"], "a.json"),
        (["--tasks=x"], "--workdir is required"),
    ],
)
def test_what_cannot_be_evaluated_is_said_at_once(monkeypatch, capsys, arguments, match):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    code, _, err = launching.call(monkeypatch, capsys, "--mode=eval", *arguments)
    assert code == 2 and match in err and "Traceback" not in err


# --- slow -----------------------------------------------------------------------------------------

FAMILIES = ("a2d_qwen3-1", "llada-1", "dream-1", "sdar-1", "bd3lm-1", "mdlm-1", "duo-1", "qwen2-1")
BY_CHANCE = ("ancestral", "first_hitting")  # at temperature 0 too: which tokens come first
PAIRS = [("#$%&", "'()*+"), ("!", "#")]


def subject(name, devices=1):
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:devices]).reshape(devices, 1, 1), sharding.AXES
    )
    model = hub.load(MODELS / name, mesh=mesh, tokenizer=False)
    codec = CharTokenizer("".join(map(chr, range(32, 32 + model.traits.vocab_size - 4))))
    return EvaluatedModel(model, codec)


def bound(subject, pair):
    """(nats, standard error) by the core's estimator, from the same network."""
    model, traits = subject.model.model, subject.model.traits
    prompt, answer = (subject.tokenizer.encode(text) for text in pair)
    size = -(-(len(prompt) + len(answer)) // subject.multiple) * subject.multiple
    tokens, places = np.zeros((1, size), np.int32), np.arange(size)[None]
    tokens[0, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
    seen = places < len(prompt) + len(answer)
    rows = Batch(
        tokens, seen & (places >= len(prompt)), seen.astype(np.int32), np.ones(1, np.int32)
    )
    apply_fn, options = model.apply, {"passes": 16, "replicates": 16}
    if subject.kind == "autoregressive":
        evaluate = likelihood.make_next_token_likelihood(
            models.causal_apply(model, subject.start_id), subject.excluded_id
        )
    elif subject.kind == "uniform":
        evaluate = likelihood.make_uniform_likelihood(apply_fn, subject.num_tokens, **options)
    elif subject.kind == "block":
        apply_fn = models.block_apply(model, traits.block_size)
        mask = subject.mask_id
        evaluate = likelihood.make_block_likelihood(apply_fn, mask, traits.block_size, **options)
    else:
        apply_fn = models.shifted_apply(apply_fn) if traits.shift else apply_fn
        evaluate = likelihood.make_likelihood(apply_fn, subject.mask_id, **options)
    found = evaluate(subject.model.params, jax.random.key(5), [rows])
    return found.nats, found.standard_error_nats


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_scored_as_by_the_core_and_writes_as_by_hub(name):
    """Within 5 standard errors of both; the mask token out of the softmax, as the core has it."""
    one = subject(name)
    one = EvaluatedModel(one.model, one.tokenizer, trained_here=one.kind != "uniform")
    settings = Settings(passes=16, replicates=8, exact_up_to=0)
    answers = Answerer(one, settings).likelihoods(PAIRS)
    for answer, pair in zip(answers, PAIRS):
        nats, error = bound(one, pair)
        both = 5 * math.hypot(error, answer["standard_error"]) + 1e-3
        assert abs(-answer["log_likelihood"] - nats) < both, (answer, nats, error)
    exact = one.kind in ("autoregressive", "block")  # of small blocks all subsets are run
    assert (answers[0]["standard_error"] == 0) == exact
    written = Answerer(one, settings).continuations([("#$%&'", {"max_gen_toks": 6})] * 2)
    by_chance = one.kind == "uniform" or one._rule(settings).schedule in BY_CHANCE
    assert by_chance or written[0] == written[1] | {"seconds": written[0]["seconds"]}
    if one.kind in ("masked", "block") and not by_chance:
        prompt = one.tokenizer.encode("#$%&'")
        options = {"mask_id": one.mask_id, "eos_id": 1, "pad_id": 0, "stop": False}
        made = hub.generate(one.model, [prompt], 6, rule=one._rule(settings), **options)
        ids = np.asarray(made.tokens)[0][made.written[0]][:6]
        expected = one.tokenizer.decode(one.tokenizer.truncate_at_eos(ids))
        assert written[0]["text"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_one_and_eight_devices_agree_to_the_bit(name):
    settings = Settings(passes=3, replicates=2, exact_up_to=0, temperature=1.0, rows=2)
    found = []
    for devices, batch in ((1, 7), (8, 40)):
        answerer = Answerer(subject(name, devices), settings, batch=batch)
        asked = [(text, {"max_gen_toks": 5}) for text, _ in PAIRS] * 2
        figures = [a["log_likelihood"] for a in answerer.likelihoods(PAIRS * 2)]
        found.append((figures, [a["text"] for a in answerer.continuations(asked)]))
    assert found[0] == found[1]


@pytest.mark.slow
def test_prompts_by_the_chat_template_end_with_the_turn(tmp_path):
    harness = pytest.importorskip("mdm_jax.evaluation.harness")
    local_tasks.write(tmp_path, "ask", "math", [{"question": "1+1?", "answer": "#### 2"}])
    model = hub.load(MODELS / "a2d_qwen3-1")
    answerer = Answerer(harness.subject_of(model), Settings(max_tokens=4))
    assert harness.HarnessModel(answerer).end_of_turn == "<|im_end|>"
    options = {"include_path": [str(tmp_path)], "template": True}
    results, (record,) = harness.run_tasks(answerer, ["ask"], **options)
    assert record["prompt"].startswith("<|im_start|>") and "1+1?<|im_end|>" in record["prompt"]
    assert results["audit"]["chat_template"] and set(record["metrics"].values()) == {0.0}
    with pytest.raises(ValueError, match="no chat template"):
        harness.HarnessModel(Answerer(subject("mdlm-1"))).apply_chat_template([])


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    task = Add(digits=2)
    local_tasks.write(folder, "add", "checked", stored.rows(task, 12), max_tokens=4)
    rows = [
        {"question": r["question"], "choices": [r["answer"], "000", "199"], "answer": 0}
        for r in stored.rows(task, 40)
    ]
    local_tasks.write(folder, "pick", "choice", rows)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("process", ["masked", "block", "uniform", "autoregressive"])
def test_a_run_killed_goes_on_to_the_same_results(process, tasks, tmp_path):
    """Random parameters of four processes; interrupted, resumed by two programs of two devices."""
    config = get_config("quickstart:smoke")
    config.data.source, config.data.task.name, config.data.task.add.digits = "task", "add", 2
    config.process, config.block.size = process, 5
    config.data.length, config.data.train_stride = 128, 1
    if process == "autoregressive":
        config.variance.order = ()
    if process == "uniform":
        config.law.name, config.sample.sampler = "power", "uniform_ancestral"
    experiment = make_experiment(config)
    saved_run.save(experiment, files.as_path(tmp_path / "run"))
    arguments = [
        "eval", f"--workdir={tmp_path / 'run'}", f"--include_path={tasks}", "--tasks=pick,add",
        "--settings=passes=4,exact_up_to=0",
    ]  # fmt: skip
    whole, _ = launching.finish(*arguments, f"--to={tmp_path / 'whole'}")
    assert "averaged (EMA), step 4" in whole and "pick  acc,none" in whole
    process = launching.start(*arguments, "--eval_batch=5", f"--to={tmp_path / 'cut'}")
    journal = tmp_path / "cut" / "requests.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command line goes on" in err, err
    answered = len(journal.read_text().splitlines())
    assert 5 <= answered < 120
    cut = (*arguments, "--eval_batch=40", f"--to={tmp_path / 'cut'}")
    done = launching.finish_several(launching.start_several(2, *cut, devices=2))
    assert all(code == 0 for code, _, _ in done), done
    assert "pick  acc,none" in done[0][1] and "pick" not in done[1][1]
    folders = [tmp_path / name for name in ("whole", "cut")]
    both = [json.loads((folder / "pick-add.json").read_text()) for folder in folders]
    assert both[0] == both[1]
    lines = [
        [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        for path in (folder / "pick-add.jsonl" for folder in folders)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 52
    assert "wrong" in (tmp_path / "cut" / "pick-add.html").read_text()
    text, _ = launching.finish(
        "eval", f"--compare={tmp_path}/whole/pick-add.json,{tmp_path}/cut/pick-add.json"
    )
    assert "0 of them unlike" in text and "both are of the same model" in text


def test_settings_of_the_command_line():
    found = eval_tasks.settings("passes=4,levels=gauss,temperature=0.5", {"steps": 3})
    assert found == Settings(passes=4, levels="gauss", temperature=0.5, steps=3)
    with pytest.raises(ValueError, match="width=1.0 needs replicates of 2 or more"):
        eval_tasks.settings("width=1.0,replicates=1", {})
    with pytest.raises(ValueError, match=r"'rule=\[' has no value that can be read"):
        eval_tasks.settings("rule=[", {})
    with pytest.raises(ValueError, match="'passes' needs a value"):
        eval_tasks.settings("passes", {})
