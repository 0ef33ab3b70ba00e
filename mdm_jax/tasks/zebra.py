"""Zebra (Einstein) puzzles with one solution: who lives in which house, from clues."""

import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

from mdm_jax.checks import Whole, checked
from mdm_jax.tasks.task import Choices, Pair, Task, check_range

_HOLDS = {
    "=": lambda x, y: x == y,
    "#": lambda x, y: x != y,
    "+": lambda x, y: x + 1 == y,
    "-": lambda x, y: x < y,
    "/": lambda x, y: abs(x - y) == 1,
}
"""Relations of the houses of two items."""
_SYMMETRIC = "=#/"
_CLUE = re.compile(r"([a-f])([1-6])(?:([=#+/-])([a-f])([1-6])|:([1-6]))")
_POSITIONS = 12  # one clue in so many is a house number


class Clue(NamedTuple):
    """A relation of two items, or ":" and a house. Items are attribute * houses + value."""

    relation: str
    item: int
    other: int


class ZebraInstance(NamedTuple):
    """A puzzle in which the value of each attribute in house h is h."""

    houses: int
    attributes: int
    clues: tuple[Clue, ...]


_Range = Annotated[tuple[int, int], Whole("[2, 6]", "fewest and most", "of a puzzle", several=True)]


@checked
@dataclasses.dataclass(frozen=True)
class Zebra(Task):
    """Clues about items in a row of houses, to the value of each attribute in each house.

    ``3*2;a1=b3;b1+a1;a2#b1;a3:1`` has 3 houses and 2 attributes, a and b, each with the values 1 to
    3 in different houses: a1 and b3 share a house (``#``: do not), b1 is directly left of a1
    (``-``: anywhere left, ``/``: directly left or right), a3 is in house 1. The answer ``312132``
    lists values by house, first those of a. Clues are drawn until one solution is left, so none is
    missing and some may be redundant. Numbers of houses and attributes are uniform between two.
    """

    houses: _Range = (3, 4)
    attributes: _Range = (2, 4)

    def __post_init__(self):
        for name in ("houses", "attributes"):
            bounds = getattr(self, name)
            if len(bounds) != 2:
                raise ValueError(f"Zebra: {name} must be the fewest and the most, got {bounds}")
            low, high = bounds
            check_range(self, **{f"fewest_{name}": (low, 2, 6), f"most_{name}": (high, low, 6)})

    @property
    def lengths(self) -> tuple[int, int]:
        houses, attributes = self.houses[1], self.attributes[1]
        return 3 + 6 * _most_clues(houses, attributes), houses * attributes

    def draw(self, choices: Choices) -> ZebraInstance:
        (low, high), (few, many) = self.houses, self.attributes
        houses, attributes = (
            low + choices.below(high - low + 1),
            few + choices.below(many - few + 1),
        )
        while True:
            clues = _draw_clues(houses, attributes, choices)
            if len(clues) <= _most_clues(houses, attributes):
                return ZebraInstance(houses, attributes, tuple(clues))

    def canonical(self, instance: ZebraInstance) -> str:
        """The clues in order, with houses for items: no names of values or attributes."""
        houses, attributes, clues = instance

        def anonymous(clue: Clue) -> str:
            if clue.relation == ":":
                return f":{clue.other}"
            places = [clue.item % houses, clue.other % houses]
            places = sorted(places) if clue.relation in _SYMMETRIC else places
            return f"{clue.relation}{places[0]}{places[1]}"

        return f"{houses}*{attributes};{';'.join(sorted(map(anonymous, clues)))}"

    def write(self, instance: ZebraInstance, choices: Choices) -> Pair:
        houses, attributes, clues = instance
        letters = choices.shuffled("abcdef"[:attributes])
        values = [choices.shuffled("123456"[:houses]) for _ in range(attributes)]
        names = [f"{letters[i // houses]}{values[i // houses][i % houses]}"
                 for i in range(houses * attributes)]  # fmt: skip

        def written(clue: Clue) -> str:
            if clue.relation == ":":
                return f"{names[clue.item]}:{clue.other + 1}"
            pair = [names[clue.item], names[clue.other]]
            pair = choices.shuffled(pair) if clue.relation in _SYMMETRIC else pair
            return clue.relation.join(pair)

        prompt = ";".join([f"{houses}*{attributes}", *map(written, choices.shuffled(clues))])
        answer = "".join("".join(values[letters.index(letter)]) for letter in sorted(letters))
        return Pair(prompt, answer)

    def count_solutions(self, prompt: str, limit: int = 2) -> int:
        """Solutions of a prompt, at most ``limit``; ValueError if malformed."""
        found = _solutions(_parse(prompt))
        return sum(1 for _, _ in zip(range(limit), found))

    def check(self, prompt: str, answer: str) -> bool:
        houses, attributes, clues = _parse(prompt)
        rows = [answer[i : i + houses] for i in range(0, len(answer), houses)]
        values = list("123456"[:houses])
        if len(rows) != attributes or any(sorted(row) != values for row in rows):
            return False
        house_of = [row.index(value) for row in rows for value in values]
        return _satisfied(clues, house_of)


