"""Evaluation on tasks: against enumeration and our own evaluation, to the bit; bad input."""

import dataclasses
import itertools
import json
import math
import pathlib

import evaluated
import jax
import jax.numpy as jnp
import joint_law
import numpy as np
import pytest

from mdm_jax import evaluation, hub, likelihood
from mdm_jax.evaluation import local_tasks
from mdm_jax.evaluation.answering import Answerer, Encoded, Journal
from mdm_jax.evaluation.model import bucket
from mdm_jax.evaluation.paired import check_comparable, compare_results
from mdm_jax.evaluation.settings import Settings
from mdm_jax.files import write_json
from mdm_jax.launch.reports.failures import write_failures
from mdm_jax.likelihood.subsets import every_subset

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'mdm_jax[eval]'")

import lm_eval

from mdm_jax.evaluation import harness

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PAIRS = [("a", "bca"), ("ab", "ab"), ("ab", "cc"), ("abc", "b"), ("", "cabc"), ("b", "bca")]


@pytest.fixture(scope="module")
def joint():
    return evaluated.joint()


@pytest.fixture(scope="module")
def exact(joint):
    return Answerer(joint)


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def task(folder, name, kind, rows, **options):
    local_tasks.write(folder, name, kind, rows, **options)
    return {"include_path": [str(folder)]}


# --- likelihood -----------------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_the_law(exact):
    answers = exact.likelihoods(PAIRS)
    expected = [evaluated.conditional(*pair) for pair in PAIRS]
    np.testing.assert_allclose([a["log_likelihood"] for a in answers], expected, rtol=1e-5)
    assert [a["passes"] for a in answers] == [2 ** len(answer) - 1 for _, answer in PAIRS]
    assert all(a["standard_error"] == 0 for a in answers)


@pytest.mark.parametrize("design", [{}, {"levels": "stratified", "masks": "antithetic"}])
def test_estimates_hold_the_truth_in_their_interval(joint, design):
    """Within 4 standard errors of 40 replicates."""
    settings = Settings(passes=2, replicates=40, exact_up_to=0, **design)
    answers = Answerer(joint, settings).likelihoods(PAIRS)
    for answer, pair in zip(answers, PAIRS):
        away = abs(answer["log_likelihood"] - evaluated.conditional(*pair))
        assert away <= 4 * answer["standard_error"] + 1e-4
    assert sum(a["standard_error"] > 1e-3 for a in answers) >= 4


def test_rows_are_drawn_until_their_intervals_are_narrow(joint):
    """Alike whatever else is asked: each row stops by itself."""
    settings = Settings(passes=2, replicates=4, exact_up_to=0, width=1.0)
    answers = Answerer(joint, settings).likelihoods(PAIRS)
    drawn = [len(a["estimates"]) for a in answers]
    assert min(drawn[:3]) < max(drawn) <= 32 and all(a["passes"] == 2 * n for a, n in
        zip(answers[:3], drawn))  # fmt: skip
    alone = Answerer(joint, settings).likelihoods(PAIRS[:1])
    assert figures(alone) == figures(answers[:1])


