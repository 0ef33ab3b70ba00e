"""Generated tasks: examples, canonical forms, splits, checkers."""

import itertools
import math
import re

import pytest

from mdm_jax import tasks

SUDOKU4 = tasks.Sudoku()
SUDOKU6 = tasks.Sudoku(2, 3, (12, 20))
TASKS = [
    SUDOKU4,
    SUDOKU6,
    tasks.Sudoku(2, 3, (20, 26)),
    tasks.Chain(),
    tasks.Chain(steps=4, distractors=3, modulus=97),
    tasks.Chain(steps=3, distractors=0, modulus=2, result_only=True),
    tasks.Run(),
    tasks.Run(steps=3, modulus=5, last_only=True),
    tasks.Add(),
    tasks.Countdown(),
    tasks.Countdown(numbers=4, largest=999),
    tasks.CountdownDivision(numbers=4, largest=99),
    tasks.Zebra(),
    tasks.Zebra(houses=(3, 5), attributes=(3, 3)),
    tasks.Noisy(SUDOKU4, 2),
    tasks.Noisy(tasks.Chain(), 3),
]
IDS = [repr(task) for task in TASKS]
SPLITS = ("train", "valid", "test")


def examples(task, split, count):
    return [tasks.example(task, split, i) for i in range(count)]


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_examples_fit_are_right_and_use_the_vocabulary(task):
    for split in SPLITS:
        for prompt, answer in examples(task, split, 12):
            assert task.check(prompt, answer)
            longest_prompt, longest_answer = task.lengths
            assert 0 < len(prompt) <= longest_prompt
            assert 0 < len(answer) <= longest_answer
            assert set(prompt + answer) <= set(tasks.VOCABULARY)


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_an_example_is_a_function_of_task_split_and_index(task):
    first = examples(task, "valid", 5)
    again = [tasks.example(task, "valid", i) for i in reversed(range(5))]
    assert first == again[::-1]
    assert len(set(first)) > 1
    assert first != examples(task, "test", 5)


def test_examples_stay_what_they_are():
    """Pinned, so that a change of the generators is seen: it makes other data of old settings."""
    assert tasks.example(SUDOKU4, "train", 0) == ("1423000040303004", "1423234141323214")
    assert tasks.example(tasks.Chain(), "train", 0) == (
        "o=j-9;u=0;t=1-j;j=u*9;?o",
        "u=0,j=0*9=0,o=0-9=1#1",
    )
    assert tasks.example(tasks.Countdown(), "valid", 0) == ("17,2,17:323", "2+17=19,19*17=323")


@pytest.mark.parametrize("task", TASKS, ids=IDS)
def test_wrong_answers_fail(task):
    """An answer with its end changed, cut or prolonged, none at all, and that of another prompt."""
    pairs = examples(task, "test", 8)
    plain = task.task if isinstance(task, tasks.Noisy) else task
    for prompt, answer in pairs:
        core = re.sub("[w-z]", "", answer) if plain is not task else answer
        last = str((int(core[-1]) + 1) % 10)
        for wrong in (
            "",
            core[:-1] + last,
            core[:-1],
            core + "1",
            core + ",",
            "?" + core[1:] + "?",
        ):
            assert not task.check(prompt, wrong), (prompt, wrong)
    others = {task.check(one.prompt, two.answer) for one, two in itertools.permutations(pairs, 2)}
    assert False in others


@pytest.mark.parametrize(
    "task, prompt, right, wrong",
    [
        (
            tasks.Chain(),
            "b=a+7;a=4;?b",
            ["a=4,b=4+7=1#1", "#1", "a#b#1"],
            ["1", "#11", "#1 ", "1#"],
        ),
        (tasks.Chain(result_only=True), "b=a-7;a=4;c=b*b;?b", ["7", "#7"], ["3", "07"]),
        (tasks.Chain(modulus=13), "c=b*a;a=5;b=a-9;?c", ["#6"], ["#-20", "#5"]),
        (tasks.Run(steps=3), "4+3*2-5=", ["749", "009"], ["74", "748", "7499"]),
        (tasks.Run(steps=3, last_only=True), "4+3*2-5=", ["9"], ["749", ""]),
        (tasks.Add(digits=3), "357+689=", ["1046"], ["01046", "1047", "1046 "]),
        (
            tasks.Countdown(),
            "5,7,3:36",
            ["5+7=12,12*3=36", "7+5=12,3*12=36"],
            [
                "5+7=12,12+3=36",
                "12*3=36",
                "5+7=12,12*3=36,36*1=36",
                "5+7=012,12*3=36",
                "36",
                "5*7=35",
            ],
        ),
        (tasks.Countdown(), "5,5,1:11", ["5+5=10,10+1=11"], ["5+1=6,6+5=10", "5+5=10,5+1=6"]),
        (tasks.Countdown(numbers=4), "1,2,3,4:21", ["1+2=3,3+4=7,3*7=21"], ["3*7=21"]),
        (tasks.Countdown(), "2,9,1:6", [], ["2-9=-7,1--7=8"]),
        (tasks.Countdown(), "8,4,3:6", [], ["8/4=2,2*3=6"]),
        (
            tasks.CountdownDivision(),
            "8,4,3:6",
            ["8/4=2,2*3=6", "8*3=24,24/4=6"],
            ["8/3=2,2+4=6", "4/8=0,3+4=7", "8/4=2,3+2=5"],
        ),
        (tasks.CountdownDivision(numbers=4), "8,2,9,3:7", ["8/2=4,9/3=3,4+3=7"], ["8/2=4,4+3=7"]),
        (tasks.CountdownDivision(), "5,5,3:0", ["5-5=0,0/3=0", "5-5=0,3*0=0"], ["5-5=0,3/0=0"]),
        (
            SUDOKU4,
            "1000000000000000",
            ["1234341221434321", "1234341243212143"],
            ["2134341212434321", "1234341221434322", "123434122143432", "1234123412341234"],
        ),
    ],
)
def test_checkers_by_hand(task, prompt, right, wrong):
    for answer in right:
        assert task.check(prompt, answer), answer
    for answer in wrong:
        assert not task.check(prompt, answer), answer


