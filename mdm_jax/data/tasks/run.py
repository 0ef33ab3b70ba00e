"""A sum evaluated from left to right, with its running values as the answer."""

import dataclasses
import re

from mdm_jax.data.tasks.arithmetic import OPERATORS, apply, commutes
from mdm_jax.data.tasks.task import Choices, Pair, Task, check_range


@dataclasses.dataclass(frozen=True)
class Run(Task):
    """``4+3*2-5=`` to ``749``: the value after each operator, from left to right, modulo p.

    An instance is the prompt without its ``=``.

    Attributes:
        steps: operators.
        modulus: p, 2 to 10, so that each value is one digit.
        last_only: the answer is the last value alone.

    Raises:
        ValueError: if a setting is out of range.
    """

    steps: int = 4
    modulus: int = 10
    last_only: bool = False

    def __post_init__(self):
        check_range(self, steps=(self.steps, 1, 500), modulus=(self.modulus, 2, 10))

    @property
    def prompt_length(self) -> int:
        return 2 * self.steps + 2

    @property
    def answer_length(self) -> int:
        return 1 if self.last_only else self.steps

    def draw(self, choices: Choices) -> str:
        first = str(choices.below(self.modulus))
        rest = [
            f"{choices.one_of(OPERATORS)}{choices.below(self.modulus)}" for _ in range(self.steps)
        ]
        return first + "".join(rest)

    def canonical(self, instance: str) -> str:
        """The sum, with its first two numbers sorted where their order does not matter."""
        first, operator, second = instance[:3]
        if commutes(operator):
            first, second = sorted((first, second))
        return f"mod {self.modulus};{first}{operator}{second}{instance[3:]}"

    def write(self, instance: str, _choices: Choices) -> Pair:
        values = self._values(instance)
        return Pair(f"{instance}=", values[-1:] if self.last_only else values)

    def _values(self, instance: str) -> str:
        value, found = int(instance[0]), []
        for operator, number in re.findall(r"([-+*])(\d)", instance):
            value = apply(operator, value, int(number)) % self.modulus
            found.append(str(value))
        return "".join(found)

    def check(self, prompt: str, answer: str) -> bool:
        """Whether the last value and the number of values are right."""
        last = self._values(prompt.removesuffix("="))[-1]
        return len(answer) == self.answer_length and answer.isdigit() and answer[-1] == last
