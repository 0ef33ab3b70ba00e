"""Letters in an answer that nothing predicts, for entropy that no context removes.

Once a deterministic task is solved, its loss is zero at every masking rate and so is its training
variance. Tokens whose entropy stays behave like the wording of a derivation in natural language.
"""

import dataclasses
import math
from typing import Any

from mdm_jax.data.tasks.task import Choices, Pair, Task, check_range

LETTERS = "wxyz"
"""What is inserted; no answer of a task contains one."""

_REMOVE = str.maketrans("", "", LETTERS)


@dataclasses.dataclass(frozen=True)
class Noisy(Task):
    """Another task with a uniform letter of ``wxyz`` after every ``every`` characters of an answer.

    An instance, its canonical form, and hence its split are the other task's.

    Attributes:
        task: the other task.
        every: characters between letters.

    Raises:
        ValueError: if ``every`` is out of range, or the task is noisy already.
    """

    task: Task
    every: int

    def __post_init__(self):
        if isinstance(self.task, Noisy):
            raise ValueError(f"Noisy wraps a task that is not noisy itself, got {self.task!r}")
        check_range(self, every=(self.every, 1, self.task.answer_length))

    @property
    def prompt_length(self) -> int:
        return self.task.prompt_length

    @property
    def answer_length(self) -> int:
        return self.task.answer_length + self.task.answer_length // self.every

    def draw(self, choices: Choices) -> Any:
        return self.task.draw(choices)

    def canonical(self, instance: Any) -> str:
        return self.task.canonical(instance)

    def write(self, instance: Any, choices: Choices) -> Pair:
        prompt, answer = self.task.write(instance, choices)
        pieces = [answer[i : i + self.every] for i in range(0, len(answer), self.every)]
        return Pair(
            prompt,
            "".join(p + choices.one_of(LETTERS) * (len(p) == self.every) for p in pieces),
        )

    def check(self, prompt: str, answer: str) -> bool:
        """Whether the answer without its letters is right, wherever they stand."""
        return self.task.check(prompt, answer.translate(_REMOVE))

    def letter_nats(self, answer: str) -> float:
        """Entropy of the letters of a right answer, nats: what no model's loss can go below."""
        return math.log(len(LETTERS)) * sum(letter in LETTERS for letter in answer)
