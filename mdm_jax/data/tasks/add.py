"""Addition of two numbers."""

import dataclasses

from mdm_jax.data.tasks.task import Choices, Pair, Task, check_range


@dataclasses.dataclass(frozen=True)
class Add(Task):
    """``357+689=`` to ``1046``: two n-digit numbers, their sum in n + 1 digits, zeros kept.

    An instance is the two numbers.

    Attributes:
        digits: n.

    Raises:
        ValueError: if it is out of range.
    """

    digits: int = 4

    def __post_init__(self):
        check_range(self, digits=(self.digits, 1, 100))

    @property
    def prompt_length(self) -> int:
        return 2 * self.digits + 2

    @property
    def answer_length(self) -> int:
        return self.digits + 1

    def draw(self, choices: Choices) -> tuple[str, str]:
        first, second = (
            "".join(str(choices.below(10)) for _ in range(self.digits)) for _ in range(2)
        )
        return first, second

    def canonical(self, instance: tuple[str, str]) -> str:
        """The two numbers, sorted."""
        return "+".join(sorted(instance))

    def write(self, instance: tuple[str, str], _choices: Choices) -> Pair:
        return Pair(f"{'+'.join(instance)}=", self._sum(*instance))

    def _sum(self, first: str, second: str) -> str:
        return str(int(first) + int(second)).zfill(self.digits + 1)

    def check(self, prompt: str, answer: str) -> bool:
        """Whether it is the sum, digit for digit."""
        return answer == self._sum(*prompt.removesuffix("=").split("+"))