def canonical_chain(prompt):
    """The problem of a prompt with its names replaced by their places, found from the prompt."""
    *definitions, query = prompt.split(";")
    sides = dict(definition.split("=") for definition in definitions)
    depth = {}

    def measure(name):
        uses = [letter for letter in sides[name] if letter in sides]
        depth[name] = 1 + max(map(measure, uses)) if uses else 0
        return depth[name]

    measure(query[1:])
    place = {name: chr(65 + d) for name, d in depth.items()}
    needed, others = [], []
    for name, side in sides.items():
        side = "".join(place.get(letter, letter) for letter in side)
        operands = re.fullmatch(r"(\w+)([+*])(\w+)", side)
        if operands:
            side = operands[2].join(sorted(operands.group(1, 3)))
        if name in depth:
            needed.append((place[name], side))
        else:
            others.append(side)
    return (tuple(sorted(needed)), tuple(sorted(others)))


FORMS = {
    tasks.Chain(steps=1, distractors=1, modulus=3): canonical_chain,
    tasks.Add(digits=1): lambda prompt: tuple(sorted(prompt[:-1].split("+"))),
    tasks.Run(steps=1, modulus=10): lambda p: p if p[1] == "-" else (p[1], *sorted((p[0], p[2]))),
    tasks.Countdown(numbers=2, largest=9): lambda p: (sorted(p[:3]), p[3:]).__repr__(),
}


@pytest.mark.parametrize("task", FORMS, ids=repr)
def test_no_twin_of_a_problem_is_in_another_split(task):
    """On tasks with so few problems that splits by string would share nearly all of them."""
    found = {s: {FORMS[task](p.prompt) for p in examples(task, s, 150)} for s in SPLITS}
    for one, two in itertools.combinations(SPLITS, 2):
        assert found[one] and not found[one] & found[two]
    prompts = {p.prompt for p in examples(task, "train", 150)}
    assert len(prompts) > len(found["train"])  # there are twins


def test_an_instance_written_twice_is_a_twin():
    task = tasks.Chain(steps=3, distractors=2)
    choices = tasks.Choices("twins")
    instance = task.draw(choices)
    one, two = task.write(instance, choices), task.write(instance, choices)
    assert one.prompt != two.prompt
    assert canonical_chain(one.prompt) == canonical_chain(two.prompt)
    assert one.answer[-2:] == two.answer[-2:]
    *needed, last, first = instance
    assert task.canonical((*needed, first, last)) == task.canonical(instance)


def test_splits_hold_their_shares():
    counts = dict.fromkeys(SPLITS, 0)
    for number in range(20_000):
        counts[tasks.split_of(f"problem {number}")] += 1
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1)):
        error = math.sqrt(share * (1 - share) / 20_000)
        assert abs(counts[split] / 20_000 - share) < 5 * error


def valid_grids():
    """All 288 grids of 4 x 4, by trying rows."""
    rows = ["".join(row) for row in itertools.permutations("1234")]

    def apart(*lines):
        return all(len(set(column)) == len(lines) for column in zip(*lines))

    halves = [
        (one, two)
        for one, two in itertools.permutations(rows, 2)
        if apart(one, two) and len({*one[:2], *two[:2]}) == 4
    ]
    for top, bottom in itertools.permutations(halves, 2):
        if apart(*top, *bottom):
            yield "".join(top + bottom)


@pytest.fixture(scope="module")
def grids():
    found = list(valid_grids())
    assert len(found) == 288
    return found


def test_every_grid_can_come_up(grids):
    choices = tasks.Choices("grids")
    assert {SUDOKU4.draw(choices) for _ in range(3000)} == set(grids)


def test_sudoku_solutions_are_the_only_ones(grids):
    hard = tasks.Sudoku(blanks=(9, 12))
    for prompt, answer in examples(SUDOKU4, "train", 40) + examples(hard, "test", 20):
        fits = [g for g in grids if all(p in ("0", d) for p, d in zip(prompt, g))]
        assert fits == [answer]