def _most_clues(houses: int, attributes: int) -> int:
    """Puzzles of more are drawn anew: fewer than one in a hundred."""
    return 3 * houses * attributes // 2


def _parse(prompt: str) -> ZebraInstance:
    size, *texts = prompt.split(";")
    match = re.fullmatch(r"([2-6])\*([2-6])", size)
    found = [_CLUE.fullmatch(text) for text in texts]
    if match is None or None in found:
        raise ValueError(f"a prompt is written as 3*2;a1=b3;b1+a1;a3:1, got {prompt!r}")
    houses, attributes = int(match[1]), int(match[2])

    def item(letter: str, digit: str) -> int:
        attribute, value = "abcdef".index(letter), int(digit) - 1
        if attribute >= attributes or value >= houses:
            raise ValueError(f"there is no {letter}{digit} in a prompt of {size}, got {prompt!r}")
        return attribute * houses + value

    clues = []
    for letter, digit, relation, other, value, house in (clue.groups() for clue in found):
        end = item("a", house) if house else item(other, value)
        clues.append(Clue(relation or ":", item(letter, digit), end))
    return ZebraInstance(houses, attributes, tuple(clues))


def _satisfied(clues: Sequence[Clue], house_of: Sequence[int]) -> bool:
    return all(
        house_of[item] == other
        if relation == ":"
        else _HOLDS[relation](house_of[item], house_of[other])
        for relation, item, other in clues
    )


def _draw_clue(houses: int, attributes: int, choices: Choices) -> Clue:
    """A clue that holds where the item's value is its house, and not in every puzzle."""
    item = choices.below(houses * attributes)
    if not choices.below(_POSITIONS):
        return Clue(":", item, item % houses)
    other = item
    while other == item:
        other = choices.below(houses * attributes)
    places = item % houses, other % houses
    relations = [r for r, holds in _HOLDS.items() if holds(*places)]
    if item // houses == other // houses and "#" in relations:
        relations.remove("#")
    return (
        Clue(choices.one_of(relations), item, other)
        if relations
        else _draw_clue(houses, attributes, choices)
    )


def _draw_clues(houses: int, attributes: int, choices: Choices) -> list[Clue]:
    """Clues with one solution: each after the first ones rules out one that was left."""
    truth = [item % houses for item in range(houses * attributes)]
    clues = [_draw_clue(houses, attributes, choices) for _ in range(len(truth) // 2)]
    while True:
        found = _solutions(ZebraInstance(houses, attributes, tuple(clues)))
        another = next((solution for solution in found if solution != truth), None)
        if another is None:
            return clues
        while True:
            clue = _draw_clue(houses, attributes, choices)
            if not _satisfied([clue], another):
                clues.append(clue)
                break


@functools.cache
def _tables(houses: int) -> Mapping[str, tuple[list[int], list[int]]]:
    """By relation: houses of the second item by a set of houses of the first, and the reverse."""

    def table(holds) -> list[int]:
        return [
            sum(1 << y for y in range(houses)
                if any(mask >> x & 1 and holds(x, y) for x in range(houses)))
            for mask in range(1 << houses)
        ]  # fmt: skip

    return {
        relation: (table(holds), table(lambda x, y, holds=holds: holds(y, x)))
        for relation, holds in _HOLDS.items()
    }


def _solutions(puzzle: ZebraInstance) -> Iterator[list[int]]:
    """The house of each item, for every solution; depth first, the tightest item next."""
    houses, attributes, clues = puzzle
    pairs = [
        (item, other, *_tables(houses)[relation])
        for relation, item, other in clues
        if relation != ":"
    ]
    groups = [range(a * houses, (a + 1) * houses) for a in range(attributes)]

    def narrow(sets: list[int]) -> bool:
        """Remove houses that a clue or a neighbour rules out; False if an item has none left."""
        before = None
        while sets != before:
            before = sets.copy()
            for item, other, forward, backward in pairs:
                sets[other] &= forward[sets[item]]
                sets[item] &= backward[sets[other]]
                if not sets[item] or not sets[other]:
                    return False
            for group in groups:
                once = twice = 0
                for item in group:
                    twice |= once & sets[item]
                    once |= sets[item]
                if once != (1 << houses) - 1:
                    return False
                for item in group:
                    only = sets[item] & ~twice
                    if only:  # a house that nothing else of this attribute can have
                        sets[item] = only
                    if not sets[item] & (sets[item] - 1):
                        for rest in group:
                            if rest != item:
                                sets[rest] &= ~sets[item]
        return all(sets)

    def search(sets: list[int]) -> Iterator[list[int]]:
        if not narrow(sets):
            return
        loose = [(sets[i].bit_count(), i) for i in range(len(sets)) if sets[i] & (sets[i] - 1)]
        if not loose:
            yield [mask.bit_length() - 1 for mask in sets]
            return
        _, item = min(loose)
        rest = sets[item]
        while rest:
            bit = rest & -rest
            rest ^= bit
            yield from search([bit if i == item else mask for i, mask in enumerate(sets)])

    start = [(1 << houses) - 1] * (houses * attributes)
    for relation, item, house in clues:
        if relation == ":":
            start[item] &= 1 << house
    yield from search(start)
