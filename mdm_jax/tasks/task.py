"""What a generated task is: examples that are a function of (task, split, index), and a checker.

Splits are disjoint by instance, not by string: an instance belongs to the split that the hash of
its canonical form picks, 80 % to train, 10 % each to valid and test. No twin of a training problem
under other names or in another order is therefore ever met in the test split.
"""

import abc
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mdm_jax.data.datasets import SPLITS

VOCABULARY = "".join(sorted("0123456789abcdefghijklmnopqrstuvwxyz+-*/=,;?#()[]:. "))
"""Characters of all tasks, so that a model of one task can go on with another."""

_WORDS = 64  # read from the generator at a time
_ATTEMPTS = 2000  # a split of 10 % is missed so often with probability 1e-91

Item = TypeVar("Item")


class Pair(NamedTuple):
    """An example: a prompt, and one answer that is right."""

    prompt: str
    answer: str


class Choices:
    """Random choices from NumPy's Philox generator.

    Only its words are used, which NumPy never changes, and not the distributions, which it may.

    Args:
        key: names the stream; equal keys give equal choices.
    """

    def __init__(self, key: str):
        digest = hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()
        self._generator = np.random.Philox(key=int.from_bytes(digest, "little"))
        self._words: list[int] = []

    def below(self, bound: int) -> int:
        """A whole number in [0, bound), uniform up to bound / 2**64."""
        if not self._words:
            self._words = self._generator.random_raw(_WORDS).tolist()
        return self._words.pop() * bound >> 64

    def one_of(self, items: Sequence[Item]) -> Item:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        found = list(items)
        for last in range(len(found) - 1, 0, -1):
            other = self.below(last + 1)
            found[last], found[other] = found[other], found[last]
        return found


class Task(abc.ABC):
    """A family of problems. Subclasses are frozen dataclasses: their ``repr`` names the family.

    An instance is whatever the subclass makes of a problem before it is written down.
    """

    @property
    @abc.abstractmethod
    def prompt_length(self) -> int:
        """Characters of the longest prompt."""

    @property
    @abc.abstractmethod
    def answer_length(self) -> int:
        """Characters of the longest answer."""

    @abc.abstractmethod
    def draw(self, choices: Choices) -> Any:
        """A random instance."""

    @abc.abstractmethod
    def canonical(self, instance: Any) -> str:
        """The same text for instances that are one problem under other names or orders."""

    @abc.abstractmethod
    def write(self, instance: Any, choices: Choices) -> Pair:
        """The instance as prompt and answer; what canonical forms leave out is chosen here."""

    @abc.abstractmethod
    def check(self, prompt: str, answer: str) -> bool:
        """Whether any text is a right answer to a prompt that this task has written."""


def split_of(canonical: str) -> str:
    """The split that an instance of this canonical form belongs to."""
    digest = hashlib.blake2b(canonical.encode("utf-8"), digest_size=8).digest()
    tenth = int.from_bytes(digest, "little") % 10
    return SPLITS[max(0, tenth - 7)]


def example(task: Task, split: str, index: int) -> Pair:
    """Example ``index`` of a split, a function of these three alone.

    Raises:
        ValueError: for a split that does not exist, a negative index, or a task so small that the
            split has no instance.
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
    """Raises ValueError unless each setting, (value, low, high), is an integer in [low, high]."""
    for name, (value, low, high) in settings.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or not low <= value <= high:
            raise ValueError(
                f"{type(task).__name__}: {name} must be a whole number from {low} to {high}, "
                f"got {value!r}"
            )
