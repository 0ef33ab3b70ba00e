"""Arithmetic over named definitions in random order, with a derivation as the answer."""

import dataclasses
import re
import string

from mdm_jax.data.tasks.arithmetic import OPERATORS, apply, commutes
from mdm_jax.data.tasks.noisy import LETTERS
from mdm_jax.data.tasks.task import Choices, Pair, Task, check_range

_NAMES = "".join(letter for letter in string.ascii_lowercase if letter not in LETTERS)
_NODES = string.ascii_uppercase  # names before the names of a prompt are chosen
_EXPRESSION = re.compile(r"(\w+)([-+*])(\w+)")


@dataclasses.dataclass(frozen=True)
class Chain(Task):
    """``c=i-g;i=g*7;g=2;?c`` to ``g=2,i=2*7=4,c=4-2=2#2``, all modulo p.

    One leaf, then ``steps`` needed nodes, each of which combines the one before it with a constant
    or any node still earlier, then ``distractors`` that hang off needed nodes and play no part.
    An instance is the right-hand sides in this order, with nodes called A, B, C, ...

    Attributes:
        steps: needed nodes beside the leaf.
        distractors: nodes that are not needed.
        modulus: p, at least 2. Up to 10, all answers have one length.
        result_only: the answer is the result without its derivation, as in ``2``.

    Raises:
        ValueError: if a setting is out of range, or there are more nodes than letters.
    """

    steps: int = 2
    distractors: int = 1
    modulus: int = 10
    result_only: bool = False

    def __post_init__(self):
        check_range(
            self,
            steps=(self.steps, 1, len(_NAMES) - 1),
            distractors=(self.distractors, 0, len(_NAMES) - 1 - self.steps),
            modulus=(self.modulus, 2, 1000),
        )

    @property
    def prompt_length(self) -> int:
        digits = self._digits
        return 2 + digits + (self.steps + self.distractors) * (5 + digits) + 3

    @property
    def answer_length(self) -> int:
        digits = self._digits
        return digits if self.result_only else 3 + 2 * digits + self.steps * (5 + 3 * digits)

    @property
    def _digits(self) -> int:
        return len(str(self.modulus - 1))

    def draw(self, choices: Choices) -> tuple[str, ...]:
        found = [str(choices.below(self.modulus))]
        for node in range(self.steps):
            found.append(self._combine(node, _NODES[:node], choices))
        for _ in range(self.distractors):
            node = choices.below(self.steps + 1)
            others = _NODES[: self.steps + 1].replace(_NODES[node], "")
            found.append(self._combine(node, others, choices))
        return tuple(found)

    def _combine(self, node: int, others: str, choices: Choices) -> str:
        """One node with a constant, or another one of ``others`` where there are any."""
        constant = str(1 + choices.below(self.modulus - 1))
        other = choices.one_of(others) if others and choices.below(2) else constant
        left, right = choices.shuffled([_NODES[node], other])
        return f"{left}{choices.one_of(OPERATORS)}{right}"

    def canonical(self, instance: tuple[str, ...]) -> str:
        """The needed nodes in order, then the others sorted; operands sorted where they commute."""
        sides = [_sorted_operands(side) for side in instance]
        needed, others = sides[: self.steps + 1], sides[self.steps + 1 :]
        return ";".join([f"mod {self.modulus}", *needed, "", *sorted(others)])

    def write(self, instance: tuple[str, ...], choices: Choices) -> Pair:
        letters = choices.shuffled(_NAMES)[: len(instance)]
        names = str.maketrans(_NODES[: len(instance)], "".join(letters))
        definitions = [f"{name}={side.translate(names)}" for name, side in zip(letters, instance)]
        prompt = ";".join([*choices.shuffled(definitions), f"?{letters[self.steps]}"])
        values, derivation = {}, []
        for name, side in zip(letters, instance[: self.steps + 1]):
            written, values[name] = self._step(side.translate(names), values)
            derivation.append(f"{name}={written}")
        result = values[letters[self.steps]]
        return Pair(prompt, str(result) if self.result_only else f"{','.join(derivation)}#{result}")

    def _step(self, side: str, values: dict[str, int]) -> tuple[str, int]:
        """A right-hand side with its operands' values and its own, and that value."""
        if side.isdigit():
            return side, int(side)
        left, operator, right = _EXPRESSION.fullmatch(side).groups()
        left, right = (values[x] if x in values else int(x) for x in (left, right))
        value = apply(operator, left, right) % self.modulus
        return f"{left}{operator}{right}={value}", value

    def check(self, prompt: str, answer: str) -> bool:
        """Whether what follows the last ``#``, or the whole result, is the value asked for."""
        _, mark, result = answer.rpartition("#")
        return (bool(mark) or self.result_only) and result == str(self._value(prompt))

    def _value(self, prompt: str) -> int:
        *definitions, query = prompt.split(";")
        sides = dict(definition.split("=") for definition in definitions)
        values: dict[str, int] = {}

        def find(name: str) -> int:
            if name not in values:
                for other in sides[name]:
                    if other in sides:
                        find(other)
                values[name] = self._step(sides[name], values)[1]
            return values[name]

        return find(query.removeprefix("?"))


def _sorted_operands(side: str) -> str:
    match = _EXPRESSION.fullmatch(side)
    if match is None or not commutes(match[2]):
        return side
    return match[2].join(sorted((match[1], match[3])))
