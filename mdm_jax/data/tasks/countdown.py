"""Numbers and a target that they make, each used once."""

import dataclasses
import re
from typing import NamedTuple

from mdm_jax.data.tasks.arithmetic import OPERATORS, apply
from mdm_jax.data.tasks.task import Choices, Pair, Task, check_range

_LARGEST = 999
_NUMBER = "(0|[1-9][0-9]{0,2})"
_STEP = re.compile(f"{_NUMBER}([-+*]){_NUMBER}={_NUMBER}")


class CountdownInstance(NamedTuple):
    """The numbers in the order in which the derivation takes them, and that derivation."""

    numbers: tuple[int, ...]
    steps: tuple[str, ...]
    target: int


@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """``4,17,1:68`` to ``1*17=17,17*4=68``: steps with + - * that lead to the target.

    Intermediate results lie in 0 to 999. Several answers can be right, of different lengths.

    Attributes:
        numbers: k.
        largest: of the numbers, which are drawn from 1 to this.

    Raises:
        ValueError: if a setting is out of range.
    """

    numbers: int = 3
    largest: int = 20

    def __post_init__(self):
        check_range(self, numbers=(self.numbers, 2, 20), largest=(self.largest, 1, _LARGEST))

    @property
    def prompt_length(self) -> int:
        return self.numbers * (self._digits + 1) + 3

    @property
    def answer_length(self) -> int:
        # Later steps start from a result of up to three digits, the first from a number.
        return (self.numbers - 1) * (self._digits + 9) + self._digits - 4

    @property
    def _digits(self) -> int:
        return len(str(self.largest))

    def draw(self, choices: Choices) -> CountdownInstance:
        numbers = [1 + choices.below(self.largest) for _ in range(self.numbers)]
        value, steps = numbers[0], []
        for number in numbers[1:]:
            left, right = choices.shuffled([value, number])
            found = [(op, apply(op, left, right)) for op in OPERATORS]
            found = [(op, result) for op, result in found if 0 <= result <= _LARGEST]
            if not found:  # large numbers, the smaller of them first
                left, right = max(left, right), min(left, right)
                found = [("-", left - right)]
            operator, value = choices.one_of(found)
            steps.append(f"{left}{operator}{right}={value}")
        return CountdownInstance(tuple(numbers), tuple(steps), value)

    def canonical(self, instance: CountdownInstance) -> str:
        """The numbers, sorted, and the target."""
        return f"{','.join(map(str, sorted(instance.numbers)))}:{instance.target}"

    def write(self, instance: CountdownInstance, choices: Choices) -> Pair:
        numbers = ",".join(map(str, choices.shuffled(instance.numbers)))
        return Pair(f"{numbers}:{instance.target}", ",".join(instance.steps))

    def check(self, prompt: str, answer: str) -> bool:
        """Whether steps that use each number once lead to the target; any that do are right."""
        numbers, target = prompt.split(":")
        left_over = sorted(map(int, numbers.split(",")))
        for step in answer.split(","):
            match = _STEP.fullmatch(step)
            if match is None:
                return False
            left, right, value = int(match[1]), int(match[3]), int(match[4])
            for operand in (left, right):
                if operand not in left_over:
                    return False
                left_over.remove(operand)
            if apply(match[2], left, right) != value:
                return False
            left_over.append(value)
        return left_over == [int(target)]