def test_tasks_equal_our_own_evaluation(exact, tmp_path):
    """Multiple choice and perplexity by lm-eval, and by ``evaluation.choose_until`` and hand."""
    rng = np.random.default_rng(0)
    texts = ["".join(each) for each in itertools.product("abc", repeat=2)]
    rows = [
        {"question": texts[i], "choices": rng.permutation(texts)[:3].tolist(), "answer": i % 3}
        for i in range(9)
    ]
    task(tmp_path, "pick", "choice", rows)
    where = task(
        tmp_path, "texts", "perplexity", [{"text": f"{a}{b}"} for a in texts for b in texts]
    )
    results, records = harness.run_tasks(exact, ["pick", "texts"], limit=9, **where)

    whole = np.arange(27).reshape(9, 3)
    asked = [(row["question"], choice) for row in rows for choice in row["choices"]]
    draws = likelihood.RowDraws(
        likelihood.masked_estimator(joint_law.apply_joint, 3, every_subset()),
        jnp.asarray(joint_law.LAW),
        [(evaluated.CODEC.encode(q + c), np.arange(4) >= 2) for q, c in asked],
        jax.random.split(jax.random.key(0), 27),
        batch_size=9,
        pad_id=4,
        lengths=(4,),
    )
    answers = [row["answer"] for row in rows]
    choices = evaluation.choose_until(draws, whole, answers, likelihood.Stop(2))
    found = results["tasks"]["pick"]
    assert found["metrics"]["acc,none"]["value"] == choices.accuracy
    assert found["metrics"]["acc,none"]["standard_error"] == pytest.approx(choices.standard_error)
    assert found["documents"] == 9 and found["monte_carlo"]["unsure_documents"] == 0
    nats = draws(whole.ravel(), 0, 1).reshape(9, 3)
    picked = [record for record in records if record["task"] == "pick"]
    np.testing.assert_allclose([r["log_likelihoods"] for r in picked], -nats, rtol=1e-5)
    nats = [evaluated.conditional("", f"{texts[0]}{b}") for b in texts]
    bits = results["tasks"]["texts"]["metrics"]["bits_per_byte,none"]["value"]
    assert bits == pytest.approx(-np.mean(nats) / 4 / math.log(2), rel=1e-5)


SMALL = pathlib.Path(__file__).parents[3] / "experiments" / "models" / "small"