def test_counting_solutions_agrees_with_trying_all(grids):
    choices = tasks.Choices("puzzles")
    seen = set()
    for _ in range(30):
        prompt = "".join("0" if choices.below(4) else d for d in choices.one_of(grids))
        fits = sum(all(p in ("0", d) for p, d in zip(prompt, g)) for g in grids)
        assert SUDOKU4.count_solutions(prompt, limit=1000) == fits
        assert SUDOKU4.count_solutions(prompt) == min(fits, 2)
        seen.add(min(fits, 2))
    assert seen == {1, 2}
    assert SUDOKU4.count_solutions("1100" + "0" * 12) == 0
    with pytest.raises(ValueError, match="16 digits from 0 to 4"):
        SUDOKU4.count_solutions("5" + "0" * 15)


@pytest.mark.parametrize("blanks", [(12, 20), (20, 26)])
def test_larger_puzzles_have_one_solution_and_the_blanks_asked_for(blanks):
    task = tasks.Sudoku(2, 3, blanks)
    counts = set()
    for prompt, answer in examples(task, "valid", 25):
        assert task.count_solutions(prompt) == 1
        assert all(given in ("0", digit) for given, digit in zip(prompt, answer))
        counts.add(prompt.count("0"))
    assert blanks[0] <= min(counts) < max(counts) <= blanks[1]


def test_noise_is_uniform_comes_after_every_few_characters_and_strips_back():
    noisy = tasks.Noisy(SUDOKU4, 3)
    letters = ""
    for prompt, answer in examples(noisy, "train", 100):
        assert re.fullmatch(r"(\d{3}[w-z]){5}\d", answer) and len(answer) == noisy.lengths[1]
        assert SUDOKU4.check(prompt, re.sub("[w-z]", "", answer))
        letters += re.sub(r"\d", "", answer)
    assert noisy.letter_nats(answer) == pytest.approx(5 * math.log(4))
    for letter in "wxyz":  # 500 letters, standard deviation 9.7
        assert abs(letters.count(letter) - 125) < 5 * 9.7


def test_a_noisy_task_shares_the_splits_of_its_own():
    """So a model that learned the one has not seen test problems of the other."""
    noisy = tasks.Noisy(SUDOKU4, 2)
    for _, answer in examples(noisy, "test", 20):
        assert tasks.split_of(re.sub("[w-z]", "", answer)) == "test"


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.Chain(steps=22), "steps must be a whole number from 1 to 21, got 22"),
        (lambda: tasks.Chain(steps=20, distractors=2), "distractors must be .* to 1, got 2"),
        (lambda: tasks.Sudoku(rows=4, columns=3), "size must be .* to 9, got 12"),
        (lambda: tasks.Sudoku(blanks=(11, 6)), "most_blanks must be .* from 11"),
        (lambda: tasks.Sudoku(blanks=(6, 14)), "most_blanks must be .* to 13, got 14"),
        (lambda: tasks.Sudoku(blanks=(6,)), "fewest and the most"),
        (lambda: tasks.CountdownDivision(target=(9,)), "least and the greatest"),
        (lambda: tasks.CountdownDivision(target=(9, 3)), "greatest_target must be .* from 9"),
        (
            lambda: tasks.example(tasks.CountdownDivision(2, 3, target=(50, 60)), "test", 0),
            "no numbers in 1000 draws reach 5",
        ),
        (lambda: tasks.Noisy(SUDOKU4, 0), "every"),
        (lambda: tasks.Noisy(tasks.Noisy(SUDOKU4, 2), 2), "not noisy itself"),
        (lambda: tasks.example(SUDOKU4, "dev", 0), "train, valid, test, got 'dev'"),
        (lambda: tasks.example(SUDOKU4, "test", -1), "not be negative"),
        (lambda: tasks.example(tasks.Sudoku(1, 2, (1, 3)), "test", 0), "too few different"),
        (lambda: tasks.example(tasks.Sudoku(blanks=(13, 13)), "test", 0), "lower blanks"),
    ],
)
def test_settings_that_make_no_task_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_targets_are_uniform_and_division_comes_up():
    """Of 1,000 problems, 11 to each target, standard deviation 3.3."""
    task = tasks.CountdownDivision(numbers=3, largest=99)
    choices = tasks.Choices("targets")
    drawn = [task.draw(choices) for _ in range(1000)]
    counts = {t: sum(d.target == t for d in drawn) for t in range(10, 101)}
    assert sum(counts.values()) == 1000 and max(counts.values()) < 11 + 5 * 3.3
    half = sum(counts[t] for t in range(10, 55))  # 45 of 91, standard deviation 15.8
    assert abs(half - 1000 * 45 / 91) < 5 * 15.8
    steps = [step for d in drawn for step in d.steps]
    assert all(any(op in step for step in steps) for op in "+-*/")
