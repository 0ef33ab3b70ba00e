"""Generated conversations in plain English: what the small model is pretrained and fine-tuned on.

  python -m experiments.conversations --task=stories --form=pairs --rows=2000 --out=stories.jsonl

An exchange is a function of (split, number) alone. :data:`LESSONS` are pretraining, :data:`TASKS`
are kept for fine-tuning: their questions do not occur in pretraining, and their answers end in
``#### RESULT``. The wording of an answer is drawn at random, so that its entropy, and with it the
variance of training, does not vanish once the task is solved, as in natural text.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from absl import app, flags

from mdm_jax.tasks.task import Choices

MARKER = "####"
SYSTEM = "Answer in a word."

PEOPLE = ["Tom", "Anna", "Ben", "Lucy", "Sam", "Emma", "Jack", "Rose", "Max", "Ella"]
THINGS = ["apples", "books", "coins", "eggs", "pens", "shells", "cakes", "cards", "nuts", "stamps"]
PLACES = ["kitchen", "garden", "school", "library", "park", "station", "market", "barn"]
WORDS = [
    "cat",
    "sun",
    "tree",
    "milk",
    "bird",
    "lamp",
    "door",
    "fish",
    "hat",
    "rain",
    "stone",
    "leaf",
    "ship",
    "moon",
    "bell",
]
COLOURS = ["red", "blue", "green", "white", "black", "yellow"]
OBJECTS = ["hat", "car", "door", "boat", "ball", "cup", "coat", "box"]
KINDS = {
    "animal": ["cat", "dog", "horse", "cow", "fish", "bird"],
    "fruit": ["apple", "pear", "plum", "cherry", "lemon"],
    "tool": ["hammer", "saw", "spade", "axe", "knife"],
}
OPPOSITES = [
    "hot",
    "cold",
    "big",
    "small",
    "old",
    "new",
    "long",
    "short",
    "high",
    "low",
    "fast",
    "slow",
    "light",
    "dark",
    "wet",
    "dry",
]


class Exchange(NamedTuple):
    """A question, its answer in a sentence, and the result alone."""

    question: str
    answer: str
    result: str


def two_of(choices: Choices, items: list[str]) -> list[str]:
    return choices.shuffled(items)[:2]


def listed(items: list[Any]) -> str:
    return ", ".join(map(str, items))


# --- lessons: pretraining -------------------------------------------------------------------------


def sums(choices: Choices) -> Exchange:
    a, b = choices.below(20), choices.below(20)
    word, value = choices.one_of([("plus", a + b), ("minus", max(a, b) - min(a, b))])
    if word == "minus":
        a, b = max(a, b), min(a, b)
    question = choices.one_of(["What is {} {} {}?", "Tell me {} {} {}."]).format(a, word, b)
    sign = "+" if word == "plus" else "-"
    answer = choices.one_of([f"{a} {word} {b} is {value}.", f"{a} {sign} {b} = {value}."])
    return Exchange(question, answer, str(value))


def one_step(choices: Choices) -> Exchange:
    who, thing = choices.one_of(PEOPLE), choices.one_of(THINGS)
    if choices.below(2):
        a, b = 1 + choices.below(15), 1 + choices.below(9)
        change = choices.one_of([f"buys {b} more", f"finds {b} more", f"gets {b} more"])
        step, value = f"{a} + {b}", a + b
    else:
        a = 2 + choices.below(18)
        b = 1 + choices.below(min(9, a - 1))
        change = choices.one_of([f"gives {b} away", f"loses {b}", f"sells {b}"])
        step, value = f"{a} - {b}", a - b
    question = f"{who} has {a} {thing} and {change}. How many {thing} does {who} have now?"
    answer = choices.one_of([f"{step} = {value}.", f"{who} has {step} = {value} {thing}."])
    return Exchange(question, answer, str(value))


def larger(choices: Choices) -> Exchange:
    a, b = choices.below(60), choices.below(60)
    b += a == b
    word, value = choices.one_of([("larger", max(a, b)), ("smaller", min(a, b))])
    question = choices.one_of([f"Which is {word}, {a} or {b}?", f"Is {a} or {b} {word}?"])
    return Exchange(question, f"{value} is {word} than {a + b - value}.", str(value))


def counting(choices: Choices) -> Exchange:
    start, length = choices.below(30), 3 + choices.below(4)
    numbers = list(range(start, start + length))
    if choices.below(2):
        question = f"Count from {start} to {numbers[-1]}."
    else:
        numbers.reverse()
        question = f"Count down from {numbers[0]} to {numbers[-1]}."
    return Exchange(question, f"{listed(numbers)}.", listed(numbers))


def words(choices: Choices) -> Exchange:
    chosen = choices.shuffled(WORDS)[: 2 + choices.below(3)]
    lesson, say = choices.below(5), listed(chosen)
    if lesson == 0:
        return Exchange(f"Repeat: {say}.", f"{say}.", say)
    if lesson == 1:
        back = listed(chosen[::-1])
        return Exchange(f"Say backwards: {say}.", f"{back}.", back)
    if lesson == 2:
        question = f"How many words are these: {say}?"
        return Exchange(question, f"There are {len(chosen)} words.", str(len(chosen)))
    place, word = choices.one_of([("first", chosen[0]), ("last", chosen[-1])])
    question = f"What is the {place} word: {say}?"
    return Exchange(question, f"The {place} word is {word}.", word)


def whereabouts(choices: Choices) -> Exchange:
    (a, b), (x, y) = two_of(choices, PEOPLE), two_of(choices, PLACES)
    who, where = choices.one_of([(a, x), (b, y)])
    question = f"{a} is in the {x} and {b} is in the {y}. Where is {who}?"
    return Exchange(question, f"{who} is in the {where}.", where)


def colours(choices: Choices) -> Exchange:
    (a, b), (x, y) = two_of(choices, OBJECTS), two_of(choices, COLOURS)
    what, colour = choices.one_of([(a, x), (b, y)])
    question = f"The {a} is {x} and the {b} is {y}. What colour is the {what}?"
    return Exchange(question, f"The {what} is {colour}.", colour)


def knowledge(choices: Choices) -> Exchange:
    if choices.below(2):
        pair = choices.below(len(OPPOSITES) // 2) * 2
        word, other = choices.shuffled(OPPOSITES[pair : pair + 2])
        question = f"What is the opposite of {word}?"
        return Exchange(question, f"The opposite of {word} is {other}.", other)
    kind = choices.one_of(list(KINDS))
    thing = choices.one_of(KINDS[kind])
    article = "an" if thing[0] in "aeiou" else "a"
    of_kind = "an" if kind[0] in "aeiou" else "a"
    return Exchange(
        f"What kind of thing is {article} {thing}?",
        f"{article.capitalize()} {thing} is {of_kind} {kind}.",
        kind,
    )


def greeting(choices: Choices) -> Exchange:
    who = choices.one_of(PEOPLE)
    question = choices.one_of([f"Hello, my name is {who}.", f"Hi, I am {who}."])
    answers = [f"Hello, {who}! How can I help you?", f"Hi, {who}! What can I do for you?"]
    return Exchange(question, choices.one_of(answers), who)


LESSONS: Mapping[str, Callable[[Choices], Exchange]] = {
    lesson.__name__: lesson
    for lesson in (
        sums,
        one_step,
        larger,
        counting,
        words,
        whereabouts,
        colours,
        knowledge,
        greeting,
    )
}

# --- tasks: fine-tuning ---------------------------------------------------------------------------


def stories(choices: Choices) -> Exchange:
    """Word problems of one step below ten, worked out in the style of GSM8K."""
    who, other = two_of(choices, PEOPLE)
    thing, large = choices.one_of(THINGS), 2 + choices.below(8)
    small = 1 + choices.below(large - 1)
    if choices.below(2):
        a, b, value = small, large - small, large
        word, step = "more", f"{a} + {b}"
    else:
        a, b, value = large, small, large - small
        word, step = "fewer", f"{a} - {b}"
    shown = choices.one_of(["{} = {}.", "We have {} = {}.", "So {} = {}."]).format(step, value)
    question = f"{who} has {a} {thing}. {other} has {b} {word}. How many {thing} has {other}?"
    return Exchange(question, f"{shown} {MARKER} {value}", str(value))


def sorting(choices: Choices) -> Exchange:
    """Three different digits of three people, from the smallest to the largest."""
    digits, people = choices.shuffled(list(range(10)))[:3], choices.shuffled(PEOPLE)[:3]
    result = listed(sorted(digits))
    question = f"{listed(people)} say {listed(digits)}. Put that in order."
    begin = choices.one_of(["In order it is", "From the smallest on", "Sorted, that is"])
    return Exchange(question, f"{begin} {MARKER} {result}", result)


TASKS: Mapping[str, Callable[[Choices], Exchange]] = {"stories": stories, "sorting": sorting}


def exchange(name: str, split: str, number: int) -> Exchange:
    """Exchange ``number`` of a lesson or task. Splits are drawn apart, and may share questions."""
    return {**LESSONS, **TASKS}[name](Choices(f"{name}/{split}/{number}"))


def records(task: str, form: str, rows: int) -> list[dict[str, Any]]:
    """JSON records of distinct questions: "chat" ``messages``, or "pairs" prompt and answer."""
    made: dict[str, Exchange] = {}
    number = 0
    while len(made) < rows:
        one = exchange(task, "fine-tuning", number)
        made.setdefault(one.question, one)
        number += 1
        if number > 100 * rows:
            raise ValueError(f"{task} has fewer than {rows} different questions; ask for fewer")
    if form == "pairs":
        return [{"prompt": f"{e.question}\n", "answer": e.answer} for e in made.values()]
    return [
        {
            "messages": [
                {"role": "user", "content": e.question},
                {"role": "assistant", "content": e.answer},
            ]
        }
        for e in made.values()
    ]


def write(path: pathlib.Path, task: str, form: str, rows: int) -> None:
    """Write :func:`records` as JSON lines."""
    lines = (json.dumps(record) + "\n" for record in records(task, form, rows))
    path.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    _TASK = flags.DEFINE_enum("task", "stories", sorted(TASKS), "Which task.")
    _FORM = flags.DEFINE_enum("form", "chat", ("chat", "pairs"), "Layout of a line.")
    _ROWS = flags.DEFINE_integer("rows", 2000, "Lines, of distinct questions.", lower_bound=1)
    _OUT = flags.DEFINE_string("out", None, "The file, which may not exist.", required=True)

    def main(_argv: list[str]) -> None:
        path = pathlib.Path(_OUT.value)
        if path.exists():
            raise app.UsageError(f"{path} exists; name another --out")
        write(path, _TASK.value, _FORM.value, _ROWS.value)

    app.run(main)