def test_lm_eval_knows_the_model_by_name(tmp_path):
    """``simple_evaluate("mdm_jax", model_args=...)`` gives our own answerer's numbers."""
    rows = [{"question": "1 + 1 =", "choices": [" 2", " 7"], "answer": 0}]
    where = task(tmp_path, "pick", "choice", rows)
    found = lm_eval.simple_evaluate(
        "mdm_jax",
        model_args=f"source={SMALL},passes=1,replicates=2,exact_up_to=0,rows=2,stream=True",
        tasks=harness.load_tasks(["pick"], **where),
        task_manager=harness.TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    settings = Settings(passes=1, replicates=2, exact_up_to=0, rows=2)
    answerer = Answerer(harness.subject_of(hub.load(SMALL)), settings)
    own = answerer.likelihoods([(rows[0]["question"], choice) for choice in rows[0]["choices"]])
    (sample,) = found["samples"]["pick"]
    said = [float(answer[0]) for answer in sample["filtered_resps"]]
    assert said == [answer["log_likelihood"] for answer in own]
    assert found["results"]["pick"]["acc,none"] == float(said[0] > said[1])


def test_choices_of_one_question_have_common_noise(joint):
    """The same answer twice is the same to the bit, whatever else is asked."""
    settings = Settings(passes=2, replicates=4, exact_up_to=0)
    asked = [("ab", "ca"), ("ab", "cb"), ("bb", "ca"), ("ab", "ca")]
    first, other, elsewhere, again = Answerer(joint, settings).likelihoods(asked)
    assert first["estimates"] == again["estimates"] and len(first["estimates"]) == 4
    assert harness._unsure([first, again]) and not harness._unsure([first, first | {
        "log_likelihood": -99.0, "estimates": [e - 50 for e in first["estimates"]]}])  # fmt: skip
    assert first["estimates"] != other["estimates"] != elsewhere["estimates"]
    # Under a width one may have more replicates.
    assert harness._unsure([first, again | {"estimates": again["estimates"] + [0.0] * 4}])


CERTAIN = Settings(passes=2, replicates=64, exact_up_to=0, certain=0.95)


CHOICES = {
    "ab": ("ac", "ba", "ca"),  # of log-likelihoods -0.7, -2.7, -12.6
    "bb": ("aa", "ac", "bc"),  # -0.9, -2.4, -5.8
    "ca": ("ca", "ab", "ac"),  # -2.60, -2.63, -4.1
    "cc": ("ba", "bc", "cc"),  # -1.2, -1.3, -9.0
}


def asked_choices():
    """Questions, of which two are easy, and a single request."""
    pairs = [(context, answer) for context, answers in CHOICES.items() for answer in answers]
    return [*pairs, ("a", "bb")], [*(context for context, _ in pairs), None]


def test_choices_are_drawn_until_the_best_is_certain(joint):
    """A part of the noise without stopping; the same choices; whatever else is asked."""
    pairs, questions = asked_choices()
    stopped = Answerer(joint, CERTAIN).likelihoods(pairs, questions=questions)
    whole = dataclasses.replace(CERTAIN, certain=0.0)
    plain = Answerer(joint, whole).likelihoods(pairs)
    for one, other in zip(stopped, plain):
        count = len(one["estimates"])
        assert one["estimates"] == other["estimates"][:count]
        assert one["passes"] == 2 * count and 8 <= count <= 64
    drawn = np.array([len(answer["estimates"]) for answer in stopped]).tolist()
    assert drawn[:6] == [8] * 6 and max(drawn[6:9]) > 8 and drawn[12] == 64
    assert sum(drawn[:12]) < 0.7 * 64 * 12

    def values(answers):
        return np.array([answer["log_likelihood"] for answer in answers[:12]]).reshape(4, 3)

    assert values(stopped).argmax(1).tolist() == values(plain).argmax(1).tolist()
    # Those that left early stand beside the leader's later replicates, within 5 errors.
    errors = [math.hypot(a["standard_error"], b["standard_error"]) for a, b in zip(stopped, plain)]
    assert (abs(values(stopped) - values(plain)).ravel() <= 5 * np.array(errors[:12])).all()
    alone = Answerer(joint, CERTAIN, batch=1).likelihoods(pairs[3:6], questions=questions[3:6])
    assert figures(alone) == figures(stopped[3:6])
    # Companions are part of what an answer is known by.
    journal = Journal()
    Answerer(joint, CERTAIN, journal).likelihoods(pairs[:3], questions=questions[:3])
    Answerer(joint, CERTAIN, journal).likelihoods(pairs[:2], questions=questions[:2])
    assert len(journal.answers) == 5
    with pytest.raises(ValueError, match="certain=0.9 stops choices after 8 replicates"):
        Settings(certain=0.9)


def test_choices_of_a_task_are_drawn_until_certain(joint, tmp_path):
    """Also where choices are compared with their likelihood without the context, which is not."""
    rows = [
        {"question": context, "choices": [*CHOICES[context]], "answer": 0}
        for context in ("ab", "bb")
    ]
    where = task(tmp_path, "pick", "choice", rows)
    found, records = harness.run_tasks(Answerer(joint, CERTAIN), ["pick"], **where)
    assert {passes for record in records for passes in record["passes"]} == {16}
    assert found["tasks"]["pick"]["metrics"]["acc,none"]["value"] == 1.0
    assert found["audit"]["choices"] == "until 95% certain"
    yaml = (tmp_path / "pick.yaml").read_text()
    (tmp_path / "pick.yaml").write_text(
        yaml.replace("metric_list:\n", "metric_list:\n  - metric: acc_mutual_info\n")
    )
    found, records = harness.run_tasks(Answerer(joint, CERTAIN), ["pick"], **where)
    assert {passes for record in records for passes in record["passes"]} == {128}
    assert [len(record["log_likelihoods"]) for record in records] == [6] * 2
    # Without a context "ca" is among the likeliest, which must not make the choice unsure.
    assert [record["unsure"] for record in records] == [False] * 2
    assert "acc_mutual_info,none" in found["tasks"]["pick"]["metrics"]


TEXTS = ["abcabcabca", "bb", "cabbagecab", "abc", "bcbcbcbcbcb", "ac", "aabb", "c", "bacca"]
REQUESTS = [(text, text[::-1]) for text in TEXTS]
NOISY = Settings(passes=3, replicates=2, exact_up_to=0, rows=2)


@pytest.fixture(scope="module")
def first():
    return Answerer(evaluated.network(), NOISY, batch=4).likelihoods(REQUESTS)


def figures(answers):
    return [(a["log_likelihood"], a["standard_error"], a["passes"]) for a in answers]


def test_the_same_to_the_bit_on_eight_devices_and_in_other_batches(first):
    """And in another order: noise is keyed by what a request says."""
    eight = Answerer(evaluated.network(devices=8), NOISY, batch=40)
    assert figures(eight.likelihoods(REQUESTS[::-1])) == figures(first)[::-1]
    assert all(error > 0 for _, error, _ in figures(first)[:3])


def test_an_interrupted_run_goes_on_where_it_was(first, tmp_path, monkeypatch):
    path = tmp_path / "requests.jsonl"
    subject, asked = evaluated.network(), []
    score = type(subject).score

    def counted(self, rows, *rest):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(rows))
        return score(self, rows, *rest)

    monkeypatch.setattr(type(subject), "score", counted)
    with pytest.raises(KeyboardInterrupt):
        Answerer(subject, NOISY, Journal(path), batch=3).likelihoods(REQUESTS)
    with path.open("ab") as file:
        file.write(b'{"key": "12')
    journal = Journal(path)
    assert "requests.jsonl:7: a line cut off" in journal.torn and len(journal.answers) == 6
    monkeypatch.setattr(type(subject), "score", score)
    again = Answerer(subject, NOISY, journal, batch=40)
    assert figures(again.likelihoods(REQUESTS)) == figures(first)
    assert not Journal(path).torn and len(path.read_text().splitlines()) == len(REQUESTS)
    monkeypatch.setattr(type(subject), "score", None)  # all are answered
    assert figures(Answerer(subject, NOISY, Journal(path)).likelihoods(REQUESTS)) == figures(first)
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(ValueError, match="requests.jsonl:1: not an answered request"):
        Journal(path)


