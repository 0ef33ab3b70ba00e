"""Generated tasks: examples as a function of (task, split, index), a checker, and a data set.

Splits are disjoint by instance: the hash of its canonical form picks the split (80 % train, 10 %
valid, 10 % test), so no renamed or reordered training problem is tested.
"""

import abc
import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import numpy as np

from mdm_jax.checks import Whole, checked
from mdm_jax.data.datasets import SPLITS, Dataset, Fractions, PairLayout, make_dataset
from mdm_jax.data.records import read_sources, text_field
from mdm_jax.data.rows import StoredRows, VectorisedRows
from mdm_jax.data.tokenizers import CharTokenizer
from mdm_jax.types import Batch

VOCABULARY = "".join(sorted("0123456789abcdefghijklmnopqrstuvwxyz+-*/=,;?#()[]:. "))
"""Characters of all tasks; a model of one task can be trained further on another."""

_WORDS = 64  # read from the generator at a time
_ATTEMPTS = 2000  # a split of 10 % is missed so often with probability 1e-91

Item = TypeVar("Item")


class Pair(NamedTuple):
    """A prompt and one correct answer."""

    prompt: str
    answer: str


class Choices:
    """Random choices from NumPy's Philox words, which (unlike its distributions) never change."""

    def __init__(self, key: str):
        digest = hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A random integer in [0, bound)."""
        if not self._words:
            self._words = self._generator.random_raw(_WORDS).tolist()
        return self._words.pop() * bound >> 64

    def one_of(self, items: Sequence[Item]) -> Item:
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


class Task(abc.ABC):
    """A family of problems. Subclasses are frozen dataclasses, whose ``repr`` names the family.

    An instance is a problem before it is written as text, of any type.
    """

    @property
    @abc.abstractmethod
    def lengths(self) -> tuple[int, int]:
        """Characters of the longest prompt and of the longest answer."""

    @abc.abstractmethod
    def draw(self, choices: Choices) -> Any:
        """A random instance."""

    @abc.abstractmethod
    def canonical(self, instance: Any) -> str:
        """Equal for instances that are one problem under other names or in another order."""

    @abc.abstractmethod
    def write(self, instance: Any, choices: Choices) -> Pair:
        """Prompt and answer; ``choices`` decide what the canonical form leaves out."""

    @abc.abstractmethod
    def check(self, prompt: str, answer: str) -> bool:
        """Whether any text is a correct answer to a prompt of this task."""


def split_of(canonical: str) -> str:
    digest = hashlib.blake2b(canonical.encode("utf-8"), digest_size=8).digest()
    tenth = int.from_bytes(digest, "little") % 10
    return SPLITS[max(0, tenth - 7)]


def example(task: Task, split: str, index: int) -> Pair:
    """Example ``index`` of a split, a function of the three arguments alone.

    Raises ValueError for an unknown split, a negative index, or a task too small for the split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if index < 0:
        raise ValueError(f"index must not be negative, got {index}")
    choices = Choices(f"{task!r}/{split}/{index}")
    for _ in range(_ATTEMPTS):
        instance = task.draw(choices)
        if split_of(task.canonical(instance)) == split:
            return task.write(instance, choices)
    raise ValueError(
        f"{task!r} has too few different instances: none of {_ATTEMPTS} fell into the {split} "
        "split; choose larger settings"
    )


def check_range(task: Task, **settings: tuple[int, int, int]) -> None:
    """Raise ValueError unless each setting, (value, low, high), is an integer in [low, high]."""
    for name, (value, low, high) in settings.items():
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not integer or not low <= value <= high:
            raise ValueError(
                f"{type(task).__name__}: {name} must be a whole number from {low} to {high}, "
                f"got {value!r}"
            )


AnswerPadding = Annotated[
    Literal["eos_once", "eos_scored"], "EOS after the answer: the first is learned, or all"
]

_FINGERPRINTED = 8  # examples of each split
_PromptLength = Annotated[int, Whole("[0, 1e7]", "tokens", "0: the longest")]
_AnswerLength = Annotated[int, Whole("[0, 1e7]", "tokens", "with EOS; 0: the longest")]


class TaskRows(VectorisedRows):
    """Rows of examples 0 to size - 1 of a split, in ``layout``, made when first read."""

    def __init__(
        self, task: Task, split: str, size: int, tokenizer: CharTokenizer, layout: PairLayout
    ):
        self.task, self.split = task, split
        self._tokenizer, self._layout = tokenizer, layout
        shape = (size, layout.length)
        # Threads may make a row twice: it is the same both times, and marked when complete.
        self._made = np.zeros(size, bool)
        self._rows = Batch(
            tokens=np.zeros(shape, np.int32),
            eligible=np.zeros(shape, bool),
            documents=np.zeros(shape, np.int32),
            units=np.zeros(size, np.int32),
        )

    def __len__(self) -> int:
        return len(self._made)

    def _read(self, indices: np.ndarray) -> Batch:
        for index in indices[~self._made[indices]].tolist():
            self._make(index)
        return Batch(*(field[indices] for field in self._rows))

    def _make(self, index: int) -> None:
        prompt, answer = example(self.task, self.split, index)
        codec = self._tokenizer
        row = self._layout.rows(
            [codec.encode(prompt)],
            [np.append(codec.encode(answer), codec.eos_id)],
            pad_id=codec.pad_id,
            eos_id=codec.eos_id,
            units=[len(answer)],
        )
        for field, made in zip(self._rows, row):
            field[index] = made[0]
        self._made[index] = True


