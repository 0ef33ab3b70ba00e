"""Zebra puzzles: solutions by trying all, the meaning of each clue, twins."""

import itertools
import re

import pytest

from mdm_jax import tasks

SMALL = tasks.Zebra(houses=(3, 3), attributes=(2, 3))
MEANING = {
    "=": lambda x, y: x == y,
    "#": lambda x, y: x != y,
    "+": lambda x, y: y - x == 1,
    "-": lambda x, y: y - x in (1, 2),
    "/": lambda x, y: y - x in (1, -1),
}


def solutions(prompt):
    """All answers to a prompt of three houses, by trying each, read off the text alone."""
    size, *clues = prompt.split(";")
    letters = "abc"[: int(size[2])]
    for rows in itertools.product(map("".join, itertools.permutations("123")), repeat=len(letters)):
        house = {a + value: row.index(value) for a, row in zip(letters, rows) for value in row}
        if all(
            house[clue[:2]] == int(clue[3]) - 1
            if clue[2] == ":"
            else MEANING[clue[2]](house[clue[:2]], house[clue[3:]])
            for clue in clues
        ):
            yield "".join(rows)


def test_solutions_are_the_only_ones_and_every_relation_comes_up():
    seen = set()
    for split in ("train", "test"):
        for index in range(30):
            prompt, answer = tasks.example(SMALL, split, index)
            assert list(solutions(prompt)) == [answer]
            seen |= set(re.findall(r"[=#+/:-]", prompt.partition(";")[2]))
    assert seen == {*MEANING, ":"}


def test_counting_and_checking_agree_with_trying_all():
    """Also where clues are missing, so that several answers are right, or contradict."""
    every = ["".join(r) for r in itertools.product(map("".join, itertools.permutations("123")),
                                                   repeat=2)]  # fmt: skip
    counts = set()
    for index in range(40):
        prompt, _ = tasks.example(tasks.Zebra((3, 3), (2, 2)), "train", index)
        size, *clues = prompt.split(";")
        for some in (clues[:1], clues[: len(clues) // 2], [*clues, "a1:1", "a2:1"]):
            cut = ";".join([size, *some])
            right = list(solutions(cut))
            assert SMALL.count_solutions(cut, limit=100) == len(right)
            assert SMALL.count_solutions(cut) == min(len(right), 2)
            assert [answer for answer in every if SMALL.check(cut, answer)] == right
            counts.add(min(len(right), 3))
    assert counts >= {0, 1, 2, 3}


def test_a_clue_of_the_docstring():
    prompt = "3*2;a1=b3;b1+a1;a2#b1;a3:1"
    assert SMALL.check(prompt, "312132") and list(solutions(prompt)) == ["312132"]
    assert not SMALL.check(prompt, "321132") and not SMALL.check(prompt, "31213")
    assert not SMALL.check(prompt, "311132") and not SMALL.check(prompt, "312132123")


def test_renamed_puzzles_are_twins():
    choices = tasks.Choices("twins")
    instance = SMALL.draw(choices)
    one, two = SMALL.write(instance, choices), SMALL.write(instance, choices)
    assert one.prompt != two.prompt and SMALL.check(*one) and SMALL.check(*two)
    shuffled = instance._replace(clues=tuple(choices.shuffled(instance.clues)))
    assert SMALL.canonical(shuffled) == SMALL.canonical(instance)
    fewer = instance._replace(clues=instance.clues[1:])
    assert SMALL.canonical(fewer) != SMALL.canonical(instance)


def test_large_puzzles_have_one_solution():
    task = tasks.Zebra((6, 6), (6, 6))
    for index in range(3):
        prompt, answer = tasks.example(task, "valid", index)
        assert task.count_solutions(prompt) == 1 and task.check(prompt, answer)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.Zebra(houses=(3,)), "houses must be the fewest and the most"),
        (lambda: tasks.Zebra(attributes=(4, 3)), "most_attributes must be .* from 4"),
        (lambda: SMALL.count_solutions("3*2;a1>b1"), "written as 3\\*2;a1=b3"),
        (lambda: SMALL.check("3*2;a1=c1", "123123"), "no c1 in a prompt of 3\\*2"),
        (lambda: SMALL.check("3*2;a4:1", "123123"), "no a4 in a prompt"),
        (lambda: SMALL.check("3*2;a1:4", "123123"), "no a4 in a prompt"),
    ],
)
def test_what_is_no_puzzle_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