def test_answers_are_those_of_one_model_and_settings(joint):
    one, other = Answerer(joint), Answerer(joint, Settings(seed=1))
    assert one.key("x", "y") == Answerer(evaluated.joint()).key("x", "y") != other.key("x", "y")
    changed = evaluated.network(scale=1.001)
    assert changed.fingerprint != evaluated.network().fingerprint
    assert evaluated.network(devices=8).fingerprint == evaluated.network().fingerprint


# --- generation -----------------------------------------------------------------------------------


def written(subject, prompt, settings=None, **arguments):
    (answer,) = Answerer(subject, settings or Settings()).continuations([(prompt, arguments)])
    return answer


def test_continuations_keep_to_prompt_length_and_stops():
    counter = evaluated.counter()
    assert written(counter, "ab", max_gen_toks=6)["text"] == "cabcab"
    assert written(counter, "bb", max_gen_toks=6, until=["bc", "ca"])["text"] == ""
    assert written(counter, "aaa", max_gen_toks=6, until="bca")["text"] == "a"
    fewer = written(counter, "ab", Settings(max_tokens=3, steps=1), max_gen_toks=6)
    assert fewer["text"] == "cab" and fewer["steps"] == 1
    ended = written(evaluated.counter(eos_at=5), "ab", max_gen_toks=6)
    assert ended["text"] == "cab" and ended["tokens"] == 3


def test_greedy_answers_are_those_that_decoding_gives():
    asked = [("ab", "cab"), ("ab", "cbb"), ("a", "bc"), ("abc", "abc")]
    pairs = [[evaluated.CODEC.encode(text) for text in pair] for pair in asked]
    part = [("", Encoded("", prompt, answer, prompt)) for prompt, answer in pairs]
    answerer = Answerer(evaluated.counter(), Settings(temperature=1.0))
    assert answerer._greedy(part).tolist() == [True, False, True, True]


def test_a_prompt_asked_again_is_another_draw():
    answerer = Answerer(evaluated.network(scale=0.1), Settings(temperature=1.0))
    asked = [("ab", {"max_gen_toks": 8})] * 2
    first, second = answerer.continuations(asked)
    assert first["text"] != second["text"]
    again = Answerer(answerer.subject, answerer.settings, batch=1)
    assert [a["text"] for a in again.continuations(asked)] == [first["text"], second["text"]]