@checked
def task_dataset(
    task: Task,
    *,
    prompt_length: _PromptLength = 0,
    answer_length: _AnswerLength = 0,
    answer_padding: AnswerPadding = "eos_once",
    train_rows: Annotated[int, Whole("[1, 2e9]", "rows", "of the split")] = 20_000,
    valid_rows: Annotated[int, Whole("[1, 2e9]", "rows", "of the split")] = 512,
    test_rows: Annotated[int, Whole("[1, 2e9]", "rows", "of the split")] = 512,
) -> Dataset:
    """Data set of a generated task; no instance is in two splits.

    A longer split begins with a shorter one; a task with few examples repeats some.

    ``answer_padding``: EOS tokens after the first. "eos_once": neither eligible nor attended to,
    which reveals the answer's length (harmless where it is fixed, as in all tasks but
    countdown). "eos_scored": eligible like the answer. ValueError for a length that is too small.
    """
    layout = _layout(task, prompt_length, answer_length, answer_padding)
    sizes = dict(zip(SPLITS, (train_rows, valid_rows, test_rows)))
    codec = CharTokenizer(VOCABULARY)
    sources = {name: TaskRows(task, name, size, codec, layout) for name, size in sizes.items()}
    first = [example(task, name, i) for name in SPLITS for i in range(_FINGERPRINTED)]
    report = {f"{name}_rows": size for name, size in sizes.items()}
    return make_dataset(
        sources,
        codec,
        length=layout.length,
        digest=hashlib.sha256(repr(first).encode()).digest(),
        settings={"source": "task", "task": repr(task), **dataclasses.asdict(layout), **report},
        headline=f"Generated problems, {task!r}, as in {' to '.join(first[0])}",
        policy=f"{_describe(layout)} Splits are disjoint by canonical instance.",
        report=report,
        check=task.check,
        layout=layout,
    )


@checked
def task_file_dataset(
    task: Task,
    path: str | os.PathLike | Sequence[str],
    *,
    valid_path: str | os.PathLike | None = None,
    test_path: str | os.PathLike | None = None,
    fractions: Fractions = (0.9, 0.05, 0.05),
    split_seed: int = 0,
    prompt_length: _PromptLength = 0,
    answer_length: _AnswerLength = 0,
    answer_padding: AnswerPadding = "eos_once",
) -> Dataset:
    """Problems of a task from files: JSON objects with a ``prompt`` and an ``answer``, one a line.

    Rows, vocabulary and checker are those of :func:`task_dataset`, so a run on generated problems
    can be measured on a published set, and the other way round. Splits: ``valid_path``,
    ``test_path``, ``fractions`` and ``split_seed`` as in
    :func:`mdm_jax.data.records.read_sources`; files are split by distinct prompt, twins under other
    names are not found.

    ValueError names file and line of an answer that the checker refuses, of a pair that does not
    fit, and of other characters than those of all tasks; else as ``read_sources``.
    """
    layout = _layout(task, prompt_length, answer_length, answer_padding)
    codec = CharTokenizer(VOCABULARY)

    def pair(record: Mapping[str, Any], origin: str) -> tuple[str, str]:
        prompt, answer = (text_field(record, name, origin) for name in ("prompt", "answer"))
        if unknown := codec.unknown_in(prompt + answer):
            raise ValueError(f"{origin}: {unknown[0]!r} is no character of the tasks' vocabulary")
        if misfit := layout.misfit(prompt, f"{answer} "):  # and its EOS
            raise ValueError(f"{origin}: {misfit}")
        try:
            right = task.check(prompt, answer)
        except (ValueError, LookupError) as error:
            raise ValueError(f"{origin}: no prompt of {task!r}: {error}") from error
        if not right:
            raise ValueError(f"{origin}: {answer!r} is no answer to {prompt!r} of {task!r}")
        return prompt, answer

    found = read_sources(
        path,
        pair,
        wanted="'prompt' and 'answer'",
        named_by="data.task, which has the name and settings of the task",
        valid_path=valid_path,
        test_path=test_path,
        fractions=fractions,
        split_seed=split_seed,
    )
    rows, content = {}, hashlib.sha256()
    for name, records in found.splits().items():
        pairs = [record.values for record in records]
        content.update(repr(pairs).encode())
        rows[name] = StoredRows(
            layout.rows(
                [codec.encode(prompt) for prompt, _ in pairs],
                [np.append(codec.encode(answer), codec.eos_id) for _, answer in pairs],
                pad_id=codec.pad_id,
                eos_id=codec.eos_id,
                units=[len(answer) for _, answer in pairs],
            )
        )
    return make_dataset(
        rows,
        codec,
        length=layout.length,
        digest=content.digest(),
        settings={"source": "task_file", "task": repr(task), **dataclasses.asdict(layout)},
        headline=f"Problems of {task!r} from {path}.",
        policy=_describe(layout),
        report=found.report | {f"{name}_rows": len(source) for name, source in rows.items()},
        check=task.check,
        layout=layout,
    )


def _layout(
    task: Task, prompt_length: int, answer_length: int, answer_padding: AnswerPadding
) -> PairLayout:
    longest_prompt, longest_answer = task.lengths
    needed = {"prompt_length": longest_prompt, "answer_length": longest_answer + 1}
    lengths = {"prompt_length": prompt_length, "answer_length": answer_length}
    for name, given in lengths.items():
        if given and given < needed[name]:
            raise ValueError(
                f"{name} must be at least {needed[name]} for {task!r}, or 0 for just that; got "
                f"{given}"
            )
        lengths[name] = given or needed[name]
    return PairLayout(**lengths, answer_padding=answer_padding)


def _describe(layout: PairLayout) -> str:
    return (
        f"Prompt in {layout.prompt_length} positions, answer in {layout.answer_length}; after the "
        f"answer: {layout.answer_padding}."
    )
