"""Generated tasks: examples as a function of (task, split, index), and a checker.

Splits are disjoint by instance, not by string: the hash of an instance's canonical form picks its
split (80 % train, 10 % valid, 10 % test), so no renamed or reordered training problem is tested.
"""

import abc
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mdm_jax.data.datasets import SPLITS

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
    """Random choices from NumPy's Philox words, which (unlike its distributions) never change.

    Args:
        key: equal keys give equal choices.
    """

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
        """A random item."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        """The items in random order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            other = self.below(last + 1)
            order[last], order[other] = order[other], order[last]
        return order


class Task(abc.ABC):
    """A family of problems. Subclasses are frozen dataclasses, whose ``repr`` names the family.

    An instance is a problem before it is written as text, in a form of the subclass's choice.
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
        """Prompt and answer; what the canonical form leaves out is chosen here."""

    @abc.abstractmethod
    def check(self, prompt: str, answer: str) -> bool:
        """Whether any text is a correct answer to a prompt of this task."""


def split_of(canonical: str) -> str:
    """The split of an instance with this canonical form."""
    digest = hashlib.blake2b(canonical.encode("utf-8"), digest_size=8).digest()
    tenth = int.from_bytes(digest, "little") % 10
    return SPLITS[max(0, tenth - 7)]


def example(task: Task, split: str, index: int) -> Pair:
    """Example ``index`` of a split, a function of the three arguments alone.

    Raises:
        ValueError: for an unknown split, a negative index, or a task too small for the split.
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
        integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not integer or not low <= value <= high:
            raise ValueError(
                f"{type(task).__name__}: {name} must be a whole number from {low} to {high}, "
                f"got {value!r}"
            )
