"""Tasks of arithmetic: running sums, derivations, addition, countdown; and a noisy wrapper."""

import dataclasses
import itertools
import math
import re
import string
from typing import Annotated, Any, ClassVar, NamedTuple

from mdm_jax.checks import Plain, Whole, checked
from mdm_jax.tasks.task import Choices, Pair, Task, check_range

OPERATORS = "+-*"


def apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def commutes(operator: str) -> bool:
    return operator != "-"


LETTERS = "wxyz"
"""Inserted by :class:`Noisy`; no answer of another task contains them."""

_REMOVE = str.maketrans("", "", LETTERS)


@dataclasses.dataclass(frozen=True)
class Noisy(Task):
    """Another task with a random letter of ``wxyz`` after every ``every`` characters of its answer.

    Its loss never vanishes, as in natural language: each letter costs log 4 nats. Instances and
    splits are the other task's. ValueError if ``every`` is out of range or the task is noisy.
    """

    task: Task
    every: int

    def __post_init__(self):
        if isinstance(self.task, Noisy):
            raise ValueError(f"Noisy wraps a task that is not noisy itself, got {self.task!r}")
        check_range(self, every=(self.every, 1, self.task.lengths[1]))

    @property
    def lengths(self) -> tuple[int, int]:
        prompt, answer = self.task.lengths
        return prompt, answer + answer // self.every

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
        """Whether the answer without its letters is correct."""
        return self.task.check(prompt, answer.translate(_REMOVE))

    def letter_nats(self, answer: str) -> float:
        """Entropy of a correct answer's letters in nats: a lower bound of any model's loss."""
        return math.log(len(LETTERS)) * sum(letter in LETTERS for letter in answer)


@checked
@dataclasses.dataclass(frozen=True)
class Run(Task):
    """``4+3*2-5=`` to ``749``: the value after each operator, from left to right, modulo p.

    An instance is the prompt without ``=``.
    """

    steps: Annotated[int, Whole("[1, 500]", "operators", "of a problem")] = 4
    modulus: Annotated[int, Whole("[2, 10]", "", "p: each value is one digit")] = 10
    last_only: Annotated[bool, Plain(bool, "the answer is the last value alone")] = False

    @property
    def lengths(self) -> tuple[int, int]:
        return 2 * self.steps + 2, 1 if self.last_only else self.steps

    def draw(self, choices: Choices) -> str:
        first = str(choices.below(self.modulus))
        rest = [
            f"{choices.one_of(OPERATORS)}{choices.below(self.modulus)}" for _ in range(self.steps)
        ]
        return first + "".join(rest)

    def canonical(self, instance: str) -> str:
        """The sum, its first two numbers sorted where they commute."""
        first, operator, second = instance[:3]
        if commutes(operator):
            first, second = sorted((first, second))
        return f"mod {self.modulus};{first}{operator}{second}{instance[3:]}"

    def write(self, instance: str, _choices: Choices) -> Pair:
        values = self._values(instance)
        return Pair(f"{instance}=", values[-1:] if self.last_only else values)

    def _values(self, instance: str) -> str:
        value, digits = int(instance[0]), []
        for operator, number in re.findall(r"([-+*])(\d)", instance):
            value = apply(operator, value, int(number)) % self.modulus
            digits.append(str(value))
        return "".join(digits)

    def check(self, prompt: str, answer: str) -> bool:
        """Whether the last value and the number of values are correct."""
        last = self._values(prompt.removesuffix("="))[-1]
        return len(answer) == self.lengths[1] and answer.isdigit() and answer[-1] == last


_NAMES = "".join(letter for letter in string.ascii_lowercase if letter not in LETTERS)
_NODES = string.ascii_uppercase  # names before the names of a prompt are chosen
_EXPRESSION = re.compile(r"(\w+)([-+*])(\w+)")


