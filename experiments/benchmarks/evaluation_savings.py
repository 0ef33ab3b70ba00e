"""What the options ``certain`` and ``--stream`` of ``mdm eval`` save, on a local task set.

python -m experiments.benchmarks.evaluation_savings [--savings_questions=10]

Questions are held out, from seven lessons of ``experiments/conversations.py``, answered by the
small pretrained model: as multiple choice among four, three of which have the result of another
question, and by generation up to 48 tokens. Per way: forward passes of rows, processor seconds of
one call after one that compiles, share of choices or texts as without the option, and share right.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import app, flags

from experiments import conversations
from experiments.benchmarks import command, machine
from experiments.benchmarks.stopping import LESSONS, MODEL
from mdm_jax import hub
from mdm_jax.evaluation.answering import Answer, Answerer
from mdm_jax.evaluation.model import EvaluatedModel
from mdm_jax.evaluation.settings import Settings

CHOICES, LONGEST = 4, 48
FIXED = Settings(passes=2, replicates=64, exact_up_to=0)
DECODED = {"rule": "llada", "block_size": 8, "max_tokens": LONGEST, "rows": 16}


def asked(model: hub.HubModel, count: int) -> list[tuple[str, conversations.Exchange, list[str]]]:
    """Prompt, exchange and choices of each question, the right choice first."""
    found = []
    for name in LESSONS:
        several = [conversations.exchange(name, "valid", i) for i in range(count + 20)]
        for number, one in enumerate(several[:count]):
            results = dict.fromkeys(o.result for o in several[number + 1 :])
            results.pop(one.result, None)
            others = [one.answer.replace(one.result, o) for o in [*results][: CHOICES - 1]]
            question = [{"role": "user", "content": one.question}]
            prompt = model.tokenizer.render(question, True).text
            found.append((prompt, one, [f"{answer}<|im_end|>" for answer in (one.answer, *others)]))
    return found


def timed(call: Callable[[], list[Answer]]) -> tuple[list[Answer], float]:
    call()
    start = time.process_time()
    answers = call()
    return answers, time.process_time() - start


def main(_: Sequence[str]) -> None:
    model = hub.load(MODEL, dtype="float32")
    subject, questions = EvaluatedModel(model, model.tokenizer), asked(model, _QUESTIONS.value)
    print(machine.describe(machine.facts()))
    print(f"{len(questions)} questions, {CHOICES} choices each\n")

    pairs = [(prompt, choice) for prompt, _, choices in questions for choice in choices]
    numbers = np.repeat(np.arange(len(questions)), CHOICES).tolist()
    rows, chosen = [], {}
    for certain in (0.0, 0.95):
        settings = Settings(**{**vars(FIXED), "certain": certain})

        def score(settings: Settings = settings) -> list[Answer]:
            return Answerer(subject, settings).likelihoods(pairs, questions=numbers)

        answers, seconds = timed(score)
        nats = np.array([answer["log_likelihood"] for answer in answers]).reshape(-1, CHOICES)
        chosen[certain] = nats.argmax(1)
        passes = sum(answer["passes"] for answer in answers)
        alike, right = np.mean(chosen[certain] == chosen[0.0]), np.mean(chosen[certain] == 0)
        name = f"choices, certain={certain}" if certain else "choices, all replicates"
        rows.append((name, str(passes), f"{seconds:.1f}", f"{alike:.3f}", f"{right:.3f}"))

    prompts: list[tuple[str, dict[str, Any]]] = [(prompt, {}) for prompt, *_ in questions]
    for more in ({}, {"threshold": 0.9}):
        settings, texts = Settings(**DECODED, **more), {}
        for stream in (False, True):

            def write(settings: Settings = settings, stream: bool = stream) -> list[Answer]:
                return Answerer(subject, settings, stream=stream).continuations(prompts)

            answers, seconds = timed(write)
            texts[stream] = [answer["text"] for answer in answers]
            passes = sum(answer["steps"] for answer in answers)
            alike = np.mean([a == b for a, b in zip(texts[stream], texts[False])])
            right = np.mean([one.result in t for (_, one, _), t in zip(questions, texts[stream])])
            name = "one token a step" if not more else "all above 0.9"
            name += ", stream" if stream else ", batches"
            rows.append((name, str(passes), f"{seconds:.1f}", f"{alike:.3f}", f"{right:.3f}"))
    header = ("way", "forward passes", "processor s", "answers alike", "right")
    print("\n".join(command.markdown(header, rows)))


if __name__ == "__main__":
    _QUESTIONS = flags.DEFINE_integer("savings_questions", 10, "Of each lesson.", 1)
    app.run(main)