def test_rows_that_come_and_go_give_the_same_texts():
    """Fewer passes where a text ends early; a row that is done makes room."""
    asked = [(text, {"max_gen_toks": 8}) for text in ("a", "ab", "abcab", "ccc", "b", "ab")]
    settings, steps = Settings(block_size=2, rows=2, temperature=0.5), []
    for subject in (evaluated.network(scale=0.5), evaluated.counter(eos_at=6)):
        plain = Answerer(subject, settings).continuations(asked)
        journal = Journal()
        stream = Answerer(subject, settings, journal, stream=True).continuations(asked)
        assert [a["text"] for a in stream] == [a["text"] for a in plain]
        assert [a["tokens"] for a in stream] == [a["tokens"] for a in plain]
        assert {a["steps"] for a in plain} == {8} and len(journal.answers) == 6
        steps.append([answer["steps"] for answer in stream])
    assert steps[1] == [6, 5, 2, 4, 6, 5]  # up to the EOS


def test_steps_are_the_forward_passes():
    """Confident positions go together; blocks with a cache are read too."""
    sure = evaluated.counter()
    assert written(sure, "ab", Settings(rule="llada"), max_gen_toks=8)["steps"] == 8
    few = Settings(rule="llada", steps=3)
    assert written(sure, "ab", few, max_gen_toks=8)["steps"] == 3
    block = evaluated.network(process="block")
    # The prompt's block, two blocks of 4 tokens, and the first of these read again.
    assert written(block, "abca", max_gen_toks=8)["steps"] == 1 + 2 * 4 + 1
    causal = evaluated.network(process="autoregressive")
    assert written(causal, "ab", max_gen_toks=3)["steps"] == 1 + 3


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_not_finite_are_seen_in_generation(stream):
    """The parameters are finite, what the network makes of them is not."""
    for settings in (Settings(), Settings(temperature=1.0)):
        answerer = Answerer(evaluated.counter(broken=True), settings, stream=stream)
        with pytest.raises(ValueError, match="task t, document 2: the model's logits are not fin"):
            answerer.continuations([("ab", {"max_gen_toks": 4})], ["task t, document 2"])


def test_exact_match_pass_at_k_and_failures_of_a_task(tmp_path):
    rows = [{"question": "ab", "answer": a} for a in ("cab", "<b>&", "cab", "abc")]
    where = task(tmp_path, "go_on", "exact", rows, max_tokens=3)
    answerer = Answerer(evaluated.counter(), Settings(temperature=1e-3))
    results, records = harness.run_tasks(answerer, ["go_on"], repeats=2, **where)
    found = results["tasks"]["go_on"]
    assert found["metrics"]["exact_match,none"]["value"] == 0.5
    for figure in ("pass@1", "pass@2", "majority@2"):
        own = found["repeats"]["exact_match,none"][figure]
        assert own["value"] == 0.5 and own["low"] < 0.5 < own["high"]
    assert [r["answer"] for r in records] == ["cab"] * 4 and records[0]["answers"] == ["cab"]
    assert records[0]["steps"] == 3 and records[0]["seconds"] >= 0

    write_failures(tmp_path / "page.html", results, records)
    page = (tmp_path / "page.html").read_text()
    assert "2 of 4 wrong" in page and "&lt;b&gt;&amp;" in page and "<b>&" not in page
    assert "dtype: float32" in page and "http" not in page
    strict = [record | {"filter": "strict", "metrics": {"exact_match": 0.0}} for record in records]
    write_failures(tmp_path / "page.html", results, records + strict)
    page = (tmp_path / "page.html").read_text()
    assert "none: 2 of 4 wrong" in page and "strict: 4 of 4 wrong" in page


# --- guards ---------------------------------------------------------------------------------------