@checked
@dataclasses.dataclass(frozen=True)
class Chain(Task):
    """``c=i-g;i=g*7;g=2;?c`` to ``g=2,i=2*7=4,c=4-2=2#2``, all modulo p.

    One leaf, then ``steps`` needed nodes, each combining the one before it with a constant or an
    earlier node, then ``distractors``: unneeded nodes that depend on needed ones. An instance is
    the right-hand sides in this order, with nodes called A, B, C, ... For p up to 10 all answers
    have one length. ValueError if there are more nodes than letters.
    """

    steps: Annotated[int, Whole("[1, 1e2]", "assignments", "that the answer needs")] = 2
    distractors: Annotated[int, Whole("[0, 1e2]", "assignments", "that it does not need")] = 1
    modulus: Annotated[int, Whole("[2, 1000]", "", "p, of all values")] = 10
    result_only: Annotated[bool, Plain(bool, "the answer has no derivation")] = False

    def __post_init__(self):
        check_range(self, steps=(self.steps, 1, len(_NAMES) - 1))
        check_range(self, distractors=(self.distractors, 0, len(_NAMES) - 1 - self.steps))

    @property
    def lengths(self) -> tuple[int, int]:
        digits = self._digits
        prompt = 2 + digits + (self.steps + self.distractors) * (5 + digits) + 3
        derivation = 3 + 2 * digits + self.steps * (5 + 3 * digits)
        return prompt, digits if self.result_only else derivation

    @property
    def _digits(self) -> int:
        return len(str(self.modulus - 1))

    def draw(self, choices: Choices) -> tuple[str, ...]:
        sides = [str(choices.below(self.modulus))]
        for node in range(self.steps):
            sides.append(self._combine(node, _NODES[:node], choices))
        for _ in range(self.distractors):
            node = choices.below(self.steps + 1)
            others = _NODES[: self.steps + 1].replace(_NODES[node], "")
            sides.append(self._combine(node, others, choices))
        return tuple(sides)

    def _combine(self, node: int, others: str, choices: Choices) -> str:
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
        """Whether the text after the last ``#``, or a bare result, is the value of the query."""
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


@checked
@dataclasses.dataclass(frozen=True)
class Add(Task):
    """``357+689=`` to ``1046``: two n-digit numbers, their sum in n + 1 digits, zeros kept.

    An instance is the two numbers.
    """

    digits: Annotated[int, Whole("[1, 100]", "digits", "of both numbers")] = 4

    @property
    def lengths(self) -> tuple[int, int]:
        return 2 * self.digits + 2, self.digits + 1

    def draw(self, choices: Choices) -> tuple[str, str]:
        first, second = (
            "".join(str(choices.below(10)) for _ in range(self.digits)) for _ in range(2)
        )
        return first, second

    def canonical(self, instance: tuple[str, str]) -> str:
        return "+".join(sorted(instance))

    def write(self, instance: tuple[str, str], _choices: Choices) -> Pair:
        return Pair(f"{'+'.join(instance)}=", self._sum(*instance))

    def _sum(self, first: str, second: str) -> str:
        return str(int(first) + int(second)).zfill(self.digits + 1)

    def check(self, prompt: str, answer: str) -> bool:
        return answer == self._sum(*prompt.removesuffix("=").split("+"))


_LARGEST = 999
_DRAWS = 1000  # of numbers, before a target is given up
_NUMBER = "(0|[1-9][0-9]{0,2})"
_STEP = re.compile(f"{_NUMBER}([-+*/]){_NUMBER}={_NUMBER}")


class CountdownInstance(NamedTuple):
    """Numbers in the order of the derivation, and the derivation."""

    numbers: tuple[int, ...]
    steps: tuple[str, ...]
    target: int