def test_results_are_compared_on_the_same_data_alone(joint, exact, tmp_path):
    rows = [{"text": "abca"}, {"text": "bbbb"}, {"text": "cabc"}]
    where = task(tmp_path, "texts", "perplexity", rows)
    results = []
    for name, answerer in (("one", exact), ("two", Answerer(joint, Settings(passes=4)))):
        found, records = harness.run_tasks(answerer, ["texts"], **where)
        results.append(found)
        write_json(tmp_path / f"{name}.json", found)
        lines = (json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    text = compare_results(tmp_path / "one.json", tmp_path / "two.json")
    assert "designs differ: passes 16 and 4" in text and "both are of the same model" in text
    assert "+0.0000" in text and "over 3 documents, 0 of them unlike" in text
    assert any(
        "tokenizers differ" in note
        for note in check_comparable(results[0], results[1] | {"tokenizer": "other"})
    )
    fewer, _ = harness.run_tasks(exact, ["texts"], limit=2, **where)
    with pytest.raises(ValueError, match="other documents or prompts .3 and 2 documents"):
        check_comparable(results[0], fewer)
    with pytest.raises(ValueError, match="no task in common: texts and pick"):
        check_comparable(results[0], results[1] | {"tasks": {"pick": {}}})


# --- bad input ------------------------------------------------------------------------------------


def test_tasks_that_cannot_be_loaded(tmp_path):
    where = task(tmp_path, "my_texts", "perplexity", [{"text": "a"}])
    (tmp_path / "my_texts.jsonl").unlink()
    with pytest.raises(ValueError, match="task my_texts: its data file my_texts.jsonl is missing"):
        harness.load_tasks(["my_texts"], **where)
    with pytest.raises(ValueError, match="there is no folder nowhere"):
        harness.load_tasks(["my_texts"], ["nowhere"])
    (tmp_path / "far.yaml").write_text(
        (tmp_path / "my_texts.yaml").read_text().replace("my_texts", "far")
        .replace("dataset_path: json", "dataset_path: some/where")
        .replace("dataset_kwargs:\n  data_files:\n    test: far.jsonl\n", "")
    )  # fmt: skip
    with pytest.raises(ValueError, match="hf download some/where --repo-type dataset --local-dir"):
        harness.load_tasks(["far"], **where)
    with pytest.raises(ValueError, match="row 0 of x lacks choices"):
        local_tasks.write(tmp_path, "x", "choice", [{"question": "", "answer": 0}])


def test_an_unknown_task_names_the_nearest(tmp_path, monkeypatch):
    manager = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda include_path, **_: manager(None, include_path, False)
    )
    where = task(tmp_path, "my_texts", "perplexity", [{"text": "a"}])
    with pytest.raises(ValueError, match="unknown task 'my_text'; did you mean 'my_texts'"):
        harness.load_tasks(["my_text"], **where)


@pytest.mark.parametrize(
    "pair, settings, match",
    [
        (("ab", ""), Settings(), "request 1 .'ab'. has an empty continuation"),
        (("abca", "b"), Settings(), "4 tokens and 1 to score or generate, more than the 4"),
        (("a", "bcabc"), Settings(truncate=True), "more than the 4"),
    ],
)
def test_requests_that_cannot_be_answered_stop_before_anything_runs(joint, pair, settings, match):
    journal = Journal()
    with pytest.raises(ValueError, match=match):
        Answerer(joint, settings, journal).likelihoods([PAIRS[0], pair])
    assert not journal.answers


def test_long_prompts_are_cut_on_the_left_if_asked(joint, exact):
    cut = Answerer(joint, Settings(truncate=True)).likelihoods([("cccab", "ab")])
    assert figures(cut) == figures(exact.likelihoods([("ab", "ab")]))


def test_numbers_that_are_not_finite_are_named(tmp_path):
    broken = evaluated.network(scale=math.nan)
    with pytest.raises(ValueError, match=r"parameters .* hold numbers that are not finite"):
        Answerer(broken)
    law = evaluated.joint()
    law.__dict__["apply_fn"] = lambda params, inputs, *_: (
        joint_law.apply_joint(params["law"], inputs) / 0.0
    )
    with pytest.raises(ValueError, match="task t, document 5: the model's logits are not finite"):
        Answerer(law).likelihoods([("ab", "ab")], ["task t, document 5"])


def test_lengths_fall_into_few_buckets():
    sizes = [bucket(n, 300, 4) for n in range(1, 301)]
    assert sorted(set(sizes)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 300]
    assert all(n <= size and size % 4 == 0 for n, size in enumerate(sizes, start=1))