@checked
@dataclasses.dataclass(frozen=True)
class Countdown(Task):
    """``4,17,1:68`` to ``1*17=17,17*4=68``: steps with + - * that lead to the target.

    Intermediate results lie in 0 to 999. Several answers, of different lengths, can be correct.
    """

    numbers: Annotated[int, Whole("[2, 20]", "numbers", "to combine")] = 3
    largest: Annotated[int, Whole("[1, 999]", "", "number to combine, from 1")] = 20
    operators: ClassVar[str] = OPERATORS

    @property
    def lengths(self) -> tuple[int, int]:
        # Later steps start from a result of up to three digits, the first from a number.
        digits = len(str(self.largest))
        return self.numbers * (digits + 1) + 3, (self.numbers - 1) * (digits + 9) + digits - 4

    def draw(self, choices: Choices) -> CountdownInstance:
        numbers = [1 + choices.below(self.largest) for _ in range(self.numbers)]
        value, steps = numbers[0], []
        for number in numbers[1:]:
            left, right = choices.shuffled([value, number])
            results = self.results(left, right)
            if not results:  # large numbers, the smaller of them first
                left, right = max(left, right), min(left, right)
                results = [("-", left - right)]
            operator, value = choices.one_of(results)
            steps.append(f"{left}{operator}{right}={value}")
        return CountdownInstance(tuple(numbers), tuple(steps), value)

    def results(self, left: int, right: int) -> list[tuple[str, int]]:
        """Operators that may be applied to two numbers, with what they give."""
        found = [(op, apply(op, left, right)) for op in OPERATORS]
        if "/" in self.operators and right and left % right == 0:
            found.append(("/", left // right))
        return [(operator, result) for operator, result in found if 0 <= result <= _LARGEST]

    def canonical(self, instance: CountdownInstance) -> str:
        return f"{','.join(map(str, sorted(instance.numbers)))}:{instance.target}"

    def write(self, instance: CountdownInstance, choices: Choices) -> Pair:
        numbers = ",".join(map(str, choices.shuffled(instance.numbers)))
        return Pair(f"{numbers}:{instance.target}", ",".join(instance.steps))

    def check(self, prompt: str, answer: str) -> bool:
        """Whether the steps use each number once and reach the target."""
        numbers, target = prompt.split(":")
        left_over = sorted(map(int, numbers.split(",")))
        for step in answer.split(","):
            match = _STEP.fullmatch(step)
            if match is None or match[2] not in self.operators:
                return False
            left, right, value = int(match[1]), int(match[3]), int(match[4])
            for operand in (left, right):
                if operand not in left_over:
                    return False
                left_over.remove(operand)
            if (match[2], value) not in self.results(left, right):
                return False
            left_over.append(value)
        return left_over == [int(target)]


@checked
@dataclasses.dataclass(frozen=True)
class CountdownDivision(Countdown):
    """Countdown with exact division, and a target that is drawn first: ``44,19,35,12:98``.

    The target is uniform in its range and numbers are drawn until they reach it. The derivation is
    the first that a depth-first search in random order finds, so that intermediate results may be
    combined with one another. As in Stream of Search (Gandhi et al. 2024), whose intermediate
    results have no bound, but for the order of the search.
    """

    target: Annotated[
        tuple[int, int], Whole("[0, 999]", "", "least and greatest result", several=True)
    ] = (10, 100)
    operators: ClassVar[str] = f"{OPERATORS}/"

    def __post_init__(self):
        if len(self.target) != 2:
            raise ValueError(
                f"CountdownDivision: target must be the least and the greatest, got {self.target}"
            )
        low, high = self.target
        check_range(self, least_target=(low, 0, _LARGEST), greatest_target=(high, low, _LARGEST))

    def draw(self, choices: Choices) -> CountdownInstance:
        low, high = self.target
        target = low + choices.below(high - low + 1)
        for _ in range(_DRAWS):
            numbers = [1 + choices.below(self.largest) for _ in range(self.numbers)]
            steps = self._reach(numbers, target, choices)
            if steps is not None:
                return CountdownInstance(tuple(numbers), steps, target)
        raise ValueError(f"{self!r}: no numbers in {_DRAWS} draws reach {target}; raise largest")

    def _reach(self, left: list[int], target: int, choices: Choices) -> tuple[str, ...] | None:
        """Steps from these numbers to the target; None if there are none."""
        if len(left) == 1:
            return () if left[0] == target else None
        for i, j in choices.shuffled(list(itertools.combinations(range(len(left)), 2))):
            rest = [number for place, number in enumerate(left) if place not in (i, j)]
            one, two = max(left[i], left[j]), min(left[i], left[j])
            for operator, result in choices.shuffled(self.results(one, two)):
                found = self._reach([*rest, result], target, choices)
                if found is not None:
                    pair = (one, two)
                    if operator in "+*":
                        pair = choices.shuffled(pair)
                    return (f"{pair[0]}{operator}{pair[1]}={result}", *found)
        return None
